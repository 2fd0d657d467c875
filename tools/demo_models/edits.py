"""Random edits of scenes: the picture before, the picture after, and the instruction between them."""

from dataclasses import dataclass
from random import Random

from . import vocabulary as words
from .scenes import (
    Item,
    Scene,
    article,
    clamp_inside,
    is_trainable,
    overlaps,
    phrase,
    place_in_zone,
    random_item,
    random_scene,
    shape_name,
)
from .vocabulary import COLOURS, SHAPES, Zone

EDIT_KINDS = ("recolour", "background", "move", "add", "remove", "resize", "reshape", "place")
_WEIGHTS = (0.19, 0.1, 0.17, 0.15, 0.07, 0.13, 0.12, 0.07)
_CORNERS: dict[Zone, tuple[str, ...]] = {
    (1, 1): ("to the center", "to the middle"), (1, 0): ("to the top center",), (1, 2): ("to the bottom center",),
    (0, 1): ("to the left center",), (2, 1): ("to the right center",),
    (0, 0): ("to the top left", "to the top left corner"), (2, 0): ("to the top right", "to the top right corner"),
    (0, 2): ("to the bottom left", "to the bottom left corner"),
    (2, 2): ("to the bottom right", "to the bottom right corner"),
}  # fmt: skip
_SIDES = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2)}


@dataclass(slots=True)
class Edit:
    """One edit. `free` is true when the instruction does not say where the new thing goes."""

    source: Scene
    target: Scene
    text: str
    kind: str
    free: bool = False


def _reference(rng: Random, item: Item, items: list[Item]) -> str:
    """A phrase that means this thing and no other of the picture."""
    name = item.name or SHAPES[item.shape]
    colour = COLOURS[item.colour]
    alone = sum(o.shape == item.shape for o in items) == 1
    if len(items) == 1 and rng.random() < 0.25:
        return rng.choice(["it", "the object", "the shape"])
    if alone and rng.random() < 0.55:
        return "the " + name
    if item.texture == 3:
        return "the calico cat"
    if sum(o.colour == item.colour for o in items) == 1 and rng.random() < 0.12:
        return f"the {colour} " + rng.choice(["one", "shape", "object"])
    return f"the {colour} {name}"


def _other_colour(rng: Random, scene: Scene, *taken: int) -> int:
    avoid = set(taken) | ({scene.colour} if scene.place == 0 else set())
    return rng.choice([i for i in range(len(COLOURS)) if i not in avoid])


def _recolour(rng: Random, target: Scene, item: Item, ref: str) -> str:
    item.colour = _other_colour(rng, target, item.colour)
    item.texture = 0 if item.texture == 3 else item.texture
    colour = COLOURS[item.colour]
    return rng.choice(
        [f"make {ref} {colour}"] * 4
        + [f"change {ref} to {colour}", f"change the color of {ref} to {colour}", f"turn {ref} {colour}",
           f"paint {ref} {colour}", f"recolor {ref} to {colour}", f"color {ref} {colour}"]
    )  # fmt: skip


def _background(rng: Random, target: Scene) -> str:
    target.colour = _other_colour(rng, target, *(item.colour for item in target.items))
    target.place = target.time = 0
    target.pattern = rng.randrange(1, 4) if rng.random() < 0.1 else 0
    look = COLOURS[target.colour]
    if target.pattern:
        look = f"{words.PATTERNS[target.pattern]} {look}"
    one = article(look)
    return rng.choice(
        [f"make the background {look}"] * 3
        + [f"change the background to {look}", f"change the background color to {look}", f"set {one} {look} background",
           f"{look} background", f"turn the background {look}", f"put it on {one} {look} background"]
    )  # fmt: skip


def _place(rng: Random, target: Scene) -> str:
    outdoors = target.place and words.PLACES[target.place] not in ("room", "stage", "space")
    if outdoors and rng.random() < 0.5:
        target.time = rng.choice([t for t in range(3) if t != target.time])
        time = words.TIMES[target.time]
        moment = rng.choice(words.TIME_PHRASES[time])
        return rng.choice([f"make it {time}", f"turn it into {time}", f"change it to {time}", f"show it {moment}"])
    target.place = rng.choice([p for p in range(1, len(words.PLACES)) if p != target.place])
    target.time = 0
    where = rng.choice(words.PLACE_PHRASES[words.PLACES[target.place]])
    return rng.choice([f"put it {where}", f"put them {where}", f"place it {where}", f"change the scene to {where}"])


