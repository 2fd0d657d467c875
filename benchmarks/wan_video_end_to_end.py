"""Wan2.1-T2V-1.3B's real architecture with random weights: one clip through `photogram serve` and its HTTP API.

`python benchmarks/wan_video_end_to_end.py` on a GPU; `--tiny` runs the same code with a small model on a CPU, to see
that it works. Makes the checkpoint from the published configuration (no download, no network), lets plain diffusers
draw a few steps of the same clip in a process of its own, then serves the folder and asks for the whole clip by
`POST /v1/videos`. Both draw two steps of it before anything is measured. Stage times are the worker's own; the MP4's
is from the worker's last word to the finished file. `--flags="--compile"` serves with these flags, and repeated serves
once with each, and compares the clips' frames with the first server's. Writes JSON and a page to `benchmarks/results/`
after every server, so that a run that is cut off leaves what it has.
"""

import argparse
import datetime
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import diffusers
import httpx
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from encoders import umt5_xxl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import folder, tokenization
from families.video import wan_solver

PROMPT = "a red circle beside a large blue square under a gray moon"
NEGATIVE_PROMPT = "blurry, pale"


def call(tiny: bool) -> dict[str, float]:
    """The clip, in the names of the pipeline: the makers' size, length, steps and guidance."""
    if tiny:
        return {"width": 128, "height": 64, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 5.0}
    return {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}


# --- the checkpoint -----------------------------------------------------------------------------------------------


def make_checkpoint(path: Path) -> None:
    """Write a diffusers folder of the published configuration: weights drawn on the GPU, so it takes seconds."""
    tokenizer = tokenization.t5(model_max_length=512)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        transformer = WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=30,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            rope_max_seq_len=1024,
        )
        text_encoder = umt5_xxl()
        torch.set_default_dtype(torch.float32)
        vae = AutoencoderKLWan()  # 16 channels, base 96: its defaults are the published ones
    for module in (transformer, text_encoder, vae):
        normal_weights(module)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=wan_solver(3.0),  # the makers' shift at 480p
    )
    pipeline.save_pretrained(path)


def normal_weights(module: torch.nn.Module) -> None:
    """Draw every matrix and kernel anew, so that none is the identity or zero; norms and biases stay as made."""
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.7 / math.sqrt(parameter[0].numel()), generator=generator)


# --- the peer -----------------------------------------------------------------------------------------------------


