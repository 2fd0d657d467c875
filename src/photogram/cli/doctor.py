"""`photogram doctor`: what this machine has, whether `photogram serve` with the same flags could start, what fits.

Asks torch in a process of its own, so that a broken installation is a row of the report and not a crash.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from .. import __version__
from ..core.config import ServeConfig
from ..core.errors import ConfigError
from ..core.host_memory import available_memory_bytes
from ..core.memory_question import PlanAnswer, PlanQuestion
from ..core.parallel import LayoutAnswer
from .flags import FlagParser
from .keys import with_keys

A = TypeVar("A", PlanAnswer, LayoutAnswer)

PROBE_TIMEOUT_S = 120
SCARCE_DISK_BYTES = 2_000_000_000

KNOWN_MODELS: tuple[tuple[str, float], ...] = (
    ("Stable Diffusion 1.5", 0.860 + 0.123 + 0.084),
    ("Stable Diffusion XL", 2.567 + 0.123 + 0.695 + 0.084),
    ("Stable Diffusion 3 medium", 2.028 + 0.123 + 0.695 + 4.762 + 0.084),
    ("LTX-Video 2B", 1.923 + 4.762 + 0.419),
    ("Wan 2.1 1.3B", 1.419 + 5.681 + 0.127),
    ("FLUX.2 klein 4B", 3.876 + 4.022 + 0.084),
    ("Z-Image", 6.155 + 4.022 + 0.084),
    ("Wan 2.2 TI2V 5B", 5.000 + 5.681 + 0.705),
    ("FLUX.1", 11.901 + 0.123 + 4.762 + 0.084),
    ("Wan 2.1 14B", 14.288 + 5.681 + 0.127),
    ("Qwen-Image", 20.430 + 8.292 + 0.127),
)
"""Billions of parameters: denoiser, text encoders, VAE, each counted from its configuration."""


class DeviceReport(msgspec.Struct, frozen=True):
    """What `device_probe` prints."""

    torch: str
    diffusers: str
    transformers: str
    cuda: str | None
    device: str
    device_name: str | None
    memory: tuple[int, int] | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. `good` False makes the exit code 1; None is only worth knowing."""

    good: bool | None
    subject: str
    finding: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "PROBLEM", None: "note"}[self.good]
        return f"  {mark:8} {self.subject:12} {self.finding}"


