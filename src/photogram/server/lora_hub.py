"""LoRAs of the Hugging Face hub: one file of one commit, its size known before it is fetched, kept in the hub's cache.

A reference is ``owner/name``, ``owner/name@revision``, either with ``/folder/file.safetensors`` behind it, or the
address of such a page on huggingface.co.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import NotFound, RequestError, ServiceError

HUB_REFERENCE = re.compile(
    r"(?:https://(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>\w[\w.-]*)|/(?:resolve|blob|tree)/(?P<shown_revision>\w[\w.-]*))?"
    r"(?:/(?P<file>[^?]+\.safetensors))?/?(?:\?download=true)?",
    re.ASCII,
)
ANSWER_WITHIN_S = 15.0
_BESIDE = "adapter_config.json"
"""Where PEFT keeps alpha and ranks."""


class HubUnreachable(ServiceError):
    status = 502
    code = "hub_unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """A commit and the sizes of its files, in bytes; `folder` where it was read from the cache."""

    commit: str
    sizes: Mapping[str, int]
    folder: Path | None = None


def fetch(
    reference: re.Match[str],
    choose: Callable[[Sequence[str]], str],
    *,
    max_bytes: int,
    cache: Path | None,
    param: str,
) -> tuple[Path, Path]:
    """Return a LoRA's file in the hub's cache, fetched if it is not there yet, and the cache's own folder.

    `choose` picks one of the files where the reference names none. Raises NotFound, RequestError, HubUnreachable.
    """
    # Imported when first needed: it is slow, and most servers never ask the hub.
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, shown = reference["repo"], reference[0]
    cache = cache or Path(constants.HF_HUB_CACHE)
    repository = _look_up(repo_id, reference["revision"] or reference["shown_revision"], cache, shown, param)
    name = reference["file"] or choose([name for name in repository.sizes if name.endswith(".safetensors")])
    if name not in repository.sizes:
        raise NotFound(f"{param} '{shown}': '{repo_id}' has no file '{name}'.", param=param, code="lora_not_found")
    if repository.sizes[name] > max_bytes:
        raise RequestError(
            f"{param} '{shown}': '{name}' has {repository.sizes[name]} bytes; at most {max_bytes} are allowed "
            "(--max-lora-mb).",
            param=param,
            code="invalid_lora",
        )
    if repository.folder is not None:
        return repository.folder / name, cache.resolve()
    beside = str(Path(name).with_name(_BESIDE))
    try:
        for wanted in (beside, name) if beside in repository.sizes else (name,):
            path = hf_hub_download(repo_id, wanted, revision=repository.commit, cache_dir=cache)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubUnreachable(f"{param} '{shown}': the hub broke off ({_reason(error)}).", param=param) from None
    return Path(path), cache.resolve()


def _look_up(repo_id: str, revision: str | None, cache: Path, shown: str, param: str) -> _Repository:
    """Ask the hub for a revision's commit and files; where it cannot be asked, the cache."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN_S)
        return _Repository(
            commit=info.sha or "main", sizes={file.rfilename: file.size or 0 for file in info.siblings or ()}
        )
    except GatedRepoError:
        reason = "the hub asks for a licence and the server's token (HF_TOKEN)"
    except RevisionNotFoundError:
        reason = f"'{repo_id}' has no revision '{revision}'"
    except RepositoryNotFoundError:
        reason = "no such repository on the hub, or it is private"
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        cached = _cached(repo_id, revision or "main", cache)
        if cached is not None:
            return cached
        if not isinstance(error, OfflineModeIsEnabled):
            raise HubUnreachable(
                f"{param} '{shown}': the hub cannot be reached ({_reason(error)}).", param=param
            ) from None
        reason = "not in the hub's cache, and the hub is not asked (HF_HUB_OFFLINE)"
    raise NotFound(f"{param} '{shown}': {reason}.", param=param, code="lora_not_found")


def _cached(repo_id: str, revision: str, cache: Path) -> _Repository | None:
    """Read the hub's cache: ``models--owner--name/refs/<branch>`` has a commit, ``snapshots/<commit>`` its files."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    try:
        commit = (home / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = revision
    folder = home / "snapshots" / commit
    if not re.fullmatch(r"\w[\w.-]*", commit) or not folder.is_dir():
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return _Repository(commit=commit, sizes=sizes, folder=folder)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
