"""A worker in simulated time: jobs arrive, come to calls, are cancelled; calls cost what their model says.

`simulate` drives anything with the scheduler's methods, so the policy is compared with first-in-first-out under the
very same jobs. It checks on the way what must hold of every plan.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from photogram.scheduler import JobTicket, PendingCall, Plan, Run, Start

START_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one sort of job costs. A pass of n calls takes `call_s * (1 + (n - 1) * marginal)`.

    With `beside` its encoder and its decoder may run beside passes.
    """

    name: str
    size_hint: float
    call_s: float
    calls_per_step: int = 2
    encode_s: float = 0.02
    decode_s: float = 0.03
    marginal: float = 1.0
    batches: bool = True
    beside: bool = False
    has_twin: bool = True


@dataclass(kw_only=True)
class SimJob:
    job_id: str
    shape: Shape
    steps: int
    arrives_at: float
    owner: str = "owner"
    priority: int = 0
    cancel_at: float | None = None
    # --- written by the simulation
    place: int = 0  # index of the next call
    started_at: float | None = None
    finished_at: float | None = None
    cancelled_at: float | None = None
    service_s: float = 0.0

    @property
    def num_calls(self) -> int:
        return 2 + self.steps * self.shape.calls_per_step

    @property
    def alone_s(self) -> float:
        shape = self.shape
        return START_S + shape.encode_s + self.steps * shape.calls_per_step * shape.call_s + shape.decode_s

    @property
    def latency_s(self) -> float:
        assert self.finished_at is not None
        return self.finished_at - self.arrives_at

    def ticket(self) -> JobTicket:
        return JobTicket(
            job_id=self.job_id,
            owner=self.owner,
            priority=self.priority,
            arrived_at=self.arrives_at,
            expected_steps=self.steps,
            size_hint=self.shape.size_hint,
            batchable=self.shape.batches,
        )

    def call(self) -> PendingCall:
        phase = "encode" if self.place == 0 else "decode" if self.place == self.num_calls - 1 else "denoise"
        kind = f"{self.shape.name}/{phase}"
        may_be_beside = self.shape.beside and phase != "denoise"
        key: Hashable | None = (kind, "key") if self.shape.batches and not may_be_beside else None
        return PendingCall(
            key=key,
            kind=kind,
            phase=phase,
            module=phase,
            may_be_beside=may_be_beside,
            has_twin=self.shape.has_twin,
        )

    def call_cost_s(self) -> float:
        phase = self.call().phase
        shape = self.shape
        return shape.encode_s if phase == "encode" else shape.decode_s if phase == "decode" else shape.call_s


@dataclass
class Outcome:
    jobs: list[SimJob]
    ends_at: float
    busy_s: float
    service_s: dict[str, float]
    batch_sizes: list[int] = field(default_factory=list)
    # (job, its eta when asked, when it was asked)
    etas: list[tuple[SimJob, float, float]] = field(default_factory=list)
    num_beside: int = 0

    def of(self, name: str) -> list[SimJob]:
        return [job for job in self.jobs if job.shape.name == name and job.finished_at is not None]


class Fifo:
    """The baseline: the job that came first runs to its end. With `batches`, others of its key ride along."""

    def __init__(self, *, max_batch_size: int = 1, max_live_jobs: int = 32) -> None:
        self._max_batch_size = max_batch_size
        self._max_live_jobs = max_live_jobs if max_batch_size > 1 else 1
        self._queued: dict[str, JobTicket] = {}
        self._live: dict[str, PendingCall | None] = {}

    def submit(self, ticket, now):
        self._queued[ticket.job_id] = ticket

    def cancel(self, job_id):
        self._queued.pop(job_id, None)
        self._live.pop(job_id, None)

    def waiting(self, job_id, call, now):
        self._live[job_id] = call

    def stepped(self, job_id, step, num_steps):
        pass

    def finished(self, job_id, now):
        del self._live[job_id]

    def ran(self, plan, seconds, now):
        return ()

    def eta_s(self, job_id, now):
        return None

    def next_plan(self, now) -> Plan | None:
        if self._queued and len(self._live) < self._max_live_jobs:
            job_id = next(iter(self._queued))
            del self._queued[job_id]
            self._live[job_id] = None
            return Start(job_id)
        for job_id, call in self._live.items():
            if call is not None:
                riders = [j for j, c in self._live.items() if j != job_id and c and c.key and c.key == call.key]
                members = (job_id, *riders[: self._max_batch_size - 1])
                for member in members:
                    self._live[member] = None
                return Run(members, call.kind, call.phase)
        return None


