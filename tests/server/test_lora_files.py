"""Where LoRA files may come from, and every way out of there that is closed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_files import tiny_lora
from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError, NotFound, RequestError, ServiceError
from photogram.server.lora_files import LoraFinder

COMMIT = "5d1c7e4b9a0f3e2d8c6b5a4f3e2d1c0b9a8f7e6d"


def put(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_lora() if data is None else data)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    put(tmp_path / "loras/pastel.safetensors")
    put(tmp_path / "loras/styles/ink.safetensors")
    put(tmp_path / "loras/repository/pytorch_lora_weights.safetensors")
    put(tmp_path / "loras/repository/optimizer.safetensors")
    (tmp_path / "loras/notes.txt").write_text("no LoRA")
    put(tmp_path / "outside/secret.safetensors")
    return tmp_path / "loras"


@pytest.fixture
def finder(folder) -> LoraFinder:
    return LoraFinder(folders=(folder.resolve(),), allow_hub=False)


def found(finder: LoraFinder, reference: str) -> str:
    return finder.find(reference, "lora_path").path


def refused(finder: LoraFinder, reference: str, error: type[ServiceError] = RequestError) -> ServiceError:
    with pytest.raises(error) as caught:
        finder.find(reference, "lora_path")
    assert caught.value.param == "lora_path"
    return caught.value


def test_files_of_a_folder_are_found_by_path_and_by_nickname(finder, folder):
    path = str(folder / "pastel.safetensors")
    assert found(finder, "pastel.safetensors") == found(finder, "pastel") == found(finder, path) == path
    assert finder.named("pastel", "loras").path == path
    assert finder.named("styles/ink", "loras").path == str(folder / "styles/ink.safetensors")
    assert finder.named("nobody", "loras") is None


def test_names_are_read_anew_each_time(finder, folder):
    assert finder.names() == ["pastel", "repository", "styles/ink"]
    put(folder / "later.safetensors")
    assert "later" in finder.names()
    assert finder.named("later", "loras") is not None


def test_the_first_of_two_folders_wins(folder, tmp_path):
    put(tmp_path / "more/pastel.safetensors")
    more = (tmp_path / "more").resolve()
    assert LoraFinder(folders=(more, folder.resolve())).named("pastel", "loras").path.startswith(str(more))


def test_of_a_repository_the_file_with_the_usual_name_is_taken(finder, folder):
    assert found(finder, "repository").endswith("repository/pytorch_lora_weights.safetensors")
    put(folder / "peft/adapter_model.safetensors")
    assert found(finder, "peft").endswith("peft/adapter_model.safetensors")


def test_of_a_folder_with_one_file_that_file_is_taken_whatever_else_is_there(finder, folder):
    put(folder / "one/mine.safetensors")
    put(folder / "one/optimizer.safetensors")
    (folder / "one/mine.bin").write_bytes(b"\x80")
    assert found(finder, "one").endswith("one/mine.safetensors")


def test_of_several_files_none_is_guessed_and_all_are_named(finder, folder):
    put(folder / "two/a.safetensors")
    put(folder / "two/b.safetensors")
    error = refused(finder, "two")
    assert "a.safetensors, b.safetensors" in error.message
    assert "'two/a.safetensors'" in error.message
    assert found(finder, "two/b.safetensors").endswith("b.safetensors")


def test_a_folder_of_pickles_is_not_loaded(finder, folder):
    put(folder / "old/pytorch_lora_weights.bin", b"\x80\x02}.")
    assert "no .safetensors file" in refused(finder, "old", NotFound).message
    put(folder / "old/renamed.safetensors", b"\x80\x02}.")
    assert "a pickle" in refused(finder, "old").message


@pytest.mark.parametrize(
    "reference",
    ["../outside/secret.safetensors", "styles/../../outside/secret", "..", "a/..", "x\0y", "x\ny", "", "a" * 2000],
)
def test_paths_that_climb_or_cannot_be_written_are_refused(finder, reference):
    refused(finder, reference)
    if reference:
        assert finder.named(reference, "loras") is None


def test_other_places_are_closed_and_nothing_is_told_of_them(finder, tmp_path):
    there = refused(finder, str(tmp_path / "outside/secret.safetensors"))
    absent = refused(finder, str(tmp_path / "outside/absent.safetensors"))
    assert there.message.replace("secret", "absent") == absent.message
    assert there.code == "path_not_allowed"
    refused(finder, "~/secret.safetensors")
    refused(finder, "/proc/self/environ")
    assert refused(finder, "outside/deep/secret", NotFound).code == "lora_not_found"


def test_links_that_lead_out_of_the_folders_are_refused(finder, folder, tmp_path):
    (folder / "leak.safetensors").symlink_to(tmp_path / "outside/secret.safetensors")
    (folder / "door").symlink_to(tmp_path / "outside")
    for reference in ("leak", "door/secret", str(folder / "leak.safetensors")):
        assert "leads out" in refused(finder, reference).message
    assert finder.names() == ["pastel", "repository", "styles/ink"]


def test_links_within_the_folders_are_followed(finder, folder):
    (folder / "alias.safetensors").symlink_to(folder / "styles/ink.safetensors")
    assert found(finder, "alias") == str(folder / "styles/ink.safetensors")
    assert "alias" in finder.names()


def test_with_local_paths_allowed_any_file_may_be_named(folder, tmp_path, monkeypatch):
    finder = LoraFinder(folders=(folder.resolve(),), allow_local=True, allow_hub=False)
    secret = str(tmp_path / "outside/secret.safetensors")
    assert found(finder, secret) == secret
    monkeypatch.chdir(tmp_path)
    assert found(finder, "outside/secret") == secret
    monkeypatch.setenv("HOME", str(tmp_path / "outside"))
    assert found(finder, "~/secret.safetensors") == secret
    refused(finder, str(tmp_path / "outside/../outside/secret.safetensors"))


def test_pipes_and_devices_are_refused_at_once(folder):
    finder = LoraFinder(folders=(folder.resolve(),), allow_local=True)
    os.mkfifo(folder / "pipe.safetensors")
    assert "regular file" in refused(finder, "pipe").message
    assert "regular file" in refused(finder, "/dev/zero").message


def test_a_file_over_the_bound_is_refused(finder):
    small = dataclasses.replace(finder, max_bytes=100)
    assert "--max-lora-mb" in refused(small, "pastel").message


@given(reference=st.text(max_size=40))
def test_no_reference_gets_out_of_the_folder(reference, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "any"
    if not root.exists():
        put(root / "in/a.safetensors")
        put(root / "secret.safetensors")
    finder = LoraFinder(folders=((root / "in").resolve(),), allow_hub=False)
    for spelled in (reference, f"../{reference}", f"{root}/{reference}", f"a/{reference}"):
        try:
            path = found(finder, spelled)
        except ServiceError:
            continue
        assert Path(path).is_relative_to((root / "in").resolve())


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path) -> Path:
    """A hub's cache as huggingface_hub leaves it: blobs, and links to them under the commit."""
    home = tmp_path / "hub/models--acme--ink"
    for name in ("pytorch_lora_weights.safetensors", "other.safetensors"):
        blob = put(home / "blobs" / name.encode().hex())
        link = home / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("acme/ink", "pytorch_lora_weights.safetensors"),
        (f"acme/ink@{COMMIT}", "pytorch_lora_weights.safetensors"),
        ("acme/ink@main/other.safetensors", "other.safetensors"),
        ("acme/ink/other.safetensors", "other.safetensors"),
        ("https://huggingface.co/acme/ink", "pytorch_lora_weights.safetensors"),
        ("https://huggingface.co/acme/ink/resolve/main/other.safetensors?download=true", "other.safetensors"),
    ],
)
def test_hub_ids_are_found_in_the_cache_at_their_commit(hub, reference, name):
    lora = LoraFinder(hub_cache=hub).find(reference, "lora_path")
    assert lora.path == str(hub / "models--acme--ink/snapshots" / COMMIT / name)
    assert lora.given == reference


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("acme/unknown", "HF_HUB_OFFLINE"),
        ("acme/ink@v2", "HF_HUB_OFFLINE"),
        ("acme/ink/absent.safetensors", "no file 'absent.safetensors'"),
        ("https://example.com/lora.safetensors", "not a hub id"),
        ("just-a-word", "not a hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_not_found(hub, reference, reason):
    assert reason in refused(LoraFinder(hub_cache=hub), reference, NotFound).message


@pytest.mark.parametrize("reference", ["acme/ink@..", "acme/..", "../ink", "acme/ink/../../x.safetensors"])
def test_hub_ids_do_not_climb_out_of_the_cache(hub, reference):
    put(hub / "models--acme--ink/pytorch_lora_weights.safetensors")
    refused(LoraFinder(hub_cache=hub), reference, ServiceError)


def test_a_blob_that_is_no_lora_is_refused(hub):
    (hub / f"models--acme--ink/snapshots/{COMMIT}/other.safetensors").resolve().write_bytes(b"PK\x03\x04" + bytes(40))
    assert "zip archive" in refused(LoraFinder(hub_cache=hub), "acme/ink/other.safetensors").message


def test_the_hub_can_be_closed(hub):
    assert "--no-lora-hub" in refused(LoraFinder(hub_cache=hub, allow_hub=False), "acme/ink").message


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_open_local_paths_on_loopback_alone(tmp_path):
    assert LoraFinder.of(ServeConfig()).allow_local
    assert not LoraFinder.of(ServeConfig(host="0.0.0.0")).allow_local
    assert LoraFinder.of(ServeConfig(host="0.0.0.0", allow_local_paths=True)).allow_local
    with pytest.raises(ConfigError, match="--lora-dir"):
        LoraFinder.of(ServeConfig(lora_dir=(str(tmp_path / "absent"),)))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"lora_path": ("a", "b"), "lora_nickname": ("x",)}, "--lora-nickname"),
        ({"lora_nickname": ("x",)}, "--lora-nickname"),
        ({"lora_path": ("a", "b", "c"), "lora_scale": (1.0, 2.0)}, "--lora-scale"),
        ({"lora_scale": (1.0,)}, "--lora-scale"),
        ({"lora_path": ("a",), "lora_scale": (float("nan"),)}, "--lora-scale"),
        ({"lora_path": ("a",), "lora_scale": (11.0,)}, "--lora-scale"),
        ({"max_lora_mb": 0}, "--max-lora-mb"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_flag(settings, flag):
    with pytest.raises(ConfigError, match=flag):
        ServeConfig(**settings)
