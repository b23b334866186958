"""Files of tensors by name, safetensors or torch.save's: what all formats share.

Files are mapped, not read: a tensor's bytes are touched when it is copied to where it belongs.
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

# Of a base, by Meta's names: what copies each weight, or a `part` of it alone, into a tensor of that shape.
Weights = dict[str, Callable[..., None]]


@contextmanager
def prefix_errors(file: str | Path, kind: str = "field", separator: str = ": "):
    """What is missing from a file or wrong in it is said with the file's name: KeyError and ValueError inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{file}: no memory left: {first_line(error)}") from None
        raise
    except KeyError as error:
        raise ValueError(f"{file}: has no {kind} {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}{separator}{error}") from None


def download_hint(path: Path) -> str:
    """How to get what is not there, where its name looks like one of the Hub's."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|(roberta|vit|deit|clip)[\w.-]*", str(path), re.IGNORECASE):
        return ""
    return f"; if Hugging Face has it: `hf download {path} --local-dir {path.name}`, then give {path.name}"


def check_layers(path: Path, names: Iterable[str], prefix: str, expected: int) -> None:
    """Raise ValueError where there are weights of another number of layers: before anything is made of so many."""
    found = len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
    if found != expected:
        raise ValueError(f"{path}: has weights of {found} layers, its configuration says {expected}")


def require_dense(tensor: object) -> Tensor:
    """The tensor; raises ValueError where it is no dense one of floating-point numbers, each with bytes of its own."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError("is no dense tensor")
    if (
        tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):  # one number, repeated a billion times
        raise ValueError(f"is {tuple(tensor.shape)} numbers, but has bytes for fewer")
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"is of {tensor.dtype}, not of floating-point numbers")
    return tensor


def copy(source: Tensor, target: Tensor, part: Part | None = None) -> None:
    """Copy the source, or the part of it that this rank holds; only those bytes are read.

    Raises ValueError, with both shapes, if they differ, and if the source is no dense tensor.
    """
    expected = part.whole_shape(target.shape) if part else target.shape
    if require_dense(source).shape != expected:
        raise ValueError(f"is {tuple(source.shape)}, its configuration says {tuple(expected)}")
    target.copy_(part.of(source) if part else source)


def filled(
    like: Tensor, write: Callable[[Tensor], None], where: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """A frozen parameter with the shape and strides of `like`, filled by `write`. `where` begins its ValueErrors."""
    try:
        target = torch.empty_like(like, dtype=dtype, device=device)
        write(target)
        if not target.sum().isfinite():  # so is the sum of finite weights; this is one fast pass
            raise ValueError("holds values that are not finite")
    except (ValueError, TypeError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{where} {first_line(error)}") from None
    return nn.Parameter(target, requires_grad=False)


def load_pth(file: Path, content: bytes | None = None) -> dict[str, object]:
    """What torch.save wrote, by name; no code in it is run. Tensors are mapped, unless the content is given.

    Raises FileNotFoundError, or ValueError, whatever is broken.
    """
    if content is None:
        require_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange protocols: what matters raises
            source = (lambda: file) if content is None else partial(io.BytesIO, content)
            zipped = zipfile.is_zipfile(source())  # before PyTorch 1.6 files were none
            entries = zipfile.ZipFile(source()).infolist() if zipped else []
            program = any(entry.filename.endswith("/constants.pkl") for entry in entries)  # which is not read
            if not program and any(entry.compress_type for entry in entries):
                raise ValueError("is compressed, as torch.save never does")
            values = torch.load(source(), map_location="cpu", mmap=zipped and content is None, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: not a file of tensors alone: broken, or with code in it, which is not run") from None
    except Exception as error:  # torch.load raises whatever a broken file makes it meet
        if "TorchScript" in str(error):
            weights = f"torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), 'weights.pt')"
            raise ValueError(
                f"{file}: is a program, as OpenAI offers CLIP; give its weights alone: {weights}"
            ) from None
        raise ValueError(f"{file}: not a file of tensors: {first_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{file}: not a file of tensors by name")
    return values


def open_tensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    """How to get every tensor of a file by name, of safetensors by its ending, else of what torch.save wrote."""
    if require_file(file).suffix != ".safetensors":
        mapped = load_pth(file)
        return {name: partial(mapped.get, name) for name in mapped}
    try:
        handle = safe_open(file, "pt")
        return {name: partial(handle.get_tensor, name) for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {first_line(error)}") from None


# A folder of Hugging Face's may hold several of these; the first that is there is loaded, as transformers does.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def open_shards(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a function per tensor name, of the single file of a Hugging Face folder or of all that its index names.

    Prints a line if there are other weights that are not loaded.
    """
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder}: has neither {', nor '.join(WEIGHT_FILES)}")
    first, *others = found
    if others:
        print_rank0(f"{folder}: loading {first}; not loaded: {', '.join(others)}")
    if not first.endswith(".json"):
        return open_tensors(folder / first)
    index = folder / first
    places = read_json_object(index).get("weight_map")
    if not places or not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: has no weight_map from tensors to files")
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in sorted(set(places.values())):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{file}: {index.name} names it, but there is no such file")
        tensors |= open_tensors(file)
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{index}: says that {missing[0]} is in {places[missing[0]]}, which does not have it")
    return tensors
