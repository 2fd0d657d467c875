"""A server in a process of its own: ``python -m server.stand_alone PORT DATA_DIR [STATE [REFUSAL]]``."""

from __future__ import annotations

import asyncio
import sys

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.server.run import serve


def main() -> int:
    def make_engine(config, frames_dir):
        from .fake_engine import FakeEngine

        engine = FakeEngine(frames_dir, state=sys.argv[3] if len(sys.argv) > 3 else "ready")
        engine.refusal = sys.argv[4] if len(sys.argv) > 4 else None
        return engine

    try:
        config = ServeConfig(port=int(sys.argv[1]), data_dir=sys.argv[2])
        asyncio.run(serve(config, make_engine, on_listening=lambda url: print(url, flush=True)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    assert "torch" not in sys.modules
    return 0


sys.exit(main())
