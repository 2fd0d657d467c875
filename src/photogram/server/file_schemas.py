"""The shapes of the answers of `/v1/files`, as OpenAI has them."""

from __future__ import annotations

from typing import Literal

import msgspec


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """One uploaded file. It is whole when its client hears of it, so its state is always ``processed``."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
