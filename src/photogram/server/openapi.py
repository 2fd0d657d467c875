"""The API's description (OpenAPI 3.1), read off the request table and the answers' structs."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from .. import __version__
from ..core.config import ServeConfig
from ..media.stills import STILLS
from .clip_schemas import (
    CLIP_FILE_FIELDS,
    PAGE_FIELDS,
    PICTURE_FIELDS,
    DeletedVideo,
    Video,
    VideoEvent,
    VideoList,
    VideoPreview,
    VideoProgress,
    clip_fields,
)
from .fields import MAX_INT, Field
from .file_schemas import FileDeleted, FileList, FileObject
from .lora_fields import MERGE_FIELDS, SET_FIELDS, UNMERGE_FIELDS
from .problems import ErrorBody
from .schemas import (
    Health,
    ImagesAnswer,
    JSONSchema,
    LoraChanged,
    LoraListing,
    Model,
    ModelFacts,
    ModelInfo,
    ModelList,
    Readiness,
    ServerInfo,
    image_fields,
)

_ANSWERS = (
    *(ImagesAnswer, ModelFacts, ModelList, Model, ModelInfo, Health, Readiness, ServerInfo),
    *(LoraChanged, LoraListing),
    *(Video, VideoList, DeletedVideo, VideoEvent, VideoProgress, VideoPreview),
    *(FileObject, FileList, FileDeleted, ErrorBody),
)
_REFERENCE = "#/components/schemas/{name}"
_JSON_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "word": "string"}


def describe_api(config: ServeConfig) -> JSONSchema:
    """Return the whole document, with this server's own limits."""
    _, components = msgspec.json.schema_components(_ANSWERS, ref_template=_REFERENCE)
    fields = image_fields(config.max_steps)
    components["ImagesRequest"] = {
        "type": "object",
        "required": ["prompt"],
        "properties": {spelling: _field(field, spelling) for field in fields for spelling in _spellings(field)},
        # Further arguments of the served pipeline go by their own names; what nothing takes is ignored.
        "additionalProperties": True,
    }
    clip = {
        spelling: _field(field, spelling) for field in clip_fields(config.max_steps) for spelling in _spellings(field)
    }
    files = {name: {"description": help} for name, help in CLIP_FILE_FIELDS.items()}
    pictures_only = {name: files[name] for name in PICTURE_FIELDS}
    for name, given in (("VideoRequest", pictures_only), ("VideoEditRequest", {"video": files["video"]})):
        components[name] = {
            "type": "object",
            "required": ["prompt"],
            "properties": {**clip, **given},
            "additionalProperties": True,
        }
    one_or_more: JSONSchema = {"description": "Files, data URLs, or paths of this server's own pictures."}
    components["ImageEditRequest"] = {
        **components["ImagesRequest"],
        "properties": {
            **components["ImagesRequest"]["properties"],
            **dict.fromkeys(("image", "images", "url"), one_or_more),
            "mask": {"description": "PNG of the first image's size; where it is transparent the picture is edited."},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "photogram", "version": __version__},
        "paths": _paths(),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "azure": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
        "security": [{"bearer": []}, {"azure": []}, {}],
    }


def _spellings(field: Field) -> tuple[str, ...]:
    return (field.name, *field.aliases)


def _field(field: Field, spelling: str) -> JSONSchema:
    help = field.help if spelling == field.name else f"The same as {field.name}."
    schema: JSONSchema = {"description": help}
    if field.kind in _JSON_TYPES:
        schema["type"] = [_JSON_TYPES[field.kind], "null"] if field.name != "prompt" else "string"
    if field.words:
        schema["enum"] = [*field.words, None]
    low, high = ("minLength", "maxLength") if field.kind == "str" else ("minimum", "maximum")
    if field.low is not None:
        schema[low] = field.low
    if field.high is not None and field.high < MAX_INT:
        schema[high] = field.high
    return schema


