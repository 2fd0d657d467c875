"""What several GPUs of one host gain: denoiser steps, whole loops and a VAE's decode, at every layout they allow.

`python benchmarks/several_gpus.py` with names of rows to run only those; `--tiny` runs the same code on the CPU, with
gloo. Published architectures, normal random weights, bf16. One process a GPU; the first also runs each row alone, and
every layout's result is compared with that. A row's name says what is done to the blocks of both: nothing, `fused`,
`compiled`, or both; and `50-steps` that a whole loop is run, with the solver's arithmetic and the leader's broadcast
in it, where other rows are single steps with the device idle before each. A layout is Ulysses x ring, and `CFG n x`
before it where the halves of guidance run apart. Medians. The rows that tell most come first, and nothing begins after
`--seconds`; with four GPUs two of them come first, then all four. `--profile` adds where the time of a step goes, from
a run of its own under torch's profiler. Writes JSON to `benchmarks/results/` after every layout. A row that hangs is
ended after `--patience` seconds, its ranks say where they stood, and the next row goes on. Last, `--clip` has one clip
drawn through the HTTP API by a server on one GPU and by one on all of them, and compares the frames
(`wan_video_end_to_end.py`).
"""

import argparse
import datetime
import faulthandler
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing
from exchange_profile import profiled
from workloads import Workload, materialize, wan, workloads

from photogram.core.parallel import Degrees
from photogram.worker.parallel.attention import Shares
from photogram.worker.parallel.decoding import split_decoder
from photogram.worker.parallel.lengths import Lengths
from photogram.worker.parallel.mesh import Mesh, arrange, meet
from photogram.worker.parallel.sharding import shard
from photogram.worker.tuning.attention import choose_attention
from photogram.worker.tuning.compiling import compile_repeated, repeated_parts
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.kernels.ops import can_fuse

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_RUNS, MOST_RUNS, RUN_SECONDS, LONG_SECONDS = 3, 15, 5.0, 12.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A workload, what is done to its blocks, and how many steps of it are timed as one."""

    workload: Workload
    compiles: bool = False
    fuses: bool = False
    steps: int = 1

    @property
    def name(self) -> str:
        ways = [way for way, is_on in (("fused", self.fuses), ("compiled", self.compiles)) if is_on]
        return "-".join([self.workload.name, *ways, *([f"{self.steps}-steps"] if self.steps > 1 else [])])


def rows_of(tiny: bool) -> dict[str, Row]:
    """Every row by name, the most telling first."""
    every = workloads(tiny=tiny) | {"wan-14b-720p": wan(tiny=tiny, is_14b=True)}
    flux, qwen, short, long, vae = (
        every[name] for name in ("flux1-1024", "qwen-1024", "wan-480p", "wan-14b-720p", "wan-vae")
    )
    steps = 3 if tiny else 50
    rows = (
        Row(workload=flux, compiles=True, steps=steps),
        Row(workload=qwen, compiles=True, steps=steps),
        Row(workload=short),
        Row(workload=vae),
        Row(workload=long),
        Row(workload=short, compiles=True),
        Row(workload=flux),
        Row(workload=qwen),
        Row(workload=flux, compiles=True, fuses=True),
        Row(workload=flux, compiles=True),
        Row(workload=qwen, compiles=True),
        Row(workload=long, compiles=True),
        Row(workload=flux, fuses=True),
        Row(workload=qwen, fuses=True),
        Row(workload=short, fuses=True),
        Row(workload=short, compiles=True, fuses=True),
        Row(workload=long, compiles=True, fuses=True),
        Row(workload=qwen, compiles=True, fuses=True),
        Row(workload=flux, steps=steps),
        Row(workload=qwen, steps=steps),
    )
    return {row.name: row for row in rows}


def layouts_of(row: Row, world: int) -> list[Degrees]:
    """The layouts of all ranks, for denoisers of two calls those of two groups first, one for each half of guidance. Of
    whole loops, which take long, the first one alone: what a server chooses."""
    workload = row.workload
    if not workload.is_denoiser:
        return [Degrees(ulysses=world)]
    ways = [Degrees(cfg=2, ulysses=world // 2)] if workload.calls == 2 and world % 2 == 0 else []
    ways += [Degrees(ulysses=ulysses, ring=world // ulysses) for ulysses in (world, 2, 1) if world % ulysses == 0]
    return list(dict.fromkeys(ways))[: None if row.steps == 1 else 1]


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
        self.compiler: dict[str, Any] = {"backend": "aot_eager"} if options.tiny else {}
        self.around = choose_attention("auto", device).around_calls
        self._patience: float = options.patience
        self._until = time.perf_counter() + options.seconds

    def watch(self, doing: str) -> None:
        """Say what comes, and end this process, with a word on where it stood, should that not end in time."""
        print(f"rank {self.rank}: {doing}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(self._patience, exit=True)

    def is_over(self) -> bool:
        """Whether the time is over, by the first rank's clock."""
        over = torch.tensor([float(time.perf_counter() > self._until)], device=self.device)
        dist.broadcast(over, 0)
        return bool(over.item())

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def made(self, row: Row) -> torch.nn.Module:
        """Make the network, its blocks as the row wants them."""
        network = materialize(row.workload.make, self.device, self.dtype)
        if row.fuses and (can_fuse(self.device) or self.device.type == "cpu"):
            fuse(network)
        if row.compiles:
            compile_repeated(network, **self.compiler)
        return network

    def timed(self, run: Callable[[], torch.Tensor], *, together: bool) -> tuple[list[float], torch.Tensor]:
        """Return seconds of calls, after one that is not counted, and what that one gave. `together` the ranks start
        and end each at once."""
        result = run()
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
        return taken, result

    def alone(self, row: Row) -> tuple[list[float], torch.Tensor]:
        """Time a row on this rank by itself, its halves one after the other, and return what it gives."""
        self.watch(f"{row.name} alone")
        network, halves = self.made(row), self.halves(row.workload)

        def call(half: Mapping[str, Any]) -> torch.Tensor:
            with self.around():
                return _first(getattr(network, row.workload.method)(**half))

        def run() -> torch.Tensor:
            return looped(row, halves, lambda calls: [call(half) for half in calls])

        return self.timed(run, together=False)

    def halves(self, workload: Workload) -> list[Mapping[str, Any]]:
        """The arguments of a step's calls: of two, the second has a text of its own."""
        arguments = workload.arguments(self.device, self.dtype)
        if workload.calls != 2 or not workload.is_denoiser:
            return [arguments] * workload.calls
        return [arguments, {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].flip(-1)}]

    def split(self, row: Row, degrees: Degrees, *, profile: bool) -> tuple[dict[str, Any], torch.Tensor]:
        """The same with all ranks: the halves of guidance one after the other, or each on a group of its own."""
        workload = row.workload
        network, halves = self.made(row), self.halves(workload)
        mesh = arrange(degrees, self.rank, self.device)
        lengths = Lengths(mesh)
        if not workload.is_denoiser:
            split_decoder(network, mesh, lengths)
        elif degrees.sequence > 1:
            shard(network, Shares(mesh, lengths))

        def call(half: Mapping[str, Any]) -> torch.Tensor:
            lengths.begin(str([tuple(x.shape) for x in half.values() if isinstance(x, torch.Tensor)]))
            with self.around():
                result = _first(getattr(network, workload.method)(**half))
            lengths.end()
            return result

        def calls(both: list[Mapping[str, Any]]) -> list[torch.Tensor]:
            if degrees.cfg == 1:
                return [call(half) for half in both]
            return _both(mesh, call(both[mesh.cfg_index]))

        def run() -> torch.Tensor:
            if workload.is_denoiser:
                self.lead(halves[0]["hidden_states"])  # as a leader sends its followers every call's latents
            return looped(row, halves, calls, self.lead)

        times, result = self.timed(run, together=True)
        found = summary(times)
        if profile:

            def one_step() -> None:
                calls(halves)
                self.settle()

            found["profile"] = profiled(one_step, self.device, len(repeated_parts(network)) or 1)
        return found, result

    def lead(self, latents: torch.Tensor) -> None:
        dist.broadcast(latents, 0)


