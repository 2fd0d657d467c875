"""The command line: `photogram serve`, `generate`, `doctor` and `--version`.

Each command is one file here and is imported only when it is called. None of them imports torch: what needs it runs
in a worker or in a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from .. import __version__
from ..core.errors import ConfigError, PhotogramError, RequestError

USAGE = """\
usage: photogram COMMAND [flags]

  photogram serve [MODEL]            serve a model on http://127.0.0.1:30000
  photogram generate --prompt TEXT   make a picture without a server
  photogram doctor                   say what this machine has, and what fits
  photogram --version

MODEL is a folder, a hub id or a built-in model; without one the built-in image model is served.
`photogram COMMAND --help` lists the flags of a command."""

Command = Callable[[Sequence[str], Mapping[str, str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 when the work failed, 2 when it could not begin as asked.

    What the user got wrong is one line on stderr, never a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, os.environ)
    except PhotogramError as error:
        print(f"photogram: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, RequestError)) else 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    match arguments:
        case ["-h" | "--help" | "help"]:
            print(USAGE)
            return 0
        case ["-V" | "--version" | "version"]:
            print(f"photogram {__version__}")
            return 0
        case [name, *rest]:
            return _command(name)(rest, environ)
    raise ConfigError("which command? serve, generate or doctor (photogram --help tells more).")


def _command(name: str) -> Command:
    match name:
        case "serve":
            from .serve import serve

            return serve
        case "generate":
            from .generate import generate

            return generate
        case "doctor":
            from .doctor import doctor

            return doctor
    raise ConfigError(f"'{name}' is no command: expected serve, generate or doctor.")
