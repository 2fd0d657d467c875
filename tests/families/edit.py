"""Families that need a picture to begin with."""

from pathlib import Path

from diffusers import (
    FluxKontextPipeline,
    WanImageToVideoPipeline,
)
from transformers import CLIPImageProcessor

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .image import dynamic_flow, flux_transformer
from .stable_diffusion import autoencoder
from .video import WAN_CALL, wan_autoencoder, wan_solver, wan_transformer


def flux_kontext(folder: Path) -> None:
    tokenizer, tokenizer_2 = tokenization.clip(), tokenization.t5()
    FluxKontextPipeline(
        vae=autoencoder(channels=16, scaling=0.3611, shift=0.1159, quant_conv=False, seed=211),
        text_encoder=encoders.clip_text(tokenizer, seed=212),
        text_encoder_2=encoders.t5(len(tokenizer_2), seed=213),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=flux_transformer(seed=214),
        scheduler=dynamic_flow(),
    ).save_pretrained(folder)


def wan_21_i2v(folder: Path) -> None:
    tokenizer = tokenization.t5()
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.umt5(len(tokenizer), seed=231),
        image_encoder=encoders.clip_vision(seed=232),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        vae=wan_autoencoder(seed=233),
        # 16 latents, 4 of the mask and 16 of the first frame come in
        transformer=wan_transformer(channels=16, in_channels=36, image_dim=encoders.WIDTH, seed=234),
        scheduler=wan_solver(3.0),
    ).save_pretrained(folder)


EDIT_FAMILIES = (
    Family(
        # Denoiser: as FLUX.1; tokens and ids of the picture follow those of the latents.
        name="flux-1-kontext",
        pipeline_class="FluxKontextPipeline",
        media="image",
        build=flux_kontext,
        # Without these two every picture and every result is brought to about a megapixel.
        call=small(
            guidance_scale=2.5, true_cfg_scale=3.0, max_sequence_length=64, max_area=64 * 64, _auto_resize=False
        ),
        wide={"height": 64, "width": 128, "max_area": 64 * 128},
        tall={"height": 128, "width": 64, "max_area": 64 * 128},
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="calls",
        unguided={"true_cfg_scale": 1.0},
        packed=True,
        image="required",
    ),
    Family(
        # Denoiser: as Wan 2.1, with the mask and the first frame as more channels, and `encoder_hidden_states_image`.
        name="wan-2.1-i2v",
        pipeline_class="WanImageToVideoPipeline",
        media="video",
        build=wan_21_i2v,
        call=WAN_CALL,
        wide=WIDE,
        tall=TALL,
        solver="UniPCMultistepScheduler",
        guidance="calls",
        unguided={"guidance_scale": 1.0},
        image="required",
    ),
)
