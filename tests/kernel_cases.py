"""Random cases for the chains in `worker/tuning/kernels`, the same for the interpreter and for a GPU."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from photogram.worker.tuning.kernels import reference
from photogram.worker.tuning.kernels.reference import Modulation, Norm

# One rounding of the result (the interpreter cuts bf16 off), of values that may be some units large.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result.float(), expected.float(), atol=tolerance, rtol=tolerance)


@dataclass(frozen=True, kw_only=True)
class NormCase:
    seed: int
    samples: int
    tokens: int
    width: int
    dtype: torch.dtype
    is_rms: bool = False
    affine: bool = False
    gated: bool = True
    modulated: bool = True
    shifted: bool = True
    shared_vectors: bool = False
    strided_rows: bool = False
    normed_branch: bool = False

    def _made(self, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype).to(dtype)

        rows = self.tokens + 3 if self.strided_rows else self.tokens
        x, branch = (normal(self.samples, rows, self.width)[:, : self.tokens] for _ in range(2))
        # As models have them: pieces of one product.
        vectors = normal(1 if self.shared_vectors else self.samples, 3 * self.width).chunk(3, dim=-1)
        weight, bias = (normal(self.width) for _ in range(2)) if self.affine else (None, None)
        norm = Norm(eps=1e-6, is_rms=self.is_rms, weight=weight, bias=bias)
        gate = vectors[0] if self.gated else None
        modulation = None
        if self.modulated:
            modulation = Modulation(scale=vectors[1], shift=vectors[2] if self.shifted else None)
        branch_norm = Norm(eps=1e-5, is_rms=True, weight=normal(self.width)) if self.normed_branch else None
        return x, branch, gate, norm, modulation, branch_norm

    def check(self, device: torch.device) -> None:
        from photogram.worker.tuning.kernels import norm as kernels

        x, branch, gate, norm, modulation, branch_norm = self._made(device, self.dtype)
        _close(kernels.norm_modulate(x, norm, modulation), reference.norm_modulate(x, norm, modulation))
        _close(kernels.add_gated(x, branch, gate, branch_norm), reference.add_gated(x, branch, gate, branch_norm))
        total, out = kernels.add_gated_norm_modulate(x, branch, gate, norm, modulation, branch_norm)
        expected_total, _ = reference.add_gated_norm_modulate(x, branch, gate, norm, modulation, branch_norm)
        _close(total, expected_total)
        # From the kernel's own sum, as an ulp of a sum near zero is much after the normalization.
        _close(out, reference.norm_modulate(total, norm, modulation))


@dataclass(frozen=True, kw_only=True)
class RotationCase:
    seed: int
    samples: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    normed: bool = True
    across_heads: bool = False
    per_sample: bool = False
    into_part: bool = False

    def _made(self, device: torch.device):
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        # Queries as a third of one product, as fused projections give them.
        x = normal(self.samples, self.tokens, 3, self.heads, self.width)[:, :, 1]
        weight = None
        if self.normed:
            weight = normal(self.heads * self.width if self.across_heads else self.width)
        angles = torch.randn((self.samples, self.tokens, self.width // 2), generator=generator).to(device)
        turns = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
        cos, sin = (turns[..., part] if self.per_sample else turns[0, ..., part] for part in (0, 1))
        before = 2 if self.into_part else 0
        out = torch.zeros(self.samples, before + self.tokens, self.heads, self.width, dtype=self.dtype, device=device)
        return x, weight, cos, sin, out, before

    def check(self, device: torch.device) -> None:
        from photogram.worker.tuning.kernels import rope as kernels

        x, weight, cos, sin, out, before = self._made(device)
        expected = torch.zeros_like(out)
        reference.norm_rotate(x, weight, 1e-6, cos, sin, expected[:, before:])
        kernels.norm_rotate(x, weight, 1e-6, cos, sin, out[:, before:])
        _close(out, expected)


@st.composite
def norm_case(draw: st.DrawFn) -> NormCase:
    flag = st.booleans()
    return NormCase(
        seed=draw(st.integers(0, 2**20)),
        samples=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 9)),
        width=draw(st.sampled_from([1, 8, 31, 64, 96, 160])),
        dtype=draw(DTYPES),
        is_rms=draw(flag),
        affine=draw(flag),
        gated=draw(flag),
        modulated=draw(flag),
        shifted=draw(flag),
        shared_vectors=draw(flag),
        strided_rows=draw(flag),
        normed_branch=draw(flag),
    )


@st.composite
def rotation_case(draw: st.DrawFn) -> RotationCase:
    flag = st.booleans()
    return RotationCase(
        seed=draw(st.integers(0, 2**20)),
        samples=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 9)),
        heads=draw(st.integers(1, 5)),
        width=draw(st.sampled_from([2, 12, 16, 64])),
        dtype=draw(DTYPES),
        normed=draw(flag),
        across_heads=draw(flag),
        per_sample=draw(flag),
        into_part=draw(flag),
    )


@dataclass(frozen=True, kw_only=True)
class ActivationCase:
    seed: int
    channels: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def check(self, device: torch.device) -> None:
        from photogram.worker.tuning.kernels import activation as kernels

        generator = torch.Generator("cpu").manual_seed(self.seed)
        x = torch.randn((2, self.channels, *self.shape), generator=generator).to(device, self.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        gamma = torch.randn(self.channels, generator=generator).to(device, self.dtype)
        scale = self.channels**0.5
        frames = self.shape[0]
        results = []
        for chain in (kernels.rms_silu, reference.rms_silu):
            whole = torch.zeros((2, self.channels, 2 + frames, *self.shape[1:]), dtype=self.dtype, device=device)
            whole = whole.contiguous(memory_format=torch.channels_last_3d)
            chain(x, gamma, scale, whole[:, :, 2:])
            results.append(whole)
        _close(*results)


@st.composite
def activation_case(draw: st.DrawFn) -> ActivationCase:
    return ActivationCase(
        seed=draw(st.integers(0, 2**20)),
        channels=draw(st.sampled_from([3, 16, 96, 130])),
        shape=draw(st.tuples(st.integers(2, 3), st.integers(2, 6), st.integers(2, 9))),
        dtype=draw(DTYPES),
    )


@dataclass(frozen=True, kw_only=True)
class GateCase:
    seed: int
    tokens: int
    width: int
    dtype: torch.dtype
    kind: reference.Activation
    halves: bool = True

    def check(self, device: torch.device) -> None:
        from photogram.worker.tuning.kernels import activation as kernels

        generator = torch.Generator("cpu").manual_seed(self.seed)
        both = 3 * torch.randn((self.tokens, 2 * self.width), generator=generator).to(device, self.dtype)
        x, value = both.chunk(2, dim=-1)
        if not self.halves:
            x, value = x.contiguous(), value.contiguous()
        _close(kernels.gated(x, value, self.kind), reference.gated(x, value, self.kind))


@st.composite
def gate_case(draw: st.DrawFn) -> GateCase:
    return GateCase(
        seed=draw(st.integers(0, 2**20)),
        tokens=draw(st.integers(1, 7)),
        width=draw(st.sampled_from([1, 31, 256, 1024, 1500])),
        dtype=draw(DTYPES),
        kind=draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        halves=draw(st.booleans()),
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationCase:
    seed: int
    rows: int
    width: int
    dtype: torch.dtype
    has_empty_row: bool
    is_strided: bool

    def check(self, device: torch.device) -> None:
        from photogram.worker.tuning.kernels import quantize as kernels

        generator = torch.Generator("cpu").manual_seed(self.seed)
        x = torch.randn((self.rows, 2 * self.width), generator=generator).to(device, self.dtype)
        x = x[:, : self.width] if self.is_strided else x[:, : self.width].contiguous()
        if self.has_empty_row:
            x[0] = 0
        rows, scales = kernels.quantize_rows(x)
        expected, expected_scales = reference.quantize_rows(x)
        assert (rows.dtype, rows.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
        # Half a step of e4m3, which has three bits after the point; next to zero its steps are 2**-9.
        bound = x.float().abs() * 2**-4 * 1.001 + scales * 2**-10
        assert ((rows.float() * scales - x.float()).abs() <= bound).all()


@st.composite
def quantization_case(draw: st.DrawFn) -> QuantizationCase:
    return QuantizationCase(
        seed=draw(st.integers(0, 2**20)),
        rows=draw(st.integers(1, 9)),
        width=draw(st.sampled_from([16, 48, 64, 1536, 3072])),
        dtype=draw(DTYPES),
        has_empty_row=draw(st.booleans()),
        is_strided=draw(st.booleans()),
    )
