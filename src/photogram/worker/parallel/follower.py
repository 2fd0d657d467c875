"""A rank that is not the leader: a process with denoisers and VAE alone, which runs the calls it is told to.

Started by the leader as ``python -m photogram.worker.parallel.follower FD`` with one end of a socket pair. It ends
when the leader is gone.
"""

from __future__ import annotations

import logging
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.cache_utils import CacheMixin

from ...core.errors import ConfigError
from ..loading import load_for_follower
from ..modules import forget_step_caches
from ..parent import end_with_parent
from ..process import configure_logging
from ..tuning.graphs import Graphs
from ..tuning.tune import tune
from .arguments import outline, receive, receive_into, send_to_leader
from .attention import Shares
from .decoding import split_decoder
from .lengths import Lengths
from .mesh import Mesh, join, share_cores
from .orders import Forget, Join, Link, Loaded, Order, Outcome, RunCall, SetWeights, shape_of
from .sharding import shard
from .step_cache import agree

logger = logging.getLogger("photogram.worker.follower")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Those that a call is run with, and what is known of their shares."""

    mesh: Mesh
    lengths: Lengths


def main(arguments: list[str]) -> int:
    """Follow the leader at the descriptor given; return the exit code."""
    end_with_parent()
    link: Link[Order] = Link(socket.socket(fileno=int(arguments[0])), cast(type[Order], Order))
    first = link.receive()
    if not isinstance(first, Join):
        return 1
    configure_logging(first.config, f"rank {first.rank}")
    device = torch.device(first.device)
    if device.type == "cpu":
        share_cores(first.degrees.world_size * first.config.num_replicas)
    with torch.inference_mode():
        mesh = join(first.degrees, first.rank, device, Path(first.meeting_file))
        of_group, of_all = Ranks(mesh, Lengths(mesh)), Ranks(mesh.of_all, Lengths(mesh.of_all))
        try:
            denoisers, vae = load_for_follower(first.config, device)
            modules = denoisers if vae is None else denoisers | {"vae": vae}
            tuned = tune(modules, frozenset(denoisers), first.config.tuning, device, is_alone=False)
            if mesh.size > 1:
                shares = Shares(mesh, of_group.lengths)
                for denoiser in denoisers.values():
                    shard(denoiser, shares)
                    agree(denoiser, mesh, of_group.lengths)
            if vae is not None:
                split_decoder(vae, of_all.mesh, of_all.lengths)
        except (ConfigError, RuntimeError) as error:
            link.send(Loaded(str(error)))
            return 2
        link.send(Loaded(None))
        while order := link.receive():
            match order:
                case SetWeights(module=name, parameters=parameters):
                    for parameter in parameters:
                        receive_into(modules[name].get_parameter(parameter).data, mesh)
                case Forget(module=name, owner=owner):
                    forget_step_caches(modules[name], owner)
                case RunCall():
                    with tuned.attention.around_calls():
                        outcome, tensors = _run(order, modules, of_all if order.by_all else of_group, tuned.graphs)
                    link.send(outcome)
                    send_to_leader(tensors, mesh)
    return 0


def _run(
    order: RunCall, modules: dict[str, torch.nn.Module], ranks: Ranks, graphs: Graphs | None
) -> tuple[Outcome, list[torch.Tensor]]:
    """Run this rank's share of a call; return what to say of it and the tensors that go with that."""
    tensors: list[torch.Tensor] = []
    mesh, lengths = ranks.mesh, ranks.lengths
    arguments: dict[str, Any] = receive(order.arguments, mesh)
    try:
        with ExitStack() as stack:
            if order.autocast is not None:
                stack.enter_context(torch.autocast(mesh.device.type, dtype=getattr(torch, order.autocast)))
            if order.cache_context is not None:
                stack.enter_context(CacheMixin.cache_context(modules[order.module], order.cache_context))
            lengths.begin(shape_of(order))
            real, args, kwargs = getattr(modules[order.module], order.method), arguments["args"], arguments["kwargs"]
            # The leader's rule (`BigModule.run`): a graph holds a network's own code, and no exchange with other ranks.
            is_plain = order.method == "forward" and order.autocast is None and order.cache_context is None
            if graphs is not None and is_plain and mesh.size == 1:
                result = graphs.run(order.module, real, args, kwargs)
            else:
                result = real(*args, **kwargs)
            lengths.end()
            answer = outline(result, tensors) if order.answers and mesh.rank == 0 else None
    except Exception as error:
        # One call's border: whether it failed everywhere, and so for its job alone, is the leader's to judge.
        logger.warning("%s.%s failed on rank %d: %s", order.module, order.method, mesh.rank, error)
        return Outcome(order.number, f"{type(error).__name__}: {error}"), []
    return Outcome(order.number, None, answer), tensors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
