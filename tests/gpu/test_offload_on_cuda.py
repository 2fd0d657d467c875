"""Offloaded weights on a GPU: the same pictures, and only what is used is there."""

import pytest
import torch

from worker.drawing import Studio, relative_error
from worker.test_families_served import requests_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_device(module: torch.nn.Module) -> bool:
    return any(parameter.device.type == "cuda" for parameter in module.parameters())


@pytest.mark.parametrize(
    ("flag", "parked"),
    [
        ("text_encoder_cpu_offload", ("text_encoder", "text_encoder_2")),
        ("vae_cpu_offload", ("vae",)),
        ("dit_layerwise_offload", ()),
        ("text_encoder_layerwise_offload", ()),
        ("dit_cpu_offload", ()),
    ],
)
def test_offloaded_components_draw_the_same_and_are_in_host_memory_between_calls(flag, parked, family_folder, tmp_path):
    requests = requests_of("flux-1")
    resident = Studio(family_folder("flux-1"), tmp_path, max_batch_size=1, precision="fp32").draw(requests)
    studio = Studio(family_folder("flux-1"), tmp_path, max_batch_size=1, precision="fp32", **{flag: True})
    for _ in range(2):
        drawn = studio.draw(requests)
        for request in requests:
            assert drawn[request.job_id].failure is None
            assert relative_error(drawn[request.job_id].latents, resident[request.job_id].latents) < 1e-4
        studio.served.visitors.make_way_for("transformer")
        assert not any(on_device(studio.served.modules[name].module) for name in parked)


def test_layers_that_are_away_are_in_pinned_memory(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path, dit_layerwise_offload=True)
    transformer = studio.served.modules["transformer"].module
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        assert not on_device(block)
        assert all(parameter.data.is_pinned() for parameter in block.parameters())
    assert on_device(transformer.x_embedder)
