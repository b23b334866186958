"""A frozen LLaMA and its tokenizer, out of whatever layout they come in."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import gated_attention
from data import Tokenizer
from formats import hugging_face, llama2c, meta
from formats.tensors import Weights, check_layers, download_hint, filled
from formats.tokenizers import load_tokenizer
from model import Config, LLaMA
from runtime.compilation import transpose_output_head
from runtime.fingerprints import hash_tensors

# Each is a file of this folder: TOLD_BY names what it is known by, `matches(path)` whether that is there, and
# `read(path)` returns a Config and how to fill each weight. The first that matches reads; llama2c takes any file.
FORMATS = (meta, hugging_face, llama2c)


def load_llama(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
    shard: Callable[[nn.Module], None] | None = None,
    opened: tuple[Config, Weights] | None = None,
    quantize: Callable[[nn.Module], None] | None = None,
) -> tuple[LLaMA, Tokenizer]:
    """A frozen LLaMA and its tokenizer. What lies at `path` says how to read it:

    - a folder in Meta's layout: params.json, consolidated.*.pth (one or several), tokenizer.model;
    - a folder in Hugging Face's: config.json, model*.safetensors or pytorch_model*.bin, tokenizer.model;
    - a llama2.c .bin of either float32 layout with tokenizer.model beside it, or the folder of one.

    `quantize` and `shard` are called on every layer once it is filled, before the next has any memory; `shard` on the
    model at the end, too.
    `opened` is what `read_base` said of the path, where it has been asked before.
    Raises FileNotFoundError or ValueError, in one line that names the file and both numbers.
    """
    path = Path(path)
    config, weights = opened or read_base(path)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: {config.vocab_size} embeddings, but its tokenizer has {tokenizer.vocab_size} tokens")
    model = empty_llama(path, config, weights, attention)
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        transpose_output_head(model.output)  # its shape and strides, which it keeps when it is filled

    def fill(part: str) -> None:
        for name, parameter in list(model.get_submodule(part).named_parameters(part)):
            module, _, attribute = name.rpartition(".")
            value = filled(parameter, weights[name], f"{path}: {name}", dtype, device)
            setattr(model.get_submodule(module), attribute, value)

    fill("tok_embeddings")
    for i, block in enumerate(model.layers):
        fill(f"layers.{i}")
        if quantize is not None:
            quantize(block)
        if shard is not None:
            shard(block)
    fill("norm")
    if weights["output.weight"] is weights["tok_embeddings.weight"]:  # a tied head
        model.output.weight = model.tok_embeddings.weight
    else:
        fill("output")
    if shard is not None:
        shard(model)
    return model, tokenizer


def empty_llama(path: Path, config: Config, weights: Weights, attention: Callable[..., Tensor]) -> LLaMA:
    """Shapes without memory. Raises ValueError where the file's weights are not those of such a model, by name."""
    with torch.device("meta"):
        model = LLaMA(config, attention)
    expected = {name for name, _ in model.named_parameters()}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"{path}: has no weight {missing[0]}")
    if unknown := sorted(weights.keys() - expected):
        raise ValueError(f"{path}: has a weight {unknown[0]} that a LLaMA does not have")
    return model


def read_base(path: Path) -> tuple[Config, Weights]:
    """What lies at `path`, as of `load_llama`, with nothing read but headers."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such base model{download_hint(path)}")
    base_format = next((each for each in FORMATS if each.matches(path)), None)
    if path.suffix == ".gguf" or (base_format is None and any(path.glob("*.gguf"))):
        cure = "give the folder of the model that it was made of: config.json, safetensors, tokenizer"
        raise ValueError(f"{path}: GGUF is llama.cpp's format, quantised for it; {cure}")
    if path.is_file() and (path.suffix in (".safetensors", ".pth", ".json") or zipfile.is_zipfile(path)):
        raise ValueError(f"{path}: is a part of a base model; give its folder, {path.parent}")
    if base_format is None:
        raise ValueError(f"{path}: holds neither {', nor '.join(each.TOLD_BY for each in FORMATS)}")
    config, weights = base_format.read(path)
    check_layers(path, weights, "layers.", config.n_layers)
    return config, weights


def base_fingerprint(config: Config, weights: Weights) -> str:
    """A hash of the first four rows of some weights, of `read_base`: whatever becomes of them in memory."""
    C, V = config.dim, config.vocab_size
    shapes = {
        "tok_embeddings": (V, C),
        "layers.0.attention.wq": (config.n_heads * config.head_dim, C),
        f"layers.{config.n_layers - 1}.feed_forward.w2": (C, config.hidden_dim),
        "output": (V, C),
    }
    rows = []
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        weights[f"{name}.weight"](weight)
        rows.append(weight[:4])
    return hash_tensors(rows)
