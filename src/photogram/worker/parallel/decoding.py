"""A VAE's decoder on several ranks: each makes a band of the picture, and layers that look at neighbours ask for them.

The first part of a decoder (up to and with the middle block, whose attention sees the whole picture) is small and runs
whole on every rank. Behind it the picture is cut along its longer side. A convolution first gets the one row of pixels
on the other side of each cut, a group norm the others' sums; all else works pixel by pixel. So the result is that of
one rank but for rounding, and there are no seams. Time is never cut: what causal decoders keep of earlier frames is
each rank's own band of it.

Shapes: B batch, C channels, G groups; pictures are (B, C, H, W), clips (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Decoder3D,
    HunyuanVideo15RMS_norm,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageDecoder3d,
    QwenImageRMS_norm,
    QwenImageUpsample,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanDecoder3d,
    WanRMS_norm,
    WanUpsample,
)
from diffusers.models.autoencoders.vae import Decoder

from .lengths import Lengths
from .mesh import Mesh

# Rows of latents that a rank has at least: below that, asking the neighbours costs about what the work itself does.
LEAST_ROWS = 16

_DECODERS = (Decoder, HunyuanVideo15Decoder3D, QwenImageDecoder3d, WanDecoder3d)
_POINTWISE = (
    DupUp3D,
    HunyuanVideo15RMS_norm,
    QwenImageRMS_norm,
    QwenImageUpsample,
    WanRMS_norm,
    WanUpsample,
    torch.nn.Dropout,
    torch.nn.Identity,
    torch.nn.SiLU,
)


def can_split(vae: torch.nn.Module) -> bool:
    """Say whether every layer of this VAE's decoder is known to work on a band of the picture."""
    decoder = dict(vae.named_children()).get("decoder")
    return isinstance(decoder, _DECODERS) and all(_is_known(layer) for layer in _layers(decoder))


def pays(latents: torch.Tensor, world_size: int) -> bool:
    """Say whether the latents (the last two axes are height and width) are large enough to be split."""
    return max(latents.shape[-2:]) >= LEAST_ROWS * world_size


def split_decoder(vae: torch.nn.Module, mesh: Mesh, lengths: Lengths) -> None:
    """Make a VAE's decoder run split from now on, where it pays.

    To be called on every rank, as its `decode` then must be.
    """
    decoder = vae.get_submodule("decoder")
    bands = _Bands(mesh, lengths)
    for layer in _layers(decoder):
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = partial(_group_norm, layer, layer.forward, bands)
        elif _reach(layer):
            layer.forward = partial(_convolved, layer, layer.forward, bands)
    middle = decoder.get_submodule("mid_block")
    middle.forward = partial(_cut, middle.forward, bands)
    decoder.forward = partial(_decoded, decoder.forward, bands)


