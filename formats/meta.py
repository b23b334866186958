"""Meta's checkpoint layout: params.json and consolidated.00.pth. Larger models have additional .pth files."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from formats.rope import llama3_rope_factors
from formats.tensors import Weights, copy, load_pth, prefix_errors, require_dense
from model import Config
from runtime.files import read_json_object
from runtime.schema import require_number
from runtime.tensor_parallel import WHOLE, Part

PARAMS = "params.json"


def read(folder: Path) -> tuple[Config, Weights]:
    """Read params.json and memory-map the weights. Raises OSError or ValueError.

    If there are n .pth files, each contains one of n slices of every matrix, because Meta's code uses n GPUs.
    """
    params = read_json_object(folder / PARAMS)
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    if [file.name for file in files] != names:
        found = ", ".join(file.name for file in files) or "no weights"
        raise ValueError(f"{folder}: contains {found}; expected {', '.join(names)}")
    shards = [read_shard(file) for file in files]
    for file, shard in zip(files, shards):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{file}: {differing[0]} is missing from this file or from {files[0].name}")

    weights: Weights = {name: partial(join, [shard[name] for shard in shards]) for name in shards[0]}
    for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight"):
        if name not in weights:
            raise ValueError(f"{folder}: has no weight {name}")
    if "output.weight" in weights:  # always split by rows; the size in params.json is often -1
        vocab_size = sum(len(shard["output.weight"]) for shard in shards)
    else:
        vocab_size = len(shards[0]["tok_embeddings.weight"])
        weights["output.weight"] = weights["tok_embeddings.weight"]
    with prefix_errors(folder / PARAMS):
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise ValueError(f"vocab_size is {params['vocab_size']}, but the weights are for {vocab_size} tokens")
        return meta_config(params, vocab_size), weights


def read_shard(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, keyed by name, without `rope.freqs`. Raises FileNotFoundError or ValueError."""
    tensors = load_pth(file)
    tensors.pop("rope.freqs", None)  # in LLaMA 1's files; rope_cos_sin computes the frequencies
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() not in (1, 2):
            raise ValueError(f"{file}: {name} is not a vector or matrix; expected the weights of a LLaMA")
    return tensors


def join(pieces: list[Tensor], target: Tensor, part: Part | None = None) -> None:
    """Join the pieces of a weight, one per file, and copy the weight, or this rank's shard of it, to `target`.

    The dimension along which the files split the weight follows from the shapes. Norms are not split: every file
    contains a copy. Raises ValueError if the pieces do not make up the weight, or are not dense floating-point tensors.
    """
    part = part or WHOLE
    n, shape, whole = len(pieces), tuple(pieces[0].shape), part.whole_shape(target.shape)
    for piece in pieces:
        require_dense(piece)
    if any(piece.shape != pieces[0].shape for piece in pieces):
        raise ValueError(f"has different shapes in the {n} files")
    for dim in range(len(shape) if n > 1 else 0):
        if shape[:dim] + (n * shape[dim],) + shape[dim + 1 :] == whole:
            along, across = (part, WHOLE) if part.dim == dim else (WHOLE, part)
            num_chunks = math.lcm(n, along.number)  # so that each piece and each part consists of whole chunks
            chunks = [chunk for piece in pieces for chunk in piece.chunk(num_chunks // n, dim)]
            per_part = num_chunks // along.number
            for chunk, destination in zip(chunks[along.index * per_part :], target.chunk(per_part, dim)):
                copy(chunk, destination, across)
            return
    if n > 1 and len(shape) > 1:
        raise ValueError(f"has shape {shape} in each of {n} files, but the configuration requires {whole} in total")
    if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
        raise ValueError(f"has different values in the {n} files; expected copies of one vector")
    copy(pieces[0], target, part)


def meta_config(params: dict, vocab_size: int) -> Config:
    """Convert params.json to a Config. Raises KeyError if a field is missing, or ValueError if one is invalid.

    The file does not state the width of the feed-forward network, which Meta's code computes from other fields.
    """
    for name in ("dim", "n_heads", "multiple_of"):
        require_number(name, params[name], 1, 2**24, whole=True)
    dim, n_heads = params["dim"], params["n_heads"]
    multiplier = params.get("ffn_dim_multiplier") or 1
    require_number("ffn_dim_multiplier", multiplier, 1e-3, 1e3)
    hidden_dim = int(multiplier * int(2 * 4 * dim / 3))
    hidden_dim += -hidden_dim % params["multiple_of"]  # round up to a multiple
    theta = params.get("rope_theta", 10000.0)
    factors = None
    # The file does not state the factor. As in the config.json on Hugging Face, it is 32 for Llama 3.2 1B and 3B, and 8
    # for all other models. (Meta's own code has 8 for all.)
    if params.get("use_scaled_rope"):
        factors = llama3_rope_factors(dim // n_heads, theta, factor=32.0 if dim < 4096 else 8.0)
    return Config(
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if params.get("n_kv_heads") is None else params["n_kv_heads"],
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=params["norm_eps"],
        rope_theta=theta,
        rope_factors=factors,
    )
