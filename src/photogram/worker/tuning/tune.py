"""Applies what the settings and the device ask for to the networks of a pipeline, and says what was done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...core.worker_config import Tuning
from .attention import Attention, choose_attention
from .compiling import compile_repeated
from .cpu_convolutions import use_onednn
from .fusing import fuse
from .graphs import CudaRecorder, Graphs
from .joining import join_products
from .kernels.ops import can_fuse
from .memory_format import use_channels_last
from .modulation import ModulationTable, modulation_table
from .padding import is_padding_unread

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was done, a line for each thing, and what is to be around calls from then on."""

    lines: tuple[str, ...]
    attention: Attention
    graphs: Graphs | None
    tables: Mapping[str, ModulationTable]
    """Of the networks that have one, by name."""
    leave_padding: frozenset[str]
    """Text encoders whose prompts need not be padded."""


def tune(
    networks: Mapping[str, torch.nn.Module],
    denoisers: frozenset[str],
    wanted: Tuning,
    device: torch.device,
    away: frozenset[str] = frozenset(),
    *,
    is_alone: bool = True,
) -> Tuned:
    """Tune a pipeline's networks, by their names, in place. Those `away` are on the device for their calls only.

    Where other ranks run the same calls (not `is_alone`) no tables are kept: those of all ranks would have to be equal.

    To be called once they are on their device or in the host memory they wait in, before anything keeps copies of
    their weights. Raises ConfigError for what this device cannot do.
    """
    done: list[str] = []
    tables: dict[str, ModulationTable] = {}
    leave_padding: set[str] = set()
    attention = choose_attention(wanted.attention_backend, device)
    if attention.name != "torch":
        done.append(f"attention: {attention.name} first")
    if wanted.search_convolutions and device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # torch's switch for a process, which serves one model
        done.append("convolutions: the fastest of cuDNN's kernels")
    if wanted.channels_last and device.type == "cuda":
        for name, network in networks.items():
            if name.startswith(("vae", "unet")) and (count := use_channels_last(network)):
                done.append(f"{name}: {count} convolutions channels last")
    if wanted.onednn_convolutions and device.type == "cpu":
        for name, network in networks.items():
            if name.startswith("vae") and (count := use_onednn(network)):
                done.append(f"{name}: {count} convolutions by oneDNN")
    if wanted.fused_kernels and can_fuse(device):
        for name in sorted(name for name in networks if name in denoisers or name.startswith(("vae", "text_encoder"))):
            if count := fuse(networks[name]):
                done.append(f"{name}: {count} parts over fused kernels")
            if name in denoisers and name not in away and (count := join_products(networks[name])):
                done.append(f"{name}: {count} products joined")
            if is_alone and name not in away and (table := modulation_table(networks[name])) is not None:
                tables[name] = table
                done.append(f"{name}: a table of modulation, {table.num_bytes / 1e9:.2f} GB")
            if is_padding_unread(networks[name]):
                leave_padding.add(name)
                done.append(f"{name}: prompts without their padding")
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
    return Tuned(tuple(done), attention, graphs, tables, frozenset(leave_padding))
