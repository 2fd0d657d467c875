"""LTX-2, which makes clips with sound: the layout of its 2.3 release, and the network that enlarges its latents."""

from pathlib import Path

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

from . import encoders, tokenization
from .family import TALL, WIDE, Family, small
from .weights import randomise

CHANNELS = 16  # of the latents of frames


def transformer() -> LTX2VideoTransformer3DModel:
    width, audio_width = 2 * 16, 2 * 8
    made = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=width // 2,
        cross_attention_dim=width,
        gated_attn=True,
        cross_attn_mod=True,
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=2,
        audio_attention_head_dim=audio_width // 2,
        audio_cross_attention_dim=audio_width,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        num_layers=2,
        rope_type="split",
        use_prompt_embeddings=False,
        perturbed_attn=True,
    )
    return randomise(made, seed=173)


def connectors(hidden_states: int) -> LTX2TextConnectors:
    made = LTX2TextConnectors(
        caption_channels=encoders.WIDTH,
        text_proj_in_factor=hidden_states,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=32,
        video_gated_attn=True,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=32,
        audio_gated_attn=True,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=32,
        audio_hidden_dim=16,
        proj_bias=True,
    )
    return randomise(made, seed=172)


def ltx_2(folder: Path) -> None:
    tokenizer = tokenization.gemma()
    vae = AutoencoderKLLTX2Video(  # 32 pixels and 8 frames a latent
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    # 25 latents of sound a second, each 4 columns of a spectrogram of 64 bands, each 10 ms.
    audio_vae = AutoencoderKLLTX2Audio(base_channels=16, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=1)
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=randomise(vae, seed=174),
        audio_vae=randomise(audio_vae, seed=175),
        text_encoder=encoders.gemma3(tokenizer, layers=2, seed=171),
        tokenizer=tokenizer,
        connectors=connectors(3),
        transformer=transformer(),
        vocoder=randomise(LTX2Vocoder(hidden_channels=32), seed=176),  # stereo, 24,000 samples a second
    ).save_pretrained(folder)


def add_upsampler(folder: Path) -> None:
    """Put the network that doubles the sides of latents where the makers' checkpoint has it: beside the index."""
    made = LTX2LatentUpsamplerModel(in_channels=CHANNELS, mid_channels=64, num_blocks_per_stage=1)
    randomise(made, seed=177).save_pretrained(folder / "latent_upsampler")


LTX_2_FAMILIES = (
    Family(
        # Denoiser: 2 rows, negative first, of frames and of sound; coordinates with rows. Returns a pair.
        name="ltx-2",
        pipeline_class="LTX2Pipeline",
        media="video",
        build=ltx_2,
        # Its other two ways to guide are calls of their own, of one row.
        call=small(
            num_frames=9,
            guidance_scale=3.0,
            stg_scale=0.0,
            audio_stg_scale=0.0,
            modality_scale=1.0,
            audio_modality_scale=1.0,
            max_sequence_length=64,
        ),
        wide=WIDE,
        tall=TALL,
        solver="FlowMatchEulerDiscreteScheduler",
        guidance="rows",
        unguided={"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
        packed=True,
    ),
)
