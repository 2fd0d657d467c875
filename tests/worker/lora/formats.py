"""One file of each known LoRA format for a tiny model, with the keys that its trainer writes, spelled out."""

from dataclasses import dataclass

import torch

from .files import KOHYA, PEFT, Format, Maker, Tensors, spelled

D = 32  # width of the tiny transformers
MLP = 4 * D


def _blocks(lines: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parse lines of ``key out in [kernel ...]``."""
    rows = [line.split() for line in lines.strip().splitlines()]
    return [(key, tuple(int(number) for number in shape)) for key, *shape in rows]


def ai_toolkit_flux(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            transformer.transformer_blocks.0.attn.to_q 32 32
            transformer.transformer_blocks.1.ff.net.0.proj 128 32
            transformer.single_transformer_blocks.0.proj_out 32 160
            transformer.single_transformer_blocks.1.norm.linear 96 32
        """),
        ends=PEFT,
        rank=4,
        alpha=None,
    )


def kohya_flux(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            lora_unet_double_blocks_0_img_attn_qkv 96 32
            lora_unet_double_blocks_0_img_attn_proj 32 32
            lora_unet_double_blocks_1_txt_attn_qkv 96 32
            lora_unet_double_blocks_1_txt_mlp_0 128 32
            lora_unet_double_blocks_1_img_mod_lin 192 32
            lora_unet_single_blocks_1_linear2 32 160
            lora_unet_single_blocks_0_modulation_lin 96 32
            lora_te1_text_model_encoder_layers_0_self_attn_q_proj 32 32
            lora_te1_text_model_encoder_layers_0_self_attn_out_proj 32 32
            lora_te1_text_model_encoder_layers_1_mlp_fc1 64 32
        """),
        ends=KOHYA,
        rank=4,
        alpha=2.0,
    )


def kohya_flux_with_diffusers_names(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            lora_transformer_transformer_blocks_0_attn_to_q 32 32
            lora_transformer_single_transformer_blocks_1_attn_to_k 32 32
            lora_te1_text_model_encoder_layers_2_self_attn_v_proj 32 32
        """),
        ends=KOHYA,
        rank=4,
        alpha=8.0,
    )


def xlabs_flux(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            double_blocks.0.processor.qkv_lora1 96 32
            double_blocks.0.processor.proj_lora1 32 32
            double_blocks.1.processor.qkv_lora2 96 32
            double_blocks.1.processor.proj_lora2 32 32
            single_blocks.0.processor.qkv_lora 96 32
        """),
        ends=("down.weight", "up.weight"),
        rank=4,
        alpha=None,
    )


def peft_flux(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            base_model.model.transformer_blocks.0.attn.to_q 32 32
            base_model.model.single_transformer_blocks.1.proj_mlp 128 32
        """),
        ends=PEFT,
        rank=4,
        alpha=None,
    )


_SD_LAYERS = """
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q 16 16
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0 16 16
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj 128 16
    lora_unet_mid_block_attentions_0_proj_in 32 32 1 1
    lora_unet_up_blocks_1_resnets_1_conv1 16 32 3 3
    lora_te_text_model_encoder_layers_1_self_attn_k_proj 32 32
    lora_te_text_model_encoder_layers_1_self_attn_out_proj 32 32
    lora_te_text_model_encoder_layers_0_mlp_fc2 32 64
"""


def kohya_sd(maker: Maker) -> Tensors:
    return spelled(maker, _blocks(_SD_LAYERS), ends=KOHYA, rank=4, alpha=1.0)


