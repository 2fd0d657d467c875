"""Counts a prompt's tokens, and says when it is longer than the model reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from .long_prompts import reads_in_chunks


def count_tokens(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return the prompt's tokens by the tokenizer that reads furthest, and a warning where even that one cuts it."""
    prompt = arguments.get("prompt")
    tokenizers = {name: part for name, part in pipeline.components.items() if isinstance(part, PreTrainedTokenizerBase)}
    if not prompt or not tokenizers:
        return 0, []
    reach = {name: _limit(pipeline, tokenizer, arguments) for name, tokenizer in tokenizers.items()}
    furthest = max(reach, key=lambda name: reach[name])
    count = len(tokenizers[furthest](prompt, truncation=False, verbose=False).input_ids)
    if count <= reach[furthest] or reads_in_chunks(pipeline):
        return count, []
    return count, [f"The prompt has {count} tokens; this model reads the first {reach[furthest]} of them."]


def _limit(pipeline: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> int:
    """Tokens that the pipeline lets this tokenizer pass: CLIP's are bound by its positions, the others by a setting."""
    if "CLIP" in type(tokenizer).__name__:
        return tokenizer.model_max_length
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if parameter is None:
        return tokenizer.model_max_length
    return int(arguments.get("max_sequence_length", parameter.default))
