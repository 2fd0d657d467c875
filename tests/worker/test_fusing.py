"""Fused blocks in the place of a model's own: the same pictures, by plain torch here and by Triton in `tests/gpu`."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline

from families import FAMILIES, encoders, tokenization
from photogram.worker.tuning.blocks import wan_vae
from photogram.worker.tuning.blocks.parts import linear_of_joined, side_by_side
from photogram.worker.tuning.compiling import compile_repeated, repeated_parts
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.joining import join_products
from photogram.worker.tuning.kernels import reference
from photogram.worker.tuning.kernels.ops import can_fuse
from photogram.worker.tuning.memory_format import use_channels_last

from .drawing import Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of

FUSED = {
    "wan-2.1": ("FusedWanBlock", "FusedWanProcessor", "FusedGelu"),
    "wan-2.2": ("FusedWanBlock", "FusedWanProcessor", "FusedGelu"),
    "wan-2.2-ti2v": ("FusedWanBlock", "FusedWanProcessor", "FusedGelu"),
    "flux-1": ("FusedFluxBlock", "FusedFluxSingleBlock", "FusedFluxProcessor", "FusedGelu"),
    "flux-2-klein": (
        "FusedFlux2Block",
        "FusedFlux2SingleBlock",
        "FusedFlux2SwiGLU",
        "FusedFlux2Processor",
        "FusedFlux2ParallelProcessor",
    ),
    "qwen-image": ("FusedQwenBlock", "FusedQwenProcessor", "FusedGelu"),
    "z-image": ("FusedZImageBlock", "FusedZImageFeedForward", "FusedZImageProcessor"),
}


def kinds_in(network: torch.nn.Module) -> set[str]:
    parts = [type(part).__name__ for part in network.modules()]
    return {*parts, *(type(vars(part).get("processor")).__name__ for part in network.modules())}


@pytest.mark.parametrize("name", FUSED)
def test_jobs_of_fused_blocks_are_drawn_right_alone_and_stacked(name, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    studio = Studio(family_folder(name), tmp_path)
    for denoiser in FAMILIES[name].denoisers:
        network = studio.served.modules[denoiser].module
        assert fuse(network) > 0
        assert set(FUSED[name]) <= kinds_in(network)
        assert repeated_parts(network)
    drawn = studio.draw(requests)
    assert max(len(jobs) for jobs in studio.passes(*FAMILIES[name].denoisers)) == 3
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference_latents = draw_alone(plain, request).latents
        assert relative_error(drawn[request.job_id].latents, reference_latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_are_compiled_without_a_break(name, family_folder, tmp_path):
    torch._dynamo.reset()
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1)
    for denoiser in FAMILIES[name].denoisers:
        network = studio.served.modules[denoiser].module
        fuse(network)
        assert join_products(network) > 0
        compile_repeated(network, backend="eager", fullgraph=True)
    request = requests_of(name)[0]
    assert studio.draw([request])[request.job_id].failure is None
    torch._dynamo.reset()


@pytest.mark.parametrize("together", [1, 10**4, 10**9])
@pytest.mark.parametrize("name", ["wan-2.1", "wan-2.2-ti2v"])
@torch.inference_mode()
def test_wans_vae_encodes_and_decodes_the_same_in_chunks_of_any_length(name, together, family_folder, monkeypatch):
    monkeypatch.setattr(wan_vae, "WAN_PIXELS_TOGETHER", together)
    plain = AutoencoderKLWan.from_pretrained(family_folder(name) / "vae").eval()
    fused = copy.deepcopy(plain)
    assert fuse(fused) > 0
    assert {"PaddingInConvolution", "FusedWanDecoder", "FusedWanResample", "FusedWanResidualBlock"} <= kinds_in(fused)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, plain.config.z_dim, 4, 6, 8, generator=generator)
    frames = torch.rand(1, 3, 9, 32, 48, generator=generator) * 2 - 1
    for ordered in (False, True):
        if ordered:
            use_channels_last(fused)
        torch.testing.assert_close(fused.decode(latents).sample, plain.decode(latents).sample, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            fused.encode(frames).latent_dist.mean, plain.encode(frames).latent_dist.mean, atol=1e-4, rtol=1e-4
        )


@torch.inference_mode()
def test_convolutions_of_wans_vae_join_no_frames_and_are_called_as_such(family_folder):
    vae = AutoencoderKLWan.from_pretrained(family_folder("wan-2.1") / "vae").eval()
    latents = torch.randn(1, 16, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents).sample
    fuse(vae)
    called: set[str] = set()
    joined: list[str] = []

    def watched(name: str, convolution: torch.nn.Module) -> None:
        real = convolution.forward

        def forward(x, *before):
            called.add(name)
            if before and before[0] is not None:
                whole = wan_vae._after(before[0], x)
                if whole.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    joined.append(name)
                assert torch.equal(whole, torch.cat((before[0], x), dim=2))
            return real(x, *before)

        convolution.forward = forward

    convolutions = {
        name: part for name, part in vae.decoder.named_modules() if isinstance(part, wan_vae.PaddingInConvolution)
    }
    for name, convolution in convolutions.items():
        watched(name, convolution)
    torch.testing.assert_close(vae.decode(latents).sample, expected, atol=1e-4, rtol=1e-4)
    assert called == convolutions.keys()
    assert all("conv_in" in name or "time_conv" in name for name in joined)


ENCODERS = {
    "T5LayerNorm": lambda: encoders.t5(100, seed=1),
    "UMT5LayerNorm": lambda: encoders.umt5(100, seed=2),
    "Qwen2_5_VLRMSNorm": lambda: encoders.qwen25_text(tokenization.qwen(), seed=3),
    "Qwen3RMSNorm": lambda: encoders.qwen3(tokenization.qwen(), seed=4),
}


@pytest.mark.parametrize("norm", ENCODERS)
@torch.inference_mode()
def test_text_encoders_give_the_same_with_padding_and_without(norm):
    plain = ENCODERS[norm]().eval()
    fused = copy.deepcopy(plain)
    assert fuse(fused) > 0
    assert f"Fused{norm}" in kinds_in(fused)
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9)[None] < torch.tensor([[9], [4]])).long()
    for arguments in ({}, {"attention_mask": mask}):
        result, expected = (one(input_ids=ids, **arguments).last_hidden_state for one in (fused, plain))
        torch.testing.assert_close(result[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 9), (40, 300)])
@pytest.mark.parametrize("make", [encoders.t5, encoders.umt5])
@torch.inference_mode()
def test_a_bias_looked_up_by_distance_is_the_same_bit_for_bit(make, queries, keys):
    plain = make(100, seed=5)
    fused = copy.deepcopy(plain)
    fuse(fused)
    for one, other in zip(plain.modules(), fused.modules(), strict=True):
        if hasattr(one, "relative_attention_bias"):
            assert torch.equal(one.compute_bias(queries, keys), other.compute_bias(queries, keys))


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "sana"])
def test_networks_of_other_classes_are_left_as_they_are(name, family_folder):
    pipeline = DiffusionPipeline.from_pretrained(family_folder(name))
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    before = copy.copy(kinds_in(network))
    fuse(network)
    assert {kind for kind in kinds_in(network) if kind.startswith("Fused")} <= {"FusedGeglu", "FusedGelu"}
    assert before - {"GEGLU", "GELU"} <= kinds_in(network)


def test_fused_kernels_are_only_for_gpus():
    assert not can_fuse(torch.device("cpu"))


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).square().mean().sqrt())


def test_a_chain_rounded_once_is_nearer_to_the_exact_result_than_its_steps():
    torch.manual_seed(0)
    x, branch = torch.randn(2, 2, 64, 256).bfloat16()
    gate, scale, shift = torch.randn(3, 2, 256).bfloat16()
    norm = reference.Norm(eps=1e-6)
    modulation = reference.Modulation(scale, shift)
    exact_total = x.double() + gate.double()[:, None] * branch.double()
    exact = torch.nn.functional.layer_norm(exact_total, (256,), eps=1e-6)
    exact = exact * (1 + scale.double()[:, None]) + shift.double()[:, None]
    total = x + gate[:, None] * branch
    steps = torch.nn.functional.layer_norm(total, (256,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    fused_total, fused = reference.add_gated_norm_modulate(x, branch, gate, norm, modulation, None)
    assert error(fused_total, exact_total) <= error(total, exact_total)
    assert error(fused, exact) < error(steps, exact)


def test_a_rotation_rounded_once_is_nearer_to_the_exact_result_than_its_steps():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 4, 32).bfloat16(), torch.randn(32).bfloat16()
    angles = torch.randn(64, 16)
    cos, sin = angles.cos(), angles.sin()

    def turn(normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = normed[..., 0::2], normed[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    exact = turn(torch.nn.functional.rms_norm(x.double(), (32,), weight.double(), 1e-6), cos.double(), sin.double())
    steps = turn(torch.nn.functional.rms_norm(x, (32,), weight, 1e-6).float(), cos, sin).bfloat16()
    fused = torch.empty_like(x)
    reference.norm_rotate(x, weight, 1e-6, cos, sin, fused)
    assert error(fused, exact) < error(steps, exact)


def test_a_layer_of_two_tensors_side_by_side_is_that_of_the_joined_one():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 8), torch.randn(2, 5, 24)
    for bias in (True, False):
        layer = torch.nn.Linear(32, 16, bias=bias)
        with torch.inference_mode():
            joined = layer(torch.cat((first, second), dim=-1))
            torch.testing.assert_close(linear_of_joined(layer, first, second), joined)
            hook = layer.register_forward_hook(lambda module, args, output: output + args[0].sum(-1, keepdim=True))
            assert not torch.allclose(linear_of_joined(layer, first, second), joined)
            hook.remove()


@pytest.mark.parametrize("samples", [1, 2])
def test_streams_are_one_again_without_a_copy_where_they_lie_side_by_side(samples):
    both = torch.randn(samples, 7, 4)
    text, picture = both[:, :3], both[:, 3:]
    assert side_by_side(text, picture).data_ptr() == both.data_ptr()
    for first, second in ((text, picture), (picture, text), (text.clone(), picture), (both[:, :2], picture)):
        assert torch.equal(side_by_side(first, second), torch.cat((first, second), dim=1))
    assert torch.equal(side_by_side(both[:1, :3], both[:1, 3:]), both[:1])
