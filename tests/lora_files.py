"""LoRA files made on the spot: safetensors bytes without torch, and random LoRAs for the built-in image model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

DEMO_TRANSFORMER = (
    Path(__file__).parents[1] / "src/photogram/demo/image/transformer/diffusion_pytorch_model.safetensors"
)
_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int8": "I8"}
# The layers that tools/demo_models trains: every linear one inside the blocks.
_LAYERS = re.compile(
    r"(transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))\.weight"
)


def safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    blocks: list[bytes] = []
    end = 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        offsets = [end, end + len(data)]
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        blocks.append(data)
        end += len(data)
    return framed(json.dumps(header).encode(), b"".join(blocks))


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tiny_lora(rank: int = 2) -> bytes:
    """A well-formed LoRA of one layer, for no model in particular."""
    rng = np.random.default_rng(rank)
    return safetensors(
        {
            "transformer.block.0.to_q.lora_A.weight": rng.standard_normal((rank, 4)).astype("float32"),
            "transformer.block.0.to_q.lora_B.weight": rng.standard_normal((4, rank)).astype("float32"),
            "transformer.block.0.to_q.alpha": np.array(rank, "float32"),
        },
        {"format": "pt"},
    )


def demo_lora(path: Path, *, seed: int, rank: int = 4, size: float = 0.35) -> Path:
    """Write a random LoRA for every linear layer of the built-in image model, in diffusers' layout.

    `size` is the norm of each update relative to its weight's: visible at 0.35.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, (out_features, in_features), norm in _demo_layers():
        down = rng.standard_normal((rank, in_features))
        up = rng.standard_normal((out_features, rank))
        up *= size * norm / np.linalg.norm(up @ down)
        tensors[f"transformer.{name}.lora_A.weight"] = down.astype("float32")
        tensors[f"transformer.{name}.lora_B.weight"] = up.astype("float32")
    path.write_bytes(safetensors(tensors, {"format": "pt"}))
    return path


def _demo_layers() -> list[tuple[str, tuple[int, int], float]]:
    """(module, shape, norm) of the layers that a LoRA changes."""
    data = DEMO_TRANSFORMER.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    layers = []
    for name, entry in sorted(header.items()):
        if _LAYERS.fullmatch(name):
            first, after = (8 + length + offset for offset in entry["data_offsets"])
            norm = _norm(data[first:after], entry["dtype"])
            layers.append((name.removesuffix(".weight"), tuple(entry["shape"]), norm))
    assert layers
    return layers


def _norm(data: bytes, dtype: str) -> float:
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view("float32")
    else:
        values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("float32")
    return float(np.linalg.norm(values))
