"""Write the tables of the docs that are read off the code, or with `--check` say which of them are out of date.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from photogram.cli.doctor import KNOWN_MODELS
from photogram.cli.flags import Flag, flags
from photogram.core.config import ServeConfig
from photogram.server.clip_schemas import clip_fields
from photogram.server.fields import MAX_INT, Field
from photogram.server.lora_fields import SET_FIELDS
from photogram.server.schemas import image_fields

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def configuration() -> str:
    """One row for each flag of `photogram serve`."""
    rows = [f"| `{spelling(flag)}` | {default(flag)} | {cell(flag.help)} |" for flag in flags()]
    return "\n".join(("| flag | default | meaning |", "|---|---|---|", *rows))


def known_models() -> str:
    """One row for each model that `photogram doctor` measures this machine against."""
    rows = [f"| {name} | {billions:.1f} B | {billions * 2:.1f} GB |" for name, billions in KNOWN_MODELS]
    return "\n".join(("| model | parameters | weights in bf16 |", "|---|---|---|", *rows))


def image_request() -> str:
    """One row for each field of a picture's request, with the default limits."""
    return request_table(image_fields(ServeConfig().max_steps))


def clip_request() -> str:
    """One row for each field of a clip's request, with the default limits."""
    return request_table(clip_fields(ServeConfig().max_steps))


def request_table(fields: Iterable[Field]) -> str:
    rows = [f"| {names(field)} | {kind(field)} | {cell(field.help)} |" for field in fields]
    return "\n".join(("| field | values | meaning |", "|---|---|---|", *rows))


def set_lora() -> str:
    """One row for each field of `POST /v1/set_lora`."""
    return "\n".join(("| field | meaning |", "|---|---|", *(f"| `{f.name}` | {cell(f.help)} |" for f in SET_FIELDS)))


def names(field: Field) -> str:
    aliases = ", ".join(f"`{alias}`" for alias in field.aliases)
    return f"`{field.name}`" + (f" (also {aliases})" if aliases else "")


def kind(field: Field) -> str:
    """The values of a field in words: ``whole number, 1 to 10``."""
    words = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "json": "any JSON"}
    if field.kind == "word":
        return ", ".join(f"`{word}`" for word in field.words)
    if field.kind == "str":
        return f"text, at most {field.high:,} characters"
    text = words[field.kind]
    if field.low is not None:
        unbounded = field.high is None or field.high >= MAX_INT
        text += f", at least {field.low}" if unbounded else f", {field.low} to {field.high}"
    return text


def spelling(flag: Flag) -> str:
    if flag.kind == "switch":
        return f"{flag.name}`, `--no-{flag.name[2:]}"
    values = {"text": "TEXT", "whole number": "N", "number": "X"}
    return f"{flag.name} {'|'.join(flag.choices) or values[flag.kind]}".replace("|", "\\|")


def default(flag: Flag) -> str:
    if flag.default is None or flag.default == () or flag.kind == "switch":
        return flag.shown_default
    return f"`{flag.shown_default}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES: Mapping[str, Callable[[], str]] = {
    "configuration": configuration,
    "known-models": known_models,
    "image-request": image_request,
    "set-lora": set_lora,
    "clip-request": clip_request,
}


def rewritten(text: str) -> str:
    """Return a page with its tables as the code has them now. Raises KeyError for a table nobody makes."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[3]}", text)


def main(check: bool) -> int:
    stale = [page for page in sorted(DOCS.rglob("*.md")) if rewritten(page.read_text()) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.name} is out of date: run `make docs`", file=sys.stderr)
        else:
            page.write_text(rewritten(page.read_text()))
            print(f"{page.name} written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
