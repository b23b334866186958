"""One-line messages for errors that the user can act on."""

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


LINE = 1000  # maximum number of characters of an error line; a quoted value may have millions


def error_line(error: BaseException) -> str:
    """Return the error's message as one printable line, shortened if it is long.

    The line begins with the file name of an OSError, if it has one. If memory ran out, the line says so.
    """
    message = str(error)
    if isinstance(error, OSError) and (error.filename or error.strerror):
        reason = error.strerror or " ".join(map(str, error.args))
        message = f"{error.filename}: {reason}" if error.filename else reason
    line = printable(" ".join(message[: 10 * LINE].split()))
    if len(line) > LINE:
        line = f"{line[: LINE - 200]} ... {line[-100:]}"
    if is_out_of_memory(error) and "out of memory" not in line:
        line = f"out of memory: {line}" if line else "out of memory"
    return line


def printable(text: str) -> str:
    """Escape nonprintable characters, because names in third-party files may contain terminal control sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
