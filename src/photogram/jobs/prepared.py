"""Statements of every job's way, compiled once and then run by the driver.

SQLAlchemy writes them, so they fit any database; but handing each over to it costs several times what the database
takes to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Dialect, Insert, Select, Update
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError


class Prepared:
    """One statement with named parameters. Column types that need converting on their way are not for it."""

    def __init__(self, statement: Insert | Select[Any] | Update) -> None:
        self._statement = statement
        self._forms: dict[str, _Form] = {}

    def run(self, connection: Connection, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Run the statement in the connection's transaction and return its first row; None where it has none.

        Raises SQLAlchemy's DBAPIError, as the connection itself does.
        """
        dialect = connection.dialect
        form = self._forms.get(dialect.name)
        if form is None:
            form = self._forms[dialect.name] = _Form(self._statement, dialect)
        cursor = connection.connection.cursor()
        try:
            cursor.execute(form.text, form.parameters(values))
            return _first_row(cursor)
        except dialect.loaded_dbapi.Error as error:
            raise DBAPIError.instance(form.text, None, error, dialect.loaded_dbapi.Error, dialect=dialect) from error
        finally:
            cursor.close()


class _Form:
    """A statement as one kind of database wants it."""

    def __init__(self, statement: Insert | Select[Any] | Update, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._constants = dict(compiled.params)
        self._order = compiled.positiontup if compiled.positional else None

    def parameters(self, values: Mapping[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
        known = {**self._constants, **values}
        return known if self._order is None else tuple([known[name] for name in self._order])


def _first_row(cursor: DBAPICursor) -> tuple[Any, ...] | None:
    if cursor.description is None:
        return None
    row = cursor.fetchone()
    return None if row is None else tuple(row)
