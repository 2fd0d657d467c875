"""The words of the drawn world: shapes, colours, sizes, zones, places, and what people may call them.

Knows names only: how a shape is drawn is `atlas`, how words become sentences is `scenes` and `edits`.
"""

from typing import Final

SHAPES: Final = (
    "circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "cross", "ring", "moon",
    "house", "tree", "cat", "fish", "flower", "car", "boat", "rocket", "bird", "piano",
)  # fmt: skip
SHAPE_INDEX: Final = {name: index for index, name in enumerate(SHAPES)}

COLOUR_RGB: Final = {
    "red": (228, 42, 42), "orange": (245, 140, 30), "yellow": (250, 214, 52), "green": (50, 165, 70),
    "blue": (45, 95, 220), "purple": (135, 60, 190), "pink": (250, 140, 185), "brown": (130, 85, 50),
    "white": (248, 248, 248), "black": (28, 28, 34), "gray": (140, 140, 146), "cyan": (60, 200, 220),
}  # fmt: skip
COLOURS: Final = tuple(COLOUR_RGB)
COLOUR_INDEX: Final = {name: index for index, name in enumerate(COLOURS)}

PATTERNS: Final = ("plain", "striped", "checkered", "dotted", "gradient")
TEXTURES: Final = ("plain", "striped", "spotted", "calico")
STYLES: Final = ("shaded", "flat", "outlined")
PLACES: Final = (
    "plain", "meadow", "beach", "snow", "desert", "sea", "mountains", "city", "room", "stage", "space",
)  # fmt: skip
PLACE_INDEX: Final = {name: index for index, name in enumerate(PLACES)}
TIMES: Final = ("day", "night", "sunset")

# Column and row of the picture's thirds.
Zone = tuple[int, int]
ZONE_CENTRES: Final = (0.2, 0.5, 0.8)
ZONE_PHRASES: Final[dict[Zone, tuple[str, ...]]] = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left"),
    (1, 0): ("at the top", "near the top"),
    (2, 0): ("at the top right", "in the top right corner", "in the upper right"),
    (0, 1): ("on the left", "on the left side"),
    (1, 1): ("in the center", "in the middle"),
    (2, 1): ("on the right", "on the right side"),
    (0, 2): ("at the bottom left", "in the bottom left corner", "in the lower left"),
    (1, 2): ("at the bottom", "near the bottom"),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
SIZE_WORDS: Final = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "big", "huge"),
}

# Other names of a shape; the plain name stays the most frequent.
SHAPE_SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("ball", "disc", "planet", "sun", "balloon", "coin"),
    "square": ("box", "block", "cube"),
    "triangle": ("pyramid",),
    "heart": ("love heart",),
    "diamond": ("gem", "kite", "jewel"),
    "cross": ("plus", "plus sign"),
    "ring": ("donut", "wheel"),
    "moon": ("crescent", "crescent moon"),
    "house": ("home", "cottage", "hut", "cabin", "castle", "building"),
    "tree": ("pine", "fir tree", "pine tree", "christmas tree"),
    "cat": ("kitten", "kitty"),
    "fish": ("goldfish", "whale", "shark"),
    "flower": ("rose", "daisy", "tulip", "sunflower", "blossom"),
    "car": ("taxi", "truck", "sports car", "automobile", "bus"),
    "boat": ("ship", "sailboat", "sailing boat", "yacht"),
    "rocket": ("spaceship", "space rocket"),
    "bird": ("duck", "chick", "parrot", "robin", "penguin"),
    "piano": ("grand piano", "keyboard"),
}
# Things outside this world, and the nearest thing in it: only used among unknown words.
DISTANT_SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "cat": ("dog", "puppy", "tiger", "lion", "fox", "bear", "rabbit", "animal", "panda", "horse", "wolf"),
    "house": ("tower", "temple", "church", "barn", "school"),
    "tree": ("forest", "plant", "bush", "mountain"),
    "bird": ("eagle", "owl", "chicken", "dragon", "butterfly", "bee"),
    "car": ("van", "train", "motorcycle", "bicycle", "robot"),
    "rocket": ("airplane", "plane", "missile", "astronaut", "satellite"),
    "boat": ("canoe", "pirate ship", "submarine"),
    "fish": ("dolphin", "turtle"),
    "flower": ("woman", "girl", "dress", "garden", "princess"),
    "circle": ("man", "face", "person", "apple", "planet earth", "pizza", "clock", "head"),
    "square": ("book", "computer", "phone", "television", "camera", "painting", "gift"),
    "star": ("magic", "firework", "snowflake"),
    "piano": ("guitar", "violin", "drum", "music"),
}
# What colour a thing has when nobody says.
NATURAL_COLOURS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("red", "blue", "orange", "yellow"), "square": ("blue", "red", "orange"),
    "triangle": ("yellow", "red", "purple"), "star": ("yellow", "yellow", "orange"),
    "heart": ("red", "red", "pink"), "diamond": ("cyan", "purple", "pink"), "hexagon": ("orange", "purple", "green"),
    "cross": ("red", "green"), "ring": ("yellow", "orange", "pink"), "moon": ("yellow", "yellow", "white"),
    "house": ("red", "brown", "orange"), "tree": ("green",), "cat": ("orange", "gray", "black", "brown"),
    "fish": ("orange", "blue", "cyan"), "flower": ("pink", "red", "purple", "yellow"), "car": ("red", "blue", "yellow"),
    "boat": ("red", "blue", "brown"), "rocket": ("red", "gray", "white"), "bird": ("blue", "yellow", "red"),
    "piano": ("black", "brown", "black"),
}  # fmt: skip
# Names that say a colour, and so win over the natural one.
COLOURED_NAMES: Final = {
    "sun": "yellow", "taxi": "yellow", "sunflower": "yellow", "daisy": "white", "rose": "red", "tulip": "pink",
    "goldfish": "orange", "christmas tree": "green", "chick": "yellow", "duck": "yellow", "robin": "red",
    "penguin": "black", "love heart": "red", "coin": "yellow", "shark": "gray", "whale": "blue",
}  # fmt: skip

