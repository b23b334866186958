"""Images in the prompts (section 3.3): a picture becomes one vector, which is added to every prompt.

    features  = the class token of a frozen vision tower at M depths, each normed, side by side
    I         = projection(features)          learnt, a small MLP
    P + I                                     instead of P, in every adapted layer

Notation as in adapter.py; Cv is the width of the tower. A video's features are the mean of its frames'; sounds, and
whatever else, take the same road through an encoder of the user's.
"""

import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from adapter import Adapter
from runtime.files import atomic_write
from encoders.models import ViT
from model import hash_of

# Of the pictures that CLIP was trained on, per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

DEPTHS = 4  # M
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FRAMES = 8  # of a video


def open_image(path: str | Path) -> Image.Image:
    """A picture in RGB, the right way up. Raises FileNotFoundError, or ValueError that says what is wrong with it."""
    require_file(path)
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
    return showing(image, path)


def showing(image: Image.Image, path: str | Path) -> Image.Image:
    """The image; raises ValueError where it is a mere dot or thread."""
    width, height = image.size
    if min(image.size) < 2 or max(image.size) > 100 * min(image.size):
        raise ValueError(f"{path}: {width} x {height} pixels show nothing")
    return image


def open_video(path: str | Path, number: int = FRAMES) -> list[Image.Image]:
    """So many frames in RGB, evenly spread over a video, or all that it has. Raises FileNotFoundError or ValueError."""
    require_file(path)
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av") from None
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            total = stream.frames or sum(1 for _ in file.decode(stream))  # not all formats say how many they have
            file.seek(0)
            wanted = {(2 * i + 1) * total // (2 * number) for i in range(number)}
            frames = [frame.to_image() for i, frame in enumerate(file.decode(stream)) if i in wanted]
    except Exception as error:  # whatever a broken file makes a decoder meet
        raise ValueError(f"{path}: is a broken video, or none: {error}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return [showing(frame, path) for frame in frames]


def views(path: str | Path) -> list[Image.Image]:
    """What there is to see: a video's frames, or a picture. Raises FileNotFoundError or ValueError."""
    return open_video(path) if Path(path).suffix.lower() in VIDEOS else [open_image(path)]


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
    """`global_features` of every picture, (F,) each, on the CPU; of a video, their mean over its frames.

    In the folder `cache` a file is kept for every picture by the hash of its content, so that it goes through the tower
    once for all epochs and runs. Raises OSError or ValueError where a picture cannot be read.
    """
    size, kept = tower.config.image_size, {}
    folder = None if cache is None else cache / f"{tower_fingerprint(tower)}-{size}-{number}"
    names = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in map(require_file, paths)]
    for name in set(names):
        if folder is not None and (folder / f"{name}.npy").exists():
            kept[name] = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
    todo = list({name: path for name, path in zip(names, paths) if name not in kept}.items())
    for start in tqdm(range(0, len(todo), batch_size), unit="batch of images", disable=not todo, file=sys.stderr):
        part = todo[start : start + batch_size]
        seen = [[preprocess(image, size) for image in views(path)] for _, path in part]
        features = global_features(
            tower, torch.stack(sum(seen, [])), number
        ).cpu()  # (B, F), of all pictures and frames
        for (name, _), frames in zip(part, features.split(list(map(len, seen)))):
            kept[name] = frames.mean(dim=0)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, kept[name].numpy())
    return [kept[name] for name in names]


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


def features_by(paths: Sequence[str | Path], encode: Callable[[Path], object]) -> list[Tensor]:
    """What a user's encoder makes of every file, (F,) each: M rows of Cv numbers, each normed, side by side.

    Raises OSError, or ValueError where the encoder fails, or yields something else.
    """
    found: dict[Path, Tensor] = {}
    for path in tqdm(list(dict.fromkeys(map(require_file, paths))), unit="file", file=sys.stderr):
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


def files_in(paths: Sequence[str | Path], of_any_kind: bool = False) -> list[Path]:
    """The files among them, and the pictures and videos (or all files) in folders among them, by name.

    Raises OSError or ValueError where there are none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            readable = VIDEOS | set(Image.registered_extensions())
            inside = [file for file in sorted(path.iterdir()) if of_any_kind or file.suffix.lower() in readable]
            inside = list(filter(Path.is_file, inside))
            if not inside:
                raise ValueError(f"{path}: holds no images")
            found += inside
        else:
            found.append(require_file(path))
    return found


def require_file(path: str | Path) -> Path:
    """The path; raises FileNotFoundError where no file is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    return Path(path)


class ImageAdapter(Adapter):  # or of sounds, or what else has features
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
    def extra_arguments(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, object]:
        down = tensors.get("projection.0.weight")
        if down is None or down.dim() != 2:
            raise ValueError("has no projection: it is not an adapter for images")
        return {"bottleneck": down.shape[0], "features": down.shape[1]}
