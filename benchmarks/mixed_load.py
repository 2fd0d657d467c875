"""A mixed load on one model: what short jobs wait for, ours against first-in-first-out, by the same worker.

70 % pictures of 512 px in 8 to 20 steps, 25 % pictures of 1024 px in 28, 5 % clips of 832x480, all guided and drawn by
Wan2.1-T2V-1.3B (real architecture, random weights), Poisson at 70 % of capacity. So that it ends within four minutes a
clip has 17 frames in 20 steps here; alone it takes as long as about five short jobs on an H100. Capacity is told from
what each sort takes alone, measured first. Every policy gets the same jobs at the same times:

- one at a time, in the order of arrival (what servers without step-level scheduling do);
- ours with encoders and decoders in their turn;
- ours with them beside others' steps.

`python benchmarks/mixed_load.py` on a GPU; `--tiny` runs the same code on a CPU, to see that it works. Writes JSON to
`benchmarks/results/`.
"""

import argparse
import datetime
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch
from one_model import ROOT, Outcome, Served, Sort, machine

from photogram.core.request import GenerateRequest

LOAD = 0.7
SHARES = (70, 25, 5)
SORTS = (
    Sort(name="short", width=512, height=512, frames=1, steps=(8, 20)),
    Sort(name="large", width=1024, height=1024, frames=1, steps=(28, 28)),
    Sort(name="clip", width=832, height=480, frames=17, steps=(20, 20)),
)
TINY = (
    Sort(name="short", width=32, height=32, frames=1, steps=(2, 4)),
    Sort(name="large", width=64, height=64, frames=1, steps=(4, 4)),
    Sort(name="clip", width=64, height=32, frames=5, steps=(6, 6)),
)


def trace(sorts: tuple[Sort, ...], alone_s: list[float], seconds: float) -> list[tuple[float, Sort, GenerateRequest]]:
    """Jobs of a Poisson process that takes about `seconds`, with 1.5 clips in 30 at least."""
    rng = random.Random(0)
    mean_s = sum(share * taken for share, taken in zip(SHARES, alone_s, strict=True)) / sum(SHARES)
    count = max(10, round(seconds * LOAD / mean_s))
    found, now = [], 0.0
    drawn = [sort for sort, share in zip(sorts, SHARES, strict=True) for _ in range(max(1, round(count * share / 100)))]
    rng.shuffle(drawn)
    for number, sort in enumerate(drawn):
        now += rng.expovariate(LOAD / mean_s)
        found.append((now, sort, sort.request(f"{sort.name}-{number}", rng.randint(*sort.steps), number)))
    return found


def figures(jobs: list[tuple[float, Sort, GenerateRequest]], outcome: Outcome, alone_s: dict[str, float]) -> dict:
    latencies: dict[str, list[float]] = {}
    for arrived, sort, request in jobs:
        latencies.setdefault(sort.name, []).append(outcome.done_at_s[request.job_id] - arrived)
    return {
        "busy_s": outcome.busy_s,
        "makespan_s": max(outcome.done_at_s.values()),
        "sorts": {
            name: {
                "count": len(taken),
                "mean_s": statistics.mean(taken),
                "p95_s": sorted(taken)[min(len(taken) - 1, int(0.95 * len(taken)))],
                "p95_in_times_alone": sorted(taken)[min(len(taken) - 1, int(0.95 * len(taken)))] / alone_s[name],
            }
            for name, taken in latencies.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    parser.add_argument("--seconds", type=float, default=55.0, help="of arrivals, for each of the three policies")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda:0")
    sorts = TINY if chosen.tiny else SORTS
    with tempfile.TemporaryDirectory() as folder:
        model = Served(Path(folder), tiny=chosen.tiny, device=device, side_stream=True)
        learned = model.new_worker()
        alone_s = {sort.name: model.alone_s(learned, sort) for sort in sorts}
        jobs = trace(sorts, list(alone_s.values()), chosen.seconds)
        arrivals = [(arrived, request) for arrived, _, request in jobs]
        twins = {name: module.may_be_beside for name, module in model.served.modules.items()}
        found = {}
        for policy in ("one at a time", "ours, in turn", "ours"):
            for name, module in model.served.modules.items():
                module.may_be_beside = twins[name] and policy == "ours"
            changes = {"order": "fifo", "max_live_jobs": 1, "max_batch_size": 1} if policy == "one at a time" else {}
            worker = model.new_worker(**changes)
            worker.stacker = learned.stacker
            worker._passes = learned._passes
            for sort in sorts:  # prices are known, as they are after the first jobs of a server's life
                model.alone_s(worker, sort, runs=1)
            found[policy] = figures(jobs, model.run(worker, arrivals), alone_s)
    base = found["one at a time"]
    result = {
        "workload": f"{len(jobs)} jobs at {LOAD:.0%} of capacity, Wan2.1-T2V-1.3B, guided",
        **machine(device),
        "tuning": model.served.card.tuning,
        "alone_s": alone_s,
        "policies": found,
        "against_one_at_a_time": {
            name: {
                "clips_mean": one["sorts"]["clip"]["mean_s"] / base["sorts"]["clip"]["mean_s"],
                "work_done_per_busy_second": base["busy_s"] / one["busy_s"],
            }
            for name, one in found.items()
        },
    }
    text = json.dumps(result, indent=1)
    kind = "tiny" if chosen.tiny else str(result["device"]).split()[1].lower()
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{datetime.date.today()}-mixed-load-{kind}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
