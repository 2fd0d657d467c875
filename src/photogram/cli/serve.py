"""`photogram serve`: flags to settings, and what the operator sees at the start."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..engine import Engine
from ..server.run import serve as run_server
from .flags import FlagParser
from .keys import with_keys

LOG_FORMAT = "%(asctime)s %(levelname)-7s host   %(name)s: %(message)s"


def serve(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serve until told to stop. Raises ConfigError for settings, a port or a model that cannot be used."""
    parser = FlagParser(
        prog="photogram serve",
        usage="photogram serve [MODEL] [flags]",
        description="Serve a model. MODEL, the same as --model-path, is a folder, a hub id or a built-in model.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_serve_flags()
    namespace = parser.read(arguments)
    config = with_keys(parser.config(namespace, model=namespace.model), environ)
    logging.basicConfig(level=config.log_level.upper(), format=LOG_FORMAT)
    if config.log_level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if not config.listens_on_loopback and not config.api_key:
        print(
            f"warning: listening on {config.host} without a key: everybody who can reach port {config.port} may use "
            "this server. Set --api-key-file or PHOTOGRAM_API_KEYS.",
            file=sys.stderr,
        )
    opening = Opening(config)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(run_server(config, _engine, on_listening=opening.listens, on_ready=opening.is_ready))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the fastest event loop that this platform has; None for Python's own."""
    try:
        import uvloop
    except ModuleNotFoundError:  # there is none for Windows
        return None
    return uvloop.new_event_loop


def _engine(config: ServeConfig, frames_dir: Path) -> Engine:
    # Imported once the server answers: this is not needed for its first second.
    from ..engine.replicas import Replicas
    from ..engine.worker_engine import WorkerEngine

    return WorkerEngine(config, frames_dir) if config.dp_size == 1 else Replicas(config, frames_dir)


class Opening:
    """Says where the server is once it listens, and how to try it once the model is there."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._url = ""

    def listens(self, url: str) -> None:
        self._url = url
        logging.getLogger("photogram").info("listening on %s; loading %s", url, self._config.model_path)

    def is_ready(self, card: ModelCard) -> None:
        print("\n".join(opening_lines(card, self._url, with_key=bool(self._config.api_key))), flush=True)


def opening_lines(card: ModelCard, url: str, *, with_key: bool) -> tuple[str, ...]:
    """Return the five lines: model, device, URL, a line to try it that works when pasted, docs."""
    precision = next((card.precisions[name] for name in ("transformer", "unet") if name in card.precisions), None)
    facts = ", ".join(fact for fact in (card.pipeline_class, precision) if fact)
    device = card.device if card.device_name == card.device else f"{card.device} ({card.device_name})"
    key = ' -H "Authorization: Bearer $PHOTOGRAM_API_KEY"' if with_key else ""
    picture = 's/.*"b64_json": *"\\([^"]*\\)".*/\\1/p'
    return (
        f"model   {card.name} ({facts})",
        f"device  {device}",
        f"url     {url}",
        f"""try     curl -sS {url}/v1/images/generations{key} -d '{{"prompt": "a red circle"}}'"""
        f" | sed -n '{picture}' | base64 -d > picture.png",
        f"docs    docs/tutorial.md, docs/api.md, and in a browser {url}/",
    )
