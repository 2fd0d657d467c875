"""Shares of the machine between owners: start-time fair queueing on seconds of service.

Goyal, Vin, Cheng, "Start-time Fair Queueing" (SIGCOMM 1996); for model serving: Sheng et al., "Fairness in Serving
Large Language Models" (OSDI 2024). Each owner's tag grows by the seconds of service its jobs attain. Virtual time is
the smallest tag among those competing at the top; an owner that becomes active starts there, so idling earns no
credit, and neither does waiting with jobs of low priority.

Strict fair queueing is processor sharing between owners, and at 70 % load it would stretch a short job 3.3 times
whoever sent it. So tags are compared in classes `slack_s` wide: inside a class the policy may prefer the shorter
job whoever owns it, and two busy owners of equal priority are never further apart than the slack and one call.
"""

from __future__ import annotations


class Owner:
    """One owner's account: `tag` in seconds of service, `num_jobs` queued or live."""

    __slots__ = ("name", "num_jobs", "tag")

    def __init__(self, name: str, tag: float) -> None:
        self.name = name
        self.tag = tag
        self.num_jobs = 0


class FairShare:
    """The accounts of all owners. Every method is O(1), but for a sweep each time the idle accounts doubled."""

    def __init__(self, slack_s: float) -> None:
        self.slack_s = slack_s
        self.virtual_s = 0.0
        self.longest_s = 0.0
        self._owners: dict[str, Owner] = {}
        self._num_active = 0
        self._sweep_at = 1024

    def join(self, name: str) -> Owner:
        """Return the owner's account for one more job; a newly active one starts at virtual time or where it was."""
        owner = self._owners.get(name)
        if owner is None:
            owner = self._owners[name] = Owner(name, self.virtual_s)
        if owner.num_jobs == 0:
            owner.tag = max(owner.tag, self.virtual_s)
            self._num_active += 1
        owner.num_jobs += 1
        return owner

    def leave(self, owner: Owner) -> None:
        """Take one job off the account. An idle account that virtual time has passed tells nothing and is dropped."""
        owner.num_jobs -= 1
        if owner.num_jobs:
            return
        self._num_active -= 1
        if self._num_active == 0:
            # The end of a busy period: nobody was kept waiting, so nothing is owed.
            self.virtual_s = max(self.virtual_s, owner.tag)
            self._owners.clear()
        elif owner.tag <= self.virtual_s:
            del self._owners[owner.name]
        elif len(self._owners) > self._sweep_at:
            kept = {name: o for name, o in self._owners.items() if o.num_jobs or o.tag > self.virtual_s}
            self._owners = kept
            self._sweep_at = max(1024, 2 * len(kept))

    def tag(self, name: str) -> float:
        """Return the tag of an active owner."""
        return self._owners[name].tag

    def charge(self, owner: Owner, seconds: float) -> None:
        """Book service. What an owner was owed while its jobs ranked low is kept up to one slack."""
        owner.tag = max(owner.tag, self.virtual_s - self.slack_s) + seconds
        self.virtual_s += seconds / max(1, self._num_active)

    def advance(self, lowest_tag: float) -> None:
        """Move virtual time up to the lowest tag among the owners competing now; it never goes back."""
        self.virtual_s = max(self.virtual_s, lowest_tag)

    def lead(self, owner: Owner) -> int:
        """Classes of `slack_s` by which the owner is ahead: 0 in step, -1 behind, above 0 over its share."""
        return max(-1, int((owner.tag - self.virtual_s) // self.slack_s))
