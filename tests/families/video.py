"""Families that make clips from a prompt, with the published latent geometry and tiny widths."""

from pathlib import Path

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .weights import randomise


def ltx(folder: Path) -> None:
    tokenizer = tokenization.t5(model_max_length=128)
    transformer = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=encoders.WIDTH,
    )
    vae = AutoencoderKLLTXVideo(  # 32 pixels and 8 frames a latent
        latent_channels=16,
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=randomise(vae, seed=111),
        text_encoder=encoders.t5(len(tokenizer), seed=112),
        tokenizer=tokenizer,
        transformer=randomise(transformer, seed=113),
    ).save_pretrained(folder)


def hunyuan_video_15(folder: Path) -> None:
    """The one folder of more than a few MB: a layer of 2048 x 2048 is fixed in the transformer's code.

    So are 1000 + 256 + 729 text and picture tokens in the pipeline's: a denoiser call takes about 0.1 s.
    """
    tokenizer, tokenizer_2 = tokenization.qwen(default_system=True), tokenization.byt5()
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * 8 + 1,  # latents, picture condition, its mask
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=encoders.WIDTH,
        text_embed_2_dim=encoders.WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(  # 16 pixels and 4 frames a latent
        latent_channels=8,
        block_out_channels=(8, 8, 16, 16, 16),
        layers_per_block=1,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    HunyuanVideo15Pipeline(
        text_encoder=encoders.qwen25_text(tokenizer, seed=121),
        tokenizer=tokenizer,
        transformer=randomise(transformer, seed=122),
        vae=randomise(vae, seed=123),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=encoders.t5(384, seed=124),
        tokenizer_2=tokenizer_2,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    ).save_pretrained(folder)


def cogvideox(folder: Path) -> None:
    tokenizer = tokenization.t5(model_max_length=226)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        time_embed_dim=32,
        text_embed_dim=encoders.WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,  # as in the 5B model: a (cos, sin) table that has no batch axis
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=64,
        sample_width=64,
        scaling_factor=0.7,
    )
    CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5(len(tokenizer), seed=131),
        vae=randomise(vae, seed=132, gain=0.7),
        transformer=randomise(transformer, seed=133),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    ).save_pretrained(folder)


def wan_transformer(*, channels: int, seed: int, in_channels: int | None = None, image_dim: int | None = None,
                    ) -> WanTransformer3DModel:  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels or channels,
        out_channels=channels,
        text_dim=encoders.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=image_dim,
        added_kv_proj_dim=32 if image_dim else None,
        rope_max_seq_len=128,
    )
    return randomise(transformer, seed=seed)


def wan_autoencoder(*, seed: int) -> AutoencoderKLWan:
    return randomise(AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1), seed=seed)


def wan_solver(flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def wan_21(folder: Path) -> None:
    tokenizer = tokenization.t5()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.umt5(len(tokenizer), seed=141),
        vae=wan_autoencoder(seed=142),
        transformer=wan_transformer(channels=16, seed=143),
        scheduler=wan_solver(3.0),
    ).save_pretrained(folder)


def wan_22(folder: Path) -> None:
    tokenizer = tokenization.t5()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.umt5(len(tokenizer), seed=151),
        vae=wan_autoencoder(seed=152),
        transformer=wan_transformer(channels=16, seed=153),
        transformer_2=wan_transformer(channels=16, seed=154),
        scheduler=wan_solver(3.0),
        boundary_ratio=0.875,
    ).save_pretrained(folder)


def wan_22_ti2v(folder: Path) -> None:
    tokenizer = tokenization.t5()
    vae = AutoencoderKLWan(  # 16 pixels a latent, of which 2 are a patch of the pixels themselves
        base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.umt5(len(tokenizer), seed=161),
        vae=randomise(vae, seed=162),
        transformer=wan_transformer(channels=48, seed=163),
        scheduler=wan_solver(5.0),
        expand_timesteps=True,
    ).save_pretrained(folder)


WAN_CALL = small(num_frames=5, guidance_scale=4.0, max_sequence_length=64)

VIDEO_FAMILIES = (
    Family(
        # Denoiser: 2 rows, negative first, with a text mask; `num_frames`, `height` and `width` as ints.
        name="ltx",
        pipeline_class="LTXPipeline",
        media="video",
        build=ltx,
        call=small(num_frames=9, guidance_scale=3.0, max_sequence_length=64),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
        packed=True,
    ),
    Family(
        # Denoiser: every argument has rows. It asks `all(image_embeds == 0)` of the whole batch. `vae.decode` fails
        # for 2 rows (its attention mask lacks the axis of the heads).
        name="hunyuan-video-1.5",
        pipeline_class="HunyuanVideo15Pipeline",
        media="video",
        build=hunyuan_video_15,
        # Words in quotation marks go to the second encoder; without any it is not called.
        call=small(num_inference_steps=2, num_frames=5),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="guider",
    ),
    Family(
        # Denoiser: 2 rows, negative first; `image_rotary_emb`, a pair (S, D) of tables, has no batch axis.
        name="cogvideox",
        pipeline_class="CogVideoXPipeline",
        media="video",
        build=cogvideox,
        # The transformer's text length is fixed in its config, so `max_sequence_length` stays at its default.
        call=small(num_frames=9, guidance_scale=4.0),
        wide=WIDE,
        tall=TALL,
        solver="CogVideoXDDIMScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0},
    ),
    Family(
        # Denoiser: latents (B, C, T, H, W), texts of a fixed length, timesteps (B,); prompt first, then negative.
        name="wan-2.1",
        pipeline_class="WanPipeline",
        media="video",
        build=wan_21,
        call=WAN_CALL,
        wide=WIDE,
        tall=TALL,
        solver="UniPCMultistepScheduler",
        guidance="calls",
        unguided={"guidance_scale": 1.0},
    ),
    Family(
        name="wan-2.2",
        pipeline_class="WanPipeline",
        media="video",
        build=wan_22,
        # The first steps, above the boundary, are the first transformer's; the rest the second one's.
        call=WAN_CALL,
        wide=WIDE,
        tall=TALL,
        solver="UniPCMultistepScheduler",
        guidance="calls",
        unguided={"guidance_scale": 1.0},
        denoisers=("transformer", "transformer_2"),
    ),
    Family(
        # Denoiser: timesteps (B, S), one for each token.
        name="wan-2.2-ti2v",
        pipeline_class="WanPipeline",
        media="video",
        build=wan_22_ti2v,
        call=WAN_CALL,
        wide=WIDE,
        tall=TALL,
        solver="UniPCMultistepScheduler",
        guidance="calls",
        unguided={"guidance_scale": 1.0},
    ),
)
