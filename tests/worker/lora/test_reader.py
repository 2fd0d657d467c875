"""While a LoRA is read from a slow disk, jobs go on; what asked for it goes on when it is there, in order."""

import threading

import msgspec
import pytest
import torch

from photogram.core.errors import RequestError
from photogram.core.messages import Failed, Finished, LorasReady, LorasRefused, PrepareLoras, SetLoras
from photogram.worker.lora import service

from ..drawing import Studio
from ..test_families_served import requests_of
from .test_mixing import exactly
from .test_weights import digest, set_loras, uses_for


class SlowDisk:
    """Stands before the real reading: files come when `deliver` says so, and `asked` notes which were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self._read = service.read
        self._delivered = threading.Event()
        self._error: Exception | None = None
        monkeypatch.setattr(service, "read", self._wait_and_read)

    def _wait_and_read(self, path: str, max_bytes: int):
        self.asked.append(path)
        assert self._delivered.wait(120)
        if self._error is not None:
            raise self._error
        return self._read(path, max_bytes)

    def hold(self) -> None:
        self._delivered.clear()

    def deliver(self, error: Exception | None = None) -> None:
        self._error = error
        self._delivered.set()


@pytest.fixture
def studio(family_folder, tmp_path) -> Studio:
    return Studio(family_folder("flux-1"), tmp_path)


@pytest.fixture
def uses(studio, tmp_path):
    return uses_for(studio, tmp_path)


@pytest.fixture
def disk(monkeypatch):
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.deliver()


def turn_all(studio: Studio) -> None:
    """Take every decision that can be taken without waiting for the disk."""
    with torch.inference_mode():
        while studio.worker.turn():
            pass


def settle(studio: Studio) -> None:
    with torch.inference_mode():
        studio.settle()


def plain_and_with(use):
    plain, other, *_ = requests_of("flux-1")
    return plain, msgspec.structs.replace(other, loras=(use,))


def outcomes(studio: Studio) -> list[tuple[str, str]]:
    """Ends of jobs and answers about LoRAs, in order."""
    return [
        (type(message).__name__, message.job_id if isinstance(message, Finished | Failed) else message.request_id)
        for message in studio.messages
        if isinstance(message, Finished | Failed | LorasReady | LorasRefused)
    ]


def test_a_job_is_drawn_to_its_end_while_a_set_waits_for_the_disk(studio, uses, disk):
    plain, _ = plain_and_with(uses[0])
    alone = exactly(studio, plain).latents
    studio.messages.clear()
    studio.worker.submit(plain)
    studio.worker.set_loras(SetLoras("set", (uses[0],), True))
    turn_all(studio)
    assert outcomes(studio) == [("Finished", plain.job_id)]
    assert (studio.worker.latents[plain.job_id] == alone).all()
    disk.deliver()
    settle(studio)
    assert outcomes(studio)[1:] == [("LorasReady", "set")]
    assert studio.worker.loras.merged()["transformer"] != ()


def test_a_job_whose_lora_is_being_read_is_drawn_when_it_is_there(studio, uses, disk):
    plain, waiting = plain_and_with(uses[0])
    studio.worker.submit(waiting)
    studio.worker.submit(plain)
    turn_all(studio)
    assert outcomes(studio) == [("Finished", plain.job_id)]
    disk.deliver()
    settle(studio)
    turn_all(studio)
    assert outcomes(studio)[1:] == [("Finished", waiting.job_id)]
    assert (studio.worker.latents[waiting.job_id] == exactly(studio, waiting).latents).all()


def test_a_job_that_is_cancelled_while_its_lora_is_read_never_runs(studio, uses, disk):
    _, waiting = plain_and_with(uses[0])
    studio.worker.submit(waiting)
    studio.worker.cancel(waiting.job_id)
    studio.worker.cancel(waiting.job_id)
    assert outcomes(studio) == [("Failed", waiting.job_id)]
    disk.deliver()
    settle(studio)
    turn_all(studio)
    assert outcomes(studio) == [("Failed", waiting.job_id)]
    assert studio.worker.jobs == {}


def test_messages_are_answered_in_order_though_the_first_waits_for_the_disk(studio, uses, disk):
    slow, loaded, _, _ = uses
    disk.deliver()
    set_loras(studio, loaded)
    studio.messages.clear()
    disk.hold()
    studio.worker.set_loras(SetLoras("first", (slow,), True))
    studio.worker.set_loras(SetLoras("second", (loaded,), True))
    studio.worker.set_loras(PrepareLoras("look", (loaded,), False))
    turn_all(studio)
    assert outcomes(studio) == []
    disk.deliver()
    settle(studio)
    assert outcomes(studio) == [("LorasReady", "first"), ("LorasReady", "second"), ("LorasReady", "look")]
    assert [entry.nickname for entry in studio.worker.loras.state().active["transformer"]] == [loaded.nickname]


def test_a_file_that_two_ask_for_is_read_once(studio, uses, disk):
    _, waiting = plain_and_with(uses[0])
    studio.worker.set_loras(SetLoras("set", (uses[0],), True))
    studio.worker.submit(waiting)
    disk.deliver()
    settle(studio)
    assert disk.asked == [uses[0].path]


@pytest.mark.parametrize("error", [RequestError("torn", code="invalid_lora"), OSError(5, "I/O error"), MemoryError()])
def test_a_set_that_cannot_be_read_leaves_everything_as_it_was_and_the_next_one_goes_on(studio, uses, disk, error):
    disk.deliver()
    set_loras(studio, uses[0])
    before, state = digest(studio), studio.worker.loras.state()
    studio.messages.clear()
    disk.hold()
    studio.worker.set_loras(SetLoras("broken", (uses[1], uses[2]), True))
    disk.deliver(error)
    settle(studio)
    assert outcomes(studio) == [("LorasRefused", "broken")]
    assert digest(studio) == before
    assert studio.worker.loras.state() == state
    disk.deliver()
    assert isinstance(set_loras(studio, uses[3]), LorasReady)


def test_whoever_waits_elsewhere_is_woken_when_a_file_was_read(studio, uses, disk):
    woken = threading.Event()
    loras = service.Loras(studio.served, set, woken.set, cache_bytes=1 << 30, file_bytes=1 << 30)
    answers = []
    loras.answer(PrepareLoras("look", (uses[0],), False), answers.append)
    loras.take()
    assert (answers, woken.is_set()) == ([], False)
    disk.deliver()
    assert woken.wait(120)
    loras.take()
    assert [type(answer) for answer in answers] == [LorasReady]
