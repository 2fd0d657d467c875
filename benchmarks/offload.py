"""What offloading costs: a prompt with its encoder in host memory, and a denoiser that passes by in layers.

`python benchmarks/offload.py` on a GPU, with names of rows to run only those; `--tiny` runs the same code on a CPU,
where nothing is gained. Published architectures, normal random weights, bf16, by the classes that the server offloads
with (`worker/placement.py`). `umt5`: UMT5-xxl reads one prompt of 512 tokens; the floor is its bytes over the rate at
which one large pinned buffer is copied to the device in the same run, and a prompt seen before is answered by the
prompt cache. `wan-14b`: one forward pass of all 40 layers of Wan2.1-14B at 832x480, 81 frames (half a step with
guidance), resident and layer by layer, compared bit by bit; peaks are what torch had allocated. Medians; the device is
idle before each call. Writes JSON to `benchmarks/results/` after every row.
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from workloads import Workload, materialize, wan, workloads

from photogram.core.worker_config import Placement
from photogram.worker.fibers import Call
from photogram.worker.modules import BigModule, big_modules
from photogram.worker.placement import offload_to
from photogram.worker.prompt_cache import PromptCache, readable
from photogram.worker.residency import Visitors
from photogram.worker.tuning.attention import choose_attention

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = ("umt5", "wan-14b")
FLOOR_BYTES = 4 << 30


class Bench:
    """One device and how calls are timed on it."""

    def __init__(self, tiny: bool, runs: int) -> None:
        self.tiny = tiny
        self.runs = runs
        self.device = torch.device("cpu") if tiny else torch.device("cuda", 0)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.around = choose_attention("auto", self.device).around_calls

    def settle(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Return the times of a call after one that is not counted, and the most memory that was allocated in them."""
        run()
        self.settle()
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()
        taken: list[float] = []
        for _ in range(self.runs):
            self.settle()
            began = time.perf_counter()
            run()
            self.settle()
            taken.append(time.perf_counter() - began)
        found: dict[str, Any] = {
            "median_s": statistics.median(taken),
            "fastest_s": min(taken),
            "slowest_s": max(taken),
            "runs": self.runs,
        }
        return found if self.tiny else found | {"peak_bytes": torch.cuda.max_memory_allocated()}

    def rate(self) -> float:
        """Return the bytes a second from pinned host memory to the device."""
        num_bytes = 1 << 24 if self.tiny else FLOOR_BYTES
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not self.tiny)
        there = torch.empty_like(host, device=self.device)
        return num_bytes / self.timed(lambda: there.copy_(host, non_blocking=True))["median_s"]

    def module(self, name: str, workload: Workload) -> BigModule:
        module = big_modules({name: materialize(workload.make, self.device, self.dtype)})[name]
        module.around_calls = self.around
        return module

    def call(self, module: BigModule, workload: Workload) -> Call:
        return Call(module=module, method="forward", args=(), kwargs=workload.arguments(self.device, self.dtype))


def prompt(bench: Bench) -> dict[str, Any]:
    """UMT5-xxl on the device, offloaded, and not needed at all."""
    workload = workloads(tiny=bench.tiny)["umt5"]
    module = bench.module("text_encoder", workload)
    call = bench.call(module, workload)
    row: dict[str, Any] = {"unit": "UMT5-xxl, one prompt of 512 tokens", "bytes_per_s": bench.rate()}
    row["resident"] = bench.timed(lambda: module.run(call, "bench"))
    expected = module.run(call, "bench")[0].clone()

    visitors = offload_to(Visitors(), {"text_encoder": module}, Placement(text_encoder_cpu_offload=True), bench.device)
    weights = visitors.all[0].weights
    row |= {"weight_bytes": weights.num_bytes, "is_pinned": weights.is_pinned}
    row["floor_s"] = weights.num_bytes / row["bytes_per_s"]
    row["offloaded"] = bench.timed(lambda: module.run(call, "bench"))
    row["over_floor"] = row["offloaded"]["median_s"] / row["floor_s"]
    row["is_bit_equal"] = torch.equal(module.run(call, "bench")[0], expected)

    cache = PromptCache(1 << 30)

    def ask() -> None:
        key = cache.key(call)
        assert key is not None
        if cache.get(key) is None:
            cache.put(key, readable(call, module.run(call, "bench")))

    row["seen_before"] = bench.timed(ask)
    return row


def layers(bench: Bench) -> dict[str, Any]:
    """Wan2.1-14B on the device, and its blocks one by one."""
    at_480p = wan(tiny=bench.tiny).arguments
    workload = replace(wan(tiny=bench.tiny, is_14b=True), arguments=at_480p)
    module = bench.module("transformer", workload)
    call = bench.call(module, workload)
    row: dict[str, Any] = {
        "unit": "Wan2.1-14B 832x480x81, one forward pass",
        "layers": len(module.module.blocks),
        "weight_bytes": sum(tensor.nbytes for tensor in module.module.parameters()),
    }
    row["resident"] = bench.timed(lambda: module.run(call, "bench"))
    expected = module.run(call, "bench")[0].clone()
    offload_to(Visitors(), {"transformer": module}, Placement(dit_layerwise_offload=True), bench.device)
    gc.collect()
    if not bench.tiny:
        torch.cuda.empty_cache()
    row["layerwise"] = bench.timed(lambda: module.run(call, "bench"))
    row["slower"] = row["layerwise"]["median_s"] / row["resident"]["median_s"] - 1
    row["is_bit_equal"] = torch.equal(module.run(call, "bench")[0], expected)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| row | resident, s | offloaded, s | | peak, GB | same bits |", "|---|---|---|---|---|---|"]
    if row := rows.get("umt5"):
        beside = f"{row['over_floor']:.2f} of the floor, {row['floor_s']:.3f} s"
        lines.append(
            line(row, row["offloaded"], f"{beside}; seen before {row['seen_before']['median_s'] * 1e3:.1f} ms")
        )
    if row := rows.get("wan-14b"):
        lines.append(line(row, row["layerwise"], f"{row['slower']:+.1%}"))
    return "\n".join(lines)


def line(row: dict[str, Any], offloaded: dict[str, Any], beside: str) -> str:
    return (
        f"| {row['unit']} | {row['resident']['median_s']:.3f} | {offloaded['median_s']:.3f} | {beside} "
        f"| {offloaded.get('peak_bytes', 0) / 1e9:.1f} | {'yes' if row['is_bit_equal'] else 'no'} |"
    )


def save(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    device = "cpu" if options.tiny else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "date": today,
        "device": device,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "command": " ".join(["python benchmarks/offload.py", *sys.argv[1:]]),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{today}-offload-{'tiny' if options.tiny else device.split()[1].lower()}.json"
    (options.out / name).write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default: all")
    parser.add_argument("--runs", type=int, default=5, help="times that each call is timed")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    rows: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name in options.rows or ROWS:
            rows[name] = {"umt5": prompt, "wan-14b": layers}[name](Bench(options.tiny, options.runs))
            save(rows, options)
            print(f"{name} | {rows[name]}", file=sys.stderr, flush=True)
            gc.collect()
            if not options.tiny:
                torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
