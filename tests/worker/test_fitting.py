"""How a model is split where that was left open, and what is refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.core.footprint import Room
from photogram.core.parallel import Degrees, resolve_degrees
from photogram.models.checkpoint import Checkpoint, find_checkpoint
from photogram.models.guided import halves_of
from photogram.worker import loading
from photogram.worker.loading import choose_device
from photogram.worker.parallel.fitting import Layout, fit
from photogram.worker.parallel.layout_report import layout_answer


def only(num_gpus: int, cfg: int | None = None) -> Degrees:
    """What `--num-gpus` alone says, or with `--cfg-parallel`."""
    return resolve_degrees(num_gpus=num_gpus, cfg=cfg, ulysses=None, ring=None, sp=None)


def found(folder: Path) -> Checkpoint:
    return find_checkpoint(str(folder), revision=None, variant=None)


@pytest.fixture
def with_heads(family_folder, tmp_path):
    """Return the checkpoint of a family with another number of heads in its denoiser's configuration."""

    def make(name: str, key: str, heads: int) -> Checkpoint:
        folder = shutil.copytree(family_folder(name), tmp_path / f"{name}-{heads}")
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: heads}))
        return find_checkpoint(str(folder), revision=None, variant=None)

    return make


@pytest.mark.parametrize(
    ("heads", "num_gpus", "expected"),
    [
        (24, 2, Degrees(ulysses=2)),
        (24, 8, Degrees(ulysses=8)),
        (30, 4, Degrees(ulysses=2, ring=2)),
        (30, 8, Degrees(ulysses=2, ring=4)),
        (5, 4, Degrees(ulysses=1, ring=4)),
    ],
)
def test_as_many_devices_exchange_heads_as_divide_them(with_heads, heads, num_gpus, expected):
    assert fit(only(num_gpus), with_heads("z-image", "n_heads", heads)).degrees == expected
    assert fit(only(num_gpus, cfg=1), with_heads("wan-2.1", "num_attention_heads", heads)).degrees == expected


def test_one_device_needs_no_plan(family_folder):
    assert fit(only(1), found(family_folder("stable-diffusion-xl"))) == Layout(Degrees(), ())


# How a step runs with the prompt and without it, as each family's pipeline does by default.
HALVES = {
    "wan-2.1": "calls",
    "wan-2.2-ti2v": "calls",
    "qwen-image": "calls",
    "hunyuan-video-1.5": "calls",
    "stable-diffusion-xl": "rows",
    "stable-diffusion-3": "rows",
    "sana": "rows",
    "ltx": "rows",
    "cogvideox": "rows",
    "flux-1": "none",  # takes its guidance as a number
    "flux-2-klein": "none",  # distilled
    "z-image": "none",
}


@pytest.mark.parametrize("name", HALVES)
def test_a_models_guidance_is_known_before_it_is_loaded(name, family_folder):
    assert halves_of(found(family_folder(name))) == HALVES[name]


def test_of_a_guided_model_the_halves_run_apart_first_and_the_rest_splits_sequences(with_heads):
    wan = with_heads("wan-2.1", "num_attention_heads", 12)
    two, four, eight, three = (fit(only(num_gpus), wan) for num_gpus in (2, 4, 8, 3))
    assert two.degrees == Degrees(cfg=2)
    assert four.degrees == Degrees(cfg=2, ulysses=2)
    assert eight.degrees == Degrees(cfg=2, ulysses=4)
    assert three.degrees == Degrees(ulysses=3)  # not to be halved
    assert "WanPipeline is guided by default" in two.reasons[0]
    assert "12 heads" in four.reasons[1]


def test_degrees_that_were_given_are_kept(with_heads):
    wan = with_heads("wan-2.1", "num_attention_heads", 12)
    assert fit(only(2, cfg=1), wan).degrees == Degrees(ulysses=2)
    assert fit(ServeConfig(num_gpus=2, ulysses_degree=2).degrees, wan).degrees == Degrees(ulysses=2)
    assert fit(ServeConfig(num_gpus=4, sp_degree=4).degrees, wan).degrees == Degrees(ulysses=4)
    assert fit(ServeConfig(num_gpus=2, enable_cfg_parallel=True).degrees, wan).degrees == Degrees(cfg=2)
    with pytest.raises(ConfigError, match="--enable-cfg-parallel"):
        ServeConfig(num_gpus=2, enable_cfg_parallel=True, cfg_parallel=1)


def test_rows_that_may_not_be_divided_leave_no_halves_to_run_apart(family_folder):
    rows, calls = found(family_folder("ltx")), found(family_folder("wan-2.1"))
    assert fit(only(2), rows).degrees == Degrees(cfg=2)
    assert fit(only(2), rows, deterministic=True).degrees == Degrees(ulysses=2)
    assert fit(only(2), calls, deterministic=True).degrees == Degrees(cfg=2)


def test_the_folders_own_card_may_say_that_a_model_is_not_guided(family_folder, tmp_path):
    folder = shutil.copytree(family_folder("wan-2.1"), tmp_path / "distilled")
    (folder / "photogram.json").write_text('{"default_guidance": 1.0}')
    assert fit(only(2), found(folder)).degrees == Degrees(ulysses=2)


