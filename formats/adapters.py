"""Adapter files, ours and those of others.

The published implementations compute the same attention and differ in their files and in the gate:

- the authors' release: one .pth, `adapter_query.weight` (L*K, C) and a gate per head in every layer. Their training
  code puts tanh around the gate, their published inference code does not. Their first release has one gate for all
  heads, as it is;
- lit-llama and litgpt: one .pth, `adapter_wte` and `gating_factor` per adapted layer, the gate as it is; older files
  have one gate for all heads. A file of litgpt v0.5.5 or later cannot be told from earlier ones, and does not work:
  litgpt projects its prompts with other rows of the layer's weights (docs/adapters.md);
- PEFT's AdaptionPrompt: a folder, one gate a layer, as it is.
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
from runtime.schema import whole_number


MAX_LENGTH = 4096  # K, as train.py allows
TOO_LONG = f"has {{:,}} prompts per layer, the most is {MAX_LENGTH:,}"


def load_adapter(path: str | Path, *, heads: int | None = None, gate: str | None = None, length: int = 10) -> Adapter:
    """An adapter of ours or of anybody, or the folder of a run of ours; what lies at `path` tells whose.

    `heads` is the base's H, needed where a file has one gate for all of them. `gate` and `length` are what the authors'
    files leave unsaid: their activation, by default tanh for a gate per head and the gate as it is for one alone, and
    K. Raises FileNotFoundError or ValueError.
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
        # The formats of torch.save, now and before PyTorch 1.6. The length at the beginning of a safetensors file may
        # look the same, but its header begins with a brace.
        is_pickle = start[:2] in (b"PK", b"\x80\x02") and start[8:] != b"{"
        if not is_pickle:
            return load_own(path)
        tensors = load_pth(path)
        tensors = tensors.get("model", tensors)  # litgpt's are one level down
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise ValueError(f"{path}: not a file of tensors by name")
    with prefix_errors(path):
        layers = read_authors(tensors, gate, length) or read_lit(tensors) or read_peft(tensors)
        if layers is None:
            some = ", ".join(sorted(tensors)[:3])
            raise ValueError(f"an adapter of no kind known; it holds {some} ...{other_method(tensors)}")
        adapter = from_layers(layers, heads)
    if layers.origin == LIT_ORIGIN:
        warn(f"{path}: if this is of litgpt v0.5.5 or later, it does not work here: docs/adapters.md")
    adapter.metadata["imported_from"] = f"{layers.origin}: {path.name}"
    return adapter


