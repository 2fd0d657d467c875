"""Calls replayed as graphs: which ones, and that they give what the call itself gives. A recorder that runs the call
again at its fixed tensors stands in for the device's."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.worker.tuning.graphs import LAUNCH_BOUND_SHARE, LONGEST_S, MAX_GRAPHS, Graphs

from .drawing import Studio, draw_alone
from .test_families_served import requests_of

CPU = torch.device("cpu")
GB = 10**9


@dataclass
class FixedPlaces:
    """Records as a device does: a replay reads its inputs and writes its result where they were at the recording."""

    launched_s: float = 0.009
    total_s: float = 0.010
    bytes_each: int = 0
    error: Exception | None = None
    held_bytes: int = 0
    num_recorded: int = 0
    num_replayed: int = 0
    num_measured: int = 0

    def measured(self, run):
        self.num_measured += 1
        return run(), self.launched_s, self.total_s

    def record(self, run):
        if self.error is not None:
            raise self.error
        fixed = run()
        self.num_recorded += 1
        self.held_bytes += self.bytes_each

        def replay():
            self.num_replayed += 1
            for own, new in zip(fixed, run(), strict=True):
                own.copy_(new)
            return fixed

        return replay

    def forget(self):
        self.held_bytes = 0


def affine(hidden, *, scale=2.0, extra=None):
    shift = 0 if extra is None else extra["shift"][0]
    return (hidden * scale + shift, hidden.sum())


@pytest.fixture
def recorder():
    return FixedPlaces()


@pytest.fixture
def graphs(recorder):
    return Graphs(recorder, CPU, GB)


def run(graphs, hidden, **kwargs):
    return graphs.run("network", affine, (hidden,), kwargs)


def test_a_call_is_recorded_at_its_second_time_and_replayed_from_the_third(graphs, recorder):
    for times, replayed in ((1, 0), (2, 0), (3, 1), (4, 2)):
        hidden = torch.randn(2, 3)
        shift = torch.randn(3)
        result = run(graphs, hidden, extra={"shift": [shift]})
        torch.testing.assert_close(result, affine(hidden, extra={"shift": [shift]}), rtol=0, atol=0)
        assert recorder.num_recorded == (times > 1)
        assert recorder.num_replayed == replayed


def test_a_result_stays_what_it_was_when_the_graph_is_replayed(graphs):
    for _ in range(2):
        run(graphs, torch.zeros(2, 3))
    first = run(graphs, torch.ones(2, 3))
    second = run(graphs, torch.full((2, 3), 5.0))
    assert (first[0] == 2).all()
    assert (second[0] == 10).all()


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": torch.ones(3, 3)},
        {"hidden": torch.ones(2, 3, dtype=torch.float64)},
        {"hidden": torch.ones(3, 2).T},
        {"scale": 3.0},
        {"scale": True},
        {"extra": {"shift": [torch.ones(3)]}},
    ],
)
def test_a_call_of_another_shape_or_value_is_not_replayed(graphs, recorder, other):
    for _ in range(3):
        run(graphs, torch.ones(2, 3), scale=1.0)
    assert recorder.num_replayed == 1
    arguments = {"hidden": torch.ones(2, 3), "scale": 1.0} | other
    expected = affine(**arguments)
    torch.testing.assert_close(run(graphs, **arguments), expected)
    assert recorder.num_replayed == 1


def test_networks_of_equal_arguments_have_graphs_of_their_own(graphs):
    def twice(hidden):
        return (hidden * 2,)

    def thrice(hidden):
        return (hidden * 3,)

    hidden = torch.ones(2)
    for _ in range(3):
        doubled = graphs.run("one", twice, (hidden,), {})
        tripled = graphs.run("two", thrice, (hidden,), {})
    assert (doubled[0] == 2).all()
    assert (tripled[0] == 3).all()


@pytest.mark.parametrize(
    ("launched_s", "total_s"),
    [(LAUNCH_BOUND_SHARE * 0.09, 0.1), (LONGEST_S * 1.1, LONGEST_S * 1.1)],
)
def test_calls_that_are_bound_by_the_device_are_measured_once_and_left_alone(graphs, recorder, launched_s, total_s):
    recorder.launched_s, recorder.total_s = launched_s, total_s
    for _ in range(4):
        run(graphs, torch.ones(2, 3))
    assert (recorder.num_measured, recorder.num_recorded) == (1, 0)


@pytest.mark.parametrize("error", [RuntimeError("capture"), torch.OutOfMemoryError("no memory left")])
def test_a_call_that_cannot_be_recorded_goes_on_without(graphs, recorder, error):
    recorder.error = error
    for _ in range(4):
        result = run(graphs, torch.ones(2, 3))
        assert (result[0] == 2).all()
    assert recorder.num_measured == 1


def test_unknown_objects_and_tensors_elsewhere_are_never_recorded(graphs, recorder):
    class Options:
        shift = 1.0

    for _ in range(3):
        graphs.run("network", lambda hidden, options: (hidden + options.shift,), (torch.ones(2), Options()), {})
        graphs.run("network", lambda hidden: hidden, (torch.ones(2, device="meta"),), {})
    assert (recorder.num_measured, recorder.num_recorded) == (0, 0)


def test_memory_and_number_of_graphs_are_bounded(recorder):
    recorder.bytes_each = GB
    graphs = Graphs(recorder, CPU, 3 * GB)
    for size in range(1, 9):
        for _ in range(3):
            assert run(graphs, torch.ones(size))[0].shape == (size,)
    assert graphs.num_graphs == 3
    graphs.forget()
    assert (graphs.num_graphs, recorder.held_bytes) == (0, 0)
    recorder.bytes_each = 0
    for size in range(1, MAX_GRAPHS + 5):
        for _ in range(2):
            run(graphs, torch.ones(size))
    assert graphs.num_graphs == MAX_GRAPHS


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "flux-2-klein", "wan-2.1", "qwen-image"])
def test_jobs_drawn_from_graphs_have_the_bits_of_the_pipeline_alone(name, family_folder, tmp_path):
    recorder = FixedPlaces()
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1)
    graphs = Graphs(recorder, CPU, GB)
    for module in studio.served.modules.values():
        if module.is_denoiser:
            module.graphs = graphs
    drawn = studio.draw(requests)
    assert recorder.num_replayed > 0
    for request in requests:
        assert drawn[request.job_id].failure is None
        assert (drawn[request.job_id].latents == draw_alone(plain, request).latents).all()
