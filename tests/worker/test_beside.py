"""Work beside the loop: in what order it sees what the loop does, and jobs whose encoders and decoders run there."""

import threading
import weakref
from contextlib import contextmanager
from functools import partial

import msgspec
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.video_processor import VideoProcessor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from photogram.core.config import ServeConfig
from photogram.core.errors import GenerationFailed
from photogram.core.messages import Finished, Preview
from photogram.worker.arguments import to_frames
from photogram.worker.beside import AtOnce, Lane, Shared, tensors_in
from photogram.worker.loading import goes_beside
from photogram.worker.modules import twin_of

from .drawing import Studio
from .test_families_served import requests_of

PATIENCE_S = 60


class LazyDevice:
    """A device that does nothing before somebody waits for it: what is launched by the loop is a list of writes."""

    def __init__(self) -> None:
        self.launched = []
        self.num_done = 0
        self.taken_over = []

    def mark(self):
        return len(self.launched)

    @contextmanager
    def after(self, mark):
        for write in self.launched[self.num_done : mark]:
            write()
        self.num_done = max(self.num_done, mark)
        yield

    def take_over(self, result):
        self.taken_over.append(result)


def test_work_sees_what_was_launched_before_it_was_handed_over_and_nothing_after():
    device, written, go = LazyDevice(), [], threading.Event()
    lane = Lane(device, lambda: None, "test")
    blocking = []
    lane.begin(lambda: go.wait(PATIENCE_S), lambda future: blocking.append(future.result()))
    device.launched.append(lambda: written.append("before"))
    seen = []
    lane.begin(lambda: list(written), lambda future: seen.append(future.result()))
    device.launched.append(lambda: written.append("after"))
    go.set()
    assert lane.take(wait=True)
    assert blocking == [True]
    assert seen == [["before"]]


def test_a_result_is_the_loops_before_the_loop_gets_it_and_what_work_reads_is_kept_until_then():
    class Read:
        pass

    device, order = LazyDevice(), []
    device.take_over = lambda result: order.append(("taken over", result, kept() is not None))
    lane = Lane(device, lambda: None, "test")
    read = Read()
    kept = weakref.ref(read)
    lane.begin(lambda read=read: "result", lambda future: order.append(("then", future.result())))
    del read
    assert lane.is_busy
    assert lane.take(wait=True)
    assert order == [("taken over", "result", True), ("then", "result")]
    assert not lane.is_busy
    assert not lane.take()


def test_the_loop_is_woken_by_every_result_and_gets_a_failure_as_it_was_raised():
    woken = threading.Event()
    lane = Lane(LazyDevice(), woken.set, "test")
    errors = []
    lane.begin(lambda: 1 / 0, lambda future: errors.append(future.exception()))
    assert woken.wait(PATIENCE_S)
    assert lane.take()
    assert isinstance(errors[0], ZeroDivisionError)
    at_once = AtOnce()
    at_once.begin(lambda: 1 / 0, lambda future: errors.append(future.exception()))
    assert isinstance(errors[1], ZeroDivisionError)
    assert not at_once.is_busy
    assert not at_once.take(wait=True)


def test_what_is_set_for_the_process_stays_set_until_the_last_thread_is_out():
    state, first_is_in, second_is_out = [], threading.Event(), threading.Event()

    @contextmanager
    def setting():
        state.append("set")
        yield
        state.append("put back")

    shared = Shared(setting)

    def first():
        with shared():
            first_is_in.set()
            assert second_is_out.wait(PATIENCE_S)
            state.append("first still inside")

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(PATIENCE_S)
    with shared():
        pass
    second_is_out.set()
    thread.join(PATIENCE_S)
    assert state == ["set", "first still inside", "put back"]
    with shared():
        assert state[-1] == "set"


