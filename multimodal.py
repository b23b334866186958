"""Images in the prompts (section 3.3): a picture becomes one vector, which is added to every prompt.

    features  = the class token of a frozen vision tower at M depths, each normed, side by side
    I         = projection(features)          learnt, a small MLP
    P + I                                     instead of P, in every adapted layer

Notation as in adapter.py; Cv is the width of the tower. Whatever else yields one vector a sample takes the same road.
"""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from adapter import Adapter, replacing
from encoders import ViT
from model import hash_of

# Of the pictures that CLIP was trained on, per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

DEPTHS = 4  # M


def open_image(path: str | Path) -> Image.Image:
    """A picture in RGB, the right way up. Raises FileNotFoundError, or ValueError that says what is wrong with it."""
    existing(path)
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
def global_features(tower: ViT, images: Tensor, number: int = DEPTHS) -> Tensor:
    """The class token at so many depths, each normed, (B, M*Cv) in float32, of images (B, 3, S, S)."""
    weight = tower.class_embedding
    states = tower(images.to(weight.device, weight.dtype))  # N times (B, T, Cv)
    tokens = [states[i][:, 0].float() for i in depths(len(states), number)]
    return torch.cat([F.layer_norm(token, token.shape[1:]) for token in tokens], dim=1)


def tower_fingerprint(tower: ViT) -> str:
    """A hash of a few weights, rounded to bfloat16 so that it is the same in whatever dtype they are held."""
    first = tower.layers[0].attention.wq
    return hash_of([tower.class_embedding, tower.positions[:4], first.weight[:4], tower.norm.weight])


def features_of(
    paths: Sequence[str | Path], tower: ViT, number: int = DEPTHS, cache: Path | None = None, batch_size: int = 32
) -> list[Tensor]:
    """`global_features` of every picture, (F,) each, on the CPU.

    In the folder `cache` a file is kept for every picture by the hash of its content, so that it goes through the tower
    once for all epochs and runs. Raises OSError or ValueError where a picture cannot be read.
    """
    size, kept = tower.config.image_size, {}
    folder = None if cache is None else cache / f"{tower_fingerprint(tower)}-{size}-{number}"
    names = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in map(existing, paths)]
    for name in set(names):
        if folder is not None and (folder / f"{name}.npy").exists():
            kept[name] = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
    todo = list({name: path for name, path in zip(names, paths) if name not in kept}.items())
    for start in tqdm(range(0, len(todo), batch_size), unit="batch of images", disable=not todo, file=sys.stderr):
        part = todo[start : start + batch_size]
        images = torch.stack([preprocess(open_image(path), size) for _, path in part])  # (B, 3, S, S)
        for (name, _), features in zip(part, global_features(tower, images, number).cpu()):
            kept[name] = features.clone()
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, features.numpy())
    return [kept[name] for name in names]


def pictures_in(paths: Sequence[str | Path]) -> list[Path]:
    """The files among them, and those in folders among them that Pillow may be able to read, by name.

    Raises OSError or ValueError where there are none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in Image.registered_extensions()]
            if not inside:
                raise ValueError(f"{path}: holds no images")
            found += inside
        else:
            found.append(existing(path))
    return found


def existing(path: str | Path) -> Path:
    """The path; raises FileNotFoundError where no file is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    return Path(path)


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
