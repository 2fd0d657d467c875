"""The video model's parts, and forward passes over them that are fit for training.

Wan 2.2 TI2V: a first frame is given as a clean first latent frame with timestep 0 on its tokens.
B batch, T latent frames, H/W latent height and width, C channels, S tokens, D width, L text tokens.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 16
WIDTH = 256
TEXT_WIDTH = 96
TEXT_VOCABULARY = 1216
CELL = 8  # pixels per latent, each way
TOKEN_PIXELS = 16
FRAMES_PER_LATENT = 4
_PATCH = 2  # pixels folded into channels before the first convolution


def latent_frames(num_frames: int) -> int:
    return 1 + (num_frames - 1) // FRAMES_PER_LATENT


def new_autoencoder() -> AutoencoderKLWan:
    """Wan 2.2's residual autoencoder, 8 pixels and 4 frames to a latent."""
    return AutoencoderKLWan(
        base_dim=24, decoder_base_dim=32, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True], is_residual=True, in_channels=3 * _PATCH**2, out_channels=3 * _PATCH**2,
        patch_size=_PATCH, scale_factor_temporal=FRAMES_PER_LATENT, scale_factor_spatial=CELL,
        latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def new_transformer() -> WanTransformer3DModel:
    """The denoiser; blocks start as identities."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=WIDTH // 64, attention_head_dim=64, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=3 * WIDTH, num_layers=6,
        rope_max_seq_len=64,
    )  # fmt: skip
    still = [model.condition_embedder.time_proj.weight, model.condition_embedder.time_proj.bias]
    still += [model.proj_out.weight, model.proj_out.bias, model.scale_shift_table]
    for block in model.blocks:
        still += [block.scale_shift_table, block.attn2.to_out[0].weight, block.attn2.to_out[0].bias]
    for parameter in still:
        nn.init.zeros_(parameter)
    return model


def new_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=TEXT_VOCABULARY, d_model=TEXT_WIDTH, d_kv=24, d_ff=192, num_layers=3, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = UMT5EncoderModel(config)
    nn.init.normal_(model.shared.weight, std=1.0)
    return model


def normalised_rows(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """RMS norm and SiLU of rows (N, C); the autoencoder's most frequent operation."""
    wide = x.float()
    return F.silu(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12) * gamma).to(x.dtype)


class _Activation:
    """`normalised_rows` over clips kept channels-last; may be compiled, and goes on without a compiler."""

    def __init__(self) -> None:
        self.rows = normalised_rows

    def compile(self) -> None:
        self.rows = torch.compile(normalised_rows, dynamic=True)

    def __call__(self, x: torch.Tensor, norm: WanRMS_norm) -> torch.Tensor:
        last = x.permute(0, 2, 3, 4, 1)
        rows = self.rows(last.reshape(-1, x.shape[1]).contiguous(), norm.gamma.flatten())
        return rows.view(last.shape).permute(0, 4, 1, 2, 3)


ACTIVATION = _Activation()


class _WholeClipBlock(WanResidualBlock):
    """A residual block with norm and activation in one pass."""

    def forward(self, x: torch.Tensor, feat_cache: None = None, feat_idx: object = None) -> torch.Tensor:
        h = self.conv_shortcut(x)
        x = self.conv1(ACTIVATION(x, self.norm1))
        return self.conv2(ACTIVATION(x, self.norm2)) + h


class _WholeClipResample(WanResample):
    """A resampler that treats the first frame apart and all others in one pass, as the cached code does by chunks."""

    def forward(self, x: torch.Tensor, feat_cache: None = None, feat_idx: object = None) -> torch.Tensor:
        B, C, T, H, W = x.shape
        if self.mode == "upsample3d" and T > 1:
            # The cached code starts anew after the first frame, which is doubled by no convolution.
            doubled = self.time_conv(x[:, :, 1:]).unflatten(1, (2, C)).permute(0, 3, 1, 4, 5, 2)
            doubled = doubled.reshape(B, 2 * (T - 1), H, W, C).permute(0, 4, 1, 2, 3)
            x = torch.cat([x[:, :, :1], doubled], 2)
        T = x.shape[2]
        frames = self.resample(x.transpose(1, 2).reshape(B * T, C, H, W))
        x = frames.view(B, T, *frames.shape[1:]).transpose(1, 2)
        if self.mode == "downsample3d" and T > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


