"""Triton's kernels against their plain torch references on random shapes, run by Triton's interpreter on a CPU.

Needs the triton package, which torch's CPU builds come without; on a GPU the same cases are in `tests/gpu`.
"""

import os

import pytest
import torch
from hypothesis import given, settings

if torch.cuda.is_available():
    pytest.skip("compiled, and tested in tests/gpu", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from kernel_cases import (
    ActivationCase,
    NormCase,
    RotationCase,
    activation_case,
    norm_case,
    rotation_case,
)

CPU = torch.device("cpu")


@settings(max_examples=40)
@given(case=norm_case())
def test_norm_chains_are_what_their_reference_says(case: NormCase):
    case.check(CPU)


@settings(max_examples=30)
@given(case=rotation_case())
def test_rotation_is_what_its_reference_says(case: RotationCase):
    case.check(CPU)


@settings(max_examples=20)
@given(case=activation_case())
def test_normalization_with_silu_is_what_its_reference_says(case: ActivationCase):
    case.check(CPU)
