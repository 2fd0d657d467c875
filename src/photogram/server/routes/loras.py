"""`POST /v1/set_lora`, `/v1/merge_lora_weights`, `/v1/unmerge_lora_weights` and `GET /v1/list_loras`."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..answers import header_text, json_answer
from ..auth import Keys
from ..body import read_body
from ..forms import BodyLimits
from ..lora_fields import read_merge, read_set, read_unmerge
from ..loras import Loras
from ..schemas import LoraChanged
from ..service import Service
from . import with_and_without_v1

_LIMITS = BodyLimits(body_bytes=1 << 20, num_uploads=0)


def lora_routes(service: Service, loras: Loras, keys: Keys) -> list[Route]:
    """Return the routes that manage LoRAs, which are administrative."""

    async def set_lora(request: Request) -> Response:
        keys.require_admin(request.headers)
        card = service.card()
        with await read_body(request, _LIMITS) as body:
            asked, ignored = read_set(body.fields)
            return _changed(await loras.set(asked, card), (*ignored, *body.shadowed))

    async def merge(request: Request) -> Response:
        keys.require_admin(request.headers)
        card = service.card()
        with await read_body(request, _LIMITS) as body:
            target, strength, ignored = read_merge(body.fields)
            return _changed(await loras.merge(target, strength, card), (*ignored, *body.shadowed))

    async def unmerge(request: Request) -> Response:
        keys.require_admin(request.headers)
        card = service.card()
        with await read_body(request, _LIMITS) as body:
            target, ignored = read_unmerge(body.fields)
            return _changed(await loras.unmerge(target, card), (*ignored, *body.shadowed))

    async def listing(request: Request) -> Response:
        keys.require_admin(request.headers)
        return json_answer(loras.listing(service.card()))

    return [
        *with_and_without_v1("/set_lora", set_lora, ["POST"]),
        *with_and_without_v1("/merge_lora_weights", merge, ["POST"]),
        *with_and_without_v1("/unmerge_lora_weights", unmerge, ["POST"]),
        *with_and_without_v1("/list_loras", listing),
    ]


def _changed(message: str, ignored: Iterable[str]) -> Response:
    names = header_text(dict.fromkeys(ignored))
    return json_answer(LoraChanged(message=message), headers={"x-photogram-ignored": names} if names else None)
