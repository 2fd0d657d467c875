"""Calls of encoders and decoders beside the passes of denoisers: which, when, and what it is good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.scheduler.shapes import CLIP, SMALL
from tests.scheduler.simulator import SimJob, percentile, simulate

from photogram.scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig, Start

STEP = PendingCall(key=None, kind="denoiser", phase="denoise", module="denoiser")
DECODE = PendingCall(key=None, kind="decoder", phase="decode", module="decoder", may_be_beside=True)
ENCODE = PendingCall(key=None, kind="encoder", phase="encode", module="encoder", may_be_beside=True)
GB = 10**9


class Desk:
    """A scheduler and the jobs at it."""

    def __init__(self, **config) -> None:
        self.scheduler = Scheduler(SchedulerConfig(**config))

    def at(self, job_id: str, call: PendingCall, owner: str = "owner") -> None:
        """Bring a new job to a call."""
        ticket = JobTicket(job_id=job_id, owner=owner, arrived_at=0.0, expected_steps=4, size_hint=1.0)
        self.scheduler.submit(ticket, 0.0)
        plan = self.next()
        assert plan == Start(job_id)
        self.scheduler.ran(plan, 0.0, 0.0)
        self.scheduler.waiting(job_id, call, 0.0)

    def next(self):
        return self.scheduler.next_plan(0.0)

    def learn(self, call: PendingCall, seconds: float = 1.0, peak_bytes: int | None = None) -> None:
        """Have a job make this call and nothing else, by itself."""
        self.at("known", call)
        plan = self.next()
        assert not plan.beside
        self.scheduler.ran(plan, seconds, 0.0, peak_bytes=peak_bytes)
        self.scheduler.cancel("known")


def test_a_known_decoder_runs_beside_others_steps_which_go_on():
    desk = Desk()
    desk.learn(DECODE)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    beside = desk.next()
    assert beside == Run(("short",), "decoder", "decode", beside=True)
    step = desk.next()
    assert step == Run(("long",), "denoiser", "denoise")
    desk.scheduler.ran(step, 1.0, 0.0)
    desk.scheduler.waiting("long", STEP, 0.0)
    assert desk.next() == step
    desk.scheduler.ran(beside, 1.0, 0.0)
    desk.scheduler.finished("short", 0.0)


@pytest.mark.parametrize(("decode_s", "beside"), [(1.0, True), (0.05, False)])
def test_a_job_that_is_by_itself_leaves_room_for_newcomers_only_in_long_calls(decode_s, beside):
    desk = Desk()
    desk.learn(DECODE, decode_s)
    desk.at("alone", DECODE)
    assert desk.next() == Run(("alone",), "decoder", "decode", beside=beside)


def test_what_has_never_run_is_not_run_beside_others_for_the_first_time():
    desk = Desk()
    desk.at("long", STEP)
    desk.at("short", DECODE)
    assert desk.next() == Run(("short",), "decoder", "decode")


def test_calls_of_the_network_that_runs_beside_wait_for_it_and_those_of_others_do_not():
    desk = Desk()
    desk.learn(DECODE)
    desk.learn(ENCODE, 0.1)
    for job_id, call in (("long", STEP), ("first", DECODE), ("second", DECODE), ("newcomer", ENCODE)):
        desk.at(job_id, call)
        if job_id == "first":
            assert desk.next().beside
    plans = [desk.next(), desk.next()]
    assert {plan.job_ids[0] for plan in plans} == {"newcomer", "long"}
    assert not any(plan.beside for plan in plans)
    assert desk.next() is None
    desk.scheduler.ran(Run(("first",), "decoder", "decode", beside=True), 1.0, 0.0)
    assert desk.next().job_ids == ("second",)


def test_calls_of_a_network_that_has_a_twin_run_in_their_turn_meanwhile():
    desk = Desk()
    decode = replace(DECODE, has_twin=True)
    desk.learn(decode)
    desk.at("long", STEP)
    desk.at("first", decode)
    assert desk.next().beside
    desk.at("second", decode)
    assert desk.next() == Run(("second",), "decoder", "decode")


@pytest.mark.parametrize(("step_s", "beside"), [(0.2, True), (0.9, False)])
def test_a_call_that_is_hardly_longer_than_a_step_of_the_others_runs_in_its_turn(step_s, beside):
    desk = Desk()
    desk.learn(DECODE, 1.0)
    desk.learn(STEP, step_s)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    plan = desk.next()
    assert plan.job_ids == ("short",)
    assert plan.beside == beside


@pytest.mark.parametrize(("memory_gb", "beside"), [(6, False), (9, True)])
def test_the_memory_of_both_must_be_there(memory_gb, beside):
    desk = Desk(memory_bytes=memory_gb * GB)
    desk.learn(DECODE, peak_bytes=5 * GB)
    desk.learn(STEP, 0.25, peak_bytes=3 * GB)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    assert desk.next().beside == beside


def test_a_batch_is_no_larger_than_what_the_call_beside_it_leaves_room_for():
    desk = Desk(memory_bytes=8 * GB, max_batch_size=8)
    step = replace(STEP, key="steps")
    desk.learn(DECODE, peak_bytes=5 * GB)
    desk.learn(step, 0.25, peak_bytes=1 * GB)
    for number in range(5):
        desk.at(f"long-{number}", step)
    assert len(desk.next().job_ids) == 5
    for number in range(5, 10):
        desk.at(f"long-{number}", step)
    desk.at("short", DECODE)
    assert desk.next().beside
    assert len(desk.next().job_ids) == 3


@pytest.mark.parametrize("which", ["beside", "step"])
def test_where_two_did_not_fit_both_are_planned_again_and_never_again_at_once(which):
    desk = Desk()
    desk.learn(DECODE)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    beside, step = desk.next(), desk.next()
    first, second = (beside, step) if which == "beside" else (step, beside)
    assert desk.scheduler.ran(first, 0.5, 0.0, out_of_memory=True) == ()
    assert desk.scheduler.ran(second, 0.5, 0.0, out_of_memory=False) == ()
    desk.scheduler.waiting(second.job_ids[0], STEP if second is step else DECODE, 0.0)
    assert {desk.next().job_ids[0], desk.next().job_ids[0]} == {"long", "short"}
    desk.scheduler.cancel("long")
    desk.scheduler.cancel("short")
    desk.at("long again", STEP)
    desk.at("short again", DECODE)
    assert not desk.next().beside


def test_prices_are_not_learned_of_calls_that_shared_the_device():
    desk = Desk()
    desk.learn(DECODE, 1.0)
    desk.learn(STEP, 0.25)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    beside, step = desk.next(), desk.next()
    desk.scheduler.ran(step, 0.5, 0.0)
    desk.scheduler.ran(beside, 4.0, 0.0)
    assert desk.scheduler.expected_s(step) == 0.25
    assert desk.scheduler.expected_s(beside) == 1.0


def test_what_is_cancelled_beside_others_leaves_its_place():
    desk = Desk()
    desk.learn(DECODE)
    desk.at("long", STEP)
    desk.at("short", DECODE)
    beside = desk.next()
    assert desk.scheduler.cancel("short")
    desk.at("next", DECODE)
    assert desk.next().job_ids == ("long",)
    assert desk.next() is None
    assert desk.scheduler.ran(beside, 1.0, 0.0) == ()
    assert desk.next().job_ids == ("next",)


def test_short_jobs_do_not_wait_for_clips_to_be_decoded():
    """Though the device does no more in the same time: each of two calls runs at half its speed."""

    def p95(beside: bool) -> float:
        clip = replace(CLIP, decode_s=2.0, beside=beside)
        small = replace(SMALL, beside=beside)
        jobs = [SimJob(job_id=f"clip-{i}", shape=clip, steps=4, arrives_at=14.0 * i) for i in range(12)]
        jobs += [SimJob(job_id=f"small-{i}", shape=small, steps=8, arrives_at=0.31 * i) for i in range(500)]
        outcome = simulate(Scheduler(SchedulerConfig()), jobs)
        assert (outcome.num_beside > 0) == beside
        return percentile([job.latency_s for job in outcome.of(SMALL.name)], 0.95)

    assert p95(True) < 0.7 * p95(False)
