"""What the weights of each module hold, and how often they may be switched.

After a switch, calls that need another one stand back until the switch has been worked off: `WORK_PER_SWITCH` times
its own seconds. So switching takes at most about a tenth of the time while the calls that need none are there, and a
call waits no longer for it than that. Higher priorities and overdue jobs do not stand back.
"""

from __future__ import annotations

from collections.abc import Hashable

from .job import PendingCall

WORK_PER_SWITCH = 10.0

BASE: Hashable = ()


class HeldWeights:
    """By module, what was last put into its weights."""

    def __init__(self) -> None:
        self._held: dict[str, Hashable] = {}
        self._to_work_off_s = 0.0

    def switched(self, module: str, weights: Hashable, seconds: float) -> None:
        """The module's weights hold `weights` now; putting them there took so long."""
        self._held[module] = weights
        self._to_work_off_s = max(self._to_work_off_s, WORK_PER_SWITCH * seconds)

    def worked(self, seconds: float) -> None:
        """A pass was run."""
        self._to_work_off_s = max(0.0, self._to_work_off_s - seconds)

    def needs_switch(self, call: PendingCall) -> bool:
        held = self._held.get(call.module, BASE)
        return call.weights != held and not (call.mixes and held == BASE)

    def stands_back(self, call: PendingCall) -> bool:
        """Say whether a call lets others go first for the sake of the weights."""
        return self._to_work_off_s > 0 and self.needs_switch(call)

    def may_share(self, lead: PendingCall, other: PendingCall) -> bool:
        """Say whether a call of the lead's key may join its pass: one with other weights means a switch to the base,
        where the lead's own are merged."""
        if other.weights == lead.weights:
            return True
        return (
            lead.mixes and other.mixes and not (self._to_work_off_s > 0 and self._held.get(lead.module, BASE) != BASE)
        )
