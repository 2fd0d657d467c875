"""Fields of a request: names, kinds and bounds in one table, and the one mechanism that reads them.

A value may come from JSON, a form or the query string, so ``"2"`` is read as 2 and ``"true"`` as True where the kind
says so; null, and an empty text where a text makes no sense, mean that the field is absent. Knows nothing of what the
fields are for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..core.errors import RequestError
from ..core.request import JSONValue

Kind = Literal["int", "float", "bool", "str", "word", "json"]

MAX_TEXT = 32_000
MAX_JSON_DEPTH = 16
MAX_INT = 2**63 - 1
_INTEGER = re.compile(r"([+-]?\d{1,40})(?:\.0*)?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", re.ASCII)
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field: `low` and `high` bound numbers (inclusive) and, for texts, `high` bounds the characters.

    `words` are the values of a kind ``word``, in lower case; letters are compared without their case.
    """

    name: str
    kind: Kind
    help: str
    aliases: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Values:
    """What a body says, by field name; an absent field reads as None."""

    found: Mapping[str, Any]
    unread: tuple[str, ...]

    def int(self, name: str) -> int | None:
        value = self.found.get(name)
        assert value is None or isinstance(value, int)
        return value

    def float(self, name: str) -> float | None:
        value = self.found.get(name)
        assert value is None or isinstance(value, float)
        return value

    def text(self, name: str) -> str | None:
        value = self.found.get(name)
        assert value is None or isinstance(value, str)
        return value

    def flag(self, name: str) -> bool:
        return self.found.get(name) is True


def read(body: Mapping[str, JSONValue], fields: Iterable[Field]) -> Values:
    """Return the values of `fields` in `body`, and the names in `body` that no field claims.

    Raises RequestError naming the field for a value of the wrong kind or out of bounds, and for two spellings of one
    field that disagree.
    """
    found: dict[str, Any] = {}
    claimed: set[str] = set()
    for field in fields:
        spelled: str | None = None
        for spelling in (field.name, *field.aliases):
            if spelling not in body:
                continue
            claimed.add(spelling)
            value = coerce(body[spelling], field, spelling)
            if value is None:
                continue
            if spelled is not None and found[field.name] != value:
                raise RequestError(f"'{spelled}' and '{spelling}' disagree; send one of them.", param=spelling)
            found[field.name], spelled = value, spelled or spelling
    return Values(found, tuple(name for name in body if name not in claimed))


def coerce(value: JSONValue, field: Field, name: str) -> Any:
    """Return `value` as the field's kind, or None where it means absent. Raises RequestError naming `name`."""
    if value is None or (value == "" and field.kind != "str"):
        return None
    match field.kind:
        case "int":
            return _within(_int(value, name), field, name)
        case "float":
            return _within(_float(value, name), field, name)
        case "bool":
            return _bool(value, name)
        case "word":
            return _word(value, field, name)
        case "str":
            return _text(value, field, name)
        case "json":
            return _json(value, name)


def shown(value: object) -> str:
    """Return a value as an error message may quote it: on one line, and short."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text.encode("utf-8", "replace").decode()


def _wrong_type(name: str, value: object, wanted: str) -> RequestError:
    message = f"Invalid type for '{name}': expected {wanted}, but got {shown(value)}."
    return RequestError(message, param=name, code="invalid_type")


def _int(value: JSONValue, name: str) -> int:
    if isinstance(value, str):
        # int() also reads "1_000" and the digits of other scripts, which no client means.
        match = _INTEGER.fullmatch(value.strip())
        if match is None:
            raise _wrong_type(name, value, "an integer")
        value = int(match.group(1))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, value, "an integer")
    return value


def _float(value: JSONValue, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong_type(name, value, "a number")
    if isinstance(value, str) and not _DECIMAL.fullmatch(value.strip()):
        raise _wrong_type(name, value, "a finite number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong_type(name, value, "a number") from None
    if not math.isfinite(number):
        raise RequestError(f"Invalid value for '{name}': {shown(value)} is not a finite number.", param=name)
    return number


def _within(number: int | float, field: Field, name: str) -> int | float:
    low = field.low if field.low is not None else -MAX_INT
    high = field.high if field.high is not None else MAX_INT
    if not low <= number <= high:
        if field.low is None and field.high is None:
            allowed = "a smaller number"
        elif field.high is None:
            allowed = f"at least {field.low}"
        else:
            allowed = f"between {field.low} and {field.high}"
        raise RequestError(f"Invalid value for '{name}': {shown(number)}; must be {allowed}.", param=name)
    return number


def _bool(value: JSONValue, name: str) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, str | int) else None
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise _wrong_type(name, value, "true or false")


def _word(value: JSONValue, field: Field, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a text")
    word = value.strip().lower()
    if word not in field.words:
        allowed = ", ".join(field.words)
        raise RequestError(f"Invalid value for '{name}': {shown(value)}; must be one of {allowed}.", param=name)
    return word


def _text(value: JSONValue, field: Field, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a text")
    limit = MAX_TEXT if field.high is None else int(field.high)
    if len(value) > limit:
        raise RequestError(
            f"'{name}' has {len(value)} characters; at most {limit} are allowed.", param=name, code="string_too_long"
        )
    _check_unicode(value, name)
    return value


def _check_unicode(text: str, name: str) -> None:
    if "\0" in text:
        raise RequestError(f"'{name}' contains a NUL character.", param=name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"'{name}' is not valid Unicode text.", param=name) from None


def _json(value: JSONValue, name: str) -> JSONValue:
    """Return a JSON value; a text that holds a JSON object or list is read, since forms know only texts."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = msgspec.json.decode(value.encode())
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            raise RequestError(f"'{name}' is not valid JSON: {shown(value)}.", param=name) from None
    _check_json(value, name, MAX_JSON_DEPTH)
    return value


def _check_json(value: JSONValue, name: str, depth: int) -> None:
    """Refuse what could not be sent on to a worker: endless nesting, huge integers, non-finite numbers."""
    if depth == 0:
        raise RequestError(f"'{name}' is nested more than {MAX_JSON_DEPTH} levels deep.", param=name)
    if isinstance(value, str):
        _text(value, Field(name=name, kind="str", help=""), name)
    elif isinstance(value, float):
        _float(value, name)
    elif isinstance(value, int) and not -MAX_INT <= value <= MAX_INT:
        raise RequestError(f"Invalid value for '{name}': {shown(value)} is too large.", param=name)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_unicode(key, name)
            _check_json(item, name, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, name, depth - 1)
