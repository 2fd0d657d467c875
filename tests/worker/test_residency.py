"""Weights that are on the device for their calls only: there when used, gone otherwise, and always the same."""

import pytest
import torch
from msgspec.structs import replace

from families.reference import picture
from photogram.core.worker_config import Placement
from photogram.worker.modules import BigModule
from photogram.worker.placement import give_way, is_offloaded, offload_to
from photogram.worker.residency import HostWeights, Layerwise, Visitor, Visitors

from .drawing import Studio, relative_error
from .test_families_served import requests_of

CPU = torch.device("cpu")
ONLY_IMAGE_ENCODERS = Placement(image_encoder_cpu_offload=True)


class Network(torch.nn.Module):
    """Two of everything that weights can be: tied, in channels last, a buffer, several precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.coarse = torch.nn.Linear(8, 8).to(torch.bfloat16)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.coarse(self.second(self.first(x)).to(torch.bfloat16)).float() + self.shift
        return self.conv(x[None, None]).sum(1)[0]


def is_away(module: torch.nn.Module) -> bool:
    return all(tensor.numel() == 0 for tensor in (*module.parameters(), *module.buffers()))


@torch.inference_mode()
def test_a_visitor_computes_the_same_and_is_gone_once_another_component_is_called():
    network, x = Network().eval(), torch.randn(5, 8)
    expected = network(x)
    visitors = Visitors()
    visitor = visitors.add("text_encoder", network, CPU, pin=True, stays=False)
    call = visitors.calls_of(visitor, network.forward)
    assert is_away(network)
    brought_in: list[str] = []
    visitor.weights.copy_to = noting(visitor, brought_in)
    for _ in range(2):
        for _ in ("prompt", "negative prompt"):
            visitors.make_way_for("text_encoder")
            torch.testing.assert_close(call(x), expected, rtol=0, atol=0)
        visitors.make_way_for("transformer")
        assert is_away(network)
    assert network.first.weight is network.second.weight
    assert len(brought_in) == 2, "it came for each call of its own"


@torch.inference_mode()
def test_a_parked_weight_cannot_be_used_by_mistake():
    network = Network().eval()
    HostWeights([network], CPU, pin=False)
    with pytest.raises(RuntimeError):
        network(torch.randn(5, 8))


@torch.inference_mode()
def test_a_visitor_that_fails_leaves_too():
    network = Network().eval()
    visitors = Visitors()
    visitor = visitors.add("vae", network, CPU, pin=False, stays=False)
    with pytest.raises(RuntimeError):
        visitors.calls_of(visitor, network.forward)(torch.randn(5, 3))
    assert is_away(network)


@torch.inference_mode()
def test_a_denoiser_stays_until_another_visitor_needs_the_room():
    denoiser, encoder, x = Network().eval(), Network().eval(), torch.randn(5, 8)
    expected = denoiser(x)
    visitors = Visitors()
    staying = visitors.add("transformer", denoiser, CPU, pin=False, stays=True)
    passing = visitors.add("text_encoder", encoder, CPU, pin=False, stays=False)
    denoise, encode = visitors.calls_of(staying, denoiser.forward), visitors.calls_of(passing, encoder.forward)
    denoise(x)
    assert not is_away(denoiser)
    encode(x)
    assert is_away(denoiser)
    torch.testing.assert_close(denoise(x), expected, rtol=0, atol=0)


@torch.inference_mode()
def test_what_is_changed_on_arrival_is_gone_with_the_visitor():
    network, x = Network().eval(), torch.randn(5, 8)
    expected, weight = network(x), network.first.weight.clone()
    visitor = Visitors().add("transformer", network, CPU, pin=False, stays=True)
    visitor.on_arrival = lambda: network.first.weight.data.fill_(3.0)
    for _ in range(2):
        with visitor.present():
            assert (network.first.weight == 3.0).all()
            torch.testing.assert_close(visitor.base(network.first.weight), weight, rtol=0, atol=0)
        visitor.leave()
        assert is_away(network)
    visitor.on_arrival = None
    with visitor.present():
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0)


@torch.inference_mode()
def test_a_visitor_that_could_not_arrive_is_away_and_comes_when_it_can():
    denoiser, encoder = Network().eval(), Network().eval()
    visitors = Visitors()
    staying = visitors.add("transformer", denoiser, CPU, pin=False, stays=True)
    passing = visitors.add("text_encoder", encoder, CPU, pin=False, stays=False)

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    staying.on_arrival = fail
    denoise = visitors.calls_of(staying, denoiser.forward)
    with pytest.raises(torch.OutOfMemoryError):
        denoise(torch.randn(5, 8))
    assert is_away(denoiser)
    staying.on_arrival = None
    denoise(torch.randn(5, 8))
    with passing.present():
        assert is_away(denoiser), "one that failed to arrive counted as in use for ever"


@torch.inference_mode()
def test_no_visitor_leaves_while_its_call_runs():
    denoiser, encoder = Network().eval(), Network().eval()
    visitors = Visitors()
    staying = visitors.add("transformer", denoiser, CPU, pin=False, stays=True)
    passing = visitors.add("text_encoder", encoder, CPU, pin=False, stays=False)
    with staying.present():
        with passing.present():
            assert not is_away(denoiser)
        staying.leave()
        assert not is_away(denoiser)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
@torch.inference_mode()
def test_layers_that_come_in_one_by_one_compute_the_same_and_two_slots_hold_them_all(num_blocks):
    blocks = [Network().eval() for _ in range(num_blocks)]
    x = torch.randn(8, 8)

    def run() -> torch.Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return y

    expected = run()
    tensors = blocks[0].state_dict().values()
    layers = Layerwise(torch.nn.ModuleList(blocks), blocks, CPU, pin=False)
    assert layers.slot_bytes <= sum(tensor.numel() * tensor.element_size() + 256 for tensor in tensors)
    for _ in range(3):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
        assert all(is_away(block) for block in blocks)


@pytest.mark.parametrize(
    ("flag", "parked"),
    [
        ("text_encoder_cpu_offload", ["text_encoder", "text_encoder_2"]),
        ("vae_cpu_offload", ["vae"]),
        ("dit_cpu_offload", ["unet"]),
        ("dit_layerwise_offload", ["transformer"]),
        ("text_encoder_layerwise_offload", ["text_encoder", "text_encoder_2"]),
    ],
)
def test_offloaded_components_are_away_between_calls_and_pictures_stay_the_same(flag, parked, family_folder, tmp_path):
    name = "flux-1" if "layerwise" in flag else "stable-diffusion-xl"
    request = requests_of(name)[0]
    expected = Studio(family_folder(name), tmp_path, max_batch_size=1).draw([request])[request.job_id]
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1)
    modules = studio.served.modules
    wanted = {key: modules[key] for key in parked}
    with torch.inference_mode():
        visitors = offloaded(modules, wanted, Placement(**{flag: True}))
    brought_in: list[str] = []
    for visitor in visitors.all:
        visitor.weights.copy_to = noting(visitor, brought_in)
    for turn in ("first", "second"):
        drawn = studio.draw([request])[request.job_id]
        assert drawn.failure is None
        # Not bit for bit: other addresses are aligned otherwise, and sums take another order.
        assert relative_error(drawn.latents, expected.latents) < 1e-4
        for key in parked:
            if flag.endswith("layerwise_offload"):
                assert layers_of(modules[key].module)
                assert all(is_away(layer) for layer in layers_of(modules[key].module))
            elif key != "unet":
                visitors.make_way_for("unet")
                assert is_away(modules[key].module)
        if flag == "text_encoder_cpu_offload":
            # A prompt that was seen before does not wake the encoder.
            assert set(brought_in) == (set(parked) if turn == "first" else set())
        brought_in.clear()


def offloaded(modules: dict[str, BigModule], wanted: dict[str, BigModule], placement: Placement) -> Visitors:
    """Offload as on a GPU; on a CPU the worker itself would not."""
    visitors = offload_to(Visitors(), wanted, placement, CPU)
    give_way(modules, visitors)
    return visitors


def layers_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    return [entry for part in network.modules() if isinstance(part, torch.nn.ModuleList) for entry in part]


def test_an_offloaded_image_encoder_is_there_for_its_calls_only_and_not_for_a_picture_seen_before(
    family_folder, tmp_path
):
    folder = family_folder("wan-2.1-i2v")
    picture().save(tmp_path / "first.png")
    request = replace(requests_of("wan-2.1-i2v")[0], images=(str(tmp_path / "first.png"),))
    expected = Studio(folder, tmp_path, max_batch_size=1).draw([request])[request.job_id]
    studio = Studio(folder, tmp_path, max_batch_size=1)
    modules = studio.served.modules
    wanted = {name: module for name, module in modules.items() if is_offloaded(name, ONLY_IMAGE_ENCODERS)}
    assert set(wanted) == {"image_encoder"}
    with torch.inference_mode():
        [visitor] = offloaded(modules, wanted, ONLY_IMAGE_ENCODERS).all
    there: list[tuple[str, bool]] = []
    for name, module in modules.items():
        for method, real in module.real.items():
            module.real[method] = watching(name, real, visitor, there)
    brought_in: list[str] = []
    visitor.weights.copy_to = noting(visitor, brought_in)
    for turn in ("first", "second"):
        drawn = studio.draw([request])[request.job_id]
        assert drawn.failure is None
        assert relative_error(drawn.latents, expected.latents) < 1e-4
        assert is_away(modules["image_encoder"].module)
        assert set(brought_in) == ({"image_encoder"} if turn == "first" else set())
        brought_in.clear()
    others = [is_there for name, is_there in there if name != "image_encoder"]
    assert len(others) > 4
    assert not any(others)


def watching(name: str, real, visitor: Visitor, notes: list[tuple[str, bool]]):
    """Note before each call of a network whether the visitor is there already."""

    def watched(*args, **kwargs):
        notes.append((name, visitor.is_present))
        return real(*args, **kwargs)

    return watched


def noting(visitor: Visitor, notes: list[str]):
    copy_to = visitor.weights.copy_to

    def noted(flat: torch.Tensor) -> None:
        notes.append(visitor.name)
        copy_to(flat)

    return noted


def test_a_network_that_is_away_names_the_device_its_calls_run_on(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    modules = {name: studio.served.modules[name] for name in ("text_encoder", "vae")}
    elsewhere = torch.device("meta")
    offload_to(Visitors(), modules, Placement(text_encoder_cpu_offload=True, vae_cpu_offload=True), elsewhere)
    for module in modules.values():
        assert module.module.device == elsewhere
        assert all(parameter.device == CPU for parameter in module.module.parameters())
