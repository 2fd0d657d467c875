"""How devices would share a checkpoint, in words. `photogram doctor` runs this file as a process of its own:

python -m photogram.worker.parallel.layout_report '{"model_path": "...", "degrees": {...}, ...}'
"""

from __future__ import annotations

import contextlib
import logging
import sys

import msgspec

from ...core.errors import ConfigError
from ...core.parallel import LayoutAnswer
from ...core.worker_config import WorkerConfig
from ...models.checkpoint import find_checkpoint
from .fitting import fit


def layout_answer(config: WorkerConfig) -> LayoutAnswer:
    """Say how the configured devices would share the configured checkpoint, which must be there already."""
    try:
        checkpoint = find_checkpoint(
            config.model_path, revision=config.revision, variant=config.variant, download=False
        )
        layout = fit(config.degrees, checkpoint, deterministic=config.deterministic)
    except ConfigError as error:
        return LayoutAnswer(problem=str(error))
    chosen = layout.degrees
    degrees = f"CFG {chosen.cfg} x Ulysses {chosen.ulysses} x ring {chosen.ring}"
    return LayoutAnswer(lines=(degrees, *layout.reasons))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # Only the answer may stand on stdout, whatever libraries have to say.
    with contextlib.redirect_stdout(sys.stderr):
        answer = layout_answer(msgspec.json.decode(sys.argv[1], type=WorkerConfig))
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
