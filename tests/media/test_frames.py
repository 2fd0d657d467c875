import numpy as np
import pytest

from photogram.core.errors import GenerationFailed
from photogram.core.messages import FrameBlock
from photogram.media.frames import discard_frames, take_frames

from .pictures import block, photo


def test_frames_are_the_written_bytes_and_their_file_is_gone(tmp_path):
    picture = photo(40, 24)
    taken = take_frames(block(tmp_path, picture), tmp_path)
    assert taken.shape == (1, 24, 40, 3)
    assert np.array_equal(taken[0], picture)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_change", [-1, 1])
def test_a_file_of_another_size_than_its_shape_is_refused_and_removed(tmp_path, size_change):
    (tmp_path / "job").write_bytes(bytes(2 * 3 * 4 * 3 + size_change))
    with pytest.raises(GenerationFailed, match="72"):
        take_frames(FrameBlock(path=str(tmp_path / "job"), shape=(2, 3, 4, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 3, 4, 3), (1, -3, -4, 3), (1, 3, 4, 2), (1, 3, 4, 5)])
def test_a_shape_that_no_picture_has_is_refused_and_its_file_removed(tmp_path, shape):
    (tmp_path / "job").write_bytes(bytes(36))
    with pytest.raises(GenerationFailed, match="shape"):
        take_frames(FrameBlock(path=str(tmp_path / "job"), shape=shape), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["{outside}/job", "{inside}/../outside/job", "{inside}", "{inside}/..", "job", ""])
def test_a_path_outside_the_folder_is_refused_and_left_alone(tmp_path, place):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "job").write_bytes(bytes(36))
    stray = FrameBlock(path=place.format(inside=inside, outside=outside), shape=(1, 3, 4, 3))
    with pytest.raises(GenerationFailed, match="not directly inside"):
        take_frames(stray, inside)
    with pytest.raises(GenerationFailed, match="not directly inside"):
        discard_frames(stray, inside)
    assert (outside / "job").exists()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(36))
    (inside / "job").symlink_to(tmp_path / "secret")
    with pytest.raises(GenerationFailed):
        take_frames(FrameBlock(path=str(inside / "job"), shape=(1, 3, 4, 3)), inside)
    assert (tmp_path / "secret").exists()
    assert list(inside.iterdir()) == []


def test_frames_that_are_gone_are_a_failed_generation(tmp_path):
    with pytest.raises(GenerationFailed, match="cannot be read"):
        take_frames(FrameBlock(path=str(tmp_path / "job"), shape=(1, 3, 4, 3)), tmp_path)


def test_frames_may_be_discarded_twice(tmp_path):
    unwanted = block(tmp_path, photo(16, 16))
    discard_frames(unwanted, tmp_path)
    discard_frames(unwanted, tmp_path)
    assert list(tmp_path.iterdir()) == []
