"""Brings the tensors of safetensors files to where they are used, with all threads and no copy beside the last one.

Knows bytes, files and devices; which tensor belongs where in a network is `networks.py`'s affair. To a GPU a tensor
goes from the page cache through small pieces of pinned memory; on a CPU it is read where it stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from types import EllipsisType

import torch

from ..models.tensor_heads import STORED_BYTES, Stored, read_head
from .host_memory import HostMemory

PIECE_BYTES = 1 << 24
MOST_THREADS = 16  # a dozen threads copy from the page cache as fast as a bus of PCIe 5 takes it

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class UnusualFile(Exception):
    """A file that is not read here, and why."""


class StoredTensor:
    """A tensor that is still in its file. `tensor[...]` reads it, which is all that transformers asks of one."""

    def __init__(self, reader: Reader, descriptor: int, stored: Stored) -> None:
        self._reader = reader
        self._descriptor = descriptor
        self._stored = stored
        self.dtype = DTYPES[stored.dtype]
        self.shape = torch.Size(stored.shape)

    def __getitem__(self, everything: EllipsisType) -> torch.Tensor:
        """Return the tensor on the reader's device, in the precision of the file."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self._reader.device)
        if self._stored.num_bytes:
            self._reader.read(self._descriptor, self._stored.begin, tensor.reshape(-1).view(torch.uint8))
        return tensor


class Reader:
    """Threads that read pieces of files into the memory of one device, and the files they have open.

    To be used as a context: its end closes the files, so that what was not read by then cannot be.
    """

    def __init__(self, device: torch.device, *, num_threads: int | None = None) -> None:
        self.device = device
        self._num_threads = num_threads or min(MOST_THREADS, _cores())
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="read-weights")
        self._pinned: SimpleQueue[torch.Tensor] = SimpleQueue()  # a piece for each thread
        self._files = ExitStack()

    def __enter__(self) -> Reader:
        if self.device.type == "cuda":
            memory = HostMemory(self._num_threads * PIECE_BYTES)
            with torch.cuda.device(self.device):  # pinning wakes the current device, which may be another rank's
                memory.pin(touch=True)
            for piece in memory.flat.split(PIECE_BYTES):
                self._pinned.put(piece)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._files.close()

    def open(self, files: Iterable[Path]) -> dict[str, StoredTensor]:
        """Return the tensors of these files by name.

        Raises UnusualFile for dtypes and layouts that are not read here, ConfigError for what is no safetensors file.
        """
        found: dict[str, StoredTensor] = {}
        for file in files:
            head = read_head(file)
            size = file.stat().st_size
            for name, stored in head.items():
                if stored.dtype not in DTYPES:
                    raise UnusualFile(f"'{name}' is stored as {stored.dtype}")
                if stored.num_bytes != stored.count * STORED_BYTES[stored.dtype]:
                    raise UnusualFile(f"'{name}' does not take the bytes of its shape")
                if stored.begin + stored.num_bytes > size:
                    raise UnusualFile(f"'{file.name}' ends within '{name}'")
            descriptor = os.open(file, os.O_RDONLY)
            self._files.callback(os.close, descriptor)
            found |= {name: StoredTensor(self, descriptor, stored) for name, stored in head.items()}
        return found

    def read(self, descriptor: int, begin: int, into: torch.Tensor) -> None:
        """Fill a tensor of bytes on the device from a file; it is there on return, for every stream."""
        pieces = into.split(PIECE_BYTES)
        read = self._through_pinned if self.device.type == "cuda" else _read_into
        if len(pieces) == 1:  # the caller's thread is as good as another
            read(descriptor, begin, into)
            return
        offsets = range(begin, begin + len(into), PIECE_BYTES)
        for _ in self._threads.map(lambda offset, piece: read(descriptor, offset, piece), offsets, pieces):
            pass

    def _through_pinned(self, descriptor: int, begin: int, into: torch.Tensor) -> None:
        pinned = self._pinned.get()
        try:
            piece = pinned[: len(into)]
            _read_into(descriptor, begin, piece)
            # All on one stream: what used this memory before is done first, and the bus has one way to the device.
            into.copy_(piece, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
            copied.synchronize()
        finally:
            self._pinned.put(pinned)


def _read_into(descriptor: int, begin: int, into: torch.Tensor) -> None:
    """Fill a tensor of bytes in host memory from a file. Raises OSError where the file ends before."""
    left = memoryview(into.numpy())
    while left:
        count = os.preadv(descriptor, [left], begin)
        if count == 0:
            raise OSError("the file has become shorter while it was read")
        left, begin = left[count:], begin + count


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
