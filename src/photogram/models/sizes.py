"""How large the parts of a checkpoint are, from the heads of its safetensors files; no weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.worker_config import Precisions
from .families import DEFAULTS
from .tensor_heads import STORED_BYTES, read_head

Kind = Literal["denoiser", "text_encoder", "image_encoder", "vae", "other"]

BYTES_EACH: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# Of encoders the lists of layers lie deeper than of denoisers.
_BLOCK = re.compile(r"([A-Za-z_]\w*\.\d+)\.")
_ENCODER_BLOCK = re.compile(r"((?:[A-Za-z_]\w*\.)+?\d+)\.")


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a pipeline as it will be loaded. `block_bytes` is its largest layer, and `outside_bytes` what
    lies in none: of a component that comes in layer by layer, two of the one and all of the other are on the device."""

    name: str
    kind: Kind
    precision: str
    num_bytes: int
    block_bytes: int = 0
    outside_bytes: int = 0

    @property
    def layerwise_bytes(self) -> int:
        return self.outside_bytes + 2 * self.block_bytes


def is_denoiser(name: str) -> bool:
    """Say whether a component of this name is what a pipeline's loop calls; the names are diffusers' own."""
    return name.startswith(("transformer", "unet", "prior", "decoder", "controlnet")) and "encoder" not in name


def kind_of(name: str) -> Kind:
    if is_denoiser(name):
        return "denoiser"
    for prefix in ("text_encoder", "image_encoder", "vae"):
        if name.startswith(prefix):
            return prefix  # type: ignore[return-value]
    return "other"


def precision_of(name: str, wanted: Precisions, pipeline_class: str, default: str) -> str:
    """Return the precision (fp32, bf16, fp16) in which a component is loaded.

    What is asked for one kind of component goes before what is asked for all, and that before what the family needs;
    `default` is the device's.
    """
    asked = {"denoiser": wanted.dit, "vae": wanted.vae, "text_encoder": wanted.text_encoder}.get(kind_of(name), "auto")
    if asked != "auto":
        return asked
    family = DEFAULTS.get(pipeline_class)
    if family is not None and name in family.fp32:
        return "fp32"
    return default if wanted.all == "auto" else wanted.all


def parts_of(
    folder: Path, index: Mapping[str, Any], *, variant: str | None, wanted: Precisions, default: str
) -> tuple[Part, ...]:
    """Return the components of a pipeline's folder that have weights; `index` is its model_index.json.

    Raises ConfigError for a file that is no safetensors file.
    """
    found: list[Part] = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        files = weight_files(folder / name, variant)
        if not files:
            continue
        precision = precision_of(name, wanted, index["_class_name"], default)
        blocks: defaultdict[str, int] = defaultdict(int)
        total = outside = 0
        for tensor, stored in (entry for file in files for entry in read_head(file).items()):
            each = BYTES_EACH[precision] if stored.dtype in _FLOATING else STORED_BYTES.get(stored.dtype, 1)
            num_bytes = stored.count * each
            total += num_bytes
            match = (_ENCODER_BLOCK if kind_of(name) == "text_encoder" else _BLOCK).match(tensor)
            if match is None:
                outside += num_bytes
            else:
                blocks[match.group(1)] += num_bytes
        largest = max(blocks.values(), default=0)
        found.append(Part(name, kind_of(name), precision, total, largest, outside))
    return tuple(found)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files that are loaded of a component's folder: the variant's, else those of none."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if variant is not None and (chosen := [file for file in files if f".{variant}" in file.name]):
        return chosen
    plain = [file for file in files if re.fullmatch(r"[\w-]+", file.stem)]
    return plain or files
