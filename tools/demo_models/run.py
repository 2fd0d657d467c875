"""What every training phase shares: its clock, its device, its checkpoint files."""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(slots=True)
class Run:
    """One phase of training: where it writes, when it must end. `smoke` shrinks everything to seconds on a CPU."""

    name: str
    folder: Path
    seconds: float
    smoke: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    started: float = field(default_factory=time.monotonic)
    _pool: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def remaining(self) -> float:
        return self.seconds - self.elapsed

    def graph_pool(self) -> tuple[int, int]:
        """The memory that all of this run's CUDA graphs share: they never run at once."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def log(self, message: str) -> None:
        print(f"[{self.name} {self.elapsed:6.1f}] {message}", flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


Facts = dict[str, float | int | str]


def save_weights(path: Path, modules: dict[str, nn.Module], facts: Facts | None = None) -> None:
    """Write modules' weights as `save_tensors` does, each under its name."""
    save_tensors(path, {prefix: module.state_dict() for prefix, module in modules.items()}, facts)


def save_tensors(path: Path, states: dict[str, dict[str, torch.Tensor]], facts: Facts | None = None) -> None:
    """Write weights as fp16 (fp32 for the few that are small) in one safetensors file, atomically."""
    tensors = {}
    for prefix, state in states.items():
        for key, value in state.items():
            if key == "lm_head.weight":  # tied to the embedding
                continue
            small = value.numel() <= 256 and value.is_floating_point()
            tensor = value.float() if small else value.half() if value.is_floating_point() else value
            tensors[f"{prefix}.{key}"] = tensor.detach().cpu().contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"facts": json.dumps(facts or {})})
    part.rename(path)


def load_weights(path: Path, modules: dict[str, nn.Module]) -> None:
    """Read what `save_weights` wrote into fp32 modules; one that is not in the file stays as it is."""
    tensors = load_file(path)
    for prefix, module in modules.items():
        if not any(key.startswith(prefix + ".") for key in tensors):
            continue
        state = {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
        own = module.state_dict()
        if "lm_head.weight" in own:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def eager() -> AbstractContextManager[None]:
    """Inside, compiled modules run as written: for the odd shapes that are not worth a compilation."""
    return torch.compiler.set_stance("force_eager")


def prepare_device() -> None:
    """Process-wide switches for training speed."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans each new shape anew
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs cannot be recorded on the default stream
    import torch._dynamo as dynamo
    import torch.fx.experimental._config as symbolic_shapes

    symbolic_shapes.use_duck_shape = False  # sizes that happen to be equal are still different sizes
    dynamo.config.recompile_limit = 64
    dynamo.config.accumulated_recompile_limit = 1024