def test_every_tensor_of_what_networks_return_is_found():
    tensors = [torch.zeros(1) for _ in range(7)]
    moments = torch.zeros(1, 8, 2, 2)
    distribution = DiagonalGaussianDistribution(moments)
    assert any(tensor is moments for tensor in tensors_in(AutoencoderKLOutput(latent_dist=distribution)))
    cache = DynamicCache()
    keys, values = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    cache.update(keys, values, 0)
    output = BaseModelOutputWithPast(last_hidden_state=tensors[0], past_key_values=cache, hidden_states=(tensors[1],))
    found = list(tensors_in([output, {"more": tensors[2:]}]))
    assert all(any(tensor is one for one in found) for tensor in tensors)
    stored = {tensor.data_ptr() for tensor in found}
    assert {layer.keys.data_ptr() for layer in cache.layers} <= stored
    assert {layer.values.data_ptr() for layer in cache.layers} <= stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_bytes_are_those_of_diffusers_own_way_to_pictures(dtype, num_frames, monkeypatch):
    """Also where the frames are converted in several parts."""
    monkeypatch.setattr("photogram.worker.arguments._PIXELS_AT_ONCE", 2 * 24 * 16)
    generator = torch.Generator().manual_seed(0)
    decoded = torch.randn(1, 3, num_frames, 24, 16, generator=generator).to(dtype)
    if num_frames == 1:
        processor, decoded = VaeImageProcessor(), decoded[:, :, 0]
        own = [np.asarray(picture) for picture in processor.postprocess(decoded, output_type="pil")]
        drawn = processor.postprocess(decoded, output_type="pt")
    else:
        processor = VideoProcessor()
        own = [np.asarray(picture) for picture in processor.postprocess_video(decoded, output_type="pil")[0]]
        drawn = processor.postprocess_video(decoded, output_type="pt")
    np.testing.assert_array_equal(to_frames((drawn,)), np.stack(own))


def test_a_clip_with_one_pixel_that_is_no_number_is_refused():
    frames = torch.rand(1, 5, 3, 8, 8)
    frames[0, 4, 2, 7, 7] = float("nan")
    with pytest.raises(GenerationFailed, match="not a number"):
        to_frames((frames,))


def test_a_side_stream_is_for_gpus_but_where_it_is_asked_for(tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def beside(device, **settings):
        return goes_beside(ServeConfig(**settings).worker(tmp_path), device)

    assert [beside(cpu), beside(gpu)] == [False, True]
    assert [beside(cpu, side_stream=True), beside(gpu, side_stream=False)] == [True, False]


# --- jobs


class Beside:
    """A studio with a second thread for one network. Both sorts of jobs have run: their prices are known.

    For one only: how far jobs are when another call comes would hang on how fast the thread is.
    """

    def __init__(self, folder, tmp_path, name: str, network: str = "vae") -> None:
        self.studio = Studio(folder, tmp_path, max_batch_size=1, prompt_cache_mb=0, side_stream=True)
        for module in self.studio.served.modules.values():
            module.may_be_beside = module.name == network
        short, long = requests_of(name)[:2]
        self.short = msgspec.structs.replace(short, job_id="short", num_inference_steps=2)
        self.long = msgspec.structs.replace(long, job_id="long", num_inference_steps=30)
        self.alone = {one.job_id: self.studio.draw([one])[one.job_id].frames for one in (self.short, self.long)}
        self.network = self.studio.served.modules[network]
        self.denoiser = next(module for module in self.studio.served.modules.values() if module.is_denoiser)

    def draw(self, meanwhile=lambda turn: None):
        """Draw the long job, and the short one from when that has made two steps."""
        worker, came = self.studio.worker, []

        def turned(turn: int) -> None:
            if not came and worker.jobs["long"].watch.steps_done >= 2:
                came.append(turn)
                worker.submit(self.short)
            meanwhile(turn)

        return self.studio.draw([self.long], turned)

    def replace(self, method: str, instead) -> None:
        self.network.real[method] = partial(instead, self.network.real[method])
        if self.network.twin is not None:
            setattr(self.network.twin, method, partial(instead, getattr(self.network.twin, method)))

    def replace_denoiser(self, instead) -> None:
        self.denoiser.real["forward"] = partial(instead, self.denoiser.real["forward"])


@pytest.fixture(autouse=True)
def _every_length_is_worth_it(monkeypatch):
    monkeypatch.setattr("photogram.scheduler.scheduler.WORTHWHILE_LENGTH", 0.0)


@pytest.fixture
def beside(family_folder, tmp_path):
    return Beside(family_folder("flux-2-klein"), tmp_path, "flux-2-klein")


def in_the_loop() -> bool:
    return threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "flux-2-klein", "wan-2.1", "ltx-2"])
