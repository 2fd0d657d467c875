"""Reads LoRAs in a thread beside the worker's, for one asker after another, while the calls of jobs go on."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from ...core.request import LoraUse
from .adapter import Adapter
from .library import LoraLibrary

Adapters = Mapping[str, Adapter]
"""By nickname."""
Then = Callable[[Callable[[], Adapters]], None]
"""Goes on with what was asked for: its argument gives the adapters, or raises why there are none."""


@dataclass(slots=True, kw_only=True)
class _Asker:
    name: str
    uses: Sequence[LoraUse]
    then: Then | None  # None: nobody wants it any more
    in_order: bool


class LoraReader:
    """Its methods belong to the worker's thread, and whatever goes on does so there, so that nothing needs a lock.

    `load` makes one adapter, in the other thread, where `wake` is called too when there is something to `take`.
    """

    def __init__(self, library: LoraLibrary, load: Callable[[LoraUse], Adapter], wake: Callable[[], None]) -> None:
        self._library = library
        self._load = load
        self._wake = wake
        self._waiting: deque[_Asker] = deque()  # the first one's are being read
        self._known: Adapters = {}  # the first one's that need no reading
        self._done: queue.SimpleQueue[Future[Adapters]] = queue.SimpleQueue()

    def get(self, name: str, uses: Sequence[LoraUse], then: Then, *, in_order: bool = False) -> None:
        """Go on with the adapters of `uses`: now where they are loaded as their files are now, else when they are.

        Those who ask `in_order` never overtake each other. Nothing is kept where one of the adapters cannot be had.
        """
        known, missing = self._library.look_up(uses)
        if not missing and not (in_order and any(asker.in_order for asker in self._waiting)):
            self._go_on(then, known)
            return
        self._waiting.append(_Asker(name=name, uses=uses, then=then, in_order=in_order))
        if len(self._waiting) == 1:
            self._begin()

    def drop(self, name: str) -> bool:
        """Let go of what waits under a name; False where nothing does. What is being read is read to its end."""
        for asker in self._waiting:
            if asker.name == name and asker.then is not None:
                asker.then = None
                return True
        return False

    def take(self) -> None:
        """Go on with what has been read by now."""
        if not self._done.empty():
            self._end(self._done.get())

    def wait(self) -> bool:
        """Wait for what is being read and go on with it; False where nothing is."""
        if not self._waiting:
            return False
        self._end(self._done.get())
        return True

    def _begin(self) -> None:
        """Begin to read for the first of those who wait and miss anything."""
        while self._waiting:
            asker = self._waiting[0]
            # Looked up in its turn, so that two who ask for one file read it once.
            self._known, missing = self._library.look_up(asker.uses)
            if missing and asker.then is not None:
                # A daemon: a disk that does not answer must not keep the process.
                threading.Thread(target=self._read, args=(missing,), name="lora-reader", daemon=True).start()
                return
            self._waiting.popleft()
            if asker.then is not None:
                self._go_on(asker.then, self._known)

    def _read(self, missing: Sequence[LoraUse]) -> None:
        read: Future[Adapters] = Future()
        try:
            with torch.inference_mode():
                read.set_result({use.nickname: self._load(use) for use in missing})
        except BaseException as error:  # whatever it is, it is the asker's to hear
            read.set_exception(error)
        self._done.put(read)
        self._wake()

    def _end(self, read: Future[Adapters]) -> None:
        asker = self._waiting.popleft()
        if read.exception() is None:
            known = {**self._known, **read.result()}
            if asker.then is not None:
                self._go_on(asker.then, known)
            else:
                self._library.keep(known)
        elif asker.then is not None:
            asker.then(read.result)
        self._begin()

    def _go_on(self, then: Then, adapters: Adapters) -> None:
        self._library.keep(adapters)
        then(lambda: adapters)
