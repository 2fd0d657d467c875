"""Which calls share a forward pass, and what happens when memory does not allow it."""

from __future__ import annotations

import math

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tests.scheduler.shapes import MIDDLE, SMALL
from tests.scheduler.simulator import Fifo, Shape, SimJob, simulate

from photogram.scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig, Start


def at_denoise(
    scheduler: Scheduler, job_ids: list[str], *, key: str | None = "k", bytes_per_call=None, **ticket
) -> None:
    """Bring jobs to a denoiser call."""
    for job_id in job_ids:
        fields = {"owner": "o", "arrived_at": 0.0, "expected_steps": 10, "size_hint": 1.0, **ticket}
        scheduler.submit(JobTicket(job_id=job_id, **fields), 0.0)
    for _ in job_ids:
        plan = scheduler.next_plan(0.0)
        assert isinstance(plan, Start)
    for job_id in job_ids:
        again(scheduler, job_id, key=key, bytes_per_call=bytes_per_call)


def again(scheduler: Scheduler, job_id: str, *, key: str | None = "k", bytes_per_call=None) -> None:
    call = PendingCall(key=key, kind="denoiser", phase="denoise", bytes_per_call=bytes_per_call)
    scheduler.waiting(job_id, call, 0.0)


def test_four_pictures_of_one_request_run_as_batches_of_four_and_count_to_one_owner():
    jobs = [SimJob(job_id=str(i), shape=SMALL, steps=10, arrives_at=0.0) for i in range(4)]
    outcome = simulate(Scheduler(SchedulerConfig()), jobs)
    assert outcome.batch_sizes == [4] * 12
    assert outcome.service_s["owner"] == pytest.approx(outcome.busy_s)


def test_newcomer_joins_a_running_batch():
    jobs = [SimJob(job_id=str(i), shape=MIDDLE, steps=20, arrives_at=i * 0.5) for i in range(3)]
    outcome = simulate(Scheduler(SchedulerConfig()), jobs)
    assert 2 in outcome.batch_sizes
    assert 3 in outcome.batch_sizes


def test_jobs_of_different_owners_and_priorities_share_a_pass():
    scheduler = Scheduler(SchedulerConfig())
    at_denoise(scheduler, ["a"], owner="one", priority=3)
    scheduler.submit(
        JobTicket(job_id="b", owner="two", priority=-3, arrived_at=0.0, expected_steps=10, size_hint=1.0), 0.0
    )
    first = scheduler.next_plan(0.0)
    assert first == Run(("a",), "denoiser", "denoise")
    scheduler.ran(first, 0.1, 0.1)
    assert scheduler.next_plan(0.1) == Start("b")
    again(scheduler, "b")
    again(scheduler, "a")
    assert scheduler.next_plan(0.1) == Run(("a", "b"), "denoiser", "denoise")


def test_call_without_a_key_runs_alone():
    scheduler = Scheduler(SchedulerConfig())
    at_denoise(scheduler, ["a", "b"], key=None)
    assert scheduler.next_plan(0.0).job_ids == ("a",)


def test_job_that_is_not_batchable_runs_alone_even_with_a_key():
    scheduler = Scheduler(SchedulerConfig())
    at_denoise(scheduler, ["a", "b"], batchable=False)
    assert scheduler.next_plan(0.0).job_ids == ("a",)


def test_memory_bound_limits_the_batch_and_never_the_lone_call():
    scheduler = Scheduler(SchedulerConfig(memory_bytes=100))
    at_denoise(scheduler, list("abcd"), bytes_per_call=40)
    assert scheduler.next_plan(0.0).job_ids == ("a", "b")
    scheduler = Scheduler(SchedulerConfig(memory_bytes=100))
    at_denoise(scheduler, list("abcd"), bytes_per_call=400)
    assert scheduler.next_plan(0.0).job_ids == ("a",)


def test_memory_of_a_call_is_learned_from_the_measured_peak():
    scheduler = Scheduler(SchedulerConfig(memory_bytes=100))
    at_denoise(scheduler, list("abcd"))
    plan = scheduler.next_plan(0.0)
    assert len(plan.job_ids) == 4
    scheduler.ran(plan, 0.1, 0.1, peak_bytes=200)
    for job_id in plan.job_ids:
        again(scheduler, job_id)
    assert len(scheduler.next_plan(0.1).job_ids) == 2


