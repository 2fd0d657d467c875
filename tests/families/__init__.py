"""Tiny pipelines of the real diffusers classes, made on the spot, as complete diffusers folders."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
import transformers

from .edit import EDIT_FAMILIES
from .family import Family
from .image import IMAGE_FAMILIES
from .ltx2 import LTX_2_FAMILIES
from .quiet import quiet
from .stable_diffusion import STABLE_DIFFUSION_FAMILIES
from .video import VIDEO_FAMILIES

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (*STABLE_DIFFUSION_FAMILIES, *IMAGE_FAMILIES, *VIDEO_FAMILIES, *LTX_2_FAMILIES, *EDIT_FAMILIES)
}


def folder(name: str, root: Path) -> Path:
    """The diffusers folder of family `name` under `root`, built when it is not there yet.

    The path ends in `name`. Two processes may ask for the same folder at once: each builds its own copy, and one is
    kept. A change to this package or another version of the libraries gives another folder.
    """
    wanted = root / _stamp() / name
    if wanted.is_dir():
        return wanted
    wanted.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=wanted.parent))
    try:
        with quiet():
            FAMILIES[name].build(draft)
        draft.chmod(0o755)
        os.replace(draft, wanted)
    except OSError:
        if not wanted.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return wanted


def _stamp() -> str:
    """A digest of what a folder's content follows from."""
    digest = hashlib.sha256(f"{diffusers.__version__} {transformers.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if not source.name.startswith("test_"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
