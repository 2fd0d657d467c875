"""What `exact.py` measures: networks of published architectures with normal random weights, and one call of each.

S tokens, D width; sizes are pixels unless said otherwise. Nothing is downloaded. With `tiny` a workload has the same
classes and few, narrow layers, so that it runs on a CPU in a moment.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One network, one call of it, and how many such calls make what the table's row counts."""

    name: str
    unit: str
    """What a row's figure is the time of."""
    calls: int
    """Calls of the network in that unit."""
    times: int = 1
    """How many units the exact table's row is."""
    make: Callable[[], torch.nn.Module]
    """Make the network, its parameters on the meta device."""
    shallow: Callable[[], torch.nn.Module]
    """The same with few layers: as wide, so that errors are those of the full width, and it fits in fp32."""
    arguments: Callable[[torch.device, torch.dtype], Arguments]
    method: str = "forward"
    is_denoiser: bool = True
    reach_ms: float | None = None
    """The figure to reach on an H100, of the table's row."""
    component: str = "transformer"
    """Its name in a pipeline."""
    is_launch_bound: bool = False
    has_convolutions: bool = False
    """Whether much of its time may be theirs."""
    is_best_compiled: bool = False
    """Whether its blocks are mostly of classes that no fused kernels are for."""
    read: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    """What of a result the pipeline reads."""


def materialize(make: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Make a network on the device: matrices and kernels normal, of a size that keeps activations in range.

    Its buffers are as its code makes them; norms' weights are one, biases small.
    """
    with init_empty_weights(include_buffers=False):
        network = make()
    generator = torch.Generator(device).manual_seed(0)
    for owner in network.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() >= 2:
                weight.normal_(0.0, 0.7 / math.sqrt(parameter[0].numel()), generator=generator)
            elif name == "bias":
                weight.normal_(0.0, 0.02, generator=generator)
            else:
                weight.fill_(1.0)
            setattr(owner, name, torch.nn.Parameter(weight, requires_grad=False))
    return network.to(device).eval()


def _normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """The same numbers for every precision and device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device, dtype)


# --- denoisers ----------------------------------------------------------------------------------------------------


def wan(*, tiny: bool, is_14b: bool = False) -> Workload:
    """Wan2.1's 1.3B at 480p, or its 14B at 720p."""
    heads, width, layers, ffn = (2, 32, 2, 128) if tiny else (40, 128, 40, 13824) if is_14b else (12, 128, 30, 8960)
    text = 64 if tiny else 4096
    frames, height, short = (2, 8, 12) if tiny else (21, 90, 160) if is_14b else (21, 60, 104)

    def make(layers: int = layers) -> torch.nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            ffn_dim=ffn,
            num_layers=layers,
            in_channels=16,
            out_channels=16,
            text_dim=text,
            freq_dim=256,
            rope_max_seq_len=1024,
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        return {
            "hidden_states": _normal(1, 16, frames, height, short, **like),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": _normal(1, 16 if tiny else 512, text, seed=2, **like),
            "return_dict": False,
        }

    return Workload(
        name="wan-14b-720p" if is_14b else "wan-480p",
        unit="Wan2.1-14B 1280x720x81, CFG step" if is_14b else "Wan2.1-1.3B 832x480x81, CFG step",
        calls=2,
        times=50,
        make=make,
        shallow=lambda: make(2),
        arguments=arguments,
        reach_ms=None if is_14b else 48_000,
    )


