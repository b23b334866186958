"""A frozen LLaMA and its tokenizer, out of whatever layout they come in.

Every reader returns a Config and, under Meta's names, a function for each weight that fetches it. So one
tensor at a time is in memory beside the model that is being filled.
"""

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adapter import gated_attention
from data import Tokenizer
from model import Config, LLaMA

Weights = dict[str, Callable[[], Tensor]]


def load_llama(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
) -> tuple[LLaMA, Tokenizer]:
    """A frozen LLaMA and its tokenizer. What lies at `path` says how to read it:

    - a folder in Meta's layout: params.json, consolidated.00.pth, tokenizer.model;
    - a llama2.c .bin of either float32 layout with tokenizer.model beside it, or the folder of one.

    Raises FileNotFoundError or ValueError, in one line that names the file and both numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such base model")
    if path.is_dir() and not (path / "params.json").exists():
        found = sorted(path.glob("*.bin"))
        if len(found) != 1:
            raise ValueError(f"{path}: holds neither params.json nor one llama2.c .bin (but {len(found)} of them)")
        path = found[0]
    config, weights = read_meta(path) if path.is_dir() else read_llama2c(path)
    tokenizer = Tokenizer((path if path.is_dir() else path.parent) / "tokenizer.model")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: {config.vocab_size} embeddings, but its tokenizer has {tokenizer.vocab_size} tokens")

    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != config.n_layers:
        raise ValueError(f"{path}: has weights of {len(layers)} layers, its configuration says {config.n_layers}")
    with torch.device("meta"):  # names and shapes without memory
        model = LLaMA(config, attention)
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"{path}: has no weight {missing[0]}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{path}: has a weight {unknown[0]} that a LLaMA does not have")
    filled: dict[str, nn.Parameter] = {}
    for name, parameter in expected.items():
        if name == "output.weight" and weights[name] is weights["tok_embeddings.weight"]:  # a tied head
            filled[name] = filled["tok_embeddings.weight"]
            continue
        tensor = weights[name]()
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is no dense tensor of floating-point numbers")
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, its configuration says {tuple(parameter.shape)}"
            raise ValueError(f"{path}: {name} is {shapes}")
        filled[name] = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
    model.load_state_dict(filled, assign=True)
    return model.requires_grad_(False), tokenizer


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: is a {type(values).__name__}, not an object")
    return values


def meta_config(params: dict, vocab_size: int) -> Config:
    """Of Meta's params.json, which leaves the feed-forward's width to a formula. Raises KeyError or ValueError."""
    dim, n_heads, multiple_of = params["dim"], params["n_heads"], params["multiple_of"]
    multiplier = params.get("ffn_dim_multiplier") or 1
    try:
        hidden_dim = int(multiplier * int(2 * 4 * dim / 3))
        hidden_dim += -hidden_dim % multiple_of  # up to the next multiple
        head_dim = dim // n_heads
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"dim, n_heads, multiple_of and ffn_dim_multiplier make no model: {error}") from None
    return Config(
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if params.get("n_kv_heads") is None else params["n_kv_heads"],
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
    )


def read_meta(folder: Path) -> tuple[Config, Weights]:
    """Meta's layout, with one file of weights."""
    file = folder / "params.json"
    params = read_json(file)
    if params.get("use_scaled_rope"):
        raise ValueError(f"{file}: use_scaled_rope is not supported yet")
    shards = sorted(folder.glob("consolidated.*.pth"))
    if len(shards) != 1:
        raise ValueError(f"{folder}: has {len(shards)} files consolidated.*.pth, only 1 is supported so far")
    try:
        weights = torch.load(shards[0], map_location="cpu", mmap=True, weights_only=True)
        weights.pop("rope.freqs", None)  # LLaMA 1 carries the table that rope_angles computes
        vocab_size = len(weights["tok_embeddings.weight"])  # params.json often says -1
    except Exception as error:  # torch.load raises whatever a broken file makes it meet
        raise ValueError(f"{shards[0]}: not a checkpoint of LLaMA weights: {str(error).splitlines()[0]}") from None
    try:
        config = meta_config(params, vocab_size)
    except KeyError as error:
        raise ValueError(f"{file}: has no field {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config, {name: partial(weights.__getitem__, name) for name in weights}


def read_llama2c(file: Path) -> tuple[Config, Weights]:
    """llama2.c's float32 .bin: a header of integers, then every tensor in a fixed order, layers stacked."""
    size = file.stat().st_size
    raw = np.memmap(file, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    modern = raw[:4].tobytes() == b"24ka"  # "ak42", little-endian
    if size < (256 if modern else 28):
        raise ValueError(f"{file}: {size} bytes are not a llama2.c checkpoint")
    version = struct.unpack("<i", raw[4:8].tobytes())[0]
    if modern and version != 1:
        raise ValueError(f"{file}: llama2.c version {version}, only 1 (float32) and the older layout are supported")
    header = struct.unpack("<7i", raw[8:36].tobytes() if modern else raw[:28].tobytes())
    C, hidden, N, H, Hkv, V, max_seq_len = header
    tied = bool(raw[36]) if modern else V > 0
    V = abs(V)
    try:
        D = C // H
        config = Config(C, N, H, Hkv, D, hidden, V, max_seq_len=max_seq_len)
        if C % H or max_seq_len < 1:
            raise ValueError(f"width {C}, {H} heads, context {max_seq_len}")
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: not a llama2.c checkpoint (its header reads {header}: {error})") from None

    # Where each tensor lies.
    norms = {"attention_norm": (N, C), "ffn_norm": (N, C)}
    attention = {"wq": (N, C, C), "wk": (N, Hkv * D, C), "wv": (N, Hkv * D, C), "wo": (N, C, C)}
    mlp = {"w1": (N, hidden, C), "w2": (N, C, hidden), "w3": (N, hidden, C)}
    embeddings, norm = {"tok_embeddings": (V, C)}, {"norm": (C,)}
    if modern:
        shapes = norms | norm | embeddings | attention | mlp
    else:
        tables = {"cos": (max_seq_len, D // 2), "sin": (max_seq_len, D // 2)}
        first, last = ({name: norms[name]} for name in norms)
        shapes = embeddings | first | attention | last | mlp | norm | tables
    if not tied:
        shapes |= {"output": (V, C)}

    start, places = 256 if modern else 28, {}
    for name, shape in shapes.items():
        places[name] = start
        start += 4 * int(np.prod(shape, dtype=object))
    if size != start:
        raise ValueError(f"{file}: {size} bytes, but its header asks for {start}")
    floats = {  # read-only views of the file
        name: raw[place : place + 4 * int(np.prod(shapes[name]))].view("<f4").reshape(shapes[name])
        for name, place in places.items()
    }

    def fetch(name: str, layer: int | slice = slice(None)) -> Tensor:
        return torch.from_numpy(np.array(floats[name][layer]))

    weights = {f"{name}.weight": partial(fetch, name) for name in ("tok_embeddings", "norm")}
    weights["output.weight"] = weights["tok_embeddings.weight"] if tied else partial(fetch, "output")
    for i in range(N):
        weights |= {f"layers.{i}.{name}.weight": partial(fetch, name, i) for name in norms}
        weights |= {f"layers.{i}.attention.{name}.weight": partial(fetch, name, i) for name in attention}
        weights |= {f"layers.{i}.feed_forward.{name}.weight": partial(fetch, name, i) for name in mlp}
    return config, weights