def _move(rng: Random, target: Scene, index: int, ref: str) -> str | None:
    item = target.items[index]
    others = [o for i, o in enumerate(target.items) if i != index]
    for _ in range(12):
        moved = Item(item.shape, item.colour, item.x, item.y, item.radius)
        if rng.random() < 0.5:
            zone = rng.choice(list(_CORNERS))
            moved.x, moved.y = place_in_zone(rng, zone, item.radius, 0)
            where = rng.choice(_CORNERS[zone])
        else:
            side = rng.choice(list(_SIDES))
            x, y = place_in_zone(rng, _SIDES[side], item.radius, 0)
            if side in ("left", "right"):
                moved.x = x
            else:
                moved.y = y
            short = {"top": "up", "bottom": "down"}.get(side, side)
            where = rng.choice([f"to the {side}", f"to the {side} side", short])
        if not overlaps(moved, others, 1.02) and abs(moved.x - item.x) + abs(moved.y - item.y) > 0.12:
            item.x, item.y = moved.x, moved.y
            return rng.choice(["move", "move", "move", "put", "shift"]) + f" {ref} {where}"
    return None


def _add(rng: Random, target: Scene) -> tuple[str, bool] | None:
    if len(target.items) > 2:
        return None
    for _ in range(30):
        item = random_item(rng, target, "many")
        zone = rng.choice(list(words.ZONE_PHRASES))
        item.x, item.y = place_in_zone(rng, zone, item.radius, 0.01)
        if overlaps(item, target.items, 1.05) or item.key in {o.key for o in target.items}:
            continue
        text = rng.choice(["add", "add", "add", "draw", "place"]) + " " + phrase(rng, item)
        free = rng.random() < 0.25
        target.items.append(item)
        return (text if free else text + " " + rng.choice(words.ZONE_PHRASES[zone])), free
    return None


def _resize(rng: Random, target: Scene, index: int, ref: str) -> str | None:
    item = target.items[index]
    others = [o for i, o in enumerate(target.items) if i != index]
    limit = 0.3 if not others else 0.21
    grow = item.radius * 1.45 <= limit and (item.radius < 0.11 or rng.random() < 0.55)
    if not grow and item.radius < 0.1:
        return None
    item.radius *= 1.5 if grow else 0.62
    item.size = ""
    item.x, item.y = clamp_inside(item.x, item.radius), clamp_inside(item.y, item.radius)
    if overlaps(item, others, 1.0):
        return None
    adjective = rng.choice(["bigger", "bigger", "larger"] if grow else ["smaller"])
    return rng.choice(
        [f"make {ref} {adjective}", f"make {ref} {adjective}", f"{'enlarge' if grow else 'shrink'} {ref}"]
    )


def _reshape(rng: Random, item: Item, ref: str) -> str:
    item.shape = rng.choice([s for s in range(len(SHAPES)) if s != item.shape])
    item.name = shape_name(rng, item.shape, 0.1)
    if item.texture == 3:
        item.texture = 0
    name = item.name
    one = article(name)
    return rng.choice(
        [f"replace {ref} with {one} {name}", f"turn {ref} into {one} {name}", f"change {ref} to {one} {name}",
         f"change {ref} into {one} {name}"]
    )  # fmt: skip


def _apply(rng: Random, kind: str, target: Scene) -> tuple[str, bool] | None:
    index = rng.randrange(len(target.items))
    item = target.items[index]
    ref = _reference(rng, item, target.items)
    if kind == "recolour":
        return _recolour(rng, target, item, ref), False
    if kind == "background":
        return _background(rng, target), False
    if kind == "place":
        return _place(rng, target), False
    if kind == "add":
        return _add(rng, target)
    if kind == "remove":
        if len(target.items) < 2:
            return None
        target.items.pop(index)
        return rng.choice(["remove", "remove", "delete", "erase", "take away"]) + " " + ref, False
    if kind == "reshape":
        return _reshape(rng, item, ref), False
    text = _move(rng, target, index, ref) if kind == "move" else _resize(rng, target, index, ref)
    return None if text is None else (text, False)


def random_edit(rng: Random) -> Edit:
    """A training pair for edits; both pictures avoid the pairs kept for evaluation."""
    while True:
        source, _ = random_scene(rng)
        if len({item.key for item in source.items}) != len(source.items) or not source.items:
            continue
        source.items = source.items[:3]
        source.items = [item for item in source.items if source.place or item.colour != source.colour]
        if not source.items:
            continue
        kind = rng.choices(EDIT_KINDS, _WEIGHTS)[0]
        target = source.copy()
        if rng.random() < 0.04:
            return Edit(source, target, "", "none")
        done = _apply(rng, kind, target)
        if done is None or not (is_trainable(source) and is_trainable(target)):
            continue
        text, free = done
        if rng.random() < 0.3:
            text = text[:1].upper() + text[1:]
        if rng.random() < 0.15:
            text += "."
        return Edit(source, target, text, kind, free)
