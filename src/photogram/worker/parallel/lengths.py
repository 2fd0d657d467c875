"""How many tokens each rank holds, learned once for each shape of call.

A sequence that does not divide evenly is split unevenly, and a rank sees its own share only. The first call of a
shape asks the others at every place where it matters; later calls of that shape replay the answers in order, because
asking costs a round trip a layer. All ranks see the same calls, so all of them ask or none does.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist

from .mesh import Mesh


class Lengths:
    """The answers of one call after another; `begin` opens a call, `of` is asked in the order of its layers."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._books: dict[Hashable, list[tuple[int, ...]]] = {}
        self._book: list[tuple[int, ...]] = []
        self._position = 0
        self._is_complete = False

    def begin(self, shape: Hashable) -> None:
        """Open a call; `shape` must be the same on every rank and determine the shape of all that follows."""
        self._is_complete = shape in self._books
        self._book = self._books.get(shape, [])
        self._position = 0
        self._shape = shape

    def end(self) -> None:
        """Close a call that ran to its end: its answers hold for every call of its shape."""
        self._books[self._shape] = self._book

    def fork(self, branch: Hashable) -> None:
        """Go on in another book: from here the call's way depends on `branch`, which is the same on every rank."""
        self.end()
        self.begin((self._shape, branch))

    def of(self, own: int) -> tuple[int, ...]:
        """Return the lengths of all ranks' shares, by rank, where this rank's is `own`."""
        if not self._is_complete:
            every = [torch.empty(1, dtype=torch.int64) for _ in range(self._mesh.size)]
            dist.all_gather(every, torch.tensor([own]), group=self._mesh.control)
            self._book.append(tuple(int(one) for one in every))
        answer = self._book[self._position]
        self._position += 1
        if answer[self._mesh.rank] != own:
            raise RuntimeError(f"a share of {own} tokens where calls of this shape had {answer[self._mesh.rank]}")
        return answer

    def gather(self, share: torch.Tensor, dim: int) -> torch.Tensor:
        """Return all ranks' shares of a tensor joined along `dim`, on every rank."""
        lengths = self.of(share.shape[dim])
        longest = max(lengths)
        share = share.transpose(0, dim)
        if share.shape[0] < longest:  # gloo gathers equal shapes only
            share = torch.cat((share, share.new_zeros(longest - share.shape[0], *share.shape[1:])))
        together = share.new_empty(len(lengths) * longest, *share.shape[1:])
        dist.all_gather_into_tensor(together, share.contiguous(), group=self._mesh.everyone)
        if min(lengths) < longest:
            parts = zip(together.split(longest), lengths, strict=True)
            together = torch.cat([part[:length] for part, length in parts])
        return together.transpose(0, dim)
