"""The leader's side: starts the other ranks, sends them the calls that all run, and runs its own share of each."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ...core.errors import ConfigError
from ...core.worker_config import WorkerConfig
from ..fibers import Autocast, Call
from ..memory import DeviceLost
from ..modules import BigModule
from .arguments import outline, receive_from, send
from .attention import Shares
from .decoding import pays, split_decoder
from .lengths import Lengths
from .mesh import Mesh, join, share_cores
from .orders import Forget, Join, Link, Loaded, Outcome, Reply, RunCall, SetWeights, shape_of
from .sharding import shard
from .step_cache import agree, context_name

logger = logging.getLogger(__name__)

# How long ranks may differ on whether a call failed before the group counts as lost: the others wait in a collective
# that will never come about.
DISAGREEMENT_S = 10.0

RunBoth = Callable[[Callable[[], Any], Call, str], tuple[Any, Any]]
"""`Group.run_both`."""


@dataclass(slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    link: Link[Reply]
    loaded: threading.Event = field(default_factory=threading.Event)
    load_error: str | None = None
    last_outcome: Outcome | None = None


def start_follower(descriptor: int) -> subprocess.Popen[bytes]:
    """Start a rank that follows at a descriptor, in the leader's group: who ends the worker ends every rank of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "photogram.worker.parallel.follower", str(descriptor)],
        stdin=subprocess.DEVNULL,
        pass_fds=[descriptor],
    )


