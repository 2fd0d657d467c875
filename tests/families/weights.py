"""Random weights under which every input of a module shows in its output.

Freshly made diffusers modules often start as the identity (adaLN, gates and output layers at zero, text projections
at 0.02): such a model ignores its prompt, and a stacking error would not be seen.
"""

import math
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

EMBEDDING_STD = 1.0
BIAS_STD = 0.1
TABLE_STD = 0.5  # learned shifts, scales and gates that no linear layer makes
QUERY_KEY_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
QUERY_KEY_SCALE = 2.0  # where queries and keys are normalised: at 1 all tokens get about equal attention, at 2 few do


def randomise(module: Module, *, seed: int, gain: float = 1.0) -> Module:
    """Draw all parameters of `module` anew, in place, from `seed`; give it in eval mode and fp32.

    Matrices and kernels keep the variance of their input times `gain` squared, whatever their width.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, child in module.named_modules():
            for name, parameter in child.named_parameters(recurse=False):
                mean, std = _spread(child, name, parameter, gain)
                if path.rpartition(".")[2] in QUERY_KEY_NORMS:
                    mean *= QUERY_KEY_SCALE
                parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return module.eval().float()


def _spread(module: nn.Module, name: str, parameter: nn.Parameter, gain: float) -> tuple[float, float]:
    """The mean and standard deviation of one parameter."""
    if isinstance(module, nn.Embedding):
        return 0.0, EMBEDDING_STD
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (0.0, BIAS_STD) if name == "bias" else (0.0, gain / math.sqrt(parameter[0].numel()))
    if name in ("bias", "beta"):
        return 0.0, BIAS_STD
    if name in ("weight", "gamma"):  # norms of all kinds; Gemma's multiply by 1 + weight
        return (0.0 if "Gemma" in type(module).__name__ else 1.0), BIAS_STD
    return 0.0, TABLE_STD
