import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from photogram.core.errors import ConfigError, Conflict, NotFound, RequestError, StorageFailed
from photogram.jobs.record import FINISHED, TRANSITIONS, IllegalTransition
from photogram.jobs.schema import SCHEMA_VERSION, metadata
from photogram.jobs.store import STORE_FILE, JobStore, Totals, _row, open_store

from .records import Clock, finish, job

PATHS = {
    "queued": [],
    "running": ["running"],
    "encoding": ["running", "encoding"],
    "completed": ["running", "encoding", "completed"],
    "failed": ["failed"],
    "cancelled": ["cancelled"],
}


def with_store(folder, story, clock=None):
    """Run `story(store)` on the store of a folder."""

    async def run():
        store = open_store(folder, clock=clock or Clock())
        try:
            return await story(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def move(store, job_id, to, **fields):
    if to == "failed":
        fields = {"error_code": "generation_failed", "error_message": "broke", **fields}
    return await store.move(job_id, to, **fields)


def test_a_job_is_read_back_as_it_was_created_by_a_later_server(tmp_path):
    records = [job(kind="video"), job(prompt="emoji 🟥 and \0 NUL"), job(created_at=1_000_000.123456)]

    async def create(store):
        await store.create(records)

    async def read(store):
        return [await store.get(record.job_id) for record in records]

    with_store(tmp_path, create)
    assert with_store(tmp_path, read) == records


@pytest.mark.parametrize("to", list(TRANSITIONS))
@pytest.mark.parametrize("state", list(TRANSITIONS))
def test_a_job_makes_exactly_the_moves_of_the_table(tmp_path, state, to):
    record = job()

    async def story(store):
        await store.create([record])
        for step in PATHS[state]:
            await move(store, record.job_id, step)
        before = await store.get(record.job_id)
        assert before.state == state
        if to in TRANSITIONS[state]:
            after = await move(store, record.job_id, to)
            assert after.state == to
        else:
            with pytest.raises(IllegalTransition) as refused:
                await move(store, record.job_id, to, run_s=9.0)
            assert (refused.value.state, refused.value.to) == (state, to)
            assert await store.get(record.job_id) == before

    with_store(tmp_path, story)


@pytest.mark.parametrize("to", ["completed", "failed", "cancelled"])
def test_a_job_whose_moves_were_not_written_gets_to_its_end_at_once(tmp_path, to):
    record = job()
    why = {"error_code": "timeout", "error_message": "too slow"} if to == "failed" else {}

    async def story(store):
        await store.create([record])
        ended = await store.move(record.job_id, to, skipping=True, started_at=2_000_000.0, run_s=0.5, **why)
        assert (ended.state, ended.attempts, ended.started_at, ended.run_s) == (to, 1, 2_000_000.0, 0.5)
        assert await store.get(record.job_id) == ended
        with pytest.raises(IllegalTransition):
            await store.move(record.job_id, "completed", skipping=True)

    with_store(tmp_path, story)


def test_an_interrupted_job_names_the_file_that_it_may_have_left(tmp_path):
    picture, kept = job(), job(idempotency_key="k")

    async def story(store):
        await store.create([picture, kept])
        (failed,) = await store.fail_interrupted(lambda record: f"{record.job_id}.png")
        assert (failed.job_id, failed.file_key) == (picture.job_id, f"{picture.job_id}.png")
        assert await store.with_leftover_file() == (failed,)

    with_store(tmp_path, story)


def test_moves_are_stamped_and_keep_what_became_known(tmp_path):
    record, clock = job(), Clock(2_000_000.0)

    async def story(store):
        await store.create([record])
        clock.now += 1
        running = await store.move(record.job_id, "running")
        clock.now += 1
        await store.move(record.job_id, "queued")
        clock.now += 1
        await store.move(record.job_id, "running")
        await store.move(record.job_id, "encoding", file_key="key", run_s=1.25)
        clock.now += 1
        done = await store.move(
            record.job_id, "completed", content_type="image/png", file_bytes=10, prompt_tokens=3, image_tokens=4
        )
        return running, done, await store.get(record.job_id)

    running, done, read = with_store(tmp_path, story, clock)
    assert (running.started_at, running.attempts, running.finished_at) == (2_000_001.0, 1, None)
    assert read == done
    assert done == msgspec.structs.replace(
        record,
        state="completed",
        started_at=2_000_003.0,
        finished_at=2_000_004.0,
        attempts=2,
        file_key="key",
        run_s=1.25,
        content_type="image/png",
        file_bytes=10,
        prompt_tokens=3,
        image_tokens=4,
    )


def test_a_failed_job_says_why(tmp_path):
    record = job()

    async def story(store):
        await store.create([record])
        with pytest.raises(ValueError):
            await store.move(record.job_id, "failed")
        return await store.move(
            record.job_id, "failed", error_code="out_of_memory", error_message="too large", error_param="size"
        )

    failed = with_store(tmp_path, story)
    assert (failed.error_code, failed.error_message, failed.error_param) == ("out_of_memory", "too large", "size")
    assert failed.finished_at is not None


def test_of_many_writers_on_several_connections_one_wins(tmp_path):
    record = job()
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"

    async def story():
        stores = [JobStore(url) for _ in range(4)]
        await stores[0].create([record])
        await stores[0].move(record.job_id, "running")
        results = await asyncio.gather(
            *(move(store, record.job_id, to) for store in stores for to in ("encoding", "failed", "cancelled")),
            return_exceptions=True,
        )
        final = await stores[0].get(record.job_id)
        for store in stores:
            await store.close()
        return results, final

    results, final = asyncio.run(story())
    won = [result for result in results if not isinstance(result, BaseException)]
    assert all(isinstance(result, IllegalTransition) for result in results if isinstance(result, BaseException))
    states = [each.state for each in won]
    assert len(states) == len(set(states))  # nobody's move was made twice
    assert set(states) - {"encoding"} == {final.state}  # encoding may still come before the one end
    assert final.state in FINISHED


def test_several_jobs_are_created_all_or_none(tmp_path):
    first, second = job(), job()

    async def story(store):
        await store.create([])
        await store.create([first])
        with pytest.raises(Conflict):
            await store.create([second, first])
        with pytest.raises(NotFound):
            await store.get(second.job_id)

    with_store(tmp_path, story)


def test_an_idempotency_key_is_used_once_by_each_owner(tmp_path):
    def pair(owner):
        group = job(owner=owner).group_id
        return [job(owner=owner, group_id=group, index=index, idempotency_key="k") for index in (0, 1)]

    mine, theirs = pair("ann"), pair("bob")

    async def story(store):
        await store.create(mine)
        await store.create(theirs)
        with pytest.raises(Conflict):
            await store.create(pair("ann"))
        assert await store.with_idempotency_key("ann", "k") == tuple(mine)
        assert await store.with_idempotency_key("ann", "other") == ()
        assert await store.group(mine[0].group_id) == tuple(mine)

    with_store(tmp_path, story)


def test_listing_pages_through_jobs_in_the_order_of_acceptance_even_at_equal_times(tmp_path):
    records = [job(created_at=5.0, kind="video") for _ in range(7)]

    async def story(store):
        await store.create(records[:4])
        for record in records[4:]:
            await store.create([record])
        await store.create([job(kind="image"), job(kind="video", owner="bob")])

        async def pages(order):
            found, after = [], None
            while page := await store.list(kind="video", owner="ann", after=after, limit=3, order=order):
                found += page
                after = page[-1].job_id
            return found

        assert await pages("asc") == records
        assert await pages("desc") == records[::-1]
        assert len(await store.list(limit=1000)) == 9

    with_store(tmp_path, story)


def test_listing_refuses_a_limit_or_place_that_cannot_be(tmp_path):
    theirs = job(owner="bob")

    async def story(store):
        await store.create([theirs])
        for limit in (0, -1, 1001):
            with pytest.raises(RequestError) as refused:
                await store.list(limit=limit)
            assert refused.value.param == "limit"
        for after in ("nothing", "'; DROP TABLE jobs; --", theirs.job_id):
            with pytest.raises(RequestError) as refused:
                await store.list(owner="ann", after=after)
            assert refused.value.param == "after"

    with_store(tmp_path, story)


def test_what_was_running_when_the_server_died_is_failed_as_interrupted(tmp_path):
    jobs = {state: job() for state in PATHS}
    video = job(kind="video")

    async def before(store):
        await store.create([*jobs.values(), video])
        for state, steps in PATHS.items():
            for step in steps:
                await move(store, jobs[state].job_id, step, **({"file_key": "key"} if step == "encoding" else {}))

    async def after(store):
        assert [each.job_id for each in await store.unfinished("image")] == [
            jobs[state].job_id for state in ("queued", "running", "encoding")
        ]
        failed = await store.fail_interrupted()
        assert [each.job_id for each in failed] == [jobs[state].job_id for state in ("queued", "running", "encoding")]
        assert {each.error_code for each in failed} == {"interrupted"}
        assert [each.file_key for each in failed] == [None, None, "key"]
        assert await store.unfinished() == (video,)
        assert (await store.get(jobs["completed"].job_id)).state == "completed"
        assert await store.fail_interrupted() == ()

    with_store(tmp_path, before)
    with_store(tmp_path, after)


def test_totals_and_order_of_finished_jobs(tmp_path):
    clock = Clock()
    records = [job() for _ in range(5)]

    async def story(store):
        assert await store.totals() == Totals(0, 0)
        await store.create(records)
        for record in (records[2], records[0], records[1]):
            await finish(store, record, file_bytes=3_000_000_000)
            clock.now += record is records[0]
        await move(store, records[3].job_id, "failed")
        assert await store.totals() == Totals(4, 9_000_000_000)
        found, last = [], None
        while batch := await store.oldest_finished(1, after=last):
            found += batch
            last = batch[-1]
        ids = [record.job_id for record in records]
        # two ended at one time, then two more: their ids give such jobs an order
        assert [each.job_id for each in found] == [*sorted([ids[0], ids[2]]), *sorted([ids[1], ids[3]])]

    with_store(tmp_path, story, clock)


def test_a_deleted_job_is_gone(tmp_path):
    record = job()

    async def story(store):
        await store.create([record])
        assert await store.delete(record.job_id)
        assert not await store.delete(record.job_id)
        with pytest.raises(NotFound):
            await store.get(record.job_id)
        with pytest.raises(NotFound):
            await store.move(record.job_id, "running")

    with_store(tmp_path, story)


def test_a_second_server_is_kept_out_of_the_folder_until_the_first_has_closed(tmp_path):
    async def story(store):
        with pytest.raises(ConfigError, match="another photogram server"):
            open_store(tmp_path)

    with_store(tmp_path, story)
    with_store(tmp_path, lambda store: store.totals())


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path):
    content = b"These are my holiday notes, not a database. " * 100
    (tmp_path / STORE_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.recover") as refused:
        open_store(tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / STORE_FILE).read_bytes() == content


def test_a_damaged_store_is_refused_and_left_as_it_is(tmp_path):
    async def fill(store):
        await store.create([job(prompt="x" * 5000) for _ in range(50)])

    with_store(tmp_path, fill)
    path = tmp_path / STORE_FILE
    damaged = bytearray(path.read_bytes())
    for page in range(2, len(damaged) // 4096):
        damaged[page * 4096 : page * 4096 + 64] = bytes(range(64))
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="damaged"):
        open_store(tmp_path)
    assert path.read_bytes() == damaged


def test_a_store_of_a_newer_photogram_is_refused(tmp_path):
    with_store(tmp_path, lambda store: store.totals())
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(ConfigError, match="schema 99, this photogram knows"):
        open_store(tmp_path)


def test_a_store_of_the_first_version_is_brought_up_to_date_with_all_its_jobs(tmp_path):
    record, failed = job(), job()
    record = msgspec.structs.replace(record, idempotency_key="k")
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        connection.executescript((Path(__file__).parent / "schema_1.sql").read_text())
        for each in (record, failed):
            row = _row(each)
            names = [row[1] for row in connection.execute("PRAGMA table_info(jobs)") if row[1] != "position"]
            marks = ", ".join("?" * len(names))
            connection.execute(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})", [row[name] for name in names])
    connection.close()

    async def story(store):
        assert await store.get(record.job_id) == record
        await store.move(failed.job_id, "running")
        await move(store, failed.job_id, "failed")
        new = msgspec.structs.replace(job(kind="video"), webhook_url="https://example.com", facts={"a": [1]})
        await store.create([new])
        assert await store.get(new.job_id) == new

    with_store(tmp_path, story)
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(SCHEMA_VERSION,)]
    connection.close()
    with_store(tmp_path, lambda store: store.totals())


