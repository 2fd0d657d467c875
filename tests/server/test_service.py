"""Clips as durable jobs: nobody needs to wait for them, and nothing of them is lost or left behind."""

import asyncio

import pytest
from msgspec.structs import replace

from photogram.core.errors import Busy, Conflict, EngineLost, NotFound, StorageFailed
from photogram.jobs.record import JobRecord, new_id
from photogram.jobs.recovery import MAX_INTERRUPTIONS
from photogram.server.live import Moved, Partial, Stepped
from photogram.server.service import Idempotency
from photogram.storage import file_key

from .clips import clip, server


def run(story, folder, **settings):
    """Run `story(server)` on a server of the folder."""

    async def main():
        async with server(folder, **settings) as running:
            return await story(running)

    return asyncio.run(main())


def test_a_clip_is_made_without_anybody_waiting(tmp_path):
    async def story(running):
        job_id = await running.begin("a cube", facts={"remixed_from_video_id": "video_1"})
        assert (await running.store.get(job_id)).state in ("queued", "running")
        await running.service.wait_idle()
        record = await running.store.get(job_id)
        assert (record.state, record.content_type, record.model) == ("completed", "video/mp4", "wan")
        assert record.facts == {"remixed_from_video_id": "video_1"}
        assert await running.storage.size(record.file_key) == record.file_bytes
        assert running.service.progress(job_id) is None

    run(story, tmp_path)


def test_watchers_hear_every_state_and_rising_progress_to_the_final_state(tmp_path):
    async def story(running):
        job_id = await running.begin("hold")
        await running.until_state(job_id, "running")

        async def watch():
            return [outcome async for outcome in running.service.watch(job_id)]

        watchers = [asyncio.create_task(watch()) for _ in range(3)]
        await asyncio.sleep(0.02)
        running.engine.released.set()
        for heard in await asyncio.gather(*watchers):
            states = [one.record.state for one in heard if isinstance(one, Moved)]
            assert states == ["running", "encoding", "completed"]
            fractions = [one.progress.fraction for one in heard if isinstance(one, Stepped)]
            assert fractions == sorted(fractions)
            assert len(fractions) >= 3
        assert [one.record.state async for one in running.service.watch(job_id)] == ["completed"]
        with pytest.raises(NotFound):
            await anext(running.service.watch("video_nothing"))

    run(story, tmp_path)


def test_previews_reach_who_watches_and_leave_nothing_behind_when_nobody_does(tmp_path):
    async def story(running):
        drawing = clip("hold", steps=4)
        request = replace(drawing.request, partial_images=2)
        record = await running.service.begin_clip(type(drawing)(request=request, output=drawing.output), model="wan")
        watching = asyncio.create_task(collect(running.service.watch(record.job_id)))
        await asyncio.sleep(0.02)
        running.engine.released.set()
        partials = [one for one in await watching if isinstance(one, Partial)]
        assert [one.number for one in partials] == [0, 1]
        assert all(one.data.startswith(b"\xff\xd8") for one in partials)
        unwatched = await running.service.begin_clip(
            type(drawing)(request=replace(request, job_id=new_id("video")), output=drawing.output), model="wan"
        )
        await running.service.wait_idle()
        assert (await running.store.get(unwatched.job_id)).state == "completed"
        assert list(running.engine.frames_dir.iterdir()) == []

    run(story, tmp_path)


async def collect(outcomes):
    return [outcome async for outcome in outcomes]


def test_a_cancelled_clip_stops_and_tells_its_watchers(tmp_path):
    async def story(running):
        inputs = running.new_inputs()
        job_id = await running.begin("hold", inputs=inputs)
        await running.until_state(job_id, "running")
        watching = asyncio.create_task(collect(running.service.watch(job_id)))
        await asyncio.sleep(0.01)
        record = await running.service.cancel(job_id)
        assert record.state == "cancelled"
        assert (await watching)[-1].record.state == "cancelled"
        await running.service.wait_idle()
        assert running.engine.cancelled == [job_id]
        assert not (running.inputs.root / inputs).exists()
        assert await running.service.cancel(job_id) == record
        with pytest.raises(NotFound):
            await running.service.cancel("video_nothing")
        done = await running.begin("a cube")
        await running.service.wait_idle()
        assert (await running.service.cancel(done)).state == "completed"

    run(story, tmp_path)


