"""Loads a pipeline for serving: weights, precision, device, and the few fields a served pipeline must not share."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import diffusers
import msgspec
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline

from ..core.card import ModelCard
from ..core.errors import ConfigError
from ..core.footprint import Room
from ..core.host_memory import available_memory_bytes
from ..core.request import GenerateRequest
from ..core.worker_config import Tuning, WorkerConfig
from ..models.checkpoint import Checkpoint, find_checkpoint
from ..models.derive import derive_card
from ..models.families import CHANGES_ITS_DENOISER
from ..models.latents import knows_latents
from ..models.measured_peaks import PeakRecord
from ..models.memory_report import plan_of
from ..models.sizes import is_denoiser
from ..models.two_stages import TWO_STAGES, UPSAMPLER
from ..models.uses import Route, Use, pipelines_by_use, route
from .beside import Shared
from .fast.fp8 import copy_to_fp8
from .guidance import Habits
from .long_prompts import read_in_chunks, reads_in_chunks
from .lora.conversion import lora_modules
from .lora.serving import ModuleServing
from .memory import memory_of, total_memory_of
from .modules import BigModule, big_modules
from .parallel.decoding import can_split
from .parallel.fitting import fit
from .parallel.leader import Group, RunBoth
from .parallel.mesh import share_cores
from .placement import is_offloaded, offload, place, set_up_vae
from .reading import (
    as_config_error,
    default_precision,
    networks_from_folder,
    pipeline_from_folder,
    precisions_of,
    upsampler_from_folder,
)
from .residency import Visitors
from .tuning.choice import settled
from .tuning.graphs import Graphs
from .tuning.tune import tune

logger = logging.getLogger(__name__)

_NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPipeline:
    """A loaded pipeline whose networks are suspension points, what else its components can be, and its card."""

    pipeline: DiffusionPipeline
    by_use: Mapping[Use, DiffusionPipeline]
    modules: Mapping[str, BigModule]
    card: ModelCard
    device: torch.device
    runs_alone: bool  # its code changes the shared denoiser, so jobs run one by one
    visitors: Visitors  # components that are on the device for their calls
    graphs: Graphs | None  # of calls that are bound by launches
    tuning: Tuning  # with nothing left open
    upsample: DiffusionPipeline | None = None  # enlarges latents between the two stages of a job
    peaks: PeakRecord | None = None  # takes down what calls take on a GPU
    run_both: RunBoth | None = None  # where a second group of ranks can run a call at the same time
    habits: Habits = field(default_factory=Habits)  # of jobs' second calls, to foretell them to that group

    def route(self, request: GenerateRequest) -> Route:
        """Return how the request is served. Raises RequestError where the model cannot."""
        return route(request, frozenset(self.by_use), knows_latents(self.pipeline))

    def in_two_stages(self, request: GenerateRequest) -> bool:
        """Say whether a job is drawn at half its sides, enlarged and refined."""
        return self.upsample is not None and bool(request.extra.get(TWO_STAGES))

    def enlarge(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, T, H, W) as (B, C, T, 2 H, 2 W). Called in the job's fiber: the network's call is a
        call like any other."""
        assert self.upsample is not None, "asked of a model that makes its clips in one stage"
        return self.upsample(latents=latents, output_type="latent", return_dict=False)[0]

    def for_job(self, request: GenerateRequest, solver_settings: Mapping[str, Any] = _NO_SETTINGS) -> DiffusionPipeline:
        """Return the pipeline that serves the request: the same networks, with fields, solvers and guiders of its own.

        Solvers count their own calls and guiders keep the halves of a step, so two jobs may share neither.
        `solver_settings` go before what the solver's configuration says.
        """
        own = copy.copy(self.by_use[self.route(request).use])
        for name, component in own.components.items():
            if isinstance(component, SchedulerMixin):
                setattr(own, name, type(component).from_config(component.config, **solver_settings))
            elif isinstance(component, BaseGuidance):
                setattr(own, name, copy.deepcopy(component))
        own.set_progress_bar_config(disable=True)
        if reads_in_chunks(own):
            read_in_chunks(own)
        return own


def choose_device(wanted: str, *, world_size: int = 1, replica: int = 0, num_replicas: int = 1) -> torch.device:
    """Return the first device of a replica, each of which has `world_size` devices.

    Raises ConfigError where the devices of all replicas are not there, so that all of them refuse alike.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        first = device.index or 0
        if first >= count:
            raise ConfigError(f"--device '{wanted}': this machine has {count} CUDA devices.")
        if first + world_size * num_replicas > count:
            left = f", and --device {wanted} leaves {count - first}" if first else ""
            raise ConfigError(f"--num-gpus {world_size * num_replicas}: this machine has {count} CUDA devices{left}.")
        return torch.device("cuda", first + replica * world_size)
    return device


def load(config: WorkerConfig, say: Callable[[str], None], on_lost: Callable[[str], None]) -> ServedPipeline:
    """Load the configured model, over several devices where so configured.

    `say` is told each stage; `on_lost` is called, from another thread, when another device's process is gone. Raises
    ConfigError, in one line, when the model can never be served.
    """
    # A checkpoint's own code is never run; diffusers reads this before it looks.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    device = choose_device(
        config.device,
        world_size=config.degrees.world_size,
        replica=config.replica,
        num_replicas=config.num_replicas,
    )
    if device.type == "cpu":
        share_cores(config.num_replicas)
    say(f"finding {config.model_path}")
    checkpoint = find_checkpoint(config.model_path, revision=config.revision, variant=config.variant)
    layout = fit(config.degrees, checkpoint, deterministic=config.deterministic)
    for line in layout.reasons:
        logger.info("devices: %s", line)
    config = msgspec.structs.replace(config, degrees=layout.degrees)
    config, room, peaks = plan_memory_of(checkpoint, config, device)
    group = Group(config, device, on_lost) if config.degrees.world_size > 1 else None
    say(f"loading {checkpoint.name} ({checkpoint.pipeline_class})")
    pipeline = pipeline_from_folder(checkpoint, config, device)
    upsampler = upsampler_from_folder(checkpoint, config, device)
    served = prepare(pipeline, checkpoint, config, device, group, room, upsampler)
    return replace(served, peaks=peaks if device.type != "cpu" else None)


def plan_memory_of(
    checkpoint: Checkpoint, config: WorkerConfig, device: torch.device
) -> tuple[WorkerConfig, Room, PeakRecord]:
    """Decide what the settings leave open of where weights go, say why, and return what is left for work and what
    takes down how much that takes.

    On a CPU there is nothing to decide: its memory is the host's.
    """
    found = plan_of(
        checkpoint,
        config if device.type != "cpu" else msgspec.structs.replace(config, placement=config.placement.settled()),
        memory_bytes=memory_of(device),
        host_bytes=available_memory_bytes(),
        default_precision=default_precision(device),
    )
    for line in found.plan.reasons:
        logger.info("memory: %s", line)
    if not found.plan.fits:
        logger.warning("%s may run out of memory on %s; loading it all the same", checkpoint.name, device)
    # Devices that share a sequence have each a part of its tokens, and the halves of guidance whole ones; where the VAE
    # is split, all have a part of the pixels.
    degrees = config.degrees
    room = found.plan.room(
        found.footprint, total_memory_of(device), denoise_share=degrees.sequence, decode_share=degrees.world_size
    )
    record = PeakRecord(found.peaks, found.plan.placement, found.plan.weights)
    return msgspec.structs.replace(config, placement=found.plan.placement), room, record


def load_for_follower(
    config: WorkerConfig, device: torch.device
) -> tuple[dict[str, torch.nn.Module], torch.nn.Module | None]:
    """Load what a follower runs: the networks that the model's loop calls, by name, and the VAE where it is split.

    Raises ConfigError as `load` does.
    """
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    checkpoint = find_checkpoint(config.model_path, revision=config.revision, variant=config.variant)
    precisions = precisions_of(checkpoint, config.precisions, device)

    def is_wanted(name: str) -> bool:
        return is_denoiser(name) or (name == "vae" and config.split_vae)

    read = networks_from_folder(checkpoint, config, precisions, device, is_wanted)
    found: dict[str, torch.nn.Module] = {}
    for name, entry in DiffusionPipeline.load_config(checkpoint.folder, local_files_only=True).items():
        if not is_wanted(name) or not isinstance(entry, list) or entry[0] is None:
            continue
        network = read.get(name)
        if network is None:
            with as_config_error(config):
                network = getattr(diffusers, entry[1]).from_pretrained(
                    checkpoint.folder,
                    subfolder=name,
                    torch_dtype=precisions.get(name, precisions["default"]),
                    variant=config.variant,
                    use_safetensors=True,
                    local_files_only=True,
                )
        if is_denoiser(name) or _splits_vae(network, config):
            found[name] = network.to(device).eval()
    if config.step_cache == "first-block":
        _enable_step_cache(found.values(), config.step_cache_threshold)
    vae = found.pop("vae", None)
    if vae is not None:
        set_up_vae(vae, config.placement)
    return found, vae


def _splits_vae(vae: torch.nn.Module | None, config: WorkerConfig) -> bool:
    """Say whether all ranks decode, each its part. One that waits in host memory stays the leader's."""
    if vae is None or not config.split_vae or config.degrees.world_size == 1:
        return False
    return not config.placement.vae_cpu_offload and can_split(vae)


