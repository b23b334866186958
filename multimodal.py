"""Image conditioning (section 3.3): an image becomes one vector, which is added to every prompt embedding.

    features  = class tokens of a frozen vision encoder at M depths, each normalized, concatenated
    I         = projection(features)          a small trained MLP
    P + I                                     replaces P in every adapted layer

M = 4, the even spacing of the depths and the normalization are our choice.

The notation is that of adapter.py. F is the number of features: M*Cv for a vision encoder of width Cv. The features of
a video or an animation are the mean over at most eight frames. Sounds and other media use a feature function that the
user provides.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from adapter import Adapter, AdaptionPrompt
from encoders.media import PREPROCESSING_VERSION, frames_of, preprocess
from encoders.models import ViT, make_mlp
from runtime.files import atomic_write, hash_tensors, require_file
from runtime.schema import renamed, whole_number

DEPTHS = 4  # M, our choice


class ImageAdapter(Adapter):
    """An adapter for images or other media, whose features are projected to a shift I of the prompt embeddings.

    The projection is Linear(F, bottleneck), GELU, Linear(bottleneck, C). Its width and activation are our choice; the
    paper calls it a bottleneck MLP of 0.6 million parameters. With ViT-L/14 at four depths and LLaMA-7B, it has 593,992
    parameters, and the whole adapter with K = 10 and L = 30 has 1,823,752, the paper's 1.8 million.
    """

    def __init__(
        self, *, features: int, bottleneck: int = 72, dim: int, generator: torch.Generator | None = None, **dimensions
    ):
        super().__init__(dim=dim, generator=generator, **dimensions)
        self.projection = make_mlp([features, bottleneck, dim], "gelu", generator)

    def forward(
        self,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
        gate_scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> list[AdaptionPrompt]:
        """Return the adaption prompts as `Adapter.forward` does, shifted by the image of each sample.

        `features` (B, F) are the features of one image per sample. Samples for which `has_image` (B,) is False are not
        shifted. Without `features`, no sample is shifted.
        """
        if features is None:
            return super().forward(gate_scale=gate_scale, dtype=dtype)
        shift = self.projection(features)  # I (B, C)
        return super().forward(shift if has_image is None else shift * has_image[:, None], gate_scale, dtype)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "ImageAdapter":
        metadata = renamed(metadata)
        down = tensors.get("projection.0.weight")
        if down is None or down.dim() != 2 or 0 in down.shape:
            raise ValueError("has no projection: it is not an adapter for images")
        depths = whole_number("vision_encoder_depths", metadata.get("vision_encoder_depths", "1"))
        if down.shape[1] % depths:
            raise ValueError(f"vision_encoder_depths is {depths}, which does not divide the {down.shape[1]} features")
        return super().from_tensors(tensors, metadata, bottleneck=down.shape[0], features=down.shape[1])


def layers_at_depths(n_layers: int, number: int) -> list[int]:
    """Return the indices of `number` evenly spaced layers, the last of which is the encoder's last layer.

    Raises ValueError if `number` is not between 1 and the encoder's number of layers.
    """
    if not 1 <= number <= n_layers:
        raise ValueError(f"cannot take features at {number} depths, because the vision encoder has {n_layers} layers")
    return [(i + 1) * n_layers // number - 1 for i in range(number)]


@torch.no_grad()
def global_features(vision_encoder: ViT, images: Tensor, depths: int = DEPTHS) -> Tensor:
    """Return the normalized class tokens at M = `depths` depths, (B, M*Cv) in float32.

    `images` is (B, channels, S, S), where S is the image size in pixels.
    """
    weight = vision_encoder.class_embedding
    states = vision_encoder(images.to(weight.device, weight.dtype))  # N times (B, T, Cv)
    tokens = [states[i][:, 0].float() for i in layers_at_depths(len(states), depths)]
    return torch.cat([F.layer_norm(token, token.shape[1:]) for token in tokens], dim=1)


def vision_encoder_fingerprint(vision_encoder: ViT) -> str:
    """Return a hash of a small part of the weights, which identifies the encoder."""
    first = vision_encoder.layers[0].attention.wq
    norm = list(vision_encoder.norm.parameters())[:1]  # its weight; an encoder without a final norm has none
    return hash_tensors([vision_encoder.class_embedding, vision_encoder.positions[:4], first.weight[:4], *norm])


def features_key(vision_encoder: ViT, depths: int) -> str:
    """Return a cache key of weights, config, preprocessing and depths. The dtype of the encoder is not part of it."""
    config = repr((PREPROCESSING_VERSION, vision_encoder.config))
    return f"{vision_encoder_fingerprint(vision_encoder)}-{hashlib.sha256(config.encode()).hexdigest()[:16]}-{depths}"


def encode_images(
    paths: Sequence[str | Path],
    vision_encoder: ViT,
    depths: int = DEPTHS,
    cache: Path | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the `global_features` (F,) of every image, on the CPU.

    For a video or an animation, return the mean over at most eight evenly spaced frames.

    The folder `cache` keeps the features of each image under the hash of the image file, so that the image passes
    through the vision encoder only once for all epochs and runs. Raises OSError or ValueError if an image cannot be
    read.
    """
    config, by_hash = vision_encoder.config, {}
    folder = None if cache is None else cache / features_key(vision_encoder, depths)
    hashes = list(map(content_hash, paths))
    for name in set(hashes):
        cached = None if folder is None else read_features(folder / f"{name}.npy", depths * config.dim)
        if cached is not None:
            by_hash[name] = cached
    todo = list({name: path for name, path in zip(hashes, paths) if name not in by_hash}.items())
    for start in tqdm(range(0, len(todo), batch_size), unit="batch of images", disable=not todo, file=sys.stderr):
        batch = todo[start : start + batch_size]
        frames = [[preprocess(image, config) for image in frames_of(path)] for _, path in batch]
        features = global_features(vision_encoder, torch.stack(sum(frames, [])), depths).cpu()  # (all frames, F)
        for (name, _), image_features in zip(batch, features.split(list(map(len, frames)))):
            by_hash[name] = image_features.mean(dim=0)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, by_hash[name].numpy())
    return [by_hash[name] for name in hashes]


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file. Raises OSError or ValueError if it cannot be read."""
    with open(require_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_features(path: Path, number: int) -> Tensor | None:
    """Read `number` cached features (F,). Return None if the file is missing or invalid."""
    if not path.is_file() or path.stat().st_size > 4096 + 4 * number:
        return None
    try:
        features = np.load(path, allow_pickle=False)
    except Exception:  # an invalid file can raise any error in NumPy
        return None
    fits = isinstance(features, np.ndarray) and features.dtype == np.float32 and features.shape == (number,)
    return torch.from_numpy(features) if fits and np.isfinite(features).all() else None


def load_function(where: str) -> Callable[[Path], object]:
    """Import the user's function, which returns features (M, Cv) for a file. `where` is FILE.py:NAME.

    Raises FileNotFoundError, or ValueError if the file cannot be imported or has no such function.
    """
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{where}: there is no such file; expected FILE.py:NAME with the path of a file")
    spec = importlib.util.spec_from_file_location(f"user encoder: {file}", file)
    if spec is None:
        raise ValueError(f"{file}: is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise ValueError(f"{file}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file}: has no function {name!r}; write the encoder as FILE.py:NAME")
    return getattr(module, name)


def encode_with_function(paths: Sequence[str | Path], encode: Callable[[Path], object]) -> list[Tensor]:
    """Return the features (F,) that a user's function computes for every file: M normalized rows of Cv, concatenated.

    Raises OSError, or ValueError if the function fails, or if its result has a wrong shape or is not finite.
    """
    by_path: dict[Path, Tensor] = {}
    for path in tqdm(list(dict.fromkeys(require_file(path) for path in paths)), unit="file", file=sys.stderr):
        try:
            rows = torch.as_tensor(encode(path)).detach().float().cpu()  # (M, Cv)
        except (Exception, SystemExit) as error:  # the user's code can raise anything
            raise ValueError(f"{path}: the encoder failed: {type(error).__name__}: {error}") from None
        if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
            raise ValueError(
                f"{path}: the encoder must return a matrix of finite numbers, one row per depth; "
                f"it returned values of shape {tuple(rows.shape)}, {int(rows.isfinite().sum())} of them finite"
            )
        by_path[path] = F.layer_norm(rows, rows.shape[1:]).flatten()
        first = next(iter(by_path.values()))
        if len(by_path[path]) != len(first):
            raise ValueError(
                f"{path}: the encoder returned {len(by_path[path])} features, but {len(first)} for the first file; "
                "it must return the same number for all files"
            )
    return [by_path[Path(path)] for path in paths]
