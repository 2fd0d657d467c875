"""One rank of a test group: compares each sharded denoiser with the whole one, at every way of laying out the ranks."""

import inspect
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from photogram.core.parallel import Degrees
from photogram.worker.parallel.attention import Shares
from photogram.worker.parallel.lengths import Lengths
from photogram.worker.parallel.mesh import arrange, meet
from photogram.worker.parallel.sharding import shard


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


def denoiser_differences(rank: int, world: int, kind: str, meeting_file: Path, folders: list[Path]) -> dict[str, float]:
    """Return the largest difference of each model and layout, over the spread of what is right."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.backends.cudnn.allow_tf32 = False
    meet(world, rank, device, meeting_file)
    layouts = [Degrees(ulysses=u, ring=world // u) for u in (1, 2)]  # the tiny denoisers have two heads
    meshes = [arrange(degrees, rank, device) for degrees in layouts]
    differences = {}
    with torch.inference_mode():
        for folder in folders:
            pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
            calls = calls_of(pipeline)
            expected = [joined(pipeline.transformer(*args, **kwargs)[0]) for args, kwargs in calls]
            for mesh in meshes:
                denoiser = type(pipeline.transformer).from_pretrained(folder, subfolder="transformer").to(device)
                lengths = Lengths(mesh)
                shard(denoiser, Shares(mesh, lengths))
                errors = []
                for index, (args, kwargs) in enumerate(calls):
                    lengths.begin(str(index % 2))  # the prompt's and the negative prompt's calls differ in length
                    out = joined(denoiser(*args, **kwargs)[0])
                    lengths.end()
                    errors.append(float((out - expected[index]).abs().max() / expected[index].std()))
                layout = f"{mesh.degrees.ulysses}x{mesh.degrees.ring}"
                differences[f"{folder.name} {layout}"] = max(errors)
    dist.barrier()  # the last may still wait for what the first has to send
    return differences
