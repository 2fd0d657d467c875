"""The one call that runs beside the passes: of an encoder or a decoder, while denoisers' steps go on.

A decoder of clips takes as long as many steps. Run in its turn it makes every other job wait for it; run beside them it
takes the share of the device that they leave, and their share of what they do not. A call that is not much longer than
a step runs in its turn all the same: beside one it would take as long as that, and its job would wait longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from .job import Job, PendingCall, Run

# In lengths of the shortest call that waits; and in seconds, where none does but a job may come.
WORTHWHILE_LENGTH = 2.0
WORTHWHILE_S = 0.1


class Beside:
    """Which call that is, if any. Calls of its module wait for it where that is one network: it runs one at a time."""

    def __init__(self) -> None:
        self.plan: Run | None = None
        self._module = ""

    @property
    def kind(self) -> str | None:
        return None if self.plan is None else self.plan.kind

    def begin(self, plan: Run, module: str) -> None:
        self.plan, self._module = plan, module

    def ended(self) -> None:
        self.plan = None

    def candidates(self, waiting: Iterable[Job], pays: Callable[[PendingCall, Collection[str]], bool]) -> list[Job]:
        """Return the jobs whose calls may be the next one: while there is none.

        `pays` is asked whether a call can be run beside calls of all these kinds, and is better so.
        """
        if self.plan is not None:
            return []
        calls = [(job, job.call) for job in waiting if job.call is not None]
        others = {call.kind for _, call in calls if not call.may_be_beside}
        return [job for job, call in calls if call.may_be_beside and pays(call, others)]

    def holds_up(self, call: PendingCall | None) -> bool:
        """Say whether a call has to wait until that one is over."""
        if self.plan is None or call is None or not call.may_be_beside:
            return False
        return call.module == self._module and not call.has_twin
