"""Decides, call by call, what the device does next. Pure: no clock, no I/O, no torch; the worker passes `now` in.

`Scheduler` keeps the books, `policy` ranks jobs, `fairness` keeps the owners' accounts, `cost` learns prices,
`batches` bounds the size of a pass, `held` the switching of weights, and `backlog` holds what is not started. Knows
nothing of pipelines or tensors.
"""

from .job import JobTicket, PendingCall, Phase, Plan, Run, Start
from .policy import SchedulerConfig
from .scheduler import Scheduler

__all__ = ["JobTicket", "PendingCall", "Phase", "Plan", "Run", "Scheduler", "SchedulerConfig", "Start"]
