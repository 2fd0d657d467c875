"""`photogram generate`: pictures without a server. The same engine, the same rules for requests, the same files."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import JOB_ERRORS, ConfigError, GenerationFailed
from ..core.messages import Failed, Finished, JobEvent
from ..core.messages import Progress as Step
from ..core.request import JSONValue
from ..engine import Engine
from ..engine.frames_folder import frames_folder
from ..engine.worker_engine import WorkerEngine
from ..media.decoder_pool import DecoderPool
from ..media.pool import MediaPool
from ..media.provenance import describe
from ..server.fields import read
from ..server.inputs import Inputs, from_files
from ..server.lora_files import LoraFinder
from ..server.loras import Loras
from ..server.resolve import Drawing, ImagesCall, Resolver
from ..server.schemas import image_fields
from ..server.sizes import asked_size
from .flags import FlagParser

OWNER = "command-line"
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
GRACE_S = 0.1  # by then every job is done, or nobody wants it any more

SHARED_SETTINGS = (
    "model_path", "served_model_name", "revision", "variant", "device", "precision", "metadata", "max_batch_size",
    "max_pixels", "max_steps", "request_timeout_s", "hang_timeout_s", "worker_memory_gb", "step_cache",
    "step_cache_threshold", "deterministic", "log_level", "lora_path", "lora_nickname", "lora_scale", "lora_dir",
    "max_lora_mb",
)  # fmt: skip
"""Settings of `photogram serve` that make sense for one picture."""

REQUEST_FIELDS = (
    ("prompt", "TEXT", "what the picture shows"),
    ("negative-prompt", "TEXT", "what it shall not show"),
    ("size", "WxH", "pixels, such as 512x384; default: the model's"),
    ("width", "N", "pixels, together with --height"),
    ("height", "N", "pixels, together with --width"),
    ("num-inference-steps", "N", "denoising steps; default: the model's"),
    ("guidance-scale", "X", "how strongly the prompt steers; default: the model's"),
    ("seed", "N", "start of the random numbers; default: a random one, which is printed"),
    ("n", "N", "how many pictures; the i-th has the seed plus i"),
    ("quality-mode", "WORD", "exact, or lossy and faster: high, fast"),
    ("output-quality", "WORD", "maximum, high, medium, low or default; PNG is always lossless"),
    ("output-compression", "N", "0 smallest file to 100 best quality; wins over --output-quality"),
)


def generate(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Draw what the flags ask for, write the files and print their names."""
    parser = _parser()
    namespace = parser.read(arguments)
    given = vars(namespace)
    # One picture does not pay for a warm-up, and its progress is on the screen already.
    config = dataclasses.replace(parser.config(namespace), warmup=False)
    if "log_level" not in given:
        config = dataclasses.replace(config, log_level="warning")
    logging.basicConfig(level=config.log_level.upper())
    if "prompt" not in given:
        raise ConfigError("--prompt is missing: photogram generate --prompt 'a red circle' -o circle.png")
    if "output" not in given:
        raise ConfigError("--output is missing: name the file to write, such as -o picture.png")
    output = Path(given["output"])
    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output '{output}': the name must end in .png, .jpg, .jpeg or .webp.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output '{output}': there is no folder {output.absolute().parent}.")
    body: dict[str, JSONValue] = {name: given[name] for name, _, _ in _fields() if name in given}
    body["output_format"] = FORMATS[output.suffix.lower()]
    # What can be told wrong without the model is told before it is loaded.
    values = read(body, image_fields(config.max_steps))
    asked_size(values.text("size"), values.int("width"), values.int("height"))
    asyncio.run(_run(config, body, given.get("image", ()), output))
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="photogram generate",
        usage="photogram generate --prompt TEXT -o FILE [flags]",
        description="Make pictures without a server.",
    )
    short = {"n": ["-n"], "num-inference-steps": ["--steps"]}
    for name, metavar, text in REQUEST_FIELDS:
        parser.add_argument(
            f"--{name}", *short.get(name, []), dest=name.replace("-", "_"), metavar=metavar, help=text,
            default=argparse.SUPPRESS,
        )  # fmt: skip
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=argparse.SUPPRESS,
        help="picture to change; may be repeated where the model takes several",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=argparse.SUPPRESS, help="file to write: .png, .jpg or .webp"
    )
    parser.add_serve_flags(only=SHARED_SETTINGS)
    return parser


