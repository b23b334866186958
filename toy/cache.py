"""One folder for all that is trained here once and used from then on, outside of the checkout."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
from filelock import FileLock, Timeout


def cache_root() -> Path:
    """$LLAMA_ADAPTER_CACHE, else llama-adapter in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("LLAMA_ADAPTER_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-adapter"


@contextmanager
def file_lock(path: Path, taken: Callable[[], None]):
    """Hold a lock file. If another process holds it, call `taken`, and wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        taken()
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def cached_folder(name: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """The folder that make(empty folder) filled, at the first call with this recipe; its name is `name` and a hash.

    The recipe is all that decides what is made, as JSON can say it: numbers, and the texts that are learnt from. The
    folder gets its name when it is whole; what an interrupted call leaves is never taken for it, and is what `make`
    finds there the next time. Of two processes that want the same folder one makes it, and the other waits.
    Raises OSError where it cannot be written, and what `make` raises.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    try:
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # there may be no home
        raise OSError(f"{error}; $LLAMA_ADAPTER_CACHE can name another folder for what the toys make") from None
    folder, unfinished = root / f"{name}-{digest}", root / f".{name}-{digest}"
    if not folder.exists():
        waiting = partial(click.echo, f"waiting for another process that makes {folder.name}", err=True)
        with file_lock(unfinished.with_suffix(".lock"), waiting):
            if not folder.exists():
                unfinished.mkdir(exist_ok=True)
                try:
                    make(unfinished)
                    unfinished.rename(folder)
                finally:
                    if unfinished.exists() and not any(unfinished.iterdir()):
                        unfinished.rmdir()
    return folder