def simulate(
    scheduler,
    jobs: list[SimJob],
    *,
    max_batch_size: int = 8,
    max_live_jobs: int = 32,
    noise: float = 0.0,
    seed: int = 0,
    until: float | None = None,
    ask_eta_every: int = 0,
) -> Outcome:
    """Run all jobs to their end (or to `until`) and return what became of them.

    Asserts of every plan: its jobs are known, not cancelled and at a call; a batch is of one key and within bounds;
    no plan is given only if nothing could run. What runs beside passes shares the device with them, each at half its
    speed: nothing is gained but that neither waits for the other.
    """
    rng = random.Random(seed)
    by_id = {job.job_id: job for job in jobs}
    arrivals = deque(sorted(jobs, key=lambda job: job.arrives_at))
    cancels = [(job.cancel_at, job.job_id) for job in jobs if job.cancel_at is not None]
    heapq.heapify(cancels)
    queued: set[str] = set()
    live: set[str] = set()
    at_call: set[str] = set()
    outcome = Outcome(jobs=jobs, ends_at=0.0, busy_s=0.0, service_s={})
    now = 0.0
    num_plans = 0
    beside: Run | None = None
    beside_left_s = beside_began_at = 0.0

    def catch_up() -> None:
        while arrivals and arrivals[0].arrives_at <= now:
            job = arrivals.popleft()
            if job.cancelled_at is None:
                scheduler.submit(job.ticket(), now)
                queued.add(job.job_id)
        while cancels and cancels[0][0] <= now:
            job = by_id[heapq.heappop(cancels)[1]]
            if job.finished_at is None and job.arrives_at <= now:
                scheduler.cancel(job.job_id)
                job.cancelled_at = now
                for group in (queued, live, at_call):
                    group.discard(job.job_id)
            elif job.finished_at is None:
                job.cancelled_at = now

    def carried_out(plan: Plan, members: list[SimJob], seconds: float) -> None:
        assert scheduler.ran(plan, seconds, now) == ()
        for job in members:
            job.service_s += seconds / len(members)
            outcome.service_s[job.owner] = outcome.service_s.get(job.owner, 0.0) + seconds / len(members)
            if job.cancelled_at is not None:
                continue
            if isinstance(plan, Run):
                resume(scheduler, job, now)
            if job.finished_at is None:
                scheduler.waiting(job.job_id, job.call(), now)
                at_call.add(job.job_id)
            else:
                live.discard(job.job_id)

    while until is None or now < until:
        catch_up()
        if beside is not None and beside_left_s <= 0:
            ended, beside = beside, None
            carried_out(ended, [by_id[ended.job_ids[0]]], now - beside_began_at)
        plan = scheduler.next_plan(now)
        if plan is None and beside is not None:
            held_up = [by_id[job_id].call() for job_id in at_call]
            assert all(call.may_be_beside and call.phase == beside.phase and not call.has_twin for call in held_up)
            passed_s = min(beside_left_s, max(0.0, arrivals[0].arrives_at - now) if arrivals else beside_left_s)
            now += passed_s
            outcome.busy_s += passed_s
            beside_left_s -= passed_s
            continue
        if plan is None:
            assert not at_call, "no plan although jobs wait at a call"
            assert not (queued and len(live) < max_live_jobs), "no plan although a job could start"
            if not arrivals:
                break
            now = max(now, arrivals[0].arrives_at)
            continue
        num_plans += 1
        if isinstance(plan, Start):
            assert plan.job_id in queued
            queued.discard(plan.job_id)
            live.add(plan.job_id)
            assert len(live) <= max_live_jobs
            members = [by_id[plan.job_id]]
            members[0].started_at = now
            seconds = START_S
        else:
            members = [by_id[job_id] for job_id in plan.job_ids]
            assert len(set(plan.job_ids)) == len(members) <= max_batch_size
            assert all(job.job_id in at_call and job.cancelled_at is None for job in members)
            calls = [job.call() for job in members]
            assert len(members) == 1 or (calls[0].key is not None and all(c.key == calls[0].key for c in calls))
            assert (plan.kind, plan.phase) == (calls[0].kind, calls[0].phase)
            marginal = members[0].shape.marginal
            seconds = members[0].call_cost_s() * (1 + (len(members) - 1) * marginal)
            seconds *= rng.uniform(1 - noise, 1 + noise)
            outcome.batch_sizes.append(len(members))
        at_call.difference_update(job.job_id for job in members)
        if isinstance(plan, Run) and plan.beside:
            assert beside is None, "two calls beside the passes"
            assert members[0].call().may_be_beside
            beside, beside_left_s, beside_began_at = plan, seconds, now
            outcome.num_beside += 1
            continue
        if beside is not None and isinstance(plan, Run):
            assert members[0].call().has_twin or members[0].call().phase != beside.phase
        shared_s = min(seconds, beside_left_s) if beside is not None else 0.0
        beside_left_s -= shared_s
        now += seconds + shared_s
        outcome.busy_s += seconds + shared_s
        catch_up()
        carried_out(plan, members, seconds + shared_s)
        if ask_eta_every and num_plans % ask_eta_every == 0 and (queued or live):
            job = by_id[rng.choice(sorted(queued | live))]
            eta_s = scheduler.eta_s(job.job_id, now)
            if eta_s is not None:
                outcome.etas.append((job, eta_s, now))
    outcome.ends_at = now
    return outcome


def resume(scheduler, job: SimJob, now: float) -> None:
    """The call's result is in: go on to the next one or to the end."""
    job.place += 1
    made, rest = divmod(job.place - 1, job.shape.calls_per_step)
    if rest == 0 and 1 <= made <= job.steps:
        scheduler.stepped(job.job_id, made, job.steps)
    if job.place == job.num_calls:
        scheduler.finished(job.job_id, now)
        job.finished_at = now


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
