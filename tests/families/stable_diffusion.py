"""Stable Diffusion 1.5, XL and 3: guidance as the rows of one call, latents as pictures."""

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .weights import randomise


def autoencoder(*, channels: int, scaling: float, shift: float | None, quant_conv: bool, seed: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=64,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )
    return randomise(vae, seed=seed)


def stable_diffusion(folder: Path) -> None:
    tokenizer = tokenization.clip()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=encoders.WIDTH,
    )
    StableDiffusionPipeline(
        vae=autoencoder(channels=4, scaling=0.18215, shift=None, quant_conv=True, seed=11),
        text_encoder=encoders.clip_text(tokenizer, seed=12),
        tokenizer=tokenizer,
        unet=randomise(unet, seed=13),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_xl(folder: Path) -> None:
    tokenizer, tokenizer_2 = tokenization.clip(), tokenization.clip(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + encoders.WIDTH,
        cross_attention_dim=2 * encoders.WIDTH,
    )
    StableDiffusionXLPipeline(
        vae=autoencoder(channels=4, scaling=0.13025, shift=None, quant_conv=True, seed=21),
        text_encoder=encoders.clip_text(tokenizer, seed=22),
        text_encoder_2=encoders.clip_text_projected(tokenizer_2, seed=23),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=randomise(unet, seed=24),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)


def stable_diffusion_3(folder: Path) -> None:
    tokenizer, tokenizer_2, tokenizer_3 = tokenization.clip(), tokenization.clip(pad_token="!"), tokenization.t5()
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=2 * encoders.WIDTH,  # both CLIPs side by side, zero-padded to the width of T5
        pooled_projection_dim=2 * encoders.WIDTH,
        pos_embed_max_size=32,
    )
    StableDiffusion3Pipeline(
        vae=autoencoder(channels=16, scaling=1.5305, shift=0.0609, quant_conv=False, seed=31),
        text_encoder=encoders.clip_text_projected(tokenizer, seed=32),
        text_encoder_2=encoders.clip_text_projected(tokenizer_2, seed=33),
        text_encoder_3=encoders.t5(len(tokenizer_3), width=2 * encoders.WIDTH, seed=34),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=randomise(transformer, seed=35),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


STABLE_DIFFUSION_FAMILIES = (
    Family(
        # Denoiser: latents and texts of 2 rows, negative first; timestep without axis. `vae.decode` gets `generator`.
        name="stable-diffusion-1.5",
        pipeline_class="StableDiffusionPipeline",
        media="image",
        build=stable_diffusion,
        call=small(guidance_scale=5.0),
        wide=WIDE,
        tall=TALL,
        solver="DDIMScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
        denoisers=("unet",),
    ),
    Family(
        # Denoiser: as 1.5, and rows in `added_cond_kwargs` (text_embeds, time_ids); the timestep has no axis.
        name="stable-diffusion-xl",
        pipeline_class="StableDiffusionXLPipeline",
        media="image",
        build=stable_diffusion_xl,
        call=small(guidance_scale=5.0),
        wide=WIDE,
        tall=TALL,
        solver="EulerDiscreteScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
        denoisers=("unet",),
    ),
    Family(
        # Denoiser: latents, texts, pooled texts and timesteps all of 2 rows, negative first.
        name="stable-diffusion-3",
        pipeline_class="StableDiffusion3Pipeline",
        media="image",
        build=stable_diffusion_3,
        call=small(guidance_scale=4.0, max_sequence_length=64),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
    ),
)
