"""What every training phase shares: its clock, its device, its checkpoint files."""

import json
import time
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

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def remaining(self) -> float:
        return self.seconds - self.elapsed

    def log(self, message: str) -> None:
        print(f"[{self.name} {self.elapsed:6.1f}] {message}", flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def save_weights(path: Path, modules: dict[str, nn.Module], facts: dict[str, float | int | str] | None = None) -> None:
    """Write modules' weights as fp16 (fp32 for the few that are small) in one safetensors file, atomically."""
    tensors = {}
    for prefix, module in modules.items():
        for key, value in module.state_dict().items():
            if key == "lm_head.weight":  # tied to the embedding
                continue
            small = value.numel() <= 256 or not value.is_floating_point()
            tensors[f"{prefix}.{key}"] = (value if small else value.half()).detach().cpu().contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"facts": json.dumps(facts or {})})
    part.rename(path)


def load_weights(path: Path, modules: dict[str, nn.Module]) -> None:
    """Read what `save_weights` wrote into fp32 modules."""
    tensors = load_file(path)
    for prefix, module in modules.items():
        state = {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
        own = module.state_dict()
        if "lm_head.weight" in own:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def prepare_device() -> None:
    """Process-wide switches for training speed."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans each new shape anew
    import torch._dynamo as dynamo
    import torch.fx.experimental._config as symbolic_shapes

    symbolic_shapes.use_duck_shape = False  # sizes that happen to be equal are still different sizes
    dynamo.config.recompile_limit = 64
    dynamo.config.accumulated_recompile_limit = 1024
