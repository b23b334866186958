"""One folder for all that is trained here once and used from then on, outside of the checkout."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """$LLAMA_ADAPTER_CACHE, else llama-adapter in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("LLAMA_ADAPTER_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-adapter"


def cached_folder(name: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """The folder that make(empty folder) filled, at the first call with this recipe; its name is `name` and a hash.

    The recipe is all that decides what is made, as JSON can say it: numbers, and the texts that are learnt from. The
    folder gets its name when it is whole; what an interrupted or failed call leaves is never taken for it, and of two
    processes that make the same folder one wins. Raises OSError where it cannot be written, and what `make` raises.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    try:
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # there may be no home
        raise OSError(f"{error}; $LLAMA_ADAPTER_CACHE can name another folder for what the toys make") from None
    folder = root / f"{name}-{digest}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as unfinished:
            made = Path(unfinished) / name
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder
