"""Triton's kernels against their plain torch references on random shapes, run by Triton's interpreter on a CPU.

Collected where the triton package is installed and no GPU is there (`conftest`); on a GPU the same cases are in
`tests/gpu`.
"""

import os

import torch
from hypothesis import given, settings

os.environ.setdefault("TRITON_INTERPRET", "1")

from kernel_cases import (
    ActivationCase,
    GateCase,
    NormCase,
    RotationCase,
    activation_case,
    gate_case,
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


@settings(max_examples=30)
@given(case=gate_case())
def test_gates_with_their_activation_are_what_their_reference_says(case: GateCase):
    case.check(CPU)
