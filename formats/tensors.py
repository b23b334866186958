"""Read named tensors from safetensors files and torch.save files; shared by all formats.

Files are memory-mapped, so that a tensor is read only when it is copied into a parameter. Files that were saved with a
PyTorch version before 1.6 are read into memory.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runtime.distributed import print_rank0
from runtime.errors import is_out_of_memory
from runtime.files import first_line, read_json_object, require_file
from runtime.tensor_parallel import Part

# The weights of a base, keyed by Meta's names. Each value is a function of (target, part=None), which copies the weight
# to `target`, or only the part of it that belongs to this rank.
Weights = dict[str, Callable[..., None]]


@contextmanager
def prefix_errors(file: str | Path, kind: str = "field", separator: str = ": "):
    """Prefix error messages with the name of a file, or with any other string that says where an error occurred.

    A ValueError stays a ValueError, with `separator` after the prefix. A KeyError becomes a ValueError that names the
    missing item; `kind` is the word for such an item. An out-of-memory error becomes a MemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{file}: out of memory: {first_line(error)}") from None
        raise
    except KeyError as error:
        raise ValueError(f"{file}: has no {kind} {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}{separator}{error}") from None


def download_hint(path: Path) -> str:
    """Return a hint with a download command if the path looks like a name on the Hugging Face Hub, otherwise ""."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|(roberta|vit|deit|clip)[\w.-]*", str(path), re.IGNORECASE):
        return ""
    command = f"hf download {path} --local-dir {path.name}"
    return f"; if it is on Hugging Face, run `{command}` (from the package huggingface_hub) and pass {path.name}"


def check_layers(path: Path, names: Iterable[str], prefix: str, expected: int) -> None:
    """Raise ValueError if the weight names that begin with `prefix` are not for `expected` layers.

    Call this before the model is built, because the configuration may state any number of layers.
    """
    found = len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
    if found != expected:
        raise ValueError(f"{path}: has weights for {found} layers, but the configuration requires {expected}")


def require_dense(tensor: object) -> Tensor:
    """Return the tensor. Raises ValueError unless it is a dense floating-point tensor that is stored in full."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError("is not a dense tensor")
    if (
        tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):  # for example, one number that was expanded
        raise ValueError(f"has shape {tuple(tensor.shape)}, but its storage is smaller")
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"has dtype {tensor.dtype}; expected a floating-point dtype")
    return tensor


def copy(source: Tensor, target: Tensor, part: Part | None = None) -> None:
    """Copy `source`, or only the `part` of it that belongs to this rank, to `target`. No other bytes are read.

    Raises ValueError if the shapes do not match, or if the source is not a dense floating-point tensor.
    """
    expected = part.whole_shape(target.shape) if part else target.shape
    if require_dense(source).shape != expected:
        raise ValueError(f"has shape {tuple(source.shape)}, but the configuration requires {tuple(expected)}")
    target.copy_(part.of(source) if part else source)


def frozen_parameter(
    like: Tensor, write: Callable[[Tensor], None], where: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """Create a frozen parameter with the shape and strides of `like`, and fill it with `write`.

    Raises ValueError, with a message that begins with `where`, if the tensor cannot be allocated or read, or if one of
    its values is not finite.
    """
    try:
        target = torch.empty_like(like, dtype=dtype, device=device)
        write(target)
        if not target.sum().isfinite():  # one fast pass; any NaN or infinity makes the sum NaN or infinite
            raise ValueError("contains values that are not finite")
    except (ValueError, TypeError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{where} {first_line(error)}") from None
    return nn.Parameter(target, requires_grad=False)


def load_pth(file: Path, content: bytes | None = None) -> dict[str, object]:
    """Load a dict that torch.save wrote, without running code that it contains.

    If `content` is given, it is loaded instead of the file, which is only named in error messages. Otherwise the
    tensors are memory-mapped, unless the file was saved with a PyTorch version before 1.6. Raises FileNotFoundError, or
    ValueError if the file is invalid.
    """
    if content is None:
        require_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; real problems raise an exception
            source = (lambda: file) if content is None else partial(io.BytesIO, content)
            zipped = zipfile.is_zipfile(source())  # torch.save wrote no zip files before PyTorch 1.6
            entries = zipfile.ZipFile(source()).infolist() if zipped else []
            is_torchscript = any(entry.filename.endswith("/constants.pkl") for entry in entries)
            if not is_torchscript and any(entry.compress_type for entry in entries):
                raise ValueError("its entries are compressed, but torch.save never compresses them")
            values = torch.load(source(), map_location="cpu", mmap=zipped and content is None, weights_only=True)
    except pickle.UnpicklingError:
        found = "it is corrupt, or contains code, which is never run; save only the state dict"
        raise ValueError(f"{file}: not a file of tensors: {found}") from None
    except Exception as error:  # a broken file can cause any exception in torch.load
        if "TorchScript" in str(error):
            weights = f"torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), 'weights.pt')"
            raise ValueError(
                f"{file}: is a TorchScript program (OpenAI distributes CLIP this way); save its weights with {weights}"
            ) from None
        raise ValueError(f"{file}: not a file of tensors: {first_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{file}: not a file of tensors: expected a dict that maps names to tensors")
    return values


def open_tensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Return the functions that read the tensors of a file, keyed by tensor name.

    A file with the suffix .safetensors is read as safetensors, and any other file as one that torch.save wrote. Raises
    FileNotFoundError or ValueError.
    """
    if require_file(file).suffix != ".safetensors":
        mapped = load_pth(file)
        return {name: partial(mapped.get, name) for name in mapped}
    try:
        handle = safe_open(file, "pt")
        return {name: partial(handle.get_tensor, name) for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file: {first_line(error)}") from None


# A Hugging Face folder may contain several of these files. The first one that exists is loaded, as in transformers.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def open_shards(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return the functions that read the tensors of a Hugging Face folder, keyed by tensor name.

    The weights are one file or several shards. Prints a line if the folder contains several of WEIGHT_FILES, because
    only the first one is loaded. Raises FileNotFoundError or ValueError.
    """
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder}: contains none of {', '.join(WEIGHT_FILES)}")
    first, *others = found
    if others:
        print_rank0(f"{folder}: loading {first}; ignoring {', '.join(others)}")
    if not first.endswith(".json"):
        return open_tensors(folder / first)
    index = folder / first
    places = read_json_object(index).get("weight_map")
    if not places or not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in sorted(set(places.values())):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{file}: is listed in {index.name}, but is not a file in this folder")
        tensors |= open_tensors(file)
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{index}: lists {missing[0]} in {places[missing[0]]}, which does not contain it")
    return tensors
