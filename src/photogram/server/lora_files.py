"""Where LoRA files may come from: the operator's folders, the hub, and, where that is allowed, any local path.

Everything a client may name ends here in one checked safetensors file, or in an error that names the parameter. Knows
files only: not which LoRAs are set, nor any model. All of it blocks, and is called in a thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.config import DEMO_IMAGE, ServeConfig
from ..core.errors import ConfigError, NotFound, RequestError
from ..core.lora_file import SUFFIX, open_lora, read_header
from .lora_hub import HUB_REFERENCE, fetch

BUILT_IN = Path(__file__).parents[1] / "demo" / "loras"
"""LoRAs of the built-in image model."""

MAX_REFERENCE = 1024
MAX_DEPTH = 4
MAX_NAMES = 10_000
# What diffusers and PEFT call the one file of a folder, best first.
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# diffusers skips these too: the state of a training run, not its result.
_NOT_WEIGHTS = ("scheduler", "optimizer", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLora:
    """A checked file. `given` is what the client or the operator wrote, `path` the file that is loaded."""

    given: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFinder:
    """Finds and checks files. `folders` are the real paths of ``--lora-dir``, searched in order, anew each time."""

    folders: tuple[Path, ...] = ()
    allow_local: bool = False
    allow_hub: bool = True
    max_bytes: int = 1 << 33
    hub_cache: Path | None = None

    @classmethod
    def of(cls, config: ServeConfig) -> LoraFinder:
        """Return the finder that the settings ask for. Raises ConfigError for a folder that is none."""
        for folder in config.lora_dir:
            if not Path(folder).expanduser().is_dir():
                raise ConfigError(f"--lora-dir '{folder}': no such folder.")
        folders = [Path(folder).expanduser().resolve() for folder in config.lora_dir]
        if config.model_path == DEMO_IMAGE and BUILT_IN.is_dir():
            folders.append(BUILT_IN.resolve())
        return cls(
            folders=tuple(folders),
            allow_local=config.listens_on_loopback or config.allow_local_paths,
            allow_hub=config.lora_hub,
            max_bytes=config.max_lora_mb * 1_000_000,
        )

    def names(self) -> list[str]:
        """Return the nicknames that the folders give: a file's path in its folder, without the suffix."""
        found: dict[str, None] = {}
        for folder in self.folders:
            for name in _names_in(folder):
                if len(found) >= MAX_NAMES:
                    return list(found)
                found.setdefault(name)
        return list(found)

    def named(self, nickname: str, param: str) -> FoundLora | None:
        """Return the file that a nickname means by itself, or None. Raises RequestError for one that is no LoRA."""
        if _is_within_a_folder(nickname):
            for folder in self.folders:
                path = _present(folder / nickname)
                if path is not None:
                    return self._checked(nickname, path, param, self.folders)
        return None

    def find(self, reference: str, param: str) -> FoundLora:
        """Return the file that a path or hub id means.

        Raises NotFound for one that is not there, RequestError for one that may not be used or is no LoRA.
        """
        if not reference or len(reference) > MAX_REFERENCE or not reference.isprintable():
            raise RequestError(
                f"{param}: a path or hub id of 1 to {MAX_REFERENCE} printable characters is needed.", param=param
            )
        if ".." in Path(reference).parts:
            raise RequestError(f"{param} '{reference}': '..' is not allowed in a path.", param=param)
        is_absolute = reference.startswith(("/", "~"))
        found = None if is_absolute else self.named(reference, param)
        if found is None and (is_absolute or self.allow_local):
            found = self._local(reference, param)
        hub = HUB_REFERENCE.fullmatch(reference)
        if found is None and hub is not None:
            found = self._from_hub(reference, hub, param)
        if found is None:
            where = "no such file" if self.allow_local else "no such file in a folder of --lora-dir"
            raise NotFound(
                f"{param} '{reference}': {where}, and not a hub id (owner/name).", param=param, code="lora_not_found"
            )
        return found

    def _local(self, reference: str, param: str) -> FoundLora | None:
        """A path of the machine. Where only the folders are allowed, nothing is told of what lies outside them."""
        path = Path(reference).expanduser() if self.allow_local else Path(reference)
        if not self.allow_local and not _lies_in(Path(os.path.abspath(path)), self.folders):
            raise RequestError(
                f"{param} '{reference}': only files in a folder of --lora-dir and hub ids may be named "
                "(--allow-local-paths permits others).",
                param=param,
                code="path_not_allowed",
            )
        present = _present(path)
        if present is None:
            return None
        return self._checked(reference, present, param, None if self.allow_local else self.folders)

    def _from_hub(self, reference: str, hub: re.Match[str], param: str) -> FoundLora:
        if not self.allow_hub:
            raise RequestError(
                f"{param} '{reference}': no such file, and no LoRAs are taken from the hub (--no-lora-hub).",
                param=param,
                code="path_not_allowed",
            )

        def choose(names: Sequence[str]) -> str:
            return _choose(reference, names, param)

        path, cache = fetch(hub, choose, max_bytes=self.max_bytes, cache=self.hub_cache, param=param)
        self._check(path, reference, param, (cache,))
        # Not the blob behind it: what lies beside the file by name (adapter_config.json) counts.
        return FoundLora(given=reference, path=str(path))

    def _checked(self, given: str, path: Path, param: str, roots: Sequence[Path] | None) -> FoundLora:
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(SUFFIX))
            path = path / _choose(given, names, param)
        return FoundLora(given=given, path=str(self._check(path, given, param, roots)))

    def _check(self, path: Path, shown: str, param: str, roots: Sequence[Path] | None) -> Path:
        """Hold a file to the format and, with `roots`, to lie in one of them. Returns its real path."""
        with open_lora(path, shown=shown, param=param) as file:
            # Looked up after opening: what was opened is what lies there, whatever links are changed meanwhile.
            real = path.resolve()
            is_same = os.path.samestat(os.fstat(file.fileno()), real.stat())
            if roots is not None and not (is_same and _lies_in(real, roots)):
                raise RequestError(
                    f"{param} '{shown}': the link leads out of the folders of --lora-dir.",
                    param=param,
                    code="path_not_allowed",
                )
            read_header(file, shown=shown, max_bytes=self.max_bytes, param=param)
        return real


