"""Flags read off `ServeConfig`: one for each field, so that the code, the command line and the docs agree.

Knows how text becomes a field's value. What values are allowed is checked by the configuration itself.
"""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Literal, NoReturn

from ..core.config import ServeConfig, settings
from ..core.errors import ConfigError

Kind = Literal["text", "whole number", "number", "switch"]

_KINDS: Mapping[object, Kind] = {int: "whole number", float: "number", bool: "switch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag: ``--max-queue`` for the field ``max_queue``. `choices` is empty where any text goes."""

    name: str
    field: str
    kind: Kind
    choices: tuple[str, ...]
    repeated: bool
    default: object
    help: str

    @property
    def shown_default(self) -> str:
        match self.default:
            case None | ():
                return "none"
            case True:
                return "on"
            case False:
                return "off"
        return str(self.default)

    def parse(self, text: str) -> str | int | float:
        """Return the value that `text` stands for. Raises ConfigError when it is none of this flag's kind."""
        if self.choices and text not in self.choices:
            raise ConfigError(f"{self.name} '{text}': must be {_either(self.choices)}.")
        try:
            # int() would read "30_000" too, and hyphens and underscores are one in flags.
            if self.kind != "text" and "_" in text:
                raise ValueError(text)
            match self.kind:
                case "whole number":
                    return int(text)
                case "number":
                    return float(text)
        except ValueError:
            raise ConfigError(f"{self.name} '{text}': must be a {self.kind}.") from None
        return text


def flags() -> tuple[Flag, ...]:
    """Return the flags of `photogram serve`, in the order of the docs."""
    hints = typing.get_type_hints(ServeConfig)
    found: list[Flag] = []
    for field in settings():
        hint = hints[field.name]
        repeated = typing.get_origin(hint) is tuple
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        plain = choices or next(part for part in (*typing.get_args(hint), hint) if part is not NoneType)
        found.append(
            Flag(
                name=f"--{field.name.replace('_', '-')}",
                field=field.name,
                kind=_KINDS.get(plain, "text"),
                choices=choices,
                repeated=repeated,
                default=() if field.default is MISSING else field.default,
                help=field.metadata["help"],
            )
        )
    return tuple(found)


class FlagParser(argparse.ArgumentParser):
    """argparse with one-line errors, hyphens and underscores alike, and no guessing of shortened flags."""

    def __init__(self, *, prog: str, usage: str, description: str) -> None:
        super().__init__(prog=prog, usage=usage, description=description, allow_abbrev=False)
        self.serve_flags: tuple[Flag, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} ({self.prog} --help lists the flags).")

    def add_serve_flags(self, *, only: Sequence[str] | None = None) -> None:
        """Add the settings of `photogram serve`, or those fields of it that `only` names."""
        self.serve_flags = tuple(flag for flag in flags() if only is None or flag.field in only)
        for flag in self.serve_flags:
            # What a computed default comes to stands in the help itself.
            text = flag.help if "default:" in flag.help else f"{flag.help} (default: {flag.shown_default})"
            text = text.replace("%", "%%")
            if flag.kind == "switch":
                action = argparse.BooleanOptionalAction
                self.add_argument(flag.name, dest=flag.field, action=action, default=argparse.SUPPRESS, help=text)
                continue
            self.add_argument(
                flag.name,
                dest=flag.field,
                metavar="|".join(flag.choices) or {"text": "TEXT", "whole number": "N", "number": "X"}[flag.kind],
                action="append" if flag.repeated else "store",
                default=argparse.SUPPRESS,
                help=text,
            )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the command line. Raises ConfigError naming the first argument that nothing takes."""
        namespace, unknown = self.parse_known_args(hyphened(arguments))
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(word, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags."
            raise ConfigError(f"'{unknown[0]}' is not known to {self.prog}: {hint}")
        return namespace

    def config(self, namespace: argparse.Namespace, *, model: str | None = None) -> ServeConfig:
        """Return the settings: the flags given, else defaults.

        `model` is the command's positional argument. Raises ConfigError.
        """
        given = vars(namespace)
        values: dict[str, typing.Any] = {}
        for flag in self.serve_flags:
            if flag.field not in given:
                continue
            value = given[flag.field]
            if flag.repeated:
                values[flag.field] = tuple(flag.parse(text) for text in value)
            else:
                values[flag.field] = value if isinstance(value, bool) else flag.parse(value)
        if model is not None:
            if values.get("model_path", model) != model:
                raise ConfigError(f"two models: '{model}' and --model-path '{values['model_path']}'; name one.")
            values["model_path"] = model
        return ServeConfig(**values)


def hyphened(arguments: Sequence[str]) -> list[str]:
    """Spell every flag with hyphens: ``--max_queue=3`` becomes ``--max-queue=3``."""
    spelled: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*spelled, *arguments[position:]]
        name, equals, value = argument.partition("=")
        spelled.append(f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument)
    return spelled


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
