"""Adapter files: load this project's and third-party formats, and export to PEFT.

The published implementations compute the same attention, but their files and their gates differ:

- The authors' release is one .pth file with `adapter_query.weight` (L*K, C) and one gate per head in every layer. Their
  training code applies tanh to the gate; their published inference code does not. Their first release has one gate per
  layer for all heads, without an activation.
- lit-llama and litgpt write one .pth file with `adapter_wte` and `gating_factor` for each adapted layer. The gate has
  no activation; older files have one gate per layer for all heads. Files of litgpt v0.5.5 or later look the same but do
  not work, because these versions project the prompts with other rows of the layer's weights (docs/adapters.md).
- PEFT writes a folder. Its AdaptionPrompt has one gate per layer, without an activation.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapter import Adapter
from encoders.heads import HeadAdapter
from formats.tensors import load_pth, prefix_errors, open_tensors, require_dense
from multimodal import ImageAdapter
from runtime.cli import warn
from runtime.files import read_json_object, require_file, write_json, write_tensors
from runtime.schema import listed, whole_number


MAX_LENGTH = 4096  # maximum K, as in train.py
TOO_LONG = f"has {{:,}} prompts per layer; the maximum is {MAX_LENGTH:,}"


def load_adapter(path: str | Path, *, heads: int | None = None, gate: str | None = None, length: int = 10) -> Adapter:
    """Load an adapter file, a third-party adapter, or the adapter in the folder of a run. The format is detected.

    `heads` is the base's H, which is required if a third-party file has one gate per layer for all heads. `gate` (the
    activation of the gates) and `length` (K) are used only for the authors' files, which do not state them. `gate`
    defaults to tanh for one gate per head, and to identity for one gate per layer. Files of this project state all
    three, so the arguments are ignored for them. Warns if the file is from lit-llama or litgpt. Raises
    FileNotFoundError or ValueError.
    """
    path = Path(path)
    if (path / "adapter.safetensors").is_file():
        path /= "adapter.safetensors"
    if path.is_dir():
        path = peft_weights(path)
        tensors = {name: fetch() for name, fetch in open_tensors(path).items()}
    else:
        with open(require_file(path, "adapter file"), "rb") as file:
            start = file.read(9)
        # torch.save writes a zip file, and wrote a pickle before PyTorch 1.6. A safetensors file begins with the length
        # of its header in 8 bytes, which may equal a magic number of torch.save, but the next byte is a brace.
        from_torch_save = start[:2] in (b"PK", b"\x80\x02") and start[8:] != b"{"
        if not from_torch_save:
            return load_own(path)
        tensors = load_pth(path)
        tensors = tensors.get("model", tensors)  # litgpt nests its tensors
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise ValueError(f"{path}: not a file of tensors: expected a dict that maps names to tensors")
    with prefix_errors(path):
        layers = read_authors(tensors, gate, length) or read_lit(tensors) or read_peft(tensors)
        if layers is None:
            some = ", ".join(sorted(tensors)[:3]) or "no tensors"
            expected = "; expected an adapter of this project, the authors' code, lit-llama, litgpt or PEFT"
            raise ValueError(f"unknown adapter format; the file contains {some} ...{guess_method(tensors) or expected}")
        adapter = build_adapter(layers, heads)
    if layers.origin == LIT_ORIGIN:
        warn(f"{path}: if litgpt v0.5.5 or later wrote this file, it does not work here; see docs/adapters.md")
    adapter.metadata["imported_from"] = f"{layers.origin}: {path.name}"
    return adapter


def load_own(path: Path) -> Adapter:
    """Load a file of this project as an Adapter, ImageAdapter or HeadAdapter. Raises ValueError if it is invalid."""
    with prefix_errors(path):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                # Checked before the tensors are read, because a sparse file can declare more zeros than fit in memory.
                for name in {"prompts"} & set(file.keys()):
                    shape = file.get_slice(name).get_shape()
                    if len(shape) == 3 and shape[1] > MAX_LENGTH:
                        raise ValueError(TOO_LONG.format(shape[1]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"not a complete safetensors file: {error}") from None
    kinds = {"projection.0.weight": ImageAdapter, "head.0.weight": HeadAdapter}
    kind = next((kinds[name] for name in kinds if name in tensors), Adapter)

    format_and_version = metadata.get("format"), metadata.get("version")
    if format_and_version != ("llama-adapter", "1"):
        hint = "" if "version" in metadata else "; for an adapter of PEFT, give the folder"
        expected = f"expected format 'llama-adapter', version '1'; found {format_and_version}"
        raise ValueError(f"{path}: is not an adapter of this project: {expected}{hint}")
    if not {"prompts", "gates"} <= set(tensors):
        raise ValueError(f"{path}: expected the tensors 'gates' and 'prompts', found {listed(sorted(tensors))}")
    activation = metadata.get("gate_activation")
    if activation not in kind.ACTIVATIONS:
        raise ValueError(f"{path}: gate_activation is {activation!r}; expected one of {listed(kind.ACTIVATIONS)}")
    prompts, gates = tensors["prompts"], tensors["gates"]
    if prompts.dim() != 3 or gates.dim() != 2 or len(prompts) != len(gates) or 0 in (*prompts.shape, *gates.shape):
        found = f"prompts {tuple(prompts.shape)} and gates {tuple(gates.shape)}"
        raise ValueError(f"{path}: expected prompts (L, K, C) and gates (L, H), found {found}")
    for name, size in (("base_dim", prompts.shape[2]), ("base_heads", gates.shape[1])):
        if metadata.get(name) != str(size):
            raise ValueError(
                f"{path}: {name} is {metadata.get(name, 'missing')} in the metadata, but {size} in the tensors"
            )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: expected float32, found {tensor.dtype} in {name}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} contains values that are not finite")
    with prefix_errors(path):
        whole_number("base_layers", metadata.get("base_layers", str(len(gates))), least=len(gates))
        try:
            return kind.from_tensors(tensors, metadata)
        except RuntimeError as error:  # a tensor is missing, unknown, or has the wrong shape
            raise ValueError(" ".join(str(error).split())) from None


# ---------------------------------------------------------------------------------------------------
# Third-party files


class LayerTensors(NamedTuple):
    """Prompts and gates of a third-party file, keyed by the index of the base's layer."""

    origin: str
    prompts: dict[int, Tensor]  # (K, C) each
    gates: dict[int, Tensor]  # H values each, or one for all heads
    gate_activation: str


