"""LoRAs as the host and the jobs ask for them: had from the reader, placed on the modules of a target, answered for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ...core.errors import RequestError, ServiceError
from ...core.lora import AppliedLora, LoraState
from ...core.messages import LorasReady, LorasRefused, PrepareLoras, SetLoras
from ...core.request import LoraTarget, LoraUse
from ..loading import ServedPipeline
from ..memory import DeviceLost, device_error
from .adapter import Adapter, build, count_layers
from .library import LoraLibrary
from .names import LayerNames
from .reader import Adapters, LoraReader
from .reading import read, refused
from .serving import ModuleServing
from .sets import BASE, Entry, JobLoras, Key, ModuleLoras

logger = logging.getLogger(__name__)

GetLoras = Callable[[], JobLoras]
"""Gives a job's set, or raises why there is none."""


class Loras:
    """All LoRAs of one worker. `versions_of_jobs` tells which adapters running jobs hold.

    Files are read in a thread of their own, in which `wake` is called when there is something to `take`.
    """

    def __init__(
        self,
        served: ServedPipeline,
        versions_of_jobs: Callable[[], set[int]],
        wake: Callable[[], None],
        *,
        cache_bytes: int,
        file_bytes: int,
    ) -> None:
        self._served = served
        self._file_bytes = file_bytes
        self._versions_of_jobs = versions_of_jobs
        self._names = LayerNames(served.pipeline, served.card.lora_modules) if served.card.lora_modules else None
        self._library = LoraLibrary(cache_bytes, self._versions_in_use)
        self._reader = LoraReader(self._library, self._load, wake)
        self._active: Adapters = {}
        self._merged = False
        self._sets: Mapping[str, ModuleLoras] = {}
        self.modules: Mapping[str, ModuleServing] = {
            name: served.modules[name].loras for name in served.card.lora_modules
        }

    # --- what waits for files

    def take(self) -> None:
        """Go on with what has been read by now."""
        self._reader.take()

    def wait(self) -> bool:
        """Wait for what is being read and go on with it; False where nothing is."""
        return self._reader.wait()

    def drop(self, job_id: str) -> bool:
        """Let go of a job that waits for its LoRAs; False for one that does not."""
        return self._reader.drop(job_id)

    # --- jobs

    def of_job(self, job_id: str, uses: Sequence[LoraUse], *, exact: bool, then: Callable[[GetLoras], None]) -> None:
        """Go on with the set of a job: now where nothing is to be read for it.

        Of the active set's LoRAs it gets what was set; others are read anew where their file has changed. What `then`
        is given raises RequestError where the set cannot be had.
        """
        active = {use.nickname: self._active[use.nickname] for use in uses if self._is_active(use)}

        def place(others: Callable[[], Adapters]) -> JobLoras:
            return JobLoras(modules=self._place(uses, {**active, **others()}), exact=exact)

        others = [use for use in uses if use.nickname not in active]
        self._reader.get(job_id, others, lambda found: then(partial(place, found)))

    def _is_active(self, use: LoraUse) -> bool:
        active = self._active.get(use.nickname)
        return active is not None and active.path == use.path

    # --- the host

    def answer(self, message: SetLoras | PrepareLoras, then: Callable[[LorasReady | LorasRefused], None]) -> None:
        """Do what is asked, and go on with the state, or with why not and everything as it was.

        Messages are answered in the order in which they came. Raises DeviceLost.
        """
        self._reader.get(
            message.request_id, message.uses, lambda found: then(self._answer(message, found)), in_order=True
        )

    def _answer(self, message: SetLoras | PrepareLoras, found: Callable[[], Adapters]) -> LorasReady | LorasRefused:
        try:
            self._check_support()
            adapters = found()
            if isinstance(message, SetLoras):
                self._set(message.uses, adapters, merged=message.merged)
            elif message.pinned:
                self._library.pin(list(adapters))
        except Exception as error:
            error = device_error(error, self._served.device)
            if isinstance(error, DeviceLost):
                raise error
            if isinstance(error, ServiceError):
                return LorasRefused(message.request_id, error.code, error.message, error.param)
            logger.exception("LoRAs could not be set")
            text = f"The LoRAs could not be loaded: {type(error).__name__}: {error}"
            return LorasRefused(message.request_id, "invalid_lora", text)
        return LorasReady(message.request_id, self.state())

    def state(self) -> LoraState:
        """Return what is loaded, and where the active set is applied."""
        active = {
            module: tuple(
                AppliedLora(
                    nickname=entry.adapter.nickname,
                    path=entry.adapter.path,
                    strength=entry.strength,
                    merged=self._merged,
                    num_lora_layers_with_weights=count_layers(entry.changes),
                )
                for entry in loras.entries
            )
            for module, loras in self._sets.items()
        }
        return LoraState(active=active, loaded=self._library.loaded())

    def _check_support(self) -> None:
        if not self._served.card.lora_modules:
            raise RequestError("LoRA is not enabled for this pipeline.", code="lora_not_supported")

    def _set(self, uses: tuple[LoraUse, ...], adapters: Adapters, *, merged: bool) -> None:
        sets = self._place(uses, adapters)
        before = {name: serving.weights.merged for name, serving in self.modules.items()}
        try:
            for name in self.modules:
                self._switch(name, sets.get(name, BASE) if merged else BASE)
        except Exception:
            for name in self.modules:
                self._switch(name, before[name])
            raise
        self._active, self._merged, self._sets = adapters, merged, sets
        self._library.shrink()

    def _switch(self, name: str, loras: ModuleLoras) -> None:
        with self._served.modules[name].in_use:  # a text encoder may be at work beside the loop
            self.modules[name].weights.switch(loras)

    @property
    def num_switches(self) -> int:
        """How often the weights of a module were changed."""
        return sum(serving.weights.num_switches for serving in self.modules.values())

    def merged(self) -> dict[str, Key]:
        """Return what is in the weights of each module."""
        return {name: serving.weights.merged.key for name, serving in self.modules.items()}

    # --- adapters and their places

    def _load(self, use: LoraUse) -> Adapter:
        """Read and convert a file, in the reader's thread: of the model it looks at names, types and shapes only."""
        self._check_support()
        assert self._names is not None
        file = read(use.path, self._file_bytes)
        adapter = build(use.nickname, use.path, file, self._served.pipeline, self._names)
        logger.info("loaded LoRA %s: rank %d, %d MB", use.nickname, adapter.rank, adapter.size_bytes // 1_000_000)
        return adapter

    def _versions_in_use(self) -> set[int]:
        return self._versions_of_jobs() | {adapter.version for adapter in self._active.values()}

    def _place(self, uses: Sequence[LoraUse], adapters: Adapters) -> dict[str, ModuleLoras]:
        """Return what each module gets, in the order of merging. A target that this model lacks gets nothing."""
        entries: dict[str, list[Entry]] = {}
        for use in uses:
            adapter = adapters[use.nickname]
            wanted = self._modules_of(use.target)
            parts = {name: part for name in wanted if (part := self._part_for(name, adapter)) is not None}
            if wanted and not parts:
                having = ", ".join(sorted(adapter.changes))
                raise refused(f"LoRA '{use.path}': it changes {having} and nothing of the target '{use.target}'.")
            for name, part in parts.items():
                entries.setdefault(name, []).append(Entry(adapter=adapter, part=part, strength=use.strength))
        return {name: ModuleLoras(tuple(entries[name])) for name in self.modules if name in entries}

    def _modules_of(self, target: LoraTarget) -> list[str]:
        names = list(self.modules)
        match target:
            case "all":
                return names
            case "transformer":
                return names[:1]
        return [name for name in names if name == target]

    def _part_for(self, module: str, adapter: Adapter) -> str | None:
        """Which of a LoRA's parts a module takes: its own, or as a second denoiser that of the first."""
        if module in adapter.changes:
            return module
        main = next(iter(self.modules))
        modules = self._served.modules
        if not modules[module].is_denoiser or main not in adapter.changes:
            return None
        parameters: Mapping[str, torch.nn.Parameter] = dict(modules[module].module.named_parameters())
        fits = all(
            name in parameters and change.fits(parameters[name]) for name, change in adapter.changes[main].items()
        )
        return main if fits else None