def test_jobs_drawn_beside_each_other_have_the_bits_of_each_alone(name, family_folder, tmp_path):
    beside = Beside(family_folder(name), tmp_path, name)
    threads = []

    def noted(real, *args, **kwargs):
        threads.append(in_the_loop())
        return real(*args, **kwargs)

    beside.replace("decode", noted)
    drawn = beside.draw()
    for job_id, alone in beside.alone.items():
        assert drawn[job_id].failure is None
        np.testing.assert_array_equal(drawn[job_id].frames, alone)
    assert sorted(threads) == [False, True], "the first decode is beside the long job's steps, the last is alone"


def test_steps_of_other_jobs_go_on_while_one_is_decoded(beside):
    steps, decoding, enough = [], threading.Event(), threading.Event()

    def step(real, *args, **kwargs):
        if decoding.is_set():
            steps.append(1)
            if len(steps) == 5:
                enough.set()
        return real(*args, **kwargs)

    def decode(real, *args, **kwargs):
        decoding.set()
        assert enough.wait(PATIENCE_S), "no step was made meanwhile"
        return real(*args, **kwargs)

    beside.replace_denoiser(step)
    beside.replace("decode", decode)
    drawn = beside.draw()
    assert (drawn["short"].frames == beside.alone["short"]).all()
    assert (drawn["long"].frames == beside.alone["long"]).all()


@pytest.mark.parametrize(
    ("name", "encoder"), [("flux-2-klein", "text_encoder"), ("stable-diffusion-xl", "text_encoder_2")]
)
def test_steps_of_other_jobs_go_on_while_a_prompt_is_encoded(name, encoder, family_folder, tmp_path):
    """Also where LoRAs can change the encoder, which has no twin then."""
    beside = Beside(family_folder(name), tmp_path, name, encoder)
    steps, encoding, enough = [], threading.Event(), threading.Event()

    def step(real, *args, **kwargs):
        if encoding.is_set():
            steps.append(1)
            if len(steps) == 5:
                enough.set()
        return real(*args, **kwargs)

    def encode(real, *args, **kwargs):
        if not in_the_loop():
            encoding.set()
            assert enough.wait(PATIENCE_S), "no step was made meanwhile"
        return real(*args, **kwargs)

    beside.replace_denoiser(step)
    beside.replace("forward", encode)
    drawn = beside.draw()
    assert encoding.is_set()
    assert (drawn["short"].frames == beside.alone["short"]).all()
    assert (drawn["long"].frames == beside.alone["long"]).all()


def test_a_job_cancelled_while_it_is_decoded_is_heard_of_no_more_and_costs_the_others_nothing(beside):
    decoding, cancelled = threading.Event(), threading.Event()

    def decode(real, *args, **kwargs):
        if not in_the_loop():
            decoding.set()
            assert cancelled.wait(PATIENCE_S)
        return real(*args, **kwargs)

    def cancel(turn: int) -> None:
        if decoding.is_set() and not cancelled.is_set():
            beside.studio.worker.cancel("short")
            cancelled.set()

    beside.replace("decode", decode)
    drawn = beside.draw(meanwhile=cancel)
    assert cancelled.is_set()
    assert drawn["short"].failure.code == "cancelled"
    assert drawn["short"].frames is None
    assert (drawn["long"].frames == beside.alone["long"]).all()
    assert not beside.studio.worker.jobs


