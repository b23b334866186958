"""Meta's layout of a LLaMA: params.json, consolidated.00.pth and, of larger models, further ones."""

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
    """Each of n files has a part of every weight, as the model ran on n GPUs. Raises OSError or ValueError."""
    params = read_json_object(folder / PARAMS)
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    if [file.name for file in files] != names:
        found = ", ".join(file.name for file in files) or "no weights"
        raise ValueError(f"{folder}: has {found}, not {', '.join(names)}")
    shards = [read_shard(file) for file in files]
    for file, shard in zip(files, shards):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{file}: {differing[0]} is in only one of it and {files[0].name}")

    weights: Weights = {name: partial(join, [shard[name] for shard in shards]) for name in shards[0]}
    for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight"):
        if name not in weights:
            raise ValueError(f"{folder}: has no weight {name}")
    if "output.weight" in weights:  # always split by rows; params.json often says -1
        vocab_size = sum(len(shard["output.weight"]) for shard in shards)
    else:
        vocab_size = len(shards[0]["tok_embeddings.weight"])
        weights["output.weight"] = weights["tok_embeddings.weight"]
    with prefix_errors(folder / PARAMS):
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise ValueError(f"vocab_size is {params['vocab_size']}, but the weights have {vocab_size} tokens")
        return meta_config(params, vocab_size), weights


def read_shard(file: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file and not yet read."""
    tensors = load_pth(file)
    tensors.pop("rope.freqs", None)  # LLaMA 1 carries the table that rope_cos_sin computes
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() not in (1, 2):
            raise ValueError(f"{file}: {name} is no vector or matrix")
    return tensors


def join(pieces: list[Tensor], target: Tensor, part: Part | None = None) -> None:
    """Copy a weight's pieces, equal cuts along one dimension, to where they belong; a norm is whole in each file.

    Of a `part` of the weight. Raises ValueError where they do not make up the weight.
    """
    part = part or WHOLE
    n, shape, whole = len(pieces), tuple(pieces[0].shape), part.whole_shape(target.shape)
    for piece in pieces:
        require_dense(piece)
    if any(piece.shape != pieces[0].shape for piece in pieces):
        raise ValueError(f"has different shapes in the {n} files")
    for dim in range(len(shape) if n > 1 else 0):
        if shape[:dim] + (n * shape[dim],) + shape[dim + 1 :] == whole:
            ours, across = (part, WHOLE) if part.dim == dim else (WHOLE, part)
            fine = math.lcm(n, ours.number)  # neither a piece nor a part ends within one of so many
            of_pieces = [one for piece in pieces for one in piece.chunk(fine // n, dim)]
            each = fine // ours.number
            for one, place in zip(of_pieces[ours.index * each :], target.chunk(each, dim)):
                copy(one, place, across)
            return
    if n > 1 and len(shape) > 1:
        raise ValueError(f"is {shape} in each of {n} files, its configuration says {whole} in all")
    if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
        raise ValueError(f"is not the same in the {n} files")
    copy(pieces[0], target, part)


def meta_config(params: dict, vocab_size: int) -> Config:
    """Of params.json, which leaves the feed-forward's width to a formula. Raises KeyError or ValueError."""
    for name in ("dim", "n_heads", "multiple_of"):
        require_number(name, params[name], 1, 2**24, whole=True)
    dim, n_heads = params["dim"], params["n_heads"]
    multiplier = params.get("ffn_dim_multiplier") or 1
    require_number("ffn_dim_multiplier", multiplier, 1e-3, 1e3)
    hidden_dim = int(multiplier * int(2 * 4 * dim / 3))
    hidden_dim += -hidden_dim % params["multiple_of"]  # up to the next multiple
    theta = params.get("rope_theta", 10000.0)
    factors = None
    if params.get("use_scaled_rope"):  # params.json leaves the factor to Meta's code: 8 in 3.1, 32 in 3.2's 1B and 3B
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
