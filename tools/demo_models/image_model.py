"""The image model's parts: sizes, fresh weights, and forward passes fit for training.

B batch, S tokens, D width, C channels, H/W height and width (of latents: in packed 16-pixel tokens).
The training forwards compute what diffusers' and transformers' own forwards compute, on the same modules.
"""

from functools import lru_cache

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from .feed import MAX_TOKENS
from .image_tokenizer import END_ID, PAD_ID, VOCABULARY_SIZE

LATENT_CHANNELS = 8
TOKEN_CHANNELS = 4 * LATENT_CHANNELS
TOKEN_PIXELS = 16
TEXT_WIDTH = 64
WIDTH = 192
# The pipeline reads hidden states 9, 18 and 27. Only the three layers before each are trained: the others
# stay identities, which costs their few bytes and makes training three times as fast.
TEXT_LAYERS = 27
TRAINED_TEXT_LAYERS = (6, 7, 8, 15, 16, 17, 24, 25, 26)
SEMANTIC_BLOCK = 5  # the single-stream block whose output the training-only semantic head reads


def new_autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(24, 40, 56, 80),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
    )


def new_transformer() -> Flux2Transformer2DModel:
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=TOKEN_CHANNELS,
        num_layers=1,
        num_single_layers=9,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=256,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 12, 12, 4),
        rope_theta=200,
        guidance_embeds=False,
    )
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name or "norm_out" in name:
            nn.init.zeros_(parameter)
    return model


def new_text_encoder() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=80,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model = Qwen3ForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    for index, layer in enumerate(model.model.layers):
        live = index in TRAINED_TEXT_LAYERS
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            nn.init.normal_(matrix, std=0.02 if live else 0.0)
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            nn.init.normal_(linear.weight, std=0.1 if live else 0.0)
        if not live:
            layer.requires_grad_(False)
    return model


class _TextLayer(nn.Module):
    """One Qwen3 layer with the mask and rotations given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_BSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        attention = self.layer.self_attn
        B, S, _ = hidden_BSD.shape
        x = self.layer.input_layernorm(hidden_BSD)
        head = attention.head_dim
        q = attention.q_norm(attention.q_proj(x).view(B, S, -1, head)).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(x).view(B, S, -1, head)).transpose(1, 2)
        v = attention.v_proj(x).view(B, S, -1, head).transpose(1, 2)
        q, k = (_rotate(one, cos, sin).to(v.dtype) for one in (q, k))
        repeat = q.shape[1] // k.shape[1]
        k, v = (one[:, :, : mask.shape[-1]].repeat_interleave(repeat, 1) for one in (k, v))
        # Written out: the fused attention's mask would make the compiler specialise on every batch size.
        scores = (q @ k.transpose(-1, -2)).float() * head**-0.5
        weights = scores.masked_fill(~mask, -1e9).softmax(-1).to(v.dtype)
        out = (weights @ v).transpose(1, 2).reshape(B, S, -1)
        hidden_BSD = hidden_BSD + attention.o_proj(out)
        return hidden_BSD + self.layer.mlp(self.layer.post_attention_layernorm(hidden_BSD))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class TextFeatures(nn.Module):
    """What the pipeline's prompt encoding gives, skipping the identity layers."""

    def __init__(self, encoder: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = nn.ModuleList(_TextLayer(encoder.model.layers[i]) for i in TRAINED_TEXT_LAYERS)

    def forward(self, ids_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Features (B, S, 3 * TEXT_WIDTH) of right-padded token ids."""
        model = self.encoder.model
        # Not the embedding's own lookup, whose gradient waits for the device: CUDA graphs may not.
        hidden = model.embed_tokens.weight.index_select(0, ids_BS.flatten()).view(*ids_BS.shape, -1)
        position = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        cos, sin = model.rotary_emb(hidden.float(), position[None])
        keys = position[:MAX_TOKENS]  # no prompt is longer, and padding is never looked at
        mask = (keys[None, :] <= position[:, None])[None] & (keys[None, None] < lengths_B[:, None, None])
        taps = []
        for index, layer in zip(TRAINED_TEXT_LAYERS, self.layers, strict=True):
            hidden = layer(hidden, cos[:, None], sin[:, None], mask[:, None])
            if index + 1 in (9, 18):
                taps.append(hidden)
        taps.append(model.norm(hidden))
        return torch.cat([tap.float() for tap in taps], -1)


class Denoiser(nn.Module):
    """The transformer's forward pass, with a look at its middle."""

    def __init__(self, transformer: Flux2Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, tokens_BSC: torch.Tensor, text_BSD: torch.Tensor, time_B: torch.Tensor, size: tuple[int, int],
        reference_size: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Velocity (B, S, C) and middle features (B, S, D) of the picture's own tokens.

        `tokens_BSC` holds the H*W noisy tokens and behind them those of the reference picture, if any;
        `time_B` is in [0, 1], 1 being noise.
        """
        model = self.transformer
        num_text, num_own = text_BSD.shape[1], size[0] * size[1]
        temb = model.time_guidance_embed(time_B.to(tokens_BSC.dtype) * 1000, None)
        image_mod, text_mod = model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb)
        single_mod = model.single_stream_modulation(temb)
        hidden, text = model.x_embedder(tokens_BSC), model.context_embedder(text_BSD)
        rotary = self._rotary(num_text, size, reference_size, tokens_BSC.device)
        for block in model.transformer_blocks:
            text, hidden = block(
                hidden_states=hidden, encoder_hidden_states=text, temb_mod_img=image_mod, temb_mod_txt=text_mod,
                image_rotary_emb=rotary,
            )  # fmt: skip
        hidden = torch.cat([text, hidden], dim=1)
        middle = hidden
        for index, block in enumerate(model.single_transformer_blocks):
            hidden = block(
                hidden_states=hidden, encoder_hidden_states=None, temb_mod=single_mod, image_rotary_emb=rotary
            )
            if index == SEMANTIC_BLOCK:
                middle = hidden
        own = slice(num_text, num_text + num_own)
        return model.proj_out(model.norm_out(hidden[:, own], temb)), middle[:, own]

    @lru_cache(maxsize=128)  # noqa: B019 - lives as long as the process
    def _rotary(
        self, num_text: int, size: tuple[int, int], reference_size: tuple[int, int] | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [
            Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, num_text, 1))[0],
            Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, *size))[0],
        ]
        if reference_size is not None:
            ids.append(Flux2KleinPipeline._prepare_image_ids([torch.zeros(1, 1, *reference_size)])[0])
        with torch.no_grad():
            cos, sin = self.transformer.pos_embed(torch.cat(ids).to(device))
        return cos.float(), sin.float()


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Token grid (B, 4C, H/2, W/2) of autoencoder latents (B, C, H, W)."""
    return Flux2KleinPipeline._patchify_latents(latents)


def unpack_latents(tokens: torch.Tensor) -> torch.Tensor:
    return Flux2KleinPipeline._unpatchify_latents(tokens)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLFlux2, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised token grid (B, 32, H/16, W/16) of pictures (B, 3, H, W) in [-1, 1]."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    grid = pack_latents(vae._encode(pixels).float().chunk(2, 1)[0].contiguous())
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return (grid - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()


@torch.no_grad()
def decode_pictures(vae: AutoencoderKLFlux2, grid: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of a normalised token grid."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    grid = grid * (variance.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt() + mean.view(1, -1, 1, 1)
    latents = unpack_latents(grid).contiguous(memory_format=torch.channels_last)
    return vae._decode(latents, return_dict=False)[0].float().clamp(-1, 1)
