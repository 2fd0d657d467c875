"""Layers that share an input are one product, and still each its own layer: for LoRAs, state dicts and memory."""

import copy

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.worker.tuning.blocks.parts import FirstOfJoined, products, products_of_both
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.joining import join_layers, join_products

from .drawing import Studio, draw_alone, relative_error
from .lora.test_weights import digest, set_loras, uses_for
from .test_families_served import STACKED_TOLERANCE, requests_of

JOINED = ("wan-2.1", "flux-1", "flux-2-klein", "qwen-image", "z-image")


def fused_and_joined(network: torch.nn.Module) -> int:
    fuse(network)
    return join_products(network)


def storage_bytes(network: torch.nn.Module) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in network.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", JOINED)
def test_joined_layers_keep_their_parameters_and_take_no_more_memory(name, family_folder):
    network = DiffusionPipeline.from_pretrained(family_folder(name)).transformer
    network.load_state_dict({key: value.clone() for key, value in network.state_dict().items()}, assign=True)
    before, size = {key: value.clone() for key, value in network.state_dict().items()}, storage_bytes(network)
    assert fused_and_joined(network) > 0
    assert storage_bytes(network) == size
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert join_products(network) == 0, "joined twice"


@pytest.mark.parametrize("name", JOINED)
def test_jobs_of_joined_layers_are_drawn_right_alone_and_stacked(name, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    studio = Studio(family_folder(name), tmp_path)
    network = studio.served.modules["transformer"].module
    assert fused_and_joined(network) > 0
    drawn = studio.draw(requests)
    for request in requests:
        assert drawn[request.job_id].failure is None
        expected = draw_alone(plain, request).latents
        assert relative_error(drawn[request.job_id].latents, expected) < 10 * STACKED_TOLERANCE


def test_loras_are_merged_into_joined_products_and_leave_them_bit_for_bit(family_folder, tmp_path):
    joined, apart = (Studio(family_folder("flux-1"), tmp_path, max_batch_size=1) for _ in range(2))
    fused_and_joined(joined.served.modules["transformer"].module)
    fuse(apart.served.modules["transformer"].module)
    before = digest(joined)
    uses = uses_for(joined, tmp_path, count=1)
    request = requests_of("flux-1")[0]
    plain = joined.draw([request])[request.job_id].latents
    for deterministic in (True, False):  # merged, and beside the weights
        job = msgspec.structs.replace(request, loras=tuple(uses), deterministic=deterministic)
        result, expected = (studio.draw([job])[job.job_id] for studio in (joined, apart))
        assert result.failure is None
        assert relative_error(result.latents, plain) > 100 * STACKED_TOLERANCE, "the LoRA was not seen"
        assert relative_error(result.latents, expected.latents) < 10 * STACKED_TOLERANCE
        set_loras(joined)
        assert torch.equal(joined.draw([request])[request.job_id].latents, plain)
    assert digest(joined) == before


def test_weights_that_were_moved_apart_are_used_as_they_are_now(family_folder):
    network = DiffusionPipeline.from_pretrained(family_folder("flux-1")).transformer
    fused_and_joined(network)
    attention = network.transformer_blocks[0].attn
    assert isinstance(attention.to_q, FirstOfJoined)
    layers = (attention.to_q, attention.to_k, attention.to_v)
    x = torch.randn(1, 3, attention.to_q.in_features)
    with torch.inference_mode():
        moved = copy.deepcopy(attention)
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight.data = 2 * layer.weight.data
        for part, layer in zip(products(x, *layers), layers, strict=True):
            torch.testing.assert_close(part, torch.nn.functional.linear(x, layer.weight, layer.bias))
        layers = (moved.to_q, moved.to_k, moved.to_v)
        for part, layer in zip(products(x, *layers), layers, strict=True):
            torch.testing.assert_close(part, torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_products_of_two_streams_lie_side_by_side(samples, bias):
    streams = [torch.nn.ModuleList(torch.nn.Linear(8, 6, bias=bias) for _ in range(3)) for _ in range(2)]
    inputs = [torch.randn(samples, tokens, 8) for tokens in (3, 5)]
    expected = [[layer(x) for layer in layers] for layers, x in zip(streams, inputs, strict=True)]
    for layers in streams:
        join_layers(list(layers))
    texts, pictures, last = products_of_both(*inputs, *(list(layers) for layers in streams))
    for result, exact in zip((*texts, *pictures), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(result, exact)
    torch.testing.assert_close(last, torch.cat((expected[0][-1], expected[1][-1]), dim=1))
    assert (last.untyped_storage().data_ptr() == texts[0].untyped_storage().data_ptr()) == (samples == 1)
