"""One thread for every sum, so that bits can be compared."""

import torch

torch.set_num_threads(1)
