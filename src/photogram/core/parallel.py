"""Over how many devices a model is split, and how: the degrees that `--num-gpus` is a product of."""

from __future__ import annotations

import msgspec

from .errors import ConfigError


class Degrees(msgspec.Struct, frozen=True, kw_only=True):
    """Every rank belongs to one Ulysses group (exchanging heads) and one ring (passing keys and values around)."""

    ulysses: int = 1
    ring: int = 1
    is_chosen: bool = True
    """False where only the number of devices is known: the worker fits the degrees to the model."""

    @property
    def world_size(self) -> int:
        return self.ulysses * self.ring


def resolve_degrees(*, num_gpus: int, ulysses: int | None, ring: int | None, sp: int | None) -> Degrees:
    """Fill in the degrees that were not given. Raises ConfigError, naming the flags, where they do not fit.

    `sp`, the sequence-parallel degree, is the product of the other two.
    """
    for flag, value in (
        ("--num-gpus", num_gpus), ("--ulysses-degree", ulysses), ("--ring-degree", ring), ("--sp-degree", sp)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1.")
    if sp is not None and sp != num_gpus:
        raise ConfigError(f"--sp-degree {sp}: must be --num-gpus ({num_gpus}), over which the sequence is split.")
    if ulysses is None and ring is None:
        return Degrees(ulysses=num_gpus, is_chosen=num_gpus == 1)
    if ulysses is None:
        ulysses = _rest(num_gpus, "--ring-degree", ring)
    elif ring is None:
        ring = _rest(num_gpus, "--ulysses-degree", ulysses)
    assert ulysses is not None
    assert ring is not None
    if ulysses * ring != num_gpus:
        raise ConfigError(
            f"--ulysses-degree {ulysses} times --ring-degree {ring} is {ulysses * ring}: "
            f"must be --num-gpus ({num_gpus})."
        )
    return Degrees(ulysses=ulysses, ring=ring)


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _rest(num_gpus: int, flag: str, degree: int | None) -> int:
    assert degree is not None
    if num_gpus % degree:
        raise ConfigError(f"{flag} {degree}: --num-gpus ({num_gpus}) does not divide by it.")
    return num_gpus // degree
