"""The footprint of a checkpoint's work, from the configurations of its denoiser and its VAE.

What is counted is what a block must hold at once: of a transformer's feed-forward part its residual, its normed input
and the inner layer before and after its activation, ten widths a token; of a VAE the last upsampling, its input and its
output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.footprint import Footprint
from .sizes import BYTES_EACH, Part

WIDTHS_PER_TOKEN = 10
TILE_SIDE = 512
WAN_PIXELS_TOGETHER = 4 * 1280 * 720
"""What fused kernels decode at once of Wan's clips, in several latent frames where these are small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Frames that a VAE decodes in one go, whole or in tiles (None: all of the clip), and a tile's side in pixels."""

    frames: int | None
    tile_side: int = TILE_SIDE


DECODING: Mapping[str, Decoding] = {
    # These work along the clip and carry their state.
    "AutoencoderKLWan": Decoding(frames=4),
    "AutoencoderKLQwenImage": Decoding(frames=4),
    "AutoencoderKLCogVideoX": Decoding(frames=9),
    # This one cuts it into parts that overlap.
    "AutoencoderKLHunyuanVideo": Decoding(frames=17),
    # Their tiles are as long as the clip. LTX's could be shorter (`use_framewise_decoding`), but diffusers 0.42 then
    # shows all after the first part a frame late.
    "AutoencoderKLHunyuanVideo15": Decoding(frames=None, tile_side=256),
    "AutoencoderKLLTXVideo": Decoding(frames=None),
    "AutoencoderKLLTX2Video": Decoding(frames=None),
}
"""By the VAE's class, as diffusers has them; another one is taken to decode frame by frame."""

_FRAME_BY_FRAME = Decoding(frames=1)


def footprint_of(folder: Path, parts: Sequence[Part], *, tiled: bool, fused: bool = False) -> Footprint:
    """Return what the work of a pipeline in this folder takes, as far as its configurations tell; `fused` is whether
    fused kernels decode."""
    vae = next((part for part in parts if part.name == "vae"), None)
    vae_config = read_config(folder, "vae")
    spatial, temporal = _spatial(vae_config), _temporal(vae_config)
    denoiser = next((part for part in parts if part.kind == "denoiser"), None)
    config = {} if denoiser is None else read_config(folder, denoiser.name)
    width = 0 if denoiser is None else _width(config) * BYTES_EACH[denoiser.precision]
    pixel_bytes = 0 if vae is None else _decoder_channels(vae_config) * BYTES_EACH[vae.precision]
    vae_class = vae_config.get("_class_name", "")
    decoding = DECODING.get(vae_class, _FRAME_BY_FRAME)
    chunks = fused and not tiled and vae_class == "AutoencoderKLWan"
    return Footprint(
        token_side=spatial * _patch(config, vae_config),
        frame_multiple=temporal,
        bytes_per_token=WIDTHS_PER_TOKEN * width,
        bytes_per_pixel=pixel_bytes,
        frames_at_once=decoding.frames,
        pixels_at_once=decoding.tile_side**2 if tiled else None,
        pixels_together=WAN_PIXELS_TOGETHER if chunks else 0,
    )


def read_config(folder: Path, name: str) -> Mapping[str, Any]:
    """Return a component's configuration, empty where there is none that can be read."""
    try:
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _number(value: object) -> int:
    """An entry that may be a number, or one number for each axis or stage; 0 where it is neither."""
    if isinstance(value, list) and value:
        value = value[-1]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _width(config: Mapping[str, Any]) -> int:
    """Return the width of a denoiser's tokens; of a U-Net, that of its first stage."""
    heads, head_dim = _number(config.get("num_attention_heads")), _number(config.get("attention_head_dim"))
    named = _number(config.get("hidden_size")) or _number(config.get("dim"))
    stages = config.get("block_out_channels")
    if isinstance(stages, list) and stages:
        return _number(stages[0])
    return heads * head_dim or named


def _patch(config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Return how many latent pixels a side a token stands for: packed by the pipeline, or by the denoiser itself."""
    latent = _number(vae.get("latent_channels")) or _number(vae.get("z_dim"))
    channels = _number(config.get("in_channels"))
    packed = math.isqrt(channels // latent) if latent and channels % latent == 0 else 1
    if packed > 1 and packed * packed * latent == channels:
        return packed
    return _number(config.get("patch_size")) or _number(config.get("all_patch_size")) or 1


def _spatial(vae: Mapping[str, Any]) -> int:
    named = _number(vae.get("scale_factor_spatial")) or _number(vae.get("spatial_compression_ratio"))
    stages = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult")
    return named or (2 ** (len(stages) - 1) if isinstance(stages, list) and stages else 8)


def _temporal(vae: Mapping[str, Any]) -> int:
    named = _number(vae.get("scale_factor_temporal")) or _number(vae.get("temporal_compression_ratio"))
    halved = vae.get("temperal_downsample")  # diffusers' own spelling
    return named or (2 ** sum(map(bool, halved)) if isinstance(halved, list) else 1)


def _decoder_channels(vae: Mapping[str, Any]) -> int:
    """Return the channels held for each pixel while a decoder doubles its size for the last time."""
    base = _number(vae.get("decoder_base_dim")) or _number(vae.get("base_dim"))
    stages = vae.get("decoder_block_out_channels") or vae.get("block_out_channels")
    if base:
        held = 3 * base  # two widths come in, one goes out
    elif isinstance(stages, list) and stages:
        held = 2 * _number(stages[min(1, len(stages) - 1)])
    else:
        return 0
    patch = _number(vae.get("patch_size")) or 1
    return held // (patch * patch)
