"""Where a checkpoint's weights go on a device of some size: what is cheapest of what fits.

Pure arithmetic on sizes; nothing is loaded. What the operator says by a flag is kept, and what is left open is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import msgspec

from ..core.footprint import Footprint, Room
from ..core.worker_config import Placement
from .measured_peaks import Peak, Phase
from .sizes import Part

# What passes take beyond what must be held at once, and kernels' workspaces: measured peaks are some tens of per cent
# above the estimate.
WORK_MARGIN = 1.5
MEASURED_MARGIN = 1.1  # over what was measured: fragmentation, and requests of another kind
WORKSPACE_BYTES = 500_000_000
USABLE_SHARE = 0.9

# What a choice costs, in the order in which operators would make it: an encoder is called once for a prompt and never
# for one seen before, and in layers keeps some of the device; tiles may show; a denoiser that comes and goes costs
# every job, one that passes by in layers every step.
_COSTS: Mapping[str, float] = {
    "text_encoder_cpu_offload": 1.0,
    "text_encoder_layerwise_offload": 1.25,
    "image_encoder_cpu_offload": 0.5,
    "vae_cpu_offload": 1.5,
    "vae_tiling": 3.0,
    "dit_cpu_offload": 8.0,
    "dit_layerwise_offload": 16.0,
}

_EITHER = (
    ("dit_cpu_offload", "dit_layerwise_offload"),
    ("text_encoder_cpu_offload", "text_encoder_layerwise_offload"),
)


@dataclass(frozen=True, slots=True)
class UsualRequest:
    """What the plan makes room for: pixels, and frames of a clip."""

    width: int
    height: int
    frames: int | None

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A placement without open ends, the weights (bytes) on the device by phase under it, and what the phases take."""

    placement: Placement
    weights: Mapping[str, int]
    peaks: Mapping[str, int]
    usable_bytes: int
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return max(self.peaks.values()) <= self.usable_bytes

    def room(self, footprint: Footprint, memory_bytes: int, *, denoise_share: int = 1, decode_share: int = 1) -> Room:
        """Return what `memory_bytes` leave for work beside the weights, on each of the devices that share it."""
        return Room(
            footprint=footprint,
            denoise_bytes=denoise_share * max(0, memory_bytes - self.weights["denoise"]),
            decode_bytes=decode_share * max(0, memory_bytes - self.weights["decode"]),
        )


def plan_memory(
    parts: Sequence[Part],
    footprints: Mapping[bool, Footprint],
    request: UsualRequest,
    *,
    memory_bytes: int,
    host_bytes: int,
    asked: Placement,
    can_move_denoiser: bool = True,
    measured: Callable[[Placement], Mapping[Phase, Peak]] = lambda placement: {},
) -> MemoryPlan:
    """Return the cheapest placement under which `request` fits, or the one that comes nearest.

    `footprints` are those with the VAE in tiles (True) and without. `host_bytes` is what may wait in host memory. With
    `can_move_denoiser` False the denoiser stays on the device. What was `measured` under a placement, by phase, stands
    in for the estimate.
    """
    usable = int(USABLE_SHARE * memory_bytes)

    def plan(placement: Placement) -> MemoryPlan:
        weights = _weights(parts, placement)
        work = _work(footprints[bool(placement.vae_tiling)], request, measured(placement))
        peaks = {phase: weights[phase] + work[phase] for phase in weights}
        return MemoryPlan(placement=placement, weights=weights, peaks=peaks, usable_bytes=usable, reasons=())

    plans = [plan(placement) for placement in _placements(parts, asked, can_move_denoiser)]
    possible = [one for one in plans if _waiting_bytes(parts, one.placement) <= host_bytes]
    cheapest_first = sorted(possible or plans[:1], key=lambda one: _cost(one.placement))
    chosen = next((one for one in cheapest_first if one.fits), None)
    if chosen is None:
        chosen = min(cheapest_first, key=lambda one: max(one.peaks.values()))
    reasons = (
        *_reasons(parts, request, cheapest_first[0], chosen, memory_bytes),
        *_compared(chosen, footprints[bool(chosen.placement.vae_tiling)], measured(chosen.placement)),
    )
    if not possible:
        reasons = (*reasons, f"host memory of {_gb(host_bytes)} cannot hold what would have to wait there")
    return MemoryPlan(
        placement=chosen.placement, weights=chosen.weights, peaks=chosen.peaks, usable_bytes=usable, reasons=reasons
    )


def _placements(parts: Sequence[Part], asked: Placement, can_move_denoiser: bool) -> Iterator[Placement]:
    """Yield every placement that the operator's flags allow; what would change nothing stays off."""
    kinds = {part.kind for part in parts}
    useful = {
        "text_encoder_cpu_offload": "text_encoder" in kinds,
        "text_encoder_layerwise_offload": any(part.kind == "text_encoder" and part.block_bytes for part in parts),
        "image_encoder_cpu_offload": "image_encoder" in kinds,
        "vae_cpu_offload": "vae" in kinds,
        "vae_tiling": "vae" in kinds,
        "dit_cpu_offload": can_move_denoiser,
        "dit_layerwise_offload": can_move_denoiser
        and any(part.kind == "denoiser" and part.block_bytes for part in parts),
    }
    choices = []
    for name in _COSTS:
        wanted = getattr(asked, name)
        choices.append((wanted,) if wanted is not None else (False, True) if useful[name] else (False,))
    for values in product(*choices):
        placement = msgspec.structs.replace(asked, **dict(zip(_COSTS, values, strict=True)))
        if not any(all(getattr(placement, way) for way in ways) for ways in _EITHER):
            yield placement


