"""What it costs to let short jobs pass a long one between two of its steps, and whether it changes any bit.

A clip runs alone, and short jobs run alone; then the same clip runs while each short job comes in the middle of it, one
after another, and passes it. The difference of the times, over the number of short jobs, is what passing and coming
back costs. Pixels are compared bit for bit. Calls do not share passes here (that would be a gain, not a cost), and
encoders and decoders run in their turn. Medians of several runs, each of which measures all three.

`python benchmarks/preempt.py` on a GPU; `--tiny` runs the same code on a CPU, to see that it works. Writes JSON to
`benchmarks/results/`.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path

import torch
from one_model import ROOT, Served, Sort, machine

LONG = Sort(name="clip", width=832, height=480, frames=17, steps=(30, 30))
SHORT = Sort(name="short", width=512, height=512, frames=1, steps=(4, 4))
TINY_LONG = Sort(name="clip", width=64, height=64, frames=9, steps=(40, 40))
TINY_SHORT = Sort(name="short", width=32, height=32, frames=1, steps=(2, 2))
NUM_SHORT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda:0")
    long, short = (TINY_LONG, TINY_SHORT) if chosen.tiny else (LONG, SHORT)
    clip = long.request("clip", long.steps[0], 0)
    passing = [short.request(f"short-{i}", short.steps[0], i) for i in range(NUM_SHORT)]
    costs_ms, switches, equal = [], [], True
    with tempfile.TemporaryDirectory() as folder:
        model = Served(Path(folder), tiny=chosen.tiny, device=device, side_stream=False)
        worker = model.new_worker(max_batch_size=1)
        for sort in (long, short):
            model.alone_s(worker, sort, runs=1)
        for _ in range(chosen.runs):
            alone = model.run(worker, [(0.0, clip)], keep=True)
            each = [model.run(worker, [(0.0, one)], keep=True) for one in passing]
            gap_s = alone.busy_s / (NUM_SHORT + 2)
            short_s = statistics.median(one.busy_s for one in each)
            # The n-th one comes when the clip has run n gaps, and those before it have passed.
            arrivals = [(0.0, clip), *((gap_s + i * (gap_s + short_s), one) for i, one in enumerate(passing))]
            mixed = model.run(worker, arrivals, keep=True)
            costs_ms.append(1000 * (mixed.busy_s - alone.busy_s - sum(one.busy_s for one in each)) / NUM_SHORT)
            pairs = zip(mixed.jobs_of_passes, mixed.jobs_of_passes[1:], strict=False)
            switches.append(sum(first != second for first, second in pairs))
            pixels = alone.pixels | {job_id: drawn for one in each for job_id, drawn in one.pixels.items()}
            equal = equal and mixed.pixels == pixels
            assert mixed.done_at_s["clip"] > mixed.done_at_s[passing[-1].job_id], "the last one came after the clip"
    result = {
        "workload": f"{NUM_SHORT} jobs of {short.width}x{short.height} in {short.steps[0]} steps pass one of "
        f"{long.width}x{long.height}, {long.frames} frames, {long.steps[0]} steps; Wan2.1-T2V-1.3B, guided",
        **machine(device),
        "ms_for_passing_and_coming_back": {"median": statistics.median(costs_ms), "all": costs_ms},
        "switches": switches,
        "bits_are_equal": equal,
        "clip_alone_s": alone.busy_s,
        "short_alone_s": short_s,
    }
    text = json.dumps(result, indent=1)
    kind = "tiny" if chosen.tiny else str(result["device"]).split()[1].lower()
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{datetime.date.today()}-preempt-{kind}.json").write_text(text + "\n")
    print(text)
    if not equal:
        raise SystemExit("passing has changed bits")


if __name__ == "__main__":
    main()
