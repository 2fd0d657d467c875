import numpy as np
import pytest

from photogram.core.errors import GenerationFailed
from photogram.core.messages import FrameBlock
from photogram.media import frames as frames_module
from photogram.media.frames import discard_frames, frames_of
from photogram.worker.frame_store import FrameStore

from .pictures import block, photo


def read(block, folder):
    with frames_of(block, folder) as frames:
        return frames.copy()


def test_frames_are_the_written_bytes_and_their_file_is_gone(tmp_path):
    picture = photo(40, 24)
    with frames_of(block(tmp_path, picture), tmp_path) as frames:
        assert frames.shape == (1, 24, 40, 3)
        assert np.array_equal(frames[0], picture)
        assert not frames.flags.writeable
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_change", [-1, 1])
def test_a_file_of_another_size_than_its_shape_is_refused_and_removed(tmp_path, size_change):
    (tmp_path / "job").write_bytes(bytes(2 * 3 * 4 * 3 + size_change))
    with pytest.raises(GenerationFailed, match="72"):
        read(FrameBlock(path=str(tmp_path / "job"), shape=(2, 3, 4, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0, 3, 4, 3), (1, -3, -4, 3), (1, 3, 4, 2), (1, 3, 4, 5)])
def test_a_shape_that_no_picture_has_is_refused_and_its_file_removed(tmp_path, shape):
    (tmp_path / "job").write_bytes(bytes(36))
    with pytest.raises(GenerationFailed, match="shape"):
        read(FrameBlock(path=str(tmp_path / "job"), shape=shape), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["{outside}/job", "{inside}/../outside/job", "{inside}", "{inside}/..", "job", ""])
def test_a_path_outside_the_folder_is_refused_and_left_alone(tmp_path, place):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "job").write_bytes(bytes(36))
    stray = FrameBlock(path=place.format(inside=inside, outside=outside), shape=(1, 3, 4, 3))
    with pytest.raises(GenerationFailed, match="not directly inside"):
        read(stray, inside)
    with pytest.raises(GenerationFailed, match="not directly inside"):
        discard_frames(stray, inside)
    assert (outside / "job").exists()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(36))
    (inside / "job").symlink_to(tmp_path / "secret")
    with pytest.raises(GenerationFailed):
        read(FrameBlock(path=str(inside / "job"), shape=(1, 3, 4, 3)), inside)
    assert (tmp_path / "secret").exists()
    assert list(inside.iterdir()) == []


def test_frames_that_are_gone_are_a_failed_generation(tmp_path):
    with pytest.raises(GenerationFailed, match="cannot be read"):
        read(FrameBlock(path=str(tmp_path / "job"), shape=(1, 3, 4, 3)), tmp_path)


def test_frames_may_be_discarded_twice(tmp_path):
    unwanted = block(tmp_path, photo(16, 16))
    discard_frames(unwanted, tmp_path)
    discard_frames(unwanted, tmp_path)
    assert list(tmp_path.iterdir()) == []


def clip(value):
    """Frames of a size whose files are used again."""
    return np.full((5, 512, 768, 3), value, np.uint8)


def test_large_frames_are_written_where_earlier_ones_were_read(tmp_path):
    store, other = FrameStore(str(tmp_path)), FrameStore(str(tmp_path))
    for number in range(4):
        # A worker that takes another one's place finds the file, too.
        written = (store if number < 2 else other).put(clip(number))
        assert np.array_equal(read(written, tmp_path), clip(number))
        assert len(list(tmp_path.iterdir())) == 1


def test_frames_that_are_being_read_are_not_written_over(tmp_path):
    store = FrameStore(str(tmp_path))
    with frames_of(store.put(clip(1)), tmp_path) as first:
        second = store.put(clip(2))
        assert np.array_equal(first, clip(1))
        assert np.array_equal(read(second, tmp_path), clip(2))


def test_frames_of_another_size_get_a_file_of_their_own(tmp_path):
    store = FrameStore(str(tmp_path))
    read(store.put(clip(1)), tmp_path)
    longer = np.concatenate([clip(2), clip(3)])
    assert np.array_equal(read(store.put(longer), tmp_path), longer)


def test_no_more_shared_memory_is_kept_than_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "_KEPT_BYTES", 2 * clip(0).nbytes)
    store = FrameStore(str(tmp_path))
    blocks = [store.put(clip(number)) for number in range(3)]
    for number, written in enumerate(blocks):
        assert np.array_equal(read(written, tmp_path), clip(number))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * clip(0).nbytes
    assert np.array_equal(read(store.put(clip(7)), tmp_path), clip(7))
    assert len(store._mapped) <= 2