def _flux1(tiny: bool) -> Workload:
    heads, width, layers, single, joint = (2, 32, 1, 2, 64) if tiny else (24, 128, 19, 38, 4096)
    side, text = (8, 16) if tiny else (64, 512)
    axes = (8, 12, 12) if tiny else (16, 56, 56)

    def make(layers: int = layers, single: int = single) -> torch.nn.Module:
        return FluxTransformer2DModel(
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=width,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=axes,
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        return {
            "hidden_states": _normal(1, side * side, 64, **like),
            "encoder_hidden_states": _normal(1, text, joint, seed=2, **like),
            "pooled_projections": _normal(1, 768, seed=3, **like),
            "timestep": torch.tensor([0.5], **like),
            "guidance": torch.tensor([3.5], device=device),
            "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).to(**like),
            "txt_ids": torch.zeros(text, 3, **like),
            "return_dict": False,
        }

    return Workload(
        name="flux1-1024",
        unit="FLUX.1-dev 1024, step",
        calls=1,
        make=make,
        shallow=lambda: make(2, 2),
        arguments=arguments,
        reach_ms=124,
    )


def _qwen(tiny: bool, pixels: int) -> Workload:
    heads, width, layers, joint = (2, 32, 2, 64) if tiny else (24, 128, 60, 3584)
    side, text = (pixels // 128, 12) if tiny else (pixels // 16, 64)
    axes = (8, 12, 12) if tiny else (16, 56, 56)

    def make(layers: int = layers) -> torch.nn.Module:
        return QwenImageTransformer2DModel(
            num_layers=layers,
            attention_head_dim=width,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            axes_dims_rope=axes,
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        return {
            "hidden_states": _normal(1, side * side, 64, **like),
            "encoder_hidden_states": _normal(1, text, joint, seed=2, **like),
            "encoder_hidden_states_mask": None,
            "timestep": torch.tensor([0.5], **like),
            "img_shapes": [[(1, side, side)]],
            "return_dict": False,
        }

    return Workload(
        name=f"qwen-{pixels}",
        unit=f"Qwen-Image {pixels}, CFG step",
        calls=2,
        make=make,
        shallow=lambda: make(2),
        arguments=arguments,
        reach_ms={1024: 230, 512: 60}[pixels],
        is_launch_bound=pixels == 512,
    )


def _sdxl(tiny: bool) -> Workload:
    channels = (32, 64, 64) if tiny else (320, 640, 1280)
    side, cross = (16, 64) if tiny else (128, 2048)

    def make(layers: tuple[int, ...] = (1, 1, 1) if tiny else (1, 2, 10)) -> torch.nn.Module:
        return UNet2DConditionModel(
            sample_size=side,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=channels,
            transformer_layers_per_block=layers,
            attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
            cross_attention_dim=cross,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        return {
            "sample": _normal(2, 4, side, side, **like),
            "timestep": torch.tensor(500.0, device=device),
            "encoder_hidden_states": _normal(2, 77, cross, seed=2, **like),
            "added_cond_kwargs": {
                "text_embeds": _normal(2, 1280, seed=3, **like),
                "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2, **like),
            },
            "return_dict": False,
        }

    return Workload(
        name="sdxl-1024",
        unit="SDXL 1024, CFG step (two rows)",
        calls=1,
        make=make,
        shallow=lambda: make((1, 1, 1)),
        arguments=arguments,
        reach_ms=27,
        is_launch_bound=True,
        is_best_compiled=True,
    )


def _klein(tiny: bool) -> Workload:
    heads, width, layers, single, joint = (2, 32, 1, 2, 64) if tiny else (24, 128, 5, 20, 7680)
    side, text = (8, 16) if tiny else (64, 512)

    def make(layers: int = layers, single: int = single) -> torch.nn.Module:
        return Flux2Transformer2DModel(
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=width,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            axes_dims_rope=(width // 4,) * 4,
            guidance_embeds=False,
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        places = (torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1))
        words = (torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(text))
        return {
            "hidden_states": _normal(1, side * side, 128, **like),
            "encoder_hidden_states": _normal(1, text, joint, seed=2, **like),
            "timestep": torch.tensor([0.5], **like),
            "img_ids": torch.cartesian_prod(*places)[None].to(device),
            "txt_ids": torch.cartesian_prod(*words)[None].to(device),
            "guidance": None,
            "return_dict": False,
        }

    return Workload(
        name="klein-1024",
        unit="FLUX.2-klein-4B 1024, 4 steps (denoiser)",
        calls=4,
        make=make,
        shallow=lambda: make(1, 2),
        arguments=arguments,
        is_launch_bound=True,
    )


def _z_image(tiny: bool) -> Workload:
    dim, layers, heads, text = (96, 2, 3, 64) if tiny else (3840, 30, 30, 2560)
    axes = [8, 12, 12] if tiny else [32, 48, 48]
    side, words = (16, 32) if tiny else (128, 128)

    def make(layers: int = layers) -> torch.nn.Module:
        return ZImageTransformer2DModel(
            dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, cap_feat_dim=text, axes_dims=axes
        )

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        like: Any = {"device": device, "dtype": dtype}
        return {
            "x": [_normal(16, 1, side, side, **like)],
            "t": torch.tensor([0.5], **like),
            "cap_feats": [_normal(words, text, seed=2, **like)],
            "return_dict": False,
        }

    return Workload(
        name="z-image-1024",
        unit="Z-Image-Turbo 1024, 8 forwards (denoiser)",
        calls=8,
        make=make,
        shallow=lambda: make(2),
        arguments=arguments,
    )


# --- encoders and decoders ----------------------------------------------------------------------------------------


def _umt5(tiny: bool, tokens: int) -> Workload:
    vocabulary, dim, inner, layers, heads = (300, 64, 128, 2, 4) if tiny else (256384, 4096, 10240, 24, 64)

    def make(layers: int = layers) -> torch.nn.Module:
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=dim,
            d_kv=dim // heads,
            d_ff=inner,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            is_encoder_decoder=False,
            use_cache=False,
        )
        return UMT5EncoderModel(config)

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        ids = torch.randint(2, vocabulary, (1, 512), generator=torch.Generator("cpu").manual_seed(1))
        mask = (torch.arange(512) < tokens)[None].long()
        return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device), "return_dict": False}

    return Workload(
        name="umt5-full" if tokens == 512 else "umt5",
        unit=f"UMT5-xxl, two prompts of {tokens} tokens" + (", padded to 512" if tokens < 512 else ""),
        calls=2,
        make=make,
        shallow=lambda: make(2),
        arguments=arguments,
        is_denoiser=False,
        component="text_encoder",
        read=lambda result: result[:, :tokens],
        reach_ms=20,
        is_launch_bound=True,
    )


def _wan_vae(tiny: bool) -> Workload:
    base = 8 if tiny else 96
    frames, height, width = (2, 8, 12) if tiny else (21, 60, 104)

    def make() -> torch.nn.Module:
        return AutoencoderKLWan(base_dim=base)

    def arguments(device: torch.device, dtype: torch.dtype) -> Arguments:
        return {"z": _normal(1, 16, frames, height, width, device=device, dtype=dtype), "return_dict": False}

    return Workload(
        name="wan-vae",
        unit="Wan VAE decode 832x480x81",
        calls=1,
        make=make,
        shallow=make,
        arguments=arguments,
        method="decode",
        component="vae",
        has_convolutions=True,
        is_denoiser=False,
        reach_ms=800,
    )


def workloads(*, tiny: bool) -> dict[str, Workload]:
    """Return every workload by name, the most telling first."""
    every = (
        wan(tiny=tiny),
        _flux1(tiny),
        _sdxl(tiny),
        _qwen(tiny, 512),
        _umt5(tiny, 60),
        _umt5(tiny, 512),
        _klein(tiny),
        _qwen(tiny, 1024),
        _z_image(tiny),
        _wan_vae(tiny),
    )
    if tiny:
        every = tuple(replace(one, reach_ms=None) for one in every)
    return {one.name: one for one in every}
