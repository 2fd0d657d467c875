"""Runs functions in processes of their own: a process joins the other ranks of one group, once.

The processes are forked from one that has imported torch and diffusers already, which would take each of them eight
seconds of a core.
"""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Concatenate, ParamSpec, TypeVar

import psutil
import torch

from photogram.worker.parallel import follower, leader

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 280


def in_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what a function of a module's top level returns. The processes it started are ended with it."""
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=warm()) as pool:
        return pool.submit(_ending_its_own, function, *args, **kwargs).result(timeout=PATIENCE_S)


def on_ranks(function: Callable[Concatenate[int, int, P], R], world: int, *args: P.args) -> list[R]:
    """Return what a function of a module's top level, given the rank and `world`, returns on each of `world` ranks.

    Raises EOFError once one of them has failed, for which the others would wait; its traceback is on stderr.
    """
    context = warm()
    answers: dict[Connection, R] = {}
    waiting: list[Connection] = []
    ranks = []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            with theirs:
                ranks.append(context.Process(target=_tell, args=(theirs, function, rank, world, *args), daemon=True))
                ranks[-1].start()
            waiting.append(ours)
        while len(answers) < world:
            ready = multiprocessing.connection.wait(set(waiting) - answers.keys(), PATIENCE_S)
            assert ready, f"{world - len(answers)} of the ranks do not end"
            answers |= {end: end.recv() for end in ready}
        return [answers[end] for end in waiting]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _tell(end: Connection, function: Callable[..., R], *args: object) -> None:
    end.send(function(*args))


def warm() -> multiprocessing.context.ForkServerContext:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["photogram.worker.parallel.follower", "photogram.worker.worker"])
    return context


def _ending_its_own(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if not torch.cuda.is_available():
        leader.start_follower = ForkedFollower
    try:
        return function(*args, **kwargs)
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()


class ForkedFollower:
    """A rank forked from the leader before it has met anyone, in place of a new interpreter.

    Not where there is CUDA, which the leader may use already and a fork may not.
    """

    def __init__(self, descriptor: int) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                code = follower.main([str(descriptor)])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
