"""Families that need a picture to begin with."""

from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FluxKontextPipeline,
    QwenImageEditPlusPipeline,
    WanImageToVideoPipeline,
)
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .image import dynamic_flow, flux_transformer, qwen_flow, qwen_transformer
from .stable_diffusion import autoencoder
from .video import WAN_CALL, wan_autoencoder, wan_solver, wan_transformer
from .weights import randomise


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


def qwen_image_edit_plus(folder: Path) -> None:
    tokenizer = tokenization.qwen(default_system=True)
    # The pipeline scales every given picture to a megapixel: an autoencoder of 32 pixels a latent (published: 8)
    # leaves 256 tokens of it.
    vae = AutoencoderKLQwenImage(
        base_dim=2, dim_mult=[1, 1, 2, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True, True, True]
    )
    QwenImageEditPlusPipeline(
        vae=randomise(vae, seed=221),
        text_encoder=encoders.qwen25_vl(tokenizer, seed=222, gain=3.0),  # a few words beside 196 tokens of the picture
        tokenizer=tokenizer,
        processor=Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),  # never used, but the class insists (and it needs torchvision)
        ),
        transformer=qwen_transformer(seed=223),
        scheduler=qwen_flow(),
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
        # Denoiser: as Qwen-Image; an entry of `img_shapes` lists the result and then each picture. The pipeline
        # refuses two prompts in one call.
        name="qwen-image-edit-plus",
        pipeline_class="QwenImageEditPlusPipeline",
        media="image",
        build=qwen_image_edit_plus,
        call=small(height=128, width=128, true_cfg_scale=3.0),
        wide={"height": 128, "width": 256},
        tall={"height": 256, "width": 128},
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="calls",
        unguided={"true_cfg_scale": 1.0},
        packed=True,
        image="required",
        many_images=True,
        packages=("torchvision",),
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
