import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photogram.media.fit import fit

from .pictures import photo


def test_equal_sizes_come_back_as_the_same_array():
    picture = photo(64, 48)
    assert fit(picture, 64, 48) is picture


@pytest.mark.parametrize(
    ("drawn", "asked", "left", "top"),
    [
        ((1280, 736), (1280, 720), 0, 8),
        ((64, 64), (50, 40), 7, 12),
        ((64, 64), (63, 61), 0, 1),
    ],
)
def test_a_drawing_that_covers_the_size_is_cropped_evenly_with_its_pixels_untouched(drawn, asked, left, top):
    picture = photo(*drawn)
    expected = picture[top : top + asked[1], left : left + asked[0]]
    assert np.array_equal(fit(picture, *asked), expected)


def test_a_smaller_drawing_of_the_same_aspect_is_enlarged_whole():
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    large = fit(ramp, 1024, 1024)
    assert large.shape == (1024, 1024, 3)
    expected = np.interp((np.arange(1024) + 0.5) / 4 - 0.5, np.arange(256), np.linspace(0, 255, 256))
    assert np.abs(large[512, :, 0] - expected).max() <= 2


def test_enlarging_keeps_the_aspect_and_cuts_both_sides_alike():
    picture = np.zeros((192, 352, 3), np.uint8)
    picture[:, 175:177] = 255  # the middle
    large = fit(picture, 1280, 720)
    assert large.shape == (720, 1280, 3)
    bright = np.flatnonzero(large[360, :, 0] > 127)
    assert (bright.min() + bright.max()) / 2 == pytest.approx(639.5)
    assert len(bright) == pytest.approx(2 * 3.75, abs=1)  # 720 / 192


def test_a_flat_colour_stays_exactly_that_colour_with_alpha():
    picture = np.full((20, 30, 4), (10, 20, 30, 255), np.uint8)
    assert np.array_equal(fit(picture, 100, 100), np.full((100, 100, 4), (10, 20, 30, 255), np.uint8))


side = st.integers(16, 90)


@settings(max_examples=150, deadline=None)
@given(drawn_width=side, drawn_height=side, width=side, height=side)
def test_the_size_is_always_exactly_the_one_asked_for(drawn_width, drawn_height, width, height):
    assert fit(np.zeros((drawn_height, drawn_width, 3), np.uint8), width, height).shape == (height, width, 3)