def test_a_migrated_store_has_the_tables_of_a_new_one(tmp_path):
    (tmp_path / "old").mkdir()
    with sqlite3.connect(tmp_path / "old" / STORE_FILE) as connection:
        connection.executescript((Path(__file__).parent / "schema_1.sql").read_text())
    connection.close()
    columns = {}
    for name in ("old", "new"):
        with_store(tmp_path / name, lambda store: store.totals())
        with sqlite3.connect(tmp_path / name / STORE_FILE) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            columns[name] = {
                table: sorted(row[1:5] for row in connection.execute(f"PRAGMA table_info({table})"))
                for (table,) in tables
            }
        connection.close()
    assert columns["old"] == columns["new"]


def test_a_database_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    content = (tmp_path / STORE_FILE).read_bytes()
    with pytest.raises(ConfigError, match="something else"):
        open_store(tmp_path)
    assert (tmp_path / STORE_FILE).read_bytes() == content


@pytest.mark.parametrize("url", ["nonsense", "oracle+nothing://x", "sqlite:////proc/none/jobs.sqlite3"])
def test_an_address_that_cannot_be_used_is_refused(url):
    with pytest.raises(ConfigError):
        JobStore(url)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_store(tmp_path / "file" / "folder")


def test_a_database_that_fails_is_a_storage_failure_and_works_again_afterwards(tmp_path):
    record = job()

    async def story(store):
        other = sqlite3.connect(tmp_path / STORE_FILE)
        other.execute("ALTER TABLE jobs RENAME TO hidden")
        with pytest.raises(StorageFailed, match="no such table"):
            await store.create([record])
        other.execute("ALTER TABLE hidden RENAME TO jobs")
        other.close()
        await store.check_writable()
        await store.create([record])
        return await store.get(record.job_id)

    assert with_store(tmp_path, story) == record


