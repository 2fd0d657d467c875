"""The video model's tokenizer: every word of the drawn world is one piece, all else is spelled; in T5's layout."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from . import vocabulary as words
from .video_scenes import MOTION_PHRASES, OWN_MOTIONS

PAD_ID, END_ID = 0, 1
_SPECIAL = ("<pad>", "</s>", "<unk>")
_SPELLING = -14.0  # a letter's score: any whole word is likelier than its spelling


def vocabulary() -> list[tuple[str, float]]:
    """Pieces and their log probabilities: each word of the grammar plain and capitalised, then letters."""
    texts = [*words.COMMON_WORDS, *words.FILLERS, *words.COLOURS, *words.SHAPES, *words.PATTERNS, *words.TEXTURES]
    texts += [*words.STYLES, *words.JOINING_VERBS, *words.COUNTING_PREFIXES, *MOTION_PHRASES, *_GLUE]
    tables = (words.SHAPE_SYNONYMS, words.DISTANT_SYNONYMS, words.PLACE_PHRASES, words.TIME_PHRASES, MOTION_PHRASES,
              words.ZONE_PHRASES, words.SIZE_WORDS)  # fmt: skip
    texts += [text for table in tables for phrases in table.values() for text in phrases]
    texts += [text for motions in OWN_MOTIONS.values() for text, _ in motions]
    known = {word for text in texts for word in text.replace(",", "").split()}
    pieces = {"▁" + form for word in known for form in (word, word[:1].upper() + word[1:])}
    letters = {"▁", *(chr(i) for i in range(33, 127))} - pieces
    marks = {".": -5.0, ",": -5.0}
    spelling = [(letter, marks.get(letter, _SPELLING)) for letter in sorted(letters)]
    return [(name, 0.0) for name in _SPECIAL] + [(piece, -7.0) for piece in sorted(pieces)] + spelling


_GLUE = ("background", "video", "against", "grey", "counterclockwise", "next", "beside", "picture", "clip")


def build(vocab: list[tuple[str, float]]) -> Tokenizer:
    """The tokenizer for training, equal in its ids to the saved one."""
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    return tokenizer


def train_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` for training."""
    folder.mkdir(parents=True, exist_ok=True)
    build(vocabulary()).save(str(folder / "tokenizer.json"))


def save_for_pipeline(folder: Path) -> None:
    """Write a tokenizer folder that `AutoTokenizer` loads."""
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=vocabulary(), extra_ids=0, model_max_length=512).save_pretrained(folder)
