"""The endpoints and the API reference agree."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import BaseRoute, Mount, Route

from photogram.core.config import ServeConfig
from photogram.server.app import create_app
from photogram.server.auth import Keys

ROOT = Path(__file__).resolve().parents[2]


def paths(routes: list[BaseRoute], prefix: str = "") -> set[tuple[str, str]]:
    """Every (method, path); converters such as ``{model:path}`` are shown as ``{model}``."""
    found: set[tuple[str, str]] = set()
    for route in routes:
        if isinstance(route, Mount):
            found |= paths(list(route.routes), prefix + route.path)
        elif isinstance(route, Route):
            shown = re.sub(r":[a-z]+}", "}", prefix + route.path)
            found |= {(method, shown) for method in (route.methods or ()) if method != "HEAD"}
    return found


@pytest.fixture
def routes() -> set[tuple[str, str]]:
    # Building the application starts nothing, so its parts may be missing here.
    parts: dict[str, Any] = dict.fromkeys(inspect.signature(create_app).parameters)
    return paths(list(create_app(**{**parts, "config": ServeConfig(), "keys": Keys(())}).routes))


def test_every_endpoint_is_in_the_api_reference(routes: set[tuple[str, str]]) -> None:
    page = (ROOT / "docs/api.md").read_text()
    undocumented = {f"{m} {path}" for m, path in routes if f"`{m} {path}`" not in page and f"`{path}`" not in page}
    assert undocumented == set()


def test_every_endpoint_of_the_api_reference_exists(routes: set[tuple[str, str]]) -> None:
    page = (ROOT / "docs/api.md").read_text()
    documented = set(re.findall(r"^\| `(GET|POST|DELETE) (/[^`]*)`", page, re.MULTILINE))
    assert documented
    assert documented <= routes
