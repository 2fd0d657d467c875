"""Which component goes where: reads the settings once, after loading, and moves everything to its place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from diffusers import DiffusionPipeline

from ..core.worker_config import Placement
from ..models.sizes import kind_of
from .modules import BigModule
from .residency import Layerwise, Visitors

logger = logging.getLogger(__name__)

_DEEPEST = 4  # Qwen2.5-VL: model.language_model.layers


def place(pipeline: DiffusionPipeline, placement: Placement, device: torch.device) -> None:
    """Move every component that stays on the device there; those to be offloaded are left in host memory."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and not (device.type != "cpu" and is_offloaded(name, placement)):
            component.to(device)
    vae = pipeline.components.get("vae")
    if vae is not None:
        set_up_vae(vae, placement)


def set_up_vae(vae: torch.nn.Module, placement: Placement) -> None:
    """Have a VAE work in tiles and slices where so configured; every rank that decodes must do so alike."""
    if placement.vae_tiling:
        vae.enable_tiling()
    if placement.vae_slicing:
        vae.enable_slicing()


def offload(modules: Mapping[str, BigModule], placement: Placement, device: torch.device) -> Visitors:
    """Let the offloaded components come to the device for their calls. To be called once they are suspension points.

    On a CPU there is nowhere to offload from, and nothing is done.
    """
    visitors = Visitors()
    wanted = {name: module for name, module in modules.items() if is_offloaded(name, placement)}
    if wanted and device.type == "cpu":
        logger.info("offloading %s has no effect on a CPU: its memory is the host's", ", ".join(sorted(wanted)))
        return visitors
    offload_to(visitors, wanted, placement, device)
    give_way(modules, visitors)
    return visitors


def offload_to(
    visitors: Visitors, wanted: Mapping[str, BigModule], placement: Placement, device: torch.device
) -> Visitors:
    """Offload these components, whatever the device."""
    pin = placement.pin_cpu_memory
    for name, module in wanted.items():
        is_layered = placement.dit_layerwise_offload if module.is_denoiser else placement.text_encoder_layerwise_offload
        blocks = _blocks(module) if is_layered and kind_of(name) in ("denoiser", "text_encoder") else []
        if blocks:
            layers = Layerwise(module.module, blocks, device, pin=pin)
            if module.loras is not None:
                module.loras.weights.wait_in(layers)
            _let_its_device_be(module.module, device)
            logger.info("%s: %d blocks come in one by one, two slots of %.2f GB", name, len(blocks),
                        layers.slot_bytes / 1e9)  # fmt: skip
            continue
        visitor = visitors.add(name, module.module, device, pin=pin, stays=module.is_denoiser)
        if module.loras is not None:
            module.loras.weights.come_and_go(visitor)
        for method, real in module.real.items():
            module.real[method] = visitors.calls_of(visitor, real)
        _let_its_device_be(module.module, device)
        where = "pinned host memory" if visitor.weights.is_pinned else "host memory"
        logger.info("%s: %.2f GB in %s, on the device for its calls", name, visitor.weights.num_bytes / 1e9, where)
    return visitors


def give_way(modules: Mapping[str, BigModule], visitors: Visitors) -> None:
    """Have those that came for their own calls leave once another network is called."""
    for name, module in modules.items():
        module.make_way = partial(visitors.make_way_for, name) if visitors.all else None


def _let_its_device_be(network: torch.nn.Module, device: torch.device) -> None:
    """Have a network that is elsewhere between its calls name the device they run on.

    Pipelines ask networks where they are and bring their arguments there (FLUX its token ids, its VAE's latents).
    """
    cls = type(network)
    network.__class__ = type(
        cls.__name__, (cls,), {"device": property(lambda self: device), "__module__": cls.__module__}
    )


def is_offloaded(name: str, placement: Placement) -> bool:
    """Say whether the component of this name waits in host memory."""
    wanted = {
        "denoiser": placement.dit_cpu_offload or placement.dit_layerwise_offload,
        "text_encoder": placement.text_encoder_cpu_offload or placement.text_encoder_layerwise_offload,
        "image_encoder": placement.image_encoder_cpu_offload,
        "vae": placement.vae_cpu_offload,
    }
    return bool(wanted.get(kind_of(name)))


def _blocks(module: BigModule) -> list[torch.nn.Module]:
    """Return the layers of a network in the order in which they run: the entries of its lists of modules, which in
    encoders lie deeper."""
    return list(_entries(module.module, 1 if module.is_denoiser else _DEEPEST))


def _entries(network: torch.nn.Module, depth: int) -> Iterator[torch.nn.Module]:
    for child in network.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif depth > 1:
            yield from _entries(child, depth - 1)
