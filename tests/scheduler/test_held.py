"""Weights are switched as rarely as fairness allows."""

from photogram.scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig, Start

STEP_S = 0.1


def run(*, num_jobs: int, steps: int, switch_s: float, mixes: bool, owners: int = 1, max_batch_size: int = 1):
    """Run jobs that want weights A and B by turns; return the switches, the passes and when each job ended."""
    scheduler = Scheduler(SchedulerConfig(max_batch_size=max_batch_size))
    wants = {f"job-{i}": "AB"[i % 2] for i in range(num_jobs)}
    left = dict.fromkeys(wants, steps)
    for i, job_id in enumerate(wants):
        owner = f"owner-{i % owners}"
        ticket = JobTicket(job_id=job_id, owner=owner, arrived_at=0.0, expected_steps=steps, size_hint=1.0)
        scheduler.submit(ticket, 0.0)
    now, held, switches, passes, ends = 0.0, (), 0, [], {}

    def wait(job_id: str) -> None:
        weights = (wants[job_id],)
        key = "key" if mixes else ("key", weights)
        call = PendingCall(key=key, kind="step", phase="denoise", module="m", weights=weights, mixes=mixes)
        scheduler.waiting(job_id, call, now)

    while (plan := scheduler.next_plan(now)) is not None:
        if isinstance(plan, Start):
            scheduler.ran(plan, 0.0, now)
            wait(plan.job_id)
            continue
        assert isinstance(plan, Run)
        sets = {wants[job_id] for job_id in plan.job_ids}
        assert mixes or len(sets) == 1
        needed = held if mixes and held == () else tuple(sets) if len(sets) == 1 else ()
        if needed != held:
            held, switches, now = needed, switches + 1, now + switch_s
            scheduler.holds("m", held, switch_s)
        now += STEP_S
        scheduler.ran(plan, STEP_S, now)
        passes.append(plan.job_ids)
        for job_id in plan.job_ids:
            left[job_id] -= 1
            scheduler.stepped(job_id, steps - left[job_id], steps)
            if left[job_id]:
                wait(job_id)
            else:
                ends[job_id] = now
                scheduler.finished(job_id, now)
    return switches, passes, ends


def test_switching_takes_a_tenth_of_the_time_at_most():
    switches, passes, _ = run(num_jobs=12, steps=20, switch_s=0.5, mixes=False, owners=4)
    assert switches * 0.5 <= 0.11 * len(passes) * STEP_S + 0.5


def test_every_owner_is_served_though_weights_are_kept():
    _, passes, ends = run(num_jobs=4, steps=200, switch_s=0.5, mixes=False, owners=2)
    assert len(ends) == 4
    first = {job_id: next(i for i, jobs in enumerate(passes) if job_id in jobs) for job_id in ends}
    # Both want other weights: the second begins once the first switch was worked off, and a job's length later.
    assert min(first["job-1"], first["job-3"]) <= 300


def test_jobs_that_mix_need_no_switch_and_share_every_pass():
    switches, passes, _ = run(num_jobs=4, steps=10, switch_s=0.5, mixes=True, max_batch_size=8)
    assert switches == 0
    assert [len(jobs) for jobs in passes] == [4] * 10


def at_a_call(scheduler: Scheduler, job_id: str, weights: str, priority: int = 0) -> None:
    ticket = JobTicket(job_id=job_id, owner="o", arrived_at=0.0, expected_steps=5, size_hint=1.0, priority=priority)
    scheduler.submit(ticket, 0.0)
    plan = scheduler.next_plan(0.0)
    assert plan == Start(job_id), "a start is preferred to calls while its budget lasts"
    scheduler.ran(plan, 0.0, 0.0)
    call = PendingCall(key=weights, kind="k", phase="denoise", module="m", weights=(weights,))
    scheduler.waiting(job_id, call, 0.0)


def test_a_call_stands_back_for_those_whose_weights_were_just_merged():
    scheduler = Scheduler(SchedulerConfig(max_batch_size=1))
    at_a_call(scheduler, "first", "B")
    scheduler.holds("m", ("A",), 100.0)
    at_a_call(scheduler, "second", "A")
    assert scheduler.next_plan(0.0).job_ids == ("second",)


def test_a_higher_priority_does_not_wait_for_weights():
    scheduler = Scheduler(SchedulerConfig(max_batch_size=1))
    scheduler.holds("m", ("A",), 100.0)
    at_a_call(scheduler, "calm", "A")
    at_a_call(scheduler, "urgent", "B", priority=5)
    assert scheduler.next_plan(0.0).job_ids == ("urgent",)
