"""Runs functions in processes of their own: a process joins the other ranks of one group, once.

The processes are forked from one that has imported torch and diffusers already, which would take each of them eight
seconds of a core.
"""

import faulthandler
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
    """Return what a function of a module's top level returns, or raise what it raises. The processes it started are
    ended with it, and it is killed: the end of an interpreter may wait for ever for ranks that are gone."""
    context = warm()
    ours, theirs = context.Pipe()
    with theirs:
        process = context.Process(target=_ending_its_own, args=(theirs, function, args, kwargs))
        process.start()
    try:
        assert ours.poll(PATIENCE_S), f"{function.__name__} does not end"
        failure, value = ours.recv()
        if failure is not None:
            raise failure
        return value
    finally:
        process.kill()
        process.join()


def on_ranks(
    function: Callable[Concatenate[int, int, P], R], world: int, *args: P.args, patience_s: float = PATIENCE_S
) -> list[R]:
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
                ranks.append(
                    context.Process(target=_tell, args=(theirs, patience_s, function, rank, world, *args), daemon=True)
                )
                ranks[-1].start()
            waiting.append(ours)
        while len(answers) < world:
            ready = multiprocessing.connection.wait(set(waiting) - answers.keys(), patience_s)
            assert ready, f"{world - len(answers)} of the ranks do not end"
            answers |= {end: end.recv() for end in ready}
        return [answers[end] for end in waiting]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _tell(end: Connection, patience_s: float, function: Callable[..., R], *args: object) -> None:
    _end_in_time(patience_s)
    end.send(function(*args))


def _end_in_time(patience_s: float) -> None:
    """Let this process end, and say on stderr where it stood, a little before whoever waits for it gives up."""
    faulthandler.dump_traceback_later(patience_s - 10, exit=True)


def warm() -> multiprocessing.context.ForkServerContext:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["photogram.worker.parallel.follower", "photogram.worker.worker"])
    return context


def _ending_its_own(
    end: Connection, function: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Tell `end` what the function raised, or None, and what it returned."""
    _end_in_time(PATIENCE_S)
    if not torch.cuda.is_available():
        leader.start_follower = ForkedFollower
    try:
        end.send((None, function(*args, **kwargs)))
    except Exception as error:
        traceback.print_exc()
        end.send((error, None))
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
    end.recv()  # nothing comes: what was sent is fetched from this process, which is killed then


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
