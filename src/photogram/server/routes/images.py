"""`POST /v1/images/generations`, `/edits` and `/variations`, plain and streamed, and `GET /v1/images/{id}/content`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.config import ServeConfig
from ...core.errors import RequestError
from ...jobs.store import JobStore
from ...media.image_file import FILE_TYPES
from ...media.provenance import used_loras
from ...storage import Storage, file_key
from ..answers import header_text
from ..body import read_body
from ..border import owner_of
from ..events import EventStream, event, unless_gone
from ..fields import Field, coerce
from ..files import file_answer, finished_image
from ..forms import BodyLimits
from ..group import Group
from ..idempotency import idempotency_of
from ..inputs import Intake
from ..live import Made, Partial, Stepped
from ..loras import Loras
from ..resolve import ImagesCall, Resolver
from ..schemas import (
    MAX_IMAGES,
    CompletedImage,
    ImageItem,
    ImagesAnswer,
    PartialImage,
    StreamedProgress,
    TokenDetails,
    Usage,
)
from ..service import Service
from . import CLIENT_GONE, with_and_without_v1

# Base64 of so many takes long enough to be felt by others.
_FELT_BYTES = 256 << 10
_VARIANT = Field(name="variant", kind="int", low=0, high=MAX_IMAGES - 1, help="Which picture of the request.")


def image_routes(
    config: ServeConfig,
    service: Service,
    loras: Loras,
    store: JobStore,
    storage: Storage,
    resolver: Resolver,
    intake: Intake,
) -> list[Route]:
    limits = BodyLimits(upload_bytes=config.max_upload_mb * 1_000_000)

    async def create(request: Request) -> Response:
        card = service.card()
        with await read_body(request, limits) as body:
            if "model" in request.path_params:
                body.fields.setdefault("model", request.path_params["model"])
            owner, idempotency = owner_of(request), await idempotency_of(request, body)
            call = resolver.images(body.fields, card, owner, None, await loras.choose(body.fields, card))
            ignored = dict.fromkeys((*call.ignored, *body.shadowed, *(upload.name for upload in body.uploads)))
        return await answer(request, call, await service.begin(call, idempotency=idempotency), ignored)

    async def edit(request: Request) -> Response:
        card = service.card()
        owner = owner_of(request)

        with await read_body(request, limits) as body:
            if "model" in request.path_params:
                body.fields.setdefault("model", request.path_params["model"])
            idempotency = await idempotency_of(request, body)
            inputs = await intake.pictures(body, owner, request.headers.get("host", ""))
            if inputs is None:
                raise RequestError(
                    "Missing required parameter: 'image': the picture to change.",
                    param="image",
                    code="missing_required_parameter",
                )
            try:
                chosen = await loras.choose(body.fields, card)
                is_variation = request.url.path.endswith("/variations")
                call = resolver.images(body.fields, card, owner, inputs, chosen, is_variation=is_variation)
                group = await service.begin(call, inputs=inputs.folder.name, idempotency=idempotency)
            except BaseException:
                inputs.remove()
                raise
            ignored = dict.fromkeys((*call.ignored, *body.shadowed))
        return await answer(request, call, group, ignored)

    async def answer(request: Request, call: ImagesCall, group: Group, ignored: Iterable[str]) -> Response:
        if call.stream:
            return EventStream(request, _events(call, group), _headers(ignored, call.warnings), closing=group.leave)
        try:
            made = await unless_gone(request, group.all_made())
        finally:
            group.leave()
        if made is None:
            return Response(status_code=CLIENT_GONE)
        warnings = dict.fromkeys((*call.warnings, *(text for one in made for text in one.warnings)))
        urls = await _urls(call, made, config, storage) if call.response_format == "url" else None
        body = _answer(call, made, urls)
        if urls is None and sum(len(one.data) for one in made) > _FELT_BYTES:
            data = await asyncio.to_thread(msgspec.json.encode, body)
        else:
            data = msgspec.json.encode(body)
        return Response(data, headers=_headers(ignored, warnings), media_type="application/json")

    async def content(request: Request) -> Response:
        variant = coerce(request.query_params.get("variant"), _VARIANT, "variant")
        record = await finished_image(store, request.path_params["image_id"], owner_of(request), variant)
        return await file_answer(request, record, storage)

    return [
        *with_and_without_v1("/images/generations", create, ["POST"]),
        Route("/openai/deployments/{model}/images/generations", create, methods=["POST"]),
        Route("/openai/images/generations", create, methods=["POST"]),
        Route("/openai/v1/images/generations", create, methods=["POST"]),
        *with_and_without_v1("/images/edits", edit, ["POST"]),
        Route("/openai/deployments/{model}/images/edits", edit, methods=["POST"]),
        *with_and_without_v1("/images/variations", edit, ["POST"]),
        *with_and_without_v1("/images/{image_id}/content", content),
    ]


def _headers(ignored: Iterable[str], warnings: Iterable[str]) -> dict[str, str]:
    texts = {"x-photogram-ignored": header_text(ignored), "x-photogram-warning": header_text(warnings, " ")}
    return {name: text for name, text in texts.items() if text}


async def _urls(call: ImagesCall, made: list[Made], config: ServeConfig, storage: Storage) -> list[str]:
    """Return where each picture can be fetched: signed URLs of an object store where it has the file already."""
    seconds = config.presigned_url_seconds
    suffix = FILE_TYPES[call.format].suffix
    return [
        (await storage.url(file_key(one.image_id, suffix), seconds) if seconds else None)
        or _url(one.image_id, config.public_url)
        for one in made
    ]


def _answer(call: ImagesCall, made: list[Made], urls: list[str] | None) -> ImagesAnswer:
    return ImagesAnswer(
        created=int(time.time()),
        data=[
            ImageItem(
                b64_json=one.data if urls is None else None,
                url=None if urls is None else urls[number],
                id=one.image_id,
                seed=one.seed,
                generated_size=one.generated_size,
            )
            for number, one in enumerate(made)
        ],
        background="opaque",
        output_format=call.format,
        quality=call.echoed_quality,
        size=str(call.size),
        quality_mode=call.drawings[0].request.quality_mode,
        loras=used_loras(call.drawings[0].request),
        usage=_usage(made),
    )


def _url(image_id: str, public_url: str | None) -> str:
    return f"{(public_url or '').rstrip('/')}/v1/images/{image_id}/content"


def _usage(made: Iterable[Made]) -> Usage:
    text_tokens = sum(one.prompt_tokens for one in made)
    image_tokens = sum(one.image_tokens for one in made)
    return Usage(
        input_tokens=text_tokens,
        output_tokens=image_tokens,
        total_tokens=text_tokens + image_tokens,
        input_tokens_details=TokenDetails(image_tokens=0, text_tokens=text_tokens),
        output_tokens_details=TokenDetails(image_tokens=image_tokens, text_tokens=0),
    )


async def _events(call: ImagesCall, group: Group) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a call: partial pictures as they come, one `completed` for each picture."""
    quality = call.echoed_quality or "auto"
    kind = "image_edit" if call.is_edit else "image_generation"
    async for outcome in group.outcomes():
        match outcome:
            case Partial():
                partial = PartialImage(
                    type=f"{kind}.partial_image",
                    b64_json=outcome.data,
                    created_at=int(time.time()),
                    size=str(call.size),
                    quality=quality,
                    background="opaque",
                    output_format=call.format,
                    partial_image_index=outcome.number,
                    index=outcome.index,
                )
                yield event(partial.type, partial)
            case Stepped() if call.stream_progress:
                progress = outcome.progress
                step = StreamedProgress(
                    index=outcome.index,
                    phase=progress.phase,
                    step=progress.step,
                    num_steps=progress.num_steps,
                    fraction=progress.fraction,
                    eta_s=progress.eta_s,
                )
                yield event(step.type, step)
            case Made():
                completed = CompletedImage(
                    type=f"{kind}.completed",
                    b64_json=outcome.data,
                    created_at=int(time.time()),
                    size=str(call.size),
                    quality=quality,
                    background="opaque",
                    output_format=call.format,
                    usage=_usage([outcome]),
                    index=outcome.index,
                    id=outcome.image_id,
                    seed=outcome.seed,
                    generated_size=outcome.generated_size,
                    quality_mode=call.drawings[0].request.quality_mode,
                    loras=used_loras(call.drawings[0].request),
                    warnings=outcome.warnings,
                )
                yield event(completed.type, completed)
