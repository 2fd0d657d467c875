"""The LoRAs a job has: of each module, which changes in which order at what strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .adapter import Adapter
from .changes import Change, Changes

Key = tuple[tuple[int, str, float], ...]
"""Equal for equal weights: (version, part, strength) of each LoRA that changes any, in the order of merging; () is
the base."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One LoRA on one module. `part` is the module whose changes are taken: ``transformer_2`` may take another's."""

    adapter: Adapter
    part: str
    strength: float

    @property
    def changes(self) -> Changes:
        return self.adapter.changes[self.part]

    @cached_property
    def applied(self) -> Changes:
        """The changes that this strength makes: at zero only such as do not vanish with it."""
        if self.strength != 0:
            return self.changes
        return {name: change for name, change in self.changes.items() if not change.does_nothing_at_zero}


@dataclass(frozen=True, eq=False)
class ModuleLoras:
    """What the weights of one module are to be: the base and these, in the order of merging."""

    entries: tuple[Entry, ...] = ()

    @cached_property
    def key(self) -> Key:
        return tuple((entry.adapter.version, entry.part, entry.strength) for entry in self.entries if entry.applied)

    @cached_property
    def changes(self) -> Mapping[str, tuple[tuple[Change, float], ...]]:
        """The changes of each parameter with their strengths."""
        found: dict[str, list[tuple[Change, float]]] = {}
        for entry in self.entries:
            for name, change in entry.applied.items():
                found.setdefault(name, []).append((change, entry.strength))
        return {name: tuple(changes) for name, changes in found.items()}

    @cached_property
    def layers(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[0] for name in self.changes)


BASE = ModuleLoras()


@dataclass(frozen=True, kw_only=True, eq=False)
class JobLoras:
    """The set a job was submitted under, by module. `exact`: always merged, so that the bytes never depend on what
    else runs."""

    modules: Mapping[str, ModuleLoras] = field(default_factory=dict)
    exact: bool = False

    def of(self, module: str) -> ModuleLoras:
        return self.modules.get(module, BASE)

    @property
    def versions(self) -> set[int]:
        return {entry.adapter.version for loras in self.modules.values() for entry in loras.entries}


Segments = Sequence[tuple[ModuleLoras, int]]
"""The LoRAs of a call's rows: so many rows of each job, one job after another."""