def _cost(placement: Placement) -> float:
    return sum(cost for name, cost in _COSTS.items() if getattr(placement, name))


def _waits(part: Part, placement: Placement) -> bool:
    """Say whether a component waits in host memory and comes whole."""
    if part.kind == "denoiser":
        return bool(placement.dit_cpu_offload)
    flags = {
        "text_encoder": placement.text_encoder_cpu_offload,
        "image_encoder": placement.image_encoder_cpu_offload,
        "vae": placement.vae_cpu_offload,
    }
    return bool(flags.get(part.kind))


def _is_layered(part: Part, placement: Placement) -> bool:
    """Say whether a component waits in host memory and comes layer by layer."""
    flags = {
        "denoiser": placement.dit_layerwise_offload,
        "text_encoder": placement.text_encoder_layerwise_offload and part.block_bytes,
    }
    return bool(flags.get(part.kind))


def _waiting_bytes(parts: Sequence[Part], placement: Placement) -> int:
    """Return what waits in host memory."""
    return sum(part.num_bytes for part in parts if _waits(part, placement) or _is_layered(part, placement))


def _weights(parts: Sequence[Part], placement: Placement) -> dict[str, int]:
    """Return the bytes of weights on the device in each phase.

    A denoiser that waits in host memory stays from its call on until another component comes in; of several, one is
    there at a time (`worker/residency.Visitors`).
    """
    resident = 0
    visitors: dict[str, int] = {}
    for part in parts:
        if _waits(part, placement):
            visitors[part.kind] = max(visitors.get(part.kind, 0), part.num_bytes)
        elif _is_layered(part, placement):
            resident += part.layerwise_bytes
        else:
            resident += part.num_bytes
    denoiser = visitors.get("denoiser", 0)
    return {
        "encode": resident + max(visitors.get("text_encoder", denoiser), visitors.get("image_encoder", 0)),
        "denoise": resident + denoiser,
        "decode": resident + visitors.get("vae", denoiser),
    }


def _work(footprint: Footprint, request: UsualRequest, measured: Mapping[Phase, Peak]) -> dict[str, int]:
    """Return the bytes that each phase takes beside the weights: what was measured, at another size in proportion to
    the estimate, else the estimate."""
    at_once = _at_once(footprint, (request.width, request.height, request.frames))
    work = {phase: WORKSPACE_BYTES + int(WORK_MARGIN * num_bytes) for phase, num_bytes in at_once.items()}
    for phase, peak in measured.items():
        before = _at_once(footprint, (peak.width, peak.height, peak.frames))[phase]
        scale = at_once[phase] / before if before else 1.0
        work[phase] = WORKSPACE_BYTES + int(MEASURED_MARGIN * scale * peak.num_bytes)
    return work


def _at_once(footprint: Footprint, size: tuple[int, int, int | None]) -> dict[str, int]:
    return {"encode": 0, "denoise": footprint.denoise_bytes(*size), "decode": footprint.decode_bytes(*size)}


def _compared(chosen: MemoryPlan, footprint: Footprint, measured: Mapping[Phase, Peak]) -> tuple[str, ...]:
    """Say what was measured under the chosen placement, beside the estimate for the same size."""
    lines = []
    for phase, peak in measured.items():
        size = UsualRequest(peak.width, peak.height, peak.frames)
        estimate = chosen.weights[phase] + _work(footprint, size, {})[phase]
        lines.append(
            f"measured: {_gb(chosen.weights[phase] + peak.num_bytes)} to {phase} at {size}, estimated {_gb(estimate)}"
        )
    return tuple(lines)


def _reasons(
    parts: Sequence[Part], request: UsualRequest, cheapest: MemoryPlan, chosen: MemoryPlan, memory_bytes: int
) -> tuple[str, ...]:
    sizes = ", ".join(f"{part.name} {_gb(part.num_bytes)} ({part.precision})" for part in parts)
    lines = [
        f"weights: {sizes}",
        f"memory: {_gb(memory_bytes)}, of which {_gb(chosen.usable_bytes)} are planned with",
    ]
    if chosen.placement != cheapest.placement:
        phase = max(cheapest.peaks, key=lambda one: cheapest.peaks[one])
        lines.append(f"with {_spelled(cheapest.placement)} it would take {_gb(cheapest.peaks[phase])} to {phase}")
    peaks = ", ".join(f"{_gb(peak)} to {phase}" for phase, peak in chosen.peaks.items())
    verdict = "fits" if chosen.fits else "does not fit"
    lines.append(f"{verdict} with {_spelled(chosen.placement)}: {peaks} (one request of {request})")
    return tuple(lines)


def _spelled(placement: Placement) -> str:
    flags = [f"--{name.replace('_', '-')}" for name in _COSTS if getattr(placement, name)]
    return " ".join(flags) or "everything on the device"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