def prepare(
    pipeline: DiffusionPipeline,
    checkpoint: Checkpoint,
    config: WorkerConfig,
    device: torch.device,
    group: Group | None = None,
    room: Room | None = None,
    upsampler: torch.nn.Module | None = None,
) -> ServedPipeline:
    """Make a loaded pipeline ready to be served: on its device, with a card, its networks suspension points.

    With a `group` its denoisers are split over the group's ranks; `room` is what requests are admitted by. An
    `upsampler` enlarges latents between two stages.
    The pipeline is changed and must not be used by itself afterwards.
    """
    place(pipeline, config.placement, device)
    by_use = pipelines_by_use(pipeline)
    card = derive_card(
        checkpoint,
        pipeline,
        uses=frozenset(by_use),
        served_name=config.served_model_name,
        device=device,
        device_name=device_name(device),
        num_gpus=config.degrees.world_size * config.num_replicas,
        num_replicas=config.num_replicas,
        upsampler=upsampler,
    )
    if config.step_cache == "first-block":
        _enable_step_cache(pipeline.components.values(), config.step_cache_threshold)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    away = frozenset(name for name in networks if is_offloaded(name, config.placement) and device.type != "cpu")
    named = {name: network for name, network in networks.items() if is_denoiser(name)}
    tuning, chosen = settled(config.tuning, named, device, obstacle=_obstacle(config))
    tuned = tune(networks, frozenset(named), tuning, device, away, is_alone=group is None)
    vae = pipeline.components.get("vae")
    decodes = group is not None and _splits_vae(vae, config)
    if group is not None:
        denoisers = {name: part for name, part in pipeline.components.items() if is_denoiser(name) and part is not None}
        group.shard(denoisers, vae if decodes else None)
        logger.info("the VAE decodes %s", "on all of them" if decodes else "on the first of them")
    can_change = tuple(lora_modules(pipeline))
    card = msgspec.structs.replace(card, lora_modules=can_change, tuning=(*chosen, *tuned.lines), room=room)
    beside: set[str] = set()
    if goes_beside(config, device):
        # What comes and goes takes the room that others leave, what all ranks run is in one order on all of them, and
        # kernels that are chosen by their time in each thread may be others there.
        kept = decodes or config.tuning.search_convolutions
        beside = {name for name in networks if not is_denoiser(name)} - away - ({"vae"} if kept else set())
    components = pipeline.components if upsampler is None else pipeline.components | {UPSAMPLER: upsampler}
    modules = big_modules(components, beside)
    around_calls = Shared(tuned.attention.around_calls)
    for module in modules.values():
        module.around_calls = around_calls
        module.modulations = tuned.tables.get(module.name)
        module.leaves_padding = module.name in tuned.leave_padding
        # A graph knows weights by their place, and other ranks not at all.
        if module.name not in away and not (module.is_denoiser and config.degrees.sequence > 1):
            module.graphs = tuned.graphs
    for name in card.lora_modules:
        network = modules[name].module
        share = partial(group.share_weights, name, network) if group is not None and is_denoiser(name) else None
        modules[name].loras = ModuleServing(name, network, device, share)
        modules[name].twin = None  # its weights change between two calls
    if group is not None:
        group.take_over(modules, decodes=decodes)
        if tuned.graphs is not None and config.degrees.sequence > 1:
            logger.info("calls of the denoiser run without CUDA graphs: in their middle devices wait for each other")
    if config.fp8_linears:
        card = msgspec.structs.replace(card, tuning=(*card.tuning, *copy_to_fp8(modules, away, device)))
    visitors = offload(modules, config.placement, device)
    runs_alone = any(changes_its_denoiser(type(one)) for one in by_use.values())
    for one in {id(one): one for one in by_use.values()}.values():
        one.__class__ = _on_device(type(one), device)
    upsample: DiffusionPipeline | None = None
    if upsampler is not None:
        here = _on_device(LTX2LatentUpsamplePipeline, device)
        upsample = here(vae=pipeline.vae, latent_upsampler=upsampler.to(device))
    return ServedPipeline(
        pipeline=pipeline,
        by_use=by_use,
        modules=modules,
        card=card,
        device=device,
        runs_alone=runs_alone,
        visitors=visitors,
        graphs=tuned.graphs,
        tuning=tuning,
        upsample=upsample,
        run_both=group.run_both if group is not None and config.degrees.cfg > 1 else None,
    )


