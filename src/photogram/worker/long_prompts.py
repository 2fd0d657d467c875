"""Prompts of any length for encoders that read 77 tokens: encoded in chunks of 75 and joined.

Stable Diffusion's and SDXL's CLIP encoders cut everything beyond; their denoisers take any number of tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = 2  # begin and end of text, in every chunk
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def reads_in_chunks(pipeline: DiffusionPipeline) -> bool:
    """Say whether the pipeline's texts all go to CLIP encoders whose embeddings may be joined."""
    tokenizers = [part for part in pipeline.components.values() if isinstance(part, PreTrainedTokenizerBase)]
    return isinstance(pipeline, StableDiffusionMixin) and all(isinstance(part, CLIPTokenizer) for part in tokenizers)


def read_in_chunks(pipeline: DiffusionPipeline) -> None:
    """Let a job's own pipeline encode long texts chunk by chunk; texts that fit are encoded as ever."""
    encode = pipeline.encode_prompt
    signature = inspect.signature(encode)
    tokenizer: PreTrainedTokenizerBase = pipeline.tokenizer

    @functools.wraps(encode)
    def encode_chunks(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {name: bound.arguments[name] for name in TEXTS if bound.arguments.get(name) is not None}
        chunks = {name: _chunks(tokenizer, text) for name, text in given.items()}
        num_chunks = max((len(parts) for texts in chunks.values() for parts in texts), default=1)
        if num_chunks == 1:
            return encode(*args, **kwargs)
        encoded = []
        for k in range(num_chunks):
            for name, texts in chunks.items():
                part = [parts[k] if k < len(parts) else "" for parts in texts]
                bound.arguments[name] = part if isinstance(given[name], list | tuple) else part[0]
            encoded.append(encode(*bound.args, **bound.kwargs))
        return tuple(_join(parts) for parts in zip(*encoded, strict=True))

    pipeline.encode_prompt = encode_chunks


def _join(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Token embeddings (B, S, D) one after another; of pooled ones (B, D) the first, as the text begins there."""
    first = parts[0]
    if first is None or first.dim() == 2:
        return first
    return torch.cat(list(parts), dim=1)


def _chunks(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str]) -> list[list[str]]:
    """Cut each text at words into pieces that fit the encoder. A single word that does not fit is cut itself."""
    room = tokenizer.model_max_length - SPECIAL_TOKENS
    cut: list[list[str]] = []
    for whole in [text] if isinstance(text, str) else text:
        pieces: list[str] = []
        words: list[str] = []
        used = 0
        for word in whole.split():
            ids = tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids
            if used + len(ids) > room and words:
                pieces.append(" ".join(words))
                words, used = [], 0
            while len(ids) > room:
                pieces.append(tokenizer.decode(ids[:room]))
                ids = ids[room:]
                word = tokenizer.decode(ids)
            words.append(word)
            used += len(ids)
        if words or not pieces:
            pieces.append(" ".join(words))
        # One piece is the text as it was written, white space and all.
        cut.append(pieces if len(pieces) > 1 else [whole])
    return cut
