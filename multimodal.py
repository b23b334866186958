"""Images in the prompts (section 3.3): a picture becomes one vector, which is added to every prompt.

    features  = the class token of a frozen vision tower at M depths, each normed, side by side
    I         = projection(features)          learnt, a small MLP
    P + I                                     instead of P, in every adapted layer

Notation as in adapter.py; Cv is the width of the tower. Whatever else yields one vector a sample takes the same road.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from adapter import Adapter
from encoders import ViT

# Of the pictures that CLIP was trained on, per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(path: str | Path) -> Image.Image:
    """A picture in RGB, the right way up. Raises FileNotFoundError, or ValueError that says what is wrong with it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not an image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # whatever a broken file makes a decoder meet
        raise ValueError(f"{path}: is a broken image: {error}") from None
    width, height = image.size
    if min(image.size) < 2 or max(image.size) > 100 * min(image.size):
        raise ValueError(f"{path}: {width} x {height} pixels show nothing")
    return image


def preprocess(image: Image.Image, size: int) -> Tensor:
    """As CLIP does it: the short side to `size` pixels, the middle of the long one, normalised; (3, size, size)."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255  # (size, size, 3)
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def depths(n_layers: int, number: int) -> list[int]:
    """So many layers, evenly spaced, the last of them the last. Raises ValueError where there are too few."""
    if not 1 <= number <= n_layers:
        raise ValueError(f"features at {number} depths, of a tower of {n_layers} layers")
    return [(i + 1) * n_layers // number - 1 for i in range(number)]


@torch.no_grad()
def global_features(tower: ViT, images: Tensor, number: int = 4) -> Tensor:
    """The class token at so many depths, each normed, (B, M*Cv) in float32, of images (B, 3, S, S)."""
    weight = tower.class_embedding
    states = tower(images.to(weight.device, weight.dtype))  # N times (B, T, Cv)
    tokens = [states[i][:, 0].float() for i in depths(len(states), number)]
    return torch.cat([F.layer_norm(token, token.shape[1:]) for token in tokens], dim=1)


class ImageAdapter(Adapter):
    """An Adapter with a projection of an image's features (B, F) to what its prompts are shifted by, I (B, C).

    F is M*Cv; the projection is Linear(F, bottleneck), GELU, Linear(bottleneck, C). With ViT-L/14 at four depths, for
    LLaMA-7B, it has 593,992 parameters, and with K = 10 and L = 30 all have 1,823,752: the paper's 1.8 million.
    """

    def __init__(
        self, *, features: int, bottleneck: int = 72, dim: int, generator: torch.Generator | None = None, **shape
    ):
        super().__init__(dim=dim, generator=generator, **shape)
        self.projection = nn.Sequential(nn.Linear(features, bottleneck), nn.GELU(), nn.Linear(bottleneck, dim))
        for linear in (self.projection[0], self.projection[2]):
            bound = linear.in_features**-0.5  # as PyTorch does it, but from the generator
            for parameter in (linear.weight, linear.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def condition(self, features: Tensor, seen: Tensor | None = None) -> Tensor:
        """I (B, C) for features (B, F); nothing where `seen` (B,) is False: that sample has no image."""
        shift = self.projection(features)
        return shift if seen is None else shift * seen[:, None]

    @classmethod
    def more(cls, tensors: dict[str, Tensor]) -> dict[str, int]:
        down = tensors.get("projection.0.weight")
        if down is None or down.dim() != 2:
            raise ValueError("has no projection: it is not an adapter for images")
        return {"bottleneck": down.shape[0], "features": down.shape[1]}
