"""What holds of every plan whatever arrives: `simulate` asserts it, hypothesis looks for the counterexample."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scheduler.shapes import CLIP, LONER, MIDDLE, SMALL
from tests.scheduler.simulator import SimJob, simulate

from photogram.scheduler import JobTicket, Scheduler, SchedulerConfig

TIMES = st.floats(0, 20, allow_nan=False)


@st.composite
def sim_jobs(draw) -> list[SimJob]:
    beside, has_twin = draw(st.booleans()), draw(st.booleans())
    return [
        SimJob(
            job_id=f"job-{number}",
            shape=replace(draw(st.sampled_from([SMALL, MIDDLE, CLIP, LONER])), beside=beside, has_twin=has_twin),
            steps=draw(st.integers(1, 12)),
            arrives_at=draw(TIMES),
            owner=draw(st.sampled_from("abc")),
            priority=draw(st.integers(-10, 10)),
            cancel_at=draw(st.none() | TIMES),
        )
        for number in range(draw(st.integers(1, 25)))
    ]


@settings(max_examples=150, deadline=None)
@given(
    jobs=sim_jobs(),
    max_batch_size=st.integers(1, 8),
    max_live_jobs=st.integers(1, 12),
    noise=st.sampled_from([0.0, 0.5]),
    order=st.sampled_from(["fair", "fifo"]),
)
def test_every_job_that_is_not_cancelled_finishes_and_every_plan_is_sound(
    jobs, max_batch_size, max_live_jobs, noise, order
):
    scheduler = Scheduler(SchedulerConfig(order=order, max_batch_size=max_batch_size, max_live_jobs=max_live_jobs))
    simulate(scheduler, jobs, max_batch_size=max_batch_size, max_live_jobs=max_live_jobs, noise=noise, ask_eta_every=3)
    for job in jobs:
        assert (job.finished_at is None) == (job.cancelled_at is not None)
    assert scheduler.next_plan(1e6) is None


def test_cancelled_job_is_unknown_in_every_state():
    scheduler = Scheduler(SchedulerConfig())
    ticket = JobTicket(job_id="a", owner="o", arrived_at=0.0, expected_steps=4, size_hint=1.0)
    scheduler.submit(ticket, 0.0)
    assert scheduler.cancel("a")
    assert not scheduler.cancel("a")
    assert scheduler.next_plan(0.0) is None
    scheduler.submit(ticket, 0.0)
    plan = scheduler.next_plan(0.0)
    assert scheduler.cancel("a")
    assert scheduler.ran(plan, 0.1, 0.1) == ()
    with pytest.raises(KeyError):
        scheduler.stepped("a", 1, 4)


def test_plans_of_equal_histories_are_equal():
    def plans() -> list[float | None]:
        jobs = [
            SimJob(job_id=str(i), shape=(SMALL, CLIP, MIDDLE)[i % 3], steps=3 + i % 5, arrives_at=i * 0.1)
            for i in range(20)
        ]
        simulate(Scheduler(SchedulerConfig()), jobs)
        return [job.finished_at for job in jobs]

    assert plans() == plans()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_batch_size", 0),
        ("max_live_jobs", 0),
        ("reserved_jobs", 32),
        ("memory_bytes", 0),
        ("fairness_slack_s", 0.0),
        ("ageing_s", float("nan")),
        ("bias", 1.5),
        ("stickiness", 0.5),
        ("early_burst_s", -1.0),
    ],
)
def test_setting_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=setting):
        SchedulerConfig(**{setting: value})


@pytest.mark.parametrize(
    ("field", "value"), [("priority", 11), ("priority", -11), ("size_hint", 0.0), ("expected_steps", -1)]
)
def test_ticket_out_of_range_is_refused_by_name(field, value):
    good = {"job_id": "a", "owner": "o", "arrived_at": 0.0, "expected_steps": 4, "size_hint": 1.0}
    with pytest.raises(ValueError, match=field):
        JobTicket(**{**good, field: value})


def test_job_is_submitted_once_and_not_from_the_future():
    scheduler = Scheduler(SchedulerConfig())
    ticket = JobTicket(job_id="a", owner="o", arrived_at=1.0, expected_steps=4, size_hint=1.0)
    with pytest.raises(ValueError, match="after now"):
        scheduler.submit(ticket, 0.5)
    scheduler.submit(ticket, 1.0)
    with pytest.raises(ValueError, match="already"):
        scheduler.submit(ticket, 1.0)