def _fields() -> tuple[tuple[str, str, str], ...]:
    return tuple((name.replace("-", "_"), metavar, text) for name, metavar, text in REQUEST_FIELDS)


async def _run(config: ServeConfig, body: dict[str, JSONValue], images: Sequence[str], output: Path) -> None:
    """Start a worker, draw, write. Ctrl-C and SIGTERM end the worker, too."""
    console = Console(stderr=True)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with frames_folder() as frames_dir:
        inputs = await _inputs(config, images, frames_dir) if images else None
        engine, pool = WorkerEngine(config, frames_dir), MediaPool(frames_dir)
        loras = Loras(config, engine, LoraFinder.of(config))
        try:
            await loras.find_first()
            with console.status(f"loading {config.model_path}"):
                await engine.start()
                card = await engine.wait_ready()
                await loras.set_first(card)
            call = Resolver(config=config).images(body, card, OWNER, inputs, await loras.choose(body, card))
            drawings = call.drawings
            for sentence in _remarks(call):
                console.print(sentence)
            with _progress(console) as progress:
                await _draw(engine, pool, card, drawings, _names(output, len(drawings)), config, progress)
        finally:
            await engine.stop(GRACE_S)
            pool.close()


async def _inputs(config: ServeConfig, images: Sequence[str], folder: Path) -> Inputs:
    decoders = DecoderPool(max_pixels=config.max_pixels)
    try:
        return await from_files(images, root=folder, decoders=decoders)
    finally:
        await decoders.close()


async def _draw(
    engine: Engine,
    pool: MediaPool,
    card: ModelCard,
    drawings: Sequence[Drawing],
    names: Sequence[Path],
    config: ServeConfig,
    progress: Progress,
) -> None:
    """Submit every picture at once, so that they share forward passes, and write each when it is done."""

    async def one(drawing: Drawing, name: Path) -> None:
        total = drawing.request.num_inference_steps
        row = progress.add_task(name.name, total=1.0, detail=f"step 0/{total}")
        finished = await _finished(engine, drawing, progress, row)
        provenance = describe(drawing.request, drawing.output, card) if config.metadata else None
        picture = await pool.encode_picture(finished.frames, drawing.output, provenance)
        try:
            await asyncio.to_thread(name.write_bytes, picture.data)
        except OSError as error:
            raise GenerationFailed(f"'{name}' cannot be written: {error.strerror}.") from error
        progress.update(row, completed=1.0, detail=f"step {total}/{total}")
        print(f"{name}  seed {drawing.request.seed}  {picture.width}x{picture.height}", flush=True)
        for sentence in finished.warnings:
            progress.console.print(sentence)

    try:
        async with asyncio.TaskGroup() as group:
            for drawing, name in zip(drawings, names, strict=True):
                group.create_task(one(drawing, name))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _finished(engine: Engine, drawing: Drawing, progress: Progress, row: TaskID) -> Finished:
    """Wait for one job's pixels. Raises what the worker reports."""
    ended: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()

    def listen(event: JobEvent) -> None:
        match event:
            case Step(phase=phase, step=step, num_steps=num_steps, fraction=fraction):
                detail = f"step {step}/{num_steps}" if phase == "denoise" else phase
                progress.update(row, completed=fraction, detail=detail)
            case Finished() if not ended.done():
                ended.set_result(event)
            case Failed() if not ended.done():
                error = JOB_ERRORS.get(event.code, GenerationFailed)
                ended.set_exception(error(event.message, param=event.param, code=event.code))

    engine.submit(drawing.request, listen)
    return await ended


def _remarks(call: ImagesCall) -> list[str]:
    """Return what the user should know before the picture comes."""
    remarks = list(call.warnings)
    if call.ignored:
        remarks.append(f"this model has no use for: {', '.join(call.ignored)}")
    drawn = call.drawings[0].generated_size
    if drawn != call.size:
        remarks.append(f"drawn at {drawn}, delivered at {call.size}")
    return remarks


def _names(output: Path, count: int) -> list[Path]:
    """Return one name a picture: ``out.png``, or ``out-1.png`` to ``out-4.png`` for four."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )
