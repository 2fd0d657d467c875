"""Builds a pipeline's networks with their weights read straight to the device, in one pass and with no copy beside it.

The rules are the libraries': which keys belong where, what is tied, which precision a weight has. A network of
diffusers is made without memory and its weights are put in as its own loader does; transformers is given the tensors
still in their files and reads each when it needs it. What cannot be read like this (quantised weights, classes that
load in a way of their own, files of other kinds) is left to `from_pretrained`, and the reason is told.

Uses what diffusers keeps for itself: the precision that its loader keeps for some modules, its renaming of old keys.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .tensor_files import Reader, StoredTensor, UnusualFile

logger = logging.getLogger(__name__)

_NAMES = {ModelMixin: "diffusion_pytorch_model", PreTrainedModel: "model"}
_OTHER_WAYS = ("quantization_config", "transformers_weights", "fusion_config")
_ADAPTER = "adapter_config.json"
_TENSORS_AT_ONCE = 4


class NotDirect(Exception):
    """A component whose weights cannot be read straight to a device, and why."""


def read_networks(
    folder: Path,
    index: Mapping[str, Any],
    precisions: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    wanted: Callable[[str], bool],
    variant: str | None = None,
) -> dict[str, torch.nn.Module]:
    """Return those networks of a pipeline's folder that are `wanted`, on the device, by name; the others are left out.

    `index` is the folder's model_index.json; a component's precision is its own or that of ``default``. Weights are
    those of `from_pretrained(...).to(device)` bit for bit. Components that cannot be read like this are left out too,
    and the log says why.
    """
    found: dict[str, torch.nn.Module] = {}
    with Reader(device) as reader, ThreadPoolExecutor(_TENSORS_AT_ONCE, thread_name_prefix="weights") as threads:
        filling: list[Callable[[], None]] = []
        # Those of diffusers first: they are filled by other threads while transformers, which waits, builds its own.
        for name, kind in sorted(_kinds(index, wanted), key=lambda one: issubclass(one[1], PreTrainedModel)):
            dtype = precisions.get(name, precisions["default"])
            try:
                stored, is_sharded = _stored(folder / name, kind, reader, variant)
                if issubclass(kind, ModelMixin):
                    found[name], finish = _of_diffusers(kind, folder / name, stored, is_sharded, dtype, device, threads)
                    filling.append(finish)
                else:
                    found[name] = _of_transformers(kind, folder / name, stored, dtype, device)
            except (NotDirect, UnusualFile) as reason:
                logger.info("%s is loaded by way of host memory: %s", name, reason)
        for finish in filling:
            finish()
    return found


def _kinds(
    index: Mapping[str, Any], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, type[ModelMixin] | type[PreTrainedModel]]]:
    """Yield name and class of the networks that an index names and one of the two libraries loads."""
    for name, entry in index.items():
        if name.startswith("_") or not wanted(name) or not isinstance(entry, list) or entry[0] is None:
            continue
        library, class_name = entry
        module = {"diffusers": diffusers, "transformers": transformers}.get(library)
        if module is None:  # some pipelines bring networks of their own
            module = vars(diffusers.pipelines).get(library)
        kind = getattr(module, class_name, None)
        if isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel):
            yield name, kind


def _stored(
    folder: Path, kind: type[torch.nn.Module], reader: Reader, variant: str | None
) -> tuple[dict[str, StoredTensor], bool]:
    """Return a network's tensors by name, and whether they lie in several files. Raises NotDirect."""
    library = ModelMixin if issubclass(kind, ModelMixin) else PreTrainedModel
    if kind.from_pretrained.__func__ is not library.from_pretrained.__func__:  # type: ignore[attr-defined]
        raise NotDirect(f"{kind.__name__} loads its weights in a way of its own")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if others := [key for key in _OTHER_WAYS if config.get(key)]:
        raise NotDirect(f"its configuration has a {others[0]}")
    if (folder / _ADAPTER).exists():
        raise NotDirect("an adapter lies beside its weights")
    suffix = f".{variant}" if variant else ""
    whole = folder / f"{_NAMES[library]}{suffix}.safetensors"
    shards = folder / f"{_NAMES[library]}.safetensors.index{suffix}.json"
    if shards.is_file():
        names = json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values()
        return reader.open(folder / name for name in sorted(set(names))), True
    if not whole.is_file():
        raise NotDirect(f"there is no {whole.name}")
    return reader.open([whole]), False


