"""Encoders that compute the features of images for an adapter: CLIP's vision encoder, or a user-defined function."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapter import Adapter
from formats.encoders import load_vit
from multimodal import (
    DEPTHS,
    ImageAdapter,
    encode_images,
    encode_with_function,
    load_function,
    vision_encoder_fingerprint,
)
from runtime.cli import warn
from runtime.files import hash_tensors, resolved


class VisionEncoder:
    """A frozen vision encoder, whose features are taken at M `depths`. `metadata` is stored in the adapter file."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device, depths: int = DEPTHS):
        self.vit, self.depths = load_vit(path, dtype, device), depths
        self.num_features = depths * self.vit.config.dim
        fingerprint = vision_encoder_fingerprint(self.vit)
        self.metadata = {
            "vision_encoder": resolved(path),
            "vision_encoder_fingerprint": fingerprint,
            "vision_encoder_depths": str(depths),
        }

    def encode(self, paths: Sequence[Path], cache: Path | None = None) -> list[Tensor]:
        """Return the features (F,) of each image or video. The folder `cache`, if given, keeps them for later calls.

        Raises OSError or ValueError.
        """
        return encode_images(paths, self.vit, self.depths, cache)

    def fixed_options(self, features: Sequence[Tensor]) -> dict[str, str]:
        """Return the options that must not change when a run is resumed."""
        return {"vision_encoder_fingerprint": self.metadata["vision_encoder_fingerprint"]}


class FunctionEncoder:
    """A user-defined function, FILE.py:NAME. Its features are not cached, because what they depend on is unknown.

    If `num_features` is given, it is the number of features F that the adapter expects. Raises OSError or ValueError if
    the function cannot be imported.
    """

    def __init__(self, where: str, num_features: int | None = None):
        self.where, self.function, self.num_features = where, load_function(where), num_features
        self.metadata = {"encoder": where}

    def encode(self, paths: Sequence[Path], cache: Path | None = None) -> list[Tensor]:
        """Return the features (F,) of each file; `cache` is not used.

        Raises OSError, or ValueError if the function fails or the adapter expects a different F.
        """
        features = encode_with_function(paths, self.function)
        if self.num_features not in (None, len(features[0])):
            made_for = f"the adapter was made for {self.num_features}"
            raise ValueError(f"{self.where}: returns {len(features[0])} features, but {made_for}")
        return features

    def fixed_options(self, features: Sequence[Tensor]) -> dict[str, str]:
        """Return the options that must not change when a run is resumed: a hash of the features themselves."""
        return {"features_hash": hash_tensors(features)}


def load_image_encoder(
    vision_encoder: str | None,
    encoder: str | None,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None = None,
) -> VisionEncoder | FunctionEncoder:
    """Load the vision encoder at the path `vision_encoder`, or the function `encoder`, FILE.py:NAME.

    One of the two is required if `adapter` is None; otherwise, the default is the vision encoder that the adapter
    names. Warns if the adapter was trained with a different encoder. Raises OSError, or ValueError if both are given,
    if neither is given and the adapter names no vision encoder, or if the adapter has no projection or does not fit the
    vision encoder. A function is checked against the adapter later, by `FunctionEncoder.encode`.
    """
    if vision_encoder is not None and encoder is not None:
        raise ValueError("--clip and --encoder both compute the features of an image; use only one of them")
    if adapter is None:
        return FunctionEncoder(encoder) if encoder is not None else VisionEncoder(vision_encoder, dtype, device)
    if not isinstance(adapter, ImageAdapter):
        raise ValueError("the adapter has no projection for images; use an adapter that was trained on images")
    metadata, made_for = adapter.metadata, adapter.projection[0].in_features
    if encoder is not None:
        trained_with = metadata.get("encoder", metadata.get("vision_encoder", encoder))
        if Path(trained_with).name != Path(encoder).name:
            warn(f"the adapter was trained with {trained_with}, not with {encoder}")
        return FunctionEncoder(encoder, made_for)
    if vision_encoder is None:
        vision_encoder, trained_with = metadata.get("vision_encoder"), metadata.get("encoder")
        if vision_encoder is None and trained_with is not None:
            advice = f"to run that code, give --encoder {trained_with}"
            raise ValueError(f"the adapter was trained with {trained_with}; {advice}")
        if vision_encoder is None:
            raise ValueError("the adapter file does not name its encoder; give --clip PATH or --encoder FILE.py:NAME")
        if not Path(vision_encoder).exists():
            missing = f"{vision_encoder}: no such vision encoder"
            raise FileNotFoundError(f"{missing}; the adapter file names it; give --clip PATH")
    found = VisionEncoder(vision_encoder, dtype, device, int(metadata.get("vision_encoder_depths", DEPTHS)))
    if found.num_features != made_for:
        raise ValueError(
            f"{vision_encoder}: computes {found.num_features} features, but the adapter was made for {made_for}"
        )
    if metadata.get("vision_encoder_fingerprint", "") not in ("", found.metadata["vision_encoder_fingerprint"]):
        warn(f"the adapter was trained with a vision encoder whose weights differ from those of {vision_encoder}")
    return found
