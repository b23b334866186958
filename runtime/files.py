"""File helpers: checks of paths, atomic writes, locks, hashes, and JSON parsing with errors that name the line."""

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import secrets
import socket
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from runtime.schema import brief


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of a file that Git LFS has not downloaded


def require_file(path: str | Path, what: str = "file") -> Path:
    """Return the path. Raises FileNotFoundError if it does not exist, or ValueError if it is not a regular file.

    A device or a pipe is rejected, because reading it may never end. A Git LFS pointer is rejected, because it stands
    for a file that was not downloaded. `what` names the kind of file in error messages.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what}")
    if not path.is_file():
        raise ValueError(f"{path}: is a {'folder' if path.is_dir() else 'device or a pipe'}, not a file")
    if path.stat().st_size < 1000:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path}: is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    return path


def require_writable(path: str | Path, folder: bool = False) -> Path:
    """Return the path. Raises OSError or ValueError if no file can be written there.

    With `folder`, it checks a folder, whose parents may be missing. Call this before long work. It creates nothing.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        raise ValueError(f"{path}: exists and is not a {'folder' if folder else 'file'}")
    above = path.absolute() if path.exists() and folder else path.absolute().parent
    while folder and not above.exists():
        above = above.parent
    if not above.is_dir():
        if above.exists():
            raise ValueError(f"{path}: {above} is not a folder; choose a different path")
        raise ValueError(f"{path}: the folder {above} does not exist; create it, or choose a different path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: {above} is not writable")
    return path


def path_inside(folder: str | Path, name: str) -> Path:
    """Return folder/name. Raises ValueError if this path is outside the folder; `name` is not trusted."""
    inside = os.path.abspath(folder)
    if os.path.commonpath([inside, os.path.abspath(os.path.join(folder, name))]) != inside:
        raise ValueError(f"{name} is outside {folder}; choose a different folder with --images")
    return Path(folder) / name


@contextmanager
def named_errors(path: str | Path):
    """Add the path to an OSError that names no file, such as Python's error when the disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path to write to, and rename it to `path` at the end.

    A reader sees either the old file or the new one. If the block raises, the old file stays. The temporary name is
    unique, so that two processes that write the same file do not disturb each other. Raises ValueError if `path` is not
    a regular file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: exists and is not a file")
    temporary = path.with_name(f"{path.name[:99]}.{os.getpid()}-{secrets.token_hex(4)}.unfinished")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file)  # its content is on the disk before the old file is replaced
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # if the disk is full, Python names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Delete the temporary files that a killed `atomic_write` of this path has left behind."""
    for file in path.parent.glob(f"{glob.escape(path.name)}.*.unfinished"):
        if re.fullmatch(r"\.\d+-[0-9a-f]{8}\.unfinished", file.name.removeprefix(path.name)):
            file.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path):
    """Lock the folder for the duration of the block.

    Raises ValueError if another process has locked the folder; the message names the process if possible.
    """
    path = folder / ".lock"
    holder = folder / ".lock-holder"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # the process may end at this moment
            who = holder.read_text() or who
        raise ValueError(f"{folder}: is in use by {who}; use a different --out, or wait until it has ended") from None
    try:
        with named_errors(holder):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        for file in (holder, path):
            with suppress(OSError):  # if the folder is no longer writable, another error has reported it
                file.unlink(missing_ok=True)
        lock.release()


def write_json(path: Path, values: object, indent: int = 1, **options) -> None:
    """Write a value as JSON atomically, and create missing parent folders. `options` are passed to json.dumps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=indent, **options) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically. Unpaired surrogates, which UTF-8 cannot encode, are written as escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Equal tensors and metadata give equal bytes.

    safetensors writes metadata in a different order at each call, so the keys are sorted here. The file begins with
    the length of its JSON header.
    """
    content = save(dict(tensors), None if metadata is None else dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.writelines((len(header).to_bytes(8, "little"), header, memoryview(content)[end:]))


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    """Return a hash of the values, rounded to bfloat16, so that the hash does not depend on the tensors' dtype."""
    rounded = torch.cat([tensor.detach().flatten().to("cpu", torch.bfloat16) for tensor in tensors])
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# Maximum bytes of a file that is read into memory, because a small compressed file can decompress to any size. Files
# of weights are memory-mapped, and have no limit.
MAX_BYTES = int(os.environ.get("LLAMA_ADAPTER_MAX_BYTES", 2**30))


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file, decompressed if it is .gz or .xz. Raises OSError or ValueError."""
    path = require_file(path)
    packed = {".gz": gzip.open, ".xz": partial(lzma.open, format=lzma.FORMAT_XZ)}.get(path.suffix)
    size = path.stat().st_size
    limit = min(MAX_BYTES, max(2**26, 100 * size)) if packed else MAX_BYTES  # compression shrinks text to about a tenth
    if size <= limit:
        try:
            with (packed or open)(path, "rb") as file:
                content = file.read(limit + 1 if packed else size + 1)
        except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path}: cannot be read as {path.suffix}: {error}") from None
        if len(content) <= limit:
            return content
    if limit < MAX_BYTES:
        raise ValueError(f"{path}: its {size:,} bytes decompress to more than {limit:,}; decompress it first")
    raise ValueError(f"{path}: contains more than {limit:,} bytes; set $LLAMA_ADAPTER_MAX_BYTES to allow more")


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, which may be compressed as .gz or .xz.

    A byte order mark is removed. Raises OSError or ValueError.
    """
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def parse_json(text: str, path: str | Path, first_line: int = 1) -> object:
    """Parse JSON that begins at line `first_line` of the file. Raises a ValueError that names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}: {where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, or deeply nested brackets
        raise ValueError(f"{path}: line {first_line}: cannot be read: {error}") from None


def read_json(path: str | Path) -> object:
    """Return the value of a JSON file, which may be compressed as .gz or .xz.

    Raises OSError, or a ValueError that names the file, and the line of a syntax error.
    """
    return parse_json(read_text(path), path)


def read_json_object(path: Path) -> dict:
    """Return the object in a JSON file. Raises OSError or ValueError, for example if the value is not an object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: contains {brief(values)}, not an object")
    return values


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the next one if it ends with a colon.

    A KeyError is described as a missing field. If the message is empty, the error's type is returned.
    """
    if isinstance(error, KeyError) and " " not in str(error):
        return f"has no field {error}"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def resolved(path: str | Path | None) -> str | None:
    """Return the absolute path as a string. None, or a name that is not a local path, is returned unchanged."""
    if path is None or not Path(path).exists():
        return path if path is None else str(path)
    return str(Path(path).resolve())
