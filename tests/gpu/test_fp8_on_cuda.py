"""Linear layers in fp8 on a GPU: Triton's quantization against its reference, products against fp32.

Triton's interpreter loses the carry where rounding to fp8 reaches the next power of two (127 becomes 64), so the
quantization is checked here alone.
"""

import msgspec
import pytest
import torch
from hypothesis import given, settings

from kernel_cases import QuantizationCase, quantization_case
from photogram.worker.fast.fp8 import Fp8Linears
from photogram.worker.tuning.kernels import reference
from photogram.worker.tuning.kernels.ops import quantize_rows
from worker.drawing import Studio, relative_error
from worker.test_families_served import requests_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
    ),
]

GPU = torch.device("cuda:0")


@settings(max_examples=40)
@given(case=quantization_case())
def test_rows_in_fp8_are_what_their_reference_says(case: QuantizationCase):
    case.check(GPU)


def test_a_gpu_rounds_to_fp8_as_the_reference_does():
    x = torch.randn(64, 3072, device=GPU, dtype=torch.bfloat16)
    rows, scales = quantize_rows(x)
    expected, expected_scales = reference.quantize_rows(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # Quotients are not divided alike to the last bit, so a few lie on the other side of a border.
    assert (rows.float() == expected.float()).float().mean() > 0.999


@pytest.mark.parametrize("tokens", [1, 77, 4608])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_a_gpu_are_those_of_the_same_numbers_in_fp32(tokens, bias, dtype):
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"0": torch.nn.Linear(1536, 512, bias=bias)}).to(GPU, dtype).requires_grad_(False)
    x = torch.randn(2, tokens, 1536, device=GPU, dtype=dtype)
    fp8 = Fp8Linears(block, GPU)
    with fp8.applied(()):
        result = block["0"](x)
    rows, scales = reference.quantize_rows(x.flatten(0, 1))
    weight, weight_scales = reference.quantize_rows(block["0"].weight)
    expected = (rows.float() * scales) @ (weight.float() * weight_scales).T
    expected = (expected if block["0"].bias is None else expected + block["0"].bias.float()).view(2, tokens, 512)
    assert result.dtype == dtype
    gap = (result.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert gap < 5e-3  # sums kept in fewer bits than fp32, and one rounding to bf16


def test_a_fast_job_beside_an_exact_one_on_a_gpu(family_folder, tmp_path):
    exact, other = requests_of("flux-1")[:2]
    fast = msgspec.structs.replace(other, quality_mode="fast")
    settings = {"precision": "bf16", "deterministic": True}
    plain = Studio(family_folder("flux-1"), tmp_path, **settings).draw([exact, other])
    drawn = Studio(family_folder("flux-1"), tmp_path, fp8_linears=True, **settings).draw([exact, fast])
    assert torch.equal(drawn[exact.job_id].latents, plain[exact.job_id].latents)
    assert 0 < relative_error(drawn[fast.job_id].latents, plain[fast.job_id].latents) < 0.3
