"""What stays loaded, what is read anew, and what is forgotten."""

import dataclasses
import os

import msgspec
import torch

from photogram.core.messages import PrepareLoras, SetLoras
from photogram.worker.lora.service import Loras

from ..drawing import Studio
from ..test_families_served import requests_of
from .files import diffusers_file, linears
from .test_mixing import exactly
from .test_weights import set_loras, uses_for


def loaded(studio: Studio) -> list[str]:
    return [entry.nickname for entry in studio.worker.loras.state().loaded]


def prepare(studio: Studio, *uses, pinned: bool = False):
    with torch.inference_mode():
        studio.worker.set_loras(PrepareLoras("p", uses, pinned))
        studio.settle()
    return studio.messages[-1]


def test_least_recently_used_is_forgotten_but_not_what_is_pinned_or_active(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path, lora_cache_mb=0)
    pinned, active, *others = uses_for(studio, tmp_path)
    prepare(studio, pinned, pinned=True)
    set_loras(studio, active)
    for use in others:
        prepare(studio, use)
        assert loaded(studio) == [pinned.nickname, active.nickname, use.nickname]


def test_a_lora_of_a_running_job_is_kept(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path, lora_cache_mb=0)
    mine, *others = uses_for(studio, tmp_path)
    seen = []

    def load_another(turn: int) -> None:
        if turn in (2, 4):
            prepare(studio, others[turn // 2 - 1])
            seen.append(loaded(studio))

    request = msgspec.structs.replace(requests_of("flux-1")[0], loras=(mine,))
    assert studio.draw([request], meanwhile=load_another)[request.job_id].failure is None
    assert all(mine.nickname in names for names in seen)
    prepare(studio, others[0])
    assert mine.nickname not in loaded(studio)


def test_a_file_that_changed_is_read_anew_at_the_next_set_and_never_within_a_job(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    (use, *_) = uses_for(studio, tmp_path, count=1)
    set_loras(studio, use)
    request = msgspec.structs.replace(requests_of("flux-1")[0], loras=(use,), deterministic=True)
    before = exactly(studio, request).latents
    layers = linears(studio.served.modules["transformer"].module)

    def replace_file(turn: int) -> None:
        if turn == 3:
            other = diffusers_file(tmp_path / "other.safetensors", "transformer", layers, rank=7, seed=77)
            os.replace(other, use.path)

    during = studio.draw([request], meanwhile=replace_file)[request.job_id].latents
    assert (during == before).all()
    # The active set is what was set, whatever lies there now.
    assert (exactly(studio, request).latents == before).all()
    state = set_loras(studio, use).state
    assert state.loaded[-1].rank == 7
    assert not (exactly(studio, request).latents == before).all()


def test_a_lora_that_is_gone_goes_on_as_it_was_read(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    (use, *_) = uses_for(studio, tmp_path, count=1)
    prepare(studio, use)
    os.unlink(use.path)
    assert set_loras(studio, use).state.active["transformer"][0].nickname == use.nickname


def test_without_support_there_is_one_clear_answer(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    card = msgspec.structs.replace(studio.served.card, lora_modules=())
    loras = Loras(dataclasses.replace(studio.served, card=card), set, lambda: None, cache_bytes=0, file_bytes=1 << 30)
    answers = []
    (use,) = uses_for(studio, tmp_path, count=1)
    loras.answer(SetLoras("s", (), True), answers.append)
    loras.answer(SetLoras("s", (use,), True), answers.append)
    loras.wait()
    expected = ("lora_not_supported", "LoRA is not enabled for this pipeline.")
    assert [(answer.code, answer.message) for answer in answers] == [expected, expected]
