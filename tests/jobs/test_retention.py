import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photogram.core.config import Keep
from photogram.core.errors import NotFound, StorageFailed
from photogram.jobs import retention
from photogram.jobs.retention import Pruned, keep_pruning, prune
from photogram.jobs.store import open_store
from photogram.storage import file_key
from photogram.storage.local import LocalStorage

from .records import Clock, finish, job

DAY = 86400.0


async def completed(store, storage, clock, num_bytes, kind="image"):
    """A finished job with a real file of `num_bytes`, ended now."""
    record = job(clock.now, kind=kind)
    key = file_key(record.job_id, "png")
    await store.create([record])
    await storage.put(key, bytes(num_bytes), "image/png")
    return await finish(store, record, file_bytes=num_bytes, file_key=key)


def in_folder(folder, story):
    async def run():
        clock = Clock()
        store, storage = open_store(folder, clock=clock), LocalStorage(folder / "files")
        try:
            return await story(store, storage, clock)
        finally:
            await store.close()

    return asyncio.run(run())


async def remaining(store, storage):
    """Ids of the jobs that are left, oldest first; each with its file, and no file without its job."""
    records = await store.list(limit=1000, order="asc")
    keys = {record.file_key for record in records if record.file_key is not None}
    for key in keys:
        await storage.size(key)
    assert {path.name for path in storage._root.rglob("*.png")} == keys
    return [record.job_id for record in records]


def test_finished_work_goes_when_it_is_older_than_the_age(tmp_path):
    async def story(store, storage, clock):
        made = []
        for _ in range(5):
            made.append((await completed(store, storage, clock, 100)).job_id)
            clock.now += DAY
        keep = Keep(age_s=3 * DAY, size_bytes=None)
        assert await prune(store, storage, keep, clock.now) == Pruned(2, 200)
        assert await remaining(store, storage) == made[2:]
        assert await prune(store, storage, keep, clock.now) == Pruned(0, 0)
        assert await prune(store, storage, keep, clock.now + DAY) == Pruned(1, 100)

    in_folder(tmp_path, story)


def test_the_oldest_files_go_until_the_rest_fits_the_size(tmp_path):
    async def story(store, storage, clock):
        made = []
        for num_bytes in (500, 300, 200, 100):
            made.append((await completed(store, storage, clock, num_bytes)).job_id)
            clock.now += 1
        assert await prune(store, storage, Keep(age_s=None, size_bytes=400), clock.now) == Pruned(2, 800)
        assert await remaining(store, storage) == made[2:]

    in_folder(tmp_path, story)


def test_unfinished_jobs_stay_however_old_they_are(tmp_path):
    async def story(store, storage, clock):
        waiting, running = job(0.0), job(0.0)
        await store.create([waiting, running])
        await store.move(running.job_id, "running")
        clock.now += 1000 * DAY
        await prune(store, storage, Keep(age_s=1.0, size_bytes=0), clock.now)
        assert await remaining(store, storage) == [waiting.job_id, running.job_id]

    in_folder(tmp_path, story)


def test_jobs_without_a_file_go_by_age_and_never_to_make_room(tmp_path):
    async def story(store, storage, clock):
        failed = job(clock.now)
        await store.create([failed])
        await store.move(failed.job_id, "failed", error_code="timeout", error_message="too slow")
        large = await completed(store, storage, clock, 100)
        assert await prune(store, storage, Keep(age_s=None, size_bytes=50), clock.now) == Pruned(1, 100)
        assert await remaining(store, storage) == [failed.job_id]
        assert large.job_id != failed.job_id
        clock.now += 10
        assert await prune(store, storage, Keep(age_s=5.0, size_bytes=None), clock.now) == Pruned(1, 0)

    in_folder(tmp_path, story)


def test_forever_keeps_everything(tmp_path):
    async def story(store, storage, clock):
        await completed(store, storage, clock, 100)
        assert await prune(store, storage, Keep(age_s=None, size_bytes=None), clock.now * 10) == Pruned(0, 0)

    in_folder(tmp_path, story)


