"""What makes networks fast changes nothing of what they give, and reaches every layer it is meant for."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoModel, DiffusionPipeline
from torch._dynamo.utils import counters

from families import FAMILIES
from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.worker.modules import is_denoiser
from photogram.worker.tuning.attention import Attention, choose_attention
from photogram.worker.tuning.compiling import compile_repeated, repeated_parts
from photogram.worker.tuning.cpu_convolutions import use_onednn
from photogram.worker.tuning.memory_format import use_channels_last
from photogram.worker.warmup import warm_up

from .drawing import Studio, draw_alone, relative_error
from .test_families_served import STACKED_TOLERANCE, requests_of

HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# --- compiling


@pytest.mark.long
def test_compiled_jobs_are_drawn_right_alone_and_stacked(family_folder, tmp_path):
    requests = requests_of("wan-2.1")
    plain = DiffusionPipeline.from_pretrained(family_folder("wan-2.1"))
    studio = Studio(family_folder("wan-2.1"), tmp_path, compile=True)
    drawn = studio.draw(requests)
    assert max(len(jobs) for jobs in studio.passes("transformer")) == 3
    assert counters["stats"]["unique_graphs"] > 0
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.image == "never"])
def test_every_family_has_parts_to_compile(name, family_folder):
    pipeline = DiffusionPipeline.from_pretrained(family_folder(name))
    for component, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module) and is_denoiser(component):
            assert repeated_parts(network)


def wan_arguments(rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    return {
        "hidden_states": torch.randn(rows, 16, 2, height, width),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": torch.randn(rows, 12, 32),
    }


@torch.inference_mode()
def test_new_sizes_and_numbers_of_jobs_are_not_compiled_again(family_folder):
    network = DiffusionPipeline.from_pretrained(family_folder("wan-2.1")).transformer
    text_width = network.config.text_dim
    eager = copy.deepcopy(network)
    compile_repeated(network, backend="aot_eager")

    def check(rows: int, height: int, width: int) -> None:
        arguments = wan_arguments(rows, height, width)
        arguments["encoder_hidden_states"] = torch.randn(rows, 12, text_width)
        torch.testing.assert_close(network(**arguments)[0], eager(**arguments)[0], atol=1e-4, rtol=1e-4)

    check(1, 8, 8)
    check(2, 8, 8)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2
    for rows, height, width in ((1, 16, 8), (1, 8, 12), (3, 8, 8), (4, 12, 16), (2, 20, 8)):
        check(rows, height, width)
    assert counters["stats"]["unique_graphs"] == compiled


@torch.inference_mode()
def test_a_compiled_block_sees_weights_that_were_changed_in_place(family_folder):
    network = DiffusionPipeline.from_pretrained(family_folder("wan-2.1")).transformer
    arguments = wan_arguments(1, 8, 8)
    arguments["encoder_hidden_states"] = torch.randn(1, 12, network.config.text_dim)
    parts = compile_repeated(network, backend="aot_eager")
    before = network(**arguments)[0]
    changed = parts[0].get_parameter("ffn.net.2.weight").data
    changed.add_(torch.randn_like(changed))
    after = network(**arguments)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy_without_compiling(network)(**arguments)[0], atol=1e-4, rtol=1e-4)


def copy_without_compiling(network: torch.nn.Module) -> torch.nn.Module:
    plain = type(network).from_config(network.config)
    plain.load_state_dict(network.state_dict())
    return plain.eval()


@pytest.mark.parametrize("conflict", [{"dit_layerwise_offload": True}, {"step_cache": "first-block"}])
def test_what_needs_blocks_to_stand_is_refused_beside_what_changes_them_at_every_call(conflict):
    with pytest.raises(ConfigError, match="--compile: not with"):
        ServeConfig(compile=True, **conflict)
    with pytest.raises(ConfigError, match="--cuda-graphs: not with"):
        ServeConfig(cuda_graphs=True, **conflict)


def test_a_model_that_cannot_be_compiled_is_refused_at_the_start(family_folder, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no such backend")

    studio = Studio(family_folder("wan-2.1"), tmp_path, compile=True)
    compile_repeated(studio.served.modules["transformer"].module, backend=broken)
    with torch.inference_mode(), pytest.raises(ConfigError, match="--compile: this model does not run with it"):
        warm_up(studio.worker)


def test_convolutions_that_another_start_may_choose_otherwise_are_not_for_equal_bytes():
    with pytest.raises(ConfigError, match="--search-convolutions: not with --deterministic"):
        ServeConfig(search_convolutions=True, deterministic=True)


# --- attention


@pytest.mark.parametrize(("capability", "chosen"), [(HOPPER, "cudnn"), (AMPERE, "torch")])
def test_the_card_decides_which_attention_comes_first(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention("auto", torch.device("cuda")).name == chosen


def test_on_a_cpu_there_is_nothing_to_choose():
    assert choose_attention("flash", torch.device("cpu")).name == "torch"


def test_attention_that_is_not_installed_is_refused():
    with pytest.raises(ConfigError, match="--attention-backend fa3"):
        choose_attention("fa3", torch.device("cuda"))


def test_calls_run_under_the_chosen_order_and_leave_the_old_one_behind():
    query = torch.randn(1, 2, 8, 16)
    before = torch._C._get_sdp_priority_order()
    for name in ("cudnn", "flash", "efficient", "math"):
        with Attention(name).around_calls():
            assert torch.backends.cuda.math_sdp_enabled(), "no kernel would be left for what the others cannot do"
            assert torch.backends.cuda.flash_sdp_enabled() == (name != "math")
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.flash_sdp_enabled()


# --- memory format


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [("stable-diffusion-xl", AutoencoderKL, (1, 4, 8, 8)), ("wan-2.1", AutoencoderKLWan, (1, 16, 2, 8, 8))],
)
@torch.inference_mode()
def test_channels_last_changes_the_order_of_weights_and_no_value(name, kind, shape, family_folder):
    plain = kind.from_pretrained(family_folder(name) / "vae").eval()
    ordered = copy.deepcopy(plain)
    convolutions = [part for part in ordered.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d)]
    assert use_channels_last(ordered) == len(convolutions)
    for part in convolutions:
        last = torch.channels_last if part.weight.dim() == 4 else torch.channels_last_3d
        assert part.weight.is_contiguous(memory_format=last)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ordered.decode(latents, return_dict=False)[0], plain.decode(latents, return_dict=False)[0], atol=1e-5, rtol=1e-4
    )


# --- convolutions on a CPU


@pytest.mark.parametrize("name", ["wan-2.1", "wan-2.2-ti2v", "hunyuan-video-1.5", "ltx"])
@torch.inference_mode()
def test_onednn_decodes_what_torchs_own_convolutions_decode(name, family_folder):
    plain = AutoModel.from_pretrained(str(family_folder(name) / "vae")).eval()
    tuned = copy.deepcopy(plain)
    assert use_onednn(tuned) == sum(isinstance(part, torch.nn.Conv3d) for part in tuned.modules())
    channels = plain.config.get("z_dim") or plain.config.latent_channels
    latents = torch.randn(1, channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = plain.decode(latents, return_dict=False)[0]
    with torch.profiler.profile() as watched:
        decoded = tuned.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)
    kernels = {event.key for event in watched.key_averages()}
    assert "aten::mkldnn_convolution" in kernels
    assert "aten::slow_conv3d_forward" not in kernels


@torch.inference_mode()
def test_half_precision_convolutions_stay_torchs_choice():
    convolution = torch.nn.Conv3d(2, 3, 3, padding=1).bfloat16()
    x = torch.randn(1, 2, 3, 4, 4).bfloat16()
    expected = convolution(x)
    assert use_onednn(convolution) == 1
    assert torch.equal(convolution(x), expected)
