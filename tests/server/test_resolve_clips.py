"""What a request for a clip means: sizes, lengths, tasks, and the bounds of each."""

from pathlib import Path

import msgspec
import pytest

from photogram.core.config import ServeConfig
from photogram.core.errors import RequestError
from photogram.server.beginnings import Beginning
from photogram.server.lengths import spoken
from photogram.server.resolve import REDRAW_STRENGTH, Resolver
from photogram.server.sizes import Size

from .fake_engine import image_card, video_card

PROMPT = {"prompt": "a cat"}
EVERYTHING = ("TI2V", "T2V", "I2V", "V2V")


def card(**changes):
    return msgspec.structs.replace(video_card(), **{"max_frames": 81, "max_native_pixels": None, **changes})


def resolve(body, *, card=card(), beginning=None, **settings):  # noqa: B008 - a frozen value
    return Resolver(config=ServeConfig(**settings)).clip({**PROMPT, **body}, card, "ann", beginning)


def request(body, **options):
    return resolve(body, **options).drawing.request


def output(body, **options):
    return resolve(body, **options).drawing.output


def refused(body, **options):
    with pytest.raises(RequestError) as refusal:
        resolve(body, **options)
    return refusal.value


def clip(start="redraw", *, size=Size(192, 128), num_frames=33, fps=16.0, video_id=None):  # noqa: B008
    return Beginning(
        start=start, param="video", folder=Path("/in"), size=size, num_frames=num_frames, fps=fps, video_id=video_id
    )


def picture(size=Size(200, 100)):  # noqa: B008
    return Beginning(start="picture", param="input_reference", folder=Path("/in"), size=size)


# --- from a prompt ------------------------------------------------------------------------------------------------


def test_what_is_left_open_is_the_models():
    made = resolve({})
    drawn, file = made.drawing.request, made.drawing.output
    assert drawn.job_id.startswith("video_")
    assert (drawn.task, drawn.width, drawn.height, drawn.num_frames, drawn.fps) == ("T2V", 64, 48, 17, 16)
    assert (drawn.num_inference_steps, drawn.guidance_scale) == (4, 2.5)
    assert (file.width, file.height, file.format, file.compression, file.fps) == (64, 48, "mp4", 50, 16)
    assert (made.length.num_frames, made.warnings, made.ignored) == (17, (), ())


