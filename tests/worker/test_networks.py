"""Networks whose weights are read straight to a device are those that `from_pretrained` gives, bit for bit."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from families import FAMILIES
from families.quiet import quiet
from families.reference import arguments, difference, run_once
from photogram.core.config import ServeConfig
from photogram.worker.loading import load_for_follower
from photogram.worker.networks import read_networks, tables_of

CPU = torch.device("cpu")
MIXED = {"default": torch.bfloat16, "vae": torch.float32}


def direct(folder: Path, precisions=MIXED, **options):
    index = json.loads((folder / "model_index.json").read_text())
    with torch.inference_mode():
        return read_networks(folder, index, precisions, CPU, **({"wanted": lambda name: True} | options))


def by_the_libraries(folder: Path, precisions=MIXED) -> dict[str, torch.nn.Module]:
    with quiet():
        loaded = DiffusionPipeline.from_pretrained(folder, dtype=precisions)
    return {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}


def assert_equal(found: torch.nn.Module, expected: torch.nn.Module, where: str) -> None:
    assert type(found) is type(expected)
    assert not found.training
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)(remove_duplicate=False)) for one in (found, expected))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name].dtype, ours[name].stride()) == (tensor.dtype, tensor.stride()), f"{where}.{name}"
            assert torch.equal(ours[name], tensor), f"{where}.{name}"
            assert ours[name].requires_grad == tensor.requires_grad
    tied = [len({id(parameter) for parameter in one.parameters()}) for one in (found, expected)]
    assert tied[0] == tied[1], "what is tied in one is not in the other"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_bit_for_bit(name, family_folder):
    folder = family_folder(name)
    expected = by_the_libraries(folder)
    found = direct(folder)
    assert found.keys() == expected.keys(), "one went another way"
    for component, network in expected.items():
        assert_equal(found[component], network, component)
        if "generation_config" in vars(network):
            assert found[component].generation_config.to_dict() == network.generation_config.to_dict()


@pytest.mark.parametrize("name", ["stable-diffusion-3", "wan-2.1"])
def test_modules_that_the_libraries_keep_in_fp32_stay_so(name, family_folder):
    precisions = {"default": torch.float16}
    expected = by_the_libraries(family_folder(name), precisions)
    kinds = {parameter.dtype for network in expected.values() for parameter in network.parameters()}
    assert kinds == {torch.float16, torch.float32}, "nothing is kept in this family"
    found = direct(family_folder(name), precisions)
    for component, network in expected.items():
        assert_equal(found[component], network, component)


@pytest.mark.parametrize("name", ["qwen-image", "flux-2-klein", "ltx-2"])
def test_tables_that_are_in_no_file_are_those_that_the_library_computes_on_a_cpu(name, family_folder):
    networks = by_the_libraries(family_folder(name))
    compared = 0
    for network in networks.values():
        if isinstance(network, PreTrainedModel):
            buffers = dict(network.named_buffers())
            for path, table in tables_of(network, network.config, torch.bfloat16).items():
                assert table.device == CPU
                assert torch.equal(table, buffers[path]), path
                compared += 1
    assert compared


def test_a_pipeline_of_networks_read_directly_draws_the_same(family_folder):
    folder = family_folder("flux-1")
    networks = direct(folder, {"default": torch.float32})
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **networks)
    assert all(pipe.components[name] is network for name, network in networks.items())
    call = arguments(FAMILIES["flux-1"], "a red circle")
    drawn = run_once(pipe, seed=1, output_type="latent", **call)
    plain = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    # Not bit for bit: other addresses are aligned otherwise, and sums take another order.
    assert difference(drawn, run_once(plain, seed=1, output_type="latent", **call)) < 1e-5


def test_a_follower_loads_the_denoiser_and_where_it_is_split_the_vae_and_never_a_text_encoder(
    family_folder, tmp_path, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text encoder is loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    config = ServeConfig(model_path=str(family_folder("flux-1")), num_gpus=2).worker(tmp_path)
    found, vae = load_for_follower(config, CPU)
    assert found.keys() == {"transformer"}
    assert isinstance(vae, AutoencoderKL)
    found, vae = load_for_follower(replace(config, split_vae=False), CPU)
    assert found.keys() == {"transformer"}
    assert vae is None


# --- other layouts of files, and what is left to the libraries --------------------------------------------------------


@pytest.fixture
def model(family_folder, tmp_path) -> Path:
    """A folder of Stable Diffusion XL that a test may change."""
    return Path(shutil.copytree(family_folder("stable-diffusion-xl"), tmp_path / "model"))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_weights_in_several_files_are_read(model):
    for component in ("unet", "text_encoder"):
        loaded = DiffusionPipeline.from_pretrained(model).components[component]
        shutil.rmtree(model / component)
        loaded.save_pretrained(model / component, max_shard_size="100KB")
        assert len(list((model / component).glob("*.safetensors"))) > 1
    expected = by_the_libraries(model)
    found = direct(model)
    for component in ("unet", "text_encoder"):
        assert_equal(found[component], expected[component], component)


def test_a_variant_is_read_where_it_is_asked_for(model):
    file = weights(model / "unet")
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(changed, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = direct(model, {"default": torch.float32}, wanted=lambda name: name == "unet", variant="fp16")["unet"]
    assert torch.equal(found.conv_in.weight, changed["conv_in.weight"])


def test_names_of_old_files_are_understood(model):
    file = weights(model / "vae")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for now, then in new.items():
            name = name.replace(f"mid_block.attentions.0.{now}.", f"mid_block.attentions.0.{then}.")
        old[name] = tensor
    save_file(old, file)
    assert any(".query." in name for name in old)
    assert_equal(direct(model)["vae"], by_the_libraries(model)["vae"], "vae")


def test_large_tensors_are_read_in_pieces(model, monkeypatch):
    monkeypatch.setattr("photogram.worker.tensor_files.PIECE_BYTES", 1000)
    expected = by_the_libraries(model)
    for component, network in direct(model).items():
        assert_equal(network, expected[component], component)


def test_one_component_alone_can_be_asked_for(model):
    assert direct(model, wanted=lambda name: name == "vae").keys() == {"vae"}


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(weights(folder))
    tensors.pop("conv_in.weight")
    save_file(tensors, weights(folder))


def store_fp8(folder: Path) -> None:
    tensors = load_file(weights(folder))
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, weights(folder))


def cut_short(folder: Path) -> None:
    whole = weights(folder).read_bytes()
    weights(folder).write_bytes(whole[:-100])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: reconfigure(folder, quantization_config={"quant_method": "torchao"}), "quantization_config"),
        (lambda folder: reconfigure(folder, block_out_channels=[8, 16]), "shape"),
        (lambda folder: weights(folder).rename(folder / "other.safetensors"), "there is no diffusion_pytorch_model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
        (lose_a_weight, "'conv_in.weight'"),
        (store_fp8, "F8_E4M3"),
        (cut_short, "ends within"),
    ],
)
def test_what_cannot_be_read_directly_is_left_to_the_libraries_and_the_log_says_why(change, reason, model, caplog):
    change(model / "unet")
    with caplog.at_level(logging.INFO, logger="photogram"):
        found = direct(model)
    assert found.keys() == {"text_encoder", "text_encoder_2", "vae"}
    assert [reason in message for message in caplog.messages if message.startswith("unet")] == [True], caplog.messages


def test_tensors_that_have_no_place_are_named_and_the_others_loaded(model, caplog):
    tensors = load_file(weights(model / "unet"))
    save_file(tensors | {"spare.weight": torch.zeros(1)}, weights(model / "unet"))
    assert_equal(direct(model)["unet"], by_the_libraries(model)["unet"], "unet")
    assert any("'spare.weight'" in message for message in caplog.messages)
