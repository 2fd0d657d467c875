"""Over how many devices a model is split, and how: the degrees that `--num-gpus` is a product of."""

from __future__ import annotations

import msgspec

from .errors import ConfigError


class Degrees(msgspec.Struct, frozen=True, kw_only=True):
    """Every rank belongs to one Ulysses group (exchanging heads) and one ring (passing keys and values around), which
    together split sequences; `cfg` such groups run different calls at the same time."""

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    is_chosen: bool = True
    """False where only the number of devices is known: the worker fits Ulysses and ring to the model."""
    is_cfg_chosen: bool = True
    """False where it is the model's to say, too, whether the halves of guidance run apart."""

    @property
    def sequence(self) -> int:
        """Ranks that share each sequence."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        return self.sequence * self.cfg


class LayoutAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A model's layout in words, for `photogram doctor`, or the reason why there is none."""

    lines: tuple[str, ...] = ()
    problem: str | None = None


def resolve_degrees(
    *, num_gpus: int, dp: int = 1, cfg: int | None = None, ulysses: int | None, ring: int | None, sp: int | None
) -> Degrees:  # fmt: skip
    """Fill in the degrees of one of `dp` groups that were not given, as far as that needs no model.

    `sp`, the sequence-parallel degree, is the product of Ulysses and ring. Raises ConfigError, naming the flags, where
    they do not fit.
    """
    for flag, value in (
        ("--num-gpus", num_gpus), ("--dp-size", dp), ("--ulysses-degree", ulysses), ("--ring-degree", ring),
        ("--sp-degree", sp),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1.")
    if num_gpus % dp:
        raise ConfigError(f"--dp-size {dp}: --num-gpus ({num_gpus}) does not divide by it.")
    is_open = cfg is None and ulysses is None and ring is None and sp is None
    cfg = 1 if cfg is None else cfg
    if cfg not in (1, 2):
        raise ConfigError(f"--cfg-parallel {cfg}: must be 1 or 2, as a guided step has two halves.")
    if num_gpus // dp % cfg:
        raise ConfigError(f"--cfg-parallel {cfg}: {_named(num_gpus, dp, 1)} does not divide by it.")
    size, devices = num_gpus // dp // cfg, _named(num_gpus, dp, cfg)
    if sp is not None and sp != size:
        raise ConfigError(f"--sp-degree {sp}: must be {devices}, over which the sequence is split.")
    if ulysses is None and ring is None:
        return Degrees(
            ulysses=size, cfg=cfg, is_chosen=size == 1, is_cfg_chosen=not is_open or size % 2 == 1
        )  # fmt: skip
    if ulysses is None:
        assert ring is not None
        ulysses = _rest(size, devices, "--ring-degree", ring)
    elif ring is None:
        ring = _rest(size, devices, "--ulysses-degree", ulysses)
    product = ulysses * ring
    if product != size:
        hint = "" if size % product else f" (--dp-size {num_gpus // cfg // product} makes groups of {product * cfg})"
        raise ConfigError(
            f"--ulysses-degree {ulysses} times --ring-degree {ring} is {product}: must be {devices}{hint}."
        )
    return Degrees(ulysses=ulysses, ring=ring, cfg=cfg)


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _named(num_gpus: int, dp: int, cfg: int) -> str:
    """Name the number of devices that share a sequence by the flags it follows from."""
    by = [f"{flag} ({degree})" for flag, degree in (("--dp-size", dp), ("--cfg-parallel", cfg)) if degree > 1]
    return f"--num-gpus ({num_gpus})" + "".join(f" by {one}" for one in by)


def _rest(size: int, devices: str, flag: str, degree: int) -> int:
    if size % degree:
        raise ConfigError(f"{flag} {degree}: {devices} does not divide by it.")
    return size // degree
