"""Sound as samples: brought to another rate, and one after another.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import av
import numpy as np
import numpy.typing as npt
from av.audio.resampler import AudioResampler

KEPT_RATE, KEPT_CHANNELS = 48_000, 2
"""How the sound of a client's clip is kept, whatever it was: samples a second, and channels."""

# S samples, C channels
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sound:
    """`samples` are 32-bit floats from -1 to 1, shape (samples, channels), 1 or 2 channels; `rate` a second."""

    samples: Samples
    rate: int


class Keeper:
    """Brings the frames of one sound to the kept form, in order."""

    def __init__(self, num_channels: int) -> None:
        # From one channel to two FFmpeg would make it softer.
        layout = "mono" if num_channels == 1 else "stereo"
        self._resampler = AudioResampler(format="fltp", layout=layout, rate=KEPT_RATE)

    def taken(self, frame: av.AudioFrame | None) -> Iterator[tuple[Fraction | None, Samples]]:
        """Yield what a frame, or at the end None, makes ready: its time in seconds, and samples (S, 2)."""
        for piece in self._resampler.resample(frame):
            begins = None if piece.pts is None or piece.time_base is None else piece.pts * piece.time_base
            samples_SC = np.asarray(piece.to_ndarray(), np.float32).T
            yield begins, np.broadcast_to(samples_SC, (len(samples_SC), KEPT_CHANNELS))


def continued(earlier: Sound | None, drawn: Sound | None, begins_s: float) -> Sound | None:
    """Return what is heard of a clip that goes on: the earlier sound, and from `begins_s` on the drawn one.

    Where both are, the one fades into the other. None where neither part has any. `earlier` is in the kept form;
    without it the drawn sound comes after silence, at its own rate.
    """
    if drawn is None:
        return earlier
    if earlier is None:
        silence = np.zeros((round(begins_s * drawn.rate), drawn.samples.shape[1]), np.float32)
        return Sound(np.concatenate([silence, drawn.samples]), drawn.rate)
    begins, later_SC = round(begins_s * KEPT_RATE), _kept(drawn)
    heard_SC = np.zeros((max(len(earlier.samples), begins + len(later_SC)), KEPT_CHANNELS), np.float32)
    heard_SC[: len(earlier.samples)] = earlier.samples
    shared = max(0, min(len(earlier.samples) - begins, len(later_SC)))
    rising_S1 = np.linspace(0, 1, shared, dtype=np.float32)[:, None]
    heard_SC[begins : begins + shared] *= 1 - rising_S1
    later_SC[:shared] *= rising_S1
    heard_SC[begins : begins + len(later_SC)] += later_SC
    return Sound(heard_SC, KEPT_RATE)


def _kept(sound: Sound) -> Samples:
    """Return a sound's samples in the kept form, as an array of their own."""
    layout = "mono" if sound.samples.shape[1] == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.samples.T), format="fltp", layout=layout)
    frame.sample_rate = sound.rate
    keeper = Keeper(sound.samples.shape[1])
    pieces = [samples_SC for _, samples_SC in chain(keeper.taken(frame), keeper.taken(None))]
    return np.concatenate([np.zeros((0, KEPT_CHANNELS), np.float32), *pieces])
