"""Random drawn scenes and the sentences that ask for them.

Positions are fractions of the picture's width and height, radii fractions of its shorter side.
What a scene looks like in pixels is `render`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from . import vocabulary as words
from .vocabulary import COLOURS, SHAPES, Zone

MAX_ITEMS = 4
# Radius by how many things share the picture, and by size word.
_RADII = {
    "single": {"small": 0.095, "medium": 0.165, "large": 0.265},
    "pair": {"small": 0.09, "medium": 0.145, "large": 0.2},
    "many": {"small": 0.075, "medium": 0.115, "large": 0.15},
}
_BACKGROUND_WEIGHTS = [1, 1, 1, 1, 1.3, 1, 1, 0.8, 2.0, 1.3, 1, 1]


@dataclass(slots=True)
class Item:
    """One drawn thing."""

    shape: int
    colour: int
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.15
    size: str = ""  # "" when the picture is not of a named size
    texture: int = 0
    angle: float = 0.0
    name: str = ""  # what the caption calls it

    @property
    def key(self) -> tuple[int, int]:
        """Shape and colour, which training and evaluation divide between them."""
        return (self.shape, self.colour)


@dataclass(slots=True)
class Scene:
    """A background and the things on it."""

    place: int = 0
    time: int = 0
    colour: int = 8
    pattern: int = 0
    style: int = 0
    items: list[Item] = field(default_factory=list)
    chance: tuple[float, ...] = (0.5,) * 8  # the scenery's own variation, shared by both sides of an edit

    def copy(self) -> "Scene":
        """The same scene with items of its own."""
        items = [Item(i.shape, i.colour, i.x, i.y, i.radius, i.size, i.texture, i.angle, i.name) for i in self.items]
        return Scene(self.place, self.time, self.colour, self.pattern, self.style, items, self.chance)


def held_out(shape: int, colour: int) -> bool:
    """Whether this pair of shape and colour is kept for evaluation and never trained on."""
    return (shape * 7 + colour * 5) % 13 == 0


def is_trainable(scene: Scene) -> bool:
    return not any(held_out(*item.key) for item in scene.items)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def clamp_inside(value: float, radius: float) -> float:
    margin = radius * 1.08 + 0.02
    return min(max(value, margin), 1 - margin)


def place_in_zone(rng: Random, zone: Zone, radius: float, jitter: float = 0.025) -> tuple[float, float]:
    """A point in one of the picture's nine zones at which a thing of this radius is whole."""
    x, y = (words.ZONE_CENTRES[i] + rng.uniform(-jitter, jitter) for i in zone)
    return clamp_inside(x, radius), clamp_inside(y, radius)


def radius_of(rng: Random, layout: str, size: str) -> float:
    if not size:
        return _RADII[layout]["medium"] * rng.uniform(1.0, 1.35 if layout == "single" else 1.15)
    return _RADII[layout][size] * rng.uniform(0.94, 1.06)


def overlaps(item: Item, others: Sequence[Item], margin: float = 1.12) -> bool:
    return any(
        abs(item.x - o.x) < (item.radius + o.radius) * margin and abs(item.y - o.y) < (item.radius + o.radius) * margin
        for o in others
    )


def _stand(rng: Random, item: Item, scene: Scene, baseline: float | None = None) -> None:
    """Put the thing's feet on the scene's ground, if it has one."""
    if scene.place and words.PLACES[scene.place] != "space":
        item.y = clamp_inside((baseline or rng.uniform(0.74, 0.84)) - item.radius, item.radius)


def random_item(rng: Random, scene: Scene, layout: str, size: str | None = None, avoid: Sequence[int] = ()) -> Item:
    """A thing of random shape, colour and size that stands out from its background."""
    if size is None:
        size = rng.choices(["", "small", "medium", "large"], [0.5, 0.18, 0.1, 0.22])[0]
    shape = rng.randrange(len(SHAPES))
    taken = set(avoid) | ({scene.colour} if scene.place == 0 else set())
    colour = rng.choice([i for i in range(len(COLOURS)) if i not in taken])
    texture = rng.choice([1, 2]) if rng.random() < 0.07 else 0
    item = Item(shape, colour, radius=radius_of(rng, layout, size), size=size, texture=texture)
    item.name = shape_name(rng, shape)
    if item.name in words.COLOURED_NAMES and words.COLOUR_INDEX[words.COLOURED_NAMES[item.name]] != colour:
        item.name = SHAPES[shape]
    if SHAPES[shape] == "cat" and rng.random() < 0.15:
        item.texture, item.colour = 3, words.COLOUR_INDEX["white"]
    return item


