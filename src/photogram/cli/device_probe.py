"""What torch sees, as one line of JSON. `photogram doctor` runs it as a process of its own; nothing imports it.

python -m photogram.cli.device_probe auto
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings


def probe(device: str) -> dict[str, object]:
    """Return versions and the device that `device` (auto, cpu, cuda, cuda:N) means.

    `memory` is (free, total) bytes of a GPU and None for the CPU; `problem` says why the device cannot be used.
    """
    import diffusers
    import torch
    import transformers

    found: dict[str, object] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
        "device_name": None,
        "memory": None,
        "problem": None,
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return found
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        built = "this torch was built without CUDA" if torch.version.cuda is None else f"torch sees {count} GPUs"
        return {**found, "device": device, "problem": f"{device} cannot be used: {built}"}
    return {
        **found,
        "device": f"cuda:{index}",
        "device_name": torch.cuda.get_device_name(index),
        "memory": torch.cuda.mem_get_info(index),
    }


if __name__ == "__main__":
    # Only the answer may stand on stdout, whatever the imports have to say.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = probe(sys.argv[1])
    print(json.dumps(answer))
