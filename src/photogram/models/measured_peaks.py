"""What calls really took on a device, kept from one start to the next, so that the next plan is made with it.

One file for each way of running a model: the same checkpoint, precisions, devices, kernels and version of torch. In it,
by placement and phase, the largest request that was measured. Files that cannot be read are as none; they are only
worth an estimate.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec

from ..core.worker_config import Placement, WorkerConfig
from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Phase = Literal["encode", "denoise", "decode"]

_NOISE = 1.02  # what is higher by less is not worth a write


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one call took beside the weights, and the size (pixels, frames) of the request it was of."""

    width: int
    height: int
    frames: int | None
    num_bytes: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height * (self.frames or 1)


class MeasuredPeaks:
    """The peaks of one way of running a model."""

    def __init__(self, checkpoint: Checkpoint, config: WorkerConfig, default_precision: str) -> None:
        way = (
            checkpoint.name,
            checkpoint.revision,
            config.variant,
            config.precisions,
            default_precision,
            config.degrees.world_size,
            config.tuning,
            version("torch"),
        )
        digest = hashlib.sha256(msgspec.json.encode(way)).hexdigest()[:16]
        self._file = Path(config.peaks_dir) / f"{digest}.json"
        self._by_placement: dict[str, dict[Phase, Peak]] = {}
        try:
            self._by_placement = msgspec.json.decode(self._file.read_bytes(), type=dict[str, dict[Phase, Peak]])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("measured peaks in %s cannot be read: %s", self._file, error)

    def under(self, placement: Placement) -> Mapping[Phase, Peak]:
        """Return what was measured under a placement, by phase."""
        return self._by_placement.get(_key(placement), {})

    def keep(self, placement: Placement, phase: Phase, peak: Peak) -> None:
        """Keep a peak where it is of a larger request than the one known, or higher for one of the same size."""
        known = self._by_placement.setdefault(_key(placement), {})
        before = known.get(phase)
        if before is not None:
            if peak.num_pixels < before.num_pixels:
                return
            if peak.num_pixels == before.num_pixels and peak.num_bytes <= _NOISE * before.num_bytes:
                return
        known[phase] = peak
        draft = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(self._by_placement)))
            draft.replace(self._file)
        except OSError as error:
            logger.warning("a measured peak is not kept: %s", error)


class PeakRecord:
    """Takes down what calls take while a model is served under one plan: the phases' weights (bytes) are known."""

    def __init__(self, peaks: MeasuredPeaks, placement: Placement, weights: Mapping[str, int]) -> None:
        self._peaks = peaks
        self._placement = placement
        self._weights = weights

    def note(self, phase: Phase, size: tuple[int, int, int | None], allocated_bytes: int | None) -> None:
        """Note the most memory that was allocated in a call of a request of this size (pixels, frames), weights
        included; None where the device does not tell."""
        if allocated_bytes is None:
            return
        width, height, frames = size
        work = max(0, allocated_bytes - self._weights[phase])
        self._peaks.keep(self._placement, phase, Peak(width=width, height=height, frames=frames, num_bytes=work))


def _key(placement: Placement) -> str:
    """Return the switches that are on; whether host memory is pinned changes nothing on the device."""
    on = (name for name in placement.__struct_fields__ if getattr(placement, name) and name != "pin_cpu_memory")
    return " ".join(on) or "resident"
