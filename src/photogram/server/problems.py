"""The one place where exceptions become answers.

Every error body is ``{"error": {"message", "type", "param", "code"}, "detail": message}``: OpenAI's shape, and `detail`
for clients of SGLang. Knows nothing of what raised.
"""

from __future__ import annotations

import logging
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..core.errors import Busy, EngineLost, NotFound, RequestError, ServiceError

log = logging.getLogger(__name__)

# OpenAI's SDK waits as told up to 120 s and gives up at once beyond that.
LONGEST_RETRY_AFTER_S = 120
DEFAULT_RETRY_AFTER_S = 5.0


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail
    detail: str


def error_detail(error: ServiceError) -> ErrorDetail:
    return ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)


def answer(error: ServiceError) -> Response:
    """Return the JSON answer of one of our errors, with the headers that tell clients whether to try again."""
    headers: dict[str, str] = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, Busy | EngineLost):
        retry_after_s = DEFAULT_RETRY_AFTER_S
    if retry_after_s is not None:
        headers["retry-after"] = str(min(max(math.ceil(retry_after_s), 1), LONGEST_RETRY_AFTER_S))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    body = msgspec.json.encode(ErrorBody(error=error_detail(error), detail=error.message))
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


def translate(error: Exception, request: Request) -> ServiceError:
    """Return our error for any exception of a handler. An unforeseen one is logged, and its text kept from clients."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException):
        return _of_http(error, request)
    request_id = str(request.scope.get("request_id", "-"))
    log.error("request %s: %s %s failed", request_id, request.method, request.url.path, exc_info=error)
    return ServiceError(f"The server failed to answer this request (request id {request_id}).", code="internal_error")


def _of_http(error: HTTPException, request: Request) -> ServiceError:
    path = request.url.path
    if error.status_code == 404:
        return NotFound(f"Unknown route: {request.method} {path}", code="unknown_url")
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.method} is not allowed for {path}.")
    return RequestError(error.detail)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for the errors that carry a status of their own."""
    response = answer(translate(error, request))
    if isinstance(error, HTTPException) and error.headers is not None and "Allow" in error.headers:
        response.headers["allow"] = error.headers["Allow"]
    return response
