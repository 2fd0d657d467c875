"""One rank of a test group: compares each sharded denoiser with the whole one, at every way of laying out the ranks."""

import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from photogram.core.parallel import Degrees
from photogram.worker.parallel import attention
from photogram.worker.parallel.attention import Shares, attend
from photogram.worker.parallel.lengths import Lengths
from photogram.worker.parallel.mesh import arrange, meet
from photogram.worker.parallel.sharding import shard
from photogram.worker.tuning.compiling import compile_repeated
from photogram.worker.tuning.fusing import fuse


def calls_of(pipeline: DiffusionPipeline) -> list[tuple[tuple, dict]]:
    """The denoiser's calls of a short run with guidance, at a size whose tokens divide by nothing."""
    noted = []
    real = pipeline.transformer.forward

    def noting(*args, **kwargs):
        noted.append((args, kwargs))
        return real(*args, **kwargs)

    pipeline.transformer.forward = noting
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": "a red circle above a blue square " * 4,  # with the other one as rows of a call: text masks
        "negative_prompt": "pale",
        "width": 80,
        "height": 48,
        "output_type": "latent",
    }
    if "num_frames" in inspect.signature(pipeline.__call__).parameters:
        arguments["num_frames"] = 9
    if "LTX" in type(pipeline).__name__:
        arguments |= {"width": 160, "height": 96}  # twice as many pixels a token
    if "Flux2" in type(pipeline).__name__:
        del arguments["negative_prompt"]
    pipeline(**arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    pipeline.transformer.forward = real
    return noted


def joined(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else torch.stack(result)


def compiled(denoiser: torch.nn.Module, **options: Any) -> None:
    """Compile the blocks; a part that a compiler cannot look into without a break is an error."""
    torch._dynamo.reset()  # the limit of programs is a process's
    assert compile_repeated(denoiser, fullgraph=True, **options)


TUNED: dict[str, Callable[[torch.nn.Module], object]] = {
    "": lambda denoiser: None,
    "fused": fuse,
    "traced": partial(compiled, backend="aot_eager"),
    "fused and traced": lambda denoiser: (fuse(denoiser), compiled(denoiser, backend="aot_eager")),
    "compiled": compiled,
    "fused and compiled": lambda denoiser: (fuse(denoiser), compiled(denoiser)),
}


def denoiser_differences(
    rank: int, world: int, kind: str, meeting_file: Path, folders: list[Path], tuned: Sequence[str] = ("",)
) -> dict[str, float]:
    """Return the largest difference of each model, layout and way to tune its blocks, over the spread of what is
    right."""
    device = met(rank, world, kind, meeting_file)
    return compare_denoisers(rank, world, device, folders, tuned)


def met(rank: int, world: int, kind: str, meeting_file: Path) -> torch.device:
    """Meet the other ranks, ready for bits to be compared; return this rank's device."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.backends.cudnn.allow_tf32 = False
    meet(world, rank, device, meeting_file)
    return device


def compare_denoisers(
    rank: int, world: int, device: torch.device, folders: list[Path], tuned: Sequence[str]
) -> dict[str, float]:
    """`denoiser_differences` of ranks that have met."""
    layouts = [Degrees(ulysses=u, ring=world // u) for u in (1, 2)]  # the tiny denoisers have two heads
    meshes = [arrange(degrees, rank, device) for degrees in layouts]
    differences = {}
    with torch.inference_mode():
        for folder in folders:
            pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
            calls = calls_of(pipeline)
            expected = [joined(pipeline.transformer(*args, **kwargs)[0]) for args, kwargs in calls]
            for mesh, way in itertools.product(meshes, tuned):
                denoiser = type(pipeline.transformer).from_pretrained(folder, subfolder="transformer").to(device)
                TUNED[way](denoiser)
                lengths = Lengths(mesh)
                shares = Shares(mesh, lengths)
                shard(denoiser, shares)
                errors = []
                for index, (args, kwargs) in enumerate(calls):
                    lengths.begin(str(index % 2))  # the prompt's and the negative prompt's calls differ in length
                    out = joined(denoiser(*args, **kwargs)[0])
                    lengths.end()
                    errors.append(float((out - expected[index]).abs().max() / expected[index].std()))
                name = f"{folder.name} {mesh.degrees.ulysses}x{mesh.degrees.ring} {way}".strip()
                differences[name] = max(errors)
                if rank == 0:
                    print(f"{name}: {differences[name]:.1e}", file=sys.stderr, flush=True)
    dist.barrier()  # the last may still wait for what the first has to send
    return differences


def attention_differences(rank: int, world: int, kind: str, meeting_file: Path) -> dict[str, float]:
    """Return the largest difference of attention over the ranks to plain attention, over the spread of what is right:
    with and without a mask, of one row and of two, heads exchanged at once and in parts."""
    device = met(rank, world, kind, meeting_file)
    mesh = arrange(Degrees(ulysses=world), rank, device)
    shares, differences = Shares(mesh, Lengths(mesh)), {}
    for rows, has_mask, least_bytes in itertools.product((1, 2), (False, True), (0, attention.LEAST_BYTES_IN_PARTS)):
        attention.LEAST_BYTES_IN_PARTS = least_bytes
        generator = torch.Generator().manual_seed(rows)
        q, k, v = (torch.randn(rows, 13, 2 * world, 8, generator=generator).to(device) for _ in range(3))
        mask = torch.arange(13, device=device).expand(rows, 13) < 10 if has_mask else None
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=None if mask is None else mask[:, None, None]
        ).transpose(1, 2)
        own = [x.tensor_split(world, dim=1)[rank] for x in (q, k, v, expected)]
        own_mask = None if mask is None else mask.tensor_split(world, dim=1)[rank]
        shares.lengths.begin((rows, has_mask, least_bytes))
        out = attend(*own[:3], own_mask, None, shares)
        shares.lengths.end()
        name = f"{rows} rows, {'a' if has_mask else 'no'} mask, {'two parts' if least_bytes == 0 else 'one part'}"
        differences[name] = float((out - own[3]).abs().max() / expected.std())
    dist.barrier()
    return differences
