"""Wan's VAE: its convolutions without copies for padding, normalization and activation as one pass.

Shapes: B batch, C channels, T frames of one chunk, H/W height and width of features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanCausalConv3d, WanResidualBlock

from ..kernels.ops import rms_silu


class PaddingInConvolution(WanCausalConv3d):
    """Zeros around a frame are the convolution's own affair; only frames before the chunk are put before it."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        width, _, height, _, before, _ = self._padding
        if cache_x is not None and before > 0:
            x = torch.cat((cache_x.to(x.device), x), dim=2)
            before -= cache_x.shape[2]
        if before:
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width), self.dilation, self.groups)


class FusedWanResidualBlock(WanResidualBlock):
    def forward(
        self,
        x: torch.Tensor,
        feat_cache: list[torch.Tensor | None] | None = None,
        feat_idx: list[int] | None = None,
    ) -> torch.Tensor:
        if not isinstance(self.nonlinearity, torch.nn.SiLU):
            return super().forward(x, feat_cache, [0] if feat_idx is None else feat_idx)
        shortcut = self.conv_shortcut(x)
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            x = rms_silu(x, norm.gamma.flatten(), norm.scale)
            if feat_cache is None or feat_idx is None:
                x = convolution(x)
                continue
            before = feat_cache[feat_idx[0]]
            latest = x[:, :, -CACHE_T:].clone()
            if latest.shape[2] < CACHE_T and before is not None:
                latest = torch.cat((before[:, :, -1:].to(latest.device), latest), dim=2)
            x = convolution(x, before)
            feat_cache[feat_idx[0]] = latest
            feat_idx[0] += 1
        return x + shortcut