def _paths() -> JSONSchema:
    image_id = {"name": "image_id", "in": "path", "required": True, "schema": {"type": "string"}}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    variant = {"name": "variant", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 9}}
    body = {"schema": {"$ref": _REFERENCE.format(name="ImagesRequest")}}
    edit = {"schema": {"$ref": _REFERENCE.format(name="ImageEditRequest")}}
    file = {"schema": {"type": "string", "format": "binary"}}
    pictures = dict.fromkeys(("image/png", "image/jpeg", "image/webp"), file)
    images = _reply(ImagesAnswer)
    images["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    text = {"schema": {"type": "string"}}
    numbers = {"description": "The numbers", "content": {"text/plain": text, "application/openmetrics-text": text}}
    return {
        "/v1/images/generations": {
            "post": {
                "operationId": "createImage",
                "summary": "Make pictures from a prompt",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": body,
                        "multipart/form-data": body,
                        "application/x-www-form-urlencoded": body,
                    },
                },
                "responses": {"200": images, "default": _reply(ErrorBody)},
            }
        },
        "/v1/images/edits": {
            "post": {
                "operationId": "createImageEdit",
                "summary": "Change pictures as a prompt says",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": edit, "multipart/form-data": edit},
                },
                "responses": {"200": images, "default": _reply(ErrorBody)},
            }
        },
        "/v1/images/{image_id}/content": {
            "get": {
                "operationId": "getImageContent",
                "summary": "Fetch a picture's file",
                "parameters": [image_id, variant],
                "responses": {
                    "200": {"description": "The file", "content": pictures},
                    "206": {"description": "A part of the file", "content": pictures},
                    "default": _reply(ErrorBody),
                },
            }
        },
        **_file_paths(file),
        "/v1/set_lora": _change_loras("setLora", "Load LoRAs and merge them", SET_FIELDS, "lora_nickname"),
        "/v1/merge_lora_weights": _change_loras("mergeLora", "Merge what is set", MERGE_FIELDS),
        "/v1/unmerge_lora_weights": _change_loras("unmergeLora", "Take out what is merged", UNMERGE_FIELDS),
        "/v1/list_loras": _get("listLoras", "The known LoRAs and the active set", LoraListing),
        **_clip_paths(),
        "/models": _get("getServedModel", "The served model", ModelFacts),
        "/v1/models": _get("listModels", "The served model, as OpenAI lists models", ModelList),
        "/v1/models/{model}": _get("getModel", "One model; its id may contain slashes", Model, model),
        "/model_info": _get("getModelInfo", "What the model takes and gives", ModelInfo),
        "/health": _get("getHealth", "Whether the server lives", Health),
        "/ready": _get("getReadiness", "Whether the server can make pictures now: 200 or 503", Readiness),
        "/metrics": {"get": _described("getMetrics", "The server's numbers, for Prometheus", numbers)},
        "/server_info": _get("getServerInfo", "The server's version and load", ServerInfo),
    }


def _file_paths(file: JSONSchema) -> JSONSchema:
    file_id = {"name": "file_id", "in": "path", "required": True, "schema": {"type": "string"}}
    upload = {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {"file": file, "purpose": {"type": "string"}, "expires_after": {"type": "object"}},
    }
    removed = _get("deleteFile", "Remove an uploaded file", FileDeleted, file_id)["get"]
    created = _get("createFile", "Upload a file to name it by id later", FileObject)["get"]
    created["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": upload}}}
    binary = {"description": "The bytes", "content": {"application/octet-stream": {"schema": file}}}
    content = {"operationId": "getFileContent", "summary": "An uploaded file's bytes", "parameters": [file_id]}
    return {
        "/v1/files": {**_get("listFiles", "This key's uploaded files", FileList), "post": created},
        "/v1/files/{file_id}": {**_get("getFile", "One uploaded file", FileObject, file_id), "delete": removed},
        "/v1/files/{file_id}/content": {"get": {**content, "responses": {"200": binary, "default": _reply(ErrorBody)}}},
    }


