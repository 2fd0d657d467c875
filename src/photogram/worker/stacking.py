"""Runs the calls of several jobs as one forward pass, where that has been shown to be right.

What may be stacked is learned per *outline* of a call (`layout.py`), and the first stacked pass of each outline is
checked against running its calls alone; an outline that fails is served alone from then on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.families import PADDED_TEXT, PaddedText
from .digest import DigestMemo, Unhashable
from .fibers import Call
from .layout import Layout, Nested, NotStackable, distance, divide, learn, rows, split, stack, stack_key, structure
from .lora.mixing import NotMixable

logger = logging.getLogger(__name__)

# A wrong layout is off by parts of the signal (0.03 and more were seen); these are the rounding of a batch.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 3e-2

TEXT_BUCKET = 32  # tokens; text lengths within one bucket are padded to meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A call's arguments by name. Where a family's text may be padded to meet, its mask stands apart."""

    outline: Hashable
    arguments: Mapping[str, Any]
    padded: PaddedText | None = None
    text_mask: torch.Tensor | None = None

    @property
    def text_length(self) -> int | None:
        return None if self.padded is None else self.arguments[self.padded.embeds].shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stackable:
    """A call that may share a forward pass with others of the same `key`."""

    key: Hashable
    binding: Binding
    layout: Layout
    num_rows: int


class Stacker:
    """Knows the layout of every outline it has met, and which were shown to stack right."""

    def __init__(self) -> None:
        self._layouts: dict[Hashable, Layout | None] = {}  # None: runs alone
        # By outline, the layers whose LoRAs were seen to reach the right rows.
        self._checked: dict[Hashable, set[str]] = {}

    # --- learning

    def is_known(self, call: Call) -> bool:
        """Say whether the call's outline has been learned (or given up)."""
        return bind(call).outline in self._layouts

    def learn(self, one: Call, two: Call | None) -> None:
        """Learn from a call of one prompt and the same code's call of two; None where the code cannot make one."""
        binding = bind(one)
        layout: Layout | None = None
        reason = "the pipeline makes no such call for two prompts"
        if two is not None:
            other = bind(two)
            try:
                if binding.arguments.keys() != other.arguments.keys():
                    raise NotStackable("other arguments")
                names = binding.arguments
                layout = Nested(tuple((name, learn(names[name], other.arguments[name], name)) for name in names))
                if len(rows(layout, binding.arguments)) != 1:
                    raise NotStackable(f"rows {sorted(rows(layout, binding.arguments))} in one call")
            except NotStackable as error:
                layout, reason = None, str(error)
        if layout is None:
            logger.info("calls of %s run alone: %s", one.module.name, reason)
        self._layouts[binding.outline] = layout

    def prepare(self, call: Call, digest: DigestMemo) -> Stackable | None:
        """Return how the call stacks, or None where it runs alone."""
        binding = bind(call)
        layout = self._layouts.get(binding.outline)
        if layout is None or call.module.caches_steps:
            return None
        counts = rows(layout, binding.arguments)
        if len(counts) != 1:
            return None
        try:
            key = (
                call.module.name,
                call.method,
                binding.outline,
                call.autocast,
                _bucket(binding.text_length),
                stack_key(layout, _without_text_length(binding), digest),
            )
        except Unhashable:
            return None
        return Stackable(key=key, binding=binding, layout=layout, num_rows=counts.pop())

    # --- running

    def run(self, calls: Sequence[Call], prepared: Sequence[Stackable], owners: Sequence[str]) -> list[Any]:
        """Run calls of one key as one forward pass and return each one's result.

        The first time for an outline, and for layers with LoRAs of several jobs, they are also run alone and
        compared; on a mismatch the results are those of running alone, and the outline is given up, or the mixing of
        LoRAs. Raises NotMixable.
        """
        outline = prepared[0].binding.outline
        try:
            results = self._run_stacked(calls, prepared, owners[0])
        except (NotStackable, ValueError, TypeError, IndexError) as error:
            # Memory errors and device errors are RuntimeErrors and go up.
            return self._give_up(outline, calls, owners, str(error))
        mixed = _mixed_layers(calls)
        if outline in self._checked and mixed <= self._checked[outline]:
            return results
        alone = [call.module.run(call, owner) for call, owner in zip(calls, owners, strict=True)]
        worst = max(distance(result, reference) for result, reference in zip(results, alone, strict=True))
        if not worst <= tolerance(alone[0], in_fp8=calls[0].in_fp8):
            if mixed:
                raise NotMixable(None, f"with a LoRA each they differ by {worst:.2g}")
            self._layouts[outline] = None
            logger.warning("calls of %s run alone: stacked they differ by %.2g", calls[0].module.name, worst)
            return alone
        logger.info("calls of %s stack: checked, relative difference %.2g", calls[0].module.name, worst)
        self._checked.setdefault(outline, set()).update(mixed)
        return results

    def is_checked(self, part: Stackable) -> bool:
        """Say whether calls like this one were seen to give the same stacked as alone."""
        return part.binding.outline in self._checked

    def give_up(self, part: Stackable) -> None:
        """Serve calls like this one alone from now on."""
        self._layouts[part.binding.outline] = None

    def _run_stacked(self, calls: Sequence[Call], prepared: Sequence[Stackable], owner: str) -> list[Any]:
        result = calls[0].module.run(joined(calls, prepared), owner)
        return split(result, [part.num_rows for part in prepared])

    def _give_up(self, outline: Hashable, calls: Sequence[Call], owners: Sequence[str], reason: str) -> list[Any]:
        self._layouts[outline] = None
        logger.warning("calls of %s run alone: %s", calls[0].module.name, reason)
        return [call.module.run(call, owner) for call, owner in zip(calls, owners, strict=True)]


