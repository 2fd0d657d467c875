"""Tiny text and image encoders of the real transformers classes, with random weights."""

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .weights import randomise

WIDTH = 32  # hidden size of every text encoder here


def clip_config(tokenizer: PreTrainedTokenizerBase, *, layers: int = 3) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_text(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> CLIPTextModel:
    return randomise(CLIPTextModel(clip_config(tokenizer)), seed=seed)


def clip_text_projected(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> CLIPTextModelWithProjection:
    return randomise(CLIPTextModelWithProjection(clip_config(tokenizer)), seed=seed)


def clip_vision(*, seed: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return randomise(CLIPVisionModel(config), seed=seed)


def t5(vocab_size: int, *, width: int = WIDTH, seed: int) -> T5EncoderModel:
    """Of T5 v1.1 and, with 384 ids, of ByT5."""
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return randomise(T5EncoderModel(config), seed=seed)


def umt5(vocab_size: int, *, seed: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return randomise(UMT5EncoderModel(config), seed=seed)


def gemma2(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise(Gemma2Model(config), seed=seed)


def gemma3(tokenizer: PreTrainedTokenizerBase, *, layers: int, seed: int) -> Gemma3ForConditionalGeneration:
    """With its half that sees, which LTX-2's checkpoint has and its pipeline does not use."""
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
    )
    return randomise(Gemma3ForConditionalGeneration(config), seed=seed)


def qwen3_config(tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int = WIDTH) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def qwen3(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3Model:
    return randomise(Qwen3Model(qwen3_config(tokenizer, layers=3)), seed=seed)


def qwen3_causal(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3ForCausalLM:
    """With 28 layers, narrow: FLUX.2 klein reads layers 9, 18 and 27 unless told otherwise."""
    return randomise(Qwen3ForCausalLM(qwen3_config(tokenizer, layers=28, width=16)), seed=seed)


def _qwen25_text(tokenizer: PreTrainedTokenizerBase, *, layers: int) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen25_text(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen2_5_VLTextModel:
    """The language half alone, as HunyuanVideo 1.5 has it; four layers, of which it skips the last two."""
    return randomise(Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen25_text(tokenizer, layers=4))), seed=seed)


def qwen25_vl(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, gain: float = 1.0
) -> Qwen2_5_VLForConditionalGeneration:
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=_qwen25_text(tokenizer, layers=2),
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
            "patch_size": 14,
            "window_size": 112,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return randomise(Qwen2_5_VLForConditionalGeneration(config), seed=seed, gain=gain)
