"""One rank of a test group: compares what each VAE decodes with all ranks and alone."""

from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from photogram.core.parallel import Degrees
from photogram.worker.parallel.decoding import LEAST_ROWS, can_split, split_decoder
from photogram.worker.parallel.lengths import Lengths
from photogram.worker.parallel.mesh import arrange
from photogram.worker.tuning.fusing import fuse

from .ranks import met


def latents_of(vae: torch.nn.Module, *, rows: int, columns: int) -> torch.Tensor:
    """Two pictures, or a clip of three latent frames."""
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    is_clip = "temporal_compression_ratio" in vae.config or "temperal_downsample" in vae.config
    shape = (1, channels, 3, rows, columns) if is_clip else (2, channels, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def decoder_differences(rank: int, world: int, kind: str, meeting_file: Path, folders: list[Path]) -> dict[str, float]:
    """Return, on the first rank, the largest difference of each model and shape, over the spread of what is right."""
    return compare_decoders(rank, world, met(rank, world, kind, meeting_file), folders)


def compare_decoders(
    rank: int, world: int, device: torch.device, folders: list[Path], *, fused: bool = False
) -> dict[str, float]:
    """`decoder_differences` of ranks that have met; `fused`, with the decoder's parts over fused kernels."""
    mesh = arrange(Degrees(ulysses=world), rank, device)
    differences = {}
    widths: list[int] = []  # of what the last layer gets, along the longer side
    longer = LEAST_ROWS * world + 1  # divides by nothing
    with torch.inference_mode():
        for folder in folders:
            vae = DiffusionPipeline.from_pretrained(folder).vae.to(device)
            assert can_split(vae), type(vae).__name__
            wide, tall = latents_of(vae, rows=2, columns=longer), latents_of(vae, rows=longer, columns=2)
            cases = {"wide": wide, "tall": tall, "small": latents_of(vae, rows=4, columns=6)}
            cases = {name: latents.to(device) for name, latents in cases.items()}
            alone = {name: vae.decode(latents).sample for name, latents in cases.items()} if rank == 0 else {}
            lengths = Lengths(mesh)
            if fused:
                assert fuse(vae)
            split_decoder(vae, mesh, lengths)
            vae.decoder.conv_out.register_forward_pre_hook(lambda _, args: widths.append(max(args[0].shape[-2:])))
            for name, latents in cases.items():
                for _ in range(2):  # lengths are learned by the first
                    lengths.begin(name)
                    together = vae.decode(latents).sample
                    lengths.end()
                    is_cut = widths[-1] < max(together.shape[-2:]) // (vae.config.get("patch_size") or 1)
                    assert is_cut == (name != "small"), f"{folder} {name}: {widths[-1]}"
                    if rank == 0:
                        error = float((together - alone[name]).abs().max() / alone[name].std())
                        key = f"{folder.name} {name}"
                        differences[key] = max(error, differences.get(key, 0.0))
    dist.barrier()  # the last may still wait for what the first has to send
    return differences


def fused_decoder_differences(
    rank: int, world: int, kind: str, meeting_file: Path, folders: list[Path]
) -> dict[str, float]:
    """The same of decoders over fused kernels, against the plain ones."""
    return compare_decoders(rank, world, met(rank, world, kind, meeting_file), folders, fused=True)
