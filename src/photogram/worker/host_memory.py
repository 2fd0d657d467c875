"""Large pieces of host memory, which copies to and from a GPU go through.

Knows bytes and where tensors lie in them; whose they are is `residency.py`'s and `lora/weights.py`'s affair.
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes; what vectorised kernels want of a tensor's address


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in a flat piece of bytes, and how."""

    offset: int
    num_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of a flat copy (bytes, on any device)."""
        piece = flat[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return piece.as_strided(self.shape, self.stride, piece.storage_offset())


def lay_out(tensors: Iterable[torch.Tensor]) -> tuple[list[Place], int]:
    """Return a place for each tensor, one after the other, and the bytes that they take together.

    Dense tensors keep the order of their elements (channels last), so that copying one is copying its bytes.
    """
    places: list[Place] = []
    end = 0
    for tensor in tensors:
        is_dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
        stride = tensor.stride() if is_dense else torch.empty(tensor.shape, device="meta").stride()
        places.append(Place(end, tensor.nbytes, tensor.shape, stride, tensor.dtype))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


class HostMemory:
    """One piece of host memory; `flat` are its bytes, zero at first. It is given back with the last view of them."""

    def __init__(self, num_bytes: int) -> None:
        self._pages = _Pages(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            try:
                # Pinning walks the pages one by one, and of huge ones there are 512 times fewer.
                self._pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                logger.debug("this kernel has no huge pages")
        self.flat = torch.frombuffer(self._pages, dtype=torch.uint8)[:num_bytes]

    def pin(self, *, touch: bool = False) -> bool:
        """Pin the memory where it lies, in one go; False, with a warning, where the system refuses.

        torch's own pinned allocator would round it up to a power of two. `touch` memory that was not written yet:
        all threads then fill it with zeros, which the driver would do with one.
        """
        if touch:
            self.flat.zero_()
        cudart = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(self.flat.data_ptr(), self.flat.numel(), 0))
        if code != 0:
            logger.warning("%.1f GB of host memory could not be pinned (code %d); copies will be slower",
                           self.flat.numel() / 1e9, code)  # fmt: skip
            return False
        address = self.flat.data_ptr()
        self._pages.before_end = lambda: cudart.cudaHostUnregister(address)
        return True


class _Pages(mmap.mmap):
    """Memory that does something before it is unmapped: its addresses are given to others then."""

    before_end: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.before_end is not None:
            self.before_end()
