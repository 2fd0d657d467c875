import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photogram.core.errors import RequestError
from photogram.media.quality import resolve_quality


@pytest.mark.parametrize(
    ("word", "media", "number"),
    [
        ("maximum", "image", 100),
        ("high", "image", 90),
        ("medium", "video", 55),
        ("low", "video", 35),
        ("default", "image", 75),
        ("default", "video", 50),
        (None, "image", 75),
        (None, "video", 50),
    ],
)
def test_each_preset_has_its_number(word, media, number):
    assert resolve_quality(word, None, media) == number


@given(number=st.integers(0, 100), word=st.sampled_from([None, "maximum", "low", "default"]))
def test_compression_wins_over_the_preset_as_number_and_as_form_text(number, word):
    assert resolve_quality(word, number) == number
    assert resolve_quality(word, str(number)) == number


@pytest.mark.parametrize(
    "value", [-1, 101, 10**30, True, False, 50.0, math.nan, math.inf, "", " 5", "5.0", "-1", "101", "٣", "high", [], {}]
)
def test_anything_but_a_whole_number_from_0_to_100_is_refused_by_name(value):
    with pytest.raises(RequestError, match="whole number from 0") as refused:
        resolve_quality(None, value)
    assert refused.value.param == "output_compression"
    assert refused.value.status == 400


@pytest.mark.parametrize("word", ["", "HIGH", "best", "hd", 90, True, ["high"]])
@pytest.mark.parametrize("compression", [None, 50])
def test_an_unknown_word_is_refused_by_name_even_where_compression_is_given(word, compression):
    with pytest.raises(RequestError, match="maximum, high, medium, low, default") as refused:
        resolve_quality(word, compression)
    assert refused.value.param == "output_quality"


def test_a_huge_wrong_value_is_not_repeated_in_full():
    with pytest.raises(RequestError) as refused:
        resolve_quality("x" * 10_000, None)
    assert len(refused.value.message) < 200
