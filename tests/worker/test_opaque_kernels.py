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
        (operators.add_gated, (x, branch, gate, 0.0, None)),
        (operators.add_gated, (x, branch, None, 1e-6, norm.weight)),
        (operators.add_gated_norm_modulate, (x, branch, gate, 1e-6, norm.weight, *flat)),
        (operators.norm_rotate, (*rotation(5, 2, 8), torch.empty(2, 5, 2, 8))),
        (operators.gated, (*normal(5, 16).chunk(2, dim=-1), "silu")),
        (operators.linear_gelu, (normal(5, 16), normal(8, 16), normal(8))),
        (operators.rms_silu, (normal(1, 4, 2, 3, 3), normal(4), 2.0, torch.empty(1, 4, 2, 3, 3))),
    )
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)


def every_chain(kernels, x, branch, gate, norm, modulation, turned):
    """Return what each chain makes of its arguments, one of another's result, some into a part of a larger tensor."""
    of_branch = Norm(eps=1e-5, is_rms=True, weight=norm.weight)
    total, out = kernels.add_gated_norm_modulate(x, branch, gate, norm, modulation, of_branch)
    query, *angles = turned
    both = torch.zeros(query.shape[0], 2 * query.shape[1], *query.shape[2:], dtype=query.dtype, device=query.device)
    kernels.norm_rotate(query, *angles, both[:, query.shape[1] :])
    pixels = query.movedim(2, 1)[..., None].contiguous(memory_format=torch.channels_last_3d)
    activated = torch.empty_like(pixels)
    kernels.rms_silu(pixels, torch.ones(pixels.shape[1], dtype=x.dtype, device=x.device), 2.0, activated)
    again = kernels.norm_modulate(kernels.add_gated(total, out, None, None), norm, None)
    rows = x.flatten(0, 1)
    gated = kernels.gated(*rows.chunk(2, dim=-1), "gelu_tanh")
    weight = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return total, out, both, again, gated, kernels.linear_gelu(rows, weight, norm.weight), activated


def moved(value, device: torch.device, dtype: torch.dtype):
    """Return a chain's argument on a device, in a precision."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype)
    if isinstance(value, tuple):
        return tuple(moved(item, device, dtype) for item in value)
    if isinstance(value, Norm):
        return Norm(eps=value.eps, weight=moved(value.weight, device, dtype))
    if isinstance(value, Modulation):
        return Modulation(moved(value.scale, device, dtype), moved(value.shift, device, dtype))
    return value


@pytest.mark.parametrize("tokens", [7, 16])
def test_compiled_chains_are_what_their_reference_says_at_every_size(tokens):
    torch._dynamo.reset()
    compiled = torch.compile(every_chain, dynamic=True, fullgraph=True, backend="aot_eager")
    arguments = (*chain(tokens, 16), rotation(tokens, 2, 8))
    for result, expected in zip(compiled(opaque, *arguments), every_chain(reference, *arguments), strict=True):
        torch.testing.assert_close(result, expected)
    torch._dynamo.reset()
