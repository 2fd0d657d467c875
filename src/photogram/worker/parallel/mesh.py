"""Who works with whom: the process groups of one worker.

The ranks are divided into CFG groups, each of which runs calls of its own: global rank = CFG index * sequence + rank.
Within one they are laid out ring-major: rank = ring index * ulysses + ulysses index. The ranks of one Ulysses group
exchange heads for tokens (DeepSpeed-Ulysses, arXiv:2309.14509), those of one ring pass keys and values around (Ring
Attention, arXiv:2310.01889); together they are what arXiv:2405.07719 calls unified sequence parallelism.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ...core.parallel import Degrees

# A rank that dies is seen at once (its connections close) and one that hangs by the host's own clock, so that the
# groups themselves may wait for as long as a server has nothing to do.
_PATIENCE = timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's place in its CFG group: `rank` and `size` are those of the group, `everyone` its ranks, and `control`
    the same ones on the CPU, whatever the device.

    `world` holds all ranks of all groups, `world_control` the same on the CPU; `to_group`, by CFG index, the leader and
    the ranks of that group: of another's than its own only the leader is a member.
    """

    degrees: Degrees
    rank: int
    cfg_index: int
    device: torch.device
    everyone: dist.ProcessGroup
    control: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    world: dist.ProcessGroup
    world_control: dist.ProcessGroup
    to_group: tuple[dist.ProcessGroup, ...]

    @property
    def of_all(self) -> Mesh:
        """This rank's place where the ranks of all CFG groups share one piece of work, as a picture's pixels."""
        if self.degrees.cfg == 1:
            return self
        return replace(
            self,
            degrees=Degrees(ulysses=self.degrees.world_size),
            rank=self.first_rank + self.rank,
            cfg_index=0,
            everyone=self.world,
            control=self.world_control,
            ulysses=self.world,
            to_group=(self.world,),
        )

    @property
    def size(self) -> int:
        return self.degrees.sequence

    @property
    def first_rank(self) -> int:
        """Global rank of the first one of this CFG group."""
        return self.cfg_index * self.degrees.sequence

    @property
    def ring_index(self) -> int:
        return self.rank // self.degrees.ulysses

    @property
    def ulysses_index(self) -> int:
        return self.rank % self.degrees.ulysses

    def ring_rank(self, ring_index: int) -> int:
        """Return the global rank at another place of this rank's ring."""
        return self.first_rank + ring_index % self.degrees.ring * self.degrees.ulysses + self.ulysses_index


def join(degrees: Degrees, rank: int, device: torch.device, meeting_file: Path) -> Mesh:
    """Meet the other ranks and return this one's place; blocks until all are there."""
    meet(degrees.world_size, rank, device, meeting_file)
    return arrange(degrees, rank, device)


def meet(world_size: int, rank: int, device: torch.device, meeting_file: Path) -> None:
    """Find the other ranks through a file in a private folder, to talk over the loopback interface alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.FileStore(str(meeting_file), world_size),
        rank=rank,
        world_size=world_size,
        timeout=_PATIENCE,
        device_id=device if on_gpu else None,
    )


def arrange(degrees: Degrees, rank: int, device: torch.device) -> Mesh:
    """Return the place of global rank `rank` among ranks that have met. Every rank makes every group, in one order."""
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    size, mine = degrees.sequence, rank // degrees.sequence
    groups = [range(index * size, (index + 1) * size) for index in range(degrees.cfg)]
    everyone, control, ulysses, ring, to_group = [], [], [], [], []
    for ranks in groups:
        everyone.append(dist.new_group(list(ranks), timeout=_PATIENCE))
        control.append(dist.new_group(list(ranks), backend="gloo", timeout=_PATIENCE))
        to_group.append(dist.new_group(sorted({0, *ranks}), timeout=_PATIENCE))
        layout = [ranks[start : start + degrees.ulysses] for start in range(0, size, degrees.ulysses)]
        ulysses.append([dist.new_group(list(members), timeout=_PATIENCE) for members in layout])
        ring.append([dist.new_group(list(members), timeout=_PATIENCE) for members in zip(*layout, strict=True)])
    world_control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    place = rank % size
    return Mesh(
        degrees=degrees,
        rank=place,
        cfg_index=mine,
        device=device,
        everyone=everyone[mine],
        control=control[mine],
        ulysses=ulysses[mine][place // degrees.ulysses],
        ring=ring[mine][place % degrees.ulysses],
        world=world,
        world_control=world_control,
        to_group=tuple(to_group),
    )


def share_cores(num_processes: int) -> None:
    """Leave the other processes that serve on this machine their share of its cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