def _obstacle(config: WorkerConfig) -> str | None:
    """Return the setting beside which no tuning is chosen that was not asked for."""
    if config.degrees.world_size > 1:  # other ranks tune what they run by the settings alone
        return "several devices"
    if config.placement.dit_layerwise_offload:
        return "--dit-layerwise-offload"
    return None if config.step_cache == "none" else f"--step-cache {config.step_cache}"


def goes_beside(config: WorkerConfig, device: torch.device) -> bool:
    """Say whether anything runs beside the loop. On a CPU it would take the cores from what it is to let go on."""
    return device.type == "cuda" if config.side_stream is None else config.side_stream


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def changes_its_denoiser(pipeline_class: type) -> bool:
    """Say whether a pipeline's own code swaps parts of its denoiser while it runs."""
    source = inspect.getsource(pipeline_class)
    return any(word in source for word in CHANGES_ITS_DENOISER)


def _enable_step_cache(components: Iterable[object], threshold: float) -> None:
    found = [part for part in components if isinstance(part, CacheMixin)]
    if not found:
        raise ConfigError("--step-cache first-block: this model's denoiser has no step cache in diffusers.")
    for denoiser in found:
        denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def _on_device(pipeline_class: type[DiffusionPipeline], device: torch.device) -> type[DiffusionPipeline]:
    """A subclass whose device is the worker's.

    diffusers takes a pipeline's device from its first network: with a text encoder parked elsewhere the whole job
    would run there.
    """
    here = property(lambda self: device)
    return type(pipeline_class.__name__, (pipeline_class,), {"device": here, "_execution_device": here})
