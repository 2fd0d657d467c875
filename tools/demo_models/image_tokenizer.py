"""The image model's tokenizer: byte-level BPE over the drawn world's captions, in Qwen2's layout."""

import json
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from . import vocabulary as words
from .edits import random_edit
from .scenes import random_prompt

VOCABULARY_SIZE = 1200
PAD_ID, END_ID = 0, 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The pipeline wraps a prompt as a chat; this model wants the words and an end mark.
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"


def caption_corpus(num: int, seed: int = 5) -> list[str]:
    """Captions and instructions, plus every single word often enough to become one token."""
    rng = Random(seed)
    texts = [random_prompt(rng)[1] for _ in range(num)] + [random_edit(rng).text for _ in range(num)]
    singles: set[str] = set(words.COMMON_WORDS) | set(words.FILLERS) | set(words.COLOURS) | set(words.SHAPES)
    for table in (words.SHAPE_SYNONYMS, words.DISTANT_SYNONYMS, words.PLACE_PHRASES, words.TIME_PHRASES):
        singles |= {word for phrases in table.values() for text in phrases for word in text.split()}
    return texts + sorted(" " + word for word in singles) * 40


def train_tokenizer(folder: Path, num_captions: int = 25_000) -> None:
    """Write a tokenizer folder that `AutoTokenizer` loads."""
    template = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = template._tokenizer.normalizer
    bpe.pre_tokenizer = template._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(caption_corpus(num_captions), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=512,
        padding_side="right",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
