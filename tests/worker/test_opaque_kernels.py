"""The chains as operators for compiled code: declared as they behave, and equal to the chains with sizes as symbols."""

import pytest
import torch

from photogram.worker.tuning.kernels import opaque, reference
from photogram.worker.tuning.kernels.reference import Modulation, Norm


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def chain(tokens: int, width: int):
    x, branch = normal(2, tokens, width), normal(2, tokens, width)
    gate, scale, shift = normal(2, 3 * width).chunk(3, dim=-1)
    return x, branch, gate, Norm(eps=1e-6, weight=normal(width)), Modulation(scale, shift)


def rotation(tokens: int, heads: int, width: int):
    cos, sin = normal(tokens, width // 2).cos(), normal(tokens, width // 2).sin()
    return normal(2, tokens, heads, width), normal(heads * width), 1e-6, cos, sin


def test_operators_keep_what_they_declare():
    x, branch, gate, norm, modulation = chain(5, 16)
    flat = (norm.eps, norm.is_rms, norm.weight, norm.bias, modulation.scale, modulation.shift)
    operators = torch.ops.photogram
    cases = (
        (operators.norm_modulate, (x, *flat)),
        (operators.add_gated, (x, branch, gate)),
        (operators.add_gated, (x, branch, None)),
        (operators.add_gated_norm_modulate, (x, branch, gate, *flat)),
        (operators.norm_rotate, (*rotation(5, 2, 8), torch.empty(2, 5, 2, 8))),
        (operators.rms_silu, (normal(1, 4, 2, 3, 3), normal(4), 2.0)),
    )
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("tokens", [7, 16])
def test_compiled_chains_are_what_their_reference_says_at_every_size(tokens):
    def both(kernels, x, branch, gate, norm, modulation, turned):
        total, out = kernels.add_gated_norm_modulate(x, branch, gate, norm, modulation)
        rotated = torch.empty_like(turned[0])
        kernels.norm_rotate(*turned, rotated)
        again = kernels.norm_modulate(kernels.add_gated(total, out, None), norm, None)
        return (
            total,
            out,
            rotated,
            again,
            kernels.rms_silu(turned[0].movedim(2, 1), torch.ones(turned[0].shape[2]), 2.0),
        )

    torch._dynamo.reset()
    compiled = torch.compile(both, dynamic=True, fullgraph=True, backend="aot_eager")
    arguments = (*chain(tokens, 16), rotation(tokens, 2, 8))
    for result, expected in zip(compiled(opaque, *arguments), both(reference, *arguments), strict=True):
        torch.testing.assert_close(result, expected)
    torch._dynamo.reset()
