"""Files that are there, files that are written wholly or not at all, and JSON whose errors name the line."""

import gzip
import json
import lzma
import os
import zlib
from contextlib import contextmanager
from pathlib import Path


def require_file(path: str | Path, what: str = "file") -> Path:
    """The path; raises FileNotFoundError where no file is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such {what}")
    return Path(path)


@contextmanager
def atomic_write(path: str | Path):
    """A temporary name to write to, renamed to `path` at the end: a reader sees the old file or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file)  # all of it is on the disk before the old one goes
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # where the disk is full Python names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: object, indent: int = 1, **options) -> None:
    """One value as UTF-8 text, by `atomic_write`; folders above it are made. `options` are those of json.dumps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=indent, **options) + "\n")


def write_text(path: Path, text: str) -> None:
    """By `atomic_write`; what UTF-8 cannot say (half a character) is written as its escape."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, plain, .gz or .xz. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such data file") from None
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix or 'UTF-8'} text: {error}") from None


def parse_json(text: str, path: str | Path, first_line: int = 1) -> object:
    """The value of a text that begins in that line of a file. Raises ValueError that names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}: {where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise ValueError(f"{path}: line {first_line}: cannot be read: {error}") from None


def read_json(path: str | Path) -> object:
    """The one value of a JSON file, plain, .gz or .xz. Raises OSError, or ValueError that names the line."""
    return parse_json(read_text(path), path)


def read_json_object(path: Path) -> dict:
    """As `read_json`; raises ValueError where the value is no object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is a {type(values).__name__}, not an object")
    return values


def first_line(error: Exception) -> str:
    """Of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def resolved(path: str | Path | None) -> str | None:
    """The whole path, for a record of where things were."""
    return None if path is None else str(Path(path).resolve())