def test_out_of_memory_halves_the_batch_retries_every_job_and_recovers():
    scheduler = Scheduler(SchedulerConfig(max_batch_size=8))
    ids = list("abcdefgh")
    at_denoise(scheduler, ids)
    sizes, now = [], 0.0
    for _ in range(400):
        plan = scheduler.next_plan(now)
        sizes.append(len(plan.job_ids))
        fits = len(plan.job_ids) <= 3 or now > 20
        # A pass takes the same time however many share it: batching always pays.
        now += 0.1
        assert scheduler.ran(plan, 0.1, now, out_of_memory=not fits) == ()
        if fits:
            for job_id in plan.job_ids:
                again(scheduler, job_id)
    assert sizes[:3] == [8, 4, 2]
    assert 3 in sizes
    assert sizes.count(4) >= 2  # it tried again, and again after the next halving
    assert sizes[-1] == 8


def test_lone_call_that_does_not_fit_fails_that_job_and_the_next_one_runs():
    scheduler = Scheduler(SchedulerConfig())
    at_denoise(scheduler, ["a", "b"], key=None)
    plan = scheduler.next_plan(0.0)
    assert scheduler.ran(plan, 0.1, 0.1, out_of_memory=True) == ("a",)
    scheduler.cancel("a")
    assert scheduler.next_plan(0.1).job_ids == ("b",)


def test_batching_that_saves_nothing_is_given_up_and_tried_again_now_and_then():
    full = Shape(name="full", size_hint=1.0, call_s=0.5, marginal=1.0)
    jobs = [SimJob(job_id=str(i), shape=full, steps=100, arrives_at=0.0) for i in range(2)]
    jobs[1].arrives_at = 5.0  # so that the price of a lone call is known
    sizes = simulate(Scheduler(SchedulerConfig()), jobs).batch_sizes
    assert 2 <= sizes.count(2) <= 12


def test_batching_is_never_slower_in_total_than_one_at_a_time():
    def jobs() -> list[SimJob]:
        return [
            SimJob(job_id=str(i), shape=(SMALL, MIDDLE)[i % 2], steps=5 + i % 9, arrives_at=i * 0.02) for i in range(60)
        ]

    ours, fifo = simulate(Scheduler(SchedulerConfig()), jobs()), simulate(Fifo(), jobs(), max_live_jobs=1)
    batching_fifo = simulate(Fifo(max_batch_size=8), jobs())
    assert ours.ends_at <= 0.7 * fifo.ends_at
    assert ours.ends_at <= batching_fifo.ends_at / 0.97


def test_encode_calls_go_early_but_cannot_stall_running_jobs():
    slow_encoder = Shape(name="prompted", size_hint=1.0, call_s=0.05, encode_s=0.2, marginal=0.5, calls_per_step=1)
    runner = SimJob(job_id="runner", shape=slow_encoder, steps=40, arrives_at=0.0, owner="runner")
    crowd = [
        SimJob(job_id=f"c{i}", shape=Shape(**{**vars_of(slow_encoder), "name": f"n{i}"}), steps=40, arrives_at=0.5)
        for i in range(30)
    ]
    simulate(Scheduler(SchedulerConfig()), [runner, *crowd])
    # 31 encoders would take 6 s; the budget lets by half a second and a fifth of the time.
    assert runner.latency_s < 4.5


def vars_of(shape: Shape) -> dict:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def test_calls_like_the_last_one_are_preferred_when_ranks_are_nearly_equal():
    scheduler = Scheduler(SchedulerConfig(max_batch_size=1))
    at_denoise(scheduler, ["a", "b"], key="x", expected_steps=1000, size_hint=1e6)
    first = scheduler.next_plan(0.0)
    assert first.job_ids == ("a",)
    scheduler.ran(first, 0.1, 0.1)
    ticket = JobTicket(job_id="c", owner="o", arrived_at=0.0, expected_steps=900, size_hint=1e6)
    scheduler.submit(ticket, 0.1)
    assert scheduler.next_plan(0.1) == Start("c")
    again(scheduler, "c", key="y")
    # c is a little shorter, but another key (another LoRA set, say) would have to be switched to.
    assert scheduler.next_plan(0.1).job_ids == ("b",)


