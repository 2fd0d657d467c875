"""The makers' defaults of each video checkpoint, told by its configuration."""

import pytest

from photogram.models.families import DEFAULTS, checkpoint_defaults
from worker.drawing import Studio


def heads(count: int) -> dict[str, int]:
    return {"num_attention_heads": count}


CHECKPOINTS = {
    # class, what its configuration says, and its denoiser's -> width, height, frames, fps, steps, guidance
    "Wan2.1-T2V-1.3B": ("WanPipeline", {}, heads(12), (832, 480, 81, 16, 50, 3.0)),
    "Wan2.1-T2V-14B": ("WanPipeline", {}, heads(40), (1280, 720, 81, 16, 50, 5.0)),
    "Wan2.1-I2V-14B": ("WanImageToVideoPipeline", {}, heads(40), (832, 480, 81, 16, 50, 5.0)),
    "Wan2.2-TI2V-5B": ("WanPipeline", {"expand_timesteps": True}, heads(24), (1280, 704, 121, 24, 50, 5.0)),
    "Wan2.2-T2V-A14B": ("WanPipeline", {"boundary_ratio": 0.875}, heads(40), (1280, 720, 81, 16, 40, 4.0)),
    "Wan2.2-I2V-A14B": ("WanImageToVideoPipeline", {"boundary_ratio": 0.9}, heads(40), (1280, 720, 81, 16, 40, 3.5)),
    "LTX-Video": ("LTXPipeline", {}, heads(32), (704, 480, 161, 25, 50, 3.0)),
    "LTX-2": ("LTX2Pipeline", {}, {"use_prompt_embeddings": True}, (768, 512, 121, 24, 40, 4.0)),
    "LTX-2.3": ("LTX2Pipeline", {}, {"use_prompt_embeddings": False}, (768, 512, 121, 24, 30, 3.0)),
    "HunyuanVideo-1.5": ("HunyuanVideo15Pipeline", {}, heads(16), (848, 480, 121, 24, 50, None)),
    "CogVideoX-5b": ("CogVideoXPipeline", {}, heads(48), (720, 480, 49, 8, 50, 6.0)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_has_its_makers_defaults(name):
    pipeline_class, config, denoiser, expected = CHECKPOINTS[name]
    found = checkpoint_defaults(pipeline_class, DEFAULTS[pipeline_class], config, denoiser)
    assert (found.width, found.height, found.frames, found.fps, found.steps, found.guidance) == expected


CARDS = {
    # tiny pipelines of the real classes: multiple of the sizes, of the frames, size, frames, fps, steps, guidance
    "wan-2.1": (16, 4, 832, 480, 81, 16, 50, 3.0),
    "wan-2.2": (16, 4, 1280, 720, 81, 16, 40, 4.0),
    "wan-2.2-ti2v": (32, 4, 1280, 704, 121, 24, 50, 5.0),
    "wan-2.1-i2v": (16, 4, 832, 480, 81, 16, 50, 3.0),
    "ltx": (32, 8, 704, 480, 161, 25, 50, 3.0),
    "ltx-2": (32, 8, 768, 512, 121, 24, 30, 3.0),
    "hunyuan-video-1.5": (16, 4, 848, 480, 121, 24, 50, None),
    "cogvideox": (16, 4, 720, 480, 49, 8, 50, 6.0),
}


def test_card_says_which_switches_the_checkpoint_lacks_the_component_for(family_folder, tmp_path):
    bare = Studio(family_folder("ltx-2"), tmp_path).card
    assert bare.lacking == {"enable_prompt_enhancement": "processor"}
    assert "enable_prompt_enhancement" not in bare.parameters
    assert "system_prompt" in bare.parameters
    assert Studio(family_folder("wan-2.1"), tmp_path).card.lacking == {}


@pytest.mark.parametrize("name", CARDS)
def test_card_of_a_loaded_video_model(name, family_folder, tmp_path):
    card = Studio(family_folder(name), tmp_path).card
    assert card.media == "video"
    shape = (card.size_multiple, card.frame_multiple, card.default_width, card.default_height)
    rest = (card.default_frames, card.default_fps, card.default_steps, card.default_guidance)
    assert shape + rest == CARDS[name]
    assert card.default_width % card.size_multiple == card.default_height % card.size_multiple == 0
    assert (card.default_frames - 1) % card.frame_multiple == 0
    assert card.defaults == ({"guidance_scale_2": 3.0} if name == "wan-2.2" else {})
