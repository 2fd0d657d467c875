"""The exact table: one call of each network by plain diffusers, eager and compiled, and as the worker would run it.

`python benchmarks/exact.py ROW --seconds 90` on a GPU runs one row; `--tiny` runs the same code on a CPU with small
networks, to see that it works. Networks have published architectures and normal random weights. All variants of a row
run in one process on the same weights and inputs, those first that are expected to be fastest; figures are medians of
calls with the device idle before each. Errors are those of a shallow network of the full width against itself in fp32.
A figure above the ceiling that this machine's own matrix product reaches is refused. What is there is written to
`benchmarks/results/` after every variant, so that a run that is cut off leaves what it has.

Rows from a request to its file are those of `few_steps.py` and `wan_video_end_to_end.py`.
"""

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from workloads import Arguments, Workload, materialize, workloads

from photogram.core.worker_config import Tuning
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.graphs import Graphs
from photogram.worker.tuning.joining import join_products
from photogram.worker.tuning.modulation import ModulationTable, modulation_table
from photogram.worker.tuning.padding import is_padding_unread, without_padding
from photogram.worker.tuning.tune import Tuned, tune

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_RUNS, MOST_RUNS, RUN_SECONDS = 5, 30, 5.0
# Beyond the matrix product's own rate by more than what clocks vary, a figure is a mistake in measuring.
CEILING_SLACK = 1.03


@dataclass
class Figure:
    """One variant of one row. Milliseconds are of the row's unit; TFLOP/s of what its calls compute."""

    variant: str
    median_ms: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    runs: int = 0
    tflops: float | None = None
    first_call_s: float | None = None
    peak_gb: float | None = None
    busy_ms: float | None = None
    """What kernels take of the unit's time, from a profile: the rest are gaps between them."""
    error: float | None = None
    """Of the shallow network: root of the mean square of the difference to fp32, over that of fp32."""
    refused: str | None = None


@dataclass
class Row:
    """All figures of one workload."""

    name: str
    unit: str
    reach_ms: float | None
    tflop: float = 0.0
    parameters: int = 0
    figures: list[Figure] = field(default_factory=list)
    refused: str | None = None
    profiles: dict[str, list[str]] = field(default_factory=dict)