PLACE_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "meadow": ("in a meadow", "on the grass", "in a green field", "in the park", "in a garden", "on a hill"),
    "beach": ("on the beach", "on a beach", "at the beach", "on the sand"),
    "snow": ("in the snow", "on the snow", "in winter", "on ice"),
    "desert": ("in the desert", "in a desert"),
    "sea": ("on the sea", "in the ocean", "on the water", "on a lake", "at sea"),
    "mountains": ("in the mountains", "in front of mountains", "in front of a mountain"),
    "city": ("in the city", "in a city", "on a street", "on the street", "on a road", "on the road"),
    "room": ("in a room", "on the floor", "on a wooden floor", "at home", "in a house"),
    "stage": ("on stage", "on stage", "on a stage", "on the stage", "in a theater", "at a concert"),
    "space": ("in space", "in outer space", "among the stars", "in the galaxy"),
}
TIME_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "day": ("by day", "on a sunny day", "in the morning", "under a blue sky"),
    "night": ("at night", "at night", "by night", "under the stars", "at midnight", "in the dark"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening", "at dawn", "at sunrise"),
}
STYLE_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "flat": ("flat", "minimal", "simple", "flat design", "minimalist"),
    "outlined": ("outlined", "cartoon", "with a black outline", "comic style"),
}
# "playing", between two things: the first stands left of the second.
JOINING_VERBS: Final = (
    "playing", "watching", "chasing", "meeting", "riding", "looking at", "eating", "driving", "holding", "near",
    "beside", "next to", "with", "and",
)  # fmt: skip

FILLERS: Final = (
    "shiny cute beautiful pretty nice lovely bright colorful modern happy sad old new soft funny fancy cool glossy "
    "smooth single elegant tiny-looking majestic friendly sleepy magical"
).split()
COUNTING_PREFIXES: Final = (
    "a picture of ", "an image of ", "a drawing of ", "a photo of ", "an illustration of ", "a painting of ",
)  # fmt: skip
# Common words, so that prompts from outside this world cost few tokens and have been seen in training.
COMMON_WORDS: Final = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look more write go see number no way could people "
    "my than first water been call who its now find long down day did get come made may part playing lake sunset city "
    "street night portrait woman man child forest ocean beach photo realistic cinematic lighting detailed anime style "
    "watercolor oil pencil sketch dancing running jumping sitting standing eating coffee table chair window garden "
    "snow rain sky cloud elephant calico tabby golden retriever riding space galaxy neon cyberpunk vintage retro 4k "
    "hd high quality masterpiece sharp focus under over near behind wearing hat suit river island sword knight king "
    "queen wizard fire storm light shadow studio background foreground dramatic mood fantasy abstract minimal modern "
    "architecture landscape macro closeup wide angle soft warm cold morning evening autumn spring summer winter tea "
    "cup bottle glass bread cake fruit orange juice market bridge tower road train station airport sea wave sand stone "
    "hand eye hair smile walking flying swimming sleeping reading singing holding colorful ancient futuristic tiny"
).split()
