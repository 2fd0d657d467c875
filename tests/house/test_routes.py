"""The endpoints and the API reference agree."""

import re
from pathlib import Path
from typing import Any

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


def test_every_endpoint_is_in_the_api_reference() -> None:
    page = (ROOT / "docs/api.md").read_text()
    # Building the application starts nothing, so its parts may be missing here.
    missing: Any = None
    app = create_app(ServeConfig(), missing, missing, missing, Keys(()))
    undocumented = {
        f"{method} {path}"
        for method, path in paths(list(app.routes))
        if f"`{method} {path}`" not in page and f"`{path}`" not in page
    }
    assert undocumented == set()


def test_every_endpoint_of_the_api_reference_exists() -> None:
    page = (ROOT / "docs/api.md").read_text()
    missing: Any = None
    app = create_app(ServeConfig(), missing, missing, missing, Keys(()))
    documented = set(re.findall(r"^\| `(GET|POST|DELETE) (/[^`]*)`", page, re.MULTILINE))
    assert documented
    assert documented <= paths(list(app.routes))