def test_the_store_waits_for_the_disk_where_it_promises_and_uses_a_write_ahead_log(tmp_path):
    async def story(store):
        modes = []
        for promise in (True, False, True):
            modes.append(
                await store._run(
                    lambda connection: connection.exec_driver_sql("PRAGMA synchronous").scalar(), promise=promise
                )
            )
        journal = await store._run(lambda connection: connection.exec_driver_sql("PRAGMA journal_mode").scalar())
        return modes, journal

    assert with_store(tmp_path, story) == ([2, 1, 2], "wal")


ENDLESS_WRITER = """
import asyncio, sys
from pathlib import Path
from photogram.jobs.store import open_store
from jobs.records import job

async def write():
    store = open_store(Path(sys.argv[1]))
    while True:
        record = job()
        await store.create([record])
        await store.move(record.job_id, "running")
        print(record.job_id, flush=True)

asyncio.run(write())
"""


def test_every_job_that_was_told_of_is_there_after_a_kill_in_mid_write(tmp_path):
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *filter(None, sys.path)])}
    writer = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    told = [writer.stdout.readline().strip() for _ in range(20)]
    writer.kill()
    told += [line.strip() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()

    async def story(store):
        for job_id in told:
            assert (await store.get(job_id)).state == "running"
        failed = await store.fail_interrupted()
        assert {record.job_id for record in failed} >= set(told)

    with_store(tmp_path, story)


def test_a_closed_store_says_so(tmp_path):
    async def story(store):
        await store.close()
        with pytest.raises(StorageFailed, match="closed"):
            await store.totals()

    async def run():
        await story(open_store(tmp_path))

    asyncio.run(run())


def test_a_row_that_cannot_be_read_is_a_storage_failure(tmp_path):
    record = job()

    async def story(store):
        await store.create([record])
        await store._run(lambda connection: connection.exec_driver_sql("UPDATE jobs SET request = '{}'"))
        with pytest.raises(StorageFailed, match="cannot be read"):
            await store.get(record.job_id)

    with_store(tmp_path, story)


def test_the_tables_are_portable_to_postgresql():
    text = "".join(str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in metadata.sorted_tables)
    assert "position SERIAL" in text
    assert "file_bytes BIGINT" in text
    assert "created_at FLOAT(53)" in text
