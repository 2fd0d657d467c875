"""Linear layers in fp8: how near they come, to whom they apply, and that exact jobs notice nothing."""

import msgspec
import pytest
import torch

from families import FAMILIES
from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.worker.fast.fp8 import Fp8Linears, linear_layers

from ..drawing import Studio, relative_error
from ..test_families_served import STACKED_TOLERANCE, requests_of

CPU = torch.device("cpu")


def network(width: int = 128) -> torch.nn.Module:
    """Two wide layers in a row of blocks, one that modulates and one outside."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(width, 256), "norm_linear": torch.nn.Linear(width, width)})
    blocks = torch.nn.ModuleList([block, torch.nn.ModuleDict({"out": torch.nn.Linear(256, width, bias=False)})])
    return torch.nn.ModuleDict({"blocks": blocks, "head": torch.nn.Linear(width, width)})


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    result, reference = result.detach(), reference.detach()
    return float((result - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def test_wide_layers_of_blocks_are_chosen_and_those_of_modulations_are_not():
    assert list(linear_layers(network())) == ["blocks.0.to_q", "blocks.1.out"]
    assert list(linear_layers(network(width=24))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_comes_within_the_rounding_of_three_bits(dtype):
    made = network().to(dtype)
    layer, inputs = made["blocks"][0]["to_q"], torch.randn(2, 5, 128, dtype=dtype)
    exact = layer(inputs)
    fp8 = Fp8Linears(made, CPU)
    with fp8.applied(()):
        result = layer(inputs)
    assert (result.shape, result.dtype) == (exact.shape, dtype)
    # Each factor is off by at most 1/16, evenly: some 2.5 % of each in the mean.
    assert 0.001 < error(result.float(), exact.float()) < 0.05


def test_one_token_of_huge_values_does_not_spoil_the_others():
    made = network()
    layer, inputs = made["blocks"][0]["to_q"], torch.randn(4, 128)
    fp8 = Fp8Linears(made, CPU)
    with fp8.applied(()):
        alone = layer(inputs)
        beside = layer(torch.cat([inputs, 1e4 * torch.randn(1, 128)]))[:4]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


def test_outside_of_a_call_in_fp8_nothing_has_changed():
    made = network()
    layer, inputs = made["blocks"][0]["to_q"], torch.randn(3, 128)
    exact = layer(inputs)
    fp8 = Fp8Linears(made, CPU)
    assert torch.equal(layer(inputs), exact)
    with fp8.applied(()):
        layer(inputs)
    assert torch.equal(layer(inputs), exact)


def test_what_is_merged_into_the_weights_is_in_their_copies_too():
    made = network()
    layer, inputs = made["blocks"][0]["to_q"], torch.randn(3, 128)
    fp8 = Fp8Linears(made, CPU)
    with fp8.applied("base"):
        layer(inputs)
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    exact = layer(inputs)
    with fp8.applied("a LoRA"):
        result = layer(inputs)
    assert error(result, exact) < 0.05


def test_an_input_changed_between_two_calls_is_read_again():
    made = network()
    layer, inputs = made["blocks"][0]["to_q"], torch.randn(3, 128)
    fp8 = Fp8Linears(made, CPU)
    with fp8.applied(()):
        layer(inputs)
    inputs.mul_(2)
    with fp8.applied(()):
        result = layer(inputs)
    assert error(result, layer(inputs)) < 0.05


@pytest.mark.parametrize("name", ["flux-1", "wan-2.1"])
def test_fast_jobs_compute_in_fp8_and_exact_ones_beside_them_do_not(name, family_folder, tmp_path):
    exact, other = requests_of(name)[:2]
    fast = msgspec.structs.replace(other, quality_mode="fast")
    plain = Studio(family_folder(name), tmp_path).draw([exact, other])
    studio = Studio(family_folder(name), tmp_path, fp8_linears=True)
    drawn = studio.draw([exact, fast])
    assert all(len(jobs) == 1 for jobs in studio.passes(*FAMILIES[name].denoisers))
    assert relative_error(drawn[exact.job_id].latents, plain[exact.job_id].latents) < STACKED_TOLERANCE
    away = relative_error(drawn[fast.job_id].latents, plain[fast.job_id].latents)
    assert STACKED_TOLERANCE < away < 0.3
    assert any("fp8" in line for line in studio.card.tuning)


def test_jobs_in_fp8_share_passes(family_folder, tmp_path):
    jobs = [msgspec.structs.replace(request, quality_mode="fast") for request in requests_of("flux-1")]
    studio = Studio(family_folder("flux-1"), tmp_path, fp8_linears=True)
    alone = {job.job_id: studio.draw([job])[job.job_id] for job in jobs}
    together = studio.draw(jobs)
    assert max(len(passed) for passed in studio.passes("transformer")) == 3
    for job_id, drawn in together.items():
        # The rounding of a stack moves single numbers across a border between two of e4m3.
        assert relative_error(drawn.latents, alone[job_id].latents) < 0.02


@pytest.mark.parametrize(
    "settings",
    [{"num_gpus": 2}, {"compile": True}, {"fused_kernels": True}, {"dit_cpu_offload": True}],
)
def test_what_cannot_go_together_with_fp8_is_refused_at_the_start(settings):
    with pytest.raises(ConfigError, match="--fp8-linears"):
        ServeConfig(fp8_linears=True, **settings)