def joined(calls: Sequence[Call], prepared: Sequence[Stackable]) -> Call:
    """Return one call with the rows of all. Raises NotStackable."""
    first = calls[0]
    num_rows = [part.num_rows for part in prepared]
    arguments, mask = _meet_in_length([part.binding for part in prepared], num_rows)
    stacked = stack(prepared[0].layout, arguments, num_rows) | mask
    return Call(
        module=first.module,
        method=first.method,
        args=(),
        kwargs=_spread(first, stacked),
        autocast=first.autocast,
        loras=tuple((call.loras[0][0], count) for call, count in zip(calls, num_rows, strict=True)),
        in_fp8=first.in_fp8,
    )


def divided(call: Call, prepared: Stackable) -> tuple[Call, Call]:
    """Return two calls with the first and the second half of one call's rows. Raises NotStackable."""
    first = prepared.num_rows // 2
    num_rows = [first, prepared.num_rows - first]
    parts = divide(prepared.layout, prepared.binding.arguments, num_rows)
    mask, padded = prepared.binding.text_mask, prepared.binding.padded
    if padded is not None:
        masks = [None, None] if mask is None else mask.split(num_rows)
        parts = [part | {padded.mask: own} for part, own in zip(parts, masks, strict=True)]
    one, two = (
        Call(
            module=call.module,
            method=call.method,
            args=(),
            kwargs=_spread(call, part),
            autocast=call.autocast,
            loras=tuple((loras, count) for loras, _ in call.loras),
            in_fp8=call.in_fp8,
        )
        for part, count in zip(parts, num_rows, strict=True)
    )
    return one, two


def _mixed_layers(calls: Sequence[Call]) -> frozenset[str]:
    """Return the layers at which rows of these calls see LoRAs of their own."""
    loras = calls[0].module.loras
    return frozenset() if loras is None else loras.unmerged([call.loras[0] for call in calls])


def tolerance(result: Any, *, in_fp8: bool) -> float:
    """Return how far a stacked result may be from the same call alone, relative to its size."""
    if in_fp8:
        return LOW_PRECISION_TOLERANCE
    while not isinstance(result, torch.Tensor):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return TOLERANCE.get(result.dtype, LOW_PRECISION_TOLERANCE)


# --- arguments ----------------------------------------------------------------------------------------------------


def bind(call: Call) -> Binding:
    """Name the call's arguments by the real method's signature, so that positional and keyword calls look alike."""
    arguments = dict(call.module.signatures[call.method].bind(*call.args, **call.kwargs).arguments)
    padded = PADDED_TEXT.get(type(call.module.module).__name__)
    mask: torch.Tensor | None = None
    if padded is not None:
        # One with a mask and one without meet: a missing mask is made where it is needed.
        mask = arguments.pop(padded.mask, None)
    outline = (
        type(call.module.module).__qualname__,
        call.method,
        call.in_fp8,
        tuple((name, structure(value)) for name, value in arguments.items()),
    )
    return Binding(outline=outline, arguments=arguments, padded=padded, text_mask=mask)


def _bucket(text_length: int | None) -> int | None:
    return None if text_length is None else -(-text_length // TEXT_BUCKET)


def _without_text_length(binding: Binding) -> Mapping[str, Any]:
    """The arguments as far as they must agree: texts of unequal lengths are padded, so theirs does not count."""
    if binding.padded is None:
        return binding.arguments
    name = binding.padded.embeds
    return {**binding.arguments, name: binding.arguments[name][:, :0]}


def _meet_in_length(
    bindings: Sequence[Binding], num_rows: Sequence[int]
) -> tuple[list[Mapping[str, Any]], dict[str, torch.Tensor | None]]:
    """Pad the texts (B, S, D) of several calls to the longest and return the arguments and the mask (B, S) to add.

    No mask is made where none is needed: it costs the fast attention kernels.
    """
    padded = bindings[0].padded
    if padded is None:
        return [binding.arguments for binding in bindings], {}
    name = padded.embeds
    texts = [binding.arguments[name] for binding in bindings]
    longest = max(text.shape[1] for text in texts)
    if all(text.shape[1] == longest for text in texts) and all(binding.text_mask is None for binding in bindings):
        return [binding.arguments for binding in bindings], {padded.mask: None}
    arguments: list[Mapping[str, Any]] = []
    masks: list[torch.Tensor] = []
    for binding, text, count in zip(bindings, texts, num_rows, strict=True):
        missing = longest - text.shape[1]
        mask = binding.text_mask
        if mask is None:
            mask = torch.ones(count, text.shape[1], dtype=torch.bool, device=text.device)
        arguments.append({**binding.arguments, name: torch.nn.functional.pad(text, (0, 0, 0, missing))})
        masks.append(torch.nn.functional.pad(mask.bool(), (0, missing)))
    return arguments, {padded.mask: torch.cat(masks)}


def _spread(call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn arguments by name into keywords; those of a ``**kwargs`` parameter one by one."""
    parameters = call.module.signatures[call.method].parameters
    keywords: dict[str, Any] = {}
    for name, value in arguments.items():
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            keywords |= value
        elif parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise NotStackable(f"positional arguments under '*{name}'")
        else:
            keywords[name] = value
    return keywords