def looped(
    row: Row,
    halves: list[Mapping[str, Any]],
    calls: Callable[[list[Mapping[str, Any]]], list[torch.Tensor]],
    lead: Callable[[torch.Tensor], object] = lambda latents: None,
) -> torch.Tensor:
    """Run a row's steps: the calls, guidance where they are two, and a step of Euler; return what comes of them.

    Of a single step that is its last prediction. `lead` is told of the latents of each further step.
    """
    results = calls(halves)
    if row.steps == 1:
        return results[-1]
    latents = halves[0]["hidden_states"].clone()
    for _ in range(row.steps - 1):
        prediction = results[0] if len(results) == 1 else results[1] + 4.0 * (results[0] - results[1])
        latents -= prediction / row.steps
        lead(latents)
        results = calls([{**half, "hidden_states": latents} for half in halves])
    return results[-1]


def _first(result: Any) -> torch.Tensor:
    while not isinstance(result, torch.Tensor):
        result = result[0]
    return result


def _both(mesh: Mesh, result: torch.Tensor) -> list[torch.Tensor]:
    """Give the first rank what the second group's leader computed: all that the halves have to tell each other. On the
    other ranks the second result stands for both."""
    if mesh.rank != 0:
        return [result, result]
    if mesh.cfg_index == 1:
        dist.send(result.contiguous(), dst=0)
        return [result, result]
    other = torch.empty_like(result)
    dist.recv(other, src=mesh.degrees.sequence)
    return [result, other]


