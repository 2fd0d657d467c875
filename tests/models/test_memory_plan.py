"""What fits where: checkpoints of the real models' sizes, of which only the heads of the files exist."""

import json
import math

import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError
from photogram.core.worker_config import Precisions
from photogram.models.checkpoint import find_checkpoint
from photogram.models.memory_report import plan_of
from photogram.models.sizes import parts_of

GB = 10**9
NOWHERE = 10**15  # bytes of host memory that never run out


def write_weights(folder, tensors, name="diffusion_pytorch_model.safetensors"):
    """Write a safetensors file whose tensors (name to shape, bf16) are a hole in the disk."""
    head, end = {}, 0
    for tensor, shape in tensors.items():
        size = 2 * math.prod(shape)
        head[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_part(folder, library, cls, config, *, blocks=0, block=0, outside=0):
    """Write a component of so many blocks of `block` parameters each, with `outside` ones in none."""
    tensors = {f"blocks.{index}.weight": [block] for index in range(blocks)} | {"embed.weight": [outside]}
    write_weights(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"_class_name": cls} | config))
    return [library, cls]


def make_flux(folder):
    index = {
        "_class_name": "FluxPipeline",
        "text_encoder_2": write_part(
            folder / "text_encoder_2", "transformers", "T5EncoderModel", {}, blocks=24, block=195_000_000
        ),
        "transformer": write_part(
            folder / "transformer",
            "diffusers",
            "FluxTransformer2DModel",
            {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64, "patch_size": 1},
            blocks=57,
            block=208_000_000,
            outside=45_000_000,
        ),
        "vae": write_part(
            folder / "vae",
            "diffusers",
            "AutoencoderKL",
            {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
            outside=84_000_000,
        ),
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_wan_14b(folder):
    index = {
        "_class_name": "WanPipeline",
        "text_encoder": write_part(
            folder / "text_encoder", "transformers", "UMT5EncoderModel", {}, blocks=24, block=193_000_000,
            outside=1_050_000_000,
        ),
        "transformer": write_part(
            folder / "transformer",
            "diffusers",
            "WanTransformer3DModel",
            {"num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16, "patch_size": [1, 2, 2]},
            blocks=40,
            block=351_000_000,
            outside=200_000_000,
        ),
        "vae": write_part(
            folder / "vae",
            "diffusers",
            "AutoencoderKLWan",
            {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "z_dim": 16, "temperal_downsample": [False, True, True]},
            outside=127_000_000,
        ),
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_hunyuan_15(folder):
    """HunyuanVideo 1.5, whose VAE decodes a clip in one go: 848x480 and 121 frames of it take 50 GB."""
    index = {
        "_class_name": "HunyuanVideo15Pipeline",
        "text_encoder": write_part(
            folder / "text_encoder", "transformers", "Qwen2_5_VLTextModel", {}, blocks=28, block=233_000_000,
            outside=545_000_000,
        ),
        "transformer": write_part(
            folder / "transformer",
            "diffusers",
            "HunyuanVideo15Transformer3DModel",
            {"num_attention_heads": 16, "attention_head_dim": 128, "in_channels": 65, "patch_size": 1},
            blocks=54,
            block=150_000_000,
            outside=200_000_000,
        ),
        "vae": write_part(
            folder / "vae",
            "diffusers",
            "AutoencoderKLHunyuanVideo15",
            {"block_out_channels": [128, 256, 512, 1024, 1024], "latent_channels": 32, "spatial_compression_ratio": 16,
             "temporal_compression_ratio": 4},
            outside=1_230_000_000,
        ),
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def plan(folder, memory_gb, *, host_bytes=NOWHERE, **flags):
    config = ServeConfig(model_path=str(folder), data_dir=str(folder), **flags).worker(folder)
    checkpoint = find_checkpoint(str(folder), revision=None, variant=None)
    return plan_of(
        checkpoint,
        config,
        memory_bytes=int(memory_gb * GB),
        host_bytes=host_bytes,
        default_precision="bf16",
    )


def chosen(found):
    """The choices of a plan, by name."""
    names = [name for name in found.plan.placement.__struct_fields__ if name != "pin_cpu_memory"]
    return {name for name in names if getattr(found.plan.placement, name)}


@pytest.mark.parametrize(
    ("make", "memory_gb", "expected"),
    [
        (make_flux, 80, set()),
        (make_flux, 48, set()),
        (make_flux, 32, {"text_encoder_layerwise_offload"}),
        (make_flux, 24, {"dit_layerwise_offload"}),
        (make_flux, 12, {"text_encoder_layerwise_offload", "dit_layerwise_offload"}),
        (make_wan_14b, 80, set()),
        (make_wan_14b, 48, {"text_encoder_cpu_offload"}),
        (make_wan_14b, 24, {"text_encoder_cpu_offload", "dit_layerwise_offload"}),
        (make_hunyuan_15, 141, set()),
        (make_hunyuan_15, 80, {"vae_tiling"}),
    ],
)
def test_the_cheapest_placement_that_fits_is_chosen(make, memory_gb, expected, tmp_path):
    found = plan(make(tmp_path), memory_gb)
    assert found.plan.fits, found.plan.reasons
    assert chosen(found) == expected, found.plan.reasons


def test_an_encoder_in_layers_takes_what_lies_outside_of_them_and_two_of_them(tmp_path):
    folder = make_wan_14b(tmp_path)
    layered = plan(folder, 80, text_encoder_layerwise_offload=True).plan
    whole = plan(folder, 80).plan
    assert whole.weights["encode"] - layered.weights["encode"] == 22 * 2 * 193_000_000


def test_layers_of_encoders_are_found_where_their_classes_keep_them(tmp_path):
    names = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": [8, 4],
        "encoder.block.1.layer.0.SelfAttention.q.weight": [8, 4],
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": [16, 4],
        "shared.weight": [32, 4],
    }
    write_weights(tmp_path / "text_encoder", names, "model.safetensors")
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}
    [part] = parts_of(tmp_path, index, variant=None, wanted=Precisions(), default="fp32")
    assert (part.block_bytes, part.outside_bytes) == (4 * 96, 4 * 128)


@pytest.mark.parametrize("make", [make_flux, make_wan_14b])
def test_more_memory_never_costs_more(make, tmp_path):
    folder = make(tmp_path)
    peaks = [max(plan(folder, gb).plan.peaks.values()) for gb in (12, 24, 48, 80)]
    assert peaks == sorted(peaks)
    assert [plan(folder, gb).plan.fits for gb in (12, 24, 48, 80)].count(True) >= 3


def test_sizes_are_those_of_the_precision_that_is_loaded(tmp_path):
    folder = make_flux(tmp_path)
    in_bf16, in_fp32 = plan(folder, 80).plan, plan(folder, 80, dit_precision="fp32").plan
    transformer = 57 * 208_000_000 + 45_000_000
    assert in_bf16.weights["denoise"] == 2 * (transformer + 24 * 195_000_000 + 84_000_000)
    assert in_fp32.weights["denoise"] - in_bf16.weights["denoise"] == 2 * transformer


@pytest.mark.parametrize("memory_gb", [12, 24, 48, 80])
def test_what_the_operator_says_is_kept(memory_gb, tmp_path):
    folder = make_flux(tmp_path)
    kept = plan(folder, memory_gb, text_encoder_cpu_offload=False, vae_tiling=True, dit_cpu_offload=True)
    assert kept.plan.placement.text_encoder_cpu_offload is False
    assert {"vae_tiling", "dit_cpu_offload"} <= chosen(kept)
    assert "dit_layerwise_offload" not in chosen(kept)


def test_without_tiles_a_clip_that_is_decoded_whole_does_not_fit_and_the_plan_says_so(tmp_path):
    folder = make_hunyuan_15(tmp_path)
    whole, tiled = plan(folder, 80, vae_tiling=False), plan(folder, 80)
    assert not whole.plan.fits
    assert tiled.plan.fits
    pixels = 848 * 480 * 121
    assert whole.footprint.decode_bytes(848, 480, 121) == pixels * 2 * 256 * 2  # two times 256 channels, in bf16
    assert tiled.footprint.decode_bytes(848, 480, 121) == 256 * 256 * 121 * 2 * 256 * 2


def test_a_denoiser_split_over_devices_stays_on_them(tmp_path):
    found = plan(make_flux(tmp_path), 24, num_gpus=2)
    assert not {"dit_cpu_offload", "dit_layerwise_offload"} & chosen(found)


def test_what_host_memory_cannot_hold_does_not_wait_there(tmp_path):
    found = plan(make_flux(tmp_path), 24, host_bytes=12 * GB)
    assert "dit_layerwise_offload" not in chosen(found)
    assert not found.plan.fits


def test_what_fits_nowhere_says_so_with_its_sizes(tmp_path):
    found = plan(make_flux(tmp_path), 2)
    assert not found.plan.fits
    text = "\n".join(found.plan.reasons)
    assert "does not fit" in text
    assert "transformer 23.8 GB (bf16)" in text


def test_of_two_denoisers_that_wait_one_is_there_at_a_time(tmp_path):
    folder = make_wan_14b(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (folder / "transformer_2").symlink_to(folder / "transformer", target_is_directory=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    found = plan(folder, 48)
    assert found.plan.fits
    assert "dit_cpu_offload" in chosen(found)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x05\x00\x00\x00\x00\x00\x00\x00hello"])
def test_a_file_without_a_head_is_named(content, tmp_path):
    folder = make_flux(tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.safetensors.*transformer"):
        plan(folder, 24)


def test_a_network_for_a_second_stage_is_measured_and_the_usual_clip_is_twice_as_large(tmp_path):
    """Its folder lies beside the pipeline's, whose index does not name it."""
    index = {
        "_class_name": "LTX2Pipeline",
        "transformer": write_part(
            tmp_path / "transformer",
            "diffusers",
            "LTX2VideoTransformer3DModel",
            {"num_attention_heads": 32, "attention_head_dim": 128, "in_channels": 128, "patch_size": 1},
            blocks=48,
            block=390_000_000,
        ),
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    one = plan(tmp_path, 80).plan
    assert "768x512, 121 frames" in " ".join(one.reasons)
    write_part(tmp_path / "latent_upsampler", "diffusers", "LTX2LatentUpsamplerModel", {}, outside=500_000_000)
    two = plan(tmp_path, 80).plan
    assert two.weights["denoise"] - one.weights["denoise"] == 1_000_000_000
    assert "1536x1024, 121 frames" in " ".join(two.reasons)


def test_a_variant_is_measured_by_its_own_files(tmp_path):
    folder = make_flux(tmp_path)
    write_weights(folder / "transformer", {"blocks.0.weight": [10]}, "diffusion_pytorch_model.fp16.safetensors")
    config = ServeConfig(model_path=str(folder), variant="fp16").worker(folder)
    checkpoint = find_checkpoint(str(folder), revision=None, variant="fp16")
    found = plan_of(checkpoint, config, memory_bytes=80 * GB, host_bytes=NOWHERE, default_precision="bf16")
    assert "transformer 0.0 GB" in found.plan.reasons[0]
    assert "transformer 23.8 GB" in plan(folder, 80).plan.reasons[0]
