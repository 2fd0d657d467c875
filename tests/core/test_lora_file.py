"""LoRA files: what is accepted is what safetensors itself can read; everything else is refused with its reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lora_files import demo_lora, framed, safetensors, tiny_lora
from photogram.core.errors import RequestError
from photogram.core.lora_file import MAX_HEADER_BYTES, LoraHeader, open_lora, read_header

CORPUS = Path(__file__).parent / "lora_corpus"
GOOD = tiny_lora()
GOOD_HEADER = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])


def header_of(path: Path, max_bytes: int = 1 << 30) -> LoraHeader:
    with open_lora(path, shown=path.name, param="lora_path") as file:
        return read_header(file, shown=path.name, max_bytes=max_bytes, param="lora_path")


def refusal(tmp_path: Path, data: bytes, **options) -> RequestError:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(RequestError) as caught:
        header_of(path, **options)
    assert (caught.value.param, caught.value.code) == ("lora_path", "invalid_lora")
    assert caught.value.message.startswith("LoRA 'x.safetensors' ")
    return caught.value


def changed(**entry: object) -> bytes:
    """The good file, its first matrix's entry changed."""
    header = dict(GOOD_HEADER)
    name = next(name for name in header if name.endswith("lora_A.weight"))
    header[name] = header[name] | entry
    return framed(json.dumps(header).encode(), GOOD[8 + int.from_bytes(GOOD[:8], "little") :])


def test_a_good_file_tells_its_rank_and_its_tensors(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(tiny_lora(rank=3))
    header = header_of(path)
    assert (header.rank, header.size_bytes, len(header.tensors)) == (3, path.stat().st_size, 3)
    assert header.metadata == {"format": "pt"}


def test_a_lora_of_the_built_in_model_is_read(tmp_path):
    header = header_of(demo_lora(tmp_path / "noise.safetensors", seed=1, rank=4))
    assert header.rank == 4
    assert len(header.tensors) > 20


@pytest.mark.parametrize(
    "keys",
    [
        ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"),
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_B.default.weight"),
        ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
        ("lora_unet_x.hada_w1_b", "lora_unet_x.hada_w1_a"),
        ("lycoris_x.lokr_w2_b", "lycoris_x.lokr_w2_a"),
    ],
)
def test_every_format_names_its_rank(tmp_path, keys):
    path = tmp_path / "x.safetensors"
    down, up = keys
    path.write_bytes(safetensors({down: np.ones((2, 8), "float32"), up: np.ones((8, 2), "float32")}))
    assert header_of(path).rank == 2


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"\x80\x02}q\x00.")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({"lora_A": [1.0] * 8}), "a pickle"),
        (zip_of("archive/data.pkl"), "zip archive"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!doctype html><html></html>", "web page"),
        (b"", "no safetensors"),
        (b"\x08\0\0\0\0\0\0\0", "no safetensors"),
        (bytes(64), "no safetensors"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + bytes(40), "header of"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}" + bytes(40), "header of"),
        (GOOD[:100], "cut off"),
        (GOOD[:-1], "cut off"),
        (GOOD + b"\0", "more bytes"),
        (framed(b"{}"), "nothing"),
        (framed(b"{\xff}"), "cannot be read"),
        (framed(b'{"a":' * 50_000), "cannot be read"),
        (framed(b'{"__metadata__": {"a": 1}}'), "cannot be read"),
        (changed(data_offsets=[8, 40]), "damaged"),
        (changed(data_offsets=[0, 16]), "damaged"),
        (changed(data_offsets=[32, 0]), "damaged"),
        (changed(data_offsets=[-32, 0]), "damaged"),
        (changed(data_offsets=[0, 2**62]), "damaged"),
        (changed(shape=[2, 5]), "damaged"),
        (changed(shape=[2**40, 2**40]), "damaged"),
        (changed(shape=[10**9, 0]), "shape"),
        (changed(shape=[-2, -4]), "shape"),
        (changed(shape=[1] * 9), "shape"),
        (changed(shape=[2.0, 4]), "cannot be read"),
        (changed(shape="24"), "cannot be read"),
        (changed(dtype="Q4_K"), "unknown type"),
        (changed(dtype="I32"), "only floating-point"),
        (safetensors({"model.weight": np.ones((2, 2), "float32")}), "no LoRA weights"),
        (safetensors({"x.lora_A.weight": np.ones((5000, 1), "float32")}), "rank 5000"),
    ],
)
def test_what_is_no_lora_is_refused_with_the_reason(tmp_path, data, reason):
    assert reason in refusal(tmp_path, data).message


def test_a_header_with_too_many_tensors_is_refused(tmp_path):
    entries = {f"{i}.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(70_000)}
    assert "70000 tensors" in refusal(tmp_path, framed(json.dumps(entries).encode())).message


def test_a_file_over_the_bound_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(40 << 30)  # sparse: 40 GB that are nowhere
    with pytest.raises(RequestError, match="--max-lora-mb"):
        header_of(path)


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(RequestError, match="not a regular file"):
            header_of(path)
    with pytest.raises(RequestError, match="cannot be read"):
        header_of(tmp_path / "absent")


def test_names_of_a_hostile_file_do_not_break_the_message(tmp_path):
    nasty = "\x1b[31m" + "ä" * 5000 + "\n"
    message = refusal(tmp_path, safetensors({nasty: np.ones(2, "float32")})).message
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 300


def check_like_safetensors(data: bytes, path: Path) -> None:
    """Either refused in our words, or readable by safetensors itself with the same shapes."""
    path.write_bytes(data)
    try:
        header = header_of(path)
    except RequestError as error:
        assert error.code == "invalid_lora"  # noqa: PT017
        return
    try:
        with safe_open(path, framework="np") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: entry.shape for name, entry in header.tensors.items()
            }
    except SafetensorError as error:
        raise AssertionError("accepted what safetensors refuses") from error


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_kept_corpus_never_surprises(path, tmp_path):
    check_like_safetensors(path.read_bytes(), tmp_path / "x.safetensors")


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 2), st.binary(min_size=1, max_size=6)), max_size=6
    ),
    cut=st.integers(0, len(GOOD)),
)
@example(edits=[], cut=0)
def test_mutated_files_never_surprise(edits, cut, tmp_path_factory):
    data = bytearray(GOOD)
    for place, kind, replacement in edits:
        if kind == 0:
            data[place : place + len(replacement)] = replacement
        elif kind == 1:
            data[place:place] = replacement
        else:
            del data[place : place + len(replacement)]
    check_like_safetensors(bytes(data[: len(data) - cut]), tmp_path_factory.getbasetemp() / "mutated.safetensors")


_SIDES = st.one_of(st.integers(0, 4), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3))
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I8", "F4", "F8_E8M0"]), st.text(max_size=4)),
        "shape": st.lists(_SIDES, max_size=4),
        "data_offsets": st.lists(st.one_of(st.integers(0, 64), st.integers(-(2**70), 2**70)), max_size=3),
    }
)
_KEYS = st.one_of(st.sampled_from(["a.lora_A.weight", "a.lora_B.weight", "__metadata__", "w"]), st.text(max_size=8))


@given(
    header=st.dictionaries(_KEYS, st.one_of(_ENTRY, st.none(), st.text(max_size=3)), max_size=4),
    data=st.binary(max_size=64),
)
def test_headers_of_any_content_never_surprise(header, data, tmp_path_factory):
    raw = framed(json.dumps(header).encode(), data)
    check_like_safetensors(raw, tmp_path_factory.getbasetemp() / "made.safetensors")
