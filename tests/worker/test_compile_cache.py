"""What was compiled at one start is there at the next."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from photogram.engine.worker_process import kept_in

START = """
import json, sys, time
from pathlib import Path
import msgspec
import torch
from torch._dynamo.utils import counters
from photogram.core.config import ServeConfig
from photogram.worker.loading import load
from photogram.worker.warmup import warm_up
from photogram.worker.worker import Worker

config = ServeConfig(model_path=sys.argv[1], device="cpu", compile=True).worker(Path(sys.argv[2]))
with torch.inference_mode():
    served = load(config, lambda stage: None, lambda reason: None)
    small = msgspec.structs.replace(served.card, default_width=32, default_height=32, default_frames=5)
    object.__setattr__(served, "card", small)  # the model's own size is one for a GPU
    warm_up(Worker(served, config, lambda message: None, time.monotonic))
print(json.dumps({name: counters["inductor"][name] for name in ("fxgraph_cache_miss", "fxgraph_cache_hit")}))
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_second_start_compiles_nothing(family_folder, tmp_path):
    kernels = tmp_path / "kernels"

    def start() -> dict[str, int]:
        command = [sys.executable, "-c", START, str(family_folder("wan-2.1")), str(tmp_path)]
        env = dict(os.environ) | kept_in(kernels)
        output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(output.splitlines()[-1])

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in kernels.rglob("*.so")}

    first, programs = start(), compiled()
    assert first["fxgraph_cache_miss"] > 0
    assert programs
    second = start()
    assert second["fxgraph_cache_miss"] == 0
    assert second["fxgraph_cache_hit"] > 0
    assert compiled() == programs


def test_all_that_is_compiled_for_a_device_is_kept_under_the_data_folder(tmp_path):
    kept = kept_in(tmp_path)
    folders = {name: folder for name, folder in kept.items() if name != "TRITON_CACHE_AUTOTUNING"}
    assert set(folders) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"}
    assert all(Path(folder).parent == tmp_path for folder in folders.values())
    assert kept["TRITON_CACHE_AUTOTUNING"] == "1"
