"""Small tokenizers of the classes that pipelines ask for, trained here on a few sentences.

Their vocabularies are laid out as in the published checkpoints (special tokens, bytes, merges), and the prompt
templates of Qwen-Image and HunyuanVideo 1.5 are in the corpus: these pipelines drop a fixed number of template tokens,
which is right only when each word of the template is one token.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import Regex, pre_tokenizers
from transformers import ByT5Tokenizer, CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

PROMPTS = """
a red circle a blue square a green triangle on a white background an orange fox in the snow at night
a photo of a cat sitting on a wooden table next to a glass of water and a bowl of fresh fruit
a small house by the sea under a cloudy sky with mountains in the distance painted in soft colors
an old man walking his dog through a quiet street in the rain, the lights of the shops shining on the wet stones
two birds flying over a field of yellow flowers, morning light, high detail, sharp focus, film grain
a sign that says "HELLO" above the door of a bakery, people waiting outside, a child holding a balloon
make the sky purple, remove the tree, turn the picture into a drawing, keep the face as it is
blurry, low quality, bad anatomy, watermark, text, ugly, deformed, dark, noisy, cropped, jpeg artifacts
waves roll slowly onto the beach while the camera moves from left to right and the sun goes down behind the hills
A portrait of a woman with long black hair. The castle stands on a hill; one tower is broken! Is it summer? It's cold.
"""

IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
# The runs of blanks are the pipeline's own: its source continues the sentence with a backslash.
VIDEO_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects:"
    "         1. The main content and theme of the video."
    "         2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "         3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "         4. background environment, light, style and atmosphere."
    "         5. camera angles, movements, and transitions used in the video.<|im_end|>\n<|im_start|>user\n"
)
CORPUS = (
    *PROMPTS.strip().split("\n"),
    IMAGE_TEMPLATE,
    EDIT_TEMPLATE,
    VIDEO_TEMPLATE,
    "assistant\n",
    "Picture 1: Picture 2: ",
)

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' and default_system %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip(*, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer: lower case, 77 tokens, end of text as the highest id (older configs find it by argmax).

    First encoders pad with end of text; the second ones of SDXL and SD3 with "!".
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _clip_merges()
    bytes_.insert(0, bytes_.pop(bytes_.index("!")))  # "!" is id 0, as published
    pieces = [*bytes_, *(byte + "</w>" for byte in bytes_), *("".join(pair) for pair in merges)]
    vocab = _number([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def qwen(*, default_system: bool = False) -> Qwen2Tokenizer:
    """The byte-level tokenizer of Qwen2, Qwen2.5-VL and Qwen3, with their chat template.

    `default_system` puts Qwen2's system message before a chat that has none; Qwen3's template does not.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _qwen_merges()
    vocab = _number([*bytes_, *("".join(pair) for pair in merges), *QWEN_SPECIALS])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        model_max_length=4096,
        additional_special_tokens=list(QWEN_SPECIALS[1:]),
    )
    tokenizer.chat_template = f"{{%- set default_system = {str(default_system).lower()} %}}" + CHAT_TEMPLATE
    return tokenizer


def gemma() -> GemmaTokenizer:
    """Gemma's tokenizer: blanks as "▁", unknown characters as bytes, a <bos> before the text."""
    characters = sorted({*_ascii(), "▁", "\n"} - {" "})
    merges = _merge([word.replace(" ", "▁") for word in _words(pre_tokenizers.Split(" ", "merged_with_next"))])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pieces = [*characters, *("".join(pair) for pair in merges)]
    vocab = _number(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_, *pieces])
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=4096, add_bos_token=True)


def t5(*, model_max_length: int = 512) -> T5Tokenizer:
    """A Unigram tokenizer as T5 and UMT5 use: words of the corpus, endings, single characters, no byte fallback.

    The scores are set rather than trained, so the pieces do not depend on the trainer's arithmetic.
    """
    words = sorted({word for line in CORPUS for word in line.replace("<|im_end|>", " ").split()})
    endings = sorted({word[-size:] for word in words for size in (2, 3) if len(word) > size})
    scored = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0}
    scored |= {"▁" + word: -6.0 - 0.01 * rank for rank, word in enumerate(words)}
    scored |= {ending: -9.0 for ending in endings if ending not in scored}
    scored |= {character: -11.0 for character in _ascii() if character not in scored and character != " "}
    return T5Tokenizer(vocab=list(scored.items()), extra_ids=0, model_max_length=model_max_length)


def byt5() -> ByT5Tokenizer:
    """ByT5's tokenizer, which has nothing to train: a token is a byte plus 3."""
    return ByT5Tokenizer(model_max_length=512)


@functools.cache
def _clip_merges() -> list[tuple[str, str]]:
    cut = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    words = _words(cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return _merge([word.lower() for word in words], word_end="</w>")


@functools.cache
def _qwen_merges() -> list[tuple[str, str]]:
    cut = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    return _merge(_words(cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))


def _merge(words: Iterable[str], *, word_end: str = "") -> list[tuple[str, str]]:
    """Byte-pair merges, in order, after which every one of `words` is a single token.

    Not the tokenizers library's trainer: between pairs of equal count that one picks differently from run to run.
    """
    spelled = Counter((*word[:-1], word[-1] + word_end) for word in words)
    merges = []
    while pairs := _count(spelled):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for pieces, count in spelled.items():
            if len(pieces) > 1:
                merged[_join(pieces, best)] += count
        spelled = merged
    return merges


def _count(spelled: Counter[tuple[str, ...]]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for pieces, count in spelled.items():
        for pair in pairwise(pieces):
            pairs[pair] += count
    return pairs


def _join(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def _words(*steps: pre_tokenizers.PreTokenizer) -> list[str]:
    """The corpus cut as the tokenizer will cut it, without special tokens."""
    specials = pre_tokenizers.Split(Regex(r"<\|[a-z_]+\|>"), behavior="removed")
    cut = pre_tokenizers.Sequence([specials, *steps])
    return [word for line in CORPUS for word, _ in cut.pre_tokenize_str(line)]


def _number(pieces: Iterable[str]) -> dict[str, int]:
    """Ids in order; a merge that spells an earlier piece keeps the earlier id."""
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _ascii() -> list[str]:
    return [chr(code) for code in range(32, 127)]