def shape_name(rng: Random, shape: int, synonyms: float = 0.25) -> str:
    name = SHAPES[shape]
    if name in words.SHAPE_SYNONYMS and rng.random() < synonyms:
        return rng.choice(words.SHAPE_SYNONYMS[name])
    return name


def plural(name: str) -> str:
    if name.endswith("fish"):
        return name
    return name + ("es" if name.endswith(("x", "s", "sh")) else "s")


def phrase(rng: Random, item: Item, *, determiner: bool = True, many: bool = False, colour: bool = True) -> str:
    """The thing as a noun phrase: "a big striped red cat"."""
    parts: list[str] = []
    if rng.random() < 0.08:
        parts.append(rng.choice(words.FILLERS))
    if item.size and (item.size != "medium" or rng.random() < 0.5):
        parts.append(rng.choice(words.SIZE_WORDS[item.size]))
    calico = item.texture == 3
    if calico:
        parts.append("calico")
    elif item.texture:
        parts.append(words.TEXTURES[item.texture])
    if colour and not calico:
        shade = COLOURS[item.colour]
        parts.append("grey" if shade == "gray" and rng.random() < 0.2 else shade)
    name = item.name or SHAPES[item.shape]
    parts.append(plural(name) if many else name)
    if determiner and not many:
        parts.insert(0, article(parts[0]) if rng.random() > 0.1 else "the")
    return " ".join(parts)


def _natural(rng: Random, item: Item, scene: Scene) -> bool:
    """Give the thing the colour it has when nobody says; False if the background has that colour."""
    colours = words.NATURAL_COLOURS[SHAPES[item.shape]]
    name = words.COLOURED_NAMES.get(item.name) or rng.choice(colours)
    colour = words.COLOUR_INDEX[name]
    if (scene.place == 0 and colour == scene.colour) or item.texture == 3:
        return item.texture == 3
    item.colour = colour
    return True


def random_scenery(rng: Random) -> Scene:
    """A background with nothing on it yet."""
    scene = Scene(chance=tuple(rng.random() for _ in range(8)))
    if rng.random() < 0.6:
        scene.colour = rng.choices(range(len(COLOURS)), _BACKGROUND_WEIGHTS)[0]
        scene.pattern = 0 if rng.random() < 0.82 else rng.randrange(1, len(words.PATTERNS))
    else:
        scene.place = rng.randrange(1, len(words.PLACES))
        if words.PLACES[scene.place] not in ("room", "stage", "space"):
            scene.time = rng.choices([0, 1, 2], [0.5, 0.28, 0.22])[0]
    if rng.random() < 0.08:
        scene.style = rng.choice([1, 2])
    return scene


def background_phrase(rng: Random, scene: Scene) -> str:
    """The end of a caption that names the background, with its leading space or comma."""
    if scene.place:
        place = " " + rng.choice(words.PLACE_PHRASES[words.PLACES[scene.place]])
        time = words.TIMES[scene.time]
        if time == "day" and rng.random() < 0.75:
            return place
        if words.PLACES[scene.place] in ("room", "stage", "space"):
            return place
        return place + " " + rng.choice(words.TIME_PHRASES[time])
    colour, pattern = COLOURS[scene.colour], words.PATTERNS[scene.pattern]
    if pattern == "plain":
        look = colour if rng.random() < 0.92 else "plain " + colour
    elif pattern == "gradient":
        look = colour + " gradient"
    else:
        look = rng.choice([f"{pattern} {colour}", f"{colour} {pattern}"])
    one = article(look)
    forms = [f" on {one} {look} background"] * 6 + [
        f" with {one} {look} background", f", {look} background", f" against {one} {look} background", f" on {look}",
    ]  # fmt: skip
    return rng.choice(forms)