def test_passes_may_be_reported_after_their_jobs_went_on():
    """On a GPU the worker launches ahead: the jobs are at their next calls before the seconds are known."""
    scheduler = Scheduler(SchedulerConfig())
    at_denoise(scheduler, ["a", "b"])
    plan = scheduler.next_plan(0.0)
    for step in range(1, 5):
        for job_id in plan.job_ids:
            scheduler.stepped(job_id, step, 5)
            again(scheduler, job_id)
        following = scheduler.next_plan(0.1 * step)
        assert following.job_ids == ("a", "b")
        scheduler.ran(plan, 0.1, 0.1 * step)
        plan = following
    for job_id in plan.job_ids:
        scheduler.stepped(job_id, 5, 5)
        scheduler.finished(job_id, 0.5)
    scheduler.ran(plan, 0.1, 0.5)
    assert scheduler.next_plan(0.5) is None
    scheduler.submit(JobTicket(job_id="c", owner="o", arrived_at=0.5, expected_steps=5, size_hint=1.0), 0.5)
    # A batch of two took 0.1 s; no lone call was seen, so half of that is taken not to depend on the batch.
    assert scheduler.eta_s("c", 0.5) == pytest.approx(5 * 0.075 / 1.5, rel=0.6)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    many=st.integers(20, 60),
    marginal=st.sampled_from([0.3, 0.6, 1.0]),
    steps=st.integers(10, 30),
    max_batch_size=st.sampled_from([2, 4, 8]),
    arrives_at=st.floats(0, 5),
)
@example(many=50, marginal=0.6, steps=20, max_batch_size=8, arrives_at=0.5)
def test_an_owner_of_few_jobs_gets_its_share_of_shared_passes(many, marginal, steps, max_batch_size, arrives_at):
    """Places in a pass go to owners by what they have had, not by how many jobs they have waiting."""
    shape = Shape(name="clip", size_hint=1e6, call_s=0.2, marginal=marginal, encode_s=0.05, decode_s=0.3)
    crowd = [SimJob(job_id=f"m{i}", shape=shape, steps=steps, arrives_at=0.0, owner="many") for i in range(many)]
    few = [SimJob(job_id=f"f{i}", shape=shape, steps=steps, arrives_at=arrives_at, owner="few") for i in range(5)]
    config = SchedulerConfig(max_batch_size=max_batch_size)
    simulate(Scheduler(config), crowd + few, max_batch_size=max_batch_size)
    num = max_batch_size
    longest_pass_s = shape.call_s * (1 + (num - 1) * marginal)
    batch_s = steps * shape.calls_per_step * longest_pass_s + num * (shape.encode_s + shape.decode_s)
    # Half of the places are enough for five jobs in so many batches; one more was on its way when they came, and what
    # an owner may lag behind comes on top.
    num_batches = math.ceil(2 * len(few) / num)
    slack_s = max(config.fairness_slack_s, config.fairness_sizes * crowd[0].alone_s)
    assert max(job.latency_s for job in few) <= (num_batches + 1) * batch_s + slack_s


def test_places_of_a_pass_even_out_between_owners_with_work():
    scheduler = Scheduler(SchedulerConfig(max_batch_size=4))
    at_denoise(scheduler, [f"many{i}" for i in range(9)], owner="many")
    at_denoise(scheduler, [f"few{i}" for i in range(3)], owner="few")
    places = {"many": 0, "few": 0}
    for _ in range(20):
        plan = scheduler.next_plan(0.0)
        assert isinstance(plan, Run)
        assert len(plan.job_ids) == 4
        assert scheduler.ran(plan, 1.0, 0.0) == ()
        for job_id in plan.job_ids:
            places[job_id.rstrip("0123456789")] += 1
            again(scheduler, job_id)
    assert abs(places["many"] - places["few"]) <= 4


def test_jobs_about_to_be_done_ride_first_within_an_owner():
    """Filling passes by owners leaves the order of one owner's own jobs as it is."""
    scheduler = Scheduler(SchedulerConfig(max_batch_size=2))
    at_denoise(scheduler, ["long", "short", "middle"], owner="one")
    at_denoise(scheduler, ["other"], owner="other")
    plan = scheduler.next_plan(0.0)
    scheduler.ran(plan, 0.2, 0.0)
    for job_id in plan.job_ids:
        again(scheduler, job_id)
    for job_id, step in (("long", 1), ("short", 8), ("middle", 4), ("other", 2)):
        scheduler.stepped(job_id, step, 10)
    rode = []
    for _ in range(4):
        plan = scheduler.next_plan(0.0)
        rode += [job_id for job_id in plan.job_ids if job_id != "other"]
        scheduler.ran(plan, 0.2, 0.0)
        for job_id in plan.job_ids:
            again(scheduler, job_id)
    assert rode[0] == "short"
    assert "long" not in rode
