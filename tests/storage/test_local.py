import asyncio
import errno
import os
import re
import shutil
import subprocess

import pytest

from photogram.core.errors import ConfigError, NotFound, StorageFailed
from photogram.storage import check_key, file_key
from photogram.storage import local as local_module
from photogram.storage.local import LocalStorage

KEY = "img_0123456789abcdef0123456789abcdef.png"
OTHER = "img_f123456789abcdef0123456789abcdef.png"


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def read_all(storage, key, start=0, end=None):
    return b"".join([chunk async for chunk in storage.read(key, start, end)])


def test_a_file_is_kept_in_one_of_many_folders_and_read_back_by_a_later_server(tmp_path):
    async def story():
        await LocalStorage(tmp_path).put(KEY, b"picture", "image/png")
        later = LocalStorage(tmp_path)
        return await later.size(KEY), await read_all(later, KEY), later.local_path(KEY)

    size, data, path = asyncio.run(story())
    assert (size, data, path.read_bytes()) == (7, b"picture", b"picture")
    assert files(tmp_path) == [f"01/{KEY}"]


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (0, 0), (5, 5), (1, 2), (300_000, None), (255_999, 600_001), (0, 10**9), (10**9, None)],
)
def test_ranges_are_those_of_the_bytes(tmp_path, start, end):
    data = os.urandom(700_000)

    async def story():
        storage = LocalStorage(tmp_path)
        await storage.put(KEY, data, "image/png")
        return await read_all(storage, KEY, start, end)

    assert asyncio.run(story()) == data[start:end]


def test_a_missing_file_is_not_found_and_may_be_deleted(tmp_path):
    async def story():
        storage = LocalStorage(tmp_path)
        with pytest.raises(NotFound):
            await storage.size(KEY)
        with pytest.raises(NotFound):
            await read_all(storage, KEY)
        await storage.delete(KEY)
        await storage.put(KEY, b"x", "image/png")
        await storage.delete(KEY)
        await storage.delete(KEY)
        with pytest.raises(NotFound):
            await storage.size(KEY)

    asyncio.run(story())
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a.png",
        KEY + "\n",
        KEY.upper(),
        "img_..",
        KEY + "\0",
        "é" + KEY,
        KEY[:-4],
        "img_" + "0" * 31 + ".png",
        "img_" + "0" * 33 + ".png",
        "x/" + KEY,
        KEY.replace("_", "/"),
    ],
)
def test_a_string_that_is_no_key_never_becomes_a_path(tmp_path, key):
    async def story():
        storage = LocalStorage(tmp_path)
        for operation in (storage.put(key, b"x", "image/png"), storage.size(key), storage.delete(key)):
            with pytest.raises(StorageFailed, match="file key"):
                await operation
        with pytest.raises(StorageFailed, match="file key"):
            await read_all(storage, key)
        with pytest.raises(StorageFailed, match="file key"):
            storage.local_path(key)

    asyncio.run(story())
    assert files(tmp_path) == []


def test_keys_are_made_from_ids():
    assert file_key("img_0123456789abcdef0123456789abcdef", "png") == KEY
    assert check_key(KEY) == KEY


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "sync_folder"])
def test_a_full_disk_at_any_point_is_a_storage_failure_that_leaves_nothing(tmp_path, monkeypatch, failing):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*arguments):
        raise full

    class FullFile:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise full

    async def story():
        storage = LocalStorage(tmp_path)
        await storage.put(OTHER, b"old", "image/png")
        with monkeypatch.context() as patch:
            if failing == "write":
                fdopen = os.fdopen
                patch.setattr(os, "fdopen", lambda *arguments: FullFile(fdopen(*arguments)))
            elif failing == "sync_folder":
                patch.setattr(local_module, "sync_folder", fail)
            else:
                patch.setattr(os, failing, fail)
            with pytest.raises(StorageFailed, match="No space left"):
                await storage.put(KEY, b"x" * 1000, "image/png")
        assert files(tmp_path) == [f"f1/{OTHER}"]
        await storage.put(KEY, b"space again", "image/png")
        return await read_all(storage, KEY)

    assert asyncio.run(story()) == b"space again"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_a_really_full_disk_is_survived(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:

        async def story():
            storage = LocalStorage(tmp_path)
            await storage.put(KEY, b"small", "image/png")
            with pytest.raises(StorageFailed, match="No space left"):
                await storage.put(OTHER, bytes(1 << 20), "image/png")
            assert files(tmp_path) == [f"01/{KEY}"]
            await storage.check_writable()
            await storage.put(OTHER, b"fits", "image/png")
            return await read_all(storage, OTHER)

        assert asyncio.run(story()) == b"fits"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_is_replaced_in_one_step_and_kept_when_its_replacement_fails(tmp_path, monkeypatch):
    async def story():
        storage = LocalStorage(tmp_path)
        await storage.put(KEY, b"first", "image/png")
        await storage.put(KEY, b"second", "image/png")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
            with pytest.raises(StorageFailed):
                await storage.put(KEY, b"third", "image/png")
        return await read_all(storage, KEY)

    assert asyncio.run(story()) == b"second"
    assert files(tmp_path) == [f"01/{KEY}"]


def test_what_a_crash_left_half_written_is_removed_at_the_next_start(tmp_path):
    LocalStorage(tmp_path)
    (tmp_path / ".partial" / f"{KEY}.1234abcd").write_bytes(b"half")
    LocalStorage(tmp_path)
    assert files(tmp_path) == []


def test_a_folder_that_is_gone_is_reported_by_the_check_and_by_put(tmp_path):
    async def story():
        storage = LocalStorage(tmp_path / "files")
        await storage.check_writable()
        shutil.rmtree(tmp_path / "files")
        with pytest.raises(StorageFailed):
            await storage.check_writable()
        with pytest.raises(StorageFailed):
            await storage.put(KEY, b"x", "image/png")

    asyncio.run(story())


def test_a_folder_that_cannot_be_made_ends_the_start_with_its_name(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "file"))):
        LocalStorage(tmp_path / "file" / "folder")


def test_many_writers_at_once_all_end_whole(tmp_path):
    keys = [f"img_{number:032x}.png" for number in range(50)]

    async def story():
        storage = LocalStorage(tmp_path)
        await asyncio.gather(*(storage.put(key, key.encode() * 1000, "image/png") for key in keys for _ in range(2)))
        return [await read_all(storage, key) for key in keys]

    assert asyncio.run(story()) == [key.encode() * 1000 for key in keys]
    assert len(files(tmp_path)) == 50
