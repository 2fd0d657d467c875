"""How one module's calls get the LoRAs they are to see: merged where all rows want the same, beside the base weights
where they do not, and never those of another job."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .mixing import Mixer
from .sets import BASE, Key, ModuleLoras, Segments
from .weights import ModuleWeights

logger = logging.getLogger(__name__)

# What applying LoRAs beside the weights adds to a pass: two thin products and a hook for each layer.
UNMERGED_SHARE = 0.08
_MAX_KNOWN = 1024


class ModuleServing:
    """The LoRAs of one module: its weights, and what may be applied without touching them.

    With `share` (as `ModuleWeights` takes it) LoRAs are only merged: what stands beside the weights is on one rank.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        device: torch.device,
        share: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.name = name
        self.weights = ModuleWeights(name, module, device, share)
        self._is_shared = share is not None
        if self._is_shared:
            logger.info("%s: LoRAs are merged on all ranks; jobs with different ones do not share passes", name)
        self._mixer = Mixer(module, device)
        self._not_mixable: set[str | None] = set()  # layers that were found not to keep rows apart; None: all
        self._mixes: OrderedDict[Key, bool] = OrderedDict()
        self._unmerged_for: Key = ()
        self._unmerged_s = 0.0  # what applying that set unmerged has cost since another was

    def mixes(self, loras: ModuleLoras) -> bool:
        """Say whether a set can be applied beside the base weights, and so share a pass with other sets."""
        known = self._mixes.get(loras.key)
        if known is None:
            known = self._mixes[loras.key] = self._find_out(loras)
            if len(self._mixes) > _MAX_KNOWN:
                self._mixes.popitem(last=False)
        return known

    def _find_out(self, loras: ModuleLoras) -> bool:
        if self._is_shared or None in self._not_mixable or not self._mixer.takes_hooks():
            return False
        hindering = [*(loras.layers & self._not_mixable), *self._mixer.obstacles(loras)]
        if hindering:
            logger.info(
                "%s: jobs with LoRA %s share passes only with their like, and its weights are switched for them: not"
                " all its changes are products of plain linear layers (%s, and %d more)",
                self.name,
                ", ".join(entry.adapter.nickname for entry in loras.entries),
                min(hindering),
                len(hindering) - 1,
            )
        return not hindering

    def exclude(self, layer: str | None, reason: str) -> None:
        """Never again mix sets that change this layer; None: any."""
        logger.warning("%s: LoRAs of %s are no longer mixed in one pass: %s", self.name, layer or "any layer", reason)
        self._not_mixable.add(layer)
        self._mixes.clear()

    def merge_if_it_pays(self, loras: ModuleLoras, seconds_ahead: float) -> None:
        """Merge a set that all calls at hand want, if applying it unmerged would cost more than the switch.

        `seconds_ahead` is what passes with it are expected to take. What unmerged passes with it have cost so far
        counts too, so that many short jobs lead to the same as one long one.
        """
        if loras.key == self.weights.merged.key:
            return
        if self._unmerged_for != loras.key:
            self._unmerged_for, self._unmerged_s = loras.key, 0.0
        restores_anyway = self.weights.merged.key != BASE.key
        cost_s = self._unmerged_s + UNMERGED_SHARE * seconds_ahead
        if restores_anyway or cost_s > self.weights.switch_s(loras):
            self.weights.switch(loras)

    def note_pass(self, segments: Segments, seconds: float) -> None:
        """A pass was run; remember what it cost not to have merged its set."""
        keys = {loras.key for loras, _ in segments}
        if keys == {self._unmerged_for} and self._unmerged_for != self.weights.merged.key:
            self._unmerged_s += UNMERGED_SHARE * seconds

    def fit(self, segments: Segments, *, exact: bool) -> None:
        """Bring the weights to where these rows can be served, if they are not; `exact` rows are served merged."""
        sets = {loras.key: loras for loras, _ in segments} or {BASE.key: BASE}
        if len(sets) == 1:
            (loras,) = sets.values()
            if exact or not self.mixes(loras):
                self.weights.switch(loras)
            if self.weights.merged.key == loras.key:
                return
        self.weights.switch(BASE)

    @contextmanager
    def applied(self, segments: Segments, *, exact: bool) -> Iterator[None]:
        """Make the calls inside see the LoRAs of their rows. Raises what `ModuleWeights.switch` does, NotMixable."""
        self.fit(segments, exact=exact)
        if not self.unmerged(segments):
            yield
            return
        with self._mixer.applied(segments):
            yield

    def unmerged(self, segments: Segments) -> frozenset[str]:
        """Return the layers whose changes are applied beside the weights, as these stand."""
        if {loras.key for loras, _ in segments} <= {self.weights.merged.key}:
            return frozenset()
        return frozenset().union(*(loras.layers for loras, _ in segments))

    def free_memory(self) -> None:
        """Give back what can be made again."""
        self._mixer.forget()
