"""What several GPUs of one host gain: denoiser steps and a VAE's decode at every layout that the GPUs allow.

`python benchmarks/several_gpus.py` with names of rows to run only those; `--tiny` runs the same code on the CPU, with
gloo. Published architectures, normal random weights, bf16. One process a GPU; the first also runs each row alone, and
every layout's result is compared with that. `--compile` compiles the repeated blocks of both. A layout is Ulysses x
ring, and `CFG n x` before it where the halves of guidance run apart. Medians; the device is idle before each call.
With four GPUs two of them come first, then all four. Writes JSON to `benchmarks/results/` after every row, and begins
nothing after `--seconds`. Last, `--clip` has one clip drawn through the HTTP API by a server on one GPU and by one on
all of them, and compares the frames (`wan_video_end_to_end.py`).
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing
from workloads import Workload, materialize, wan, workloads

from photogram.core.parallel import Degrees
from photogram.worker.parallel.attention import Shares
from photogram.worker.parallel.decoding import split_decoder
from photogram.worker.parallel.lengths import Lengths
from photogram.worker.parallel.mesh import Mesh, arrange, meet
from photogram.worker.parallel.sharding import shard
from photogram.worker.tuning.attention import choose_attention
from photogram.worker.tuning.compiling import compile_repeated

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = ("wan-480p", "flux1-1024", "qwen-1024", "wan-vae", "wan-14b-720p")
LEAST_RUNS, MOST_RUNS, RUN_SECONDS, LONG_SECONDS = 3, 15, 6.0, 15.0


def rows_of(tiny: bool) -> dict[str, Workload]:
    every = workloads(tiny=tiny) | {"wan-14b-720p": wan(tiny=tiny, is_14b=True)}
    return {name: every[name] for name in ROWS}


def layouts_of(workload: Workload, world: int) -> list[Degrees]:
    """The layouts of all ranks, and for denoisers those of two groups, one for each half of guidance."""
    if not workload.is_denoiser:
        return [Degrees(ulysses=world)]
    ways = [Degrees(ulysses=ulysses, ring=world // ulysses) for ulysses in (world, 2, 1) if world % ulysses == 0]
    ways = list(dict.fromkeys(ways))
    if workload.calls == 2 and world % 2 == 0:
        ways.append(Degrees(cfg=2, ulysses=world // 2))
    return ways


def name_of(degrees: Degrees) -> str:
    inside = f"{degrees.ulysses}x{degrees.ring}"
    return inside if degrees.cfg == 1 else f"CFG {degrees.cfg} x {inside}"


class Bench:
    """One rank's view of the measurements; all ranks go through them in step."""

    def __init__(self, rank: int, device: torch.device, options: argparse.Namespace) -> None:
        self.rank = rank
        self.world: int = options.world
        self.device = device
        self.dtype = torch.float32 if options.tiny else torch.bfloat16
        self.compiles: bool = options.compile
        self.around = choose_attention("auto", device).around_calls
        self._until = time.perf_counter() + options.seconds

    def is_over(self) -> bool:
        """Whether the time is over, by the first rank's clock."""
        over = torch.tensor([float(time.perf_counter() > self._until)], device=self.device)
        dist.broadcast(over, 0)
        return bool(over.item())

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def made(self, workload: Workload) -> torch.nn.Module:
        return materialize(workload.make, self.device, self.dtype)

    def timed(self, run: Callable[[], Any], *, together: bool) -> list[float]:
        """Return seconds of calls, after one that is not counted. `together` the ranks start and end each at once."""
        run()
        taken: list[float] = []
        while len(taken) < MOST_RUNS:
            self.settle()
            if together:
                dist.barrier()
            began = time.perf_counter()
            run()
            self.settle()
            if together:
                dist.barrier()
            taken.append(time.perf_counter() - began)
            is_enough = sum(taken) > (RUN_SECONDS if len(taken) >= LEAST_RUNS else LONG_SECONDS)
            enough = torch.tensor([float(is_enough)], device=self.device)
            if together:
                dist.broadcast(enough, 0)
            if enough.item():
                break
        return taken

    def alone(self, workload: Workload) -> tuple[list[float], torch.Tensor]:
        """Time a row's calls on this rank by itself, one after the other, and return one's result."""
        network, arguments = self.made(workload), workload.arguments(self.device, self.dtype)
        if self.compiles and workload.is_denoiser:
            compile_repeated(network)

        def call() -> torch.Tensor:
            with self.around():
                return _first(getattr(network, workload.method)(**arguments))

        times = self.timed(lambda: [call() for _ in range(workload.calls)], together=False)
        return times, call()

    def split(self, workload: Workload, degrees: Degrees) -> tuple[list[float], torch.Tensor]:
        """The same with all ranks: the halves of guidance one after the other, or each on a group of its own."""
        network, arguments = self.made(workload), workload.arguments(self.device, self.dtype)
        mesh = arrange(degrees, self.rank, self.device)
        lengths = Lengths(mesh)
        if not workload.is_denoiser:
            split_decoder(network, mesh, lengths)
        elif degrees.sequence > 1:
            shard(network, Shares(mesh, lengths))
        if self.compiles and workload.is_denoiser:
            compile_repeated(network)

        def call() -> torch.Tensor:
            lengths.begin("call")
            with self.around():
                result = _first(getattr(network, workload.method)(**arguments))
            lengths.end()
            return result

        def step() -> None:
            results = [call() for _ in range(workload.calls // degrees.cfg)]
            if degrees.cfg > 1:
                _hand_over(mesh, results[0])

        return self.timed(step, together=True), call()


def _first(result: Any) -> torch.Tensor:
    while not isinstance(result, torch.Tensor):
        result = result[0]
    return result


def _hand_over(mesh: Mesh, result: torch.Tensor) -> None:
    """Give the first rank what the second group's leader computed: all that the halves have to tell each other."""
    if mesh.rank != 0:
        return
    if mesh.cfg_index == 0:
        dist.recv(torch.empty_like(result), src=mesh.degrees.sequence)
    else:
        dist.send(result.contiguous(), dst=0)


def run_row(bench: Bench, workload: Workload) -> dict[str, Any]:
    times, expected = bench.alone(workload) if bench.rank == 0 else ([], torch.empty(0))
    row: dict[str, Any] = {"unit": workload.unit, "one": summary(times) if times else None, "layouts": {}}
    dist.barrier()
    for degrees in layouts_of(workload, bench.world):
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if bench.is_over():
            break
        times, result = bench.split(workload, degrees)
        if bench.rank == 0:
            difference = (result.float() - expected.float()).square().mean().sqrt()
            found = summary(times) | {"difference": float(difference / expected.float().square().mean().sqrt())}
            found["speed_up"] = row["one"]["median_s"] / found["median_s"]
            row["layouts"][name_of(degrees)] = found
            print(f"{workload.unit} | {name_of(degrees)} | {found}", file=sys.stderr, flush=True)
    return row


def summary(times: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "runs": len(times),
    }


def table(rows: list[dict[str, Any]], world: int) -> str:
    """Return the results as Markdown: efficiency is the speed-up over the number of GPUs."""
    lines = [
        "| row | one, s | layout | s | speed-up | efficiency | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row["layouts"].items():
            lines.append(
                f"| {row['unit']} | {row['one']['median_s']:.3f} | {name} | {found['median_s']:.3f} "
                f"| {found['speed_up']:.2f} | {found['speed_up'] / world:.0%} | {found['difference']:.1e} |"
            )
    return "\n".join(lines)


def run_rank(rank: int, meeting_file: str, options: argparse.Namespace) -> None:
    device = torch.device("cpu") if options.tiny else torch.device("cuda", rank)
    if options.tiny:
        torch.set_num_threads(1)
    meet(options.world, rank, device, Path(meeting_file))
    bench = Bench(rank, device, options)
    rows: list[dict[str, Any]] = []
    known = rows_of(options.tiny)
    with torch.inference_mode():
        for name in options.rows or ROWS:
            if bench.is_over():
                break
            rows.append(run_row(bench, known[name]))
            if rank == 0:
                save(rows, options)
    if rank == 0:
        print(table(rows, options.world), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end may wait for ever in the destructors of process groups


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    device = "cpu" if options.tiny else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "date": today,
        "device": f"{options.world} x {device}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "command": " ".join(["python benchmarks/several_gpus.py", *sys.argv[1:]]),
        "rows": rows,
    }
    kind = "tiny" if options.tiny else device.split()[1].lower()
    name = f"{today}-several-gpus-{options.world}x{kind}{'-compiled' if options.compile else ''}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default: all")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of GPUs; default: 2 and 4, as far as there are")
    parser.add_argument("--clip", action="store_true", help="and one clip through the HTTP API")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing more after this long")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    count = 2 if options.tiny else torch.cuda.device_count()
    worlds = options.worlds or [world for world in (2, 4) if world <= count]
    if not worlds:
        parser.error("there is one GPU: nothing to compare")
    until = time.perf_counter() + options.seconds
    for number, world in enumerate(worlds, start=1):
        options.world = world
        # What is left is divided evenly among the runs to come.
        options.seconds = (until - time.perf_counter()) / (len(worlds) - number + 1)
        with tempfile.TemporaryDirectory(prefix="several-gpus-") as folder:
            torch.multiprocessing.spawn(
                run_rank, args=(str(Path(folder) / "meeting"), options), nprocs=options.world, join=True
            )
    if options.clip:
        draw_clip(worlds[-1], options)


def draw_clip(world: int, options: argparse.Namespace) -> None:
    """Run `wan_video_end_to_end.py` on one GPU and on `world`, with the flags that users of several are told of."""
    degrees = f"--ulysses-degree=2 --ring-degree={world // 2}"
    flags = f"--text-encoder-cpu-offload --pin-cpu-memory --num-gpus {world} {degrees}"
    script = Path(__file__).with_name("wan_video_end_to_end.py")
    command = [sys.executable, str(script), "--out", str(options.out), "--flags=", f"--flags={flags}"]
    subprocess.run([*command, "--tiny"] if options.tiny else command, check=True)


if __name__ == "__main__":
    main()
