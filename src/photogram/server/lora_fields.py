"""What requests say of LoRAs: the bodies of the LoRA endpoints, and `loras` and `model` of a picture or a clip.

Names, kinds and bounds only; whether such a LoRA exists is found out elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..core.errors import RequestError
from ..core.request import MAX_LORA_STRENGTH, JSONValue, LoraTarget, LoraUse
from .fields import Field, coerce, read, shown

MAX_LORAS = 16
MAX_NICKNAME = 256
TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)

SET_FIELDS = (
    Field(name="lora_nickname", kind="json", help="One nickname or a list of them. Required."),
    Field(name="lora_path", kind="json", help="File, folder or hub id of each; null for one that is known already."),
    Field(name="target", kind="json", help="all, transformer, transformer_2 or critic; one for all, or one for each."),
    Field(name="strength", kind="json", help="Default 1.0; one for all, or one for each."),
)
MERGE_FIELDS = (
    Field(name="target", kind="word", words=TARGETS, help="Default all."),
    Field(
        name="strength", kind="float", low=-MAX_LORA_STRENGTH, high=MAX_LORA_STRENGTH, help="Of every one; default 1.0."
    ),
)
UNMERGE_FIELDS = MERGE_FIELDS[:1]
LORAS_FIELD = Field(
    name="loras",
    kind="json",
    help="LoRAs of this request alone: a list of {path or nickname, strength, target}; [] for none.",
)

_TARGET, _STRENGTH = MERGE_FIELDS
_NICKNAME = Field(name="nickname", kind="str", high=MAX_NICKNAME, help="")
_PATH = Field(name="path", kind="str", high=1024, help="")
_ITEM_KEYS = {"path": "path", "nickname": "nickname", "strength": "strength", "scale": "strength", "target": "target"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedLora:
    """One LoRA as a request names it: by nickname, by path or by both. `param` is where it stands in the request."""

    nickname: str | None
    path: str | None
    strength: float = 1.0
    target: LoraTarget = "all"
    param: str
    path_param: str


@dataclass(frozen=True, slots=True)
class ChosenLoras:
    """The LoRAs of one request, in the order of merging; `warnings` are sentences for its client."""

    uses: tuple[LoraUse, ...] = ()
    warnings: tuple[str, ...] = ()


NO_LORAS = ChosenLoras()


def read_set(body: Mapping[str, JSONValue]) -> tuple[tuple[AskedLora, ...], tuple[str, ...]]:
    """Return what `set_lora` asks for, and the names of the fields that mean nothing.

    Raises RequestError naming the field.
    """
    values = read(body, SET_FIELDS)
    found = values.found
    if found.get("lora_nickname") is None:
        raise RequestError(
            "Missing required parameter: 'lora_nickname'.", param="lora_nickname", code="missing_required_parameter"
        )
    nicknames = _listed(found["lora_nickname"])
    if not 1 <= len(nicknames) <= MAX_LORAS:
        raise RequestError(f"'lora_nickname': 1 to {MAX_LORAS} nicknames are needed.", param="lora_nickname")
    num = len(nicknames)
    paths = _one_for_each(found.get("lora_path"), "lora_path", num, broadcast=False)
    targets = _one_for_each(found.get("target"), "target", num)
    strengths = _one_for_each(found.get("strength"), "strength", num)
    asked = tuple(
        AskedLora(
            nickname=_nickname(nickname, "lora_nickname"),
            path=coerce(path or None, _PATH, "lora_path"),
            target=coerce(target, _TARGET, "target") or "all",
            strength=_or_one(coerce(strength, _STRENGTH, "strength")),
            param="lora_nickname",
            path_param="lora_path",
        )
        for nickname, path, target, strength in zip(nicknames, paths, targets, strengths, strict=True)
    )
    return asked, values.unread


def read_merge(body: Mapping[str, JSONValue]) -> tuple[LoraTarget, float, tuple[str, ...]]:
    """Return the target and strength of `merge_lora_weights`, and the names of the fields that mean nothing."""
    values = read(body, MERGE_FIELDS)
    return _target(values.text("target")), _or_one(values.float("strength")), values.unread


def read_unmerge(body: Mapping[str, JSONValue]) -> tuple[LoraTarget, tuple[str, ...]]:
    values = read(body, UNMERGE_FIELDS)
    return _target(values.text("target")), values.unread


def read_loras(body: Mapping[str, JSONValue]) -> tuple[AskedLora, ...] | None:
    """Return the `loras` of a request for a picture or a clip; None where it says nothing of them.

    An entry is an object, or a text: its nickname. Raises RequestError naming the entry.
    """
    value = coerce(body.get("loras"), LORAS_FIELD, "loras")
    if value is None:
        return None
    items = _listed(value)
    if len(items) > MAX_LORAS:
        raise RequestError(f"'loras' has {len(items)} entries; at most {MAX_LORAS} are allowed.", param="loras")
    return tuple(_item(item, f"loras[{position}]") for position, item in enumerate(items))


def _item(item: JSONValue, param: str) -> AskedLora:
    if isinstance(item, str):
        return AskedLora(nickname=_nickname(item, param), path=None, param=param, path_param=param)
    if not isinstance(item, dict):
        raise RequestError(f"{param}: expected an object, but got {shown(item)}.", param=param, code="invalid_type")
    values: dict[str, JSONValue] = {}
    for key, value in item.items():
        name = _ITEM_KEYS.get(key)
        if name is None:
            raise RequestError(
                f"{param}: {shown(key)} is not known; an entry has path or nickname, strength, target.", param=param
            )
        if values.setdefault(name, value) != value:
            raise RequestError(f"{param}: 'strength' and 'scale' disagree; send one of them.", param=param)
    nickname, path = values.get("nickname"), values.get("path")
    if not nickname and not path:
        raise RequestError(f"{param}: a path or a nickname is needed.", param=param, code="missing_required_parameter")
    return AskedLora(
        nickname=_nickname(nickname, f"{param}.nickname") if nickname else None,
        path=coerce(path or None, _PATH, f"{param}.path"),
        strength=_or_one(coerce(values.get("strength"), _STRENGTH, f"{param}.strength")),
        target=coerce(values.get("target"), _TARGET, f"{param}.target") or "all",
        param=f"{param}.nickname",
        path_param=f"{param}.path",
    )


def _listed(value: JSONValue) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one_for_each(value: JSONValue, name: str, num: int, *, broadcast: bool = True) -> list[Any]:
    """Spread a value over `num` LoRAs. Raises RequestError for a list of another length."""
    if value is None:
        return [None] * num
    if not isinstance(value, list) and (broadcast or num == 1):
        return [value] * num
    values = _listed(value)
    if len(values) != num:
        raise RequestError(
            f"Length mismatch: lora_nickname has {num} items, but {name} has {len(values)} items.", param=name
        )
    return values


def _nickname(value: JSONValue, param: str) -> str:
    nickname = coerce(value, _NICKNAME, param)
    if not isinstance(nickname, str) or not nickname or not nickname.isprintable():
        raise RequestError(f"'{param}': a nickname of printable characters is needed.", param=param)
    return nickname


def _target(word: str | None) -> LoraTarget:
    return next((target for target in TARGETS if target == word), "all")


def _or_one(strength: float | None) -> float:
    return 1.0 if strength is None else strength
