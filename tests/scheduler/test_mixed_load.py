"""The mixed workload: 70 % small pictures of 8 to 20 steps, 25 % large ones of 28, 5 % clips, Poisson at 70 % load.

The prices are those of one GPU for a 1.3B model (Wan 2.1 at 832x480x81: 0.48 s a call). The numbers are printed:
`pytest -s tests/scheduler/test_mixed_load.py`.

What bounds the clips: whoever lets the shorter jobs pass stretches a long one by 1 / (1 - their load) against
first-in-first-out one at a time (M/G/1 with pre-emptive priorities), here about 1.16, unless batching wins it back.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
from tests.scheduler.simulator import Fifo, Outcome, Shape, SimJob, mean, percentile, simulate

from photogram.scheduler import Scheduler, SchedulerConfig

SHORT = Shape(name="short", size_hint=512 * 512, call_s=0.008, marginal=0.7)
MEDIUM = Shape(name="medium", size_hint=1024 * 1024, call_s=0.027, decode_s=0.08, marginal=0.9)
LONG = Shape(name="long", size_hint=832 * 480 * 81, call_s=0.48, decode_s=0.8, marginal=1.0)
LOAD = 0.7


def workload(seed: int, num_owners: int, num_jobs: int = 1000) -> list[SimJob]:
    rng = random.Random(seed)
    jobs = []
    for number in range(num_jobs):
        shape = rng.choices([SHORT, MEDIUM, LONG], [70, 25, 5])[0]
        steps = {"short": rng.randint(8, 20), "medium": 28, "long": 50}[shape.name]
        owner = f"owner-{rng.randrange(num_owners)}"
        jobs.append(SimJob(job_id=str(number), shape=shape, steps=steps, arrives_at=0.0, owner=owner))
    gap_s = mean([job.alone_s for job in jobs]) / LOAD
    now = 0.0
    for job in jobs:
        now += rng.expovariate(1 / gap_s)
        job.arrives_at = now
    return jobs


def latencies(outcomes: list[Outcome], name: str) -> list[float]:
    return [job.latency_s for outcome in outcomes for job in outcome.of(name)]


@pytest.mark.parametrize("num_owners", [1, 20])
def test_short_jobs_are_quick_and_long_ones_hardly_later_than_first_in_first_out(num_owners):
    loads = [workload(seed, num_owners) for seed in range(4)]
    runs: dict[str, list[Outcome]] = {"one at a time": [], "fifo, batching": [], "ours": []}
    for load in loads:
        runs["one at a time"].append(simulate(Fifo(), copied(load), max_live_jobs=1))
        runs["fifo, batching"].append(simulate(Fifo(max_batch_size=8), copied(load)))
        runs["ours"].append(simulate(Scheduler(SchedulerConfig()), copied(load)))
    for name, outcomes in runs.items():
        figures = []
        for size in ("short", "medium", "long"):
            taken_s = latencies(outcomes, size)
            figures.append(f"{size} mean {mean(taken_s):6.2f} s p95 {percentile(taken_s, 0.95):6.2f} s")
        busy_s = sum(outcome.busy_s for outcome in outcomes)
        print(f"{num_owners:2d} owners, {name:14s}: {'; '.join(figures)}; busy {busy_s:.0f} s")

    alone_s = mean([job.alone_s for load in loads for job in load if job.shape is SHORT])
    short_stretch = percentile(latencies(runs["ours"], "short"), 0.95) / alone_s
    long_s = mean(latencies(runs["ours"], "long"))
    against_batching = long_s / mean(latencies(runs["fifo, batching"], "long"))
    against_alone = long_s / mean(latencies(runs["one at a time"], "long"))
    shorter = sum(job.alone_s for load in loads for job in load if job.shape is not LONG)
    share = shorter / sum(job.alone_s for load in loads for job in load)
    floor = 1 / (1 - LOAD * share)
    print(
        f"short p95 {short_stretch:.2f}x alone; long mean {against_batching:.3f}x of batching fifo, "
        f"{against_alone:.3f}x of one at a time (bound of any overtaking: {floor:.3f})"
    )
    assert short_stretch <= 3.0
    assert against_batching <= 1.15
    assert against_alone <= floor * 1.03
    assert sum(o.busy_s for o in runs["ours"]) <= sum(o.busy_s for o in runs["one at a time"]) / 0.97


def copied(jobs: list[SimJob]) -> list[SimJob]:
    return [dataclasses.replace(job) for job in jobs]


def test_work_done_under_overload_is_that_of_batching_first_in_first_out():
    """All jobs at once: the time to the last one is the total work."""
    jobs = [dataclasses.replace(job, arrives_at=0.0) for job in workload(9, 5, 300)]
    ours = simulate(Scheduler(SchedulerConfig()), copied(jobs))
    fifo = simulate(Fifo(max_batch_size=8), copied(jobs))
    print(f"overload: ours {ours.ends_at:.0f} s, batching fifo {fifo.ends_at:.0f} s")
    assert ours.ends_at <= fifo.ends_at / 0.97
