"""The kinds of training step of the image model: sizes of picture and reference, lengths of text, how often each.

Sizes are (height, width) in tokens of 16 pixels.
"""

from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Text to image of one size, or an edit of a reference of its own size."""

    size: Size
    reference: Size | None = None

    @property
    def num_tokens(self) -> int:
        own = self.size[0] * self.size[1]
        return own if self.reference is None else own + self.reference[0] * self.reference[1]


Step = tuple[Layout, int]  # with the length of its text
_EDIT_SHARE = 0.5
_SQUARE = (16, 16)
# Beside the squares: 16:10, 16:9 and 3:2 and their likes upright, as large as the model draws them.
_PROMPT_SIZES: dict[Size, float] = {
    _SQUARE: 0.38, (12, 12): 0.1, (8, 8): 0.12, (10, 16): 0.08, (16, 10): 0.08, (12, 21): 0.06, (21, 12): 0.06,
    (13, 19): 0.06, (19, 13): 0.06,
}  # fmt: skip
_EDIT_SIZES: dict[Size, float] = {
    _SQUARE: 0.5, (12, 12): 0.1, (8, 8): 0.12, (10, 16): 0.06, (16, 10): 0.06, (12, 21): 0.06, (21, 12): 0.06,
}  # fmt: skip
_MIXED = {Layout(_SQUARE, (8, 8)): 0.01, Layout((8, 8), _SQUARE): 0.01}
# Padding is visible to the transformer, so it must meet every length in training, the pipeline's 512 included.
_PROMPT_LENGTHS = {40: 0.5, 64: 0.15, 128: 0.25, 512: 0.1}
_EDIT_LENGTHS = {24: 0.5, 64: 0.15, 128: 0.25, 512: 0.1}
_FEW_PROMPT_LENGTHS = {40: 0.6, 128: 0.4}
_FEW_EDIT_LENGTHS = {24: 0.6, 128: 0.4}


def all_steps() -> dict[Step, float]:
    """Every kind of step with its share."""
    steps: dict[Step, float] = {}
    for size, share in _PROMPT_SIZES.items():
        for length, part in (_PROMPT_LENGTHS if size == _SQUARE else _FEW_PROMPT_LENGTHS).items():
            steps[Layout(size), length] = (1 - _EDIT_SHARE) * share * part
    for size, share in _EDIT_SIZES.items():
        for length, part in (_EDIT_LENGTHS if size == _SQUARE else _FEW_EDIT_LENGTHS).items():
            steps[Layout(size, size), length] = _EDIT_SHARE * share * part
    return steps | {(layout, 24): share for layout, share in _MIXED.items()}


def smoke_steps() -> dict[Step, float]:
    """A few small steps of every sort."""
    return {(Layout((8, 8)), 40): 0.5, (Layout((8, 8), (8, 8)), 24): 0.3, (Layout((6, 9), (8, 8)), 128): 0.2}
