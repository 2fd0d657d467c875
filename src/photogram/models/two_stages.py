"""Whether a checkpoint makes its clips in two stages: at half the size, then enlarged and refined.

LTX-2 does where its folder has the network that enlarges latents. The pipeline's index does not name that network: it
lies in a folder of its own beside it. How the stages are run is said in `worker/stages`.
"""

from __future__ import annotations

from dataclasses import replace

from .checkpoint import Checkpoint
from .families import FamilyDefaults
from .footprints import read_config

UPSAMPLER = "latent_upsampler"
"""The component's name, and that of its folder."""

TWO_STAGES = "two_stages"
"""The parameter of a request; on by default where it is there at all."""

SCALE = 2
"""By which the second stage's sides are longer than the first one's."""

_PIPELINES = frozenset({"LTX2Pipeline", "LTX2ImageToVideoPipeline"})


def has_upsampler(checkpoint: Checkpoint) -> bool:
    """Say whether there is a network that makes latents of twice the sides and of as many frames."""
    if checkpoint.pipeline_class not in _PIPELINES:
        return False
    config = read_config(checkpoint.folder, UPSAMPLER)
    if config.get("_class_name") != "LTX2LatentUpsamplerModel":
        return False
    # What is not said is as in the class's constructor; the makers have such networks for 1.5 times and for time, too.
    doubles = not config.get("use_rational_resampler", True) or config.get("rational_spatial_scale", SCALE) == SCALE
    return bool(doubles and config.get("spatial_upsample", True) and not config.get("temporal_upsample", False))


def enlarged(family: FamilyDefaults) -> FamilyDefaults:
    """Return a family's defaults with the size at which the second of its stages ends."""
    if family.width is None or family.height is None:
        return family
    return replace(family, width=family.width * SCALE, height=family.height * SCALE)
