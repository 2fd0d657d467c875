"""Object storage on a real S3 server: in its good hours and in its bad ones."""

import asyncio
import os
import secrets

import httpx
import pytest

from photogram.core.errors import ConfigError, NotFound, StorageFailed
from photogram.storage.local import LocalStorage
from photogram.storage.object_store import ObjectStorage

from .weed import SECRET, Weed

DATA = os.urandom(3_000_000)


def new_key(suffix: str = "png") -> str:
    return f"img_{secrets.token_hex(16)}.{suffix}"


@pytest.fixture
def reached(weed, monkeypatch):
    """The S3 server, with its address and keys in the environment."""
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    return weed


@pytest.fixture
def url() -> str:
    return f"s3://pictures/{secrets.token_hex(4)}/of-a-test"


async def read_all(storage, key, start=0, end=None) -> bytes:
    return b"".join([chunk async for chunk in storage.read(key, start, end)])


async def until_uploaded(storage, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while storage.num_waiting:
            await asyncio.sleep(0.05)


def files_of(root) -> list[str]:
    return [path.name for path in root.rglob("img_*")]


def test_a_file_is_uploaded_read_in_ranges_signed_and_deleted(reached, url, tmp_path):
    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path)), new_key("webp")
        await storage.put(key, DATA, "image/webp")
        assert await read_all(storage, key) == DATA
        signed = await storage.url(key, 60)
        assert storage.num_waiting == 0
        assert files_of(tmp_path) == []
        assert await storage.size(key) == len(DATA)
        for start, end in ((0, None), (0, 10), (1_048_570, 2_500_001), (5, 5), (2_999_999, 10**9)):
            assert await read_all(storage, key, start, end) == DATA[start:end]
        answer = httpx.get(signed)
        assert (answer.status_code, answer.content) == (200, DATA)
        assert answer.headers["content-type"] == "image/webp"
        assert httpx.get(signed.replace("X-Amz-Signature=", "X-Amz-Signature=0")).status_code == 403
        assert httpx.get(signed.partition("?")[0]).status_code == 403
        await storage.delete(key)
        await storage.delete(key)
        with pytest.raises(NotFound):
            await storage.size(key)
        with pytest.raises(NotFound):
            await read_all(storage, key)
        assert httpx.get(signed).status_code == 404
        await storage.close()

    asyncio.run(story())


def test_signed_urls_expire(reached, url, tmp_path):
    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path)), new_key()
        await storage.put(key, b"x", "image/png")
        signed = await storage.url(key, 1)
        await asyncio.sleep(2.5)
        assert httpx.get(signed).status_code == 403
        await storage.close()

    asyncio.run(story())


def test_a_store_that_hangs_costs_nobody_anything_and_gets_the_file_later(reached, url, tmp_path):
    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path), first_wait_s=0.1), new_key()
        reached.pause()
        try:
            async with asyncio.timeout(5):
                await storage.put(key, DATA, "image/png")
                assert await read_all(storage, key, 10, 20) == DATA[10:20]
                assert await storage.size(key) == len(DATA)
        finally:
            reached.resume()
        await until_uploaded(storage)
        assert files_of(tmp_path) == []
        assert await read_all(storage, key) == DATA
        await storage.close()

    asyncio.run(story())


def test_what_was_not_uploaded_is_by_the_next_server(reached, url, tmp_path, monkeypatch):
    async def story() -> None:
        key = new_key()
        with monkeypatch.context() as away:
            away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            first = ObjectStorage(url, LocalStorage(tmp_path), first_wait_s=0.05)
            await first.put(key, DATA, "image/png")
            await asyncio.sleep(0.5)
            assert first.num_waiting == 1
            await first.close()
        second = ObjectStorage(url, LocalStorage(tmp_path))
        assert await read_all(second, key) == DATA
        await second.start()
        await until_uploaded(second)
        assert files_of(tmp_path) == []
        assert await read_all(second, key) == DATA
        await second.close()

    asyncio.run(story())


def test_with_wrong_keys_files_stay_here_and_the_secret_is_not_logged(reached, url, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")

    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path), first_wait_s=0.1), new_key()
        await storage.put(key, DATA, "image/png")
        async with asyncio.timeout(30):
            while "not uploaded" not in caplog.text:
                await asyncio.sleep(0.05)
        assert storage.num_waiting == 1
        assert await read_all(storage, key) == DATA
        with pytest.raises(StorageFailed):
            await storage.size(new_key())
        await storage.close()

    asyncio.run(story())
    assert "a-wrong-secret" not in caplog.text
    assert SECRET not in caplog.text


def test_a_file_deleted_before_its_upload_never_appears(reached, url, tmp_path):
    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path)), new_key()
        await storage.put(key, DATA, "image/png")
        await storage.delete(key)
        assert (files_of(tmp_path), storage.num_waiting) == ([], 0)
        with pytest.raises(NotFound):
            await storage.size(key)
        await storage.close()

    asyncio.run(story())


def test_of_two_files_of_one_key_the_later_one_stays(reached, url, tmp_path):
    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path), first_wait_s=0.1), new_key()
        await storage.put(key, DATA, "image/png")
        await storage.put(key, DATA[::-1], "image/png")
        await until_uploaded(storage)
        assert await read_all(storage, key) == DATA[::-1]
        assert files_of(tmp_path) == []
        await storage.close()

    asyncio.run(story())


@pytest.mark.long
def test_the_stores_death_loses_nothing(reached, url, tmp_path):
    async def story() -> None:
        storage = ObjectStorage(url, LocalStorage(tmp_path), first_wait_s=0.2)
        before, after = new_key(), new_key()
        await storage.put(before, DATA, "image/png")
        await until_uploaded(storage)
        reached.kill()
        await storage.put(after, DATA, "image/png")
        assert await read_all(storage, after) == DATA
        with pytest.raises(StorageFailed):
            await storage.size(before)
        with pytest.raises(StorageFailed):
            await storage.delete(before)
        await asyncio.to_thread(reached.start)
        await until_uploaded(storage, 120)
        assert await read_all(storage, before) == await read_all(storage, after) == DATA
        await storage.close()

    asyncio.run(story())


@pytest.mark.long
def test_a_store_whose_disk_is_full_gets_the_file_when_there_is_space_again(url, tmp_path, monkeypatch, caplog):
    full = Weed(tmp_path / "weed").start(full=True)
    for name, value in full.env.items():
        monkeypatch.setenv(name, value)

    async def story() -> None:
        storage, key = ObjectStorage(url, LocalStorage(tmp_path / "files"), first_wait_s=0.2), new_key()
        await storage.put(key, DATA, "image/png")
        async with asyncio.timeout(120):
            while f"{key} is not uploaded" not in caplog.text:
                await asyncio.sleep(0.05)
        assert (storage.num_waiting, await storage.url(key, 60)) == (1, None)
        assert await read_all(storage, key) == DATA
        full.kill()
        await asyncio.to_thread(full.start)
        await until_uploaded(storage, 120)
        assert files_of(tmp_path / "files") == []
        assert await read_all(storage, key) == DATA
        await storage.close()

    try:
        asyncio.run(story())
    finally:
        full.kill()


@pytest.mark.parametrize("text", ["s3:/pictures", "ftp://pictures/x", "pictures", "s3://", "file:///tmp"])
def test_an_address_that_is_none_is_a_configuration_error(reached, tmp_path, text):
    with pytest.raises(ConfigError, match="--storage"):
        ObjectStorage(text, LocalStorage(tmp_path))
