"""LoRAs on weights that come to the device and go: merged wherever they are, and the base's bits again without them.

The device is stood in for by the CPU, where weights that are away have no elements.
"""

import random
from collections.abc import Mapping

import msgspec
import pytest
import torch

from photogram.core.errors import RequestError
from photogram.core.worker_config import Placement
from photogram.worker.lora.adapter import Adapter
from photogram.worker.lora.changes import Difference, LowRank
from photogram.worker.lora.reading import Stamp
from photogram.worker.lora.sets import BASE, Entry, ModuleLoras
from photogram.worker.lora.weights import ModuleWeights
from photogram.worker.placement import offload_to
from photogram.worker.residency import HostWeights, Layerwise, Visitors

from ..drawing import Studio, relative_error
from ..test_families_served import requests_of
from .test_weights import set_loras, uses_for

CPU = torch.device("cpu")


def weights_of(studio: Studio, name: str) -> dict[str, torch.Tensor]:
    """Copies of one module's weights, read where they are."""
    module = studio.served.modules[name]
    with module.loras.weights.changing():
        return {key: tensor.clone() for key, tensor in module.module.state_dict().items()}


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
    # Beside an offloaded VAE the denoiser leaves at the end of every job, and comes as the base that it waits as.
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
def test_what_is_changed_while_away_is_what_comes_in():
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    before = layer.bias.data.clone()
    weights = HostWeights([layer], CPU, pin=False)
    with weights.changing():
        layer.weight.data.fill_(5.0)
    assert layer.weight.numel() == 0
    flat = torch.empty(weights.num_bytes, dtype=torch.uint8)
    weights.copy_to(flat)
    weights.arrive(flat)
    assert (layer.weight == 5.0).all()
    assert (layer.bias == before).all()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(12, 8)
        self.conv = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)