class Clock:
    """Times calls on one device, and says when to stop."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._until = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        return self._until - time.perf_counter()

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_s(self, run: Callable[[], Any]) -> float:
        """Return the seconds from an idle device to an idle device."""
        self.settle()
        started = time.perf_counter()
        run()
        self.settle()
        return time.perf_counter() - started

    def samples_s(self, run: Callable[[], Any]) -> list[float]:
        taken: list[float] = []
        while len(taken) < MOST_RUNS and (len(taken) < LEAST_RUNS or sum(taken) < RUN_SECONDS):
            taken.append(self.time_s(run))
            if self.left_s < 0:
                break
        return taken


# --- variants -----------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A network made ready, and how a call of it is made."""

    network: torch.nn.Module
    method: str
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    graphs: Graphs | None = None
    table: ModulationTable | None = None
    leaves_padding: bool = False

    def __call__(self, arguments: Arguments) -> torch.Tensor:
        with self.around():
            given = dict(arguments) if self.table is None else self.table.looked_up(arguments, None)
            result = without_padding(self._run, (), given) if self.leaves_padding else self._run((), given)
        while not isinstance(result, torch.Tensor):
            result = result[0]
        return result

    def _run(self, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        real = getattr(self.network, self.method)
        return real(*args, **given) if self.graphs is None else self.graphs.run("network", real, args, given)


def plain(network: torch.nn.Module, workload: Workload, device: torch.device) -> Runner:
    return Runner(network, workload.method)


def plain_compiled(network: torch.nn.Module, workload: Workload, device: torch.device) -> Runner:
    """As diffusers' documentation says: repeated blocks, or the whole network where it names none."""
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks()
        return Runner(network, workload.method)
    part = network.decoder if workload.method == "decode" else network
    part.compile()
    return Runner(network, workload.method)


def tuned(
    *, fused: bool = False, compile: bool = False, graphs: bool = False, search: bool = False
) -> Callable[..., Runner]:
    """As the worker runs it with these flags."""

    def make(network: torch.nn.Module, workload: Workload, device: torch.device) -> Runner:
        wanted = Tuning(compile=compile, fused_kernels=fused, cuda_graphs=graphs, search_convolutions=search)
        name = "unet" if isinstance(network, UNet2DConditionModel) else workload.component
        done: Tuned = tune({name: network}, frozenset({name} if workload.is_denoiser else ()), wanted, device)
        table, leaves_padding = done.tables.get(name), name in done.leave_padding
        if fused and device.type == "cpu":  # which the worker does for GPUs only
            fuse(network)
            join_products(network)
            table, leaves_padding = modulation_table(network), is_padding_unread(network)
        return Runner(network, workload.method, done.attention.around_calls, done.graphs, table, leaves_padding)

    return make


def variants(workload: Workload) -> dict[str, Callable[..., Runner]]:
    """Return the variants of a workload: the worker's best and diffusers' two, then what the flags do one by one."""
    found: dict[str, Callable[..., Runner]] = {}
    if workload.is_launch_bound:
        if workload.is_denoiser and workload.is_best_compiled:
            found["photogram: compiled, fused, graph"] = tuned(compile=True, fused=True, graphs=True)
        found["photogram: fused, graph"] = tuned(fused=True, graphs=True)
    else:
        found["photogram: fused"] = tuned(fused=True)
    if workload.has_convolutions:
        found["photogram: fused, searched convolutions"] = tuned(fused=True, search=True)
    found["diffusers eager"] = plain
    found["diffusers compiled"] = plain_compiled
    if workload.is_launch_bound:
        found["photogram: graph"] = tuned(graphs=True)
        found["photogram: fused"] = tuned(fused=True)
    if workload.is_denoiser:
        found["photogram: compiled, fused"] = tuned(compile=True, fused=True)
        if workload.is_launch_bound:
            found.setdefault("photogram: compiled, fused, graph", tuned(compile=True, fused=True, graphs=True))
        found["photogram: compiled"] = tuned(compile=True)
    return found


@contextmanager
def undone_afterwards(network: torch.nn.Module) -> Iterator[None]:
    """Take back what a variant did to a network, so that the next begins with the plain one."""
    parts: list[Any] = [*network.modules()]
    processors = [vars(part)["processor"] for part in parts if vars(part).get("processor") is not None]
    classes = [(part, part.__class__) for part in (*parts, *processors)]
    try:
        yield
    finally:
        for part, kind in classes:
            part.__class__ = kind
        for part in parts:
            if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d):
                part.weight.data = part.weight.data.contiguous()
            vars(part).pop("modulations", None)
        for part in parts:
            part._compiled_call_impl = None
        torch.backends.cudnn.benchmark = False
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- measuring ----------------------------------------------------------------------------------------------------


def ceiling_tflops(clock: Clock) -> float:
    """Return what a large matrix product reaches here: the ceiling of every figure."""
    side = 8192 if clock.device.type == "cuda" else 512
    # A CPU's fastest products are those of fp32.
    precision = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    left, right = torch.randn(2, side, side, device=clock.device, dtype=precision)
    for _ in range(5):
        left @ right
    fastest = min(clock.time_s(lambda: left @ right) for _ in range(20))
    return 2 * side**3 / fastest / 1e12


def tflop_of(runner: Runner, workload: Workload, arguments: Arguments) -> float:
    """Return the operations of a row, in 10^12."""
    with FlopCounterMode(display=False) as counter:
        runner(arguments)
    return counter.get_total_flops() * workload.calls * workload.times / 1e12


