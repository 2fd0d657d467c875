"""When the host hears of the worker's state."""

import torch

from photogram.core.messages import Vitals
from photogram.worker.vitals import PERIOD_S, VitalSigns


class Told:
    """Vital signs of a worker on a CPU, whose only news are LoRA switches."""

    def __init__(self) -> None:
        self.num_switches = 0
        self.signs = VitalSigns(torch.device("cpu"), lambda: self.num_switches)

    def at(self, now: float, *, is_idle: bool = False) -> int | None:
        """The switches that the host is told of, if it is told anything."""
        news = self.signs.news(now, is_idle=is_idle)
        assert news is None or news == Vitals(self.num_switches, None)
        return None if news is None else news.num_lora_switches


def test_a_busy_worker_tells_at_most_once_in_a_period():
    told = Told()
    assert told.at(0.0) == 0
    told.num_switches = 1
    assert told.at(0.9 * PERIOD_S) is None
    told.num_switches = 2
    assert told.at(1.1 * PERIOD_S) == 2


def test_a_worker_that_falls_idle_tells_at_once():
    told = Told()
    assert told.at(0.0) == 0
    told.num_switches = 1
    assert told.at(0.1 * PERIOD_S, is_idle=True) == 1


def test_nothing_is_told_where_nothing_has_changed():
    told = Told()
    assert told.at(0.0) == 0
    assert told.at(5 * PERIOD_S) is None
    assert told.at(5 * PERIOD_S, is_idle=True) is None
