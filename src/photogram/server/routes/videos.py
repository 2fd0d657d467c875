"""The Videos API: clips are made by jobs that go on whoever waits for them, and are asked for by their ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.config import ServeConfig, parse_keep
from ...core.errors import RequestError
from ...jobs.record import JobRecord
from ...jobs.store import JobStore
from ...media.pool import MediaPool
from ...media.stills import STILLS
from ...storage import Storage
from ..answers import header_text, json_answer
from ..beginnings import Start
from ..body import read_body
from ..border import owner_of
from ..clip_answers import VideoAnswers, facts_of, poll_after_ms
from ..clip_schemas import PAGE_FIELDS, DeletedVideo, VideoList, VideoPreview, VideoProgress
from ..clip_sources import ClipSources, Found
from ..events import EventStream, event, unless_gone
from ..fields import Field, coerce, read
from ..files import data_answer, file_answer, finished_video, owned_video, stored_bytes
from ..forms import BodyLimits
from ..idempotency import idempotency_of
from ..live import Moved, Partial, Stepped, job_error
from ..loras import Loras
from ..resolve import Resolver
from ..service import Service
from . import CLIENT_GONE, with_and_without_v1

_VARIANT = Field(name="variant", kind="word", words=("video", *STILLS), help="Default video.")


def video_routes(
    config: ServeConfig,
    service: Service,
    loras: Loras,
    store: JobStore,
    storage: Storage,
    media: MediaPool,
    resolver: Resolver,
    sources: ClipSources,
) -> list[Route]:
    videos = _Videos(config, service, loras, store, storage, media, resolver, sources)
    return [
        *with_and_without_v1("/videos", videos.create, ["POST"]),
        *with_and_without_v1("/videos", videos.listing),
        *with_and_without_v1("/videos/sync", videos.sync, ["POST"]),
        *with_and_without_v1("/videos/edits", videos.edit, ["POST"]),
        *with_and_without_v1("/videos/extensions", videos.extend, ["POST"]),
        *with_and_without_v1("/videos/{video_id}", videos.retrieve),
        *with_and_without_v1("/videos/{video_id}", videos.delete, ["DELETE"]),
        *with_and_without_v1("/videos/{video_id}/cancel", videos.cancel, ["POST"]),
        *with_and_without_v1("/videos/{video_id}/remix", videos.remix, ["POST"]),
        *with_and_without_v1("/videos/{video_id}/content", videos.content),
        *with_and_without_v1("/videos/{video_id}/events", videos.events),
        Route("/openai/videos", videos.create, methods=["POST"]),
        Route("/openai/videos", videos.listing),
        Route("/openai/v1/videos", videos.create, methods=["POST"]),
        Route("/openai/v1/videos", videos.listing),
    ]


class _Videos:
    """The endpoints, each a method."""

    def __init__(
        self,
        config: ServeConfig,
        service: Service,
        loras: Loras,
        store: JobStore,
        storage: Storage,
        media: MediaPool,
        resolver: Resolver,
        sources: ClipSources,
    ) -> None:
        self._limits = BodyLimits(upload_bytes=config.max_upload_mb * 1_000_000)
        self._service = service
        self._loras = loras
        self._store = store
        self._storage = storage
        self._media = media
        self._resolver = resolver
        self._sources = sources
        self._answers = VideoAnswers(parse_keep(config.keep).age_s)

    # --- making clips ---------------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        return self._answer(*await self._accept(request, None))

    async def edit(self, request: Request) -> Response:
        return self._answer(*await self._accept(request, "redraw"))

    async def extend(self, request: Request) -> Response:
        return self._answer(*await self._accept(request, "extend"))

    async def remix(self, request: Request) -> Response:
        original = await finished_video(self._store, request.path_params["video_id"], owner_of(request))
        return self._answer(*await self._accept(request, "redraw", original))

    async def sync(self, request: Request) -> Response:
        """Answer with the file itself. A client that goes away takes its clip with it."""
        record, headers = await self._accept(request, None)
        try:
            final = await unless_gone(request, self._until_final(record.job_id))
        except BaseException:
            await self._service.cancel(record.job_id)
            raise
        if final is None:
            await self._service.cancel(record.job_id)
            return Response(status_code=CLIENT_GONE)
        if final.state == "failed":
            raise job_error(final.error_code or "", final.error_message or "", final.error_param)
        if final.state == "cancelled":
            raise RequestError(f"Video '{final.job_id}' was cancelled.", code="cancelled")
        answer = await file_answer(request, final, self._storage)
        answer.headers.update({**headers, "x-photogram-video-id": final.job_id})
        return answer

    async def _until_final(self, video_id: str) -> JobRecord:
        async with aclosing(self._service.watch(video_id)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Moved) and outcome.record.is_finished:
                    return outcome.record
        return await self._store.get(video_id)

    async def _accept(
        self, request: Request, start: Start | None, original: JobRecord | None = None
    ) -> tuple[JobRecord, dict[str, str]]:
        """Begin what the request asks for; return its record, and headers with what is to be said of it.

        `original` is a clip of this server's that is drawn anew.
        """
        card, owner, host = self._service.card(), owner_of(request), request.headers.get("host", "")
        with ExitStack() as opened:
            body = opened.enter_context(await read_body(request, self._limits))
            idempotency = await idempotency_of(request, body)
            found: Found | None
            if original is not None:
                found = await self._sources.original(original, card)
            elif start is None:
                found = await self._sources.picture(body, owner, host, card)
            else:
                found = await self._sources.clip(body, owner, host, card, start)
            if found is not None:
                opened.callback(found.close)
            beginning = None if found is None else found.beginning
            try:
                chosen = await self._loras.choose(body.fields, card)
                call = self._resolver.clip(body.fields, card, owner, beginning, chosen)
                if found is not None:
                    await self._sources.lay_out(found, call)
                record = await self._service.begin_clip(
                    call.drawing,
                    model=call.model,
                    inputs=None if beginning is None else beginning.folder.name,
                    idempotency=idempotency,
                    webhook_url=call.webhook_url,
                    facts=facts_of(call),
                )
            except BaseException:
                if found is not None:
                    found.remove()
                raise
            unread = [upload.name for upload in body.uploads if found is None or upload.file is not found.file]
            ignored = dict.fromkeys((*call.ignored, *body.shadowed, *(found.ignored if found else unread)))
        said = {"x-photogram-ignored": header_text(ignored), "x-photogram-warning": header_text(call.warnings, " ")}
        return record, {name: text for name, text in said.items() if text}

    def _answer(self, record: JobRecord, headers: dict[str, str] | None = None) -> Response:
        progress = self._service.progress(record.job_id)
        polling = {} if record.is_finished else {"openai-poll-after-ms": str(poll_after_ms(progress))}
        return json_answer(self._answers.video(record, progress), headers={**(headers or {}), **polling})

    # --- clips by their ids ---------------------------------------------------------------------------------------

    async def listing(self, request: Request) -> Response:
        values = read(dict(request.query_params), PAGE_FIELDS)
        limit = values.int("limit")
        limit = 20 if limit is None else limit
        records = await self._store.list(
            kind="video",
            owner=owner_of(request),
            after=values.text("after") or None,
            limit=limit + 1,
            order="asc" if values.text("order") == "asc" else "desc",
        )
        data = [self._answers.video(record, self._service.progress(record.job_id)) for record in records[:limit]]
        return json_answer(
            VideoList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
                has_more=len(records) > limit,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        return self._answer(await self._owned(request))

    async def delete(self, request: Request) -> Response:
        record = await self._owned(request)
        await self._service.delete(record.job_id)
        return json_answer(DeletedVideo(id=record.job_id))

    async def cancel(self, request: Request) -> Response:
        record = await self._owned(request)
        return self._answer(await self._service.cancel(record.job_id))

    async def content(self, request: Request) -> Response:
        variant = coerce(request.query_params.get("variant"), _VARIANT, "variant") or "video"
        record = await finished_video(self._store, request.path_params["video_id"], owner_of(request))
        if variant == "video":
            return await file_answer(request, record, self._storage)
        still = STILLS[variant]
        data = await self._media.still(await stored_bytes(record, self._storage), variant)
        return data_answer(request, data, f"{record.job_id}.{still.suffix}", still.content_type)

    async def events(self, request: Request) -> Response:
        record = await self._owned(request)
        return EventStream(request, self._events(record.job_id), {}, closing=lambda: None)

    async def _events(self, video_id: str) -> AsyncGenerator[bytes, None]:
        """Yield a clip's server-sent events, from how it is now to its final status."""
        record: JobRecord | None = None
        told_status = None
        async with aclosing(self._service.watch(video_id)) as outcomes:
            async for outcome in outcomes:
                match outcome:
                    case Moved():
                        record = outcome.record
                        moved = self._answers.event(record, self._service.progress(video_id))
                        if moved.video.status != told_status:
                            told_status = moved.video.status
                            yield event(moved.type, moved)
                    case Stepped(progress=progress) if record is not None:
                        step = VideoProgress(
                            id=video_id,
                            progress=self._answers.percent(record, progress),
                            phase=progress.phase,
                            step=progress.step,
                            num_steps=progress.num_steps,
                            eta_s=progress.eta_s,
                        )
                        yield event(step.type, step)
                    case Partial():
                        preview = VideoPreview(id=video_id, partial_image_index=outcome.number, b64_json=outcome.data)
                        yield event(preview.type, preview)

    async def _owned(self, request: Request) -> JobRecord:
        return await owned_video(self._store, request.path_params["video_id"], owner_of(request))
