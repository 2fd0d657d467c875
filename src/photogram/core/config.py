"""Every setting: its type, default and one line of help with its unit. The command line and the docs are read off it.

Parsed once, checked in `__post_init__` with the flag's name, never changed afterwards.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .parallel import Degrees, resolve_degrees
from .request import MAX_LORA_STRENGTH, QualityMode
from .worker_config import AttentionBackend, LogLevel, Placement, Precision, Precisions, StepCache, Tuning, WorkerConfig

DEMO_IMAGE = "demo-image"


def setting(default: Any, help: str) -> Any:
    """A field with its one-line help. `default` may be a list or a zero-argument callable for a computed one."""
    if isinstance(default, tuple) and not default:
        return field(default=(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of `photogram serve`; a field `max_queue` is the flag `--max-queue`."""

    # --- model
    model_path: str = setting(DEMO_IMAGE, "folder, hub id, or a built-in model")
    served_model_name: str | None = setting(None, "name that clients use; default: the hub id or folder name")
    revision: str | None = setting(None, "hub branch, tag or commit")
    variant: str | None = setting(None, "weights variant, such as fp16")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: Precision = setting("auto", "weights and arithmetic: auto, fp32, bf16 or fp16")
    dit_precision: Precision = setting("auto", "of the denoiser, where it differs from --precision")
    vae_precision: Precision = setting("auto", "of the VAE, where it differs from --precision")
    text_encoder_precision: Precision = setting("auto", "of text encoders, where it differs from --precision")
    # --- memory
    text_encoder_cpu_offload: bool | None = setting(
        None, "keep text encoders in host memory, on the device for their calls; default: where nothing else fits"
    )
    text_encoder_layerwise_offload: bool | None = setting(
        None, "keep the layers of text encoders in host memory, two at a time on the device; default: as above"
    )
    image_encoder_cpu_offload: bool | None = setting(None, "the same for image encoders; default: as above")
    vae_cpu_offload: bool | None = setting(None, "the same for the VAE; default: as above")
    dit_cpu_offload: bool | None = setting(
        None, "the same for the denoiser, which stays until another one needs its room; default: as above"
    )
    dit_layerwise_offload: bool | None = setting(
        None, "keep the denoiser in host memory and bring it in layer by layer; default: as above"
    )
    pin_cpu_memory: bool = setting(True, "pin the host memory of what is offloaded: faster copies, not swappable")
    vae_tiling: bool | None = setting(
        None, "decode large pictures in tiles: less memory, faint seams possible; default: where nothing else fits"
    )
    vae_slicing: bool = setting(False, "decode the pictures of a batch one by one")
    # --- speed
    attention_backend: AttentionBackend = setting(
        "auto", "attention kernels tried first: auto, torch's own order, cudnn, flash, efficient, math, fa3 or fa4"
    )
    compile: bool | None = setting(
        None, "compile the denoiser's blocks: a slower first start, faster steps; default: by the model and the card"
    )
    cuda_graphs: bool | None = setting(
        None, "replay calls that are bound by launches as CUDA graphs; default: as above"
    )
    cuda_graph_memory_gb: float = setting(4.0, "memory for CUDA graphs, GB, at most")
    search_convolutions: bool = setting(
        False, "on a GPU, time cuDNN's kernels for each convolution at its first call, and keep the fastest"
    )
    fused_kernels: bool | None = setting(
        None, "compute what lies between the denoiser's matrix products in kernels of our own; default: as above"
    )
    channels_last: bool = setting(True, "on a GPU, keep the weights of VAEs and UNets in the order convolutions want")
    onednn_convolutions: bool = setting(True, "on a CPU, compute the 3D convolutions of VAEs with oneDNN, always")
    side_stream: bool | None = setting(
        None, "encode, decode and copy frames beside other jobs' steps; default: on a GPU"
    )
    # --- several devices
    num_gpus: int = setting(1, "devices of all groups; those of one group share a model; on a CPU: processes")
    dp_size: int = setting(1, "groups of devices, each with a model and jobs of its own behind one queue")
    ulysses_degree: int | None = setting(None, "devices that exchange heads; default: what the ring leaves")
    ring_degree: int | None = setting(None, "devices that pass keys and values around; default: 1")
    sp_degree: int | None = setting(None, "product of the two degrees above, for those who know it by that name")
    tp_size: int = setting(1, "devices that share each layer of the text encoder: 1, as the first device alone encodes")
    vae_sp: bool = setting(True, "decode on all devices, each a band of the picture")
    cfg_parallel: int | None = setting(
        None,
        "2: the two halves of a guided step run at once, each on half of the devices; 1: not; "
        "default: 2 for models that are guided, where no other degree is given",
    )
    enable_cfg_parallel: bool = setting(False, "the same as --cfg-parallel 2")
    # --- start
    warmup: bool = setting(True, "run one short generation before reporting ready")
    warmup_resolutions: tuple[str, ...] = setting(
        (), "WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES, to warm up beside the model's own; may be repeated"
    )
    # --- LoRA
    lora_path: tuple[str, ...] = setting((), "LoRA to set at the start: file, folder or hub id; may be repeated")
    lora_nickname: tuple[str, ...] = setting((), "its nickname; default: 'default', or file names for several")
    lora_scale: tuple[float, ...] = setting((), "its strength; default: 1.0; one for all, or one for each")
    lora_dir: tuple[str, ...] = setting((), "folder of LoRA files that requests may name; may be repeated")
    lora_hub: bool = setting(True, "let requests name LoRAs of the Hugging Face hub")
    allow_local_paths: bool = setting(False, "let requests name any LoRA file; always so on a loopback address")
    max_lora_mb: int = setting(8192, "size of one LoRA file, MB, at most")
    # --- network
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(30000, "port to listen on")
    public_url: str | None = setting(None, "prefix that makes image URLs absolute")
    api_key: tuple[str, ...] = setting((), "key that clients must send; may be repeated")
    api_key_file: str | None = setting(None, "file with one key a line")
    admin_api_key: str | None = setting(None, "key for administrative routes")
    open_metrics: bool = setting(False, "answer /metrics without a key, where keys are configured")
    # --- other servers
    fetch_urls: bool = setting(True, "fetch input pictures from http(s) URLs that clients name")
    allow_url_host: tuple[str, ...] = setting(
        (), "HOST or HOST:PORT that URLs may name whatever its address; may be repeated"
    )
    # --- limits
    max_batch_size: int = setting(8, "calls run as one forward pass, at most")
    max_live_jobs: int = setting(32, "jobs started and not finished, at most")
    max_queue: int = setting(1000, "jobs waiting or running, at most; beyond it 429")
    max_pixels: int = setting(4096 * 4096, "width times height of a picture, at most")
    max_video_pixels: int = setting(1920 * 1088, "width times height of a clip, at most")
    max_frames: int = setting(1025, "frames of a clip, at most; a model may have a lower bound")
    max_steps: int = setting(200, "denoising steps, at most")
    max_upload_mb: int = setting(50, "size of one upload, MB")
    request_timeout_s: float = setting(3600.0, "seconds a picture may take from acceptance, a clip from its start")
    drain_seconds: float = setting(120.0, "seconds running jobs may go on after SIGTERM; clips in the queue stay there")
    hang_timeout_s: float = setting(600.0, "seconds one call may take before the worker is replaced")
    worker_memory_gb: float | None = setting(None, "memory jobs on the CPU may take beyond the model, GB, at most")
    # --- results
    data_dir: str = setting("~/.local/share/photogram", "folder for the job store and finished files")
    storage: str | None = setting(None, "object store for finished files: s3://BUCKET/PREFIX, gs:// or az://")
    presigned_url_seconds: int = setting(3600, "how long signed URLs of an object store last; 0: none are given")
    keep: str = setting("7d,20GB", "how long and how much finished work is kept: age, size or both")
    keep_uploads: str = setting("7d,5GB", "how long uploaded files are kept, and how much of them for each key")
    metadata: bool = setting(True, "write prompt, seed, steps and model into files")
    webhook_url: str | None = setting(None, "URL that is told of every clip's end")
    webhook_secret: str | None = setting(None, "whsec_ and base64: signs what webhooks are told")
    # --- sampling
    deterministic: bool = setting(False, "run every job's calls alone: same bytes at any load")
    prompt_cache_mb: int = setting(512, "memory for encoded prompts, MB; 0 turns it off")
    lora_cache_mb: int = setting(4096, "memory for loaded LoRAs, MB; those in use are kept beyond it")
    quality_mode: QualityMode = setting(
        "exact",
        "of requests that name none: exact, or lossy and faster: high or fast; GET /v1/models says what they do",
    )
    fp8_linears: bool = setting(
        False, "copy the denoiser's linear layers to fp8, for requests in quality_mode fast (lossy): half as much again"
    )
    step_cache: StepCache = setting("none", "skip denoiser work between similar steps (lossy): none or first-block")
    step_cache_threshold: float = setting(0.05, "relative change under which a step is skipped")
    strict_model: bool = setting(False, "answer 404 for any model name but the served one")
    log_level: LogLevel = setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "max_live_jobs",
            "max_queue",
            "max_steps",
            "max_upload_mb",
            "max_pixels",
            "max_frames",
            "max_lora_mb",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be between 0 and 65535.")
        for name in ("request_timeout_s", "hang_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0.")
        for name in ("prompt_cache_mb", "lora_cache_mb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative.")
        if self.worker_memory_gb is not None and not self.worker_memory_gb > 0:
            raise ConfigError(f"--worker-memory-gb {self.worker_memory_gb}: must be above 0.")
        if not 0 <= self.step_cache_threshold <= 1:
            raise ConfigError(f"--step-cache-threshold {self.step_cache_threshold}: must be between 0 and 1.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"--device '{self.device}': must be auto, cpu, cuda or cuda:N.")
        if self.enable_cfg_parallel and self.cfg_parallel == 1:
            raise ConfigError("--enable-cfg-parallel: says the same as --cfg-parallel 2, and --cfg-parallel is 1.")
        for part in ("dit", "text-encoder"):
            flags = [f"--{part}-{way}-offload" for way in ("cpu", "layerwise")]
            if all(getattr(self, flag[2:].replace("-", "_")) for flag in flags):
                raise ConfigError(f"{flags[0]} and {flags[1]}: choose one.")
        if self.degrees.world_size > 1 and (self.dit_cpu_offload or self.dit_layerwise_offload):
            raise ConfigError(f"--dit-cpu-offload, --dit-layerwise-offload: not with --num-gpus {self.num_gpus}.")
        if not self.cuda_graph_memory_gb > 0:
            raise ConfigError(f"--cuda-graph-memory-gb {self.cuda_graph_memory_gb}: must be above 0.")
        if self.search_convolutions and self.deterministic:
            raise ConfigError(
                "--search-convolutions: not with --deterministic, as the next start may find others faster."
            )
        for name in ("compile", "cuda_graphs", "fused_kernels"):
            if getattr(self, name):
                self._check_blocks_stand(f"--{name.replace('_', '-')}")
        if self.fp8_linears:
            self._check_layers_stand("--fp8-linears")
        if self.tp_size != 1:
            raise ConfigError(
                f"--tp-size {self.tp_size}: must be 1, as the text encoder is on the first device alone "
                "(--ulysses-degree and --ring-degree split the denoiser)."
            )
        if self.public_url is not None and not re.match(r"https?://[^/]", self.public_url):
            raise ConfigError(f"--public-url '{self.public_url}': must start with http:// or https://.")
        if not 0 <= self.presigned_url_seconds <= 604_800:
            raise ConfigError(f"--presigned-url-seconds {self.presigned_url_seconds}: must be from 0 to 604800.")
        if self.webhook_secret is not None:
            webhook_key(self.webhook_secret)
        for text in self.warmup_resolutions:
            _warmup_size(text)
        parse_keep(self.keep)
        parse_keep(self.keep_uploads, "--keep-uploads")
        self._check_loras()

    def _check_blocks_stand(self, flag: str) -> None:
        """What is compiled, recorded or replaced may not change from step to step."""
        if self.dit_layerwise_offload and flag != "--fused-kernels":
            raise ConfigError(f"{flag}: not with --dit-layerwise-offload.")
        if self.step_cache != "none":
            raise ConfigError(f"{flag}: not with --step-cache {self.step_cache}.")

    def _check_layers_stand(self, flag: str) -> None:
        """What has a second way to compute may be neither split, nor away, nor bound to one of the two."""
        if self.degrees.world_size > 1:
            raise ConfigError(f"{flag}: not with --num-gpus {self.num_gpus}.")
        for name in ("dit_cpu_offload", "dit_layerwise_offload", "compile", "fused_kernels"):
            if getattr(self, name):
                raise ConfigError(f"{flag}: not with --{name.replace('_', '-')}.")

    def _check_loras(self) -> None:
        num = len(self.lora_path)
        if len(self.lora_nickname) not in (0, num):
            raise ConfigError(f"--lora-nickname: {len(self.lora_nickname)} of them for {num} of --lora-path.")
        if len(self.lora_scale) not in (0, 1, num) or (self.lora_scale and not num):
            raise ConfigError(f"--lora-scale: {len(self.lora_scale)} of them for {num} of --lora-path.")
        for scale in self.lora_scale:
            if not abs(scale) <= MAX_LORA_STRENGTH:
                raise ConfigError(
                    f"--lora-scale {scale}: must be between {-MAX_LORA_STRENGTH} and {MAX_LORA_STRENGTH}."
                )

    @property
    def degrees(self) -> Degrees:
        return resolve_degrees(
            num_gpus=self.num_gpus,
            dp=self.dp_size,
            cfg=2 if self.enable_cfg_parallel else self.cfg_parallel,
            ulysses=self.ulysses_degree,
            ring=self.ring_degree,
            sp=self.sp_degree,
        )

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def kernels_path(self) -> Path:
        """Where compiled kernels are kept, so that a second start finds them."""
        return self.data_path / "kernels"

    @property
    def listens_on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def worker(self, frames_dir: Path, replica: int = 0) -> WorkerConfig:
        """Return the worker's share of the settings, for the `replica`-th of --dp-size workers."""
        limit_gb = self.worker_memory_gb
        return WorkerConfig(
            model_path=self.model_path,
            served_model_name=self.served_model_name,
            revision=self.revision,
            variant=self.variant,
            device=self.device,
            degrees=self.degrees,
            replica=replica,
            num_replicas=self.dp_size,
            split_vae=self.vae_sp,
            precisions=Precisions(
                all=self.precision,
                dit=self.dit_precision,
                vae=self.vae_precision,
                text_encoder=self.text_encoder_precision,
            ),
            tuning=Tuning(
                attention_backend=self.attention_backend,
                compile=self.compile,
                channels_last=self.channels_last,
                onednn_convolutions=self.onednn_convolutions,
                fused_kernels=self.fused_kernels,
                cuda_graphs=self.cuda_graphs,
                cuda_graph_memory_bytes=int(self.cuda_graph_memory_gb * 1e9),
                search_convolutions=self.search_convolutions,
            ),
            side_stream=self.side_stream,
            placement=Placement(**{name: getattr(self, name) for name in Placement.__struct_fields__}),
            max_batch_size=1 if self.deterministic else self.max_batch_size,
            max_live_jobs=self.max_live_jobs,
            prompt_cache_bytes=self.prompt_cache_mb * 1_000_000,
            lora_cache_bytes=self.lora_cache_mb * 1_000_000,
            lora_file_bytes=self.max_lora_mb * 1_000_000,
            fp8_linears=self.fp8_linears,
            step_cache=self.step_cache,
            step_cache_threshold=self.step_cache_threshold,
            deterministic=self.deterministic,
            warmup=self.warmup,
            warmup_sizes=tuple(map(_warmup_size, self.warmup_resolutions)),
            memory_limit_bytes=None if limit_gb is None else int(limit_gb * 1e9),
            frames_dir=str(frames_dir),
            peaks_dir=str(self.data_path / "memory"),
            log_level=self.log_level,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How much finished work is kept; None is no bound."""

    age_s: float | None
    size_bytes: int | None


def _warmup_size(text: str) -> tuple[int, int, int | None]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise ConfigError(f"--warmup-resolutions '{text}': expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES.")
    width, height, frames = match.groups()
    return int(width), int(height), None if frames is None else int(frames)


def webhook_key(secret: str) -> bytes:
    """Return the bytes of a webhook's secret. Raises ConfigError, which does not repeat it."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith("whsec_") or len(key) < 16:
        raise ConfigError("--webhook-secret: must be whsec_ and the base64 of at least 16 random bytes.")
    return key


_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_keep(text: str, flag: str = "--keep") -> Keep:
    """Parse ``7d,20GB``, ``12h``, ``500MB`` or ``forever``. Raises ConfigError for anything else."""
    age_s: float | None = None
    size_bytes: int | None = None
    if text == "forever":
        return Keep(age_s=None, size_bytes=None)
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", part)
        unit = match.group(2) if match else ""
        if match and unit in _SECONDS and age_s is None:
            age_s = float(match.group(1)) * _SECONDS[unit]
        elif match and unit in _BYTES and size_bytes is None:
            size_bytes = int(float(match.group(1)) * _BYTES[unit])
        else:
            raise ConfigError(f"{flag} '{text}': expected an age (12h, 7d), a size (20GB) or both as '7d,20GB'.")
    return Keep(age_s=age_s, size_bytes=size_bytes)


def settings() -> tuple[dataclasses.Field[Any], ...]:
    """Every setting of `photogram serve`, in the order of the docs."""
    return dataclasses.fields(ServeConfig)