def _of_diffusers(
    kind: type[ModelMixin],
    folder: Path,
    stored: dict[str, StoredTensor],
    is_sharded: bool,
    dtype: torch.dtype,
    device: torch.device,
    threads: ThreadPoolExecutor,
) -> tuple[ModelMixin, Callable[[], None]]:
    """Return a network whose weights are being read, and what waits for them and puts them in. Raises NotDirect."""
    config, unused, _ = kind.load_config(
        folder, local_files_only=True, return_unused_kwargs=True, return_commit_hash=True
    )
    with _default_dtype(dtype), init_empty_weights():
        network = kind.from_config(config, **unused)
    if not is_sharded:  # as old files are
        network._fix_state_dict_keys_on_load(stored)
    own = network.state_dict()
    if missing := [name for name, tensor in own.items() if tensor.is_meta and name not in stored]:
        raise NotDirect(f"{len(missing)} of its weights are not in the files, such as '{missing[0]}'")
    if unknown := sorted(set(stored) - set(own)):
        logger.warning("%s: %d tensors of the files have no place in it, such as '%s'", kind.__name__, len(unknown),
                       unknown[0])  # fmt: skip
    precisions = _precisions(kind, stored, own, dtype)
    if device.type == "cuda":
        # Asked for at once and given back to torch, which then cuts it up: the driver is slow at many small pieces.
        needed = sum(stored[name].shape.numel() * precision.itemsize for name, precision in precisions.items())
        torch.empty(needed, dtype=torch.uint8, device=device)

    def read(name: str) -> torch.Tensor:
        return stored[name][...].to(precisions[name])

    reading = {name: threads.submit(read, name) for name in precisions}

    def finish() -> None:
        for name, tensor in reading.items():
            value = tensor.result()
            set_module_tensor_to_device(network, name, device, value=value, dtype=value.dtype, clear_cache=False)
        network.register_to_config(_name_or_path=str(folder))
        network.to(device).eval()

    return network, finish


def _precisions(
    kind: type[ModelMixin], stored: Mapping[str, StoredTensor], own: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the precision of each stored tensor that has a place in the network. Raises NotDirect for a shape that is
    not the place's."""
    in_fp32 = set(kind._keep_in_fp32_modules or ())
    found: dict[str, torch.dtype] = {}
    for name, tensor in stored.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            raise NotDirect(f"'{name}' has shape {tuple(tensor.shape)} where {tuple(own[name].shape)} is needed")
        wanted = torch.float32 if in_fp32 & set(name.split(".")) else dtype
        found[name] = wanted if tensor.dtype.is_floating_point else tensor.dtype
    return found


def _of_transformers(
    kind: type[PreTrainedModel],
    folder: Path,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    if kind.config_class is None:
        raise NotDirect(f"{kind.__name__} names no configuration")
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    generation: GenerationConfig | None = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    network = kind.from_pretrained(
        None,
        config=config,
        generation_config=generation,
        state_dict=stored,
        dtype=dtype,
        device_map={"": device},
    )
    network.config.name_or_path = str(folder)
    if device.type != "cpu":
        for name, table in tables_of(network, config, dtype).items():
            owner, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(owner), own_name, table.to(device))
    return network


def tables_of(network: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return by name the tables of a network of transformers that are in no file, such as rotary frequencies, computed
    on the CPU: a GPU rounds powers otherwise."""
    kept = network.state_dict()
    names = {name for name, table in network.named_buffers() if name not in kept and table.is_floating_point()}
    if not names:
        return {}
    with _default_dtype(dtype), init_empty_weights():
        made = type(network)(config)
    return {name: table for name, table in made.named_buffers() if name in names}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
