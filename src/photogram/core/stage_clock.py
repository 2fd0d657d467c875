"""How long something was in each of the stages that it goes through."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StageClock:
    """Seconds in each stage, of one job say, waiting for its turn included. A stage may be entered again."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str | None = None
    _since: float = 0.0

    def enter(self, stage: str | None, now: float) -> None:
        """Leave the present stage for another one; None at the end."""
        if stage == self._stage:
            return
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())