def diffusers_sd_of_old(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora 16 16
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora 16 16
            text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora 32 32
            text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora 32 32
        """),
        ends=("down.weight", "up.weight"),
        rank=4,
        alpha=None,
    )


def diffusers_sd(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k 16 16
            unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2 32 128
        """),
        ends=("lora.down.weight", "lora.up.weight"),
        rank=4,
        alpha=None,
    ) | spelled(
        maker,
        _blocks("text_encoder.text_model.encoder.layers.0.self_attn.v_proj 32 32"),
        ends=("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        rank=2,
        alpha=None,
    )


def kohya_sdxl(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q 32 32
            lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v 32 64
            lora_te1_text_model_encoder_layers_0_self_attn_q_proj 32 32
            lora_te2_text_model_encoder_layers_1_mlp_fc1 64 32
        """),
        ends=KOHYA,
        rank=4,
        alpha=2.0,
    )


_WAN_LAYERS = """
    self_attn.q 32 32
    self_attn.k 32 32
    self_attn.v 32 32
    self_attn.o 32 32
    cross_attn.q 32 32
    cross_attn.k 32 32
    cross_attn.v 32 32
    cross_attn.o 32 32
    ffn.0 64 32
    ffn.2 32 64
"""


def wan(maker: Maker) -> Tensors:
    keys = [(f"diffusion_model.blocks.{i}.{key}", shape) for i in range(2) for key, shape in _blocks(_WAN_LAYERS)]
    tensors = spelled(maker, keys, ends=PEFT, rank=4, alpha=None)
    for i in range(2):
        tensors[f"diffusion_model.blocks.{i}.self_attn.q.diff_b"] = maker.draw(32)
        tensors[f"diffusion_model.blocks.{i}.ffn.0.diff_b"] = maker.draw(64)
    return tensors


def wan_with_alpha(maker: Maker) -> Tensors:
    keys = [(f"diffusion_model.blocks.{i}.{key}", shape) for i in range(2) for key, shape in _blocks(_WAN_LAYERS)]
    return spelled(maker, keys, ends=KOHYA, rank=4, alpha=1.0)


def musubi_wan(maker: Maker) -> Tensors:
    keys = [
        (f"lora_unet_blocks_{i}_{key.replace('.', '_')}", shape)
        for i in range(2)
        for key, shape in _blocks(_WAN_LAYERS)
    ]
    return spelled(maker, keys, ends=KOHYA, rank=4, alpha=2.0)


def wan_of_diffusers(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            transformer.blocks.0.attn1.to_q 32 32
            transformer.blocks.1.ffn.net.0.proj 64 32
        """),
        ends=PEFT,
        rank=4,
        alpha=None,
    )


def musubi_qwen(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            lora_unet_transformer_blocks_0_attn_to_q 32 32
            lora_unet_transformer_blocks_1_img_mlp_net_0_proj 128 32
            lora_unet_transformer_blocks_1_attn_add_k_proj 32 32
        """),
        ends=KOHYA,
        rank=4,
        alpha=2.0,
    )


def ai_toolkit_z_image(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            diffusion_model.layers.0.attention.to_q 32 32
            diffusion_model.layers.1.feed_forward.w1 85 32
            diffusion_model.noise_refiner.0.attention.to_out.0 32 32
        """),
        ends=PEFT,
        rank=4,
        alpha=None,
    )


def ai_toolkit_z_image_lokr(maker: Maker) -> Tensors:
    key = "diffusion_model.layers.0.attention.to_q"
    return {f"{key}.lokr_w1": maker.draw(4, 4), f"{key}.lokr_w2": maker.draw(8, 8), f"{key}.alpha": torch.tensor(1e10)}


def ai_toolkit_flux_2(maker: Maker) -> Tensors:
    return spelled(
        maker,
        _blocks("""
            diffusion_model.double_blocks.0.img_attn.qkv 96 32
            diffusion_model.double_blocks.1.txt_attn.proj 32 32
            diffusion_model.single_blocks.0.linear1 288 32
            diffusion_model.single_blocks.1.linear2 32 128
        """),
        ends=PEFT,
        rank=4,
        alpha=None,
    )


