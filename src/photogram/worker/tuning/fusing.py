"""Puts fused blocks in the place of a network's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.autoencoders import autoencoder_kl_wan
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_qwenimage,
    transformer_wan,
    transformer_z_image,
)

from .blocks.encoders import fused_class
from .blocks.flux import FusedFluxBlock, FusedFluxProcessor, FusedFluxSingleBlock
from .blocks.flux2 import (
    FusedFlux2Block,
    FusedFlux2ParallelProcessor,
    FusedFlux2Processor,
    FusedFlux2SingleBlock,
    FusedFlux2SwiGLU,
)
from .blocks.parts import FusedGeglu, FusedGelu
from .blocks.qwen import FusedQwenBlock, FusedQwenProcessor
from .blocks.wan import FusedWanBlock, FusedWanProcessor
from .blocks.wan_vae import (
    ChunkedWanVae,
    FusedWanDecoder,
    FusedWanResample,
    FusedWanResidualBlock,
    PaddingInConvolution,
    UpsampleInOwnPrecision,
)
from .blocks.z_image import FusedZImageBlock, FusedZImageFeedForward, FusedZImageProcessor

_BLOCKS: Mapping[type, type] = {
    GEGLU: FusedGeglu,
    GELU: FusedGelu,
    autoencoder_kl_wan.AutoencoderKLWan: ChunkedWanVae,
    autoencoder_kl_wan.WanCausalConv3d: PaddingInConvolution,
    autoencoder_kl_wan.WanDecoder3d: FusedWanDecoder,
    autoencoder_kl_wan.WanResample: FusedWanResample,
    autoencoder_kl_wan.WanResidualBlock: FusedWanResidualBlock,
    autoencoder_kl_wan.WanUpsample: UpsampleInOwnPrecision,
    transformer_flux.FluxSingleTransformerBlock: FusedFluxSingleBlock,
    transformer_flux.FluxTransformerBlock: FusedFluxBlock,
    transformer_flux2.Flux2SingleTransformerBlock: FusedFlux2SingleBlock,
    transformer_flux2.Flux2SwiGLU: FusedFlux2SwiGLU,
    transformer_flux2.Flux2TransformerBlock: FusedFlux2Block,
    transformer_qwenimage.QwenImageTransformerBlock: FusedQwenBlock,
    transformer_wan.WanTransformerBlock: FusedWanBlock,
    transformer_z_image.FeedForward: FusedZImageFeedForward,
    transformer_z_image.ZImageTransformerBlock: FusedZImageBlock,
}
_PROCESSORS: Mapping[type, type] = {
    transformer_flux.FluxAttnProcessor: FusedFluxProcessor,
    transformer_flux2.Flux2AttnProcessor: FusedFlux2Processor,
    transformer_flux2.Flux2ParallelSelfAttnProcessor: FusedFlux2ParallelProcessor,
    transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0: FusedQwenProcessor,
    transformer_wan.WanAttnProcessor: FusedWanProcessor,
    transformer_z_image.ZSingleStreamAttnProcessor: FusedZImageProcessor,
}


def fuse(network: torch.nn.Module) -> int:
    """Let blocks and attention of known classes be their fused forms, in place; return how many were changed.

    Only those of exactly these classes: a subclass may compute something else.
    """
    changed = 0
    for part in network.modules():
        if (fused := _BLOCKS.get(type(part)) or fused_class(type(part))) is not None:
            part.__class__ = fused
            changed += 1
        processor = part.__dict__.get("processor")
        if processor is not None and (fused := _PROCESSORS.get(type(processor))) is not None:
            processor.__class__ = fused
            changed += 1
    return changed
