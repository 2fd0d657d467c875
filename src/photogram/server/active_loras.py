"""The active set of LoRAs as a value: what was set on which target, what of it is merged, and what a job gets of it.

A *target* is a denoiser as clients name it (``transformer``, ``transformer_2``, ``critic``), a *module* a network of
the pipeline. What a LoRA has for text encoders goes with the target ``all`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from ..core.card import ModelCard
from ..core.request import LoraTarget, LoraUse

_OF_THEIR_OWN: tuple[LoraTarget, ...] = ("transformer_2", "critic")


def targets_of(card: ModelCard) -> tuple[LoraTarget, ...]:
    """Return the targets that a model has; the first is its main denoiser, whatever network that is."""
    return ("transformer", *(word for word in _OF_THEIR_OWN if word in card.lora_modules))


def covered(target: LoraTarget, targets: Sequence[LoraTarget]) -> tuple[LoraTarget, ...]:
    """Return which of a model's targets a request's target means; none where the model lacks it."""
    return tuple(targets) if target == "all" else tuple(word for word in targets if word == target)


def target_of(module: str, card: ModelCard) -> LoraTarget:
    """Return the narrowest target that reaches a module."""
    if module == card.lora_modules[0]:
        return "transformer"
    return next((word for word in _OF_THEIR_OWN if word == module), "all")


@dataclass(frozen=True, slots=True)
class PlacedLora:
    """One LoRA as it was set, and its strength on each target that it is applied to: none that the model has, where
    there is no strength."""

    use: LoraUse
    strengths: Mapping[LoraTarget, float]

    def is_uniform(self, targets: Iterable[LoraTarget]) -> bool:
        """Say whether it was set on everything and has one strength on all of `targets`."""
        return self.use.target == "all" and len({self.strengths.get(word) for word in targets}) == 1


@dataclass(frozen=True, slots=True)
class ActiveLoras:
    """What was set, in the order of merging, and the targets on which it is merged now."""

    placed: tuple[PlacedLora, ...] = ()
    merged: frozenset[LoraTarget] = frozenset()

    def with_set(self, uses: Sequence[LoraUse], targets: Sequence[LoraTarget]) -> ActiveLoras:
        """Put `uses`, merged, in place of what was set on their targets; on others it stays."""
        replaced = {word for use in uses for word in covered(use.target, targets)}
        kept = [
            PlacedLora(one.use, {word: strength for word, strength in one.strengths.items() if word not in replaced})
            for one in self.placed
        ]
        new = [PlacedLora(use, dict.fromkeys(covered(use.target, targets), use.strength)) for use in uses]
        return ActiveLoras((*(one for one in kept if one.strengths), *new), self.merged | replaced)

    def with_merged(self, words: Sequence[LoraTarget], strength: float) -> ActiveLoras:
        """Merge what is set on `words`, at this strength."""
        placed = [
            PlacedLora(one.use, {word: strength if word in words else old for word, old in one.strengths.items()})
            for one in self.placed
        ]
        return ActiveLoras(tuple(placed), self.merged | set(words))

    def without_merged(self, words: Sequence[LoraTarget]) -> ActiveLoras:
        """Take out what is merged on `words`; it stays set."""
        return replace(self, merged=self.merged - set(words))

    def uses(self, targets: Sequence[LoraTarget]) -> tuple[LoraUse, ...]:
        """Return what a job that is submitted now gets."""
        uses: list[LoraUse] = []
        for one in self.placed:
            words = [word for word in targets if word in one.strengths and word in self.merged]
            if len(words) == len(targets) and one.is_uniform(targets):
                uses.append(msgspec.structs.replace(one.use, strength=one.strengths[targets[0]]))
            else:
                changed = [(word, one.strengths[word]) for word in words]
                uses += [msgspec.structs.replace(one.use, target=word, strength=s) for word, s in changed]
        return tuple(uses)

    def on_module(self, module: str, card: ModelCard) -> list[tuple[LoraUse, bool]]:
        """Return what is set on a module, at the strength it has or would have there, and whether it is merged."""
        word, targets = target_of(module, card), targets_of(card)
        found: list[tuple[LoraUse, bool]] = []
        for one in self.placed:
            if word in one.strengths:
                use = msgspec.structs.replace(one.use, strength=one.strengths[word])
                found.append((use, word in self.merged))
            elif word == "all" and one.is_uniform(targets):
                use = msgspec.structs.replace(one.use, strength=one.strengths[targets[0]])
                found.append((use, self.merged.issuperset(targets)))
        return found