def run_row(bench: Bench, row: Row, options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    times, expected = bench.alone(row) if bench.rank == 0 else ([], torch.empty(0))
    entry: dict[str, Any] = {"name": row.name, "unit": row.workload.unit, "layouts": {}}
    if times:
        entry["one"] = summary(times)
    bench.watch(f"{row.name}: waiting for all")
    dist.barrier()
    for degrees in layouts_of(row, bench.world):
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if bench.is_over():
            break
        bench.watch(f"{row.name} {name_of(degrees)}")
        found, result = bench.split(row, degrees, profile=options.profile)
        if bench.rank == 0:
            difference = (result.float() - expected.float()).square().mean().sqrt()
            found["difference"] = float(difference / expected.float().square().mean().sqrt())
            found["speed_up"] = entry["one"]["median_s"] / found["median_s"]
            entry["layouts"][name_of(degrees)] = found
            print(f"{row.name} | {name_of(degrees)} | {found}", file=sys.stderr, flush=True)
            save(entry)


def summary(times: list[float]) -> dict[str, Any]:
    found = {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}
    return found | {"runs": len(times)}


def table(rows: list[dict[str, Any]], world: int) -> str:
    """Return the results as Markdown: efficiency is the speed-up over the number of GPUs."""
    lines = [
        "| row | one, s | layout | s | speed-up | efficiency | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row["layouts"].items():
            lines.append(
                f"| {row['name']} | {row['one']['median_s']:.3f} | {name} | {found['median_s']:.3f} "
                f"| {found['speed_up']:.2f} | {found['speed_up'] / world:.0%} | {found['difference']:.1e} |"
            )
    return "\n".join(lines)


class Progress:
    """What all starts of the ranks have measured so far, and which row they are at: kept in a folder of the run's."""

    def __init__(self, folder: Path) -> None:
        self._rows, self._row = folder / "rows.json", folder / "row"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self._rows.read_text()) if self._rows.exists() else []

    @property
    def row(self) -> str | None:
        """The row that was begun last."""
        return self._row.read_text() if self._row.exists() else None

    def begin(self, name: str) -> None:
        self._row.write_text(name)

    def save(self, entry: dict[str, Any], options: argparse.Namespace) -> None:
        """Keep a row's results, in place of what was known of it, also where the results lie."""
        rows = [row for row in self.rows if row["name"] != entry["name"]] + [entry]
        self._rows.write_text(json.dumps(rows))
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
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{today}-several-gpus-{options.world}x{kind}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")


def run_rank(rank: int, folder: Path, names: list[str], options: argparse.Namespace) -> None:
    device = torch.device("cpu") if options.tiny else torch.device("cuda", rank)
    if options.tiny:
        torch.set_num_threads(1)
    bench = Bench(rank, device, options)
    bench.watch("meeting the others")
    meet(options.world, rank, device, folder / f"meeting-{len(names)}")
    known, progress = rows_of(options.tiny), Progress(folder)
    with torch.inference_mode():
        for name in names:
            if bench.is_over():
                break
            if rank == 0:
                progress.begin(name)
            run_row(bench, known[name], options, lambda entry: progress.save(entry, options))
            torch._dynamo.reset()  # the limit of programs is a process's
    bench.watch("done")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end may wait for ever in the destructors of process groups


def run_world(names: list[str], options: argparse.Namespace) -> None:
    """Run rows on `options.world` ranks; where one fails or hangs, the others are run by a new start."""
    until = time.perf_counter() + options.seconds
    with tempfile.TemporaryDirectory(prefix="several-gpus-") as folder:
        progress = Progress(Path(folder))
        while names and options.seconds > 0:
            try:
                torch.multiprocessing.spawn(
                    run_rank, args=(Path(folder), names, options), nprocs=options.world, join=True
                )
                break
            except (
                torch.multiprocessing.ProcessRaisedException,
                torch.multiprocessing.ProcessExitedException,
            ) as error:
                failed = progress.row
                print(f"{failed or 'the start'} failed: {error}", file=sys.stderr, flush=True)
                if failed not in names:
                    break
                names = names[names.index(failed) + 1 :]
                options.seconds = until - time.perf_counter()
        print(table(progress.rows, options.world), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(rows_of(tiny=False))
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(names)}; default: all")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of GPUs; default: 2 and 4, as far as there are")
    parser.add_argument("--clip", action="store_true", help="and one clip through the HTTP API")
    parser.add_argument("--profile", action="store_true", help="and where the time of a step goes")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing more after this long")
    parser.add_argument("--patience", type=float, default=200, help="seconds one row and layout may take")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    known = list(rows_of(options.tiny))
    if unknown := set(options.rows) - set(known):
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
        run_world(options.rows or known, options)
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
