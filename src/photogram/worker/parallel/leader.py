"""The leader's side: starts the other ranks, sends them the calls that all run, and runs its own share of each."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ...core.config import WorkerConfig
from ...core.errors import ConfigError
from ..memory import DeviceLost
from ..modules import BigModule
from .arguments import outline, send
from .attention import Shares
from .decoding import pays, split_decoder
from .lengths import Lengths
from .mesh import Mesh, join, share_cores
from .orders import Join, Link, Loaded, Outcome, Reply, RunCall, shape_of
from .sharding import shard

logger = logging.getLogger(__name__)

# How long ranks may differ on whether a call failed before the group counts as lost: the others wait in a collective
# that will never come about.
DISAGREEMENT_S = 10.0


@dataclass(slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    link: Link[Reply]
    loaded: threading.Event = field(default_factory=threading.Event)
    load_error: str | None = None
    last_outcome: Outcome | None = None


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
        self._lengths: Lengths | None = None
        self._number = 0
        self._outcomes = threading.Condition()
        first = device.index or 0
        if device.type == "cpu":
            share_cores(self._degrees.world_size)
        self._followers = [self._start(rank, config, first) for rank in range(1, self._degrees.world_size)]

    def _start(self, rank: int, config: WorkerConfig, first_device: int) -> _Follower:
        ours, theirs = socket.socketpair()
        with theirs:
            # In the leader's process group: who ends the worker ends every rank of it.
            process = subprocess.Popen(
                [sys.executable, "-m", "photogram.worker.parallel.follower", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
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
        self._lengths = Lengths(self._mesh)
        for denoiser in denoisers.values():
            shard(denoiser, Shares(self._mesh, self._lengths))
        if vae is not None:
            split_decoder(vae, self._mesh, self._lengths)
        for follower in self._followers:
            follower.loaded.wait()
            if follower.load_error is not None:
                raise ConfigError(f"--num-gpus: rank {follower.rank} cannot load the model ({follower.load_error}).")
        logger.info(
            "%d ranks: Ulysses %d, ring %d", self._degrees.world_size, self._degrees.ulysses, self._degrees.ring
        )

    def take_over(self, modules: Mapping[str, BigModule], *, decodes: bool) -> None:
        """Run every denoiser call and, where the VAE `decodes` on all ranks, its too, with all of them from now on."""
        for name, module in modules.items():
            if module.is_denoiser:
                module.real["forward"] = partial(self._run, name, "forward", module.real["forward"])
        if decodes:
            vae = modules["vae"]
            vae.real["decode"] = partial(self._decode, vae.real["decode"])

    def _decode(self, real: Callable[..., Any], z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode latents, on all ranks where they are large enough for that."""
        if not pays(z, self._degrees.world_size):
            return real(z, *args, **kwargs)
        # Some pipelines pass their generator, which cannot be sent; of the decoders that are split none draws noise.
        kwargs.pop("generator", None)
        return self._run("vae", "decode", real, z, *args, **kwargs)

    def _run(self, module: str, method: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a network's method on all ranks and return the whole result.

        Raises what it raised, where it failed on every rank; DeviceLost where the ranks differ.
        """
        assert self._mesh is not None
        assert self._lengths is not None
        tensors: list[torch.Tensor] = []
        arguments = outline({"args": args, "kwargs": kwargs}, tensors)
        self._number += 1
        device_type = self._device.type
        dtype = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
        autocast = dtype if torch.is_autocast_enabled(device_type) else None
        order = RunCall(self._number, module, method, arguments, autocast)
        for follower in self._followers:
            follower.link.send(order)
        send(tensors, self._mesh)
        try:
            self._lengths.begin(shape_of(order))
            result = real(*args, **kwargs)
            self._lengths.end()
        except Exception as error:
            if not self._all_failed():
                raise DeviceLost(f"a call failed on the leader and not on every rank: {error}") from error
            raise
        return result

    def _all_failed(self) -> bool:
        """Wait for every rank's word on the present call."""
        deadline = time.monotonic() + DISAGREEMENT_S
        with self._outcomes:
            while not all(self._failed(follower) for follower in self._followers):
                if not self._outcomes.wait(deadline - time.monotonic()):
                    return False
        return True

    def _failed(self, follower: _Follower) -> bool:
        outcome = follower.last_outcome
        return outcome is not None and outcome.number == self._number and outcome.error is not None

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
                threading.Timer(DISAGREEMENT_S / 2, self._expect_agreement, [reply]).start()
        if not follower.loaded.is_set():
            follower.load_error = "it ended while loading"
            follower.loaded.set()
        elif follower.load_error is None:
            self._on_lost(f"rank {follower.rank} ended (exit code {follower.process.wait()})")

    def _expect_agreement(self, outcome: Outcome) -> None:
        """A call failed on one rank a while ago: unless all say so, the others may wait in it for ever."""
        with self._outcomes:
            agreed = self._number > outcome.number or all(self._failed(follower) for follower in self._followers)
        if not agreed:
            self._on_lost(f"a call failed on one rank alone: {outcome.error}")
