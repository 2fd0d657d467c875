"""Prompts are encoded without the padding behind them, where nobody reads what becomes of it."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from families import encoders
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.padding import is_padding_unread, without_padding

from .drawing import Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of


@pytest.fixture
def encoder() -> torch.nn.Module:
    return encoders.umt5(100, seed=1).eval()


def prompt(*lengths: int, padded: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(padded)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 90, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return ids, mask


@torch.inference_mode()
def encoded(encoder: torch.nn.Module, args, kwargs):
    """Return the result of an encoder called without padding, and how many tokens it saw."""
    seen: list[int] = []

    def run(args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        seen.append(ids.shape[1])
        return encoder(*args, **kwargs)

    result = without_padding(run, args, kwargs)
    (length,) = seen
    return result, length


@pytest.mark.parametrize(
    ("lengths", "tokens"), [((5,), 64), ((64,), 64), ((65, 3), 128), ((200,), 200), ((170, 1), 192)]
)
def test_tokens_of_the_prompt_come_out_the_same_from_fewer(encoder, lengths, tokens):
    ids, mask = prompt(*lengths)
    with torch.inference_mode():
        exact = encoder(ids, mask).last_hidden_state
    for args, kwargs in (((ids, mask), {}), ((ids,), {"attention_mask": mask, "return_dict": False})):
        result, seen = encoded(encoder, args, kwargs)
        hidden = result[0]
        assert seen == tokens
        assert hidden.shape == exact.shape
        torch.testing.assert_close(hidden[mask.bool()], exact[mask.bool()], atol=1e-5, rtol=1e-5)
        assert not hidden[:, seen:].any()
        assert isinstance(result, tuple) == (kwargs.get("return_dict") is False)


def test_calls_of_another_form_are_run_as_they_are(encoder):
    ids, mask = prompt(5)
    behind = mask.flip(1)
    for args, kwargs in (((ids,), {}), ((ids, behind), {}), ((ids, mask), {"output_hidden_states": True})):
        result, seen = encoded(encoder, args, kwargs)
        assert seen == ids.shape[1]
        with torch.inference_mode():
            assert torch.equal(result.last_hidden_state, encoder(*args, **kwargs).last_hidden_state)


def test_clips_of_wan_are_drawn_right_from_prompts_without_padding(family_folder, tmp_path):
    requests = requests_of("wan-2.1")
    plain = DiffusionPipeline.from_pretrained(family_folder("wan-2.1"))
    studio = Studio(family_folder("wan-2.1"), tmp_path)
    module = studio.served.modules["text_encoder"]
    assert is_padding_unread(module.module)
    fused = copy.deepcopy(module.module)
    fuse(fused)
    assert is_padding_unread(fused)
    module.leaves_padding = True
    lengths: list[int] = []
    module.module.encoder.register_forward_pre_hook(
        lambda encoder, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drawn = studio.draw(requests)
    assert 0 < max(lengths) < 512
    for request in requests:
        assert drawn[request.job_id].failure is None
        expected = draw_alone(plain, request).latents
        assert relative_error(drawn[request.job_id].latents, expected) < 10 * STACKED_TOLERANCE
