"""Who goes before whom: arrival, size, priority, ageing, owners."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.scheduler.shapes import CLIP, LONER, MIDDLE, SMALL
from tests.scheduler.simulator import Shape, SimJob, simulate

from photogram.scheduler import Scheduler, SchedulerConfig


@settings(max_examples=30, deadline=None)
@given(gaps=st.lists(st.floats(0, 1), min_size=2, max_size=40), live=st.integers(1, 32))
def test_equal_jobs_of_one_owner_finish_in_the_order_they_came(gaps, live):
    jobs, now = [], 0.0
    for number, gap in enumerate(gaps):
        now += gap
        jobs.append(SimJob(job_id=str(number), shape=LONER, steps=10, arrives_at=now))
    simulate(Scheduler(SchedulerConfig(max_live_jobs=live)), jobs, max_live_jobs=live)
    ends = [job.finished_at for job in jobs]
    assert ends == sorted(ends)


@pytest.mark.parametrize("arrives_at", [1.0, 30.0, 49.0])
def test_short_job_behind_a_long_one_waits_for_about_one_call(arrives_at):
    long = SimJob(job_id="long", shape=CLIP, steps=50, arrives_at=0.0)
    first = SimJob(job_id="first", shape=SMALL, steps=10, arrives_at=0.5)  # teaches the price of short jobs
    short = SimJob(job_id="short", shape=SMALL, steps=10, arrives_at=arrives_at)
    simulate(Scheduler(SchedulerConfig()), [long, first, short])
    assert short.latency_s <= short.alone_s + 2 * CLIP.call_s


def test_long_job_finishes_under_an_endless_stream_of_short_ones():
    """Short jobs of the same owner alone would keep the device busy for ever."""
    short = Shape(name="short", size_hint=1.0, call_s=0.1, calls_per_step=1, encode_s=0.0, decode_s=0.0, batches=False)
    rng = random.Random(1)
    jobs = [SimJob(job_id="long", shape=CLIP, steps=10, arrives_at=5.0)]
    jobs += [
        SimJob(job_id=f"s{i}", shape=short, steps=9, arrives_at=i * 0.9 * rng.uniform(0.9, 1)) for i in range(3000)
    ]
    config = SchedulerConfig(ageing_s=20.0)
    simulate(Scheduler(config), jobs, until=1500.0)
    assert jobs[0].finished_at is not None
    # Four ageing periods make it overdue; by then the backlog of older jobs goes first.
    assert jobs[0].latency_s < 400


@pytest.mark.parametrize("owner", ["same", "other"])
@pytest.mark.parametrize("load", [1.0, 1.3])
def test_lowest_priority_finishes_under_constant_load_of_the_highest(owner, load):
    gap = LONER.call_s * 2 * 10 / load
    jobs = [SimJob(job_id="low", shape=LONER, steps=10, arrives_at=1.0, priority=-10, owner=owner)]
    jobs += [
        SimJob(job_id=str(i), shape=LONER, steps=10, arrives_at=i * gap, priority=10, owner="same") for i in range(1000)
    ]
    config = SchedulerConfig(ageing_s=5.0, ageing_sizes=5.0)
    simulate(Scheduler(config), jobs, until=jobs[-1].arrives_at)
    assert jobs[0].finished_at is not None
    # 20 levels of 5 s each, then the jobs that had come by then.
    assert jobs[0].latency_s < 20 * 5 * load + 10


def test_higher_priority_goes_strictly_first():
    jobs = [SimJob(job_id=f"low{i}", shape=SMALL, steps=20, arrives_at=0.0) for i in range(10)]
    jobs += [SimJob(job_id=f"high{i}", shape=MIDDLE, steps=20, arrives_at=0.5, priority=1) for i in range(3)]
    simulate(Scheduler(SchedulerConfig()), jobs)
    low = [job.finished_at for job in jobs[:10] if job.finished_at > 0.5]
    assert max(job.finished_at for job in jobs[10:]) < min(low)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1000), horizon=st.floats(60, 300), same_shape=st.booleans())
def test_two_busy_owners_get_equal_service_although_one_submits_a_hundred_times_the_jobs(seed, horizon, same_shape):
    rng = random.Random(seed)
    many = [SimJob(job_id=f"m{i}", shape=LONER, steps=5, arrives_at=0.0, owner="many") for i in range(1500)]
    few_shape, steps, number = (LONER, 500, 15) if same_shape else (CLIP, 50, 10)
    few = [
        SimJob(job_id=f"f{i}", shape=few_shape, steps=steps, arrives_at=rng.uniform(0, 1), owner="few")
        for i in range(number)
    ]
    config = SchedulerConfig(max_batch_size=1)
    outcome = simulate(Scheduler(config), many + few, max_batch_size=1, until=horizon)
    longest_s = max(job.alone_s for job in many + few)
    slack_s = max(config.fairness_slack_s, config.fairness_sizes * longest_s)
    difference_s = abs(outcome.service_s["many"] - outcome.service_s["few"])
    assert difference_s <= 1.1 * slack_s + 2 * CLIP.call_s


def test_two_owners_of_equal_jobs_are_never_further_apart_than_two_jobs():
    jobs = [SimJob(job_id=f"m{i}", shape=LONER, steps=25, arrives_at=0.0, owner="many") for i in range(1000)]
    jobs += [SimJob(job_id=f"f{i}", shape=LONER, steps=25, arrives_at=i * 2.2, owner="few") for i in range(40)]
    outcome = simulate(Scheduler(SchedulerConfig()), jobs, until=80.0)
    few_s = sum(job.alone_s for job in jobs[1000:1036])
    assert abs(outcome.service_s["few"] - few_s) <= 2 * jobs[0].alone_s  # all it asked for, which is just under half


def test_owner_who_idled_has_neither_credit_nor_debt():
    early = [SimJob(job_id=f"e{i}", shape=LONER, steps=25, arrives_at=0.0, owner="early") for i in range(400)]
    late = [SimJob(job_id=f"l{i}", shape=LONER, steps=25, arrives_at=200.0, owner="late") for i in range(400)]
    config = SchedulerConfig()
    outcome = simulate(Scheduler(config), early + late, until=280.0)
    late_s = outcome.service_s["late"]
    assert abs(late_s - 40.0) <= 2 * late[0].alone_s


def test_many_owners_with_one_job_each_share_with_one_who_has_many():
    crowd = [SimJob(job_id=f"c{i}", shape=LONER, steps=25, arrives_at=i * 4.0, owner=f"c{i}") for i in range(50)]
    hog = [SimJob(job_id=f"h{i}", shape=LONER, steps=25, arrives_at=0.0, owner="hog") for i in range(1000)]
    simulate(Scheduler(SchedulerConfig()), crowd + hog, until=210.0)
    waits = [job.latency_s / job.alone_s for job in crowd if job.finished_at is not None]
    assert len(waits) == 50
    assert max(waits) < 3.0


def test_newcomer_starts_at_once_when_all_places_are_taken_by_long_jobs():
    clips = [SimJob(job_id=f"clip{i}", shape=CLIP, steps=50, arrives_at=0.0) for i in range(20)]
    short = SimJob(job_id="short", shape=SMALL, steps=10, arrives_at=20.0)
    urgent = SimJob(job_id="urgent", shape=CLIP, steps=2, arrives_at=30.0, priority=5)
    config = SchedulerConfig(max_live_jobs=8, max_batch_size=1)
    simulate(Scheduler(config), [*clips, short, urgent], max_live_jobs=8, max_batch_size=1)
    assert short.started_at - short.arrives_at <= 2 * CLIP.call_s
    assert urgent.started_at - urgent.arrives_at <= 2 * CLIP.call_s
