"""What the video model is trained through equals what serves it, and its judge tells motions apart."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tools.demo_models.video_model import (
    VideoDenoiser,
    decode_latents,
    encode_moments,
    new_autoencoder,
    new_text_encoder,
    new_transformer,
    padding_bias,
    text_features,
    train_on_whole_clips,
)
from tools.demo_models.video_score import benchmark, draw_ideal, score_clips, summary


@torch.no_grad()
def test_whole_clips_are_coded_as_by_the_stock_cached_code() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder().eval()
    clip = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = vae.encode(clip).latent_dist.mean
    decoded = vae.decode(latents, return_dict=False)[0]
    train_on_whole_clips(vae)
    torch.testing.assert_close(encode_moments(vae, clip)[0], latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(decode_latents(vae, latents).clamp(-1, 1), decoded, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_training_pass_gives_the_stock_transformers_velocity() -> None:
    """One clip with its first frame given, one without; 512 text tokens stand behind 24 columns."""
    torch.manual_seed(0)
    transformer, encoder = new_transformer(), new_text_encoder()
    for parameter in transformer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    latents, ids, lengths = torch.randn(2, 16, 3, 4, 6), torch.randint(3, 900, (2, 24)), torch.tensor([12, 20])
    text = text_features(encoder, ids, lengths)
    timesteps = torch.full((2, 3 * 2 * 3), 700)
    timesteps[0, : 2 * 3] = 0
    stock = transformer(latents, timesteps, F.pad(text, (0, 0, 0, 512 - 24)), return_dict=False)[0]
    bias = padding_bias(lengths, 24, torch.tensor([512, 512]))
    given = torch.tensor([True, False])
    velocity, _ = VideoDenoiser(transformer)(latents, torch.full((2,), 0.7), given, text, bias)
    torch.testing.assert_close(velocity, stock, atol=2e-5, rtol=1e-4)


@pytest.mark.long
def test_drawn_clips_are_right_and_pass_for_no_other_motion() -> None:
    specs = benchmark(13, seed=5)
    clips = draw_ideal(specs, 9, 128, 128)
    scores = summary(score_clips(clips, specs))
    assert scores["motion"] == scores["background"] == scores["colour"] == scores["position"] == 1.0
    assert scores["shape"] == pytest.approx(1.0, abs=0.08)
    others = [
        dataclasses.replace(
            specs[(i + 1) % 13], shape=spec.shape, colour=spec.colour, background=spec.background, zone=None,
            second_colour=(spec.background + 1) % 12,
        )
        for i, spec in enumerate(specs)
    ]  # fmt: skip
    wrong = [verdict.motion for verdict in score_clips(clips, others)]
    assert not any(wrong), [spec.motion for spec, passed in zip(others, wrong, strict=True) if passed]
