"""LoRAs as the host and the jobs ask for them: loads, places on the modules of a target, answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

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
from .reading import read, refused
from .serving import ModuleServing
from .sets import BASE, Entry, JobLoras, Key, ModuleLoras

logger = logging.getLogger(__name__)


class Loras:
    """All LoRAs of one worker. `versions_of_jobs` tells which adapters running jobs hold."""

    def __init__(self, served: ServedPipeline, capacity_bytes: int, versions_of_jobs: Callable[[], set[int]]) -> None:
        self._served = served
        self._versions_of_jobs = versions_of_jobs
        self._names = LayerNames(served.pipeline, served.card.lora_modules) if served.card.lora_modules else None
        self._library = LoraLibrary(capacity_bytes, self._load, self._versions_in_use)
        self._active: dict[str, Adapter] = {}
        self._uses: tuple[LoraUse, ...] = ()
        self._merged = False
        self._sets: Mapping[str, ModuleLoras] = {}
        self.modules: Mapping[str, ModuleServing] = {
            name: served.modules[name].loras for name in served.card.lora_modules
        }

    # --- jobs

    def of_job(self, uses: Sequence[LoraUse], *, exact: bool) -> JobLoras:
        """Return the set of a job. Of the active set's LoRAs it gets what was set; others are read anew where their
        file has changed. Raises RequestError."""
        if not uses:
            return JobLoras(exact=exact)
        self._check_support()
        by_nickname = dict(self._active)
        others = [use for use in uses if not self._is_active(use)]
        by_nickname |= {a.nickname: a for a in self._library.get(others, look_again=True)}
        return JobLoras(modules=self._place(uses, by_nickname), exact=exact)

    def _is_active(self, use: LoraUse) -> bool:
        active = self._active.get(use.nickname)
        return active is not None and active.path == use.path

    # --- the host

    def answer(self, message: SetLoras | PrepareLoras) -> LorasReady | LorasRefused:
        """Do what is asked and tell the state, or tell why not, with everything as it was. Raises DeviceLost."""
        try:
            self._check_support()
            if isinstance(message, SetLoras):
                self._set(message.uses, merged=message.merged)
            else:
                self._library.get(message.uses, look_again=True)
                if message.pinned:
                    self._library.pin([use.nickname for use in message.uses])
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

    def _set(self, uses: tuple[LoraUse, ...], *, merged: bool) -> None:
        adapters = self._library.get(uses, look_again=True)
        by_nickname = {adapter.nickname: adapter for adapter in adapters}
        sets = self._place(uses, by_nickname)
        before = {name: serving.weights.merged for name, serving in self.modules.items()}
        try:
            for name, serving in self.modules.items():
                serving.weights.switch(sets.get(name, BASE) if merged else BASE)
        except Exception:
            for name, serving in self.modules.items():
                serving.weights.switch(before[name])
            raise
        self._active, self._uses, self._merged, self._sets = by_nickname, uses, merged, sets
        self._library.shrink()

    def merged(self) -> dict[str, Key]:
        """Return what is in the weights of each module."""
        return {name: serving.weights.merged.key for name, serving in self.modules.items()}

    # --- adapters and their places

    def _load(self, use: LoraUse) -> Adapter:
        assert self._names is not None
        adapter = build(use.nickname, use.path, read(use.path), self._served.pipeline, self._names)
        logger.info("loaded LoRA %s: rank %d, %d MB", use.nickname, adapter.rank, adapter.size_bytes // 1_000_000)
        return adapter

    def _versions_in_use(self) -> set[int]:
        return self._versions_of_jobs() | {adapter.version for adapter in self._active.values()}

    def _place(self, uses: Sequence[LoraUse], by_nickname: Mapping[str, Adapter]) -> dict[str, ModuleLoras]:
        """Return what each module gets, in the order of merging. A target that this model lacks gets nothing."""
        entries: dict[str, list[Entry]] = {}
        for use in uses:
            adapter = by_nickname[use.nickname]
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
