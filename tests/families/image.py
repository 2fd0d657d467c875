"""Families that make pictures from a prompt, later than Stable Diffusion."""

from pathlib import Path

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .stable_diffusion import autoencoder
from .weights import randomise


def flux_transformer(*, seed: int) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoders.WIDTH,
        pooled_projection_dim=encoders.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return randomise(transformer, seed=seed)


def flux(folder: Path) -> None:
    tokenizer, tokenizer_2 = tokenization.clip(), tokenization.t5()
    FluxPipeline(
        vae=autoencoder(channels=16, scaling=0.3611, shift=0.1159, quant_conv=False, seed=41),
        text_encoder=encoders.clip_text(tokenizer, seed=42),
        text_encoder_2=encoders.t5(len(tokenizer_2), seed=43),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=flux_transformer(seed=44),
        scheduler=dynamic_flow(),
    ).save_pretrained(folder)


def dynamic_flow() -> FlowMatchEulerDiscreteScheduler:
    """The schedule of FLUX.1 and its kin, shifted by the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def flux_2_klein(folder: Path) -> None:
    tokenizer = tokenization.qwen()
    text_encoder = encoders.qwen3_causal(tokenizer, seed=51)
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * text_encoder.config.hidden_size,  # three layers of the encoder side by side
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        sample_size=64,
    )
    Flux2KleinPipeline(
        vae=randomise(vae, seed=52),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=randomise(transformer, seed=53),
        scheduler=dynamic_flow(),
    ).save_pretrained(folder)


def qwen_transformer(*, seed: int) -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoders.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return randomise(transformer, seed=seed)


def qwen_autoencoder(*, seed: int) -> AutoencoderKLQwenImage:
    return randomise(AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1), seed=seed)


def qwen_flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen_image(folder: Path) -> None:
    tokenizer = tokenization.qwen(default_system=True)
    QwenImagePipeline(
        vae=qwen_autoencoder(seed=61),
        text_encoder=encoders.qwen25_vl(tokenizer, seed=62),
        tokenizer=tokenizer,
        transformer=qwen_transformer(seed=63),
        scheduler=qwen_flow(),
    ).save_pretrained(folder)


def z_image(folder: Path) -> None:
    tokenizer = tokenization.qwen()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=encoders.WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 128, 128],
    )
    ZImagePipeline(
        vae=autoencoder(channels=16, scaling=0.3611, shift=0.1159, quant_conv=False, seed=71),
        text_encoder=encoders.qwen3(tokenizer, seed=72),
        tokenizer=tokenizer,
        transformer=randomise(transformer, seed=73),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def sana(folder: Path) -> None:
    tokenizer = tokenization.gemma()
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=encoders.WIDTH,
        sample_size=32,
    )
    widths = (8,) * 5 + (16,)  # 32 pixels a latent, as published
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.gemma2(tokenizer, seed=81),
        vae=randomise(vae, seed=82),
        transformer=randomise(transformer, seed=83),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    ).save_pretrained(folder)


IMAGE_FAMILIES = (
    Family(
        # Denoiser: `img_ids` (S, 3) and `txt_ids` (T, 3) have no batch axis; `guidance` (B,) has.
        name="flux-1",
        pipeline_class="FluxPipeline",
        media="image",
        build=flux,
        # `guidance_scale` is an input of the distilled transformer; the negative prompt counts with true CFG alone.
        call=small(guidance_scale=3.5, true_cfg_scale=3.0, max_sequence_length=64),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="calls",
        unguided={"true_cfg_scale": 1.0},
        packed=True,
    ),
    Family(
        # Denoiser: ids are (B, S, 4), of which row 0 alone is read; tokens of given pictures follow the latents.
        name="flux-2-klein",
        pipeline_class="Flux2KleinPipeline",
        media="image",
        build=flux_2_klein,
        call=small(guidance_scale=4.0, max_sequence_length=64),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="calls",
        unguided={"guidance_scale": 1.0},
        packed=True,
        negative_prompt=False,  # always against the empty prompt
        image="optional",
        many_images=True,
    ),
    Family(
        # Denoiser: texts in their true length; a mask only where prompts of one call differ in length; of the list
        # `img_shapes` entry 0 alone is read.
        name="qwen-image",
        pipeline_class="QwenImagePipeline",
        media="image",
        build=qwen_image,
        call=small(true_cfg_scale=3.0),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="calls",
        unguided={"true_cfg_scale": 1.0},
        packed=True,
    ),
    Family(
        # Denoiser: lists of latents (C, 1, H, W) and of texts in their true length, positional, prompt first.
        name="z-image",
        pipeline_class="ZImagePipeline",
        media="image",
        build=z_image,
        call=small(guidance_scale=3.0, max_sequence_length=64),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="rows",
        unguided={"guidance_scale": 0.0},  # its formula is pos + scale * (pos - neg)
    ),
    Family(
        # Denoiser: 2 rows, negative first, with a text mask. The prompt is encoded behind a long instruction (594
        # tokens here), the negative prompt without it.
        name="sana",
        pipeline_class="SanaPipeline",
        media="image",
        build=sana,
        # Binning is on by default and would turn 128 pixels into the nearest size of about a megapixel.
        call=small(height=128, width=128, guidance_scale=4.5, max_sequence_length=64, use_resolution_binning=False),
        wide={"height": 128, "width": 256},
        tall={"height": 256, "width": 128},
        solver="DPMSolverMultistepScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
    ),
)
