"""Jobs for the tests of the store."""

from photogram.core.request import GenerateRequest, OutputSpec
from photogram.jobs.record import JobRecord, new_id


class Clock:
    """Simulated time in seconds."""

    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def job(created_at=1_000_000.0, *, kind="image", owner="ann", group_id=None, index=0, idempotency_key=None, prompt="a"):
    job_id = new_id("img" if kind == "image" else "video")
    return JobRecord(
        job_id=job_id,
        group_id=group_id or job_id,
        index=index,
        kind=kind,
        owner=owner,
        model="tiny",
        request=GenerateRequest(
            job_id=job_id,
            owner=owner,
            task="T2I",
            prompt=prompt,
            width=64,
            height=64,
            num_inference_steps=2,
            guidance_scale=1.5,
            seed=2**63 + 5,
            extra={"eta": 0.5, "words": ["紅", None, True]},
        ),
        output=OutputSpec(width=64, height=64, format="png", compression=75),
        created_at=created_at,
        idempotency_key=idempotency_key,
    )


async def finish(store, record, file_bytes=None, file_key=None):
    """Take a queued job all the way to its end."""
    await store.move(record.job_id, "running")
    await store.move(record.job_id, "encoding", file_key=file_key)
    return await store.move(record.job_id, "completed", file_bytes=file_bytes, content_type="image/png")