def _change_loras(operation: str, summary: str, fields: Iterable[Field], *required: str) -> JSONSchema:
    schema: JSONSchema = {"type": "object", "properties": {field.name: _field(field, field.name) for field in fields}}
    body = {"required": bool(required), "content": {"application/json": {"schema": schema}}}
    if required:
        schema["required"] = list(required)
    replies = {"200": _reply(LoraChanged), "default": _reply(ErrorBody)}
    return {"post": {"operationId": operation, "summary": summary, "requestBody": body, "responses": replies}}


def _clip_paths() -> JSONSchema:
    video_id = {"name": "video_id", "in": "path", "required": True, "schema": {"type": "string"}}
    variants = {"name": "variant", "in": "query", "schema": {"type": "string", "enum": ["video", *STILLS]}}
    page = [
        {"name": field.name, "in": "query", "description": field.help, "schema": _field(field, field.name)}
        for field in PAGE_FIELDS
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    file = {"description": "The file", "content": dict.fromkeys(("video/mp4", "image/webp", "image/jpeg"), binary)}
    mp4 = {"description": "The file", "content": {"video/mp4": binary}}
    stream = {"description": "VideoEvent, VideoProgress, VideoPreview", "content": {"text/event-stream": {}}}

    def post(
        operation: str, summary: str, schema: str | None, reply: JSONSchema, *parameters: JSONSchema
    ) -> JSONSchema:
        described = _described(operation, summary, reply, *parameters)
        if schema is not None:
            body = {"schema": {"$ref": _REFERENCE.format(name=schema)}}
            content = {"application/json": body, "multipart/form-data": body}
            described["requestBody"] = {"required": True, "content": content}
        return {"post": described}

    video = _reply(Video)
    content = _described("getVideoContent", "Fetch a video's file, or a picture of it", file, video_id, variants)
    content["responses"]["206"] = file
    return {
        "/v1/videos": {
            **post("createVideo", "Make a video", "VideoRequest", video),
            "get": _described("listVideos", "Videos, page by page", _reply(VideoList), *page),
        },
        "/v1/videos/sync": post("createVideoSync", "Make a video and answer with its file", "VideoRequest", mp4),
        "/v1/videos/edits": post("editVideo", "Draw a clip anew as a prompt says", "VideoEditRequest", video),
        "/v1/videos/extensions": post("extendVideo", "Let a clip go on", "VideoEditRequest", video),
        "/v1/videos/{video_id}": {
            "get": _described("getVideo", "How far a video is", video, video_id),
            "delete": _described("deleteVideo", "Stop and forget a video", _reply(DeletedVideo), video_id),
        },
        "/v1/videos/{video_id}/cancel": post("cancelVideo", "Stop a video", None, video, video_id),
        "/v1/videos/{video_id}/remix": post("remixVideo", "Draw a video anew", "VideoRequest", video, video_id),
        "/v1/videos/{video_id}/content": {"get": content},
        "/v1/videos/{video_id}/events": {"get": _described("watchVideo", "A video's events", stream, video_id)},
    }


def _described(operation: str, summary: str, reply: JSONSchema, *parameters: JSONSchema) -> JSONSchema:
    described: JSONSchema = {"operationId": operation, "summary": summary}
    if parameters:
        described["parameters"] = list(parameters)
    return {**described, "responses": {"200": reply, "default": _reply(ErrorBody)}}


def _get(operation: str, summary: str, answer: type, *parameters: JSONSchema) -> JSONSchema:
    return {"get": _described(operation, summary, _reply(answer), *parameters)}


def _reply(answer: type) -> JSONSchema:
    schema = {"schema": {"$ref": _REFERENCE.format(name=answer.__name__)}}
    return {"description": answer.__name__, "content": {"application/json": schema}}