def run_peer(path: Path, tiny: bool, steps: int) -> None:
    """Plain diffusers, eager, by itself: prints its stage times for the same clip in `steps` steps."""
    device = torch.device("cpu" if tiny else "cuda")
    precision = torch.float32 if tiny else {"default": torch.bfloat16, "vae": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=precision).to(device)
    pipeline.set_progress_bar_config(disable=True)
    marks: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def draw(num_inference_steps: int) -> dict[str, float]:
        def on_step(_pipeline, index, _timestep, values):
            marks[f"step {index}"] = now()
            return values

        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        began = now()
        embeds, negative = pipeline.encode_prompt(PROMPT, NEGATIVE_PROMPT, device=device, max_sequence_length=512)
        encoded = now()
        result = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="pt",
            callback_on_step_end=on_step,
            return_dict=False,
            **call(tiny) | {"num_inference_steps": num_inference_steps},
        )[0]
        decoded = now()
        (result.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        ended = now()
        last = marks[f"step {num_inference_steps - 1}"]
        return {
            "encode": encoded - began,
            "first_step": marks["step 0"] - encoded,
            "step": (last - marks["step 0"]) / (num_inference_steps - 1),
            "decode": decoded - last,
            "frames": ended - decoded,
        }

    with torch.inference_mode():
        draw(2)  # kernels and allocations
        print(json.dumps(draw(steps)))


def peer(path: Path, tiny: bool, steps: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--peer", str(path), "--peer-steps", str(steps)]
    command += ["--tiny"] if tiny else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"plain diffusers failed:\n{done.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    whole = call(tiny)["num_inference_steps"]
    return {
        "measured_s": measured,
        "measured_steps": steps,
        "scaled_total_s": measured["encode"]
        + measured["first_step"]
        + measured["step"] * (whole - 1)
        + measured["decode"]
        + measured["frames"],
        "note": f"the mean step of {steps - 1}, times {whole - 1}; no MP4 is written",
    }


# --- the result ---------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """Return the result for readers: a line for each stage, ours beside plain diffusers'."""
    servers, plain = result["photogram"], result["plain_diffusers_eager"]
    ours = [clip for server in servers for clip in server["clips"]]
    heads = [server["flags"] or "as it starts" for server in servers for _ in server["clips"]]
    stage = plain["measured_s"]
    steps = result["call"]["num_inference_steps"]
    beside = {
        "encode": stage["encode"],
        "denoise": stage["first_step"] + stage["step"] * (steps - 1),
        "decode": stage["decode"],
        "frames": stage["frames"],
        "mp4_and_answer": None,
        "total": plain["scaled_total_s"],
    }
    ready = [f"{server['start_to_ready_s']:.0f}" for server in servers]
    rows = []
    for name, seconds in beside.items():
        cells = [name.replace("_", " "), *(f"{clip[f'{name}_s']:.2f}" for clip in ours), shown(seconds)]
        rows.append(f"| {' | '.join(cells)} |")
    nearness = [clip["psnr_to_first_server_db"] for clip in ours]
    cells = ["same" if one is None else f"{one:.1f} dB" for one in nearness]
    rows.append(f"| frames beside the first server's | {' | '.join(cells)} |  |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    size = f"{result['call']['width']}x{result['call']['height']}"
    return "\n".join(
        [
            f"# {result['workload']}",
            "",
            f"{result['device']}; {versions}. {size}, {result['call']['num_frames']} frames, {steps} steps, guidance "
            f"{result['call']['guidance_scale']}. Made by `python benchmarks/wan_video_end_to_end.py`.",
            "",
            f"| seconds | {' | '.join(f'photogram, {head}' for head in heads)} | diffusers, eager |",
            "|---|" + "---|" * (len(ours) + 1),
            *rows,
            "",
            f"*total* is from the request's first byte to the MP4's last ({ours[0]['file_bytes']:,} bytes). Of plain "
            f"diffusers {plain['measured_steps']} steps were drawn: {plain['note']}. "
            f"Seconds from a server's start to ready: {', '.join(ready)}.",
            "",
        ]
    )


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


# --- the server ---------------------------------------------------------------------------------------------------


def serve(path: Path, log_path: Path, data: Path, tiny: bool, flags: str) -> tuple[subprocess.Popen, str]:
    """Start `photogram serve` as a user would, and wait until it is warm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "photogram", "serve", "--model-path", str(path), "--port", str(port)]
    command += ["--data-dir", str(data), *shlex.split(flags)]
    command += ["--no-warmup"] if tiny else []  # at the card's size, which is the real model's
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with log_path.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log_path.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return server, url
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def draw_by_http(url: str, tiny: bool, number: int, steps: int) -> tuple[float, bytes, dict[str, object]]:
    """Ask for the clip and wait for its file: seconds from the first byte sent to the last received.

    Prompts of another `number` are other words, which no cache has the encodings of.
    """
    wanted = call(tiny)
    body = {
        "prompt": f"{PROMPT}, {number}",
        "negative_prompt": f"{NEGATIVE_PROMPT}, {number}",
        "size": f"{wanted['width']}x{wanted['height']}",
        "num_frames": wanted["num_frames"],
        "num_inference_steps": steps,
        "guidance_scale": wanted["guidance_scale"],
        "seed": number,
    }
    began = time.perf_counter()
    answer = httpx.post(f"{url}/v1/videos", json=body, timeout=60)
    answer.raise_for_status()
    video = answer.json()
    while video["status"] in ("queued", "in_progress"):
        time.sleep(0.05)
        video = httpx.get(f"{url}/v1/videos/{video['id']}", timeout=60).json()
    if video["status"] != "completed":
        raise SystemExit(f"the clip failed: {video['error']}")
    file = httpx.get(f"{url}/v1/videos/{video['id']}/content", timeout=60).content
    return time.perf_counter() - began, file, video


def stages(log: str) -> dict[str, float]:
    """The worker's last finished job: seconds of each stage, and the clock time of its end under `done_at`."""
    pattern = r"(\S+ \S+) INFO\s+worker .* done: \d+ steps in ([\d.]+) s \(([^)]*)\)"
    clock, total, parts = re.findall(pattern, log)[-1]
    found = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", parts)}
    done_at = datetime.datetime.strptime(clock, "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return found | {"worker_total": float(total), "done_at": done_at}


def frames_of(file: bytes) -> np.ndarray:
    """Return the decoded luma (frames, height, width)."""
    with av.open(io.BytesIO(file)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])


def psnr_db(frames: np.ndarray, expected: np.ndarray) -> float | None:
    """Return how near two clips are; None for equal ones."""
    error = np.square(frames.astype(np.float32) - expected).mean()
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def measure(path: Path, scratch: Path, tiny: bool, runs: int, flags: str) -> dict[str, Any]:
    log = scratch / "server.log"
    began = time.perf_counter()
    server, url = serve(path, log, scratch / "data", tiny, flags)
    ready_s = time.perf_counter() - began
    results = []
    try:
        draw_by_http(url, tiny, 0, 2)  # kernels and allocations, as the peer has
        for number in range(1, runs + 1):
            total_s, file, video = draw_by_http(url, tiny, number, int(call(tiny)["num_inference_steps"]))
            ended_at = time.time()
            found = stages(log.read_text())
            results.append(
                {
                    "total_s": total_s,
                    **{f"{name}_s": found[name] for name in ("encode", "denoise", "decode", "frames")},
                    "mp4_and_answer_s": ended_at - found["done_at"],
                    "file_bytes": len(file),
                    "frames": frames_of(file),
                    "size": video["size"],
                    "seconds": video["seconds"],
                }
            )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return {"flags": flags, "start_to_ready_s": ready_s, "clips": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--runs", type=int, default=1, help="clips to draw")
    parser.add_argument("--peer-steps", type=int, default=6, help="steps that plain diffusers draws")
    parser.add_argument("--flags", action="append", help="flags of the server; repeated: of one server after another")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.make is not None:
        make_checkpoint(arguments.make)
        return
    if arguments.peer is not None:
        run_peer(arguments.peer, arguments.tiny, arguments.peer_steps)
        return
    device = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    name = f"{datetime.date.today()}-wan-video-{'tiny' if arguments.tiny else device.split()[1].lower()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="wan-"))
    try:
        began = time.perf_counter()
        if arguments.tiny:
            path = folder("wan-2.1", scratch)
        else:
            path = scratch / "wan-2.1-t2v-1.3b"
            # In a process of its own, so that the GPU is free afterwards.
            subprocess.run([sys.executable, __file__, "--make", str(path)], check=True)
        result: dict[str, Any] = {
            "workload": "Wan2.1-T2V-1.3B's architecture, random weights: one clip through the HTTP API",
            "call": call(arguments.tiny),
            "device": device,
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
            "checkpoint_made_s": time.perf_counter() - began,
            "photogram": [],
            "plain_diffusers_eager": peer(path, arguments.tiny, arguments.peer_steps),
        }
        expected: list[np.ndarray] = []
        for flags in arguments.flags or [""]:
            found = measure(path, scratch, arguments.tiny, arguments.runs, flags)
            frames = [clip.pop("frames") for clip in found["clips"]]
            expected = expected or frames
            for clip, own, first in zip(found["clips"], frames, expected, strict=True):
                clip["psnr_to_first_server_db"] = psnr_db(own, first)
            result["photogram"].append(found)
            (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            (arguments.out / f"{name}.md").write_text(page(result))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(page(result))


if __name__ == "__main__":
    main()