def test_the_file_of_an_interrupted_job_goes_with_its_row(tmp_path):
    async def story(store, storage, clock):
        record = job(clock.now)
        key = file_key(record.job_id, "png")
        await store.create([record])
        await store.move(record.job_id, "running")
        await store.move(record.job_id, "encoding", file_key=key)
        await storage.put(key, b"whole, but its server died before it said so", "image/png")
        await store.fail_interrupted()
        clock.now += 10
        assert (await prune(store, storage, Keep(age_s=5.0, size_bytes=None), clock.now)).num_jobs == 1
        assert await remaining(store, storage) == []

    in_folder(tmp_path, story)


class StubbornStorage(LocalStorage):
    """A place that refuses to delete some keys, and deletes others with the message that they are not there."""

    stuck = ""
    absent = ""

    async def delete(self, key):
        if key == self.stuck:
            raise StorageFailed("the disk is read-only")
        if key == self.absent:
            raise NotFound("no such object")
        await super().delete(key)


def test_a_file_that_cannot_be_deleted_keeps_its_row_and_nobody_elses(tmp_path):
    async def story(store, _, clock):
        storage = StubbornStorage(tmp_path / "files")
        stuck, absent, plain = [await completed(store, storage, clock, 10) for _ in range(3)]
        storage.stuck, storage.absent = stuck.file_key, absent.file_key
        clock.now += 10
        keep = Keep(age_s=5.0, size_bytes=None)
        assert (await prune(store, storage, keep, clock.now)).num_jobs == 2
        assert [record.job_id for record in await store.list()] == [stuck.job_id]
        storage.stuck = ""
        assert (await prune(store, storage, keep, clock.now)).num_jobs == 1
        assert plain.job_id != stuck.job_id

    in_folder(tmp_path, story)


def test_more_jobs_than_one_batch_are_all_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "_BATCH", 3)

    async def story(store, storage, clock):
        records = [job(clock.now) for _ in range(10)]
        await store.create(records)
        for record in records:
            await store.move(record.job_id, "cancelled")
        clock.now += 10
        assert (await prune(store, storage, Keep(age_s=5.0, size_bytes=None), clock.now)).num_jobs == 10

    in_folder(tmp_path, story)


@settings(max_examples=10, deadline=None)
@given(
    # No two ended at one time: among such the order is by their ids.
    made=st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 50)), max_size=8),
    age_s=st.none() | st.floats(0, 300),
    size_bytes=st.none() | st.integers(0, 200),
)
def test_what_is_left_is_young_small_and_the_newest(tmp_path_factory, made, age_s, size_bytes):
    async def story(store, storage, clock):
        records = []
        for seconds, num_bytes in made:
            clock.now += seconds
            records.append(await completed(store, storage, clock, num_bytes))
        await prune(store, storage, Keep(age_s=age_s, size_bytes=size_bytes), clock.now)
        left = await remaining(store, storage)
        young = [each for each in records if age_s is None or each.finished_at >= clock.now - age_s]
        while size_bytes is not None and sum(each.file_bytes for each in young) > size_bytes:
            young.remove(next(each for each in young if each.file_bytes))
        assert left == [each.job_id for each in young]

    in_folder(tmp_path_factory.mktemp("prune"), story)


def test_the_loop_goes_on_after_a_pass_that_failed(tmp_path):
    async def story(store, storage, clock):
        await completed(store, storage, clock, 10)
        clock.now += 10
        await store._run(lambda connection: connection.exec_driver_sql("ALTER TABLE jobs RENAME TO hidden"))
        loop = asyncio.create_task(
            keep_pruning(store, storage, Keep(age_s=5.0, size_bytes=None), every_s=0.01, clock=clock)
        )
        await asyncio.sleep(0.05)
        await store._run(lambda connection: connection.exec_driver_sql("ALTER TABLE hidden RENAME TO jobs"))
        while await store.list():
            await asyncio.sleep(0.01)
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop

    in_folder(tmp_path, story)
