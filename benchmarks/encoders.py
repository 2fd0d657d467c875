"""Text encoders of published models, by their configurations."""

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "use_cache": False,
}


def clip_l() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )


def t5_xxl() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32128, **_T5_XXL))


def umt5_xxl() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **_T5_XXL))


def qwen3_4b() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
