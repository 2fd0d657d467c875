"""Sound that goes on: what is heard of an extended clip, sample by sample."""

import numpy as np
import pytest

from photogram.media.sound import KEPT_RATE, Sound, continued


def tone(hertz, seconds, rate=KEPT_RATE, channels=2, loud=0.5):
    t = np.arange(round(seconds * rate)) / rate
    return Sound(np.stack([loud * np.sin(2 * np.pi * hertz * t)] * channels, axis=1).astype(np.float32), rate)


def pitch(samples):
    """The loudest frequency of a second or so, in hertz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * KEPT_RATE / len(samples)


@pytest.mark.parametrize(("rate", "channels"), [(24000, 2), (16000, 1), (KEPT_RATE, 2)])
def test_drawn_sound_of_any_form_follows_the_earlier_one_which_stays_as_it_is(rate, channels):
    earlier, drawn = tone(440, 1.0), tone(880, 1.0, rate, channels)
    heard = continued(earlier, drawn, 0.96)
    assert heard.rate == KEPT_RATE
    begins = round(0.96 * KEPT_RATE)
    assert (heard.samples[:begins] == earlier.samples[:begins]).all()
    assert heard.samples.shape == (pytest.approx(1.96 * KEPT_RATE, abs=2), 2)
    for channel in heard.samples.T:
        assert pitch(channel[:begins]) == pytest.approx(440, abs=2)
        assert pitch(channel[KEPT_RATE:]) == pytest.approx(880, abs=2)
        assert np.abs(channel[KEPT_RATE + 1000 :]).max() == pytest.approx(0.5, abs=0.02)


def test_where_both_are_heard_one_fades_into_the_other_without_a_click():
    earlier = Sound(np.full((KEPT_RATE, 2), 0.5, np.float32), KEPT_RATE)
    drawn = Sound(np.full((KEPT_RATE, 2), -0.5, np.float32), KEPT_RATE)
    heard = continued(earlier, drawn, 0.9).samples[:, 0]
    assert (heard[: round(0.9 * KEPT_RATE)] == 0.5).all()
    assert (heard[KEPT_RATE:] == -0.5).all()
    assert np.abs(np.diff(heard)).max() < 1e-3


def test_drawn_sound_after_a_silent_clip_keeps_its_rate_and_begins_with_its_frames():
    drawn = tone(440, 0.5, 24000, channels=1)
    heard = continued(None, drawn, 0.25)
    assert (heard.rate, heard.samples.shape) == (24000, (18000, 1))
    assert (heard.samples[:6000] == 0).all()
    assert (heard.samples[6000:] == drawn.samples).all()


def test_without_drawn_sound_the_earlier_one_stays():
    earlier = tone(440, 1.0)
    assert continued(earlier, None, 0.9) is earlier
    assert continued(None, None, 0.9) is None


def test_a_drawn_sound_shorter_than_what_both_share_leaves_the_rest_of_the_earlier_one():
    earlier = Sound(np.full((KEPT_RATE, 2), 0.5, np.float32), KEPT_RATE)
    heard = continued(earlier, Sound(np.zeros((480, 2), np.float32), KEPT_RATE), 0.5).samples
    assert len(heard) == KEPT_RATE
    assert (heard[KEPT_RATE // 2 + 480 :] == 0.5).all()
