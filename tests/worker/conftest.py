"""One thread for every sum, so that bits can be compared."""

from importlib.util import find_spec

import torch

torch.set_num_threads(1)

# Triton compiles or interprets, a whole process long: on a GPU tests/gpu has the same cases. Torch for CPUs comes
# without it, and it takes a gigabyte.
collect_ignore = ["test_kernels.py"] if find_spec("triton") is None or torch.cuda.is_available() else []
