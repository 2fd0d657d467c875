"""Encodes a prompt without the padding behind it, in a few lengths only.

Pipelines of Wan pad every prompt to 512 tokens, mask the padding and throw away what becomes of it; most prompts have
some dozens. As no token sees a masked one, and positions count by distance, the others come out the same. Lengths are
multiples of one number, so that kernels are chosen, and graphs recorded, for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

LENGTHS = 64

# Encoders of which every pipeline throws away what is masked.
_WITH_PADDING_UNREAD = frozenset({"UMT5EncoderModel"})


def is_padding_unread(network: torch.nn.Module) -> bool:
    return type(network).__name__ in _WITH_PADDING_UNREAD


def without_padding(
    run: Callable[[tuple[Any, ...], dict[str, Any]], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return `run(args, kwargs)` of an encoder, with zeros where its arguments' mask has padding at the end.

    Calls of another form than token ids and a mask of them, or that ask for more than the last hidden state, are run as
    they are.
    """
    names = ("input_ids", "attention_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, mask = (given.pop(name, None) for name in names)
    is_known = len(args) <= len(names) and given.keys() <= {"return_dict"}
    if (
        not is_known
        or not isinstance(mask, torch.Tensor)
        or not isinstance(ids, torch.Tensor)
        or ids.shape != mask.shape
    ):
        return run(args, dict(kwargs))
    seen = mask.cpu().bool()
    longest = int(seen.sum(1).max())
    length = min(ids.shape[1], -(-longest // LENGTHS) * LENGTHS)
    if length in (0, ids.shape[1]) or bool(seen[:, longest:].any()):
        return run(args, dict(kwargs))
    result = run((), {"input_ids": ids[:, :length], "attention_mask": mask[:, :length], **given})
    is_tuple = isinstance(result, tuple)
    hidden = F.pad(result[0], (0, 0, 0, ids.shape[1] - length))
    return (hidden,) if is_tuple else type(result)(last_hidden_state=hidden)
