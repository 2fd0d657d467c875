"""Sorts of jobs for the simulations. Long calls make scheduling hard: a call cannot be interrupted."""

from __future__ import annotations

from tests.scheduler.simulator import Shape

SMALL = Shape(name="small", size_hint=256 * 256, call_s=0.01, calls_per_step=1, marginal=0.3)
MIDDLE = Shape(name="middle", size_hint=1024 * 1024, call_s=0.04, marginal=0.6, decode_s=0.1)
CLIP = Shape(name="clip", size_hint=832 * 480 * 81, call_s=0.5, marginal=1.0, decode_s=1.0)
LONER = Shape(name="loner", size_hint=512 * 512, call_s=0.02, batches=False)
