"""Errors as one line, and which process of several says them."""

import os
import re
from contextlib import contextmanager

import torch


def launched_rank() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class AllRanksError(ValueError):
    """An error that all ranks raise, so that the first alone has to say it."""


@contextmanager
def memory_errors():
    """Raises torch.OutOfMemoryError, as on a GPU, where a CPU has no memory left: PyTorch calls it a RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        none_left = re.search("can't allocate memory|not enough memory|Cannot allocate memory", str(error))
        if isinstance(error, torch.OutOfMemoryError) or not (none_left or isinstance(error, MemoryError)):
            raise
        raise torch.OutOfMemoryError(f"no memory left: {error_line(error)}") from None


def error_line(error: Exception) -> str:
    """What to tell a person, in one line."""
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    return printable(" ".join(message.split()))


def printable(text: str) -> str:
    """Without what a terminal would obey: names in strangers' files may hold its commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
