"""What is decoded at once, as the memory plan counts it and as the real VAEs do it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from families.weights import randomise
from photogram.core.footprint import Footprint
from photogram.core.worker_config import Placement
from photogram.models.footprints import DECODING, footprint_of
from photogram.models.sizes import Part
from photogram.worker.placement import set_up_vae
from photogram.worker.tuning.fusing import fuse

Shape = tuple[int, int, int]  # frames, height and width

SMALL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1}
# VAE, published latent geometry and tiny widths -> latents of a clip that is larger than a tile (C, T, H, W).
VAES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, int, int, int]]] = {
    "AutoencoderKLWan": (
        lambda: diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                           latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        (4, 3, 36, 34),
    ),
    "AutoencoderKLCogVideoX": (
        lambda: diffusers.AutoencoderKLCogVideoX(**SMALL, latent_channels=4, norm_num_groups=4, sample_height=256,
                                                 sample_width=256),
        (4, 5, 20, 18),
    ),
    "AutoencoderKLHunyuanVideo": (
        lambda: diffusers.AutoencoderKLHunyuanVideo(**SMALL, latent_channels=4, norm_num_groups=4),
        (4, 6, 34, 10),
    ),
    "AutoencoderKLHunyuanVideo15": (
        lambda: diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
                                                      latent_channels=8, downsample_match_channel=False,
                                                      upsample_match_channel=False),
        (8, 2, 18, 6),
    ),
    "AutoencoderKLLTXVideo": (
        lambda: diffusers.AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8, 8, 8, 8),
                                                decoder_block_out_channels=(8, 8, 8, 8),
                                                layers_per_block=(1, 1, 1, 1, 1),
                                                decoder_layers_per_block=(1, 1, 1, 1, 1)),
        (8, 4, 18, 4),
    ),
    "AutoencoderKLLTX2Video": (
        lambda: diffusers.AutoencoderKLLTX2Video(latent_channels=8, block_out_channels=(8, 8, 8, 16),
                                                 decoder_block_out_channels=(8, 16, 32),
                                                 layers_per_block=(1, 1, 1, 1, 1),
                                                 decoder_layers_per_block=(1, 1, 1, 1), spatial_compression_ratio=32,
                                                 temporal_compression_ratio=8),
        (8, 4, 18, 4),
    ),
}  # fmt: skip


def decoded(vae: torch.nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, list[Shape]]:
    """The clip (B, C, T, H, W), and the size of each part that the decoder made of it in one go."""
    parts: list[Shape] = []
    hook = vae.decoder.register_forward_hook(
        lambda module, args, output: parts.append(tuple((output[0] if isinstance(output, tuple) else output).shape[2:]))
    )
    with torch.inference_mode():
        clip = vae.decode(latents, return_dict=False)[0]
    hook.remove()
    return clip, parts


def footprint(vae: torch.nn.Module, folder: Path, *, tiled: bool) -> Footprint:
    vae.save_config(folder / "vae")
    assert json.loads((folder / "vae/config.json").read_text())["_class_name"] in DECODING
    return footprint_of(folder, [Part(name="vae", kind="vae", precision="fp32", num_bytes=1)], tiled=tiled)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", VAES)
def test_no_part_that_a_vae_decodes_is_larger_than_the_plan_counts(name, tiled, tmp_path):
    make, shape = VAES[name]
    vae = randomise(make(), seed=1).eval()
    counted = footprint(vae, tmp_path, tiled=tiled)
    if tiled:
        set_up_vae(vae, Placement(vae_tiling=True))
    clip, parts = decoded(vae, torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)))
    frames, height, width = clip.shape[2:]
    most_frames = counted.frames_at_once or frames
    most_pixels = counted.pixels_at_once or height * width
    assert max(part[0] for part in parts) == min(frames, most_frames)
    assert max(part[1] * part[2] for part in parts) <= most_pixels
    if tiled:
        assert height * width > max(part[1] * part[2] for part in parts)


def test_no_chunk_that_fused_kernels_decode_is_larger_than_the_plan_counts(tmp_path):
    make, shape = VAES["AutoencoderKLWan"]
    vae = randomise(make(), seed=1).eval()
    vae.save_config(tmp_path / "vae")
    part = Part(name="vae", kind="vae", precision="fp32", num_bytes=1)
    frame_by_frame, counted = (footprint_of(tmp_path, [part], tiled=False, fused=fused) for fused in (False, True))
    fuse(vae)
    clip, parts = decoded(vae, torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)))
    frames, height, width = clip.shape[2:]
    largest = max(math.prod(part) for part in parts)
    assert max(part[0] for part in parts) > 4
    assert largest * counted.bytes_per_pixel <= counted.decode_bytes(width, height, frames)
    assert counted.decode_bytes(1280, 720, 81) == frame_by_frame.decode_bytes(1280, 720, 81)
