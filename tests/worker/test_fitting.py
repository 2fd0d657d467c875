"""How a model is split where that was left open, and what is refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.core.parallel import Degrees, resolve_degrees
from photogram.models.checkpoint import Checkpoint, find_checkpoint
from photogram.worker.loading import choose_device
from photogram.worker.parallel.fitting import fit


def only(num_gpus: int) -> Degrees:
    """What `--num-gpus` alone says."""
    return resolve_degrees(num_gpus=num_gpus, ulysses=None, ring=None, sp=None)


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
    assert fit(only(num_gpus), with_heads("z-image", "n_heads", heads)) == expected
    assert fit(only(num_gpus), with_heads("wan-2.1", "num_attention_heads", heads)) == expected


def test_one_device_needs_no_plan(family_folder):
    unet = find_checkpoint(str(family_folder("stable-diffusion-xl")), revision=None, variant=None)
    assert fit(only(1), unet) == Degrees()


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do(with_heads):
    checkpoint = with_heads("z-image", "n_heads", 30)
    with pytest.raises(ConfigError) as refused:
        fit(Degrees(ulysses=4, ring=2), checkpoint)
    assert str(refused.value) == (
        "--ulysses-degree 4: ZImageTransformer2DModel has 30 heads, which do not divide by it. "
        "With 8 devices: 1, 2, and --ring-degree for the rest."
    )
    assert fit(Degrees(ulysses=2, ring=4), checkpoint) == Degrees(ulysses=2, ring=4)


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "sana"])
def test_a_model_that_cannot_be_split_is_refused_before_it_is_loaded(name, family_folder):
    checkpoint = find_checkpoint(str(family_folder(name)), revision=None, variant=None)
    with pytest.raises(ConfigError, match="cannot be split over several devices"):
        fit(only(2), checkpoint)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_gpus": 2, "dp_size": 2}, Degrees()),
        ({"num_gpus": 4, "dp_size": 2}, Degrees(ulysses=2, is_chosen=False)),
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


def test_the_text_encoder_is_on_one_device_whatever_is_asked_for():
    assert ServeConfig(tp_size=1).tp_size == 1
    with pytest.raises(ConfigError, match="--tp-size 2: must be 1"):
        ServeConfig(tp_size=2)
