"""What tests of every folder share: the packages beside them by name, folders of tiny families, a live server."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bits are compared: one thread keeps the order of every sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# Slow machines run these too; in CI the same cases are tried every time.
hypothesis.settings.register_profile("photogram", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("photogram")

if TYPE_CHECKING:
    from running import Running

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def families_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def family_folder(families_root):
    """Return the folder of a tiny family, made on first use."""
    from families import folder

    return lambda name: folder(name, families_root)


@pytest.fixture(scope="session")
def live_server(tmp_path_factory) -> Iterator["Running"]:
    """`photogram serve` with the built-in image model, warm, shared by all tests that do it no harm."""
    from running import serve

    server = serve(tmp_path_factory.mktemp("live"))
    yield server
    server.stop()