def _unsaid_background(rng: Random, scene: Scene) -> None:
    """The background that comes when nobody asks for one: a plain light one or an outdoor scene."""
    if rng.random() < 0.55:
        scene.place, scene.time, scene.pattern = 0, 0, 0
        scene.colour = rng.choices([8, 11, 2, 6], [0.5, 0.25, 0.15, 0.1])[0]
    else:
        scene.place, scene.time = rng.choice([1, 1, 2, 6]), rng.choice([0, 0, 2])


def _single(rng: Random, scene: Scene) -> str:
    item = random_item(rng, scene, "single")
    scene.items = [item]
    zone = rng.choice(list(words.ZONE_PHRASES)) if rng.random() < 0.62 else None
    item.x, item.y = place_in_zone(rng, zone or (1, 1), item.radius)
    said = rng.random() > 0.12 or not _natural(rng, item, scene)
    text = phrase(rng, item, colour=said)
    if zone:
        return text + " " + rng.choice(words.ZONE_PHRASES[zone])
    _stand(rng, item, scene)
    return text


def _pair(rng: Random, scene: Scene) -> str:
    first = random_item(rng, scene, "pair")
    second = random_item(rng, scene, "pair")
    while second.key == first.key:
        second = random_item(rng, scene, "pair")
    scene.items = [first, second]
    distance, middle = rng.uniform(0.235, 0.26), rng.uniform(0.46, 0.54)
    vertical = rng.random() < 0.42
    for item, sign in ((first, -1), (second, 1)):
        along, across = 0.5 + sign * distance, middle + rng.uniform(-0.02, 0.02)
        item.x, item.y = (across, along) if vertical else (along, across)
    said = rng.random() > 0.15
    if not said:
        said = not (_natural(rng, first, scene) and _natural(rng, second, scene))
    a, b = phrase(rng, first, colour=said), phrase(rng, second, colour=said)
    if vertical:
        if rng.random() < 0.5:
            return f"{a} {rng.choice(['above', 'above', 'over', 'on top of'])} {b}"
        return f"{b} {rng.choice(['below', 'below', 'under', 'beneath'])} {a}"
    baseline = rng.uniform(0.74, 0.82)
    for item in scene.items:
        _stand(rng, item, scene, baseline)
    kind = rng.random()
    if kind < 0.34:
        return f"{a} {rng.choice(words.JOINING_VERBS)} {b}"
    if kind < 0.67:
        return f"{a} {rng.choice(['left of', 'left of', 'to the left of'])} {b}"
    return f"{b} {rng.choice(['right of', 'right of', 'to the right of'])} {a}"


def _two_zones(rng: Random, scene: Scene) -> str:
    zones = rng.sample(list(words.ZONE_PHRASES), 2)
    texts = []
    for zone in zones:
        for _ in range(30):
            item = random_item(rng, scene, "many")
            item.x, item.y = place_in_zone(rng, zone, item.radius)
            if not overlaps(item, scene.items, 1.05):
                scene.items.append(item)
                texts.append(phrase(rng, item) + " " + rng.choice(words.ZONE_PHRASES[zone]))
                break
    return " and ".join(texts)


def _count(rng: Random, scene: Scene) -> str:
    number = rng.choice([2, 3, 4])
    item = random_item(rng, scene, "many", size=rng.choice(["", "", "small"]))
    row = [0.27, 0.73] if number == 2 else [0.19, 0.5, 0.81]
    spots = [(x, 0.5) for x in row] if number < 4 else [(x, y) for x in (0.3, 0.7) for y in (0.3, 0.7)]
    lift = rng.uniform(-0.04, 0.04)
    for x, y in spots:
        twin = Item(item.shape, item.colour, x + rng.uniform(-0.015, 0.015), y + lift, item.radius, item.size,
                    item.texture, 0.0, item.name)  # fmt: skip
        if number < 4:
            _stand(rng, twin, scene, 0.78 + lift)
        scene.items.append(twin)
    return {2: "two", 3: "three", 4: "four"}[number] + " " + phrase(rng, item, many=True)


