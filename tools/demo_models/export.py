"""Writes trained checkpoints as the diffusers folders that ship with the package (bf16, safetensors only)."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from . import image_model, video_model
from .image_trainer import SHIFT
from .run import load_weights, save_tensors
from .video_tokenizer import save_for_pipeline
from .video_trainer import SHIFT as VIDEO_SHIFT


def export_image(folder: Path, target: Path, checkpoint: str = "image_distilled") -> None:
    """Write the image pipeline's folder from `folder`'s checkpoints."""
    vae, transformer = image_model.new_autoencoder(), image_model.new_transformer()
    text_encoder = image_model.new_text_encoder()
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


def export_video(folder: Path, target: Path, checkpoint: str = "video_base") -> None:
    """Write the video pipeline's folder from `folder`'s checkpoints: bf16, the transformer's blocks in fp8.

    The blocks' matrices are most of the weights, and stock `from_pretrained` reads fp8 into the precision asked for.
    """
    vae, scale = video_model.new_autoencoder(), video_model.LatentScale()
    transformer, text_encoder = video_model.new_transformer(), video_model.new_text_encoder()
    load_weights(folder / "video_vae.safetensors", {"vae": vae, "scale": scale})
    load_weights(folder / f"{checkpoint}.safetensors", {"transformer": transformer, "text_encoder": text_encoder})
    vae.register_to_config(latents_mean=scale.mean.tolist(), latents_std=scale.std.tolist())
    for part in target.glob("*/"):
        shutil.rmtree(part)
    save_for_pipeline(target / "tokenizer")
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(target / "tokenizer"),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=VIDEO_SHIFT
        ),
        transformer=transformer.eval(),
        expand_timesteps=True,
    )
    pipeline.to(torch.bfloat16)
    for name, parameter in transformer.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    pipeline.save_pretrained(target)
    finish_folder(target)


def import_video(source: Path, folder: Path) -> None:
    """The way back: checkpoints to go on from, of a pipeline's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = "diffusion_pytorch_model.safetensors"
    transformer, vae = load_file(source / "transformer" / weights), load_file(source / "vae" / weights)
    wide = {name: tensor.to(torch.bfloat16) for name, tensor in transformer.items()}
    text_encoder = load_file(source / "text_encoder" / "model.safetensors")
    save_tensors(folder / "video_base.safetensors", {"transformer": wide, "text_encoder": text_encoder})
    facts = json.loads((source / "vae" / "config.json").read_text())
    scale = {"mean": torch.tensor(facts["latents_mean"]), "std": torch.tensor(facts["latents_std"])}
    save_tensors(folder / "video_vae.safetensors", {"vae": vae, "scale": scale})


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
