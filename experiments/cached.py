"""Cache of bases, data sets, checkpoints and adapters of the experiments: experiments/cache/, which Git ignores."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from toy.language_model import BASE, N_LAYERS, make_base

CACHE = Path(__file__).with_name("cache")


def cached_folder(name: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """Return the cached folder for a recipe, a JSON value that determines the content of the folder.

    The first call fills a temporary folder with `make(folder)`, and then renames it, so that a failure is not cached.
    Other processes wait for it.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        if not folder.exists():
            unfinished = CACHE / f"{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def toy_base(seed: int = 0, n_layers: int = N_LAYERS) -> Path:
    """Return the folder of the toy's base, or of a cached base with a different seed or number of layers.

    The first call for a different base pretrains it, which takes minutes.
    """
    if (seed, n_layers) == (0, N_LAYERS):
        return BASE
    return cached_folder("toy-base", [seed, n_layers], lambda folder: make_base(folder, seed, n_layers))
