"""A real S3 server, started once for all tests that want one."""

import pytest

from .weed import Weed


@pytest.fixture(scope="session")
def weed(tmp_path_factory):
    server = Weed(tmp_path_factory.mktemp("weed")).start()
    yield server
    server.kill()
