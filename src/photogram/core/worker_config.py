"""What a worker is started with: where weights go, how precise they are, what makes them fast, and the rest."""

from __future__ import annotations

from typing import Literal

import msgspec

from .parallel import Degrees

Precision = Literal["auto", "fp32", "bf16", "fp16"]
StepCache = Literal["none", "first-block"]
AttentionBackend = Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "fa3", "fa4"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Which components wait in host memory and come to the device for their calls, and how the VAE works.

    None leaves it to the plan of the device's memory.
    """

    text_encoder_cpu_offload: bool | None = None
    text_encoder_layerwise_offload: bool | None = None
    image_encoder_cpu_offload: bool | None = None
    vae_cpu_offload: bool | None = None
    dit_cpu_offload: bool | None = None
    dit_layerwise_offload: bool | None = None
    pin_cpu_memory: bool = True
    vae_tiling: bool | None = None
    vae_slicing: bool = False

    def settled(self) -> Placement:
        """Return this with everything off that was left open."""
        return Placement(**{name: bool(getattr(self, name)) for name in self.__struct_fields__})


class Precisions(msgspec.Struct, frozen=True, kw_only=True):
    """Precision of the whole pipeline, and of kinds of components where they differ from it."""

    all: Precision = "auto"
    dit: Precision = "auto"
    vae: Precision = "auto"
    text_encoder: Precision = "auto"


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to the networks of a loaded pipeline to make them fast; none of it changes their maths.

    None leaves it to what is known of the model's family on the device.
    """

    attention_backend: AttentionBackend = "auto"
    compile: bool | None = False
    channels_last: bool = True
    onednn_convolutions: bool = True
    fused_kernels: bool | None = False
    cuda_graphs: bool | None = False
    cuda_graph_memory_bytes: int = 4_000_000_000
    search_convolutions: bool = False


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to load its model and run jobs."""

    model_path: str
    served_model_name: str | None
    revision: str | None
    variant: str | None
    device: str
    degrees: Degrees  # of one replica
    replica: int
    num_replicas: int
    split_vae: bool
    precisions: Precisions
    placement: Placement
    tuning: Tuning
    side_stream: bool | None
    max_batch_size: int
    max_live_jobs: int
    prompt_cache_bytes: int
    lora_cache_bytes: int
    lora_file_bytes: int
    fp8_linears: bool
    step_cache: StepCache
    step_cache_threshold: float
    deterministic: bool
    warmup: bool
    warmup_sizes: tuple[tuple[int, int, int | None], ...]  # width, height, frames
    memory_limit_bytes: int | None
    frames_dir: str
    peaks_dir: str
    log_level: LogLevel
