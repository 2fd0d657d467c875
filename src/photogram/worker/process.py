"""What every rank's process does at its start."""

from __future__ import annotations

import logging
import sys

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from ..core.worker_config import WorkerConfig


def configure_logging(config: WorkerConfig, name: str) -> None:
    """Log to the host's stderr under a name of this process's own."""
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s {name} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("huggingface_hub", "httpx", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Progress bars and notices of libraries would run through the host's log.
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    hub.disable_progress_bars()