def load_own(path: Path) -> Adapter:
    """Load an adapter file of this project. Raises ValueError that says what is wrong with it."""
    with prefix_errors(path):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                for name in {"prompts"} & set(file.keys()):  # not read yet: a sparse file may hold any number of zeros
                    shape = file.get_slice(name).get_shape()
                    if len(shape) == 3 and shape[1] > MAX_LENGTH:
                        raise ValueError(TOO_LONG.format(shape[1]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file: {error}") from None
    kinds = {"projection.0.weight": ImageAdapter, "head.0.weight": HeadAdapter}
    kind = next((kinds[name] for name in kinds if name in tensors), Adapter)

    if (metadata.get("format"), metadata.get("version")) != ("llama-adapter", "1"):
        raise ValueError(f"{path}: is not of the format 'llama-adapter', version '1', but says {metadata}")
    if not {"prompts", "gates"} <= set(tensors):
        raise ValueError(f"{path}: holds {sorted(tensors)}, without the tensors 'gates' and 'prompts'")
    activation = metadata.get("gate_activation")
    if activation not in kind.ACTIVATIONS:
        raise ValueError(f"{path}: gate_activation {activation!r} is none of {list(kind.ACTIVATIONS)}")
    prompts, gates = tensors["prompts"], tensors["gates"]
    if prompts.dim() != 3 or gates.dim() != 2 or len(prompts) != len(gates) or 0 in (*prompts.shape, *gates.shape):
        found = f"prompts {tuple(prompts.shape)} and gates {tuple(gates.shape)}"
        raise ValueError(f"{path}: {found} are not (L, K, C) and (L, H)")
    for name, size in (("base_dim", prompts.shape[2]), ("base_heads", gates.shape[1])):
        if metadata.get(name) != str(size):
            raise ValueError(f"{path}: metadata says {name} {metadata.get(name)}, the tensors say {size}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: expected float32, found {tensor.dtype} in {name}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    with prefix_errors(path):
        whole_number("base_layers", metadata.get("base_layers", str(len(gates))), least=len(gates))
        try:
            return kind.from_tensors(tensors, metadata)
        except RuntimeError as error:  # a tensor that is missing, unknown, or of another shape
            raise ValueError(" ".join(str(error).split())) from None


# ---------------------------------------------------------------------------------------------------
# Files of others


class LayerTensors(NamedTuple):
    """What a file of others has, by layer of the base."""

    origin: str
    prompts: dict[int, Tensor]  # (K, C) each
    gates: dict[int, Tensor]  # H values each, or 1 for all heads
    gate_activation: str


LIT_ORIGIN = "lit-llama, or litgpt before v0.5.5"

# The names of prompts and gates in third-party files.
AUTHORS = ("adapter_query.weight", r"layers\.(\d+)\.attention\.gate")
LIT = (r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight", r"transformer\.h\.(\d+)\.attn\.gating_factor")
PEFT = (r".*\.layers\.(\d+)\.self_attn\.adaption_prompt", r".*\.layers\.(\d+)\.self_attn\.adaption_gate")


def refuse_rest(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise ValueError where there are others: what they do to the model would be lost."""
    rest = sorted(name for name in tensors if not any(re.fullmatch(known, name) for known in names))
    if rest:
        raise ValueError(f"{len(rest)} of its tensors have no place in an adapter: {rest[0]} ...{other_method(rest)}")


def other_method(names: Iterable[str]) -> str:
    """What a file with such names is of, as far as we know."""
    names = " ".join(names)
    if re.search(r"image_bind|imagebind|prefix_query", names):
        return " It is of ImageBind-LLM"
    if re.search(r"\bllama\.|visual_|clip", names):
        return " It is of the authors' multimodal LLaMA-Adapter V2"
    if re.search(r"bias|scale|norm|lora", names):
        return " It is of LLaMA-Adapter V2, which trains biases, scales and norms as well"
    return ""


def read_authors(tensors: Mapping[str, Tensor], gate: str | None, length: int) -> LayerTensors | None:
    """None where the tensors are not by the names of the authors' release. Raises ValueError."""
    query = tensors.get(AUTHORS[0])
    if query is None:
        return None
    refuse_rest(tensors, AUTHORS)
    with prefix_errors(AUTHORS[0]):
        require_dense(query)
    if query.dim() != 2 or len(query) == 0 or len(query) % length:
        raise ValueError(f"{AUTHORS[0]} {tuple(query.shape)} is no whole number of layers of {length} prompts each")
    gates = by_layer(tensors, AUTHORS[1])
    layers = len(query) // length
    if len(gates) < layers:
        raise ValueError(f"has prompts for {layers} layers of {length} each, but gates for {len(gates)}")
    topmost = sorted(gates)[-layers:]
    prompts, gates = dict(zip(topmost, query.split(length))), {i: gates[i] for i in topmost}
    if gate is None:
        gate = "identity" if all(require_dense(gates[i]).numel() == 1 for i in topmost) else "tanh"
    return LayerTensors("the authors' release", prompts, gates, gate)


def read_lit(tensors: Mapping[str, Tensor]) -> LayerTensors | None:
    """None where the tensors are not by lit-llama's names."""
    prompts, gates = (by_layer(tensors, pattern) for pattern in LIT)
    if not prompts:
        return None
    refuse_rest(tensors, LIT)
    return LayerTensors(LIT_ORIGIN, prompts, gates, "identity")


def read_peft(tensors: Mapping[str, Tensor]) -> LayerTensors | None:
    """None where the tensors are not by PEFT's names. Raises ValueError."""
    prompts, gates = (by_layer(tensors, pattern) for pattern in PEFT)
    if not prompts:
        return None
    refuse_rest(tensors, PEFT)
    for i, prompt in prompts.items():
        if not isinstance(prompt, Tensor) or prompt.dim() != 3 or len(prompt) != 1:
            raise ValueError(f"the prompt of layer {i} is {tuple(getattr(prompt, 'shape', ()))}, not (1, K, C)")
    prompts = {i: prompt[0] for i, prompt in prompts.items()}
    return LayerTensors("PEFT", prompts, gates, "identity")


def by_layer(tensors: Mapping[str, Tensor], pattern: str) -> dict[int, Tensor]:
    """Those whose name has the pattern, by the number in it."""
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    return {int(match[1]): tensors[name] for name, match in matches.items() if match and match[1] == str(int(match[1]))}


def from_layers(layers: LayerTensors, heads: int | None) -> Adapter:
    """Raises ValueError where prompts and gates don't fit each other, or the base's number of heads."""
    _, prompts, gates, activation = layers
    numbers = sorted(prompts)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers != sorted(gates):
        raise ValueError(f"has prompts for layers {numbers} and gates for layers {sorted(gates)}")
    for i in numbers:
        try:
            for tensor in (prompts[i], gates[i]):
                require_dense(tensor)
                if not tensor.float().isfinite().all():
                    raise ValueError("holds values that are not finite")
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from None
        if prompts[i].dim() != 2 or 0 in prompts[i].shape or prompts[i].shape != prompts[numbers[0]].shape:
            shapes = f"{tuple(prompts[i].shape)} in layer {i}, {tuple(prompts[numbers[0]].shape)} in layer {numbers[0]}"
            raise ValueError(f"prompts are {shapes}, not (K, C) in all")
    widths = {gates[i].numel() for i in numbers}
    if widths == {1} and heads is None:
        raise ValueError("has one gate for all heads; how many has the base? say --heads, or --base to generate.py")
    heads = heads or max(widths)
    if not widths <= {1, heads} or 0 in widths:
        raise ValueError(f"layers have {sorted(widths)} gates, the base has {heads} heads")
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
    """In a line, how a file of others was understood: what it leaves unsaid may be wrong."""
    layers, length, dim = adapter.prompts.shape
    origin = adapter.metadata.get("imported_from", "an adapter of ours")
    return f"{origin}: read as {layers} layers of {length} prompts of width {dim}, gates with {adapter.gate_activation}"


# ---------------------------------------------------------------------------------------------------
# PEFT's folder


def peft_weights(folder: Path) -> Path:
    """The file of tensors. Raises FileNotFoundError or ValueError where the folder is not of an AdaptionPrompt."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file, so {folder} is no adapter of PEFT's")
    try:
        kind = read_json_object(config)["peft_type"]
    except (ValueError, KeyError):
        raise ValueError(f"{config}: not JSON with a peft_type") from None
    if kind != "ADAPTION_PROMPT":
        raise ValueError(f"{config}: peft_type is {kind!r}, not 'ADAPTION_PROMPT'")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: has neither adapter_model.safetensors nor adapter_model.bin")


def write_peft(adapter: Adapter, folder: Path) -> None:
    """A folder that PEFT loads. Raises ValueError at what it has no place for: a projection or a head, gates of a layer
    that differ."""
    if type(adapter) is not Adapter:
        half = "projection of images" if isinstance(adapter, ImageAdapter) else "head of an encoder"
        raise ValueError(f"PEFT's AdaptionPrompt has no {half}, and without it the adapter would be another")
    gates = adapter.gate_values().detach()  # (L, H); PEFT has no tanh
    for i, row in enumerate(gates):
        if (row != row[0]).any():
            spread = f"the gates of adapted layer {i + 1} are from {row.min():.4f} to {row.max():.4f}"
            raise ValueError(
                f"{spread}; PEFT has one gate for all heads of a layer, so nothing there would be the same"
            )
    if "base_layers" not in adapter.metadata:
        raise ValueError("the adapter's file does not say how many layers its base has")
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
    (folder / "adapter_config.json").unlink(missing_ok=True)  # of an earlier call: the two files belong together
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config, indent=2)