def lycoris_flux_2_lokr(maker: Maker) -> Tensors:
    key = "lycoris_transformer_blocks_0_attn_to_q"
    return {
        f"{key}.lokr_w1": maker.draw(4, 4),
        f"{key}.lokr_w2_a": maker.draw(8, 2),
        f"{key}.lokr_w2_b": maker.draw(2, 8),
        f"{key}.alpha": torch.tensor(1.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A format's file for one tiny family, and the parameters it must change, by module."""

    family: str
    make: Format
    changes: dict[str, tuple[str, ...]]


def _wan_weights(*more: str) -> tuple[str, ...]:
    layers = [f"{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += ["ffn.net.0.proj", "ffn.net.2"]
    return (*(f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers), *more)


EXAMPLES: dict[str, Example] = {
    "ai-toolkit, FLUX.1": Example(
        family="flux-1",
        make=ai_toolkit_flux,
        changes={
            "transformer": (
                "transformer_blocks.0.attn.to_q.weight",
                "transformer_blocks.1.ff.net.0.proj.weight",
                "single_transformer_blocks.0.proj_out.weight",
                "single_transformer_blocks.1.norm.linear.weight",
            )
        },
    ),
    "kohya, FLUX.1": Example(
        family="flux-1",
        make=kohya_flux,
        changes={
            "transformer": (
                "transformer_blocks.0.attn.to_q.weight",
                "transformer_blocks.0.attn.to_k.weight",
                "transformer_blocks.0.attn.to_v.weight",
                "transformer_blocks.0.attn.to_out.0.weight",
                "transformer_blocks.1.attn.add_q_proj.weight",
                "transformer_blocks.1.attn.add_k_proj.weight",
                "transformer_blocks.1.attn.add_v_proj.weight",
                "transformer_blocks.1.ff_context.net.0.proj.weight",
                "transformer_blocks.1.norm1.linear.weight",
                "single_transformer_blocks.1.proj_out.weight",
                "single_transformer_blocks.0.norm.linear.weight",
            ),
            "text_encoder": (
                "encoder.layers.0.self_attn.q_proj.weight",
                "encoder.layers.0.self_attn.out_proj.weight",
                "encoder.layers.1.mlp.fc1.weight",
            ),
        },
    ),
    "kohya with diffusers' names, FLUX.1": Example(
        family="flux-1",
        make=kohya_flux_with_diffusers_names,
        changes={
            "transformer": (
                "transformer_blocks.0.attn.to_q.weight",
                "single_transformer_blocks.1.attn.to_k.weight",
            ),
            "text_encoder": ("encoder.layers.2.self_attn.v_proj.weight",),
        },
    ),
    "XLabs, FLUX.1": Example(
        family="flux-1",
        make=xlabs_flux,
        changes={
            "transformer": (
                *(f"transformer_blocks.0.attn.to_{x}.weight" for x in ("q", "k", "v", "out.0")),
                *(f"transformer_blocks.1.attn.add_{x}_proj.weight" for x in "qkv"),
                "transformer_blocks.1.attn.to_add_out.weight",
                *(f"single_transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"),
            )
        },
    ),
    "peft, FLUX.1": Example(
        family="flux-1",
        make=peft_flux,
        changes={
            "transformer": ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.1.proj_mlp.weight")
        },
    ),
    "kohya, Stable Diffusion": Example(
        family="stable-diffusion-1.5",
        make=kohya_sd,
        changes={
            "unet": (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
                "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
                "mid_block.attentions.0.proj_in.weight",
                "up_blocks.1.resnets.1.conv1.weight",
            ),
            "text_encoder": (
                "encoder.layers.1.self_attn.k_proj.weight",
                "encoder.layers.1.self_attn.out_proj.weight",
                "encoder.layers.0.mlp.fc2.weight",
            ),
        },
    ),
    "older diffusers, Stable Diffusion": Example(
        family="stable-diffusion-1.5",
        make=diffusers_sd_of_old,
        changes={
            "unet": (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
            ),
            "text_encoder": (
                "encoder.layers.0.self_attn.q_proj.weight",
                "encoder.layers.1.self_attn.out_proj.weight",
            ),
        },
    ),
    "diffusers, Stable Diffusion": Example(
        family="stable-diffusion-1.5",
        make=diffusers_sd,
        changes={
            "unet": (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight",
                "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
            ),
            "text_encoder": ("encoder.layers.0.self_attn.v_proj.weight",),
        },
    ),
    "Wan's own": Example(
        family="wan-2.1",
        make=wan,
        changes={
            "transformer": _wan_weights(
                "blocks.0.attn1.to_q.bias",
                "blocks.1.attn1.to_q.bias",
                "blocks.0.ffn.net.0.proj.bias",
                "blocks.1.ffn.net.0.proj.bias",
            )
        },
    ),
    "Wan's own with alpha": Example(family="wan-2.1", make=wan_with_alpha, changes={"transformer": _wan_weights()}),
    "musubi, Wan": Example(family="wan-2.1", make=musubi_wan, changes={"transformer": _wan_weights()}),
    "diffusers, Wan": Example(
        family="wan-2.1",
        make=wan_of_diffusers,
        changes={"transformer": ("blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.0.proj.weight")},
    ),
    "musubi, Qwen-Image": Example(
        family="qwen-image",
        make=musubi_qwen,
        changes={
            "transformer": (
                "transformer_blocks.0.attn.to_q.weight",
                "transformer_blocks.1.img_mlp.net.0.proj.weight",
                "transformer_blocks.1.attn.add_k_proj.weight",
            )
        },
    ),
    "ai-toolkit, Z-Image": Example(
        family="z-image",
        make=ai_toolkit_z_image,
        changes={
            "transformer": (
                "layers.0.attention.to_q.weight",
                "layers.1.feed_forward.w1.weight",
                "noise_refiner.0.attention.to_out.0.weight",
            )
        },
    ),
    "ai-toolkit LoKr, Z-Image": Example(
        family="z-image",
        make=ai_toolkit_z_image_lokr,
        changes={"transformer": ("layers.0.attention.to_q.weight",)},
    ),
    "ai-toolkit, FLUX.2": Example(
        family="flux-2-klein",
        make=ai_toolkit_flux_2,
        changes={
            "transformer": (
                *(f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"),
                "transformer_blocks.1.attn.to_add_out.weight",
                "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
                "single_transformer_blocks.1.attn.to_out.weight",
            )
        },
    ),
    "LyCORIS LoKr, FLUX.2": Example(
        family="flux-2-klein",
        make=lycoris_flux_2_lokr,
        changes={"transformer": ("transformer_blocks.0.attn.to_q.weight",)},
    ),
}
