"""Several clients of the OpenAI SDK at once, on the built-in model."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
from PIL import Image


def picture_of(item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))).convert("RGB")).astype(int)


def test_eight_clients_with_unequal_steps_all_get_their_picture_and_share_passes(live_server):
    def draw(number: int, **extra) -> np.ndarray:
        answer = live_server.client().images.generate(
            prompt=f"a {('red', 'blue', 'green', 'yellow')[number % 4]} circle",
            extra_body={"seed": number, "num_inference_steps": 4 + number} | extra,
        )
        return picture_of(answer.data[0])

    seen = len(live_server.batches())
    # Whether a batch pays is judged by the clock, which other programs on the machine may turn for a moment.
    for _ in range(3):
        with ThreadPoolExecutor(8) as clients:
            together = list(clients.map(draw, range(8)))
        if max(live_server.batches()[seen:]) > 1:
            break
    assert max(live_server.batches()[seen:]) > 1, "no two jobs shared a forward pass"
    for number, picture in enumerate(together):
        alone = draw(number, deterministic=True)
        assert np.abs(picture - alone).max() <= 2, f"client {number} got another picture than it gets alone"


def test_n_pictures_are_n_seeds_and_each_can_be_made_again(live_server):
    client = live_server.client()
    answer = client.images.generate(prompt="a blue star", n=4, extra_body={"seed": 40})
    assert [item.seed for item in answer.data] == [40, 41, 42, 43]
    again = client.images.generate(prompt="a blue star", extra_body={"seed": 42})
    assert np.abs(picture_of(answer.data[2]) - picture_of(again.data[0])).max() <= 2


def test_partial_pictures_of_the_trained_model_approach_the_final_one(live_server):
    events = list(
        live_server.client().images.generate(
            prompt="a green triangle on a yellow background",
            stream=True,
            partial_images=3,
            extra_body={"seed": 1, "num_inference_steps": 8},
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    final = picture_of(events[-1])
    distances = [np.abs(picture_of(event) - final).mean() for event in events[:-1]]
    assert distances == sorted(distances, reverse=True)
    without = live_server.client().images.generate(
        prompt="a green triangle on a yellow background", extra_body={"seed": 1, "num_inference_steps": 8}
    )
    assert (picture_of(without.data[0]) == final).all()


def test_a_client_that_leaves_does_not_hold_up_the_others(live_server):
    impatient = live_server.client(timeout=0.3, max_retries=0)
    for _ in range(10):
        try:
            impatient.images.generate(prompt="a red circle", extra_body={"num_inference_steps": 200})
        except openai.APITimeoutError:
            pass
    answer = live_server.client(timeout=60).images.generate(prompt="a red circle")
    assert len(answer.data) == 1
