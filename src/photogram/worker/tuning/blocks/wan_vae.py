"""Wan's VAE: convolutions without copies for padding, normalization and activation as one pass, longer chunks.

A causal convolution sees two frames before its own. They stand before the chunk in one tensor: where a normalization
comes first, it writes its result there, so that nothing is joined afterwards.

Shapes: B batch, C channels, T frames of one chunk, H/W height and width of features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpsample,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DecoderOutput

from ....models.footprints import WAN_PIXELS_TOGETHER
from ..kernels.ops import rms_silu

Cache = list[torch.Tensor | str | None]
"""By convolution: the last frames it has seen; the word of `WanResample` after the first frame; nothing yet."""

_FIRST_FRAME_SEEN = "Rep"


class PaddingInConvolution(WanCausalConv3d):
    """Zeros around a frame are the convolution's own affair; only frames before the chunk are put before it."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        width, _, height, _, before, _ = self._padding
        if cache_x is not None and before > 0:
            x = _after(cache_x.to(x.device), x)
            before -= cache_x.shape[2]
        if before:
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width), self.dilation, self.groups)


def _after(before: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a chunk with the frames before it: what they are parts of, where they lie so, else a copy."""
    distance = x.storage_offset() - before.storage_offset()
    if (
        before.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        or before.stride() != x.stride()
        or distance != before.shape[2] * x.stride(2)
    ):
        return torch.cat((before, x), dim=2)
    samples, channels, frames, *size = x.shape
    return before.as_strided((samples, channels, before.shape[2] + frames, *size), before.stride())


def _normed_convolution(
    x: torch.Tensor, norm: WanRMS_norm, convolution: PaddingInConvolution, cache: Cache, place: list[int]
) -> torch.Tensor:
    """Normalize, activate and convolve one chunk, and leave its last frames in the cache."""
    samples, channels, frames, height, width = x.shape
    is_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    whole = torch.empty(
        (samples, channels, CACHE_T + frames, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d if is_last else torch.contiguous_format,
    )
    rms_silu(x, norm.gamma.flatten(), norm.scale, whole[:, :, CACHE_T:])
    before = cache[place[0]]
    known = before.shape[2] if isinstance(before, torch.Tensor) else 0
    whole[:, :, : CACHE_T - known].zero_()
    if isinstance(before, torch.Tensor):
        whole[:, :, CACHE_T - known : CACHE_T].copy_(before)
    cache[place[0]] = whole[:, :, -CACHE_T:].clone()
    place[0] += 1
    # Called as such, for what may be put around it: ranks that share a picture ask each other for its rows.
    return convolution(whole[:, :, CACHE_T:], whole[:, :, :CACHE_T])


class FusedWanResidualBlock(WanResidualBlock):
    def forward(
        self, x: torch.Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        if not isinstance(self.nonlinearity, torch.nn.SiLU):
            return super().forward(x, feat_cache, [0] if feat_idx is None else feat_idx)
        shortcut = self.conv_shortcut(x)
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            if feat_cache is None or feat_idx is None:
                x = convolution(rms_silu(x, norm.gamma.flatten(), norm.scale))
            else:
                x = _normed_convolution(x, norm, convolution, feat_cache, feat_idx)
        return x + shortcut


class UpsampleInOwnPrecision(WanUpsample):
    """Each pixel is copied, which no precision changes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.Upsample.forward(self, x)


class FusedWanResample(WanResample):
    """Doubles frames without leaving the order of channels last."""

    def forward(
        self, x: torch.Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None
    ) -> torch.Tensor:
        if self.mode != "upsample3d" or feat_cache is None or feat_idx is None:
            return super().forward(x, feat_cache, [0] if feat_idx is None else feat_idx)
        before = feat_cache[feat_idx[0]]
        feat_cache[feat_idx[0]] = _FIRST_FRAME_SEEN if before is None else _last_frames(x, before)
        feat_idx[0] += 1
        if before is not None:
            x = _interleaved(self.time_conv(x, before if isinstance(before, torch.Tensor) else None))
        samples, channels, frames, height, width = x.shape
        x = x.permute(0, 2, 1, 3, 4).reshape(samples * frames, channels, height, width)
        return self.resample(x).unflatten(0, (samples, frames)).permute(0, 2, 1, 3, 4)


def _last_frames(x: torch.Tensor, before: torch.Tensor | str) -> torch.Tensor:
    latest = x[:, :, -CACHE_T:].clone()
    if latest.shape[2] == CACHE_T:
        return latest
    # The first frame is no frame before others where frames are doubled.
    earlier = before[:, :, -1:] if isinstance(before, torch.Tensor) else torch.zeros_like(latest)
    return torch.cat((earlier, latest), dim=2)


def _interleaved(x: torch.Tensor) -> torch.Tensor:
    """Return twice the frames from twice the channels: (B, 2C, T, H, W) to (B, C, 2T, H, W)."""
    samples, channels, frames, height, width = x.shape
    by_frame = x.view(samples, 2, channels // 2, frames, height, width).permute(0, 3, 1, 4, 5, 2)
    return by_frame.reshape(samples, 2 * frames, height, width, channels // 2).permute(0, 4, 1, 2, 3)


class FusedWanDecoder(WanDecoder3d):
    def forward(
        self,
        x: torch.Tensor,
        feat_cache: Cache | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> torch.Tensor:
        if feat_cache is None or feat_idx is None or not isinstance(self.nonlinearity, torch.nn.SiLU):
            return super().forward(x, feat_cache, [0] if feat_idx is None else feat_idx, first_chunk)
        before = feat_cache[feat_idx[0]]
        known = before if isinstance(before, torch.Tensor) else None
        latest = x[:, :, -CACHE_T:].clone()
        if latest.shape[2] < CACHE_T and known is not None:
            latest = torch.cat((known[:, :, -1:], latest), dim=2)
        x = self.conv_in(x, known)
        feat_cache[feat_idx[0]] = latest
        feat_idx[0] += 1
        x = self.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
        for block in self.up_blocks:
            x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
        return _normed_convolution(x, self.norm_out, self.conv_out, feat_cache, feat_idx)


class ChunkedWanVae(AutoencoderKLWan):
    """Decodes several latent frames at once after the first: small frames fill no GPU by themselves."""

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        is_tiled = self.use_tiling and (
            z.shape[-1] > self.tile_sample_min_width // self.spatial_compression_ratio
            or z.shape[-2] > self.tile_sample_min_height // self.spatial_compression_ratio
        )
        if is_tiled:
            return super()._decode(z, return_dict)
        self.clear_cache()
        parts = []
        for chunk in self._chunks(self.post_quant_conv(z)):
            self._conv_idx = [0]
            parts.append(self.decoder(chunk, feat_cache=self._feat_map, feat_idx=self._conv_idx, first_chunk=not parts))
        self.clear_cache()
        frames = torch.cat(parts, dim=2)
        if self.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=self.config.patch_size)
        frames = frames.clamp(-1.0, 1.0)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def _chunks(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give the first latent frame, which makes one frame of the clip, then as many as the plan of memory counts."""
        yield latents[:, :, :1]
        side = self.spatial_compression_ratio // (self.config.patch_size or 1)
        pixels = latents.shape[0] * latents.shape[-2] * latents.shape[-1] * side**2
        length = max(1, WAN_PIXELS_TOGETHER // (pixels * self.config.scale_factor_temporal))
        for first in range(1, latents.shape[2], length):
            yield latents[:, :, first : first + length]


# Who looks a VAE up by its class's name finds it.
ChunkedWanVae.__name__ = AutoencoderKLWan.__name__