@pytest.mark.parametrize("prompt", ["hold", "a cube"])
def test_a_deleted_clip_leaves_neither_row_nor_file_nor_inputs(tmp_path, prompt):
    async def story(running):
        inputs = running.new_inputs()
        job_id = await running.begin(prompt, inputs=inputs, webhook_url="https://example.com/hook")
        await running.until_state(job_id, "running" if prompt == "hold" else "completed")
        watching = asyncio.create_task(collect(running.service.watch(job_id)))
        await asyncio.sleep(0.01)
        await running.service.delete(job_id)
        if prompt == "hold":
            with pytest.raises(NotFound):
                await watching
        with pytest.raises(NotFound):
            await running.store.get(job_id)
        with pytest.raises(NotFound):
            await running.service.delete(job_id)
        assert running.files() == []
        assert list(running.inputs.root.iterdir()) == []
        assert running.service.num_jobs == 0

    run(story, tmp_path)


def test_inputs_are_kept_until_the_job_is_over(tmp_path):
    async def story(running):
        inputs = running.new_inputs()
        job_id = await running.begin("hold", inputs=inputs)
        await running.until_state(job_id, "running")
        assert (running.inputs.root / inputs / "0.png").exists()
        running.engine.released.set()
        await running.service.wait_idle()
        assert not (running.inputs.root / inputs).exists()

    run(story, tmp_path)


@pytest.mark.parametrize("code", ["generation_failed", "out_of_memory", "engine_unavailable"])
def test_a_failed_clip_keeps_its_reason_and_no_inputs(tmp_path, code):
    async def story(running):
        inputs = running.new_inputs()
        job_id = await running.begin(f"fail:{code}", inputs=inputs)
        assert await running.ended(job_id) == "failed"
        record = await running.store.get(job_id)
        assert (record.error_code, record.error_message) == (code, "It went wrong: no luck today.")
        await running.service.wait_idle()
        assert not (running.inputs.root / inputs).exists()

    run(story, tmp_path)


def test_a_repeated_request_is_the_same_job_and_another_one_under_its_key_a_conflict(tmp_path):
    key = Idempotency(key="k1", fingerprint="f1")

    async def story(running):
        ids = await asyncio.gather(*(running.begin("a cube", idempotency=key) for _ in range(8)))
        assert len(set(ids)) == 1
        await running.service.wait_idle()
        inputs = running.new_inputs()
        assert await running.begin("a cube", idempotency=key, inputs=inputs) == ids[0]
        assert not (running.inputs.root / inputs).exists()
        assert len(running.engine.seen) == 1
        with pytest.raises(Conflict) as refused:
            await running.begin("a ball", idempotency=Idempotency(key="k1", fingerprint="f2"))
        assert (refused.value.code, refused.value.should_retry) == ("idempotency_conflict", False)
        await running.service.delete(ids[0])
        assert await running.begin("a cube", idempotency=key) != ids[0]

    run(story, tmp_path)


def test_the_queue_has_a_bound(tmp_path):
    async def story(running):
        held = [await running.begin("hold") for _ in range(3)]
        with pytest.raises(Busy):
            await running.begin("one more")
        assert running.service.num_jobs == 3
        await asyncio.gather(*map(running.service.delete, held))
        await running.begin("a cube")

    run(story, tmp_path, max_queue=3)


def test_draining_finishes_what_runs_and_leaves_the_rest_to_the_next_server(tmp_path):
    async def first(running):
        running.engine.max_running = 1
        job_ids = [await running.begin("hold", inputs=running.new_inputs()) for _ in range(3)]
        await running.until_state(job_ids[0], "running")
        running.service.drain()
        with pytest.raises(EngineLost):
            await running.begin("a cube")
        running.engine.released.set()
        await running.service.wait_idle()
        assert [(await running.store.get(job_id)).state for job_id in job_ids] == ["completed", "queued", "queued"]
        assert len(list(running.inputs.root.iterdir())) == 2
        return job_ids

    async def second(running):
        running.engine.released.set()
        assert running.service.num_jobs == 2
        assert [await running.ended(job_id) for job_id in job_ids] == ["completed"] * 3
        records = [await running.store.get(job_id) for job_id in job_ids]
        assert [record.interruptions for record in records] == [0, 0, 0]
        await running.service.wait_idle()
        assert list(running.inputs.root.iterdir()) == []

    job_ids = run(first, tmp_path)
    run(second, tmp_path)


def test_what_still_runs_when_the_server_ends_is_queued_again(tmp_path):
    async def first(running):
        job_id = await running.begin("hold")
        await running.until_state(job_id, "running")
        return job_id

    async def second(running):
        running.engine.released.set()
        assert await running.ended(job_id) == "completed"
        assert (await running.store.get(job_id)).attempts == 2

    job_id = run(first, tmp_path)
    run(second, tmp_path)


