"""What is drawn before the worker is ready, and which sizes are refused."""

import msgspec
import pytest
import torch

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.worker.warmup import WARM_UP_STEPS, warm_up

from .drawing import Studio


def sizes_drawn(studio: Studio) -> list[tuple[int, int, int | None]]:
    drawn, submit = [], studio.worker.submit

    def noted(request):
        drawn.append((request.width, request.height, request.num_frames))
        assert request.num_inference_steps == min(WARM_UP_STEPS, studio.card.default_steps)
        submit(request)

    studio.worker.submit = noted
    try:
        with torch.inference_mode():
            warm_up(studio.worker)
    finally:
        del studio.worker.submit
    return drawn


def small(studio: Studio, **defaults) -> Studio:
    """The studio as if its model's own size were a small one."""
    card = msgspec.structs.replace(studio.card, **defaults)
    object.__setattr__(studio.served, "card", card)
    return studio


def test_every_size_that_is_named_is_drawn_after_the_models_own(family_folder, tmp_path):
    settings = {"warmup_resolutions": ("96x64", "64x128")}
    studio = small(Studio(family_folder("flux-2-klein"), tmp_path, **settings), default_width=64, default_height=64)
    assert sizes_drawn(studio) == [(64, 64, None), (96, 64, None), (64, 128, None)]
    assert studio.messages == [], "the warm-up's pictures are not for the host"
    assert not list(tmp_path.glob("*.frames"))


def test_a_clip_has_the_models_own_number_of_frames_where_none_is_named(family_folder, tmp_path):
    settings = {"warmup_resolutions": ("32x32x5", "48x32")}
    own = {"default_width": 32, "default_height": 32, "default_frames": 9}
    studio = small(Studio(family_folder("wan-2.1"), tmp_path, **settings), **own)
    assert sizes_drawn(studio) == [(32, 32, 9), (32, 32, 5), (48, 32, 9)]


def test_a_model_that_is_guided_by_a_negative_prompt_alone_has_one_of_its_own(family_folder, tmp_path):
    studio = small(Studio(family_folder("qwen-image"), tmp_path), default_width=64, default_height=64)
    assert studio.card.default_negative_prompt == " "
    calls = counted(studio, "transformer")
    with torch.inference_mode():
        warm_up(studio.worker)
    assert len(calls) >= 2 * WARM_UP_STEPS, "the half without the prompt was left out"


def counted(studio: Studio, name: str) -> list[None]:
    calls: list[None] = []
    module = studio.served.modules[name]
    run = module.run

    def noted(*args, **kwargs):
        calls.append(None)
        return run(*args, **kwargs)

    module.run = noted
    return calls


@pytest.mark.parametrize(
    ("size", "reason"), [("65x64", "draws multiples of"), ("64x64x5", "draws pictures, not clips")]
)
def test_a_size_that_the_model_never_draws_is_refused_at_the_start(size, reason, family_folder, tmp_path):
    studio = Studio(family_folder("flux-2-klein"), tmp_path, warmup_resolutions=(size,))
    with torch.inference_mode(), pytest.raises(ConfigError, match=f"--warmup-resolutions {size}: .*{reason}"):
        warm_up(studio.worker)


@pytest.mark.parametrize("text", ["1024", "1024x", "0x64", "64x-64", "64 x 64", "64x64x", "64x64x0", "64x64x5x1"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="--warmup-resolutions"):
        ServeConfig(warmup_resolutions=(text,))
