"""How long a model takes to load from the page cache, and a process from its start to its first picture.

`python benchmarks/load_time.py` on a GPU, with names of models to load only those; `--tiny` runs the same code with
small models on a CPU. Writes checkpoints of published architectures with random weights (no download), reads their
files once, and then, each time in a process of its own and turn by turn:

- `read`: the networks' weights straight to the device, alone (`worker/networks.py`);
- `load`: what a worker does before it serves (`worker/loading.py`), with every component on the device;
- `plain`: `DiffusionPipeline.from_pretrained(...).to(device)`, in the same precisions.

The device is in use and the libraries are imported before the clock of these starts; `start_s` is from the process's
start to there being a pipeline. Then `photogram serve` from its start to /ready, and to a first picture of few steps
over HTTP, beside plain diffusers from its process's start to the same picture. Medians. Writes JSON to
`benchmarks/results/` after every model, and begins nothing more of a model after `--seconds`.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

MODELS = ("wan-1.3b", "flux-1")
WAYS = ("read", "load", "plain")
PROMPT = "a red circle beside a large blue square"
STEPS = 4


# --- the checkpoints ----------------------------------------------------------------------------------------------


def make_flux(path: Path) -> None:
    """Write a folder of FLUX.1-dev's configuration: 34 GB in bf16, drawn on the GPU."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from encoders import clip_l, t5_xxl
    from wan_video_end_to_end import normal_weights

    from families import tokenization

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # its defaults are the published ones
        clip, t5 = clip_l(), t5_xxl()
        vae = AutoencoderKL(
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    for network in (transformer, clip, t5, vae):
        normal_weights(network)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenization.clip(),
        text_encoder_2=t5,
        tokenizer_2=tokenization.t5(model_max_length=512),
        transformer=transformer,
    ).save_pretrained(path)


def make(name: str, path: Path) -> None:
    if name == "flux-1":
        make_flux(path)
        return
    from wan_video_end_to_end import make_checkpoint

    make_checkpoint(path)


def size_of(name: str, tiny: bool) -> tuple[int, int]:
    """Return width and height of the first picture."""
    if tiny:
        return 64, 64
    return (1024, 1024) if name == "flux-1" else (832, 480)


def precisions_of(name: str, tiny: bool) -> dict[str, Any]:
    """Return the precisions in which the server loads the model."""
    import torch

    if tiny:
        return {"default": torch.float32}
    return {"default": torch.bfloat16} | ({"vae": torch.float32} if name == "wan-1.3b" else {})


# --- one way of loading, in a process of its own ------------------------------------------------------------------


def run_way(way: str, name: str, path: Path, tiny: bool, started_at: float, draws: bool) -> None:
    """Load the model once and print how long it took; `draws` a picture with plain diffusers afterwards."""
    import torch
    from diffusers import DiffusionPipeline

    from photogram.core.config import ServeConfig
    from photogram.worker.loading import load
    from photogram.worker.networks import read_networks

    device = torch.device("cpu") if tiny else torch.device("cuda", 0)
    torch.zeros(1, device=device)
    found: dict[str, Any] = {"imports_s": time.time() - started_at}
    precisions = precisions_of(name, tiny)
    began = time.perf_counter()
    with torch.inference_mode():
        if way == "read":
            index = json.loads((path / "model_index.json").read_text())
            networks = read_networks(path, index, precisions, device, wanted=lambda component: True)
        elif way == "load":
            config = ServeConfig(model_path=str(path), device=str(device))
            served = load(config.worker(Path(tempfile.gettempdir())), lambda stage: None, lambda reason: None)
            networks = served.pipeline.components
        else:
            pipeline = DiffusionPipeline.from_pretrained(path, dtype=precisions).to(device)
            networks = pipeline.components
        if not tiny:
            torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - began
    found["start_s"] = time.time() - started_at
    found["num_bytes"] = sum(
        tensor.nbytes
        for network in networks.values()
        if isinstance(network, torch.nn.Module)
        for tensor in network.parameters()
    )
    if draws:
        width, height = size_of(name, tiny)
        frames = {"num_frames": 1} if name == "wan-1.3b" else {}
        pipeline.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            drawn = pipeline(PROMPT, width=width, height=height, num_inference_steps=STEPS, output_type="pil", **frames)
        picture = drawn.images[0] if name == "flux-1" else drawn.frames[0][0]
        picture.save(path.parent / "plain.png")
        found["first_picture_s"] = time.time() - started_at
    print(json.dumps(found))


