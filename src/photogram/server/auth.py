"""Who asks: keys, and the owner that a key stands for. Knows nothing of routes but which need no key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers

from ..core.config import ServeConfig
from ..core.errors import ConfigError, Forbidden, Unauthorized

ANONYMOUS = "anonymous"
OPEN_PATHS = frozenset({"/", "/health", "/liveness", "/ready", "/v1/health", "/v1/ready", "/v1/liveness"})
"""Answered without a key."""


def owner_of(key: str) -> str:
    """Return the name under which a key's jobs are kept: a digest, so that the store never holds the key."""
    return hashlib.sha256(b"photogram owner\0" + key.encode()).hexdigest()[:32]


def read_keys(config: ServeConfig) -> tuple[str, ...]:
    """Return the keys of the settings and of their key file: one a line; empty lines and ``#`` comments do not count.

    Raises ConfigError for a file that cannot be read or holds no key: the server would else be open to all.
    """
    if config.api_key_file is None:
        return config.api_key
    try:
        lines = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file '{config.api_key_file}': cannot be read ({error}).") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file '{config.api_key_file}': holds no key.")
    return (*config.api_key, *keys)


def sent_key(headers: Headers) -> str | None:
    """Return the key of ``Authorization: Bearer`` or, as Azure's clients send it, of ``api-key``."""
    scheme, _, token = (headers.get("authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    azure = headers.get("api-key")
    return azure.strip() if azure and azure.strip() else None


class Keys:
    """The keys of this server. With none configured everybody may do everything, under any bearer token."""

    def __init__(self, keys: Iterable[str], admin_key: str | None = None) -> None:
        self._digests: Mapping[bytes, str] = {_digest(key): owner_of(key) for key in keys if key}
        self._admin = _digest(admin_key) if admin_key else None
        self._admin_owner = owner_of(admin_key) if admin_key else ANONYMOUS

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def owner(self, headers: Headers) -> str:
        """Return whose request this is. Raises Unauthorized for a missing or wrong key."""
        if not self.required:
            return ANONYMOUS
        key = sent_key(headers)
        if key is None:
            raise Unauthorized(
                "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'.", code="missing_api_key"
            )
        if self._is_admin(key):
            return self._admin_owner
        owner = self._owner_of_known(key)
        if owner is None:
            raise Unauthorized(f"Incorrect API key provided: {_masked(key)}.")
        return owner

    def require_admin(self, headers: Headers) -> None:
        """Pass for who may change the server: with an admin key that key alone, else any key, else anybody.

        Raises Unauthorized without a good key, Forbidden for a good key that is no admin key.
        """
        if self._admin is None:
            self.owner(headers)
            return
        key = sent_key(headers)
        if key is not None and self._is_admin(key):
            return
        if key is not None and self._owner_of_known(key) is not None:
            raise Forbidden("This API key may not use administrative routes.")
        if key is None:
            raise Unauthorized("This route needs the admin API key.", code="missing_api_key")
        raise Unauthorized(f"Incorrect API key provided: {_masked(key)}.")

    def _is_admin(self, key: str) -> bool:
        return self._admin is not None and hmac.compare_digest(self._admin, _digest(key))

    def _owner_of_known(self, key: str) -> str | None:
        # Every digest is compared, so that the time taken tells nothing of which keys exist.
        digest = _digest(key)
        found: str | None = None
        for known, owner in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _masked(key: str) -> str:
    return f"{key[:2]}***{key[-2:]}" if len(key) >= 12 else "***"