class Network(torch.nn.Module):
    """Three blocks, and a layer outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.out = torch.nn.Linear(8, 3)


def network() -> Network:
    torch.manual_seed(5)
    return Network().to(torch.bfloat16).requires_grad_(False)


def lora(nickname: str, network: torch.nn.Module, layers: str = "") -> Adapter:
    """Low-rank changes of every weight and plain ones of every bias of the layers whose name begins so."""
    changes = {}
    for name, parameter in network.named_parameters():
        if not name.startswith(layers):
            continue
        if parameter.dim() == 1:
            changes[name] = Difference(difference=torch.randn(parameter.shape))
        else:
            down, up = torch.randn(2, parameter[0].numel()), torch.randn(parameter.shape[0], 2)
            changes[name] = LowRank(down=down, up=up, scale=0.5)
    return Adapter(
        nickname=nickname, path=nickname, stamp=Stamp(0, 0, 0, 0), changes={"transformer": changes}, size_bytes=0
    )


def chosen(*loras: tuple[Adapter, float]) -> ModuleLoras:
    entries = (Entry(adapter=adapter, part="transformer", strength=strength) for adapter, strength in loras)
    return ModuleLoras(tuple(entries))


def bits(weights: ModuleWeights, network: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    with weights.changing():
        return {name: parameter.data.clone() for name, parameter in network.named_parameters()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one)


class Offloaded:
    """A network that comes and goes, and its weights; `leave` sends it away where it can go."""

    def __init__(self, kind: str) -> None:
        self.network = network()
        self.weights = ModuleWeights("transformer", self.network, CPU)
        self.visitor = None
        if kind == "whole":
            self.visitor = Visitors().add("transformer", self.network, CPU, pin=False, stays=True)
            self.weights.come_and_go(self.visitor)
        elif kind == "layer by layer":
            self.weights.wait_in(Layerwise(self.network, self.network.blocks, CPU, pin=False))

    def leave(self) -> None:
        if self.visitor is not None:
            self.visitor.leave()

    def bits(self) -> Mapping[str, torch.Tensor]:
        return bits(self.weights, self.network)


@pytest.mark.parametrize("kind", ["whole", "layer by layer"])
@torch.inference_mode()
def test_twenty_switches_give_the_bits_of_resident_weights_and_the_base_again(kind):
    resident, offloaded = Offloaded("resident"), Offloaded(kind)
    base = resident.bits()
    adapters = [lora(str(i), network(), layers) for i, layers in enumerate(("", "blocks", "out", "blocks.1"))]
    chance = random.Random(3)
    for _ in range(20):
        wanted = chosen(
            *((one, chance.choice((-0.6, 0.3, 1.5))) for one in chance.sample(adapters, chance.randint(0, 3)))
        )
        if chance.random() < 0.5:
            offloaded.leave()
        resident.weights.switch(wanted)
        offloaded.weights.switch(wanted)
        if chance.random() < 0.5:
            offloaded.leave()
        assert same(offloaded.bits(), resident.bits())
        assert same(offloaded.bits(), base) == (not wanted.entries)
    offloaded.weights.switch(BASE)
    assert same(offloaded.bits(), base)


@torch.inference_mode()
def test_what_waits_of_a_whole_denoiser_is_the_base_whatever_is_merged():
    offloaded = Offloaded("whole")
    base = offloaded.bits()
    for is_present in (True, False):
        if not is_present:
            offloaded.leave()
        offloaded.weights.switch(chosen((lora(str(is_present), network()), 1.0)))
        assert offloaded.visitor.is_present
        assert not same(offloaded.bits(), base)
        waiting = {name: offloaded.visitor.base(parameter) for name, parameter in offloaded.network.named_parameters()}
        assert same(waiting, base)


@torch.inference_mode()
def test_taking_a_lora_out_of_weights_that_are_away_brings_nothing_in():
    offloaded = Offloaded("whole")
    base = offloaded.bits()
    offloaded.weights.switch(chosen((lora("one", network()), 1.0)))
    offloaded.leave()
    offloaded.weights.switch(BASE)
    assert not offloaded.visitor.is_present
    assert same(offloaded.bits(), base)


@pytest.mark.parametrize("kind", ["resident", "whole", "layer by layer"])
@pytest.mark.parametrize("is_present", [True, False])
@pytest.mark.parametrize("reason", ["out of range", "out of memory"])
@torch.inference_mode()
def test_a_switch_that_fails_leaves_what_was_merged_wherever_the_weights_are(kind, is_present, reason, monkeypatch):
    offloaded, one, other = Offloaded(kind), lora("one", network(), "blocks"), lora("other", network())
    offloaded.weights.switch(chosen((one, 0.7)))
    merged = offloaded.bits()
    if not is_present:
        offloaded.leave()
    strength, expected = (3e38, RequestError) if reason == "out of range" else (1.0, torch.OutOfMemoryError)
    with monkeypatch.context() as patch:
        if reason == "out of memory":
            patch.setattr(Difference, "add_to", run_out_of_memory(at=4, instead_of=Difference.add_to))
        with pytest.raises(expected):
            offloaded.weights.switch(chosen((other, strength)))
    assert offloaded.weights.merged.key == chosen((one, 0.7)).key
    assert same(offloaded.bits(), merged)
    offloaded.leave()
    assert same(offloaded.bits(), merged)


def run_out_of_memory(*, at: int, instead_of):
    num_calls = 0

    def add_to(self, weight, strength):
        nonlocal num_calls
        num_calls += 1
        if num_calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        instead_of(self, weight, strength)

    return add_to


@torch.inference_mode()
def test_weights_that_could_not_be_merged_on_arrival_are_merged_on_the_next(monkeypatch):
    offloaded = Offloaded("whole")
    offloaded.weights.switch(chosen((lora("one", network()), 0.7)))
    merged = offloaded.bits()
    offloaded.leave()
    with monkeypatch.context() as patch:
        patch.setattr(Difference, "add_to", run_out_of_memory(at=2, instead_of=Difference.add_to))
        with pytest.raises(torch.OutOfMemoryError), offloaded.visitor.present():
            pass
    assert not offloaded.visitor.is_present
    assert same(offloaded.bits(), merged)


@pytest.mark.parametrize("kind", ["resident", "whole", "layer by layer"])
@torch.inference_mode()
def test_the_guessed_time_of_a_switch_counts_the_weights_it_touches_wherever_they_are(kind):
    offloaded, everything = Offloaded(kind), chosen((lora("all", network()), 1.0))
    little = chosen((lora("little", network(), "out"), 1.0))
    for _ in range(3):
        guesses = {wanted.key: offloaded.weights.switch_s(wanted) for wanted in (everything, little)}
        assert 0 < guesses[little.key] <= guesses[everything.key]
        offloaded.weights.switch(everything)
        offloaded.leave()
        offloaded.weights.switch(BASE)