class Group:
    """All ranks of one worker, seen from the leader.

    `on_lost` is called, from a thread, once a rank is gone or the ranks can no longer agree; whatever the main thread
    waits for then will never come, so that it must end the process.
    """

    def __init__(self, config: WorkerConfig, device: torch.device, on_lost: Callable[[str], None]) -> None:
        """Start the other ranks, which load while the leader does, on the devices that follow `device`."""
        self._on_lost = on_lost
        self._degrees = config.degrees
        self._device = device
        self._folder = tempfile.TemporaryDirectory(prefix="photogram-ranks-")
        self._mesh: Mesh | None = None
        self._lengths: Lengths | None = None  # of the leader's CFG group
        self._all_lengths: Lengths | None = None
        self._number = 0
        self._denoisers: Mapping[str, torch.nn.Module] = {}
        # Who runs each call whose end the leader has not seen yet.
        self._pending: dict[int, list[_Follower]] = {}
        self._outcomes = threading.Condition()
        first = device.index or 0
        if device.type == "cpu":
            share_cores(self._degrees.world_size)
        self._followers = [self._start(rank, config, first) for rank in range(1, self._degrees.world_size)]

    def _start(self, rank: int, config: WorkerConfig, first_device: int) -> _Follower:
        ours, theirs = socket.socketpair()
        with theirs:
            process = start_follower(theirs.fileno())
        follower = _Follower(rank, process, Link(ours, cast(type[Reply], Reply)))
        device = f"cuda:{first_device + rank}" if self._device.type == "cuda" else "cpu"
        follower.link.send(Join(config, self._degrees, rank, device, self._meeting_file))
        threading.Thread(target=self._hear, args=[follower], name=f"rank-{rank}", daemon=True).start()
        return follower

    @property
    def _meeting_file(self) -> str:
        return str(Path(self._folder.name) / "meeting")

    def shard(self, denoisers: dict[str, torch.nn.Module], vae: torch.nn.Module | None) -> None:
        """Meet the other ranks and split the leader's own denoisers and, where one is given, its VAE's decoder.

        Raises ConfigError when a rank cannot load.
        """
        self._mesh = join(self._degrees, 0, self._device, Path(self._meeting_file))
        self._lengths, self._all_lengths = Lengths(self._mesh), Lengths(self._mesh.of_all)
        self._denoisers = denoisers
        if self._degrees.sequence > 1:
            shares = Shares(self._mesh, self._lengths)
            for denoiser in denoisers.values():
                shard(denoiser, shares)
                agree(denoiser, self._mesh, self._lengths)
        if vae is not None:
            split_decoder(vae, self._mesh.of_all, self._all_lengths)
        for follower in self._followers:
            follower.loaded.wait()
            if follower.load_error is not None:
                raise ConfigError(f"--num-gpus: rank {follower.rank} cannot load the model ({follower.load_error}).")
        logger.info(
            "%d ranks: Ulysses %d, ring %d, CFG %d",
            self._degrees.world_size, self._degrees.ulysses, self._degrees.ring, self._degrees.cfg,
        )  # fmt: skip

    def take_over(self, modules: Mapping[str, BigModule], *, decodes: bool) -> None:
        """Run every denoiser call with all of the leader's CFG group and, where the VAE `decodes` on several ranks, its
        calls with all ranks, from now on."""
        for name, module in modules.items():
            if module.caches_steps:
                module.forget_elsewhere = partial(self._forget, name)
            if module.is_denoiser and self._degrees.sequence > 1:
                module.real["forward"] = partial(self._run_sharded, name, module.real["forward"])
        if decodes:
            vae = modules["vae"]
            vae.real["decode"] = partial(self._decode, vae.real["decode"])

    def _decode(self, real: Callable[..., Any], z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode latents, on all ranks where they are large enough for that."""
        if not pays(z, self._degrees.world_size):
            return real(z, *args, **kwargs)
        # Some pipelines pass their generator, which cannot be sent; of the decoders that are split none draws noise.
        kwargs.pop("generator", None)
        return self._run("vae", "decode", real, (z, *args), kwargs, cfg_index=None)

    def _forget(self, name: str, owner: str) -> None:
        for follower in self._followers:
            follower.link.send(Forget(name, owner))

    def share_weights(self, name: str, denoiser: torch.nn.Module, parameters: Sequence[str]) -> None:
        """Give the other ranks the values that these parameters have here, bit for bit.

        Raises DeviceLost when that fails: nobody knows then what the others hold.
        """
        assert self._mesh is not None
        try:
            for follower in self._followers:
                follower.link.send(SetWeights(name, tuple(parameters)))
            for parameter in parameters:
                send([denoiser.get_parameter(parameter).data], self._mesh.world)
        except Exception as error:
            raise DeviceLost(f"weights of {name} could not be sent to every rank: {error}") from error

    # --- calls

    def _run_sharded(self, module: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a denoiser's call with the leader's CFG group."""
        return self._run(module, "forward", real, args, kwargs, cfg_index=0)

    def _run(
        self,
        module: str,
        method: str,
        real: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        cfg_index: int | None,
    ) -> Any:
        """Run a network's method on all ranks of the leader's CFG group, or of all groups where `cfg_index` is None;
        return the whole result.

        Raises what it raised, where it failed on every rank; DeviceLost where the ranks differ.
        """
        lengths = self._all_lengths if cfg_index is None else self._lengths
        assert lengths is not None
        device_type = self._device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        context = context_name(self._denoisers[module]) if module in self._denoisers else None
        order = self._order(cfg_index, module, method, {"args": args, "kwargs": kwargs}, dtype, context)
        try:
            lengths.begin(shape_of(order))
            result = real(*args, **kwargs)
            lengths.end()
        except Exception as error:
            if not self._all_failed(order.number, self._of_group(cfg_index)):
                raise DeviceLost(f"a call failed on the leader and not on every rank: {error}") from error
            raise
        finally:
            self._pending.pop(order.number, None)
        return result

    def run_both(self, first: Callable[[], Any], second: Call, owner: str) -> tuple[Any, Any]:
        """Run `first` here while the second CFG group runs `second`, and return both results.

        `second` is the forward of a denoiser whose weights are as the call needs them; `owner` is the job whose step
        cache it uses. Its result is None where it
        failed; so it can be run here, and say why. Raises what `first` raises; DeviceLost where the second group's
        ranks differ.
        """
        assert self._mesh is not None
        autocast: Autocast | None = second.autocast
        arguments = {"args": second.args, "kwargs": second.kwargs}
        try:
            dtype = autocast.dtype if autocast is not None else None
            context = _cache_context(second, owner)
            order = self._order(1, second.module.name, second.method, arguments, dtype, context)
        except TypeError:
            return first(), None
        try:
            result = first()
        except DeviceLost:
            raise
        except Exception:
            self._collect(order.number)
            raise
        theirs = self._collect(order.number)
        # Of a result with fields only these were sent.
        return result, type(result)(**theirs) if isinstance(result, dict) and theirs is not None else theirs

    def _order(
        self,
        cfg_index: int | None,
        module: str,
        method: str,
        arguments: Mapping[str, Any],
        autocast: torch.dtype | None,
        cache_context: str | None,
    ) -> RunCall:
        """Send a call to a CFG group's ranks, or to all (None). Raises TypeError, before any has heard of it, for what
        cannot be sent."""
        assert self._mesh is not None
        tensors: list[torch.Tensor] = []
        described = outline(arguments, tensors)
        self._number += 1
        order = RunCall(
            number=self._number,
            module=module,
            method=method,
            arguments=described,
            autocast=str(autocast).removeprefix("torch.") if autocast is not None else None,
            cache_context=cache_context,
            by_all=cfg_index is None,
            answers=bool(cfg_index),
        )
        members = self._of_group(cfg_index)
        self._pending[order.number] = members
        for follower in members:
            follower.link.send(order)
        send(tensors, self._mesh.of_all.to_group[0] if cfg_index is None else self._mesh.to_group[cfg_index])
        return order

    def _collect(self, number: int) -> Any:
        """Return the second group's result of a call, None where the call failed on all of its ranks."""
        assert self._mesh is not None
        members = self._of_group(1)
        speaker = members[0]
        with self._outcomes:
            self._outcomes.wait_for(lambda: self._outcome(speaker, number) is not None)
            outcome = self._outcome(speaker, number)
        assert outcome is not None
        try:
            if outcome.error is not None:
                if not self._all_failed(number, members):
                    raise DeviceLost(f"a call failed on one rank and not on every one: {outcome.error}")
                return None
            assert outcome.result is not None
            return receive_from(outcome.result, 1, self._mesh)
        finally:
            self._pending.pop(number, None)

    def _of_group(self, cfg_index: int | None) -> list[_Follower]:
        """The followers of one CFG group; None: all."""
        return [one for one in self._followers if cfg_index in (None, one.rank // self._degrees.sequence)]

    def _all_failed(self, number: int, members: Sequence[_Follower]) -> bool:
        """Wait for the word of these ranks on a call."""
        deadline = time.monotonic() + DISAGREEMENT_S
        with self._outcomes:
            while not all(self._failed(follower, number) for follower in members):
                if not self._outcomes.wait(deadline - time.monotonic()):
                    return False
        return True

    @staticmethod
    def _outcome(follower: _Follower, number: int) -> Outcome | None:
        outcome = follower.last_outcome
        return outcome if outcome is not None and outcome.number == number else None

    def _failed(self, follower: _Follower, number: int) -> bool:
        outcome = self._outcome(follower, number)
        return outcome is not None and outcome.error is not None

    def _hear(self, follower: _Follower) -> None:
        """Listen to one rank until it is gone; in a thread of its own."""
        while reply := follower.link.receive():
            if isinstance(reply, Loaded):
                follower.load_error = reply.error
                follower.loaded.set()
                continue
            with self._outcomes:
                follower.last_outcome = reply
                self._outcomes.notify_all()
            if reply.error is not None:
                threading.Timer(DISAGREEMENT_S / 2, self._expect_agreement, [follower, reply]).start()
        if not follower.loaded.is_set():
            follower.load_error = "it ended while loading"
            follower.loaded.set()
        elif follower.load_error is None:
            self._on_lost(f"rank {follower.rank} ended (exit code {follower.process.wait()})")

    def _expect_agreement(self, follower: _Follower, outcome: Outcome) -> None:
        """A call failed on one rank a while ago: unless all say so, the others may wait in it for ever."""
        members = self._pending.get(outcome.number)
        with self._outcomes:
            agreed = members is None or all(self._failed(one, outcome.number) for one in members)
        if not agreed:
            self._on_lost(f"a call failed on one rank alone: {outcome.error}")


def _cache_context(call: Call, owner: str) -> str | None:
    if call.cache_context is None or not call.module.caches_steps:
        return None
    return f"{owner}/{call.cache_context[0]}"
