"""The images of examples: checks that they exist, and their features."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from data import Example
from formats.image_encoders import FunctionEncoder, VisionEncoder, load_image_encoder
from multimodal import content_hash
from runtime.distributed import local_rank0_first
from runtime.files import path_inside, require_file

AnyExample = TypeVar("AnyExample", bound=Example)


def with_images(
    examples: Sequence[AnyExample], folder: str | Path, skip_missing: bool, path: str | Path
) -> list[AnyExample]:
    """Return the examples whose image exists in the folder, and those without an image.

    If an image is missing, raises a FileNotFoundError that names the example, unless `skip_missing` is True. Raises
    ValueError if an image is outside the folder or not a file, or if no example remains. Messages begin with `path`,
    the file of the examples.
    """
    kept = []
    for example in examples:
        try:
            if example.image:
                require_file(path_inside(folder, example.image))
        except (FileNotFoundError, ValueError) as error:
            if skip_missing and isinstance(error, FileNotFoundError):
                continue
            raise type(error)(f"{path}: {example.name}: {error}") from None
        kept.append(example)
    if not kept:
        advice = "choose the folder of the images with --images"
        raise ValueError(f"{path}: none of the images of its {len(examples)} examples is in {folder}; {advice}")
    return kept


def images_hash(examples: Sequence[Example], folder: str | Path) -> str:
    """Return a hash of the content of all images, in the order of the examples. Raises OSError or ValueError."""
    paths = [Path(folder) / example.image for example in examples if example.image]
    hashes = [content_hash(path) for path in dict.fromkeys(paths)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def attach_features(
    examples: Sequence[AnyExample],
    folder: str | Path,
    encoder: VisionEncoder | FunctionEncoder,
    cache: Path | None = None,
) -> list[AnyExample]:
    """Return the examples, each with the features (F,) of its image, or None if it has no image.

    An image that several examples share is encoded once. `cache` is a folder that keeps the features for later runs.
    Raises OSError or ValueError.
    """
    paths = [Path(folder) / example.image if example.image else None for example in examples]
    distinct = list(dict.fromkeys(path for path in paths if path is not None))
    features = dict(zip(distinct, encoder.encode(distinct, cache=cache))) if distinct else {}
    return [replace(example, features=features.get(path)) for example, path in zip(examples, paths)]


def encode_images(
    examples: Sequence[AnyExample], data, dtype: torch.dtype, device: torch.device
) -> tuple[list[AnyExample], VisionEncoder | FunctionEncoder]:
    """Return the examples with the features of their images, and the encoder that computed them.

    `data` is a training.options.DataOptions. The features of a vision encoder are cached in the folder `data.features`.
    Raises OSError or ValueError.
    """
    encoder = load_image_encoder(data.vision_encoder, data.encoder, dtype, device)
    with local_rank0_first():  # the first rank fills the cache, and the others read it
        examples = attach_features(examples, data.images, encoder, cache=data.features)
    return examples, encoder