def _choose(given: str, names: Sequence[str], param: str) -> str:
    """Return the file of a folder that holds the weights. Raises RequestError, naming them, where several may."""
    for usual in USUAL_NAMES:
        if usual in names:
            return usual
    weights = [name for name in names if not any(word in name for word in _NOT_WEIGHTS)]
    if not weights:
        raise NotFound(f"{param} '{given}': holds no {SUFFIX} file.", param=param, code="lora_not_found")
    if len(weights) > 1:
        listed = ", ".join(weights[:12]) + (", ..." if len(weights) > 12 else "")
        raise RequestError(
            f"{param} '{given}': holds several files; name one, such as '{given}/{weights[0]}'. There are: {listed}.",
            param=param,
            code="ambiguous_lora",
        )
    return weights[0]


def _present(path: Path) -> Path | None:
    """The path, or with the suffix, if there is such a thing."""
    for candidate in (path, path.with_name(path.name + SUFFIX)):
        try:
            if candidate.exists():
                return candidate
        except OSError:  # a name that is too long for the file system
            return None
    return None


def _is_within_a_folder(nickname: str) -> bool:
    parts = Path(nickname).parts
    return bool(parts) and nickname.isprintable() and not nickname.startswith(("/", "~")) and ".." not in parts


def _lies_in(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _names_in(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        folders[:] = sorted(folders) if len(here.parts) < MAX_DEPTH else []
        weights = sorted(name for name in files if name.endswith(SUFFIX))
        if here.parts and any(usual in weights for usual in USUAL_NAMES):
            yield here.as_posix()
            continue
        for name in weights:
            if _lies_in((Path(place) / name).resolve(), (folder,)):
                yield (here / name.removesuffix(SUFFIX)).as_posix()
