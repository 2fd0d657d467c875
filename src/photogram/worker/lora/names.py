"""What the keys of LoRA files mean: the end of a key is a part of a change, the rest names a layer of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import DiffusionPipeline

# Ends of keys, as trainers write them, and the part of a change they stand for.
_ENDS: tuple[tuple[str, str], ...] = (
    (r"lora_A(?:\.default)?(?:\.weight)?|lora_down\.weight|lora(?:_linear_layer)?\.down\.weight", "down"),
    (r"lora_B(?:\.default)?(?:\.weight)?|lora_up\.weight|lora(?:_linear_layer)?\.up\.weight", "up"),
    (r"lora_B(?:\.default)?\.bias", "up_bias"),
    (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale", "magnitude"),
    (r"alpha", "alpha"),
    (r"diff", "difference"),
    (r"diff_b", "bias_difference"),
    *((rf"(?:lokr|hada)_({part})", "") for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")),
)
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<end>" + "|".join(f"(?:{end})" for end, _ in _ENDS) + ")")
_PARTS = [(re.compile(end), part) for end, part in _ENDS if part]

# How trainers begin keys of the main denoiser when they use its own layer names.
_DENOISER_PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "")
_UNDERSCORED = {
    "lora_unet_": 0,
    "lora_transformer_": 0,
    "lycoris_": 0,
    "lora_te_": 1,
    "lora_te1_": 1,
    "lora_te2_": 2,
}
"""Prefixes of names with underscores for dots, and the place of their module among denoiser and text encoders."""


def split(key: str) -> tuple[str, str] | None:
    """Return a key's layer name and the part of a change it holds; None for a key of no known kind."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    end = match["end"]
    for pattern, part in _PARTS:
        if pattern.fullmatch(end):
            return match["layer"], part
    return match["layer"], end


class LayerNames:
    """The layers of one pipeline's networks, found under the names that trainers give them."""

    def __init__(self, pipeline: DiffusionPipeline, modules: Iterable[str]) -> None:
        self.modules = tuple(modules)
        layers = {name: _layers(pipeline.components[name]) for name in self.modules}
        self._dotted: dict[str, tuple[str, str]] = {}
        main = self.modules[0]
        for name, by_name in layers.items():
            for spelled, layer in by_name.items():
                self._dotted[f"{name}.{spelled}"] = (name, layer)
        for prefix in _DENOISER_PREFIXES:
            for spelled, layer in layers[main].items():
                self._dotted.setdefault(f"{prefix}{spelled}", (main, layer))
                # peft's own files of a network that was wrapped as a part of a pipeline
                self._dotted.setdefault(f"base_model.model.{main}.{spelled}", (main, layer))
        encoders = [name for name in self.modules if name.startswith("text_encoder")]
        self._underscored: dict[str, tuple[str, str]] = {}
        for prefix, place in _UNDERSCORED.items():
            name = ([main, *encoders])[place] if place <= len(encoders) else None
            for spelled, layer in layers[name].items() if name is not None else ():
                self._underscored.setdefault(prefix + spelled.replace(".", "_"), (name, layer))

    def find(self, name: str) -> tuple[str, str] | None:
        """Return (module, layer) of a name in a key; None for one that is not the model's own."""
        return self._dotted.get(name) or self._underscored.get(name)


def _layers(module: torch.nn.Module) -> Mapping[str, str]:
    """The module's layers by every spelling of their names."""
    own = {name: name for name, layer in module.named_modules() if name and any(True for _ in layer.parameters(False))}
    # CLIP's text model was one level deeper in older versions of transformers.
    return own | {f"text_model.{name}": name for name in own if not name.startswith("text_model.")}
