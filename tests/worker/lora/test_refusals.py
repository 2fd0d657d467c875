"""Files that cannot be honoured wholly are refused, by the name of what stands in the way."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from peft import LoHaConfig, LoraConfig, get_peft_model

from photogram.core.errors import RequestError
from photogram.core.lora_file import read_header
from photogram.worker.lora import reading
from photogram.worker.lora.reading import read

from .files import PEFT, Maker, spelled
from .formats import EXAMPLES
from .test_formats import MAX_BYTES, load, merged

TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def flux(family_folder):
    return DiffusionPipeline.from_pretrained(family_folder("flux-1"))


def refusal(path, pipeline) -> str:
    with pytest.raises(RequestError) as caught:
        load(path, pipeline)
    assert caught.value.param == "lora_path"
    return caught.value.message


def good() -> dict[str, torch.Tensor]:
    return spelled(Maker(), [(f"transformer.{TO_Q}", (32, 32))], ends=PEFT, rank=4, alpha=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"transformer.{TO_Q}.lora_A.weight": torch.zeros(4, 48)}, "made for another model"),
        ({f"transformer.{TO_Q}.lora_B.weight": torch.zeros(32, 5)}, "made for another model"),
        ({f"transformer.{TO_Q}.lora_A.weight": torch.full((4, 32), float("nan"))}, "NaN or infinite"),
        ({f"transformer.{TO_Q}.lora_A.weight": torch.full((4, 32), float("inf"))}, "NaN or infinite"),
        (
            {f"transformer.{TO_Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)},
            "only floating-point ones",
        ),
        ({"transformer.blocks.7.attn9.to_q.lora_A.weight": torch.ones(4, 32)}, "transformer.blocks.7.attn9"),
        ({f"transformer.{TO_Q}.mystery": torch.ones(4)}, "mystery"),
        ({f"transformer.{TO_Q}.lora_B.bias": torch.ones(31)}, "bias"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 32)}, "'up'"),
        ({"lora_te3_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 32)}, "lora_te3"),
    ],
)
def test_what_does_not_fit_is_named(change, words, flux, tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(good() | change, path)
    assert words in refusal(path, flux)


def test_parts_that_a_converter_would_drop_are_named(flux, tmp_path):
    """diffusers leaves weights like these out and tells the log at most."""
    tensors = EXAMPLES["kohya, FLUX.1"].make(Maker())
    dropped = "lora_unet_double_blocks_0_img_attn_proj.diff_b"
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(tensors | {dropped: torch.ones(32)}, path)
    assert dropped in refusal(path, flux)
    safetensors.torch.save_file(tensors | {dropped: torch.zeros(32)}, path)
    assert load(path, flux).changes


def test_files_that_are_no_safetensors_are_refused(flux, tmp_path):
    path = tmp_path / "lora.safetensors"
    for content, words in (
        (b"", "no safetensors file"),
        (b"\x00" * 64, "no safetensors file"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"PK\x03\x04zip", "a zip archive"),
        (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
        (b"\x02" + b"\0" * 7 + b"[]", "no safetensors file"),
        (b"\x02" + b"\0" * 7 + b"{}", "holds nothing"),
    ):
        path.write_bytes(content)
        assert words in refusal(path, flux)
    safetensors.torch.save_file(good(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "is cut off" in refusal(path, flux)


def test_a_file_over_the_limit_is_refused_before_any_tensor_is_read(tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(good(), path)
    size = path.stat().st_size
    assert read(str(path), size).tensors
    with pytest.raises(RequestError, match=f"{size} bytes; at most {size - 1} are allowed"):
        read(str(path), size - 1)


def test_places_without_a_file_are_refused(flux, tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.safetensors", flux)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refusal(tmp_path / "pipe.safetensors", flux)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "not a regular file" in refusal(folder, flux)


@pytest.mark.parametrize("precise", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_ranks_alphas_and_dora_of_peft_are_honoured(precise, flux, tmp_path, family_folder):
    """peft's own folder, merged by peft, against ours: patterns of ranks and alphas come from its settings."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "proj_mlp"],
        rank_pattern={"proj_mlp": 2},
        alpha_pattern={"to_k": 1},
        init_lora_weights=False,
        **precise,
    )
    network = DiffusionPipeline.from_pretrained(family_folder("flux-1")).transformer
    wrapped = get_peft_model(network, config)
    wrapped.save_pretrained(tmp_path / "peft")
    adapter = load(tmp_path / "peft" / "adapter_model.safetensors", flux)
    with torch.inference_mode():
        ours = merged(adapter, flux, strength=1.0)
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    assert len(ours) == 10
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name.removeprefix("transformer.")], rtol=1e-5, atol=1e-5)


def test_loha_of_peft_is_honoured(flux, tmp_path, family_folder):
    network = DiffusionPipeline.from_pretrained(family_folder("flux-1")).transformer
    config = LoHaConfig(r=4, alpha=4, target_modules=["to_q"], init_weights=False)
    wrapped = get_peft_model(network, config)
    wrapped.save_pretrained(tmp_path / "peft")
    with torch.inference_mode():
        ours = merged(load(tmp_path / "peft" / "adapter_model.safetensors", flux), flux, strength=1.0)
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    assert len(ours) == 4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name.removeprefix("transformer.")], rtol=1e-5, atol=1e-5)


def test_settings_in_the_header_are_honoured(flux, tmp_path):
    """diffusers writes ranks and alphas of a file into its metadata."""
    path, plain = tmp_path / "lora.safetensors", tmp_path / "plain.safetensors"
    settings = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {}}
    safetensors.torch.save_file(good(), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    safetensors.torch.save_file(good(), plain)
    with torch.inference_mode():
        half, whole = merged(load(path, flux), flux, 1.0), merged(load(plain, flux), flux, 0.5)
    for name, value in half.items():
        torch.testing.assert_close(value, whole[name])


def test_what_was_read_stays_when_the_file_changes_later(flux, tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(good(), path)
    file = read(str(path), MAX_BYTES)
    before = {key: tensor.clone() for key, tensor in file.tensors.items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(file.tensors[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("change", ["longer", "shorter", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(change, tmp_path, monkeypatch):
    """Another writes to it when the header is checked and the first tensor is still to come."""
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(good(), path)
    whole = path.read_bytes()
    content = {"longer": whole + b"\0", "shorter": whole[:-200], "rewritten": whole}[change]

    def checked_then_changed(*arguments, **named):
        header = read_header(*arguments, **named)
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        return header

    monkeypatch.setattr(reading, "read_header", checked_then_changed)
    with pytest.raises(RequestError, match="changed while it was read"):
        read(str(path), MAX_BYTES)
    monkeypatch.undo()
    path.write_bytes(whole)
    assert read(str(path), MAX_BYTES).tensors


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def test_tensors_are_read_as_safetensors_reads_them(tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {f"of {dtype}": torch.arange(6).reshape(1, 3, 2).to(dtype) for dtype in DTYPES}
    tensors |= {"transformer.x.lora_A.weight": torch.randn(4, 5), "scalar": torch.tensor(3.5)}
    safetensors.torch.save_file(tensors, path)
    ours, theirs = read(str(path), MAX_BYTES).tensors, safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert ours[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name