class _Bands:
    """Who has which band of the picture that a decoder is making; `axis` is None where it is not cut."""

    def __init__(self, mesh: Mesh, lengths: Lengths) -> None:
        self.mesh = mesh
        self.lengths = lengths
        self.axis: int | None = None

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's band of a whole picture."""
        assert self.axis is not None
        return x.tensor_split(self.mesh.size, dim=self.axis)[self.mesh.rank].contiguous()

    def with_neighbours(self, *clips: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """Return this rank's band of each clip (or of one picture) with the row beyond each of its cuts, and how many
        rows that put before it. The rows of all clips travel together."""
        assert self.axis is not None
        mesh, axis = self.mesh, self.axis
        frames = [clip.shape[2] for clip in clips]
        transfers: list[dist.P2POp] = []
        beyond: dict[int, torch.Tensor] = {}
        for side, row in ((-1, 0), (1, clips[0].shape[axis] - 1)):
            neighbour = mesh.rank + side
            if 0 <= neighbour < mesh.size:
                rows = [clip.narrow(axis, row, 1) for clip in clips]
                mine = torch.cat(rows, dim=2) if len(rows) > 1 else rows[0].contiguous()
                beyond[side] = torch.empty_like(mine)
                transfers.append(dist.P2POp(dist.isend, mine, neighbour, mesh.everyone))
                transfers.append(dist.P2POp(dist.irecv, beyond[side], neighbour, mesh.everyone))
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        parts = [[clip] for clip in clips]
        for side, received in beyond.items():
            rows = list(received.split(frames, dim=2)) if len(clips) > 1 else [received]
            for wide, row_of_clip in zip(parts, rows, strict=True):
                wide.insert(0 if side < 0 else len(wide), row_of_clip)
        return tuple(torch.cat(wide, dim=axis) for wide in parts), int(-1 in beyond)


# --- what layers do instead ----------------------------------------------------------------------------------------


def _decoded(real: Callable[..., torch.Tensor], bands: _Bands, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward: the whole result on every rank."""
    if not pays(latents, bands.mesh.size):
        return real(latents, *args, **kwargs)
    # From the end: some layers see a clip's frames as rows of a batch.
    bands.axis = -1 if latents.shape[-1] >= latents.shape[-2] else -2
    try:
        return bands.lengths.gather(real(latents, *args, **kwargs), bands.axis)
    finally:
        bands.axis = None


def _cut(real: Callable[..., torch.Tensor], bands: _Bands, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A middle block's forward, behind which the picture is cut."""
    whole = real(*args, **kwargs)
    return whole if bands.axis is None else bands.cut(whole)


def _convolved(
    layer: torch.nn.Module, real: Callable[..., torch.Tensor], bands: _Bands,
    band: torch.Tensor, kept: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """A convolution's forward; `kept` are the last frames of the clip so far, for a causal one.

    At the picture's own borders it pads as ever. At a cut it pads as well, but what that makes is dropped.
    """
    if bands.axis is None:
        return real(band) if kept is None else real(band, kept)
    rows = band.shape[bands.axis]
    wide, before = bands.with_neighbours(band) if kept is None else bands.with_neighbours(band, kept)
    return real(*wide).narrow(bands.axis, before, rows)


def _group_norm(
    norm: torch.nn.GroupNorm, real: Callable[[torch.Tensor], torch.Tensor], bands: _Bands, band: torch.Tensor
) -> torch.Tensor:
    """A group norm's forward by the mean and variance of the whole picture, in fp32."""
    if bands.axis is None:
        return real(band)
    B, G = band.shape[0], norm.num_groups
    values_BGN = band.float().reshape(B, G, -1)
    variance, mean = torch.var_mean(values_BGN, dim=2, correction=0)
    count = torch.full_like(mean, values_BGN.shape[2])
    own = torch.stack((count, mean, variance))
    every = own.new_empty(bands.mesh.size * 3, B, G)
    dist.all_gather_into_tensor(every, own, group=bands.mesh.everyone)
    counts, means, variances = every.unflatten(0, (-1, 3)).unbind(1)  # (ranks, B, G)
    weights = counts / counts.sum(0)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    normed = (values_BGN - mean[..., None]) * (variance + norm.eps).rsqrt()[..., None]
    normed = normed.reshape(band.shape)
    if norm.affine:
        shape = (1, -1, *(1 for _ in band.shape[2:]))
        normed = normed * norm.weight.float().reshape(shape) + norm.bias.float().reshape(shape)
    return normed.to(band.dtype)


# --- what is known of layers ----------------------------------------------------------------------------------------


def _layers(decoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers behind the middle block, each as a whole."""
    for name, child in decoder.named_children():
        if name not in ("conv_in", "mid_block"):
            yield from _leaves(child)


def _leaves(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    children = [] if isinstance(module, HunyuanVideo15CausalConv3d) else list(module.children())
    if not children and not isinstance(module, torch.nn.ModuleList):
        yield module
    for child in children:
        yield from _leaves(child)


def _is_known(layer: torch.nn.Module) -> bool:
    if isinstance(layer, (torch.nn.GroupNorm, *_POINTWISE)):
        return True
    return _reach(layer) is not None


def _reach(layer: torch.nn.Module) -> int | None:
    """How far a convolution looks beyond a pixel of the picture (0 or 1); None for what is none that we know."""
    convolution = layer.conv if isinstance(layer, HunyuanVideo15CausalConv3d) else layer
    if not isinstance(convolution, (torch.nn.Conv2d, torch.nn.Conv3d)) or set(convolution.stride) != {1}:
        return None
    return {(1, 1): 0, (3, 3): 1}.get(tuple(convolution.kernel_size[-2:]))