def doctor(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the report and return 1 when something in it would keep the server from starting."""
    parser = FlagParser(
        prog="photogram doctor",
        usage="photogram doctor [flags of photogram serve]",
        description="Say what this machine has, whether the server could start with these flags, and what fits.",
    )
    parser.add_argument("--memory-gb", type=float, metavar="X", help="plan for a GPU with X GB instead of this device")
    parser.add_serve_flags()
    namespace = parser.read(arguments)
    config = with_keys(parser.config(namespace), environ)
    if namespace.memory_gb is not None and not 0 < namespace.memory_gb < float("inf"):
        raise ConfigError(f"--memory-gb {namespace.memory_gb}: must be above 0.")

    report, problem = _ask_torch(config.device)
    rows = [_python(), *_torch(report, problem), _memory(), _disk(config), _data_folder(config), _port(config)]
    print(f"photogram {__version__} on {platform.system()} {platform.machine()}\n")
    for row in rows:
        print(row)
    print()
    if hasattr(namespace, "model_path"):
        found = [_plan(config, report, namespace.memory_gb)]
        if config.degrees.world_size > 1:
            found.append(_layout(config))
        for row, lines in found:
            rows.append(row)
            print("\n".join((str(row), *(f"    {line}" for line in lines))))
    else:
        print(_what_fits(config, report))
    return 1 if any(row.good is False for row in rows) else 0


def _ask_torch(device: str) -> tuple[DeviceReport | None, str]:
    """Return the probe's report, or None and the reason why there is none."""
    command = [sys.executable, "-m", "photogram.cli.device_probe", device]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"importing torch took more than {PROBE_TIMEOUT_S} seconds"
    try:
        return msgspec.json.decode(probe.stdout, type=DeviceReport), ""
    except msgspec.MsgspecError:
        lines = probe.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"the probe ended with exit code {probe.returncode}"


def _python() -> Row:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Row(good, "python", f"{platform.python_version()}{'' if good else ' (3.11 to 3.13 are supported)'}")


def _torch(report: DeviceReport | None, problem: str) -> list[Row]:
    if report is None:
        return [Row(False, "torch", f"cannot be used: {problem}")]
    cuda = f", CUDA {report.cuda}" if report.cuda else ", CPU only"
    device = Row(True, "device", f"cpu, {_cores()} cores")
    if report.problem is not None:
        device = Row(False, "device", report.problem)
    elif report.memory is not None:
        free, total = report.memory
        device = Row(True, "device", f"{report.device}, {report.device_name}, {_gb(free)} of {_gb(total)} free")
    return [
        Row(True, "torch", f"{report.torch}{cuda}"),
        Row(True, "diffusers", report.diffusers),
        Row(True, "transformers", report.transformers),
        device,
    ]


def _memory() -> Row:
    return Row(None, "memory", f"{_gb(available_memory_bytes())} available")


def _disk(config: ServeConfig) -> Row:
    free = shutil.disk_usage(_nearest_folder(config.data_path)).free
    enough = free >= SCARCE_DISK_BYTES
    return Row(None if enough else False, "disk", f"{_gb(free)} free for {config.data_path}")


def _data_folder(config: ServeConfig) -> Row:
    folder = _nearest_folder(config.data_path)
    state = "can be written" if folder == config.data_path else f"will be made in {folder}"
    in_the_way = next((path for path in (config.data_path, *config.data_path.parents) if path.exists()), folder)
    if not in_the_way.is_dir():
        return Row(False, "data folder", f"{config.data_path} cannot be made: {in_the_way} is a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Row(True, "data folder", f"{config.data_path} {state}")
    except OSError as error:
        return Row(False, "data folder", f"{config.data_path} cannot be written: {error.strerror}")


def _port(config: ServeConfig) -> Row:
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return Row(False, "port", f"{config.host}:{config.port} cannot be listened on: {error.strerror}")
    return Row(True, "port", f"{config.host}:{config.port} is free")


def _what_fits(config: ServeConfig, report: DeviceReport | None) -> str:
    """Return the table of well-known models, in the precision in which these flags would load them."""
    on_gpu = report is not None and report.memory is not None
    memory = report.memory[0] if report is not None and report.memory is not None else available_memory_bytes()
    place = f"the GPU's {_gb(memory)}" if on_gpu else f"{_gb(memory)} of memory"
    precision = config.precision if config.precision != "auto" else "bf16" if on_gpu else "fp32"
    bytes_each = 4e9 if precision == "fp32" else 2e9
    hint = " --precision bf16 takes half." if precision == "fp32" else ""
    lines = [
        f"Weights in {precision} against {place}; a model is loaded whole, and its work needs room, too.{hint}",
        *(
            f"  {name:28}{_gb(int(billions * bytes_each)):>10}  {verdict(int(billions * bytes_each), memory)}"
            for name, billions in KNOWN_MODELS
        ),
    ]
    return "\n".join(lines)


def _plan(config: ServeConfig, report: DeviceReport | None, memory_gb: float | None) -> tuple[Row, tuple[str, ...]]:
    """Return whether the model fits this device, or a GPU with that much memory, and the plan's reasons."""
    on_gpu = memory_gb is not None or (report is not None and report.memory is not None)
    host_bytes = available_memory_bytes()
    memory_bytes = host_bytes
    if memory_gb is not None:
        memory_bytes = int(memory_gb * 1e9)
    elif report is not None and report.memory is not None:
        memory_bytes = report.memory[0]
    worker = config.worker(Path())
    if not on_gpu:
        worker = msgspec.structs.replace(worker, placement=worker.placement.settled())
    question = PlanQuestion(
        config=worker,
        memory_bytes=memory_bytes,
        # Of another machine it is not known how much memory its host has.
        host_bytes=host_bytes if memory_gb is None else sys.maxsize,
        default_precision="bf16" if on_gpu else "fp32",
    )
    answer = _asked("photogram.models.memory_report", question, PlanAnswer)
    if isinstance(answer, str):
        return Row(False, "plan", answer), ()
    if answer.problem is not None:
        return Row(False, "plan", answer.problem), ()
    where = f"a GPU with {_gb(memory_bytes)}" if on_gpu else f"{_gb(memory_bytes)} of memory"
    return Row(
        answer.fits, "plan", f"{config.model_path} {'fits' if answer.fits else 'does not fit'} {where}"
    ), answer.lines


def _layout(config: ServeConfig) -> tuple[Row, tuple[str, ...]]:
    """Return how the devices of one group would share the model, and why."""
    answer = _asked("photogram.worker.parallel.layout_report", config.worker(Path()), LayoutAnswer)
    if isinstance(answer, str):
        return Row(False, "devices", answer), ()
    if answer.problem is not None:
        return Row(False, "devices", answer.problem), ()
    degrees, *reasons = answer.lines
    return Row(True, "devices", f"{config.degrees.world_size} share the model: {degrees}"), tuple(reasons)


def _asked(module: str, question: msgspec.Struct, kind: type[A]) -> A | str:
    """Return what a module that reads checkpoints answers in a process of its own, or why it answered nothing."""
    command = [sys.executable, "-m", module, msgspec.json.encode(question).decode()]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"reading the checkpoint took more than {PROBE_TIMEOUT_S} seconds"
    try:
        return msgspec.json.decode(asked.stdout, type=kind)
    except msgspec.MsgspecError:
        lines = asked.stderr.strip().splitlines()
        return lines[-1] if lines else f"the probe ended with exit code {asked.returncode}"


def verdict(weights_bytes: int, memory_bytes: int) -> str:
    """Return ``fits``, ``tight`` (over four fifths of the memory) or ``too big``."""
    if weights_bytes > memory_bytes:
        return "too big"
    return "fits" if weights_bytes <= 0.8 * memory_bytes else "tight"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
