"""Prompts longer than an encoder reads are never cut in silence."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from photogram.core.messages import Finished
from photogram.worker.long_prompts import read_in_chunks

from .drawing import Studio, draw_alone
from .test_families_served import PROMPTS, requests_of

LONG = "a red circle above a blue square beside a green star under a yellow moon " * 8


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "stable-diffusion-xl"])
def test_the_end_of_a_long_prompt_is_read(name, family_folder, tmp_path):
    studio = Studio(family_folder(name), tmp_path)
    base = requests_of(name)[0]
    changes = {field: getattr(base, field) for field in base.__struct_fields__}
    drawn = studio.draw(
        [
            type(base)(**(changes | {"job_id": "cats", "prompt": LONG + "cat cat cat"})),
            type(base)(**(changes | {"job_id": "dogs", "prompt": LONG + "flower flower flower"})),
        ]
    )
    assert (drawn["cats"].frames != drawn["dogs"].frames).any()
    assert all(not message.warnings for message in studio.messages if isinstance(message, Finished))
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    cut = [
        draw_alone(plain, type(base)(**(changes | {"prompt": LONG + end}))).frames for end in ("cat cat cat", "flower")
    ]
    assert (cut[0] == cut[1]).all(), "the unmodified pipeline should cut both alike"


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "stable-diffusion-xl"])
def test_chunks_are_the_encodings_of_their_texts_joined(name, family_folder):
    plain = DiffusionPipeline.from_pretrained(family_folder(name))
    chunked = DiffusionPipeline.from_pretrained(family_folder(name))
    read_in_chunks(chunked)
    room = plain.tokenizer.model_max_length - 2
    word = len(plain.tokenizer("cat", add_special_tokens=False).input_ids)
    first, second = " ".join(["cat"] * (room // word)), "dog"
    with torch.inference_mode():
        arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        joined = chunked.encode_prompt(prompt=f"{first} {second}", **arguments)[0]
        parts = [plain.encode_prompt(prompt=text, **arguments)[0] for text in (first, second)]
    assert joined.shape[1] == 2 * plain.tokenizer.model_max_length
    np.testing.assert_array_equal(joined.numpy(), torch.cat(parts, dim=1).numpy())


def test_elsewhere_the_answer_says_how_much_was_read(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    base = requests_of("flux-1")[0]
    changes = {field: getattr(base, field) for field in base.__struct_fields__}
    extra = base.extra | {"max_sequence_length": 128}
    studio.draw([type(base)(**(changes | {"prompt": LONG * 10, "extra": extra}))])
    (finished,) = [message for message in studio.messages if isinstance(message, Finished)]
    assert "reads the first 128" in finished.warnings[0]
    studio.draw([type(base)(**(changes | {"prompt": PROMPTS[0], "extra": extra}))])
    (finished,) = [message for message in studio.messages if isinstance(message, Finished)]
    assert finished.warnings == ()
    assert finished.prompt_tokens > 0
