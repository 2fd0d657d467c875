"""The store's tables, and opening a database: made when new, checked when old, refused when it is not ours."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from ..core.errors import ConfigError

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 2

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

jobs = Table(
    "jobs",
    metadata,
    # The order of acceptance. Times may be equal or run backwards, this never does and is never given twice.
    Column("position", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(64), nullable=False, unique=True),
    Column("group_id", String(64), nullable=False),
    Column("index_in_group", Integer, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("model", Text, nullable=False),
    Column("request", Text, nullable=False),  # JSON
    Column("output", Text, nullable=False),  # JSON
    Column("created_at", Float(53), nullable=False),
    Column("state", String(16), nullable=False),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("attempts", Integer, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("error_param", Text),
    Column("file_key", String(128)),
    Column("content_type", String(64)),
    Column("file_bytes", BigInteger),
    Column("run_s", Float(53)),
    Column("prompt_tokens", Integer),
    Column("image_tokens", Integer),
    Column("idempotency_key", String(256)),
    # --- since version 2
    Column("fingerprint", String(64)),
    Column("served_model", Text),
    Column("interruptions", Integer, nullable=False, server_default="0"),
    Column("inputs", String(64)),
    Column("webhook_url", Text),
    Column("warnings", Text, nullable=False, server_default="[]"),  # JSON
    Column("facts", Text, nullable=False, server_default="{}"),  # JSON
    UniqueConstraint("group_id", "index_in_group"),
    # NULLs are all different to SQL: only jobs with a key are bound by this.
    UniqueConstraint("owner", "idempotency_key", "index_in_group", name="one_use_of_a_key"),
    Index("jobs_by_owner", "kind", "owner", "position"),
    Index("jobs_by_state", "state"),
    Index("jobs_by_finish", "finished_at", "job_id"),
    sqlite_autoincrement=True,
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("position", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(64), nullable=False, unique=True),
    Column("job_id", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("body", Text, nullable=False),  # JSON
    Column("created_at", Float(53), nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Float(53), nullable=False),
    Column("last_error", Text),
    Index("deliveries_due", "state", "due_at"),
    sqlite_autoincrement=True,
)


def open_database(url: str) -> Engine:
    """Return an engine on a database with our tables. Raises ConfigError, having changed nothing, for any other."""
    try:
        engine = create_engine(url)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(f"job store '{url}': no database address that can be used here ({error}).") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
    shown = engine.url.render_as_string(hide_password=True)
    name = engine.url.database if engine.dialect.name == "sqlite" and engine.url.database else shown
    try:
        with engine.begin() as connection:
            _check_or_create(connection, name)
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                # Kept in the file, so it waits until the file is known to be ours.
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    except DBAPIError as error:
        engine.dispose()
        raise ConfigError(_unusable(name, error)) from error
    except ConfigError:
        engine.dispose()
        raise
    return engine


def lock_folder(folder: Path) -> int:
    """Make the folder if need be and keep every other server out of it until the returned descriptor is closed.

    Raises ConfigError when another one has it, or when it cannot be written.
    """
    try:
        # Prompts and pictures are their owner's affair: a new folder is closed to other users of the machine.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--data-dir '{folder}': cannot be written ({error.strerror}).") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"--data-dir '{folder}': another photogram server is using it. Give this one a folder of its own."
        ) from error
    return descriptor


def set_synchronous(connection: Connection, *, promise: bool) -> None:
    """Choose what the next commit waits for: the disk where it promises something to a client, else only the system.

    Without the disk a commit survives the death of the process but not a power cut. Other databases than SQLite
    decide for themselves. To be called before the transaction's first statement.
    """
    if connection.dialect.name != "sqlite":
        return
    wanted = "FULL" if promise else "NORMAL"
    if connection.info.get("synchronous") != wanted:
        connection.exec_driver_sql(f"PRAGMA synchronous = {wanted}")
        connection.info["synchronous"] = wanted


def _set_pragmas(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.execute("PRAGMA busy_timeout = 10000")
    connection.execute("PRAGMA foreign_keys = ON")


def _check_or_create(connection: Connection, name: str) -> None:
    if connection.dialect.name == "sqlite":
        # Damage is looked for once, here, where the operator sees it; a page found bad later fails its request.
        verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise ConfigError(_damaged(name, str(verdict)))
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    tables = set(inspect(connection).get_table_names())
    if not tables:
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        return
    found = connection.scalar(select(schema_version.c.version)) if {"schema_version", "jobs"} <= tables else None
    if found is None:
        raise ConfigError(f"job store '{name}': a database of something else. Give photogram another --data-dir.")
    if found > SCHEMA_VERSION:
        raise ConfigError(
            f"job store '{name}': written with schema {found}, this photogram knows {SCHEMA_VERSION}. "
            "Use the photogram that wrote it, or another --data-dir."
        )
    for version in range(found, SCHEMA_VERSION):
        _log.info("job store '%s': brought from schema %d to %d", name, version, version + 1)
        _MIGRATIONS[version](connection)
    if found < SCHEMA_VERSION:
        # Tables that older versions did not have; the others are left as they are.
        metadata.create_all(connection)
        connection.execute(update(schema_version).values(version=SCHEMA_VERSION))


def _from_1_to_2(connection: Connection) -> None:
    """Keys have fingerprints, jobs say what they need to be run again and whom to tell of their end."""
    for column in (
        "fingerprint VARCHAR(64)",
        "served_model TEXT",
        "interruptions INTEGER DEFAULT '0' NOT NULL",
        "inputs VARCHAR(64)",
        "webhook_url TEXT",
        "warnings TEXT DEFAULT '[]' NOT NULL",
        "facts TEXT DEFAULT '{}' NOT NULL",
    ):
        connection.exec_driver_sql(f"ALTER TABLE jobs ADD COLUMN {column}")


_MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _from_1_to_2}
"""How a database of one version becomes one of the next, all in one transaction. An old step is never edited."""


def _damaged(name: str, verdict: str) -> str:
    return (
        f"job store '{name}': damaged ({verdict.splitlines()[0]}). Nothing was changed. Save what can be read with: "
        f"sqlite3 '{name}' .recover | sqlite3 recovered.sqlite3; or move the file away to start with an empty store."
    )


def _unusable(name: str, error: DBAPIError) -> str:
    reason = str(error.orig)
    if "not a database" in reason or "malformed" in reason:
        return _damaged(name, reason)
    if "locked" in reason:
        return f"job store '{name}': in use by another program ({reason})."
    return f"job store '{name}': cannot be opened ({reason}). Check that the folder exists and can be written."
