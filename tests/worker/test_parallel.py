"""A denoiser split over several ranks gives what it gives on one."""

import pytest
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from families.quiet import quiet
from photogram.core.errors import ConfigError
from photogram.core.parallel import Degrees, resolve_degrees
from photogram.worker.parallel.attention import Shares
from photogram.worker.parallel.decoding import can_split
from photogram.worker.parallel.sharding import shard
from photogram.worker.tuning.compiling import compile_repeated

from .in_process import on_ranks
from .ranks import attention_differences, denoiser_differences
from .vae_ranks import decoder_differences, fused_decoder_differences

WORLD = 4
FAMILIES = (
    "wan-2.1",
    "wan-2.2-ti2v",
    "flux-2-klein",
    "qwen-image",
    "flux-1",
    "ltx",
    "z-image",
    "stable-diffusion-3",
    "hunyuan-video-1.5",
)
# Group norms; causal convolutions that keep frames, of two generations and for pictures; a clip seen as a whole.
DECODED = ("flux-1", "wan-2.1", "wan-2.2-ti2v", "qwen-image", "hunyuan-video-1.5")
TOLERANCE = 1e-4  # of the result's spread, fp32


def test_every_layout_of_four_ranks_gives_what_one_rank_gives(family_folder, tmp_path):
    folders = [family_folder(name) for name in FAMILIES]
    differences = on_ranks(denoiser_differences, WORLD, "cpu", tmp_path / "meeting", folders)[0]
    assert set(differences) == {f"{name} {layout}" for name in FAMILIES for layout in ("2x2", "1x4")}
    assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}


def test_heads_exchanged_at_once_or_in_parts_attend_as_on_one_rank(tmp_path):
    for differences in on_ranks(attention_differences, 2, "cpu", tmp_path / "meeting"):
        assert len(differences) == 8
        assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("wan-2.1", "fused and traced"),
        pytest.param("flux-1", "fused and traced", marks=pytest.mark.long),
        pytest.param("qwen-image", "fused and traced", marks=pytest.mark.long),
        pytest.param("flux-2-klein", "fused and traced", marks=pytest.mark.long),
        pytest.param("wan-2.2-ti2v", "fused and traced", marks=pytest.mark.long),
        pytest.param("z-image", "fused and traced", marks=pytest.mark.long),
        pytest.param("stable-diffusion-3", "traced", marks=pytest.mark.long),
        pytest.param("ltx", "traced", marks=pytest.mark.long),
        pytest.param("hunyuan-video-1.5", "traced", marks=pytest.mark.long),
        pytest.param("qwen-image", "fused", marks=pytest.mark.long),
        pytest.param("flux-1", "compiled", marks=pytest.mark.long),
        pytest.param("wan-2.1", "compiled", marks=pytest.mark.long),
    ],
)
def test_fused_and_compiled_blocks_over_two_ranks_give_what_one_gives(name, tuned, family_folder, tmp_path):
    ranks = on_ranks(denoiser_differences, 2, "cpu", tmp_path / "meeting", [family_folder(name)], [tuned])
    assert set(ranks[0]) == {f"{name} {layout} {tuned}" for layout in ("2x1", "1x2")}
    assert {name: error for name, error in ranks[0].items() if not error < TOLERANCE} == {}


def test_a_block_of_two_attentions_that_do_not_wait_for_each_other_is_not_compiled(monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", dict(_AttentionBackendRegistry._backends))
    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    )  # fmt: skip
    compile_repeated(denoiser)
    shard(denoiser, Shares(mesh=None, lengths=None))
    assert [block._compiled_call_impl is not None for block in denoiser.transformer_blocks] == [False, True, True]


def test_a_picture_or_clip_decoded_in_bands_is_what_one_rank_decodes(family_folder, tmp_path):
    folders = [family_folder(name) for name in DECODED]
    differences = on_ranks(decoder_differences, 3, "cpu", tmp_path / "meeting", folders)[0]
    assert set(differences) == {f"{name} {shape}" for name in DECODED for shape in ("wide", "tall", "small")}
    assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}


@pytest.mark.long
def test_a_decoder_over_fused_kernels_decodes_in_bands_what_the_plain_one_does(family_folder, tmp_path):
    folders = [family_folder(name) for name in ("wan-2.1", "wan-2.2-ti2v")]
    differences = on_ranks(fused_decoder_differences, 3, "cpu", tmp_path / "meeting", folders)[0]
    assert len(differences) == 6
    assert {name: error for name, error in differences.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("name", ["sana", "ltx", "cogvideox"])
def test_a_vae_with_layers_that_are_not_known_is_not_split(name, family_folder):
    with quiet():
        vae = DiffusionPipeline.from_pretrained(family_folder(name)).vae
    assert not can_split(vae)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_gpus": 1}, Degrees()),
        ({"num_gpus": 4}, Degrees(ulysses=4, is_chosen=False, is_cfg_chosen=False)),
        ({"num_gpus": 3}, Degrees(ulysses=3, is_chosen=False)),
        ({"num_gpus": 4, "cfg": 1}, Degrees(ulysses=4, is_chosen=False)),
        ({"num_gpus": 4, "sp": 4}, Degrees(ulysses=4, is_chosen=False)),
        ({"num_gpus": 4, "ulysses": 2, "ring": 2}, Degrees(ulysses=2, ring=2)),
        ({"num_gpus": 4, "ulysses": 2}, Degrees(ulysses=2, ring=2)),
        ({"num_gpus": 6, "ring": 3, "sp": 6}, Degrees(ulysses=2, ring=3)),
        ({"num_gpus": 2, "cfg": 2}, Degrees(cfg=2)),
        ({"num_gpus": 4, "cfg": 2}, Degrees(ulysses=2, cfg=2, is_chosen=False)),
        ({"num_gpus": 8, "cfg": 2, "ring": 2, "sp": 4}, Degrees(ulysses=2, ring=2, cfg=2)),
    ],
)
def test_degrees_that_were_not_given_are_filled_in(given, expected):
    assert resolve_degrees(**{"ulysses": None, "ring": None, "sp": None} | given) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_gpus": 4, "ulysses": 2, "ring": 3}, "--ulysses-degree 2 times --ring-degree 3 is 6"),
        ({"num_gpus": 4, "ulysses": 3}, "--ulysses-degree 3: --num-gpus (4) does not divide"),
        ({"num_gpus": 4, "ring": 8}, "--ring-degree 8: --num-gpus (4) does not divide"),
        ({"num_gpus": 4, "sp": 2}, "--sp-degree 2: must be --num-gpus (4)"),
        ({"num_gpus": 4, "cfg": 3}, "--cfg-parallel 3: must be 1 or 2"),
        ({"num_gpus": 3, "cfg": 2}, "--cfg-parallel 2: --num-gpus (3) does not divide"),
        ({"num_gpus": 1, "cfg": 2}, "--cfg-parallel 2: --num-gpus (1) does not divide"),
        ({"num_gpus": 4, "cfg": 2, "ulysses": 4}, "--ulysses-degree 4: --num-gpus (4) by --cfg-parallel (2)"),
        ({"num_gpus": 4, "cfg": 2, "sp": 4}, "--sp-degree 4: must be --num-gpus (4) by --cfg-parallel (2)"),
        ({"num_gpus": 0}, "--num-gpus 0: must be at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_by_name(given, named):
    with pytest.raises(ConfigError) as refused:
        resolve_degrees(**{"ulysses": None, "ring": None, "sp": None} | given)
    assert named in str(refused.value)