LIT_ORIGIN = "lit-llama, or litgpt before v0.5.5"

# Names of prompts and gates in third-party files, as regular expressions.
AUTHORS = ("adapter_query.weight", r"layers\.(\d+)\.attention\.gate")
LIT = (r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight", r"transformer\.h\.(\d+)\.attn\.gating_factor")
PEFT = (r".*\.layers\.(\d+)\.self_attn\.adaption_prompt", r".*\.layers\.(\d+)\.self_attn\.adaption_gate")


def refuse_other_tensors(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if a tensor's name matches no pattern in `names`: ignoring the tensor would change the model."""
    rest = sorted(name for name in tensors if not any(re.fullmatch(known, name) for known in names))
    if rest:
        raise ValueError(f"has tensors other than prompts and gates: {rest[0]} ...{guess_method(rest)}")


def guess_method(names: Iterable[str]) -> str:
    """Guess from its tensor names what a file contains. Return a clause that begins with a semicolon, or ""."""
    names = " ".join(names)
    if re.search(r"image_bind|imagebind|prefix_query", names):
        return "; it looks like ImageBind-LLM, which is not supported"
    if re.search(r"\bllama\.|visual_|clip", names):
        return "; it looks like the authors' multimodal LLaMA-Adapter V2, which is not supported"
    if re.search(r"\blora_[AB]\b", names):
        return "; it looks like LoRA, which is not supported"
    if re.search(r"attention\.wq\.weight|self_attn\.q_proj\.weight", names):
        return "; it looks like a base model"
    if re.search(r"bias|scale|norm|lora", names):
        return "; it looks like LLaMA-Adapter V2, which also trains biases, scales and norms, and is not supported"
    return ""


def read_authors(tensors: Mapping[str, Tensor], gate: str | None, length: int) -> LayerTensors | None:
    """Read a file of the authors' release; return None for any other format. Raises ValueError if it is invalid.

    `gate` and `length` are those of `load_adapter`.
    """
    query = tensors.get(AUTHORS[0])
    if query is None:
        return None
    refuse_other_tensors(tensors, AUTHORS)
    with prefix_errors(AUTHORS[0]):
        require_dense(query)
    if query.dim() != 2 or len(query) == 0 or len(query) % length:
        raise ValueError(
            f"{AUTHORS[0]} has shape {tuple(query.shape)}; expected a multiple of {length} rows, that is, "
            f"{length} prompts per layer; for a different number, use convert.py import --length"
        )
    gates = by_layer(tensors, AUTHORS[1])
    layers = len(query) // length
    if len(gates) < layers:
        found = f"has {length} prompts for each of {layers} layers, but gates for only {len(gates)} layers"
        raise ValueError(f"{found}; if the number of prompts per layer is not {length}, use convert.py import --length")
    topmost = sorted(gates)[-layers:]
    prompts, gates = dict(zip(topmost, query.split(length))), {i: gates[i] for i in topmost}
    if gate is None:
        with prefix_errors("gates"):
            gate = "identity" if all(require_dense(gates[i]).numel() == 1 for i in topmost) else "tanh"
    return LayerTensors("the authors' release", prompts, gates, gate)


def read_lit(tensors: Mapping[str, Tensor]) -> LayerTensors | None:
    """Read a file of lit-llama or litgpt; return None for any other format. Raises ValueError if it is invalid."""
    prompts, gates = (by_layer(tensors, pattern) for pattern in LIT)
    if not prompts:
        return None
    refuse_other_tensors(tensors, LIT)
    return LayerTensors(LIT_ORIGIN, prompts, gates, "identity")


def read_peft(tensors: Mapping[str, Tensor]) -> LayerTensors | None:
    """Read a PEFT AdaptionPrompt file; return None for any other format. Raises ValueError if it is invalid."""
    prompts, gates = (by_layer(tensors, pattern) for pattern in PEFT)
    if not prompts:
        return None
    refuse_other_tensors(tensors, PEFT)
    for i, prompt in prompts.items():
        if not isinstance(prompt, Tensor) or prompt.dim() != 3 or len(prompt) != 1:
            raise ValueError(
                f"the adaption prompt of layer {i} has shape {tuple(getattr(prompt, 'shape', ()))}; expected (1, K, C)"
            )
    prompts = {i: prompt[0] for i, prompt in prompts.items()}
    return LayerTensors("PEFT", prompts, gates, "identity")


def by_layer(tensors: Mapping[str, Tensor], pattern: str) -> dict[int, Tensor]:
    """Return the tensors whose names match the pattern, keyed by the layer index in the name."""
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    return {int(match[1]): tensors[name] for name, match in matches.items() if match and match[1] == str(int(match[1]))}


def build_adapter(layers: LayerTensors, heads: int | None) -> Adapter:
    """Build an adapter from a third-party file. `heads` is the base's H, or None if it is unknown.

    The highest layer in the file is taken to be the base's last: `base_layers` is set accordingly in the metadata.
    Raises ValueError if a tensor is invalid, if prompts and gates do not fit each other or the base's number of heads,
    or if each layer has one gate for all heads and `heads` is None.
    """
    _, prompts, gates, activation = layers
    numbers = sorted(prompts)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers != sorted(gates):
        raise ValueError(
            f"has prompts for layers {numbers} and gates for layers {sorted(gates)}; "
            f"expected the same consecutive layers"
        )
    for i in numbers:
        for name, tensor in (("prompts", prompts[i]), ("gates", gates[i])):
            with prefix_errors(f"{name} of layer {i}"):
                if not require_dense(tensor).float().isfinite().all():
                    raise ValueError("contains values that are not finite")
        shape, first = tuple(prompts[i].shape), tuple(prompts[numbers[0]].shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"the prompts of layer {i} have shape {shape}; expected (K, C), both at least 1")
        if shape != first:
            shapes = f"{shape} in layer {i}, but {first} in layer {numbers[0]}"
            raise ValueError(f"the prompts have shape {shapes}; expected the same (K, C) in all layers")
    widths = {gates[i].numel() for i in numbers}
    if widths == {1} and heads is None:
        raise ValueError(
            "has one gate per layer for all heads; give the base's number of heads with convert.py import --heads, "
            "or the base with generate.py --base"
        )
    heads = heads or max(widths)
    if not widths <= {1, heads} or 0 in widths:
        raise ValueError(
            f"the layers have {sorted(widths)} gates; expected one per layer, or one for each of {heads} heads"
        )
    length, dim = prompts[numbers[0]].shape
    if length > MAX_LENGTH:
        raise ValueError(TOO_LONG.format(length))
    adapter = Adapter(layers=len(numbers), length=length, dim=dim, heads=heads, gate_activation=activation)
    with torch.no_grad():
        adapter.prompts.copy_(torch.stack([prompts[i].float() for i in numbers]))
        adapter.gates.copy_(torch.stack([gates[i].float().flatten().expand(heads) for i in numbers]))
    adapter.metadata["base_layers"] = str(numbers[-1] + 1)
    return adapter


def describe_reading(adapter: Adapter) -> str:
    """Return one line that says how a third-party file was interpreted, because the file does not state everything."""
    layers, length, dim = adapter.prompts.shape
    origin, activation = adapter.metadata.get("imported_from", "an adapter of this project"), adapter.gate_activation
    return f"{origin}: read as {layers} layers of {length} prompts of width {dim}, gate activation {activation}"


# ---------------------------------------------------------------------------------------------------
# PEFT folders


def peft_weights(folder: Path) -> Path:
    """Return the path of the weights in a PEFT folder.

    Raises FileNotFoundError or ValueError if the folder does not contain an AdaptionPrompt.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        expected = "adapter.safetensors (this project) nor adapter_config.json (PEFT)"
        raise FileNotFoundError(f"{folder}: contains neither {expected}")
    try:
        kind = read_json_object(config)["peft_type"]
    except (ValueError, KeyError):
        raise ValueError(f"{config}: is not a JSON object with a field peft_type") from None
    if kind != "ADAPTION_PROMPT":
        raise ValueError(f"{config}: peft_type is {kind!r}; expected 'ADAPTION_PROMPT'")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: has neither adapter_model.safetensors nor adapter_model.bin")


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write a folder that PEFT can load; create it if necessary, and replace an adapter that it contains.

    PEFT's format has no projection and no head, and only one gate for all heads of a layer. Raises ValueError if it
    cannot represent the adapter, or if the adapter's metadata does not state the number of layers of the base.
    """
    if type(adapter) is not Adapter:
        extra = "image projection" if isinstance(adapter, ImageAdapter) else "head for an encoder"
        raise ValueError(f"PEFT's AdaptionPrompt has no {extra}, so this adapter cannot be exported")
    gates = adapter.gate_values().detach()  # (L, H); PEFT has no tanh
    for i, row in enumerate(gates):
        if (row != row[0]).any():
            spread = (
                f"the gate values of adapted layer {i}, counted from 0, range from {row.min():.4f} to {row.max():.4f}"
            )
            raise ValueError(
                f"{spread}; PEFT has one gate for all heads of a layer, so this adapter cannot be exported"
            )
    if "base_layers" not in adapter.metadata:
        advice = "add it with Adapter.save(path, base_layers=N)"
        raise ValueError(f"the metadata does not state base_layers, the number of layers of the base; {advice}")
    layers, length = adapter.prompts.shape[:2]
    first = int(adapter.metadata["base_layers"]) - layers
    tensors = {}
    for i in range(layers):
        place = f"base_model.model.model.layers.{first + i}.self_attn"
        tensors[f"{place}.adaption_prompt"] = adapter.prompts[i].detach()[None].clone()  # (1, K, C)
        tensors[f"{place}.adaption_gate"] = gates[i, :1].clone()
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "target_modules": "self_attn",
        "adapter_len": length,
        "adapter_layers": layers,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").unlink(missing_ok=True)  # never leave an old configuration beside new tensors
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config, indent=2)
