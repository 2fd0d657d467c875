"""What the scheduler is told of jobs, what it answers, and what it remembers of one job.

Times are seconds of one monotonic clock, the caller's; nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from .fairness import Owner

Phase = Literal["encode", "denoise", "decode"]
State = Literal["queued", "starting", "waiting", "running", "resumed"]

MIN_PRIORITY = -10
MAX_PRIORITY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTicket:
    """A job as it is handed in.

    Jobs of equal `kind` (task, guidance on or off: whatever changes the price of a step) and equal `size_hint`
    (width * height * frames) are taken to cost alike. A job that is not `batchable` always runs alone.

    Raises ValueError for a priority, step count or size out of range.
    """

    job_id: str
    owner: str
    arrived_at: float
    expected_steps: int
    size_hint: float
    kind: str = ""
    priority: int = 0
    batchable: bool = True

    def __post_init__(self) -> None:
        if not MIN_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority {self.priority}: must be between {MIN_PRIORITY} and {MAX_PRIORITY}.")
        if self.expected_steps < 0:
            raise ValueError(f"expected_steps {self.expected_steps}: must not be negative.")
        if not self.size_hint > 0:
            raise ValueError(f"size_hint {self.size_hint}: must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCall:
    """The call at which a job is suspended.

    Calls of equal `key` may run as one forward pass; None is a call that runs alone. `kind` names what costs the
    same time and memory (module and shapes). `bytes_per_call` is the memory one call needs while it runs, where
    the caller knows it.

    `weights` says what the module's weights must hold for the call; () is the base. A call that `mixes` can also be
    run on the base weights, and then beside calls that want other weights, if their keys are equal.

    One that `may_be_beside` can run while passes of other modules do, by itself. Meanwhile other calls of its module
    wait, unless it `has_twin`: a second network of the same weights.
    """

    key: Hashable | None
    kind: str
    phase: Phase
    rows: int = 1
    bytes_per_call: int | None = None
    module: str = ""
    weights: Hashable = ()
    mixes: bool = False
    may_be_beside: bool = False
    has_twin: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Begin this job and run it up to its first call."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Run:
    """Run the pending calls of these jobs as one forward pass; the first is the one that was chosen.

    One that is `beside` is begun, and what is planned until it is reported runs at the same time.
    """

    job_ids: tuple[str, ...]
    kind: str
    phase: Phase
    size_hint: float = field(default=1.0, compare=False)
    beside: bool = False


Plan = Start | Run


class Job:
    """What the scheduler remembers of one job between two calls.

    The `*_s` of the ledger are seconds as if the job had run alone; a batch of four does not cost its members
    four times their price.
    """

    __slots__ = (
        "call",
        "decode_s",
        "encode_s",
        "is_measured",
        "num_steps",
        "owner",
        "priced_at",
        "priority",
        "remaining_s",
        "sequence",
        "size_s",
        "state",
        "step",
        "ticket",
        "unstepped_s",
        "urgency",
    )

    def __init__(self, ticket: JobTicket, owner: Owner, sequence: int) -> None:
        self.ticket = ticket
        self.owner = owner
        self.sequence = sequence
        self.priority = ticket.priority
        self.state: State = "queued"
        self.call: PendingCall | None = None
        self.step = 0
        self.num_steps = ticket.expected_steps
        self.encode_s = 0.0
        self.unstepped_s = 0.0  # denoiser time since the last reported step
        self.decode_s = 0.0
        self.priced_at = -1  # version of the prices that the estimates below were made with
        self.is_measured = False
        self.remaining_s = 0.0
        self.size_s = 0.0
        self.urgency = 0.0