def measure(figure: Figure, runner: Runner, workload: Workload, arguments: Arguments, clock: Clock) -> None:
    """Fill in the figure's times."""
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figure.first_call_s = clock.time_s(lambda: runner(arguments))
    for _ in range(3):  # kernels are chosen, graphs recorded
        runner(arguments)
    samples = [
        seconds * 1000 * workload.calls * workload.times for seconds in clock.samples_s(lambda: runner(arguments))
    ]
    figure.median_ms, figure.fastest_ms, figure.slowest_ms = statistics.median(samples), min(samples), max(samples)
    figure.runs = len(samples)
    if clock.device.type == "cuda":
        figure.peak_gb = torch.cuda.max_memory_allocated() / 1e9


def check_ceiling(figure: Figure, tflop: float, ceiling: float) -> None:
    assert figure.fastest_ms is not None
    figure.tflops = tflop / (figure.fastest_ms / 1000)
    if figure.tflops > ceiling * CEILING_SLACK:
        figure.refused = f"{figure.tflops:.0f} TFLOP/s is above the measured ceiling of {ceiling:.0f}"
        figure.median_ms = None


def error_of(result: torch.Tensor, reference: torch.Tensor) -> float:
    difference = result.double() - reference.double()
    return float(difference.square().mean().sqrt() / reference.double().square().mean().sqrt())