def train_on_whole_clips(vae: AutoencoderKLWan) -> None:
    """Let the autoencoder's modules take a clip in one pass, channels-last; weights stay as they are."""
    for module in vae.modules():
        if type(module) is WanResidualBlock:
            module.__class__ = _WholeClipBlock
        elif type(module) is WanResample:
            module.__class__ = _WholeClipResample
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4 and parameter.shape[-1] > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def encode_moments(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance (B, C, T, H, W) of the latents of clips (B, 3, frames, height, width)."""
    x = patchify(clips, _PATCH).contiguous(memory_format=torch.channels_last_3d)
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
    return mean, log_variance.clamp(-20, 5)


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips of latents, fp32."""
    z = vae.post_quant_conv(latents.contiguous(memory_format=torch.channels_last_3d))
    return unpatchify(vae.decoder(z, first_chunk=True).float(), _PATCH)


class LatentScale(nn.Module):
    """What the pipeline normalises latents by, kept with the autoencoder's checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.mean.view(1, -1, 1, 1, 1)) / self.std.view(1, -1, 1, 1, 1)

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.std.view(1, -1, 1, 1, 1) + self.mean.view(1, -1, 1, 1, 1)


def text_features(encoder: UMT5EncoderModel, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, L, TEXT_WIDTH) as the pipeline makes them: zero beyond a prompt's length."""
    mask = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
    hidden = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return hidden.float() * mask[..., None]


def padding_bias(lengths: torch.Tensor, columns: int, padded_to: torch.Tensor) -> torch.Tensor:
    """Logits (B, L) that let the few padding columns weigh as much as the many of a longer padding would."""
    padding = torch.arange(columns, device=lengths.device)[None] >= lengths[:, None]
    ratio = (padded_to - lengths).clamp_min(1) / (columns - lengths).clamp_min(1)
    return torch.where(padding, ratio.log()[:, None], 0.0)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, S, heads, dim) by angles (S, dim / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _rms(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


class BlockPass(nn.Module):
    """One transformer block with a modulation for noisy tokens and one for clean ones."""

    def __init__(self, block: WanTransformerBlock) -> None:
        super().__init__()
        self.block = block

    def _attend(self, attention: WanAttention, x: torch.Tensor, context: torch.Tensor, bias: torch.Tensor | None,
                cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        heads = attention.heads
        q = _rms(attention.to_q(x), attention.norm_q).unflatten(2, (heads, -1))
        k = _rms(attention.to_k(context), attention.norm_k).unflatten(2, (heads, -1))
        v = attention.to_v(context).unflatten(2, (heads, -1))
        if cos is not None and sin is not None:
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        q, k = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2)
        mask = None if bias is None else bias.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        return attention.to_out[0](out.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, clean: torch.Tensor, modulation: torch.Tensor, text: torch.Tensor,
                bias: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """x (B, S, D), clean (B, S, 1), modulation (B, 2, 6, D) for noisy and clean, bias (B, 1, 1, L)."""
        block = self.block
        parts = (block.scale_shift_table[None] + modulation.float()).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (torch.where(clean, p[:, 1:], p[:, :1]) for p in parts)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = x + self._attend(block.attn1, h, h, None, cos, sin).float() * gate
        norm = block.norm2
        h = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)
        S, L = x.shape[1], text.shape[1]
        wide = bias.expand(-1, block.attn2.heads, S, L)
        x = x + self._attend(block.attn2, h, text, wide, None, None).float()
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + ff_scale) + ff_shift
        return x + block.ffn(h).float() * ff_gate


class VideoDenoiser:
    """`WanTransformer3DModel` for training: modulation once per timestep, not once per token."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self.transformer = transformer
        self.blocks = [BlockPass(block) for block in transformer.blocks]

    def compile(self) -> None:
        for block in self.blocks:
            block.compile(dynamic=False)

    def __call__(self, latents: torch.Tensor, time_B: torch.Tensor, given_B: torch.Tensor, text: torch.Tensor,
                 bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Velocity of latents (B, C, T, H, W) and the middle features (B, S, D).

        `time_B` is in [0, 1]; `given_B` says whose first latent frame is clean; `text` (B, L, width), `bias` (B, L).
        """
        model, (B, _, T, H, W) = self.transformer, latents.shape
        cos, sin = model.rope(latents)
        cos, sin = cos[0, :, 0, 0::2].float(), sin[0, :, 0, 1::2].float()
        x = model.patch_embedding(latents).flatten(2).transpose(1, 2).float().contiguous()
        first = torch.arange(x.shape[1], device=x.device) < (H // 2) * (W // 2)
        clean = (given_B[:, None] & first[None])[..., None]
        embedder = model.condition_embedder
        both = torch.stack([time_B, torch.zeros_like(time_B)], 1) * 1000
        temb = embedder.time_embedder(embedder.timesteps_proj(both.flatten()))
        modulation = embedder.time_proj(F.silu(temb)).view(B, 2, 6, -1)
        context = embedder.text_embedder(text)
        middle = x
        for index, block in enumerate(self.blocks):
            x = block(x, clean, modulation, context, bias[:, None, None], cos, sin)
            if index == len(self.blocks) // 2:
                middle = x
        ends = (model.scale_shift_table[None] + temb.view(B, 2, 1, -1).float()).unbind(2)
        shift, scale = (torch.where(clean, p[:, 1:], p[:, :1]) for p in ends)
        out = model.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).float()
        out = out.view(B, T, H // 2, W // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(B, -1, T, H, W), middle
