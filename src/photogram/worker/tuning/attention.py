"""Which of torch's attention kernels are tried first.

One order around a whole call reaches every network, whatever attention classes it is made of: text encoders, UNets and
VAEs as well as transformers. A kernel that cannot do a call (fp32, a mask, a head width) leaves it to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, list_flash_attention_impls, sdpa_kernel

from ...core.errors import ConfigError
from ...core.worker_config import AttentionBackend

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_EFFICIENT, _MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH

# The mathematical form can do every call, so that no order can fail.
_ORDERS: Mapping[str, Sequence[SDPBackend]] = {
    "cudnn": (_CUDNN, _FLASH, _EFFICIENT, _MATH),
    "flash": (_FLASH, _CUDNN, _EFFICIENT, _MATH),
    "efficient": (_EFFICIENT, _FLASH, _CUDNN, _MATH),
    "math": (_MATH,),
}
_HOPPER = (9, 0)


class Attention:
    """The order of attention kernels around calls on one device; `name` is what was chosen, "torch" for its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._order = list(_ORDERS["flash" if name in ("fa3", "fa4") else name]) if name != "torch" else []

    def around_calls(self) -> AbstractContextManager[object]:
        """Return a context within which calls use this order."""
        return sdpa_kernel(self._order, set_priority=True) if self._order else nullcontext()


def choose_attention(wanted: AttentionBackend, device: torch.device) -> Attention:
    """Return the order to use on the device: `auto` is cuDNN's kernels first on Hopper and later, torch's own order
    before. On a CPU there is one kernel and nothing to choose.

    Raises ConfigError for kernels that are not installed.
    """
    if device.type != "cuda":
        return Attention("torch")
    if wanted == "auto":
        return Attention("cudnn" if torch.cuda.get_device_capability(device) >= _HOPPER else "torch")
    if wanted in ("fa3", "fa4"):
        _take_over_flash(wanted)
    return Attention(wanted)


def _take_over_flash(name: str) -> None:
    """Let torch's flash attention be that of an installed package."""
    known = list_flash_attention_impls()
    try:
        activate_flash_attention_impl(name.upper())
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--attention-backend {name}: not to be had here ({error}); torch knows of {', '.join(known) or 'none'}."
        ) from error
