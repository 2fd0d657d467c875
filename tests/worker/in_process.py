"""Runs a function in a fresh process: a process joins the other ranks of one group, once."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
R = TypeVar("R")


def in_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what a function of a module's top level returns. The processes it started are ended with it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_ending_its_own, function, *args, **kwargs).result(timeout=280)


def _ending_its_own(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return function(*args, **kwargs)
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
