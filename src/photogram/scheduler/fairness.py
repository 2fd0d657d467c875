"""Shares of the machine between owners: fair queueing by virtual finish time, on seconds of service.

Each owner's tag grows by the seconds of service that its jobs attain. Virtual time grows as an owner's tag would if
the machine were shared equally among the active ones. An owner that becomes active starts there, so idling earns no
credit. (Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; for model serving Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024.)

Served strictly by start tag, owners would share like processes, and at 70 % load every job would take 3.3 times its
time. Owners are therefore compared by *finish* time, tag plus what their best job still needs: a short job of any
owner passes a long one, a long one that runs keeps its place before its equals, and yet nobody gets ahead of an
equally busy owner by more than the size of a job (Friedman and Henderson, "Fairness and efficiency in web server
protocols", SIGMETRICS 2003). One thing is changed: a long job that is late by that measure would block all short ones
until it is done (their stretch at the 95th percentile tripled in simulation), so being late counts only
beyond `slack_s`, which is also all that an owner can be owed whose jobs ranked low.
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
        """Book service, and move virtual time on by everybody's share of it."""
        owner.tag = max(owner.tag, self.virtual_s - self.slack_s) + seconds
        self.virtual_s += seconds / max(1, self._num_active)

    def finish_tag(self, owner: Owner, remaining_s: float, ahead_s: float = 0.0) -> float:
        """Return the virtual time at which the owner's job is due that needs `remaining_s` more.

        `ahead_s` is service that the owner is about to get and was not charged with yet. Neither lateness up to the
        slack nor need beyond it count, so a wrong estimate costs an owner no more.
        """
        tag = owner.tag + ahead_s
        late = tag < self.virtual_s - self.slack_s
        start = self.virtual_s - self.slack_s if late else max(tag, self.virtual_s)
        return start + min(remaining_s, self.slack_s)
