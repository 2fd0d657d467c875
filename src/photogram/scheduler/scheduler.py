"""The scheduler's books: which job is where, and the decision made over them.

    submit -> queued -> next_plan: Start -> starting -> waiting(call) -> next_plan: Run -> running
                                                            ^                                |
                                                            +---- resumed <------- ran ------+     ... -> finished

A decision looks at the jobs that wait at a call and at a short list of those not started: O(live jobs), whatever the
length of the queue.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

from .backlog import Backlog
from .batches import BatchLimits
from .beside import WORTHWHILE_LENGTH, WORTHWHILE_S, Beside
from .cost import CallCosts, JobCosts, Mean
from .fairness import FairShare
from .held import HeldWeights
from .job import Job, JobTicket, PendingCall, Phase, Plan, Run, Start
from .policy import DECODE, DENOISE, ENCODE, START, EarlyBudget, Policy, SchedulerConfig, Standing

_PHASE_RANK = {"decode": DECODE, "encode": ENCODE, "denoise": DENOISE}


class Scheduler:
    """Plans the calls of all jobs of one worker.

    Methods that name a job raise KeyError for one that is unknown: never submitted, cancelled or finished.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._shares = FairShare(config.fairness_slack_s)
        self._policy = Policy(config, self._shares)
        self._call_costs = CallCosts()
        self._job_costs = JobCosts()
        self._batches = BatchLimits(
            max_batch_size=config.max_batch_size,
            memory_bytes=config.memory_bytes,
            min_gain=config.min_batch_gain,
            call_costs=self._call_costs,
        )
        self._early = EarlyBudget(config.early_share, config.early_burst_s)
        self._start_s = Mean()
        self._speedup = 1.0  # seconds of work as if alone, per second that passed
        self._jobs: dict[str, Job] = {}
        self._backlog = Backlog()
        self._live: dict[str, Job] = {}
        self._waiting: dict[str, Job] = {}
        self._held = HeldWeights()
        self._beside = Beside()
        self._last_key: Hashable | None = None
        self._last_lead: Job | None = None
        self._num_submitted = 0

    # --- what happens to jobs ------------------------------------------------------------------------------------

    def submit(self, ticket: JobTicket, now: float) -> None:
        """Queue a job. Raises ValueError for an id that is known already or an arrival in the future."""
        if ticket.job_id in self._jobs:
            raise ValueError(f"job '{ticket.job_id}': was submitted already.")
        if ticket.arrived_at > now:
            raise ValueError(f"job '{ticket.job_id}': arrived_at {ticket.arrived_at} is after now, {now}.")
        job = Job(ticket, self._shares.join(ticket.owner), self._num_submitted)
        self._num_submitted += 1
        self._estimate(job)
        self._jobs[ticket.job_id] = job
        self._backlog.add(job)

    def cancel(self, job_id: str) -> bool:
        """Forget a job, wherever it is; it is never planned again. False if it is not known (any more)."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._forget(job)
        return True

    # A pass may be reported by `ran` before or after its jobs went on: the device works behind the worker's back.

    def waiting(self, job_id: str, call: PendingCall, now: float) -> None:
        """The job is suspended at a call."""
        job = self._jobs[job_id]
        self._settle(job)
        if job.state not in ("starting", "resumed"):
            raise ValueError(f"job '{job_id}': cannot come to a call while {job.state}.")
        job.call = call
        job.state = "waiting"
        self._waiting[job_id] = job
        self._estimate(job)

    def stepped(self, job_id: str, step: int, num_steps: int) -> None:
        """The job has made `step` of `num_steps` denoising steps."""
        job = self._jobs[job_id]
        self._settle(job)
        if step > job.step:
            self._job_costs.stepped(job, step - job.step)
            job.unstepped_s = 0.0
        job.step = step
        job.num_steps = num_steps
        self._estimate(job)

    def finished(self, job_id: str, now: float) -> None:
        """The job came to its end; its costs are learned from. Use `cancel` for a job that failed."""
        job = self._jobs[job_id]
        self._settle(job)
        self._job_costs.finished(job)
        self._forget(job)

    def holds(self, module: str, weights: Hashable, switch_s: float = 0.0) -> None:
        """A module's weights were switched, which took `switch_s` seconds."""
        self._held.switched(module, weights, switch_s)

    # --- decisions -----------------------------------------------------------------------------------------------

    def next_plan(self, now: float) -> Plan | None:
        """Return what to do next; None only if no job may be started and none waits at a call, but for those that wait
        for the call that runs beside.

        The jobs of a plan are taken: they are planned again when `waiting` was called for them.
        """
        newcomers = self._newcomers(now)
        if not self._waiting and not newcomers:
            return None
        top = max(job.priority for jobs in (self._waiting.values(), newcomers) for job in jobs)
        lead = self._lead_beside(now, top)
        if lead is not None:
            return self._run(lead, now, top, beside=True)
        lead = self._first(now, top, newcomers)
        if lead is None:
            return None
        if lead.state == "queued":
            return self._start(lead)
        return self._run(lead, now, top)

    def ran(
        self,
        plan: Plan,
        seconds: float,
        now: float,
        *,
        out_of_memory: bool = False,
        peak_bytes: int | None = None,
    ) -> tuple[str, ...]:
        """Report that a plan was carried out and how long it took.

        `peak_bytes` is the memory the pass took beyond what was held before it, where it was measured. After a pass
        that ran out of memory the batch limit of that kind is halved and its jobs are planned again, in smaller
        batches. Where something ran beside it, both are planned again as they were, and no more at once. Returns the
        jobs that cannot be: one whose call did not fit alone. Fail and `cancel` those.

        Where two calls shared the device neither took as long as it would have alone, so what is known of their
        price goes before what they took.
        """
        if isinstance(plan, Start):
            self._start_s.add(seconds)
            self._early.spend(seconds)
            self._charge((plan.job_id,), seconds)
            return ()
        beside = self._beside.plan
        if plan.beside:
            self._beside.ended()
        if beside is not None:
            seconds = min(seconds, self._call_costs.expected(plan.kind, len(plan.job_ids)) or seconds)
        self._charge(plan.job_ids, seconds)
        self._held.worked(seconds)
        jobs = [self._jobs[job_id] for job_id in plan.job_ids if job_id in self._jobs]
        if plan.phase != "encode":
            self._early.earn(seconds)
        elif not plan.beside:
            self._early.spend(seconds)
        if out_of_memory:
            if beside is not None:
                self._batches.keep_alone(beside.kind)
            else:
                self._batches.out_of_memory(plan.kind, len(plan.job_ids))
                if len(plan.job_ids) == 1:
                    return tuple(job.ticket.job_id for job in jobs)
            for job in jobs:
                if job.state == "running":
                    job.state = "waiting"
                    self._waiting[job.ticket.job_id] = job
            return ()
        self._batches.ran(plan.kind, len(plan.job_ids), peak_bytes)
        if beside is None or not self._call_costs.num_samples(plan.kind, len(plan.job_ids)):
            self._learn(plan, seconds)
        alone_s = self._call_costs.expected(plan.kind, 1) or seconds / len(plan.job_ids)
        for job in jobs:
            if job.state == "running":
                self._book(job, plan.phase, alone_s)
        return ()

    # --- estimates -----------------------------------------------------------------------------------------------

    def expected_s(self, plan: Plan) -> float | None:
        """Return how long a plan should take, None while nothing like it ever ran."""
        if isinstance(plan, Start):
            return self._start_s.value if self._start_s.num_samples else None
        seconds = self._call_costs.expected(plan.kind, len(plan.job_ids))
        lead = self._jobs.get(plan.job_ids[0])
        if seconds is None and lead is not None:
            seconds = self._call_costs.guess(plan.phase, len(plan.job_ids), lead.ticket.size_hint)
        return seconds

    def expected_beside_s(self) -> float:
        """Return how long the call that runs beside should take by itself, 0 where there is none."""
        return 0.0 if self._beside.plan is None else self.expected_s(self._beside.plan) or 0.0

    def eta_s(self, job_id: str, now: float) -> float | None:
        """Return the seconds until the job is done, waiting behind others included; None while nothing is known.

        Counted are the job's own remaining time and that of the jobs that rank above it now, of another owner's no
        more than fairness lets by, over the speed-up that batching gave lately. Jobs that are yet to come are not
        foreseen. O(live jobs + lines of the backlog).
        """
        job = self._jobs[job_id]
        if not self._job_costs.knows(job.ticket):
            return None
        self._estimate(job)
        mine = self._policy.standing(job, now, job.priority)
        ahead_s: dict[str, float] = {}
        for other in self._live.values():
            if other.priced_at != self._job_costs.version:
                self._estimate(other)
            if other is not job and self._goes_before(other, job, now, mine):
                ahead_s[other.owner.name] = ahead_s.get(other.owner.name, 0.0) + other.remaining_s
        for head, last, length in self._backlog.lines():
            if head.priced_at != self._job_costs.version:
                self._estimate(head)
            num_ahead = 0.0
            if self._backlog.is_in_line_of(job, head):
                num_ahead = length * (job.sequence - head.sequence) / max(1, last.sequence - head.sequence + 1)
            elif self._goes_before(head, job, now, mine):
                num_ahead = length
            ahead_s[head.owner.name] = ahead_s.get(head.owner.name, 0.0) + num_ahead * head.size_s
        own_s = job.remaining_s + ahead_s.pop(job.owner.name, 0.0)
        total_s = own_s
        for name, seconds in ahead_s.items():
            total_s += min(seconds, own_s + max(0.0, job.owner.tag - self._shares.tag(name)))
        return total_s / self._speedup

    # --- inside --------------------------------------------------------------------------------------------------

    def _newcomers(self, now: float) -> list[Job]:
        """Return the queued jobs that compete for a live place, if there is one."""
        if not self._backlog or len(self._live) >= self.config.max_live_jobs:
            return []

        def within_owner(job: Job) -> tuple[float, ...]:
            if job.priced_at != self._job_costs.version:
                self._estimate(job)
            return (*self._policy.standing(job, now, job.priority), -job.sequence)

        def between_owners(job: Job) -> tuple[float, ...]:
            return (job.priority, -self._finish_tag(job), -job.sequence)

        return self._backlog.shortlist(now, within_owner, between_owners)

    def _finish_tag(self, job: Job) -> float:
        """Return the virtual time at which the job would be done if its owner ran nothing else."""
        return self._shares.finish_tag(job.owner, job.remaining_s)

    def _lead_beside(self, now: float, top: int) -> Job | None:
        """Return the job whose call is to run beside what others do, or what one may come to do; None for no such job.

        Of what has never run neither price nor memory is known: that is found out by itself.
        """
        fair = self.config.order == "fair"

        def pays(call: PendingCall, others: Collection[str]) -> bool:
            if not self._call_costs.num_samples(call.kind, 1):
                return False
            lengths_s = [WORTHWHILE_LENGTH * (self._call_costs.expected(kind, 1) or 0.0) for kind in others]
            is_long = (self._call_costs.expected(call.kind, 1) or 0.0) >= min(lengths_s, default=WORTHWHILE_S)
            return is_long and self._batches.fit_together(call.kind, others)

        def rank(job: Job) -> tuple[float, ...]:
            assert job.call is not None
            level, overdue, ratio = self._policy.standing(job, now, top)
            tag = self._finish_tag(job) if fair else 0.0
            return level, overdue, _PHASE_RANK[job.call.phase], -tag, ratio, -job.sequence

        return max(self._beside.candidates(self._waiting.values(), pays), key=rank, default=None)

    def _first(self, now: float, top: int, newcomers: list[Job]) -> Job | None:
        """Return the job that goes first: each owner sends its best, and the owners' best are compared."""
        policy, early = self._policy, self._early
        fair = self.config.order == "fair"
        has_place = len(self._live) < self.config.max_live_jobs - self.config.reserve
        start_phase = START if has_place and early.covers(self._start_s.value) else DENOISE
        champions: dict[str, tuple[tuple[float, ...], Job, float]] = {}
        longest_s, version = 0.0, self._job_costs.version
        for jobs in (self._waiting.values(), newcomers):
            for job in jobs:
                if job.priced_at != version:
                    self._estimate(job)
                level, overdue, ratio = policy.standing(job, now, top)
                remaining_s = job.remaining_s
                call = job.call
                if self._beside.holds_up(call):
                    continue
                settled = call is None or not self._held.stands_back(call)
                if call is None:
                    phase = start_phase
                else:
                    phase = _PHASE_RANK[call.phase]
                    if phase == ENCODE and not early.covers(self._call_costs.expected(call.kind, 1)):
                        phase = DENOISE
                    if fair and (job is self._last_lead or (call.key is not None and call.key == self._last_key)):
                        ratio *= self.config.stickiness
                        remaining_s /= self.config.stickiness
                    if job.is_measured and job.size_s > longest_s:
                        longest_s = job.size_s
                rank: tuple[float, ...] = (level, overdue, settled, phase, ratio, -job.sequence)
                name = job.owner.name if fair else ""
                champion = champions.get(name)
                if champion is None or rank > champion[0]:
                    champions[name] = (rank, job, remaining_s)
        policy.note_longest(longest_s)
        best: Job | None = None
        best_rank: tuple[float, ...] = ()
        for rank, job, remaining_s in champions.values():
            across = (rank[0], *rank[2:4], -self._shares.finish_tag(job.owner, remaining_s), *rank[4:])
            if best is None or across > best_rank:
                best, best_rank = job, across
        return best

    def _start(self, job: Job) -> Start:
        self._backlog.remove(job)
        job.state = "starting"
        self._live[job.ticket.job_id] = job
        return Start(job.ticket.job_id)

    def _run(self, lead: Job, now: float, top: int, *, beside: bool = False) -> Run:
        """Plan the lead's call with the best of those that may share its pass; `beside` the others it runs alone."""
        call = lead.call
        assert call is not None
        members = [lead]
        if call.key is not None and lead.ticket.batchable and not beside:
            others = [
                job
                for job in self._waiting.values()
                if job is not lead
                and job.call is not None
                and job.call.key == call.key
                and job.ticket.batchable
                and self._held.may_share(call, job.call)
            ]
            size = self._batches.size(call.kind, 1 + len(others), call.bytes_per_call, self._beside.kind)
            members += others if size > len(others) else self._riders(lead, others, size - 1, now, top)
        for job in members:
            job.state = "running"
            del self._waiting[job.ticket.job_id]
        if call.phase == "denoise":
            self._last_key, self._last_lead = call.key, lead
        job_ids = tuple(job.ticket.job_id for job in members)
        plan = Run(job_ids, call.kind, call.phase, lead.ticket.size_hint, beside)
        if beside:
            self._beside.begin(plan, call.module)
        return plan

    def _riders(self, lead: Job, others: list[Job], num: int, now: float, top: int) -> list[Job]:
        """Return the `num` jobs that share the lead's pass, out of more that could.

        Place by place: each owner offers its best, and they are compared as in `_first`, with what this pass has
        given to each already on its account. Else the owner of most jobs would get most of every pass.
        """
        assert lead.call is not None
        fair = self.config.order == "fair"
        lines: dict[str, list[tuple[Standing, int, Job]]] = {}
        for job in others:
            standing = self._policy.standing(job, now, top)
            lines.setdefault(job.owner.name if fair else "", []).append((standing, -job.sequence, job))
        for line in lines.values():
            line.sort()
        place_s = (self._call_costs.expected(lead.call.kind, num + 1) or 0.0) / (num + 1)
        given_s = dict.fromkeys(lines, 0.0)
        given_s[lead.owner.name if fair else ""] = place_s

        def across(name: str) -> tuple[float, ...]:
            (level, _, ratio), place_in_line, job = lines[name][-1]
            return level, -self._shares.finish_tag(job.owner, job.remaining_s, given_s[name]), ratio, place_in_line

        riders: list[Job] = []
        for _ in range(num):
            name = max(lines, key=across) if fair else ""
            riders.append(lines[name].pop()[-1])
            given_s[name] += place_s
            if not lines[name]:
                del lines[name]
        return riders

    def _charge(self, job_ids: tuple[str, ...], seconds: float) -> None:
        """Book the time: a share to each member's owner, and none of it counts as waiting."""
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            if job is not None:
                self._shares.charge(job.owner, seconds / len(job_ids))

    def _learn(self, plan: Run, seconds: float) -> None:
        num_calls = len(plan.job_ids)
        self._call_costs.observe(plan.kind, plan.phase, num_calls, plan.size_hint, seconds)
        alone_s = self._call_costs.expected(plan.kind, 1)
        if alone_s is None:
            alone_s = seconds / num_calls
        if seconds > 0:
            weight = min(1.0, seconds / 10.0)
            self._speedup += weight * (max(1.0, num_calls * alone_s / seconds) - self._speedup)

    def _settle(self, job: Job) -> None:
        """Book a pass that is not reported yet at the price expected of it."""
        if job.state == "running":
            assert job.call is not None
            self._book(job, job.call.phase, self._call_costs.expected(job.call.kind, 1) or 0.0)

    @staticmethod
    def _book(job: Job, phase: Phase, alone_s: float) -> None:
        job.state = "resumed"
        if phase == "encode":
            job.encode_s += alone_s
        elif phase == "denoise":
            job.unstepped_s += alone_s
        else:
            job.decode_s += alone_s

    def _estimate(self, job: Job) -> None:
        encode_s, step_s, decode_s = self._job_costs.rates(job.ticket)
        size_s = encode_s + decode_s + job.num_steps * step_s
        job.priced_at = self._job_costs.version
        job.is_measured = self._job_costs.has_measured(job.ticket)
        self._policy.rate(job, size_s, self._job_costs.remaining_s(job))

    def _goes_before(self, other: Job, job: Job, now: float, mine: Standing) -> bool:
        """True if `other` ranks above, leaving fairness between different owners to the caller."""
        theirs = self._policy.standing(other, now, job.priority)
        if other.owner is not job.owner:
            return (theirs[0], -self._finish_tag(other)) > (mine[0], -self._finish_tag(job))
        return (*theirs, -other.sequence) > (*mine, -job.sequence)

    def _forget(self, job: Job) -> None:
        job_id = job.ticket.job_id
        if job.state == "queued":
            self._backlog.remove(job)
        if self._last_lead is job:
            self._last_lead = None
        self._live.pop(job_id, None)
        self._waiting.pop(job_id, None)
        del self._jobs[job_id]
        self._shares.leave(job.owner)
