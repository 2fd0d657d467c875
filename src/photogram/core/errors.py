"""Every error photogram raises on purpose.

    PhotogramError
     ├─ ConfigError          the command line or a checkpoint is wrong; ends the program with exit code 2
     └─ ServiceError         answered over HTTP, in OpenAI's shape
         ├─ RequestError     400  a parameter is wrong; names it
         ├─ Unauthorized     401
         ├─ Forbidden        403
         ├─ NotFound         404
         ├─ Conflict         409
         ├─ TooLarge         413
         ├─ Busy             429  the queue is full; carries when to come back
         ├─ GenerationFailed 500  the pipeline raised
         ├─ StorageFailed    502
         ├─ EngineLost       503  no worker can take the job now
         ├─ TimedOut         504  the job ran past its own limit
         └─ OutOfMemory      507  the job does not fit the device

A foreign exception is turned into one of these where it enters.
"""

from __future__ import annotations


class PhotogramError(Exception):
    """Root of everything photogram raises on purpose."""


class ConfigError(PhotogramError):
    """The command line, the environment or a checkpoint cannot be used; one line that says why and what would."""


class ServiceError(PhotogramError):
    """An error with an HTTP status, answered as ``{"error": {"message", "type", "param", "code"}}``."""

    status = 500
    type = "server_error"
    code = "server_error"
    # OpenAI's clients send a request again on 409 and every 5xx; False tells them not to.
    should_retry: bool | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after_s = retry_after_s


class RequestError(ServiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(ServiceError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(ServiceError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"
    should_retry = False


class TooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Busy(ServiceError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class GenerationFailed(ServiceError):
    status = 500
    code = "generation_failed"
    should_retry = False


class StorageFailed(ServiceError):
    status = 502
    code = "storage_failed"


class EngineLost(ServiceError):
    status = 503
    type = "service_unavailable_error"
    code = "engine_unavailable"


class TimedOut(ServiceError):
    status = 504
    code = "timeout"
    should_retry = False


class OutOfMemory(ServiceError):
    status = 507
    code = "out_of_memory"
    should_retry = False


JOB_ERRORS: dict[str, type[ServiceError]] = {
    error.code: error for error in (RequestError, GenerationFailed, EngineLost, TimedOut, OutOfMemory, StorageFailed)
}
"""Errors a worker may report for a job, by code."""
