"""LoRAs on weights that come to the device and go: merged wherever they are, and the base's bits again without them.

The device is stood in for by the CPU, where weights that are away have no elements.
"""

from contextlib import nullcontext

import msgspec
import pytest
import torch

from photogram.core.config import Placement
from photogram.worker.placement import offload_to
from photogram.worker.residency import HostWeights, Visitors

from ..drawing import Studio, relative_error
from ..test_families_served import requests_of
from .test_weights import set_loras, uses_for

CPU = torch.device("cpu")


def weights_of(studio: Studio, name: str) -> dict[str, torch.Tensor]:
    """Copies of one module's weights, read where they are."""
    module, home = studio.served.modules[name].module, studio.served.modules[name].loras.weights.home
    with nullcontext() if home is None else home.changing(()):
        return {key: tensor.clone() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("flag", ["dit_cpu_offload", "dit_layerwise_offload"])
def test_jobs_with_and_without_loras_alternate_on_an_offloaded_denoiser(flag, family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path, max_batch_size=1)
    use, other = (msgspec.structs.replace(use, strength=1.5) for use in uses_for(studio, tmp_path, 2))
    requests = [
        msgspec.structs.replace(request, job_id=f"{request.job_id}-{index}", loras=loras)
        for index, (request, loras) in enumerate(zip(requests_of("flux-1"), [(), (use,), (other, use)], strict=True))
    ]
    expected = studio.draw(requests)
    set_loras(studio)
    base = weights_of(studio, "transformer")
    # Beside an offloaded VAE the denoiser leaves at the end of every job, with what was merged into it.
    parked = ("transformer", "vae") if flag == "dit_cpu_offload" else ("transformer",)
    modules = {name: studio.served.modules[name] for name in parked}
    with torch.inference_mode():
        offload_to(Visitors(), modules, Placement(**{flag: True}, vae_cpu_offload="vae" in parked), CPU)
    for together in (requests, requests[::-1], requests[1:2], requests[:1], requests):
        drawn = studio.draw(together)
        for request in together:
            assert drawn[request.job_id].failure is None
            assert relative_error(drawn[request.job_id].latents, expected[request.job_id].latents) < 1e-4
    set_loras(studio)
    restored = weights_of(studio, "transformer")
    assert restored.keys() == base.keys()
    assert all(torch.equal(restored[key], base[key]) for key in base)


@torch.inference_mode()
def test_what_is_changed_on_the_device_comes_back_after_leaving():
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    weights = HostWeights([layer], CPU, pin=False)
    flat = torch.empty(weights.num_bytes, dtype=torch.uint8)
    weights.copy_to(flat)
    weights.arrive(flat)
    with weights.changing([layer.weight]):
        layer.weight.data.fill_(3.0)
    weights.leave()
    again = torch.empty(weights.num_bytes, dtype=torch.uint8)
    weights.copy_to(again)
    weights.arrive(again)
    assert (layer.weight == 3.0).all()


@torch.inference_mode()
def test_what_is_changed_while_away_is_what_comes_in():
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    before = layer.bias.data.clone()
    weights = HostWeights([layer], CPU, pin=False)
    with weights.changing([layer.weight]):
        layer.weight.data.fill_(5.0)
    assert layer.weight.numel() == 0
    flat = torch.empty(weights.num_bytes, dtype=torch.uint8)
    weights.copy_to(flat)
    weights.arrive(flat)
    assert (layer.weight == 5.0).all()
    assert (layer.bias == before).all()
