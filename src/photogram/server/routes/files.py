"""`/v1/files`: uploads that later requests name by id."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from ...core.config import ServeConfig
from ...core.errors import RequestError
from ...jobs.uploads import UploadRecord
from ..answers import json_answer
from ..body import read_body
from ..border import owner_of
from ..fields import Field, coerce, read
from ..file_schemas import FileDeleted, FileList, FileObject
from ..forms import BodyLimits
from ..uploads import Uploads
from . import with_and_without_v1

PURPOSES = ("user_data", "vision", "assistants", "batch", "fine-tune", "evals")
MAX_PAGE = 10_000
_PURPOSE = Field(name="purpose", kind="word", words=PURPOSES, help="What the file is for; kept, and otherwise unused.")
_ANCHOR = Field(name="expires_after[anchor]", kind="word", words=("created_at",), help="From when the age counts.")
_SECONDS = Field(name="expires_after[seconds]", kind="int", low=3600, high=2_592_000, help="Age at which it goes.")
_PAGE = (
    Field(name="limit", kind="int", low=1, high=MAX_PAGE, help="How many."),
    Field(name="after", kind="str", high=64, help="The id to go on after."),
    Field(name="order", kind="word", words=("asc", "desc"), help="By time of upload; default desc."),
    _PURPOSE,
)


def file_routes(config: ServeConfig, uploads: Uploads) -> list[Route]:
    limits = BodyLimits(upload_bytes=config.max_upload_mb * 1_000_000, num_uploads=1)

    async def create(request: Request) -> Response:
        with await read_body(request, limits) as body:
            purpose = read(body.fields, (_PURPOSE,)).text("purpose")
            if purpose is None:
                raise RequestError(
                    "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
                )
            file = next((upload for upload in body.uploads if upload.name == "file"), None)
            if file is None:
                raise RequestError(
                    "Missing required parameter: 'file', as a part of a multipart form.",
                    param="file",
                    code="missing_required_parameter",
                )
            seconds = _expires_after(body.fields.get("expires_after"))
            return json_answer(_object(await uploads.create(file, owner_of(request), purpose, seconds)))

    async def list_files(request: Request) -> Response:
        values = read(dict(request.query_params), _PAGE)
        limit = values.int("limit") or MAX_PAGE
        order: Literal["asc", "desc"] = "asc" if values.text("order") == "asc" else "desc"
        records = await uploads.rows.list(
            owner_of(request),
            purpose=values.text("purpose"),
            after=values.text("after") or None,
            limit=limit + 1,
            order=order,
        )
        data = [_object(record) for record in records[:limit]]
        return json_answer(
            FileList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
                has_more=len(records) > limit,
            )
        )

    async def retrieve(request: Request) -> Response:
        return json_answer(_object(await uploads.get(request.path_params["file_id"], owner_of(request))))

    async def content(request: Request) -> Response:
        record = await uploads.get(request.path_params["file_id"], owner_of(request))
        # Never as what the client says it is: a page of a stranger's would else run in this server's name.
        headers = {"x-content-type-options": "nosniff", "cache-control": "private"}
        return FileResponse(
            uploads.path(record), headers=headers, media_type="application/octet-stream", filename=record.file_id
        )

    async def delete(request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await uploads.delete(file_id, owner_of(request))
        return json_answer(FileDeleted(id=file_id))

    return [
        *with_and_without_v1("/files", create, ["POST"]),
        *with_and_without_v1("/files", list_files),
        *with_and_without_v1("/files/{file_id}", retrieve),
        *with_and_without_v1("/files/{file_id}", delete, ["DELETE"]),
        *with_and_without_v1("/files/{file_id}/content", content),
    ]


def _expires_after(value: object) -> int | None:
    """Return the seconds of ``{"anchor": "created_at", "seconds": ...}``. Raises RequestError."""
    if value is None or value == "":
        return None
    if not isinstance(value, dict):
        raise RequestError("'expires_after' must be an object with 'anchor' and 'seconds'.", param="expires_after")
    coerce(value.get("anchor"), _ANCHOR, _ANCHOR.name)
    seconds = coerce(value.get("seconds"), _SECONDS, _SECONDS.name)
    if seconds is None:
        message = "Missing required parameter: 'expires_after[seconds]'."
        raise RequestError(message, param="expires_after[seconds]", code="missing_required_parameter")
    assert isinstance(seconds, int)
    return seconds


def _object(record: UploadRecord) -> FileObject:
    return FileObject(
        id=record.file_id,
        bytes=record.size_bytes,
        created_at=int(record.created_at),
        expires_at=None if record.expires_at is None else int(record.expires_at),
        filename=record.filename,
        purpose=record.purpose,
    )
