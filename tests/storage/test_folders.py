"""Folders are on the disk before anything is said to lie in them."""

import os
import stat

import pytest

from photogram.storage.folders import make_folder


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The folders that were brought to the disk, in order."""
    real, seen = os.fsync, []

    def fsync(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_each_new_folder_is_private_and_on_the_disk_in_its_parent(tmp_path, synced):
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {0o700}


def test_a_folder_that_is_there_costs_no_wait_for_the_disk(tmp_path, synced):
    make_folder(tmp_path)
    assert synced == []


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError):
        make_folder(tmp_path / "a" / "b")
