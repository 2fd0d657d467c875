"""API keys from the three places they may stand in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..core.config import ServeConfig
from ..core.errors import ConfigError
from ..server.auth import read_keys

VARIABLE = "PHOTOGRAM_API_KEYS"


def with_keys(config: ServeConfig, environ: Mapping[str, str]) -> ServeConfig:
    """Return the settings with every key in `api_key`, once each: of `--api-key`, of its file, of the environment.

    Raises ConfigError for an empty key, and for a file or a variable that is named but holds none: it would else be
    a server without keys that its operator takes for one with keys.
    """
    if not all(key.strip() for key in config.api_key):
        raise ConfigError("--api-key '': must not be empty.")
    if config.admin_api_key is not None and not config.admin_api_key.strip():
        raise ConfigError("--admin-api-key '': must not be empty.")
    keys = [*read_keys(config)]
    if VARIABLE in environ:
        found = [key.strip() for key in environ[VARIABLE].split(",") if key.strip()]
        if not found:
            raise ConfigError(f"{VARIABLE} is set but holds no key; unset it to serve without keys.")
        keys += found
    return dataclasses.replace(config, api_key=tuple(dict.fromkeys(keys)), api_key_file=None)
