"""What is switched on by itself, where, and what is said of it."""

import diffusers
import pytest
import torch

from photogram.core.config import ServeConfig
from photogram.core.worker_config import Tuning
from photogram.models.families import FASTER_WITH
from photogram.worker.tuning import choice
from photogram.worker.tuning.choice import settled

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPEN = Tuning(compile=None, fused_kernels=None, cuda_graphs=None)
GB = 10**9

UNet = type("UNet2DConditionModel", (torch.nn.Linear,), {})
Unknown = type("Transformer", (torch.nn.Linear,), {})


@pytest.fixture(autouse=True)
def _a_large_card(monkeypatch):
    monkeypatch.setattr(choice, "free_bytes", lambda device: 60 * GB)


def switches(tuning: Tuning) -> dict[str, bool]:
    return {name: getattr(tuning, name) for name in ("compile", "fused_kernels", "cuda_graphs")}


def settle(wanted=OPEN, *denoisers, device=GPU, obstacle=None):
    named = {f"denoiser_{i}": denoiser for i, denoiser in enumerate(denoisers or (UNet(1, 1),))}
    return settled(wanted, named, device, obstacle=obstacle)


def test_what_was_measured_to_be_faster_is_chosen_on_a_gpu_and_its_figure_said():
    tuning, lines = settle()
    assert switches(tuning) == {"compile": False, "fused_kernels": False, "cuda_graphs": True}
    assert lines == (f"--cuda-graphs by itself: {FASTER_WITH['UNet2DConditionModel']['cuda_graphs']}",)


def test_nothing_is_chosen_on_a_cpu_for_an_unknown_model_or_for_one_of_two_denoisers():
    nothing = {"compile": False, "fused_kernels": False, "cuda_graphs": False}
    for arguments in ({"device": CPU}, {"denoisers": (Unknown(1, 1),)}, {"denoisers": (UNet(1, 1), Unknown(1, 1))}):
        tuning, lines = settle(OPEN, *arguments.pop("denoisers", ()), **arguments)
        assert (switches(tuning), lines) == (nothing, ())


@pytest.mark.parametrize("obstacle", ["several devices", "--step-cache first-block"])
def test_an_obstacle_keeps_what_would_be_chosen_off_and_the_log_says_so(obstacle, caplog):
    caplog.set_level("INFO")
    tuning, lines = settle(obstacle=obstacle)
    assert not tuning.cuda_graphs
    assert lines == ()
    assert f"--cuda-graphs is not chosen: it does not go together with {obstacle}" in caplog.text


def test_graphs_are_not_chosen_where_they_would_take_much_of_what_the_weights_leave(monkeypatch):
    monkeypatch.setattr(choice, "free_bytes", lambda device: 15 * GB)
    assert not settle()[0].cuda_graphs
    assert settle(Tuning(compile=None, fused_kernels=None, cuda_graphs=None, cuda_graph_memory_bytes=3 * GB))[
        0
    ].cuda_graphs


def test_what_was_asked_for_stays_as_it_was():
    on, lines = settle(Tuning(compile=True, fused_kernels=True, cuda_graphs=False), obstacle="several devices")
    assert switches(on) == {"compile": True, "fused_kernels": True, "cuda_graphs": False}
    assert lines == ()


def test_the_flags_have_three_states(tmp_path):
    def tuning(**settings):
        return switches(ServeConfig(**settings).worker(tmp_path).tuning)

    assert tuning() == {"compile": None, "fused_kernels": None, "cuda_graphs": None}
    assert tuning(compile=False, cuda_graphs=True) == {"compile": False, "fused_kernels": None, "cuda_graphs": True}
    assert ServeConfig(step_cache="first-block").cuda_graphs is None


def test_the_table_names_denoisers_that_exist_and_settings_that_exist():

    for name, reasons in FASTER_WITH.items():
        assert issubclass(getattr(diffusers, name), torch.nn.Module)
        assert set(reasons) <= set(Tuning.__struct_fields__)
