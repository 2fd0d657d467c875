"""Triton's kernels on a GPU: against their references, and in the blocks of real classes against diffusers' own."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline
from hypothesis import given, settings

from families import FAMILIES
from kernel_cases import (
    TOLERANCE,
    ActivationCase,
    GateCase,
    NormCase,
    RotationCase,
    activation_case,
    gate_case,
    norm_case,
    rotation_case,
)
from photogram.worker.tuning.blocks.parts import linear_gelu
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.kernels import opaque, reference
from photogram.worker.tuning.memory_format import use_channels_last
from worker.drawing import Studio, draw_alone, relative_error
from worker.test_families_served import STACKED_TOLERANCE, requests_of
from worker.test_fusing import ENCODERS, FUSED
from worker.test_opaque_kernels import chain, every_chain, moved, rotation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GPU = torch.device("cuda:0")
WIDTHS = (1536, 3072, 3840, 5120)  # of the families that are served


@settings(max_examples=60)
@given(case=norm_case())
def test_norm_chains_are_what_their_reference_says(case: NormCase):
    case.check(GPU)


@settings(max_examples=60)
@given(case=rotation_case())
def test_rotation_is_what_its_reference_says(case: RotationCase):
    case.check(GPU)


@settings(max_examples=30)
@given(case=activation_case())
def test_normalization_with_silu_is_what_its_reference_says(case: ActivationCase):
    case.check(GPU)


@settings(max_examples=30)
@given(case=gate_case())
def test_gates_with_their_activation_are_what_their_reference_says(case: GateCase):
    case.check(GPU)


@pytest.mark.parametrize(("width", "is_rms"), itertools.product(WIDTHS, (False, True)))
def test_norm_chains_at_the_widths_of_real_models(width, is_rms):
    NormCase(seed=1, samples=2, tokens=300, width=width, dtype=torch.bfloat16, is_rms=is_rms).check(GPU)


@pytest.mark.parametrize(("heads", "across"), [(12, True), (24, False), (30, False), (40, True)])
def test_rotation_at_the_heads_of_real_models(heads, across):
    RotationCase(
        seed=1, samples=2, tokens=300, heads=heads, width=128, dtype=torch.bfloat16, across_heads=across
    ).check(GPU)


def test_an_activation_within_the_product_is_the_tanh_form_of_gelu():
    layer = torch.nn.Linear(256, 512, device=GPU, dtype=torch.bfloat16)
    x = torch.randn(2, 100, 256, device=GPU, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
        steps = F.gelu(layer(x), approximate="tanh")
        fused = linear_gelu(layer, x)
    assert fused.shape == steps.shape
    assert (fused.double() - exact).abs().mean() <= (steps.double() - exact).abs().mean()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_jobs_of_fused_blocks_are_drawn_right_alone_and_stacked(name, graphs, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name), dtype=torch.float32).to(GPU)
    studio = Studio(family_folder(name), tmp_path, precision="fp32", fused_kernels=True, cuda_graphs=graphs)
    assert any("fused kernels" in line for line in studio.card.tuning)
    assert any("products joined" in line for line in studio.card.tuning)
    for _ in range(2):
        drawn = studio.draw(requests)
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_in_compiled_code_are_what_their_reference_says_at_every_size(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(every_chain, dynamic=True, fullgraph=True)
    tolerance = TOLERANCE[dtype]
    for tokens in (7, 16, 300):
        arguments = moved((*chain(tokens, 128), rotation(tokens, 4, 32)), GPU, dtype)
        with torch.inference_mode():
            results, expected = compiled(opaque, *arguments), every_chain(reference, *arguments)
        for result, exact in zip(results, expected, strict=True):
            # The last of some are of results that were rounded before.
            torch.testing.assert_close(result, exact, atol=3 * tolerance, rtol=3 * tolerance)
    torch._dynamo.reset()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_are_compiled_with_their_kernels(name, graphs, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name), dtype=torch.float32).to(GPU)
    torch._dynamo.reset()
    studio = Studio(
        family_folder(name), tmp_path, precision="fp32", fused_kernels=True, compile=True, cuda_graphs=graphs
    )
    for _ in range(2):
        drawn = studio.draw(requests)
    torch._dynamo.reset()
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_in_bf16_are_no_further_from_fp32_than_diffusers_own(name, family_folder, tmp_path):
    request = requests_of(name)[0]
    latents = {}
    for precision, fused in (("fp32", False), ("bf16", False), ("bf16", True)):
        studio = Studio(family_folder(name), tmp_path, precision=precision, fused_kernels=fused, max_batch_size=1)
        latents[precision, fused] = studio.draw([request])[request.job_id].latents.float()
    exact = latents["fp32", False]
    own, plain = ((latents["bf16", fused] - exact).square().mean().sqrt() for fused in (True, False))
    # Two samples of rounding: of small tensors, one may come out some per cent better than the other.
    assert own <= 1.25 * plain
    assert FAMILIES[name].denoisers


@torch.inference_mode()
def test_wans_vae_decodes_the_same_in_fp32_and_no_worse_in_bf16(family_folder):
    plain = AutoencoderKLWan.from_pretrained(family_folder("wan-2.1") / "vae").eval().to(GPU)
    latents = torch.randn(1, 16, 4, 16, 24, device=GPU)
    exact = plain.double().decode(latents.double()).sample
    fused = copy.deepcopy(plain)
    use_channels_last(fused)
    fuse(fused)
    errors = {
        (one, dtype): float((one.to(dtype).decode(latents.to(dtype)).sample.double() - exact).square().mean().sqrt())
        for one in (plain, fused)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert errors[fused, torch.float32] < 1e-3
    assert errors[fused, torch.bfloat16] <= 1.05 * errors[plain, torch.bfloat16]


@pytest.mark.parametrize("norm", ENCODERS)
@torch.inference_mode()
def test_text_encoders_in_bf16_are_no_further_from_exact_than_transformers_own(norm):
    plain = ENCODERS[norm]().eval().to(GPU)
    fused = copy.deepcopy(plain)
    fuse(fused)
    ids = torch.randint(2, 90, (2, 90), generator=torch.Generator().manual_seed(0)).to(GPU)
    mask = (torch.arange(90, device=GPU)[None] < torch.tensor([[90], [40]], device=GPU)).long()
    exact = plain.double()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    errors = {}
    for name, one in (("own", fused), ("plain", plain)):
        result = one.bfloat16()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        errors[name] = float((result.double() - exact).square().mean().sqrt())
    assert errors["own"] <= 1.25 * errors["plain"]


def test_qwens_modulation_is_looked_up_in_graphs_as_it_was_computed(family_folder, tmp_path):
    requests = requests_of("qwen-image")
    plain = DiffusionPipeline.from_pretrained(family_folder("qwen-image"), dtype=torch.float32).to(GPU)
    studio = Studio(family_folder("qwen-image"), tmp_path, precision="fp32", fused_kernels=True, cuda_graphs=True)
    assert studio.served.modules["transformer"].modulations is not None
    computed: list[int] = []
    for turn in range(4):
        drawn = studio.draw(requests)
        for request in requests:
            assert drawn[request.job_id].failure is None
            expected = draw_alone(plain, request).latents
            assert relative_error(drawn[request.job_id].latents, expected) < 10 * STACKED_TOLERANCE
        if turn == 0:
            layer = studio.served.modules["transformer"].module.transformer_blocks[0].img_mod[1]
            layer.register_forward_hook(lambda layer, args, output: computed.append(len(output)))
    assert not computed, "the same schedules were computed again"


def test_prompts_of_wan_are_encoded_in_graphs_of_their_length(family_folder, tmp_path):
    requests = requests_of("wan-2.1")
    plain = DiffusionPipeline.from_pretrained(family_folder("wan-2.1"), dtype=torch.float32).to(GPU)
    studio = Studio(family_folder("wan-2.1"), tmp_path, precision="fp32", fused_kernels=True, cuda_graphs=True)
    assert studio.served.modules["text_encoder"].leaves_padding
    for _ in range(3):
        drawn = studio.draw(requests)
    for request in requests:
        assert drawn[request.job_id].failure is None
        expected = draw_alone(plain, request).latents
        assert relative_error(drawn[request.job_id].latents, expected) < 10 * STACKED_TOLERANCE
