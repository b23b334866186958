"""A frozen LLaMA and its tokenizer, from any supported file layout."""

import os
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapter import gated_attention
from data import Tokenizer
from formats.tensors import Weights, check_layers, download_hint, frozen_parameter, prefix_errors
from formats.tokenizers import load_tokenizer
from model import Config, LLaMA
from runtime.compilation import transpose_output_head
from runtime.files import hash_tensors, read_json_object

# For each layout, the module that reads it, imported on use, and glob patterns of the files that identify it. The first
# layout that matches a folder is used. The module's `read(path)` returns a Config, and for each weight a function that
# copies it into a tensor.
FORMATS = {
    "formats.meta": ("consolidated.*.pth",),  # not params.json, which Mistral's folders contain as well
    "formats.hugging_face": ("config.json", "*.safetensors*", "pytorch_model*"),
    "formats.llama2c": ("*.bin",),
    "formats.gguf": ("*.gguf",),
}


def load_llama(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
    prepare_layer: Callable[[nn.Module], None] | None = None,
    keep_blocks: bool = False,
) -> tuple[LLaMA, Tokenizer]:
    """Load a frozen LLaMA and its tokenizer from `path`:

    - a folder in Meta's layout: params.json, consolidated.*.pth (one or several), tokenizer.model;
    - a folder in Hugging Face's layout: config.json, model*.safetensors or pytorch_model*.bin, and tokenizer.json or
      tokenizer.model;
    - a llama2.c .bin of either float32 layout with tokenizer.model beside it, or its folder;
    - a .gguf file, which includes the tokenizer, or its folder.

    `prepare_layer` and `keep_blocks` are passed to `load_model`. Raises FileNotFoundError or ValueError, with a
    one-line message that names the file.
    """
    path = Path(path)
    config, weights = read_base(path)
    tokenizer = load_tokenizer(path, config.vocab_size)
    return load_model(path, config, weights, dtype, device, attention, prepare_layer, keep_blocks), tokenizer


def read_base(path: Path) -> tuple[Config, Weights]:
    """Read the headers of a base. Return its Config, and for each weight a function that copies it into a tensor.

    Raises OSError, or ValueError if the base is invalid or not supported.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such base model{download_hint(path)}")
    if path.is_file():
        from formats.gguf import is_gguf

        module = "formats.gguf" if is_gguf(path) else "formats.llama2c"  # llama2.c's older layout has no magic number
    else:
        found = (name for name, patterns in FORMATS.items() if any(any(path.glob(each)) for each in patterns))
        module = next(found, "formats.meta" if (path / "params.json").is_file() else None)
    if path.is_file() and is_adapter(path):
        raise ValueError(f"{path}: is an adapter, not a base; give it to --adapter or --init")
    if path.is_file() and (path.suffix in (".safetensors", ".pth", ".json") or zipfile.is_zipfile(path)):
        advice = f"give the folder of the base, {path.parent}, or use --adapter if it is an adapter"
        raise ValueError(f"{path}: this file alone is not a base model; {advice}")
    if module is None and (path / "adapter_config.json").is_file():
        kind = read_json_object(path / "adapter_config.json").get("peft_type", "PEFT")
        raise ValueError(f"{path}: is an adapter ({kind}), not a base")
    if module is None:
        files = ", nor ".join(patterns[0] for patterns in FORMATS.values())
        raise ValueError(f"{path}: contains neither {files}")
    config, weights = import_module(module).read(path)
    check_layers(path, weights, "layers.", config.n_layers)
    return config, weights


def is_adapter(path: Path) -> bool:
    """Return True if the file is an adapter in this project's format."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == "llama-adapter"
    except SafetensorError:
        return False


def load_model(
    path: Path,
    config: Config,
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
    prepare_layer: Callable[[nn.Module], None] | None = None,
    keep_blocks: bool = False,
) -> LLaMA:
    """Build a frozen LLaMA, one layer after another, from the Config and weights that `read_base` returned.

    `prepare_layer` is called on every layer after its weights are loaded, to quantize or shard it before the next layer
    is allocated. With `keep_blocks`, matrices within the layers stay quantized if a GGUF file stores them as Q8_0, Q4_0
    or Q4_1. `path` is used only in messages. Raises ValueError, naming the weight, if a weight is missing or unknown,
    has the wrong shape, or is not finite.
    """
    with torch.device("meta"):  # shapes without memory
        model = LLaMA(config, attention)
    expected = {name for name, _ in model.named_parameters()}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"{path}: has no weight {missing[0]}")
    if unknown := sorted(weights.keys() - expected):
        raise ValueError(f"{path}: has the weight {unknown[0]}, but its configuration describes a model without it")
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        transpose_output_head(model.output)  # the loaded parameter keeps these strides

    parts = ["tok_embeddings", *(f"layers.{i}" for i in range(config.n_layers)), "norm", "output"]
    for part in parts:
        if part == "output" and weights["output.weight"] is weights["tok_embeddings.weight"]:  # a tied head
            model.output.weight = model.tok_embeddings.weight
            break
        for name, parameter in list(model.get_submodule(part).named_parameters(part)):
            module, _, attribute = name.rpartition(".")
            if keep_blocks and part.startswith("layers.") and hasattr(weights[name], "quantized"):
                with prefix_errors(f"{path}: {name}", separator=" "):
                    layer = weights[name].quantized(parameter.shape)
                if layer is not None:
                    model.set_submodule(module, layer.to(device))
                    continue
            value = frozen_parameter(parameter, weights[name], f"{path}: {name}", dtype, device)
            setattr(model.get_submodule(module), attribute, value)
        if part.startswith("layers.") and prepare_layer is not None:
            prepare_layer(model.get_submodule(part))
    return model


def base_fingerprint(config: Config, weights: Weights) -> str:
    """Return a hash of the first four rows of four weights, rounded to bfloat16: a bfloat16 copy has the same hash."""
    C, V = config.dim, config.vocab_size
    shapes = {
        "tok_embeddings": (V, C),
        "layers.0.attention.wq": (config.n_heads * config.head_dim, C),
        f"layers.{config.n_layers - 1}.feed_forward.w2": (C, config.hidden_dim),
        "output": (V, C),
    }
    rows = []
    for name, shape in shapes.items():
        if name == "output" and weights["output.weight"] is weights["tok_embeddings.weight"]:  # a tied head
            rows.append(rows[0])
            continue
        weight = torch.empty(shape, dtype=torch.bfloat16)
        weights[f"{name}.weight"](weight)
        rows.append(weight[:4])
    return hash_tensors(rows)
