"""From `--model-path` to a folder: built-in names, folders, hub repositories in their cache, and what is refused."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from photogram.core.errors import ConfigError
from photogram.models.checkpoint import HUB_FILES, HUB_VARIANTS, find_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub_cache(tmp_path, family_folder, monkeypatch):
    """A repository as huggingface_hub keeps it: blobs, refs, and snapshots of links."""
    repository = tmp_path / "hub" / "models--tiny-labs--tiny-flux"
    for commit, ref in ((COMMIT, "main"), (OLDER, "v1.0")):
        for source in family_folder("flux-1").rglob("*"):
            if source.is_file():
                place = repository / "snapshots" / commit / source.relative_to(family_folder("flux-1"))
                place.parent.mkdir(parents=True, exist_ok=True)
                blob = repository / "blobs" / f"{commit[:8]}-{abs(hash(source)):x}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(source, blob)
                place.symlink_to(blob)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def find(model_path, revision=None, variant=None):
    return find_checkpoint(str(model_path), revision=revision, variant=variant)


def test_hub_id_is_found_in_the_cache_at_its_commit(hub_cache, monkeypatch):
    monkeypatch.setattr("photogram.models.checkpoint.CACHE_DIR", str(hub_cache))
    found = find("tiny-labs/tiny-flux")
    assert found.name == "tiny-labs/tiny-flux"
    assert found.pipeline_class == "FluxPipeline"
    assert found.revision == COMMIT
    assert found.folder.name == COMMIT


@pytest.mark.parametrize("revision", ["v1.0", OLDER])
def test_revision_is_pinned(hub_cache, revision, monkeypatch):
    monkeypatch.setattr("photogram.models.checkpoint.CACHE_DIR", str(hub_cache))
    assert find("tiny-labs/tiny-flux", revision=revision).revision == OLDER


def test_of_a_repository_the_pipeline_is_downloaded_once():
    pipeline = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ]
    other = [
        "flux1-dev.safetensors",
        "README.md",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae_decoder/model.onnx",
    ]
    files = pipeline + other
    assert list(filter_repo_objects(files, allow_patterns=HUB_FILES, ignore_patterns=HUB_VARIANTS)) == pipeline
    assert other[2] in filter_repo_objects(files, allow_patterns=HUB_FILES)


def test_hub_repository_is_served_and_draws(hub_cache, tmp_path, monkeypatch):
    from photogram.core.request import GenerateRequest
    from worker.drawing import Studio

    monkeypatch.setattr("photogram.models.checkpoint.CACHE_DIR", str(hub_cache))
    studio = Studio("tiny-labs/tiny-flux", tmp_path, revision="v1.0")
    assert studio.card.name == "tiny-labs/tiny-flux"
    assert studio.card.revision == OLDER
    request = GenerateRequest(
        job_id="j", owner="o", task="T2I", prompt="x", width=64, height=64, num_inference_steps=2, seed=1
    )
    assert studio.draw([request])["j"].frames.shape == (1, 64, 64, 3)


def test_built_in_model_ships_inside_the_package():
    found = find("demo-image")
    assert found.pipeline_class == "Flux2KleinPipeline"
    assert found.overrides["default_width"] == 256
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    assert size < 16_000_000


def refusal(model_path, **options) -> str:
    with pytest.raises(ConfigError) as raised:
        find(model_path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("photogram.models.checkpoint.CACHE_DIR", str(tmp_path))
    assert "tiny-labs/absent" in refusal("tiny-labs/absent")


def test_what_is_no_folder_and_no_hub_id_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("a/b/c")
    assert "no such folder" in refusal("../up")


def test_folder_that_is_no_pipeline_is_refused(tmp_path):
    assert "is no diffusers pipeline" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{not json")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "cannot be read" in refusal(tmp_path)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"x")
    assert "is a file" in refusal(single)


def test_pickle_checkpoint_is_refused_without_being_opened(tmp_path, family_folder):
    folder = tmp_path / "pickled"
    shutil.copytree(family_folder("flux-1"), folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "transformer/diffusion_pytorch_model.bin" in refusal(folder)
    assert "pickle" in refusal(folder)


def test_pipeline_that_is_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline.py", "MyPipeline"]}))
    (tmp_path / "pipeline.py").write_text("raise SystemExit('ran')")
    assert "never run" in refusal(tmp_path)


def test_card_file_that_does_not_fit_is_named(tmp_path, family_folder):
    from worker.drawing import Studio

    folder = tmp_path / "model"
    shutil.copytree(family_folder("flux-1"), folder)
    (folder / "photogram.json").write_text('{"default_width": "wide"}')
    with pytest.raises(ConfigError, match=r"photogram\.json.*default_width"):
        Studio(folder, tmp_path)


@pytest.mark.parametrize("model", ["tiny-labs/absent", "/nowhere/at/all"])
def test_serve_ends_with_one_line_and_code_2(model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "photogram",
        "serve",
        "--model-path",
        model,
    ]
    command += ["--port", str(port), "--data-dir", str(tmp_path), "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(tmp_path))
    assert done.returncode == 2
    assert model in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
