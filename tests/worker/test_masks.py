"""Masked edits by the built-in model: what is drawn inside goes on where the picture outside begins."""

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from photogram.core.request import GenerateRequest
from photogram.media.inputs import keep_outside

from .drawing import Studio

SIDE = 256
BOX = (64, 64, 191, 191)


def seam(picture: np.ndarray) -> float:
    """Mean step of the pixels over the mask's border, from 0 to 255."""
    left, top, right, bottom = BOX
    values = picture.astype(float)
    rows, columns = slice(top, bottom + 1), slice(left, right + 1)
    steps = [
        values[rows, left] - values[rows, left - 1],
        values[rows, right] - values[rows, right + 1],
        values[top, columns] - values[top - 1, columns],
        values[bottom, columns] - values[bottom + 1, columns],
    ]
    return float(np.mean([np.abs(step).mean() for step in steps]))


def test_masked_edit_keeps_the_outside_and_fits_better_than_pasting(tmp_path):
    studio = Studio("demo-image", tmp_path)
    original, mask = tmp_path / "original.png", tmp_path / "mask.png"
    request = GenerateRequest(
        job_id="drawn", owner="test", task="T2I", prompt="a red circle on a blue background", width=SIDE, height=SIDE,
        num_inference_steps=6, guidance_scale=1.0, seed=5, extra=studio.card.defaults,
    )  # fmt: skip
    source = studio.draw([request])["drawn"].frames[0]
    Image.fromarray(source).save(original)
    edited = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(edited).rectangle(BOX, fill=255)
    edited.save(mask)
    pasted_seams, blended_seams = [], []
    for seed in (1, 2, 3):
        edit = msgspec.structs.replace(
            request, job_id="edit", task="I2I", prompt="make the background yellow", images=(str(original),), seed=seed
        )
        masked = msgspec.structs.replace(edit, job_id="masked", mask=str(mask))
        drawn = studio.draw([edit, masked])
        pasted = keep_outside(drawn["edit"].frames[0], original, mask)
        blended = keep_outside(drawn["masked"].frames[0], original, mask)
        outside = np.asarray(edited) == 0
        assert (blended[outside] == source[outside]).all()
        assert np.abs(blended[~outside].astype(int) - source[~outside]).mean() > 1
        pasted_seams.append(seam(pasted))
        blended_seams.append(seam(blended))
    assert np.mean(blended_seams) < np.mean(pasted_seams), (blended_seams, pasted_seams)
