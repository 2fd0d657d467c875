"""Qwen-Image's table of modulation: the vectors that its layers compute, computed once for each timestep."""

from collections import Counter

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.core.request import LoraUse
from photogram.worker.modules import BigModule
from photogram.worker.tuning.compiling import compile_repeated
from photogram.worker.tuning.fusing import fuse
from photogram.worker.tuning.modulation import ModulationTable, modulation_table

from .drawing import Studio, draw_alone, relative_error
from .lora.files import diffusers_file
from .test_families_served import STACKED_TOLERANCE, requests_of

NAME = "qwen-image"


def with_table(module: BigModule, num_timesteps: int = 64) -> Counter[int]:
    """Give a served network its table; return how often one of its layers was called with how many rows."""
    fuse(module.module)
    module.modulations = ModulationTable(module.module, num_timesteps)
    computed: Counter[int] = Counter()
    module.module.transformer_blocks[0].img_mod[1].register_forward_hook(
        lambda layer, args, output: computed.update([len(output)])
    )
    return computed


@pytest.fixture
def network(family_folder) -> torch.nn.Module:
    network = DiffusionPipeline.from_pretrained(family_folder(NAME)).transformer
    fuse(network)
    return network


def arguments(network: torch.nn.Module, *timesteps: float) -> dict:
    generator = torch.Generator().manual_seed(1)
    rows = len(timesteps)
    return {
        "hidden_states": torch.randn(1, 16, network.config.in_channels, generator=generator).expand(rows, -1, -1),
        "encoder_hidden_states": torch.randn(1, 5, network.config.joint_attention_dim, generator=generator).expand(
            rows, -1, -1
        ),
        "timestep": torch.tensor(timesteps),
        "img_shapes": [[(1, 4, 4)]] * rows,
        "return_dict": False,
    }


def test_each_timestep_is_computed_once_for_all_jobs_alone_and_stacked(family_folder, tmp_path):
    requests = requests_of(NAME)
    plain = DiffusionPipeline.from_pretrained(family_folder(NAME))
    expected = {request.job_id: draw_alone(plain, request).latents for request in requests}
    for max_batch_size in (1, 8):
        studio = Studio(family_folder(NAME), tmp_path, max_batch_size=max_batch_size)
        computed = with_table(studio.served.modules["transformer"])
        for turn in range(2):
            drawn = studio.draw(requests)
            for request in requests:
                assert drawn[request.job_id].failure is None
                assert relative_error(drawn[request.job_id].latents, expected[request.job_id]) < 10 * STACKED_TOLERANCE
            if turn == 0:
                first = computed.total()
        assert set(computed) == {1}, "computed row by row, so that a result does not depend on who came along"
        assert 0 < first <= sum(request.num_inference_steps for request in requests)
        assert computed.total() == first, "the same schedules were computed again"


@torch.inference_mode()
def test_rows_make_room_for_others_and_are_right_when_they_come_again(network):
    exact = {value: network(**arguments(network, value))[0] for value in (0.1, 0.4, 0.7, 0.9)}
    table = ModulationTable(network, 3)
    for timesteps in ((0.1,), (0.4, 0.7), (0.9, 0.1), (0.4,), (0.7, 0.7, 0.4), (0.1, 0.9)):
        given = table.looked_up(arguments(network, *timesteps), None)
        assert given["attention_kwargs"]
        for row, value in zip(network(**given)[0], timesteps, strict=True):
            torch.testing.assert_close(row, exact[value][0], atol=1e-5, rtol=1e-5)
    # More timesteps than rows: the call computes its own.
    given = arguments(network, 0.1, 0.4, 0.7, 0.9)
    assert table.looked_up(given, None).keys() == given.keys()


@torch.inference_mode()
def test_a_row_that_could_not_be_computed_leaves_no_other_wrong(network, monkeypatch):
    exact = {value: network(**arguments(network, value))[0] for value in (0.1, 0.4, 0.7)}
    table = ModulationTable(network, 2)
    for value in (0.1, 0.4):
        table.looked_up(arguments(network, value), None)
    last = network.transformer_blocks[-1].txt_mod
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            table.looked_up(arguments(network, 0.7), None)
    for value in (0.4, 0.7, 0.4, 0.1):
        result = network(**table.looked_up(arguments(network, value), None))[0]
        torch.testing.assert_close(result, exact[value], atol=1e-5, rtol=1e-5)


def out_of_memory(embedding):
    raise torch.OutOfMemoryError("no memory")


@torch.inference_mode()
def test_a_call_that_depends_on_more_than_its_timesteps_is_left_alone(network):
    table = ModulationTable(network, 3)
    for more in ({"guidance": torch.ones(1)}, {"additional_t_cond": torch.ones(1)}, {"attention_kwargs": {"scale": 2}}):
        given = arguments(network, 0.5) | more
        assert table.looked_up(given, None) == given


@torch.inference_mode()
def test_compiled_blocks_look_up_other_rows_without_being_compiled_again(network):
    from torch._dynamo.utils import counters

    table = ModulationTable(network, 8)
    exact = {value: network(**arguments(network, value))[0] for value in (0.1, 0.4, 0.7)}
    torch._dynamo.reset()
    counters.clear()
    compile_repeated(network, backend="eager", fullgraph=True)
    compiled = []
    for value, expected in exact.items():
        result = network(**table.looked_up(arguments(network, value), None))[0]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1] > 0
    torch._dynamo.reset()


def test_loras_that_change_the_modulation_have_rows_of_their_own(family_folder, tmp_path):
    request = requests_of(NAME)[0]
    layers = {"modulation": ["transformer_blocks.0.img_mod.1"], "feed-forward": ["transformer_blocks.0.img_mlp.net.2"]}
    plain = Studio(family_folder(NAME), tmp_path, max_batch_size=1)
    tabled = Studio(family_folder(NAME), tmp_path, max_batch_size=1)
    for studio in (plain, tabled):
        fuse(studio.served.modules["transformer"].module)
    computed = with_table(tabled.served.modules["transformer"])
    loras = {None: (), **{kind: (lora(plain, tmp_path, names),) for kind, names in layers.items()}}
    totals = {}
    for turn, kind in enumerate((None, "feed-forward", "modulation", None, "modulation")):
        # A deterministic job has its LoRAs merged.
        job = request_with(request, loras[kind], f"job-{turn}")
        expected, drawn = (studio.draw([job])[job.job_id] for studio in (plain, tabled))
        assert drawn.failure is None
        torch.testing.assert_close(drawn.latents, expected.latents, atol=1e-5, rtol=1e-5)
        totals[turn] = computed.total()
    assert totals[1] == totals[0], "a LoRA elsewhere leaves the table as it is"
    assert totals[2] > totals[1]
    assert totals[4] == totals[3] == totals[2], "what was known was computed again"


def lora(studio: Studio, folder, names: list[str]) -> LoraUse:
    network = studio.served.modules["transformer"].module
    layers = {name: tuple(network.get_submodule(name).weight.shape) for name in names}
    path = diffusers_file(folder / f"{names[0]}.safetensors", "transformer", layers, rank=4, seed=3)
    return LoraUse(nickname=names[0], path=str(path))


def request_with(request, loras, job_id):
    return msgspec.structs.replace(request, loras=loras, job_id=job_id, deterministic=True)


def test_only_networks_whose_blocks_were_fused_have_a_table(family_folder):
    pipeline = DiffusionPipeline.from_pretrained(family_folder(NAME))
    assert modulation_table(pipeline.transformer) is None
    assert modulation_table(pipeline.vae) is None
    fuse(pipeline.transformer)
    assert modulation_table(pipeline.transformer) is not None
