"""The pipeline's big modules, each method of which is a suspension point.

The one adapter that replaces methods of diffusers and transformers objects.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from diffusers.models.cache_utils import CacheMixin

from ..models.sizes import is_denoiser
from ..models.two_stages import UPSAMPLER
from .fast.fp8 import Fp8Linears
from .fibers import Call, Fiber
from .lora.serving import ModuleServing
from .tuning.graphs import Graphs
from .tuning.modulation import ModulationTable
from .tuning.padding import without_padding

logger = logging.getLogger(__name__)

CallPhase = Literal["encode", "denoise", "decode"]

# What pipelines call instead of `forward`.
ENTRY_METHODS = ("forward", "encode", "decode", "generate", "get_image_features", "get_text_features")


class BigModule:
    """One component whose calls are scheduled.

    Outside a fiber its methods are the real ones, so code of the worker's loop, and a module's calls of itself,
    are not suspended.
    """

    def __init__(self, name: str, module: torch.nn.Module, *, may_be_beside: bool = False) -> None:
        """A module whose calls `may_be_beside` those of others is given a twin for these, where it can have one."""
        self.name = name
        self.module = module
        self.real: dict[str, Callable[..., Any]] = {}
        self.signatures: dict[str, inspect.Signature] = {}
        self.is_denoiser = is_denoiser(name)
        self.may_be_beside = may_be_beside
        self.twin = twin_of(module) if may_be_beside else None
        self.in_use = threading.RLock()  # held by its call, or by who changes its weights
        self.loras: ModuleServing | None = None  # where LoRAs can change it
        self.graphs: Graphs | None = None  # where its calls may be replayed
        self.modulations: ModulationTable | None = None  # where its modulation is looked up
        self.leaves_padding = False  # whether prompts are encoded without it
        self.fp8: Fp8Linears | None = None  # where it can compute in fp8
        self.forget_elsewhere: Callable[[str], None] | None = None  # tells other ranks whose step caches to drop
        self.around_calls: Callable[[], AbstractContextManager[object]] = nullcontext
        self.make_way: Callable[[], None] | None = None  # has other components leave the device before a call
        first = next(module.parameters(), None)
        self.dtype = first.dtype if first is not None and first.is_floating_point() else None
        for method in ENTRY_METHODS:
            if callable(getattr(type(module), method, None)):
                self._suspend_at(method)
        if isinstance(module, CacheMixin):
            self._keep_cache_contexts_apart(module)

    def phase(self, method: str) -> CallPhase:
        # What enlarges latents stands between the steps of two stages, and counts as what they do.
        if self.is_denoiser or self.name == UPSAMPLER:
            return "denoise"
        # A vocoder makes sound of what the decoder of sound gives; its own method is `forward`.
        return "decode" if method == "decode" or self.name == "vocoder" else "encode"

    def run(self, call: Call, context_owner: str, *, beside: bool = False) -> Any:
        """Run the real method with the LoRAs of the call's rows, under the autocast and step-cache context that the
        pipeline had around its call.

        `context_owner` keeps the step caches of two jobs apart. A call that is `beside` others runs without a graph:
        all graphs share their memory. It is the twin's, if there is one; else two calls wait for each other.
        """
        is_twins = beside and self.twin is not None
        if self.make_way is not None and not beside:
            self.make_way()
        with ExitStack() as stack:
            if not is_twins:
                stack.enter_context(self.in_use)
            stack.enter_context(self.around_calls())
            if self.loras is not None:
                stack.enter_context(self.loras.applied(call.loras, exact=call.exact))
            if self.fp8 is not None and call.in_fp8:
                merged = () if self.loras is None else self.loras.weights.merged.key
                stack.enter_context(self.fp8.applied(merged))
            if call.autocast is not None:
                stack.enter_context(torch.autocast(call.autocast.device_type, dtype=call.autocast.dtype))
            if self.caches_steps and call.cache_context is not None:
                name, fields = call.cache_context
                stack.enter_context(CacheMixin.cache_context(self.module, f"{context_owner}/{name}", **fields))
            args, kwargs = self._in_own_precision(call)
            real = getattr(self.twin, call.method) if is_twins else self.real[call.method]
            if not self._is_plain(call):
                return real(*args, **kwargs)
            if self.modulations is not None:
                kwargs = self.modulations.looked_up(kwargs, self._weights_of_modulation())
            graphs = None if beside else self.graphs
            run = partial(_run, real) if graphs is None else partial(graphs.run, self.name, real)
            return without_padding(run, args, kwargs) if self.leaves_padding else run(args, kwargs)

    def _weights_of_modulation(self) -> Hashable:
        """Return what tells the weights apart that the table of modulation depends on, as LoRAs have left them."""
        if self.loras is None or not ModulationTable.depends_on(self.loras.weights.merged.layers):
            return None
        return self.loras.weights.merged.key

    def _is_plain(self, call: Call) -> bool:
        """Say whether the call runs nothing but the network's own code and weights as they are."""
        mixes = self.loras is not None and self.loras.unmerged(call.loras)
        changes = mixes or call.in_fp8 or self.caches_steps
        return call.method == "forward" and call.autocast is None and not changes

    def _in_own_precision(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, in a VAE's precision where it is one.

        A VAE may be kept in fp32 beside a bf16 denoiser; some pipelines (SDXL) hand it the denoiser's latents as they
        are, and would have the shared VAE itself change its precision for a while.
        """
        if call.method not in ("encode", "decode") or self.dtype is None:
            return call.args, call.kwargs

        def own(value: Any) -> Any:
            is_pixels = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(self.dtype) if is_pixels else value

        return tuple(map(own, call.args)), {name: own(value) for name, value in call.kwargs.items()}

    @property
    def caches_steps(self) -> bool:
        return isinstance(self.module, CacheMixin) and self.module.is_cache_enabled

    def forget(self, context_owner: str) -> None:
        """Drop one job's step caches. diffusers' own reset would drop those of all jobs."""
        if not self.caches_steps:
            return
        forget_step_caches(self.module, context_owner)
        if self.forget_elsewhere is not None:
            self.forget_elsewhere(context_owner)

    def _suspend_at(self, method: str) -> None:
        real = getattr(self.module, method)

        # Pipelines look at `inspect.signature(module.forward)`; `wraps` keeps it readable.
        @functools.wraps(real)
        def suspended(*args: Any, **kwargs: Any) -> Any:
            fiber = Fiber.current()
            if fiber is None:
                return real(*args, **kwargs)
            return fiber.suspend(Call(module=self, method=method, args=args, kwargs=kwargs))

        self.real[method] = real
        self.signatures[method] = inspect.signature(real)
        setattr(self.module, method, suspended)

    def _keep_cache_contexts_apart(self, module: CacheMixin) -> None:
        """Note the context a pipeline asks for; it is set, under the job's name, around the real call only.

        And keep the module's reset from the pipelines: each ends with one that would empty the caches of all jobs.
        """

        @contextmanager
        def noted(name: str, **fields: Any) -> Iterator[None]:
            fiber = Fiber.current()
            if fiber is None:
                with CacheMixin.cache_context(module, name, **fields):
                    yield
                return
            outer, fiber.cache_context = fiber.cache_context, (name, fields)
            try:
                yield
            finally:
                fiber.cache_context = outer

        module.cache_context = noted
        module._reset_stateful_cache = _keep


def _run(real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return real(*args, **kwargs)


def twin_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return a second module over the same weights, with state of its own; None where it would compute otherwise.

    Networks keep state between their layers: a VAE of clips its last frames. A copy loses what was compiled.
    """
    if any(part._compiled_call_impl is not None for part in module.modules()):
        return None
    weights = (*module.parameters(), *module.buffers())
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in weights})
    except (TypeError, RuntimeError) as error:  # something in it can be there only once
        logger.info("%s has no twin: %s", type(module).__name__, error)
        return None


def forget_step_caches(module: torch.nn.Module, context_owner: str) -> None:
    """Drop what the step cache of a module keeps for one job."""
    prefix = f"{context_owner}/"
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        if not isinstance(registry, HookRegistry):
            continue
        for hook in registry.hooks.values():
            for manager in vars(hook).values():
                if isinstance(manager, StateManager):
                    for name in [name for name in manager._state_cache if name.startswith(prefix)]:
                        del manager._state_cache[name]


def _keep(recurse: bool = True) -> None:
    """Stands in for a module's `_reset_stateful_cache`."""


def big_modules(components: Mapping[str, object], beside: Collection[str] = ()) -> dict[str, BigModule]:
    """Make every network among the components a suspension point; call once, after step caches were switched on.

    Calls of those named in `beside` may be run while others are.
    """
    return {
        name: BigModule(name, component, may_be_beside=name in beside)
        for name, component in components.items()
        if isinstance(component, torch.nn.Module)
    }
