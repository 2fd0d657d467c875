"""Which component goes where: reads the settings once, after loading, and moves everything to its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline

from ..core.worker_config import Placement
from ..models.sizes import kind_of
from .modules import BigModule
from .residency import Layerwise, Visitors

logger = logging.getLogger(__name__)


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
    return offload_to(visitors, wanted, placement, device)


def offload_to(
    visitors: Visitors, wanted: Mapping[str, BigModule], placement: Placement, device: torch.device
) -> Visitors:
    """Offload these components, whatever the device."""
    pin = placement.pin_cpu_memory
    for name, module in wanted.items():
        if module.is_denoiser and placement.dit_layerwise_offload:
            blocks = _blocks(module.module)
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
        "text_encoder": placement.text_encoder_cpu_offload,
        "image_encoder": placement.image_encoder_cpu_offload,
        "vae": placement.vae_cpu_offload,
    }
    return bool(wanted.get(kind_of(name)))


def _blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a denoiser in the order in which they run: the entries of its lists of modules."""
    return [block for child in denoiser.children() if isinstance(child, torch.nn.ModuleList) for block in child]
