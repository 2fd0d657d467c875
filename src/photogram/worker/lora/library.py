"""Loaded LoRAs, the least recently used forgotten first, bounded in bytes; those in use are kept beyond the bound."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from ...core.lora import LoadedLora
from ...core.request import LoraUse
from .adapter import Adapter
from .reading import stamp_of

logger = logging.getLogger(__name__)


class LoraLibrary:
    """Adapters by nickname. `in_use` tells the versions that jobs hold."""

    def __init__(self, capacity_bytes: int, in_use: Callable[[], Collection[int]]) -> None:
        self._capacity_bytes = capacity_bytes
        self._in_use = in_use
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._pinned: set[str] = set()

    def look_up(self, uses: Sequence[LoraUse]) -> tuple[dict[str, Adapter], list[LoraUse]]:
        """Return the adapters that are loaded, by nickname, and the uses of files that are to be read.

        A file that is no longer the one that was read is to be read anew.
        """
        known: dict[str, Adapter] = {}
        missing: dict[str, LoraUse] = {}
        for use in uses:
            adapter = self._adapters.get(use.nickname)
            if adapter is None or adapter.path != use.path or _is_outdated(adapter):
                missing[use.nickname] = use
            else:
                known[use.nickname] = adapter
        return known, list(missing.values())

    def keep(self, adapters: Mapping[str, Adapter]) -> None:
        """Have these as the latest of their nicknames and the last used; forget others for them."""
        for nickname, adapter in adapters.items():
            self._adapters[nickname] = adapter
            self._adapters.move_to_end(nickname)
        self.shrink(keep=adapters)

    def pin(self, nicknames: Collection[str]) -> None:
        """Keep these whatever else is loaded."""
        self._pinned |= set(nicknames)

    def shrink(self, keep: Collection[str] = ()) -> None:
        """Forget the least recently used adapters beyond the bound that nobody uses."""
        total = sum(adapter.size_bytes for adapter in self._adapters.values())
        used = self._in_use()
        for nickname, adapter in list(self._adapters.items()):
            if total <= self._capacity_bytes:
                return
            if nickname not in self._pinned and nickname not in keep and adapter.version not in used:
                del self._adapters[nickname]
                total -= adapter.size_bytes
                logger.info("forgot LoRA %s", nickname)

    def loaded(self) -> tuple[LoadedLora, ...]:
        return tuple(
            LoadedLora(
                nickname=adapter.nickname,
                path=adapter.path,
                size_bytes=adapter.size_bytes,
                rank=adapter.rank,
                num_layers=adapter.num_layers(),
            )
            for adapter in self._adapters.values()
        )


def _is_outdated(adapter: Adapter) -> bool:
    """A file that is gone or cannot be read leaves the adapter as it was read."""
    now = stamp_of(adapter.path)
    return now is not None and now != adapter.stamp
