"""Weights read straight to a GPU: those that `from_pretrained` and a move give, bit for bit."""

import json
import logging

import pytest
import torch
from diffusers import DiffusionPipeline

from families import FAMILIES
from photogram.worker.networks import read_networks
from worker.drawing import Studio

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GPU = torch.device("cuda", 0)


def tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_bit_for_bit_and_is_all_on_the_gpu(name, family_folder):
    folder = family_folder(name)
    precisions = {"default": torch.bfloat16, "vae": torch.float32}
    expected = DiffusionPipeline.from_pretrained(folder, dtype=precisions).to(GPU).components
    index = json.loads((folder / "model_index.json").read_text())
    with torch.inference_mode():
        found = read_networks(folder, index, precisions, GPU, wanted=lambda name: True)
    assert found.keys() == {part for part, network in expected.items() if isinstance(network, torch.nn.Module)}
    for component, network in found.items():
        theirs = tensors(expected[component])
        assert tensors(network).keys() == theirs.keys()
        for path, tensor in tensors(network).items():
            assert (tensor.device, tensor.dtype) == (GPU, theirs[path].dtype), f"{component}.{path}"
            assert torch.equal(tensor, theirs[path]), f"{component}.{path}"


def test_large_tensors_come_in_whole_from_many_threads_at_once(tmp_path, family_folder, monkeypatch):
    monkeypatch.setattr("photogram.worker.tensor_files.PIECE_BYTES", 4096)
    test_every_family_is_read_bit_for_bit_and_is_all_on_the_gpu("flux-1", family_folder)


def test_what_is_offloaded_is_not_read_to_the_gpu(family_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="photogram"):
        Studio(family_folder("flux-1"), tmp_path, text_encoder_cpu_offload=True)
    (line,) = (message for message in caplog.messages if "straight to" in message)
    assert "transformer, vae" in line
    assert "text_encoder" not in line