class Errors:
    """A shallow network in bf16, to hold each variant's result of it against its own in fp32."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        exact = materialize(workload.shallow, device, torch.bfloat16).float()
        self._workload = workload
        self._device = device
        self._reference = plain(exact, workload, device)(_in_fp32(workload.arguments(device, torch.bfloat16)))
        self._network = materialize(workload.shallow, device, torch.bfloat16)
        self._arguments = workload.arguments(device, torch.bfloat16)

    def of(self, make: Callable[..., Runner]) -> float:
        with undone_afterwards(self._network):
            result = _after_several(make(self._network, self._workload, self._device), self._arguments)
        return error_of(self._workload.read(result), self._workload.read(self._reference))


def _after_several(runner: Runner, arguments: Arguments) -> torch.Tensor:
    """Return the result of a call that is replayed, where calls are."""
    for _ in range(3):
        runner(arguments)
    return runner(arguments)


def _in_fp32(arguments: Any) -> Any:
    """Return the same arguments with every number in fp32."""
    if isinstance(arguments, torch.Tensor):
        return arguments.float() if arguments.is_floating_point() else arguments
    if isinstance(arguments, list):
        return [_in_fp32(item) for item in arguments]
    if isinstance(arguments, dict):
        return {name: _in_fp32(item) for name, item in arguments.items()}
    return arguments


def profile_of(runner: Runner, arguments: Arguments, clock: Clock) -> tuple[float, list[str]]:
    """Return the milliseconds of one call's kernels, and those that take most, a line each: time, count, name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = clock.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        runner(arguments)
        clock.settle()
    # An operator's time on the device is its kernels', which have entries of their own.
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == wanted]

    def own_ms(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000

    largest = sorted(events, key=own_ms, reverse=True)[:25]
    lines = [f"{own_ms(event):8.2f} ms {event.count:5d}x {event.key[:110]}" for event in largest]
    return sum(map(own_ms, events)), lines


# --- the run ------------------------------------------------------------------------------------------------------


def run_variant(
    row: Row, runner: Runner, workload: Workload, arguments: Arguments, clock: Clock, ceiling: float
) -> None:
    """Measure the row's last figure, and what its call spends its time on."""
    figure = row.figures[-1]
    measure(figure, runner, workload, arguments, clock)
    # What is left out is not computed.
    tflop = tflop_of(replace(runner, graphs=None), workload, arguments) if runner.leaves_padding else row.tflop
    check_ceiling(figure, tflop, ceiling)
    if clock.left_s > 0:
        busy_ms, row.profiles[figure.variant] = profile_of(runner, arguments, clock)
        figure.busy_ms = busy_ms * workload.calls * workload.times


def run_row(workload: Workload, clock: Clock, ceiling: float, save: Callable[[Row], None], only: set[str]) -> Row:
    """Measure every variant of a workload; what fails is noted and the next goes on."""
    unit = workload.unit if workload.times == 1 else f"{workload.unit}, {workload.times} times"
    row = Row(workload.name, unit, workload.reach_ms)
    device = clock.device
    try:
        network = materialize(workload.make, device, torch.bfloat16)
        row.parameters = sum(parameter.numel() for parameter in network.parameters())
        arguments = workload.arguments(device, torch.bfloat16)
        row.tflop = tflop_of(plain(network, workload, device), workload, arguments)
    except Exception as error:
        row.refused = _said(error)
        save(row)
        return row
    errors: Errors | None = None
    try:
        errors = Errors(workload, device)
    except Exception as error:
        row.refused = f"no errors: {_said(error)}"
    for name, make in variants(workload).items():
        if clock.left_s <= 0 or (only and name not in only):
            continue
        row.figures.append(Figure(name))
        try:
            with undone_afterwards(network):
                run_variant(row, make(network, workload, device), workload, arguments, clock, ceiling)
            save(row)
            if errors is not None:
                row.figures[-1].error = errors.of(make)
        except Exception as error:
            row.figures[-1].refused = _said(error)
        save(row)
    return row


def _said(error: Exception) -> str:
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| row | variant | median ms | fastest to slowest | kernels ms | TFLOP/s | error | reach |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.refused:
            lines.append(f"| {row.unit} | | {row.refused} | | | | | |")
        for figure in row.figures:
            if figure.median_ms is None:
                lines.append(f"| {row.unit} | {figure.variant} | {figure.refused} | | | | | |")
                continue
            spread = f"{figure.fastest_ms:.1f} to {figure.slowest_ms:.1f} ({figure.runs})"
            error = "" if figure.error is None else f"{figure.error:.2%}"
            busy = "" if figure.busy_ms is None else f"{figure.busy_ms:.1f}"
            reach = "" if row.reach_ms is None else f"{row.reach_ms:g} ms"
            lines.append(
                f"| {row.unit} | {figure.variant} | {figure.median_ms:.1f} | {spread} | {busy} | {figure.tflops:.0f}"
                f" | {error} | {reach} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(workloads(tiny=False))}; default: all")
    parser.add_argument("--variant", action="append", default=[], help="only this variant; may be repeated")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing more after this long")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    chosen = parser.parse_args()
    known = workloads(tiny=chosen.tiny)
    if unknown := set(chosen.rows) - known.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda:0")
    clock = Clock(device, chosen.seconds)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        ceiling = ceiling_tflops(clock)
        rows: dict[str, Row] = {}

        def save(row: Row) -> None:
            rows[row.name] = row
            report = {
                "date": today,
                "device": platform.processor() if chosen.tiny else torch.cuda.get_device_name(device),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                    "transformers": transformers.__version__,
                },
                "command": " ".join(["python benchmarks/exact.py", *sys.argv[1:]]),
                "ceiling_tflops": ceiling,
                "rows": [asdict(row) for row in rows.values()],
            }
            kind = "tiny" if chosen.tiny else "-".join(torch.cuda.get_device_name(device).lower().split()[1:2])
            path = chosen.out / f"{today}-exact-{kind}-{'-'.join(chosen.rows) or 'all'}.json"
            path.write_text(json.dumps(report, indent=1) + "\n")

        for name in chosen.rows or known:
            if clock.left_s > 0:
                run_row(known[name], clock, ceiling, save, set(chosen.variant))
                print(table([rows[name]]), flush=True)
    print(f"\nceiling {ceiling:.0f} TFLOP/s\n\n{table(list(rows.values()))}")
    for row in rows.values():
        for variant, kernels in row.profiles.items():
            print(f"\n{row.unit}, {variant}: largest shares of one call")
            print("\n".join(kernels))


if __name__ == "__main__":
    main()