def test_a_job_whose_server_dies_while_it_runs_is_run_again_a_bounded_number_of_times(tmp_path):
    job_id, seeds = None, []

    async def dies(running):
        nonlocal job_id
        if job_id is None:
            job_id = await running.begin("hold")
        await running.until_state(job_id, "running")
        seeds.append(running.engine.seen[job_id].seed)
        # As after kill -9: the row says running, and nobody will write anything any more.
        running.service._attendant._store = Dead()

    for _ in range(MAX_INTERRUPTIONS):
        run(dies, tmp_path)

    async def gives_up(running):
        record = await running.store.get(job_id)
        assert (record.state, record.error_code) == ("failed", "interrupted")
        assert record.interruptions == MAX_INTERRUPTIONS
        assert running.service.num_jobs == 0

    run(gives_up, tmp_path)
    assert seeds == [7] * MAX_INTERRUPTIONS


class Dead:
    """A store that writes nothing."""

    def __getattr__(self, name):
        async def fail(*arguments, **known):
            raise StorageFailed("gone")

        return fail


@pytest.mark.parametrize("published", [True, False])
def test_a_file_that_was_published_before_the_end_completes_its_job_and_half_a_one_does_not(tmp_path, published):
    async def prepare(running):
        drawing = clip("a cube")
        running.engine.state = "loading"  # nothing begins
        job_id = drawing.request.job_id
        await running.store.create(
            [
                JobRecord(
                    job_id=job_id,
                    group_id=new_id("group"),
                    index=0,
                    kind="video",
                    owner="ann",
                    model="wan",
                    request=drawing.request,
                    output=drawing.output,
                    created_at=1.0,
                )
            ]
        )
        key = file_key(job_id, "mp4")
        await running.store.move(job_id, "running")
        await running.store.move(job_id, "encoding", file_key=key, content_type="video/mp4")
        if published:
            await running.storage.put(key, b"the whole clip", "video/mp4")
        return job_id

    job_id = run(prepare, tmp_path)

    async def story(running):
        assert await running.ended(job_id) == "completed"
        record = await running.store.get(job_id)
        if published:
            assert (record.file_bytes, record.attempts) == (14, 1)
            assert job_id not in running.engine.seen
        else:
            assert (record.interruptions, record.attempts) == (1, 2)
            assert job_id in running.engine.seen

    run(story, tmp_path)


def test_a_job_waits_for_a_server_of_its_model_and_can_be_cancelled_meanwhile(tmp_path):
    async def first(running):
        job_ids = [await running.begin("hold", inputs=running.new_inputs()) for _ in range(2)]
        await running.until_state(job_ids[1], "running")
        return job_ids

    async def other_model(running):
        await running.service.wait_idle()
        assert [(await running.store.get(job_id)).state for job_id in job_ids] == ["queued", "queued"]
        assert (await running.service.cancel(job_ids[1])).state == "cancelled"
        assert len(list(running.inputs.root.iterdir())) == 1

    async def same_model(running):
        running.engine.released.set()
        assert await running.ended(job_ids[0]) == "completed"

    job_ids = run(first, tmp_path)
    run(other_model, tmp_path, served_model_name="another")
    run(same_model, tmp_path)


def test_a_store_that_fails_for_a_moment_costs_no_clip(tmp_path):
    async def story(running):
        real, failures = running.store.move, iter(range(2))

        async def move(*arguments, **known):
            if next(failures, None) is not None:
                raise StorageFailed("the database is being restarted")
            return await real(*arguments, **known)

        running.store.move = move
        job_id = await running.begin("a cube")
        assert await running.ended(job_id) == "completed"

    run(story, tmp_path)


def test_a_full_disk_fails_the_clip_and_leaves_nothing(tmp_path):
    async def story(running):
        async def put(*arguments):
            raise StorageFailed("no space left on device")

        real, running.storage.put = running.storage.put, put
        job_id = await running.begin("a cube")
        assert await running.ended(job_id) == "failed"
        assert (await running.store.get(job_id)).error_code == "storage_failed"
        running.storage.put = real
        again = await running.begin("a cube")
        assert await running.ended(again) == "completed"
        assert len(running.files()) == 1

    run(story, tmp_path)


def test_clips_left_by_a_server_that_could_not_load_its_model_stay_queued(tmp_path):
    async def first(running):
        return await running.begin("hold")

    async def cannot_load(running):
        running.engine.state = "loading"
        assert running.service.num_jobs == 1
        running.engine.refusal = "no such model"
        await running.service.wait_idle()
        assert (await running.store.get(job_id)).state == "queued"

    job_id = run(first, tmp_path)
    run(cannot_load, tmp_path, served_model_name="loading")
