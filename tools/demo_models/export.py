"""Writes trained checkpoints as the diffusers folders that ship with the package (bf16, safetensors only)."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from .image_model import new_autoencoder, new_text_encoder, new_transformer
from .image_trainer import SHIFT
from .run import load_weights, save_tensors


def export_image(folder: Path, target: Path, checkpoint: str = "image_distilled") -> None:
    """Write the image pipeline's folder from `folder`'s checkpoints."""
    vae, transformer, text_encoder = new_autoencoder(), new_transformer(), new_text_encoder()
    load_weights(folder / "image_vae.safetensors", {"vae": vae})
    load_weights(folder / f"{checkpoint}.safetensors", {"transformer": transformer, "text_encoder": text_encoder})
    text_encoder.tie_weights()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "image_tokenizer"),
        transformer=transformer.eval(),
        is_distilled=True,
    )
    for part in target.glob("*/"):
        shutil.rmtree(part)  # the model's card (photogram.json) is written by hand and stays
    pipeline.to(torch.bfloat16).save_pretrained(target)
    finish_folder(target)


def import_image(source: Path, folder: Path) -> None:
    """The way back: checkpoints to go on from, of a pipeline's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = "diffusion_pytorch_model.safetensors"
    transformer, vae = load_file(source / "transformer" / weights), load_file(source / "vae" / weights)
    text_encoder = load_file(source / "text_encoder" / "model.safetensors")
    save_tensors(folder / "image_base.safetensors", {"transformer": transformer, "text_encoder": text_encoder})
    save_tensors(folder / "image_vae_start.safetensors", {"vae": vae})
    shutil.copytree(source / "tokenizer", folder / "image_tokenizer", dirs_exist_ok=True)


def finish_folder(target: Path) -> None:
    """Make the folder load in fp32 unless told otherwise, as diffusers' own modules do, and readable by all."""
    config = target / "text_encoder" / "config.json"
    facts = json.loads(config.read_text())
    facts["dtype"] = "float32"
    config.write_text(json.dumps(facts, indent=2) + "\n")
    for file in target.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def folder_size(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
