"""Write the docs' table of what the plan of memory chooses for well-known models, or with `--check` say if it is old.

    python -m tools.memory_table

Networks of the published configurations are made without memory; what is written of their weights are the heads of
files, which is all that the plan reads.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from benchmarks.encoders import clip_l, qwen3_4b, t5_xxl
from benchmarks.workloads import wan, workloads
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, ModelMixin
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
)

from photogram.core.config import ServeConfig
from photogram.models.checkpoint import find_checkpoint
from photogram.models.memory_plan import MemoryPlan
from photogram.models.memory_report import plan_of

PAGE = Path(__file__).resolve().parents[1] / "docs/memory-and-gpus.md"
BLOCK = re.compile(r"(<!-- placements -->\n).*?(<!-- end -->)", re.DOTALL)
GB = 10**9
NEVER_SHORT = 10**15  # bytes of host memory

DEVICES: Mapping[str, tuple[int, int]] = {
    "12 GB": (12, 1),
    "24 GB": (24, 1),
    "48 GB": (48, 1),
    "80 GB": (80, 1),
    "2 x 24 GB": (24, 2),
    "2 x 80 GB": (80, 2),
}
"""GB of one GPU and how many share one model."""

WORDS: Mapping[str, str] = {
    "text_encoder_cpu_offload": "text",
    "text_encoder_layerwise_offload": "text layers",
    "vae_cpu_offload": "VAE",
    "vae_tiling": "tiles",
    "dit_cpu_offload": "denoiser",
    "dit_layerwise_offload": "layers",
}


@dataclass(frozen=True, slots=True)
class WellKnown:
    """One pipeline of published configurations."""

    name: str  # as `photogram doctor` has it
    pipeline_class: str
    networks: Mapping[str, Callable[[], torch.nn.Module]]


def _clip_g() -> torch.nn.Module:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1280,
            num_hidden_layers=32,
            num_attention_heads=20,
        )
    )


def _qwen3_4b() -> torch.nn.Module:
    return Qwen3ForCausalLM(qwen3_4b())


def _qwen25_vl_7b() -> torch.nn.Module:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _vae(latent_channels: int) -> torch.nn.Module:
    return AutoencoderKL(
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )


def well_known() -> tuple[WellKnown, ...]:
    of = workloads(tiny=False)
    wan_2_1 = {"text_encoder": of["umt5"].make, "vae": AutoencoderKLWan}
    return (
        WellKnown(
            "Stable Diffusion XL",
            "StableDiffusionXLPipeline",
            {
                "unet": of["sdxl-1024"].make,
                "text_encoder": clip_l,
                "text_encoder_2": _clip_g,
                "vae": lambda: _vae(4),
            },
        ),
        WellKnown(
            "FLUX.2 klein 4B",
            "Flux2KleinPipeline",
            {
                "transformer": of["klein-1024"].make,
                "text_encoder": _qwen3_4b,
                "vae": AutoencoderKLFlux2,
            },
        ),
        WellKnown(
            "Z-Image",
            "ZImagePipeline",
            {
                "transformer": of["z-image-1024"].make,
                "text_encoder": _qwen3_4b,
                "vae": lambda: _vae(16),
            },
        ),
        WellKnown(
            "FLUX.1",
            "FluxPipeline",
            {
                "transformer": of["flux1-1024"].make,
                "text_encoder": clip_l,
                "text_encoder_2": t5_xxl,
                "vae": lambda: _vae(16),
            },
        ),
        WellKnown(
            "Qwen-Image",
            "QwenImagePipeline",
            {
                "transformer": of["qwen-1024"].make,
                "text_encoder": _qwen25_vl_7b,
                "vae": AutoencoderKLQwenImage,
            },
        ),
        WellKnown("Wan 2.1 1.3B", "WanPipeline", {"transformer": of["wan-480p"].make, **wan_2_1}),
        WellKnown("Wan 2.1 14B", "WanPipeline", {"transformer": wan(tiny=False, is_14b=True).make, **wan_2_1}),
    )


def write_heads(model: WellKnown, folder: Path) -> int:
    """Write a folder of the model whose weights are holes in the disk; return how many parameters they stand for."""
    index: dict[str, object] = {"_class_name": model.pipeline_class}
    count = 0
    for name, make in model.networks.items():
        with init_empty_weights():
            network = make()
        if isinstance(network, PreTrainedModel):
            network.tie_weights()  # without memory every weight was made by itself
        part = folder / name
        part.mkdir(parents=True)
        library = "diffusers" if isinstance(network, ModelMixin) else "transformers"
        index[name] = [library, type(network).__name__]
        if isinstance(network, ModelMixin):
            network.save_config(part)
        head: dict[str, object] = {}
        end = 0
        for path, parameter in network.named_parameters():  # each tied one once, as files have them
            size = 2 * parameter.numel()
            head[path] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(head).encode()
        with (part / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        count += end // 2
    (folder / "model_index.json").write_text(json.dumps(index))
    return count


def plan(folder: Path, memory_gb: int, num_gpus: int) -> MemoryPlan:
    """Return what `photogram doctor --memory-gb` would say of the folder."""
    config = ServeConfig(model_path=str(folder), num_gpus=num_gpus, data_dir=str(folder)).worker(folder)
    checkpoint = find_checkpoint(str(folder), revision=None, variant=None)
    return plan_of(
        checkpoint, config, memory_bytes=memory_gb * GB, host_bytes=NEVER_SHORT, default_precision="bf16"
    ).plan


def cell(found: MemoryPlan) -> str:
    if not found.fits:
        return "does not fit"
    return ", ".join(word for flag, word in WORDS.items() if getattr(found.placement, flag)) or "all"


def rows(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Return by model the number of its parameters and a cell for each of the devices."""
    found: dict[str, tuple[int, list[str]]] = {}
    for model in well_known():
        count = write_heads(model, folder / model.name)
        found[model.name] = count, [cell(plan(folder / model.name, *device)) for device in DEVICES.values()]
    return found


def table(found: Mapping[str, tuple[int, list[str]]]) -> str:
    head = ("model", "weights", *DEVICES)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (count, cells) in found.items():
        lines.append("| " + " | ".join((name, f"{2 * count / GB:.1f} GB", *cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        text = table(rows(Path(folder)))
    page = PAGE.read_text()
    wanted = BLOCK.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)
    if "--check" in sys.argv:
        return int(page != wanted)
    PAGE.write_text(wanted)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
