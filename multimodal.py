"""Images in the prompts (section 3.3): a picture becomes one vector, which is added to every prompt.

    features  = the class token of a frozen vision encoder at M depths, each normed, side by side
    I         = projection(features)          learned, a small MLP
    P + I                                     instead of P, in every adapted layer

Notation as in adapter.py; F is the number of features, M*Cv for a vision encoder of width Cv. A video's features are
the mean of its frames'; sounds, and whatever else, take the same road through an encoder of the user's.
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

DEPTHS = 4  # M


class ImageAdapter(Adapter):  # or of sounds, or what else has features
    """An Adapter with a projection of an image's features (B, F) to what its prompts are shifted by, I (B, C).

    The projection is Linear(F, bottleneck), GELU, Linear(bottleneck, C). With ViT-L/14 at four depths, for LLaMA-7B, it
    has 593,992 parameters, and with K = 10 and L = 30 all have 1,823,752: the paper's 1.8 million.
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
        """As `Adapter.forward`, each sample's prompts shifted by its image's features (B, F), if there are any.

        Nothing shifts those of samples where `has_image` (B,) is False.
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
            raise ValueError(f"vision_encoder_depths is {depths}, its projection takes {down.shape[1]} features")
        return super().from_tensors(tensors, metadata, bottleneck=down.shape[0], features=down.shape[1])


def layers_at_depths(n_layers: int, number: int) -> list[int]:
    """So many layers, evenly spaced, the last of them the last. Raises ValueError where there are too few."""
    if not 1 <= number <= n_layers:
        raise ValueError(f"features at {number} depths, of a vision encoder of {n_layers} layers")
    return [(i + 1) * n_layers // number - 1 for i in range(number)]


@torch.no_grad()
def global_features(vision_encoder: ViT, images: Tensor, depths: int = DEPTHS) -> Tensor:
    """The class token at so many depths, each normed, (B, M*Cv) in float32, of images (B, 3, S, S)."""
    weight = vision_encoder.class_embedding
    states = vision_encoder(images.to(weight.device, weight.dtype))  # N times (B, T, Cv)
    tokens = [states[i][:, 0].float() for i in layers_at_depths(len(states), depths)]
    return torch.cat([F.layer_norm(token, token.shape[1:]) for token in tokens], dim=1)


def vision_encoder_fingerprint(vision_encoder: ViT) -> str:
    """A hash of a few weights."""
    first = vision_encoder.layers[0].attention.wq
    return hash_tensors(
        [vision_encoder.class_embedding, vision_encoder.positions[:4], first.weight[:4], vision_encoder.norm.weight]
    )


def features_key(vision_encoder: ViT, depths: int) -> str:
    """Return a name for all that features depend on besides the image: weights, shape, preprocessing and depths."""
    config = repr((PREPROCESSING_VERSION, vision_encoder.config))
    return f"{vision_encoder_fingerprint(vision_encoder)}-{hashlib.sha256(config.encode()).hexdigest()[:16]}-{depths}"


def encode_images(
    paths: Sequence[str | Path],
    vision_encoder: ViT,
    depths: int = DEPTHS,
    cache: Path | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """`global_features` of every picture, (F,) each, on the CPU; of a video, their mean over its frames.

    In the folder `cache` a file is kept for every picture by the hash of its content, so that it goes through the
    vision encoder once for all epochs and runs. Raises OSError or ValueError where a picture cannot be read.
    """
    config, known = vision_encoder.config, {}
    folder = None if cache is None else cache / features_key(vision_encoder, depths)
    hashes = list(map(content_hash, paths))
    for name in set(hashes):
        kept = None if folder is None else read_features(folder / f"{name}.npy", depths * config.dim)
        if kept is not None:
            known[name] = kept
    todo = list({name: path for name, path in zip(hashes, paths) if name not in known}.items())
    for start in tqdm(range(0, len(todo), batch_size), unit="batch of images", disable=not todo, file=sys.stderr):
        part = todo[start : start + batch_size]
        frames = [[preprocess(image, config) for image in frames_of(path)] for _, path in part]
        features = global_features(vision_encoder, torch.stack(sum(frames, [])), depths).cpu()  # (all frames, F)
        for (name, _), of_one in zip(part, features.split(list(map(len, frames)))):
            known[name] = of_one.mean(dim=0)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, known[name].numpy())
    return [known[name] for name in hashes]


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file. Raises OSError or ValueError if it is none."""
    with open(require_file(path, "image"), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_features(path: Path, number: int) -> Tensor | None:
    """What a file holds of so many; None where it is not there or holds something else: then they are made again."""
    if not path.is_file() or path.stat().st_size > 4096 + 4 * number:
        return None
    try:
        features = np.load(path, allow_pickle=False)
    except Exception:  # whatever a broken file makes numpy meet
        return None
    fits = isinstance(features, np.ndarray) and features.dtype == np.float32 and features.shape == (number,)
    return torch.from_numpy(features) if fits and np.isfinite(features).all() else None


def load_function(where: str) -> Callable[[Path], object]:
    """A function of the user's, FILE.py:NAME, which makes features (M, Cv) of a file. Raises OSError or ValueError."""
    file, _, name = where.rpartition(":")
    if not file or not Path(file).is_file():
        raise FileNotFoundError(f"{where}: no such encoder; it is named as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"encoder of the user's: {file}", file)
    if spec is None:
        raise ValueError(f"{file}: is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is any code
        raise ValueError(f"{file}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file}: has no function {name!r}")
    return getattr(module, name)


def encode_with_function(paths: Sequence[str | Path], encode: Callable[[Path], object]) -> list[Tensor]:
    """What a user's encoder makes of every file, (F,) each: M rows of Cv numbers, each normed, side by side.

    Raises OSError, or ValueError where the encoder fails, or yields something else.
    """
    found: dict[Path, Tensor] = {}
    for path in tqdm(list(dict.fromkeys(require_file(path, "image") for path in paths)), unit="file", file=sys.stderr):
        try:
            rows = torch.as_tensor(encode(path)).detach().float().cpu()  # (M, Cv)
        except (Exception, SystemExit) as error:  # it is any code
            raise ValueError(f"{path}: the encoder failed: {type(error).__name__}: {error}") from None
        if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
            raise ValueError(f"{path}: the encoder makes {list(rows.shape)} numbers of it, not (M, Cv) finite ones")
        found[path] = F.layer_norm(rows, rows.shape[1:]).flatten()
        first = next(iter(found.values()))
        if len(found[path]) != len(first):
            raise ValueError(f"{path}: the encoder makes {len(found[path])} features of it, {len(first)} of others")
    return [found[Path(path)] for path in paths]
