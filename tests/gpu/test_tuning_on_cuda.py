"""What makes networks fast, on a GPU: the same maths, and the same bits where the same kernels run."""

import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.core.errors import ConfigError
from photogram.worker.tuning.attention import choose_attention
from photogram.worker.tuning.graphs import CudaRecorder, Graphs
from photogram.worker.warmup import warm_up
from worker.drawing import Studio, draw_alone, relative_error
from worker.test_families_served import STACKED_TOLERANCE, requests_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FAMILIES = ("stable-diffusion-xl", "flux-1", "flux-2-klein", "qwen-image", "z-image", "wan-2.1")
GB = 10**9


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_jobs_drawn_from_cuda_graphs_have_the_bits_of_those_drawn_without(name, family_folder, tmp_path):
    requests = requests_of(name)
    without = Studio(family_folder(name), tmp_path, max_batch_size=1).draw(requests)
    studio = Studio(family_folder(name), tmp_path, max_batch_size=1, cuda_graphs=True)
    studio.draw(requests)
    again = studio.draw(requests)
    assert studio.served.graphs.num_graphs > 0
    for request in requests:
        assert again[request.job_id].failure is None
        assert (again[request.job_id].latents == without[request.job_id].latents).all()


def test_a_graph_reads_weights_as_they_are_now_and_its_inputs_at_every_replay():
    device = torch.device("cuda:0")
    layer = torch.nn.Sequential(*(torch.nn.Linear(8, 8, device=device) for _ in range(20)))
    graphs = Graphs(CudaRecorder(device), device, GB)
    with torch.inference_mode():
        for turn in range(5):
            layer[0].weight.data.copy_(torch.full((8, 8), float(turn)))
            hidden = torch.full((4, 8), turn + 1.0, device=device)
            torch.testing.assert_close(graphs.run("layer", layer, (hidden,), {}), layer(hidden))
    assert graphs.num_graphs == 1


def test_a_call_that_waits_for_the_device_cannot_be_recorded_and_goes_on_without():
    device = torch.device("cuda:0")
    graphs = Graphs(CudaRecorder(device), device, GB)

    def asks_the_device(hidden):
        for _ in range(20):
            hidden = hidden + 1
        return (hidden + hidden.sum().item(),)

    with torch.inference_mode():
        for _ in range(4):
            (result,) = graphs.run("asks", asks_the_device, (torch.ones(2, device=device),), {})
            assert (result == 63).all()
        assert graphs.num_graphs == 0
        assert float(torch.ones(2, device=device).sum()) == 2, "the device is not what it was"


def test_memory_of_graphs_is_given_back(family_folder, tmp_path):
    studio = Studio(family_folder("stable-diffusion-xl"), tmp_path, max_batch_size=1, cuda_graphs=True)
    for _ in range(2):
        studio.draw(requests_of("stable-diffusion-xl"))
    held = torch.cuda.memory_reserved()
    studio.served.graphs.forget()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    drawn = studio.draw(requests_of("stable-diffusion-xl"))
    assert all(one.failure is None for one in drawn.values())


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_jobs_stay_within_tolerance(name, graphs, family_folder, tmp_path):
    requests = requests_of(name)
    plain = DiffusionPipeline.from_pretrained(family_folder(name), dtype=torch.float32).to("cuda")
    studio = Studio(family_folder(name), tmp_path, precision="fp32", compile=True, cuda_graphs=graphs)
    with torch.inference_mode():
        warm_up(studio.worker)
    drawn = studio.draw(requests)
    for request in requests:
        assert drawn[request.job_id].failure is None
        reference = draw_alone(plain, request)
        assert relative_error(drawn[request.job_id].latents, reference.latents) < 10 * STACKED_TOLERANCE


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_every_order_of_attention_gives_the_same_in_bf16_and_runs_in_fp32(backend):
    attention = choose_attention(backend, torch.device("cuda:0"))
    query, key, value = torch.randn(3, 1, 4, 256, 64, device="cuda", dtype=torch.float32)
    reference = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        with attention.around_calls():
            result = torch.nn.functional.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype))
        torch.testing.assert_close(result.double(), reference, atol=tolerance, rtol=tolerance)


def test_attention_that_is_not_installed_is_refused():
    with pytest.raises(ConfigError, match="--attention-backend fa4"):
        choose_attention("fa4", torch.device("cuda:0"))


def test_searched_convolutions_give_the_same_within_rounding(family_folder, tmp_path):
    requests = requests_of("stable-diffusion-xl")
    plain = DiffusionPipeline.from_pretrained(family_folder("stable-diffusion-xl"), dtype=torch.float32).to("cuda")
    references = {request.job_id: draw_alone(plain, request).latents for request in requests}
    try:
        studio = Studio(family_folder("stable-diffusion-xl"), tmp_path, precision="fp32", search_convolutions=True)
        assert torch.backends.cudnn.benchmark
        drawn = studio.draw(requests)
    finally:
        torch.backends.cudnn.benchmark = False
    for request in requests:
        assert drawn[request.job_id].failure is None
        assert relative_error(drawn[request.job_id].latents, references[request.job_id]) < 10 * STACKED_TOLERANCE
