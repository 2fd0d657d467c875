"""Outside an edit's mask: the original's pixels, where they lie in the drawing."""

import numpy as np
from PIL import Image

from photogram.media.inputs import keep_outside

from .pictures import photo


def laid_out(folder, original_HWC, mask_HW):
    paths = folder / "original.png", folder / "mask.png"
    for path, pixels in zip(paths, (original_HWC, mask_HW), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def test_pixels_come_back_bit_for_bit_at_the_original_s_size(tmp_path):
    drawn, original = photo(96, 64, seed=1), photo(96, 64, seed=2)
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 48:] = 255
    kept = keep_outside(drawn, *laid_out(tmp_path, original, mask))
    assert np.array_equal(kept[:, :48], original[:, :48])
    assert np.array_equal(kept[:, 48:], drawn[:, 48:])


def test_of_another_aspect_the_middle_comes_back_unstretched(tmp_path):
    """The worker draws over the middle of a picture of another aspect, so what is put back is that middle."""
    drawn, original = photo(64, 64, seed=1), photo(128, 64, seed=2)
    mask = np.zeros((64, 128), np.uint8)
    mask[:32] = 255
    kept = keep_outside(drawn, *laid_out(tmp_path, original, mask))
    assert np.array_equal(kept[32:], original[32:, 32:96])
    assert np.array_equal(kept[:31], drawn[:31])
