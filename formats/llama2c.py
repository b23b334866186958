"""llama2.c's float32 .bin files: a header of integers, then tensors in a fixed order, stacked over the layers."""

import struct
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from formats.tensors import Weights, copy
from model import Config
from runtime.files import require_file


def read(path: Path) -> tuple[Config, Weights]:
    """Read the header, and memory-map the weights, of a file or of the only .bin file in a folder.

    Raises OSError, or ValueError if the header is invalid, if the size of the file does not match the header, or if the
    folder contains several .bin files.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.bin"))
    if len(files) > 1:
        raise ValueError(
            f"{path}: contains {len(files)} .bin files ({files[0].name} ...); give the path of one of them"
        )
    file = require_file(files[0])
    size = file.stat().st_size
    with open(file, "rb") as opened:
        raw = opened.read(256)
    modern = raw[:4] == b"24ka"  # "ak42", little-endian
    start = 256 if modern else 28  # offset of the first tensor
    if size < start:
        raise ValueError(f"{file}: has only {size} bytes; a llama2.c checkpoint begins with a header of {start} bytes")
    version = struct.unpack("<i", raw[4:8])[0]
    if modern and version != 1:
        raise ValueError(
            f"{file}: has llama2.c version {version}; only version 1 (float32) and the older layout are supported"
        )
    header = struct.unpack("<7i", raw[8:36] if modern else raw[:28])
    C, hidden, N, H, Hkv, V, max_seq_len = header
    tied = bool(raw[36]) if modern else V > 0
    try:
        config = Config(C, N, H, Hkv, C // H, hidden, abs(V), max_seq_len=max_seq_len)
        if C % H:
            raise ValueError(f"the width {C} is not a multiple of the number of heads, {H}")
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: not a llama2.c checkpoint (its header is {header}: {error})") from None
    shapes = layout(config, modern, tied)
    expected = start + 4 * sum(map(prod, shapes.values()))
    if size != expected:
        raise ValueError(f"{file}: has {size:,} bytes, but its header requires {expected:,}")

    floats = np.memmap(file, dtype="<f4", mode="c", offset=start)  # copy on write; the file is not changed
    weights: Weights = {}
    for name, shape in shapes.items():
        values, floats = floats[: prod(shape)], floats[prod(shape) :]
        tensor = torch.from_numpy(values).view(shape)
        if name.startswith("layers."):
            _, module = name.split(".", 1)
            weights |= {f"layers.{i}.{module}.weight": partial(copy, tensor[i]) for i in range(config.n_layers)}
        elif not name.startswith("rope."):
            weights[f"{name}.weight"] = partial(copy, tensor)
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def layout(config: Config, modern: bool, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, keyed by name, in the order of the file.

    `modern` is True for version 1, which begins with a magic number. A file with a tied head has no `output`.
    """
    C, N, D, hidden, V = config.dim, config.n_layers, config.head_dim, config.hidden_dim, config.vocab_size
    kv = config.n_kv_heads * D
    attention_norm, ffn_norm = {"layers.attention_norm": (N, C)}, {"layers.ffn_norm": (N, C)}
    attention = {"wq": (N, C, C), "wk": (N, kv, C), "wv": (N, kv, C), "wo": (N, C, C)}
    attention = {f"layers.attention.{name}": shape for name, shape in attention.items()}
    mlp = {"w1": (N, hidden, C), "w2": (N, C, hidden), "w3": (N, hidden, C)}
    mlp = {f"layers.feed_forward.{name}": shape for name, shape in mlp.items()}
    embeddings, norm = {"tok_embeddings": (V, C)}, {"norm": (C,)}
    if modern:
        shapes = attention_norm | ffn_norm | norm | embeddings | attention | mlp
    else:
        tables = {"rope.cos": (config.max_seq_len, D // 2), "rope.sin": (config.max_seq_len, D // 2)}
        shapes = embeddings | attention_norm | attention | ffn_norm | mlp | norm | tables
    return shapes if tied else shapes | {"output": (V, C)}
