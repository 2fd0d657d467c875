"""One job as the store keeps it: its states and the one table of legal moves between them.

    queued ──> running ──> encoding ──> completed
      ^           │            │
      └───────────┴────────────┘   (its worker or host was lost: once more)

Every unfinished state may also end in `failed` or `cancelled`. Finished jobs never move again.
"""

from __future__ import annotations

import re
import secrets
from functools import cache
from typing import Literal

import msgspec

from ..core.errors import Conflict
from ..core.request import GenerateRequest, JSONValue, OutputSpec

JobState = Literal["queued", "running", "encoding", "completed", "failed", "cancelled"]
JobKind = Literal["image", "video"]

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    "queued": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"encoding", "queued", "failed", "cancelled"}),
    "encoding": frozenset({"completed", "queued", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
UNFINISHED: tuple[JobState, ...] = tuple(state for state, following in TRANSITIONS.items() if following)
FINISHED: tuple[JobState, ...] = tuple(state for state, following in TRANSITIONS.items() if not following)


@cache
def sources(to: JobState, *, skipping: bool = False) -> tuple[JobState, ...]:
    """Return the states from which a job may become `to`: by one move, or `skipping` by any number of them."""
    found = [state for state, following in TRANSITIONS.items() if to in following]
    if skipping:
        for state in found:  # which grows meanwhile
            found += [earlier for earlier in sources(state) if earlier not in found]
    return tuple(found)


class IllegalTransition(Conflict):
    """A job was to make a move that its state does not allow; somebody else was first, or the caller is wrong."""

    code = "illegal_transition"

    def __init__(self, job_id: str, state: JobState, to: JobState) -> None:
        allowed = ", ".join(sorted(TRANSITIONS[state])) or "nothing, it is finished"
        super().__init__(f"job '{job_id}' is {state} and cannot become {to} (allowed: {allowed}).")
        self.job_id = job_id
        self.state = state
        self.to = to


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One picture or clip. Times are seconds since the epoch, `run_s` is seconds on the device.

    `group_id` is the API object that the job belongs to: the n pictures of one request share it, in the order of
    `index`. `model` is the name that the client used, `served_model` the card's. `file_key` is set when encoding
    begins, so that no file is ever without its row; `file_bytes` when the file is complete. `attempts` counts how
    often the job began to run, `interruptions` how often the server died while it ran. `inputs` names the folder of
    the pictures it needs until it is finished. `fingerprint` tells requests under one idempotency key apart.
    `facts` is what the API's object shows beyond the request.
    """

    job_id: str
    group_id: str
    index: int
    kind: JobKind
    owner: str
    model: str
    request: GenerateRequest
    output: OutputSpec
    created_at: float
    state: JobState = "queued"
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    file_key: str | None = None
    content_type: str | None = None
    file_bytes: int | None = None
    run_s: float | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    served_model: str | None = None
    interruptions: int = 0
    inputs: str | None = None
    webhook_url: str | None = None
    warnings: tuple[str, ...] = ()
    facts: dict[str, JSONValue] = {}

    @property
    def outlives_client(self) -> bool:
        """Whether the job goes on when its client hangs up, and after a restart: the client will ask for it again.

        A picture belongs to the open connection, unless its request can be repeated under an idempotency key.
        """
        return self.kind == "video" or self.idempotency_key is not None

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess: ``img_`` and 32 hexadecimal digits (128 random bits)."""
    if not re.fullmatch(r"[a-z]{2,10}", prefix):
        raise ValueError(f"id prefix {prefix!r}: must be 2 to 10 letters a-z")
    return f"{prefix}_{secrets.token_hex(16)}"