@pytest.mark.parametrize(
    ("body", "num_frames", "fps"),
    [
        ({"num_frames": 33}, 33, 16),
        ({"num_frames": "33"}, 33, 16),
        ({"seconds": "4"}, 65, 16),
        ({"seconds": 4}, 65, 16),
        ({"seconds": "4.0", "fps": 8}, 33, 8),
        ({"seconds": 1.5}, 25, 16),
        ({"fps": 30}, 17, 30),
        ({"num_frames": 30}, 29, 16),
        ({"num_frames": 31}, 33, 16),
        ({"num_frames": 1}, 1, 16),
        ({"seconds": 0.01}, 1, 16),
        ({"seconds": 4, "num_frames": 65}, 65, 16),
    ],
)
def test_a_length_is_drawn_as_near_as_the_model_can(body, num_frames, fps):
    made = resolve(body)
    assert (made.drawing.request.num_frames, made.drawing.request.fps) == (num_frames, fps)
    assert made.length.num_frames == num_frames
    assert made.drawing.output.fps == fps


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"seconds": "20"}, "seconds", "at most 81 (5.06 s)"),
        ({"num_frames": 85}, "num_frames", "model 'acme/painter-1' makes at most 81"),
        ({"seconds": 4, "num_frames": 17}, "num_frames", "64 frames at 16 a second"),
        ({"seconds": 0}, "seconds", "between 0.01 and 600"),
        ({"seconds": "four"}, "seconds", "a finite number"),
        ({"seconds": -1}, "seconds", "between"),
        ({"fps": 0}, "fps", "between 1 and 60"),
        ({"fps": 12.5}, "fps", "an integer"),
        ({"num_frames": 0}, "num_frames", "at least 1"),
        ({"n": 2}, "n", "between 1 and 1"),
        ({"output_format": "gif"}, "output_format", "must be one of mp4"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"size": "4000x4000"}, "size", "--max-video-pixels"),
        ({"size": "12x64"}, "size", "at least 16"),
        ({"output_compression": 101}, "output_compression", "between 0 and 100"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(body, param, said):
    error = refused(body)
    assert error.param == param
    assert said in error.message


def test_the_servers_own_bound_holds_where_the_models_is_wider():
    assert "--max-frames" in refused({"num_frames": 41}, max_frames=37).message
    assert request({"num_frames": 37}, max_frames=37).num_frames == 37
    assert "--max-frames" in refused({"num_frames": 2000}, card=card(max_frames=None)).message


@pytest.mark.parametrize(
    ("body", "file", "drawn"),
    [
        ({"size": "96x64"}, (96, 64), (96, 64)),
        ({"size": "1280x720"}, (1280, 720), (1280, 720)),
        ({"size": "100x70"}, (100, 70), (112, 80)),
        ({"width": 96, "height": 64}, (96, 64), (96, 64)),
        ({"size": "auto"}, (64, 48), (64, 48)),
        ({"size": ""}, (64, 48), (64, 48)),
    ],
)
def test_the_file_has_the_size_asked_for_and_the_drawing_a_legal_one(body, file, drawn):
    made = resolve(body)
    assert (made.drawing.output.width, made.drawing.output.height) == file
    assert (made.drawing.request.width, made.drawing.request.height) == drawn
    assert made.warnings == ()


def test_odd_sides_become_even_and_are_told():
    made = resolve({"size": "101x71"})
    assert (made.drawing.output.width, made.drawing.output.height) == (102, 72)
    assert made.warnings == ("The sides of a clip are even: it has 102x72 for 101x71.",)


def test_beyond_the_native_pixels_it_is_drawn_smaller_and_enlarged():
    made = resolve({"size": "512x384"}, card=card(max_native_pixels=128 * 96))
    assert (made.drawing.output.width, made.drawing.output.height) == (512, 384)
    assert (made.drawing.request.width, made.drawing.request.height) == (128, 96)


@pytest.mark.parametrize(
    ("body", "compression"),
    [({}, 50), ({"output_quality": "high"}, 90), ({"output-quality": "low"}, 35), ({"output_compression": 7}, 7)],
)
def test_quality_words_and_numbers(body, compression):
    assert output(body).compression == compression


def test_what_has_no_effect_is_named():
    made = resolve({"strength": 0.5, "characters": [], "user": "ann"})
    assert made.ignored == ("characters", "strength")
    assert made.drawing.request.strength is None


def test_seeds_are_kept_or_drawn():
    assert request({"seed": 7}).seed == 7
    assert request({}).seed != request({}).seed


# --- tasks --------------------------------------------------------------------------------------------------------


def test_a_model_of_prompts_refuses_a_picture_and_names_the_field():
    error = refused({}, beginning=picture())
    assert (error.param, error.code) == ("input_reference", "unsupported_by_model")


@pytest.mark.parametrize("on", [True, "true", 1])
def test_a_switch_for_which_the_checkpoint_lacks_the_component_is_refused_by_its_name(on):
    bare = card(lacking={"enable_prompt_enhancement": "processor"})
    error = refused({"enable_prompt_enhancement": on}, card=bare)
    assert (error.status, error.param, error.code) == (400, "enable_prompt_enhancement", "unsupported_by_model")
    assert "'processor'" in error.message
    for off in (False, "false", None):
        made = resolve({"enable_prompt_enhancement": off}, card=bare)
        assert (made.drawing.request.extra, made.ignored) == ({}, ())
    whole = card(parameters={"enable_prompt_enhancement": "bool"})
    assert request({"enable_prompt_enhancement": on}, card=whole).extra == {"enable_prompt_enhancement": True}


def test_a_model_of_pictures_demands_one():
    error = refused({}, card=card(tasks=("I2V",)))
    assert (error.param, error.code) == ("input_reference", "missing_required_parameter")


def test_a_model_of_pictures_alone_sends_pictures_to_their_endpoint():
    error = refused({}, card=image_card())
    assert (error.param, error.code) == ("model", "unsupported_by_model")


def test_a_model_of_one_stage_refuses_two_and_says_what_it_lacks():
    for asked in (True, "true"):
        error = refused({"two_stages": asked})
        assert (error.param, error.code) == ("two_stages", "unsupported_by_model")
        assert "latent_upsampler" in error.message
    # Not asked for, that is what it does.
    for asked in (False, None):
        made = resolve({"two_stages": asked})
        assert (made.drawing.request.extra, made.ignored) == ({}, ())


def test_two_stages_are_the_default_that_the_card_says_unless_switched_off():
    able = card(parameters={"two_stages": "bool"}, defaults={"two_stages": True})
    assert request({}, card=able).extra == {"two_stages": True}
    assert request({"two_stages": "false"}, card=able).extra == {"two_stages": False}
    assert refused({"two_stages": "twice"}, card=able).param == "two_stages"


@pytest.mark.parametrize("start", ["redraw", "extend"])
def test_a_model_of_prompts_neither_draws_anew_nor_extends(start):
    error = refused({}, beginning=clip(start))
    assert (error.param, error.code) == ("video", "unsupported_by_model")


@pytest.mark.parametrize(
    ("tasks", "beginning", "task"),
    [
        (("T2V",), None, "T2V"),
        (("TI2V",), None, "TI2V"),
        (EVERYTHING, None, "T2V"),
        (EVERYTHING, picture(), "I2V"),
        (("TI2V",), picture(), "TI2V"),
        (EVERYTHING, clip(), "V2V"),
        (EVERYTHING, clip("extend"), "I2V"),
    ],
)
def test_the_task_follows_from_what_is_given(tasks, beginning, task):
    assert request({}, card=card(tasks=tasks), beginning=beginning).task == task


@pytest.mark.parametrize(("asked", "fits"), [("t2v", True), ("TI2V", True), ("i2v", False), ("t2i", False)])
def test_an_asked_task_is_checked(asked, fits):
    if fits:
        assert request({"task_type": asked}, card=card(tasks=EVERYTHING)).task == "T2V"
    else:
        assert refused({"task_type": asked}, card=card(tasks=EVERYTHING)).param == "task_type"


# --- with a picture or a clip -------------------------------------------------------------------------------------

ABLE = card(tasks=EVERYTHING)


def test_a_picture_is_the_first_frame_and_gives_its_aspect():
    made = request({}, card=ABLE, beginning=picture())
    assert made.images == ("/in/first.png",)
    assert made.video is None
    assert (made.width, made.height) == (80, 32)
    assert request({"size": "64x48"}, card=ABLE, beginning=picture()).width == 64


def test_a_clip_of_ours_is_drawn_anew_as_it_is():
    made = resolve({}, card=ABLE, beginning=clip(size=Size(100, 70), fps=8.0, video_id="video_1"))
    drawn, file = made.drawing.request, made.drawing.output
    assert (drawn.video, drawn.images, drawn.strength) == ("/in/clip.npy", (), REDRAW_STRENGTH)
    assert (drawn.width, drawn.height, drawn.num_frames, drawn.fps) == (112, 80, 33, 8)
    assert (file.width, file.height, file.fps) == (100, 70, 8)
    assert (file.continues, file.continues_sound) == (None, None)
    assert made.remixed_from == "video_1"


def test_another_clip_is_drawn_anew_in_its_aspect_at_the_models_rate():
    made = resolve({"strength": 0.4}, card=ABLE, beginning=clip(size=Size(1920, 960), num_frames=60, fps=30.0))
    drawn = made.drawing.request
    assert (drawn.width, drawn.height, drawn.num_frames, drawn.fps, drawn.strength) == (80, 32, 33, 16, 0.4)
    assert made.remixed_from is None


def test_a_clip_that_is_too_long_is_refused_and_its_beginning_can_be_asked_for():
    long = clip(num_frames=300, fps=30.0)
    error = refused({}, card=ABLE, beginning=long)
    assert error.param == "video"
    assert "send seconds to take its beginning" in error.message
    assert request({"seconds": 5}, card=ABLE, beginning=long).num_frames == 81
    assert refused({"seconds": 30}, card=ABLE, beginning=long).param == "seconds"


def test_an_extension_adds_what_is_asked_for_to_the_clip():
    made = resolve({"seconds": 2}, card=ABLE, beginning=clip("extend", fps=16.0, video_id="video_1"))
    drawn, file = made.drawing.request, made.drawing.output
    assert (drawn.images, drawn.video, drawn.num_frames) == (("/in/first.png",), None, 33)
    assert (file.continues, file.continues_sound) == ("/in/clip.npy", "/in/sound.npy")
    assert (made.length.earlier, made.length.num_frames, spoken(made.length.seconds)) == (33, 65, "4.06")


def test_an_extension_is_a_whole_with_its_clip():
    own = clip("extend", video_id="video_1")
    assert refused({"size": "64x48"}, card=ABLE, beginning=own).param == "size"
    assert refused({"fps": 24}, card=ABLE, beginning=own).param == "fps"
    assert resolve({"size": "192x128", "fps": 16}, card=ABLE, beginning=own).length.num_frames == 33 + 16
    other = resolve({"seconds": 1}, card=ABLE, beginning=clip("extend", num_frames=60, fps=30.0))
    assert (other.length.earlier, other.length.drawn, other.length.fps) == (32, 17, 16)


def test_an_extension_beyond_the_servers_bound_is_refused():
    error = refused({"seconds": 2}, card=ABLE, beginning=clip("extend", num_frames=100, video_id="v"), max_frames=120)
    assert error.param == "video"
    assert "--max-frames" in error.message


# --- pictures of a model of clips ---------------------------------------------------------------------------------


def test_a_model_of_clips_draws_a_picture_as_one_frame():
    call = Resolver(config=ServeConfig()).images({"prompt": "a cat", "n": 2}, card(), "ann")
    assert [drawing.request.num_frames for drawing in call.drawings] == [1, 1]
    assert {drawing.request.task for drawing in call.drawings} == {"T2V"}
    assert {drawing.output.format for drawing in call.drawings} == {"png"}


def test_a_model_of_clips_that_needs_a_picture_draws_none():
    with pytest.raises(RequestError) as refusal:
        Resolver(config=ServeConfig()).images({"prompt": "a cat"}, card(tasks=("I2V",)), "ann")
    assert refusal.value.code == "unsupported_task"