def _row(rng: Random, scene: Scene) -> str:
    height = rng.uniform(0.46, 0.54)
    for i in range(3):
        item = random_item(rng, scene, "many", size=rng.choice(["", "", "small"]))
        item.x, item.y = 0.19 + 0.31 * i + rng.uniform(-0.01, 0.01), height
        _stand(rng, item, scene, 0.78)
        scene.items.append(item)
    a, b, c = (phrase(rng, item) for item in scene.items)
    return f"{a}, {b} and {c}" + (" in a row" if rng.random() < 0.3 else "")


def random_scene(rng: Random) -> tuple[Scene, str]:
    """A scene and the part of its caption that names the things in it."""
    scene = random_scenery(rng)
    layout = rng.choices([_single, _pair, _two_zones, _count, _row], [0.42, 0.31, 0.09, 0.1, 0.08])[0]
    return scene, layout(rng, scene)


def polish(rng: Random, text: str) -> str:
    """The caption as somebody might type it."""
    if rng.random() < 0.12:
        text = rng.choice(words.COUNTING_PREFIXES) + text
    kind = rng.random()
    if kind < 0.3:
        text = text[:1].upper() + text[1:]
    elif kind < 0.32:
        text = text.upper()
    if rng.random() < 0.2:
        text += "."
    return text


def _gibberish(rng: Random, core: str = "") -> str:
    """Words from outside the grammar, around a phrase from inside it."""
    parts = [
        rng.choice(words.COMMON_WORDS) if rng.random() < 0.85
        else "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
        for _ in range(rng.randint(1, 9))
    ]  # fmt: skip
    if core:
        parts.insert(rng.randrange(len(parts) + 1), core)
    return " ".join(parts)


def _loose(rng: Random, scene: Scene) -> str:
    """A caption that says little or much else: the scene's first thing stands alone, its style is as usual."""
    scene.items, scene.style = scene.items[:1], 0
    item = scene.items[0]
    item.radius, item.size = radius_of(rng, "single", ""), ""
    item.x, item.y = place_in_zone(rng, (1, 1), item.radius)
    _stand(rng, item, scene)
    kind = rng.random()
    if kind < 0.2:
        _unsaid_background(rng, scene)
        return _gibberish(rng)
    name = SHAPES[item.shape]
    if kind < 0.5 and name in words.DISTANT_SYNONYMS:
        item.name = rng.choice(words.DISTANT_SYNONYMS[name])
    said = rng.random() < 0.5
    if not said and not _natural(rng, item, scene):
        said = True
    core = phrase(rng, item, colour=said, determiner=rng.random() < 0.5)
    if kind > 0.9:
        return core
    return _gibberish(rng, core) + (background_phrase(rng, scene) if rng.random() < 0.7 else "")


def random_prompt(rng: Random) -> tuple[Scene, str]:
    """A training pair for text to image."""
    scene, text = random_scene(rng)
    kind = rng.random()
    if kind < 0.05:
        scene.style = 0
        return scene, ""
    if kind < 0.2:
        return scene, polish(rng, _loose(rng, scene))
    if scene.style:
        style = rng.choice(words.STYLE_PHRASES[words.STYLES[scene.style]])
        if style.startswith("with"):
            text = f"{text} {style}"
        else:
            text = f"{style} {text}" if rng.random() < 0.3 else f"{text}, {style}"
    if kind < 0.28 and scene.style == 0:
        _unsaid_background(rng, scene)
        if scene.place == 0 and any(item.colour == scene.colour for item in scene.items):
            scene.colour = next(c for c in (8, 11, 2, 6, 10) if all(item.colour != c for item in scene.items))
        return scene, polish(rng, text)
    background = background_phrase(rng, scene)
    if scene.place and rng.random() < 0.12:
        return scene, polish(rng, f"{background.strip()}, {text}")
    return scene, polish(rng, text + background)


def trainable_prompt(rng: Random) -> tuple[Scene, str]:
    """A random pair without the shape-colour pairs kept for evaluation."""
    while True:
        scene, text = random_prompt(rng)
        if is_trainable(scene):
            return scene, text
