"""Learned prices, hang deadlines and finish times."""

from __future__ import annotations

import random

import pytest
from tests.scheduler.shapes import CLIP, LONER, MIDDLE, SMALL
from tests.scheduler.simulator import SimJob, percentile, simulate

from photogram.scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig
from photogram.scheduler.cost import CallCosts


def test_call_price_is_interpolated_between_known_batch_sizes_and_extended_beyond():
    costs = CallCosts()
    assert costs.expected("k", 1) is None
    for num_calls, seconds in ((1, 1.0), (4, 2.5)):
        for _ in range(3):
            costs.observe("k", "denoise", num_calls, 1.0, seconds)
    assert costs.expected("k", 1) == pytest.approx(1.0)
    assert costs.expected("k", 2) == pytest.approx(1.5)
    assert costs.expected("k", 8) == pytest.approx(4.5)


def test_first_pass_with_its_compilation_is_forgotten_at_the_second():
    costs = CallCosts()
    costs.observe("k", "denoise", 1, 1.0, 30.0)
    costs.observe("k", "denoise", 1, 1.0, 0.1)
    assert costs.expected("k", 1) == pytest.approx(0.1)


def test_price_follows_a_change_of_speed():
    costs = CallCosts()
    for seconds in [1.0] * 20 + [2.0] * 20:
        costs.observe("k", "denoise", 1, 1.0, seconds)
    assert costs.expected("k", 1) == pytest.approx(2.0, rel=0.01)


def test_unknown_kind_is_guessed_from_the_size():
    scheduler = Scheduler(SchedulerConfig())
    simulate(scheduler, [SimJob(job_id="a", shape=SMALL, steps=10, arrives_at=0.0)])
    scheduler.submit(
        JobTicket(job_id="b", owner="o", arrived_at=5.0, expected_steps=10, size_hint=4 * SMALL.size_hint), 5.0
    )
    scheduler.next_plan(5.0)
    scheduler.waiting("b", PendingCall(key=None, kind="never seen", phase="denoise"), 5.0)
    plan = scheduler.next_plan(5.0)
    assert scheduler.expected_s(plan) == pytest.approx(4 * SMALL.call_s)
    assert scheduler.eta_s("b", 5.0) == pytest.approx(0.02 + 40 * SMALL.call_s + 4 * SMALL.decode_s, rel=0.1)


def test_nothing_is_estimated_before_anything_ran():
    scheduler = Scheduler(SchedulerConfig())
    scheduler.submit(JobTicket(job_id="a", owner="o", arrived_at=0.0, expected_steps=10, size_hint=1.0), 0.0)
    assert scheduler.eta_s("a", 0.0) is None
    start = scheduler.next_plan(0.0)
    assert scheduler.expected_s(start) is None
    assert scheduler.expected_s(Run(("a",), "k", "denoise")) is None


def test_eta_of_a_job_alone_is_exact_from_its_second_step_on():
    scheduler = Scheduler(SchedulerConfig())
    job = SimJob(job_id="a", shape=MIDDLE, steps=30, arrives_at=0.0)
    outcome = simulate(scheduler, [job], ask_eta_every=1)
    later = [(eta_s, job.finished_at - asked_at) for _, eta_s, asked_at in outcome.etas]
    assert len(later) > 50
    for eta_s, true_s in later:
        assert eta_s == pytest.approx(true_s, abs=MIDDLE.decode_s + 0.01)  # its first decode is not foreseen


def test_eta_of_a_queued_job_counts_those_before_it():
    scheduler = Scheduler(SchedulerConfig(max_live_jobs=4))
    jobs = [SimJob(job_id=str(i), shape=LONER, steps=20, arrives_at=0.0) for i in range(200)]
    outcome = simulate(scheduler, jobs, max_live_jobs=4, ask_eta_every=7)
    ratios = [eta_s / (job.finished_at - at) for job, eta_s, at in outcome.etas if at > 5 and job.finished_at > at + 2]
    assert percentile(ratios, 0.05) > 0.9
    assert percentile(ratios, 0.95) < 1.1


def test_eta_under_mixed_load_is_mostly_right_within_a_third():
    rng = random.Random(3)
    jobs, now = [], 0.0
    for number in range(400):
        now += rng.expovariate(1 / 1.2)
        shape = rng.choices([SMALL, MIDDLE, CLIP], [70, 28, 2])[0]
        jobs.append(
            SimJob(job_id=str(number), shape=shape, steps=rng.randint(8, 28), arrives_at=now, owner=rng.choice("abcd"))
        )
    outcome = simulate(Scheduler(SchedulerConfig()), jobs, ask_eta_every=11, noise=0.1)
    errors = [abs(eta_s / (job.finished_at - at) - 1) for job, eta_s, at in outcome.etas if job.finished_at]
    assert len(errors) > 300
    assert percentile(errors, 0.6) < 1 / 3


def test_steps_that_turn_out_other_than_announced_are_taken_up():
    scheduler = Scheduler(SchedulerConfig())
    simulate(scheduler, [SimJob(job_id="a", shape=LONER, steps=10, arrives_at=0.0)])
    scheduler.submit(
        JobTicket(job_id="b", owner="o", arrived_at=5.0, expected_steps=10, size_hint=LONER.size_hint), 5.0
    )
    before_s = scheduler.eta_s("b", 5.0)
    scheduler.stepped("b", 0, 100)
    assert scheduler.eta_s("b", 5.0) > 8 * before_s