def test_what_doctor_is_told_is_what_the_server_would_choose(family_folder):
    config = ServeConfig(model_path=str(family_folder("wan-2.1")), num_gpus=4).worker(Path("frames"))
    answer = layout_answer(config)
    assert answer.problem is None
    assert answer.lines[0] == "CFG 2 x Ulysses 2 x ring 1"
    unet = ServeConfig(model_path=str(family_folder("stable-diffusion-xl")), num_gpus=4).worker(Path("frames"))
    assert "cannot be split" in str(layout_answer(unet).problem)


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do(with_heads):
    checkpoint = with_heads("z-image", "n_heads", 30)
    with pytest.raises(ConfigError) as refused:
        fit(Degrees(ulysses=4, ring=2), checkpoint)
    assert str(refused.value) == (
        "--ulysses-degree 4: ZImageTransformer2DModel has 30 heads, which do not divide by it. "
        "With 8 devices: 1, 2, and --ring-degree for the rest."
    )
    assert fit(Degrees(ulysses=2, ring=4), checkpoint).degrees == Degrees(ulysses=2, ring=4)


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "sana"])
def test_a_model_that_cannot_be_split_is_refused_before_it_is_loaded(name, family_folder):
    checkpoint = found(family_folder(name))
    with pytest.raises(ConfigError, match="cannot be split over several devices"):
        fit(only(2, cfg=1), checkpoint)
    with pytest.raises(ConfigError, match="cannot be split over several devices"):
        fit(only(4), checkpoint)
    assert fit(only(2), checkpoint).degrees == Degrees(cfg=2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_gpus": 2, "dp_size": 2}, Degrees()),
        ({"num_gpus": 4, "dp_size": 2}, Degrees(ulysses=2, is_chosen=False, is_cfg_chosen=False)),
        ({"num_gpus": 8, "dp_size": 2, "ulysses_degree": 2}, Degrees(ulysses=2, ring=2)),
    ],
)
def test_replicas_leave_each_group_its_part_of_the_devices(flags, expected):
    config = ServeConfig(**flags)
    assert config.degrees == expected
    workers = [config.worker(Path("frames"), replica) for replica in range(config.dp_size)]
    assert [(one.replica, one.num_replicas, one.degrees) for one in workers] == [(0, 2, expected), (1, 2, expected)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_gpus": 4, "dp_size": 3}, "--dp-size 3: --num-gpus (4) does not divide by it."),
        ({"num_gpus": 4, "dp_size": 0}, "--dp-size 0: must be at least 1."),
        ({"num_gpus": 4, "dp_size": 2, "ulysses_degree": 4}, "--num-gpus (4) by --dp-size (2) does not divide by it"),
        ({"num_gpus": 8, "ulysses_degree": 2, "ring_degree": 2}, "(--dp-size 2 makes groups of 4)"),
    ],
)
def test_replicas_that_do_not_fit_the_devices_are_refused_by_name(flags, named):
    with pytest.raises(ConfigError) as refused:
        _ = ServeConfig(**flags).degrees
    assert named in str(refused.value)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_replicas_take_the_devices_group_after_group(four_gpus):
    first = [choose_device("auto", world_size=2, replica=replica, num_replicas=2) for replica in (0, 1)]
    assert first == [torch.device("cuda:0"), torch.device("cuda:2")]
    assert choose_device("cuda:1", replica=2, num_replicas=3) == torch.device("cuda:3")
    assert choose_device("cpu", world_size=8, num_replicas=8) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "groups", "named"),
    [
        ("cuda:4", {}, "--device 'cuda:4': this machine has 4 CUDA devices."),
        ("auto", {"world_size": 2, "num_replicas": 3}, "--num-gpus 6: this machine has 4 CUDA devices."),
        ("cuda:2", {"world_size": 3}, "--num-gpus 3: this machine has 4 CUDA devices, and --device cuda:2 leaves 2."),
    ],
)
def test_devices_that_are_not_there_are_refused_by_every_replica(four_gpus, wanted, groups, named):
    for replica in range(groups.get("num_replicas", 1)):
        with pytest.raises(ConfigError) as refused:
            choose_device(wanted, replica=replica, **groups)
        assert str(refused.value) == named


def test_requests_are_admitted_by_the_devices_that_share_a_sequence(family_folder, monkeypatch):
    folder = family_folder("wan-2.1")
    monkeypatch.setattr(loading, "total_memory_of", lambda device: 10_000_000_000)

    def shares(**flags: int) -> tuple[float, float]:
        """What may be needed to denoise and to decode, over what may be on one device."""

        def room(**flags: int) -> Room:
            config = ServeConfig(model_path=str(folder), **flags).worker(Path("frames"))
            return loading.plan_memory_of(found(folder), config, torch.device("cpu"))[1]

        one, more = room(), room(**flags)
        return more.denoise_bytes / one.denoise_bytes, more.decode_bytes / one.decode_bytes

    assert shares(num_gpus=2, ulysses_degree=2) == (2, 2)
    assert shares(num_gpus=2, cfg_parallel=2) == (1, 2)
    assert shares(num_gpus=4, cfg_parallel=2, ulysses_degree=2) == (2, 4)


def test_the_text_encoder_is_on_one_device_whatever_is_asked_for():
    assert ServeConfig(tp_size=1).tp_size == 1
    with pytest.raises(ConfigError, match="--tp-size 2: must be 1"):
        ServeConfig(tp_size=2)