def in_process(way: str, name: str, path: Path, tiny: bool, *, draws: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--way", way, "--path", str(path), "--started-at", str(time.time())]
    command += [*(["--tiny"] if tiny else []), *(["--draws"] if draws else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} of {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# --- the server ---------------------------------------------------------------------------------------------------


def start_to_picture(name: str, path: Path, scratch: Path, tiny: bool) -> dict[str, float]:
    """Serve the folder: seconds from the process's start until it is ready, and until the first picture is there."""
    import httpx
    from wan_video_end_to_end import serve

    width, height = size_of(name, tiny)
    began = time.perf_counter()
    server, url = serve(path, scratch / "server.log", scratch / "data", tiny, "")
    try:
        ready_s = time.perf_counter() - began
        body = {"prompt": PROMPT, "size": f"{width}x{height}", "num_inference_steps": STEPS}
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=300).raise_for_status()
        return {"ready_s": ready_s, "first_picture_s": time.perf_counter() - began}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


# --- all of it ----------------------------------------------------------------------------------------------------


def measure(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    path = scratch / name
    began = time.perf_counter()
    until = began + options.seconds
    if options.tiny:
        from families import folder

        path = folder({"flux-1": "flux-1", "wan-1.3b": "wan-2.1"}[name], scratch)
    else:  # in a process of its own, so that the GPU is free afterwards
        subprocess.run([sys.executable, __file__, name, "--make", "--path", str(path)], check=True)
    row: dict[str, Any] = {"model": name, "made_s": time.perf_counter() - began}
    files = list(path.rglob("*.safetensors"))
    row["file_bytes"] = sum(file.stat().st_size for file in files)
    for file in files:
        warm(file)
    times: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            if time.perf_counter() < until:
                times[way].append(in_process(way, name, path, options.tiny))
                print(f"{name} | {way} | {times[way][-1]}", file=sys.stderr, flush=True)
    for way, runs in times.items():
        if runs:
            row[way] = summary(runs)
    if time.perf_counter() < until:
        row["served"] = start_to_picture(name, path, scratch, options.tiny)
    if time.perf_counter() < until:
        row["plain_picture"] = in_process("plain", name, path, options.tiny, draws=True)
    shutil.rmtree(path)
    return row


def warm(file: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(1 << 24)
        while stream.readinto(buffer):
            pass


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "runs": len(runs),
        "gb_per_s": runs[0]["num_bytes"] / 1e9 / median,
        "start_s": statistics.median(run["start_s"] for run in runs),
        "imports_s": statistics.median(run["imports_s"] for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | GB | way | s | GB/s | process start to loaded, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for way in WAYS:
            if found := row.get(way):
                lines.append(
                    f"| {row['model']} | {row['file_bytes'] / 1e9:.1f} | {way} | {found['median_s']:.2f} "
                    f"| {found['gb_per_s']:.1f} | {found['start_s']:.1f} |"
                )
    lines += ["", "| model | serve to ready, s | to the first picture, s | plain diffusers' first picture, s |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        served, plain = row.get("served"), row.get("plain_picture")
        if served and plain:
            lines.append(
                f"| {row['model']} | {served['ready_s']:.1f} | {served['first_picture_s']:.1f} "
                f"| {plain['first_picture_s']:.1f} |"
            )
    return "\n".join(lines)


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    import diffusers
    import torch
    import transformers

    device = "cpu" if options.tiny else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "date": today,
        "device": device,
        "cores": os.cpu_count(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python benchmarks/load_time.py", *sys.argv[1:]]),
        "steps_of_the_picture": STEPS,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{today}-load-time-{'tiny' if options.tiny else device.split()[1].lower()}.json"
    (options.out / name).write_text(json.dumps(report, indent=1) + "\n")


def roomy_folder() -> str | None:
    """Return the RAM disk where it can hold the largest checkpoint, else None: the folder of temporary files."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 45e9 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"any of {', '.join(MODELS)}; default: all")
    parser.add_argument("--runs", type=int, default=3, help="times that each way is run")
    parser.add_argument("--seconds", type=float, default=230, help="begin nothing more of a model after this long")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU")
    parser.add_argument("--folder", help="where the checkpoints are written; default: a RAM disk with room, or TMPDIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--draws", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    if options.make:
        make(options.models[0], options.path)
        return
    if options.way is not None:
        run_way(options.way, options.models[0], options.path, options.tiny, options.started_at, options.draws)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="load-time-", dir=options.folder or roomy_folder()) as scratch:
        for name in options.models or MODELS:
            rows.append(measure(name, Path(scratch), options))
            save(rows, options)
    print(table(rows))


if __name__ == "__main__":
    main()
