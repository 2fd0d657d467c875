"""How much two pictures look alike: PSNR, SSIM, and a distance between features of a network.

B pictures, H/W height and width; pixels are floats from 0 to 1.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2

# Of the luminance, as in the paper: https://doi.org/10.1109/TIP.2003.819861
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of pictures (B, 3, H, W), dB (B,); 100 for equal ones."""
    error = (pictures - references).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp_max(100)


def ssim(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity of pictures (B, 3, H, W): (B,), 1 for equal ones."""
    x, y = _luminance(pictures), _luminance(references)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    likeness /= (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return likeness.mean((1, 2, 3))


class FeatureDistance:
    """The distance of LPIPS (arXiv 1801.03924) without its learned weights, and with the built-in image model's encoder
    in place of a classifier: features of every level, of unit length at every place, squared difference, mean over
    places, sum over levels. So it needs no download; its figures compare with each other and with no others.
    """

    def __init__(self, autoencoder: AutoencoderKLFlux2) -> None:
        self._encoder = autoencoder.encoder

    def __call__(self, pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Distance of pictures (B, 3, H, W): (B,), 0 for equal ones, at most 2 for each level."""
        levels = zip(self._levels(pictures), self._levels(references), strict=True)
        distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in levels]
        return torch.stack(distances).sum(0)

    def _levels(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        hidden = self._encoder.conv_in(pictures * 2 - 1)
        yield F.normalize(hidden, dim=1)
        for block in self._encoder.down_blocks:
            hidden = block(hidden)
            yield F.normalize(hidden, dim=1)


def _luminance(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * pictures.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _blurred(picture: torch.Tensor) -> torch.Tensor:
    places = torch.arange(_WINDOW, device=picture.device) - _WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).to(picture.dtype)
    return F.conv2d(F.conv2d(picture, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