def test_what_has_no_room_beside_others_is_run_again_by_itself_and_not_tried_twice(beside):
    threads = []

    def decode(real, *args, **kwargs):
        threads.append(in_the_loop())
        if not in_the_loop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    beside.replace("decode", decode)
    for expected in ([False, True, True], [True, True]):
        threads.clear()
        drawn = beside.draw()
        assert threads == expected
        assert (drawn["short"].frames == beside.alone["short"]).all()
        assert (drawn["long"].frames == beside.alone["long"]).all()


def test_a_step_that_has_no_room_beside_a_decoder_is_made_again_when_that_is_done(beside):
    decoding, failed = threading.Event(), threading.Event()

    def step(real, *args, **kwargs):
        if decoding.is_set() and not failed.is_set():
            failed.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    def decode(real, *args, **kwargs):
        if not in_the_loop():
            decoding.set()
            assert failed.wait(PATIENCE_S)
        return real(*args, **kwargs)

    beside.replace_denoiser(step)
    beside.replace("decode", decode)
    drawn = beside.draw()
    assert failed.is_set()
    assert drawn["long"].failure is None
    assert (drawn["long"].frames == beside.alone["long"]).all()
    assert (drawn["short"].frames == beside.alone["short"]).all()


def test_a_decoder_that_fails_beside_others_fails_its_own_job(beside):
    def decode(real, *args, **kwargs):
        if not in_the_loop():
            raise RuntimeError("a layer is missing")
        return real(*args, **kwargs)

    beside.replace("decode", decode)
    drawn = beside.draw()
    assert drawn["short"].failure.code == "generation_failed"
    assert (drawn["long"].frames == beside.alone["long"]).all()


@pytest.mark.parametrize("has_twin", [True, False])
def test_partial_pictures_come_before_the_end_and_no_network_is_in_two_calls_at_once(has_twin, beside):
    inside, overlaps = set(), []

    def decode(real, *args, **kwargs):
        network = real.__self__
        overlaps.append(id(network) in inside)
        inside.add(id(network))
        try:
            return real(*args, **kwargs)
        finally:
            inside.discard(id(network))

    if not has_twin:
        beside.network.twin = None
    beside.replace("decode", decode)
    beside.long = msgspec.structs.replace(beside.long, partial_images=3)
    drawn = beside.draw()
    assert len(drawn["long"].previews) == 3
    assert not any(overlaps)
    assert (drawn["long"].frames == beside.alone["long"]).all()
    assert (drawn["short"].frames == beside.alone["short"]).all()
    ends = [message for message in beside.studio.messages if isinstance(message, Preview | Finished)]
    assert [type(message) for message in ends if message.job_id == "long"] == [Preview] * 3 + [Finished]


def test_a_twin_has_the_weights_of_its_network_and_state_of_its_own(beside):
    vae, twin = beside.network.module, beside.network.twin
    assert twin is not vae
    assert all(one is other for one, other in zip(vae.parameters(), twin.parameters(), strict=True))
    assert all(one is other for one, other in zip(vae.buffers(), twin.buffers(), strict=True))
    assert not any(one is other for one, other in zip(vae.modules(), twin.modules(), strict=True))


def test_a_network_of_which_parts_are_compiled_has_no_twin():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert twin_of(network) is not None
    network[1].compile()
    assert twin_of(network) is None


def test_networks_whose_weights_loras_change_have_no_twin_and_denoisers_are_never_beside(family_folder, tmp_path):
    modules = Studio(family_folder("stable-diffusion-xl"), tmp_path, side_stream=True).served.modules
    assert {name for name, module in modules.items() if module.may_be_beside} == {
        "vae", "text_encoder", "text_encoder_2"
    }  # fmt: skip
    assert {name for name, module in modules.items() if module.twin is not None} == {"vae"}
