"""From what `--model-path` says to a folder in diffusers' layout that is safe to load.

Knows files only: nothing is executed and no weight is read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..core.card import ModelCard
from ..core.errors import ConfigError

BUILT_IN: dict[str, str] = {"demo-image": "image", "demo-video": "video"}
"""Names of the built-in models and their folders under `photogram/demo`."""

INDEX = "model_index.json"
CARD_FILE = "photogram.json"

CACHE_DIR: str | None = None
"""Where hub repositories are kept; None is huggingface_hub's own folder (HF_HOME, HF_HUB_CACHE)."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ["*.json", "*/*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a hub repository. Safetensors beside the index are left: they hold the whole model once more,
in one file for other programs."""
HUB_VARIANTS = [f"*.{variant}{end}" for variant in ("fp16", "bf16", "fp32", "non_ema") for end in (".*", "-*")]
"""What is not, unless a variant is asked for: the same weights once more in another precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A pipeline's folder and what its index says."""

    name: str  # as clients name it
    folder: Path
    revision: str | None
    pipeline_class: str
    overrides: dict[str, Any]  # of the card, from the folder's own photogram.json


def find_checkpoint(model_path: str, *, revision: str | None, variant: str | None, download: bool = True) -> Checkpoint:
    """Find the folder of a built-in model, a local path or a hub id (downloaded once, at a pinned revision).

    Without `download` a hub repository must be there already. Raises ConfigError, in one line, for anything that cannot
    be served.
    """
    if model_path in BUILT_IN:
        folder, name = Path(__file__).parent.parent / "demo" / BUILT_IN[model_path], model_path
    elif Path(model_path).expanduser().exists():
        folder = Path(model_path).expanduser().resolve()
        name = folder.name
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) and not model_path.startswith("."):
        folder, revision = _download(model_path, revision, variant, only_look=not download)
        name = model_path
    else:
        raise ConfigError(f"--model-path '{model_path}': no such folder, and not a hub id (owner/name).")
    index = read_index(folder, model_path)
    _refuse_pickles(folder, index, variant, model_path)
    pipeline_class = index["_class_name"]
    if not isinstance(pipeline_class, str):
        raise ConfigError(f"--model-path '{model_path}': its pipeline is code of its own, which is never run.")
    return Checkpoint(
        name=name,
        folder=folder,
        revision=revision,
        pipeline_class=pipeline_class,
        overrides=_read_overrides(folder, model_path),
    )


def _download(repo_id: str, revision: str | None, variant: str | None, *, only_look: bool) -> tuple[Path, str | None]:
    """Bring a hub repository's safetensors and configurations; return its folder and commit."""
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_VARIANTS if variant is None else None,
                cache_dir=CACHE_DIR,
                local_files_only=only_look,
            )
        )
    except LocalEntryNotFoundError as error:
        if only_look:
            raise ConfigError(f"--model-path '{repo_id}': not downloaded yet, so its sizes are not known.") from None
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--model-path '{repo_id}': the hub cannot be reached ({reason}).") from None
    except GatedRepoError:
        raise ConfigError(f"--model-path '{repo_id}': the hub asks for a licence and a token (HF_TOKEN).") from None
    except RevisionNotFoundError:
        raise ConfigError(f"--revision '{revision}': '{repo_id}' has no such branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"--model-path '{repo_id}': no such repository on the hub, or it is private.") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--model-path '{repo_id}': the hub cannot be reached ({reason}).") from None
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    return folder, commit


def read_index(folder: Path, model_path: str) -> dict[str, Any]:
    """Return what a pipeline's folder says of its components. Raises ConfigError where it is none."""
    path = folder / INDEX
    if folder.is_file():
        raise ConfigError(f"--model-path '{model_path}': is a file; a folder with {INDEX} is needed.")
    if not path.is_file():
        raise ConfigError(f"--model-path '{model_path}': is no diffusers pipeline (it has no {INDEX}).")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if "_class_name" not in index:
            raise ValueError("no _class_name")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--model-path '{model_path}': {INDEX} cannot be read ({error}).") from None
    return index


def _refuse_pickles(folder: Path, index: dict[str, Any], variant: str | None, model_path: str) -> None:
    """A pickle runs code when it is read; only safetensors are loaded."""
    for component, entry in index.items():
        part = folder / component
        if component.startswith("_") or not isinstance(entry, list) or not part.is_dir():
            continue
        pickles = [path for pattern in _PICKLES for path in part.glob(pattern)]
        safe = [path for path in part.glob("*.safetensors") if variant is None or f".{variant}." in path.name]
        if pickles and not safe:
            name = f"{component}/{pickles[0].name}"
            raise ConfigError(f"--model-path '{model_path}': '{name}' is a pickle; only safetensors are loaded.")


def _read_overrides(folder: Path, model_path: str) -> dict[str, Any]:
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        overrides = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(overrides, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model-path '{model_path}': {CARD_FILE} cannot be read ({error}).") from None
    types = {field.name: field.type for field in msgspec.structs.fields(ModelCard)}
    for name, value in overrides.items():
        try:
            msgspec.convert(value, types.get(name, Any))
        except msgspec.ValidationError as error:
            raise ConfigError(f"--model-path '{model_path}': {CARD_FILE}, '{name}': {error}.") from None
    return overrides
