"""Ten thousand queued jobs: how many are looked at, and that none is forgotten."""

from __future__ import annotations

import random

from photogram.scheduler import JobTicket, Scheduler, SchedulerConfig, Start
from photogram.scheduler.backlog import Backlog
from photogram.scheduler.fairness import Owner
from photogram.scheduler.job import Job


def queued(number: int, owner: Owner, size_s: float) -> Job:
    ticket = JobTicket(job_id=str(number), owner=owner.name, arrived_at=0.0, expected_steps=1, size_hint=1.0)
    job = Job(ticket, owner, number)
    job.size_s = size_s
    return job


def test_only_a_few_candidates_are_offered_however_many_wait():
    rng = random.Random(1)
    backlog, owners = Backlog(), [Owner(str(i), 0.0) for i in range(300)]
    for number in range(10_000):
        backlog.add(queued(number, rng.choice(owners), rng.uniform(0.1, 100)))
    compared = []

    def order(job: Job) -> float:
        compared.append(job)
        return -job.size_s

    for moment in range(100):
        assert len(backlog.shortlist(moment * 1e-3, order)) <= 32
    num_lines = sum(1 for _ in backlog.lines())
    assert 1000 < num_lines < 10_000
    # 0.1 s is time for two or three looks at every line, not for a hundred.
    assert len(compared) <= 4 * num_lines


def test_line_gives_its_jobs_in_order_and_nothing_is_lost_when_some_leave():
    backlog, owner = Backlog(), Owner("o", 0.0)
    jobs = [queued(number, owner, 1.0) for number in range(100)]
    for job in jobs:
        backlog.add(job)
    for job in jobs[1::2]:
        backlog.remove(job)
    taken = []
    while len(backlog):
        (head,) = backlog.shortlist(0.0, lambda job: job.sequence)
        backlog.remove(head)
        taken.append(head)
    assert taken == jobs[::2]


def test_newcomer_at_the_head_of_a_new_line_is_a_candidate_at_once():
    scheduler = Scheduler(SchedulerConfig(max_live_jobs=2000))
    for number in range(1000):
        ticket = JobTicket(
            job_id=str(number), owner=f"o{number}", arrived_at=0.0, expected_steps=50, size_hint=1e6, priority=-1
        )
        scheduler.submit(ticket, 0.0)
    scheduler.next_plan(0.0)
    scheduler.submit(
        JobTicket(job_id="urgent", owner="me", arrived_at=0.0, expected_steps=1, size_hint=1.0, priority=1), 0.0
    )
    assert scheduler.next_plan(0.0) == Start("urgent")
