"""Errors that users can act on, as one line."""

import re


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the device or the machine ran out of memory.

    On a CPU and on Apple's GPU, PyTorch raises a plain RuntimeError for this.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search("can't allocate memory|not enough memory|Cannot allocate memory|out of memory", str(error))
    )


LINE = 1000  # characters of an error line, at most: a value that it quotes may have millions


def error_line(error: BaseException) -> str:
    """The error's message in one printable line; an OSError's begins with the file."""
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    line = printable(" ".join(message[: 10 * LINE].split()))
    if len(line) > LINE:
        line = f"{line[: LINE - 200]} ... {line[-100:]}"
    if is_out_of_memory(error) and "no memory left" not in line:
        line = f"no memory left: {line}"
    return line


def printable(text: str) -> str:
    """Escape control characters: names in third-party files may hold terminal commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
