"""Applies what the settings and the device ask for to the networks of a pipeline, and says what was done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...core.config import Tuning
from .attention import Attention, choose_attention
from .compiling import compile_repeated
from .cpu_convolutions import use_onednn
from .fusing import fuse
from .graphs import CudaRecorder, Graphs
from .kernels.ops import can_fuse
from .memory_format import use_channels_last

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was done, a line for each thing, and what is to be around calls from then on."""

    lines: tuple[str, ...]
    attention: Attention
    graphs: Graphs | None


def tune(
    networks: Mapping[str, torch.nn.Module], denoisers: frozenset[str], wanted: Tuning, device: torch.device
) -> Tuned:
    """Tune a pipeline's networks, by their names, in place.

    To be called once they are on their device or in the host memory they wait in, before anything keeps copies of
    their weights. Raises ConfigError for what this device cannot do.
    """
    done: list[str] = []
    attention = choose_attention(wanted.attention_backend, device)
    if attention.name != "torch":
        done.append(f"attention: {attention.name} first")
    if wanted.channels_last and device.type == "cuda":
        for name, network in networks.items():
            if name.startswith(("vae", "unet")) and (count := use_channels_last(network)):
                done.append(f"{name}: {count} convolutions channels last")
    if wanted.onednn_convolutions and device.type == "cpu":
        for name, network in networks.items():
            if name.startswith("vae") and (count := use_onednn(network)):
                done.append(f"{name}: {count} convolutions by oneDNN")
    if wanted.fused_kernels and can_fuse(device):
        for name in sorted(name for name in networks if name in denoisers or name.startswith("vae")):
            if count := fuse(networks[name]):
                done.append(f"{name}: {count} parts over fused kernels")
    elif wanted.fused_kernels:
        logger.info("--fused-kernels has no effect here: it needs a GPU and Triton")
    if wanted.compile:
        for name in sorted(denoisers):
            parts = compile_repeated(networks[name])
            done.append(f"{name}: {len(parts)} blocks compiled")
    graphs: Graphs | None = None
    if wanted.cuda_graphs and device.type == "cuda":
        graphs = Graphs(CudaRecorder(device), device, wanted.cuda_graph_memory_bytes)
        done.append(f"CUDA graphs of launch-bound calls, {wanted.cuda_graph_memory_bytes / 1e9:.1f} GB at most")
    elif wanted.cuda_graphs:
        logger.info("--cuda-graphs has no effect on a CPU")
    for line in done:
        logger.info("%s", line)
    return Tuned(tuple(done), attention, graphs)
