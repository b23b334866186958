"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019): of every layer each rank has an equal part.

A rank has some of the heads and some of the feed-forward's hidden units, with the rows of wq, wk, wv, w1 and w3 that
make them, and the columns of wo and w2 that read them. That is a narrower layer of the same kind, whose attention and
feed-forward come out as one term each of a sum over the ranks: two all-reduces a layer. What is added between, norms
and residuals, is whole on every rank, and so are embeddings and output head.

An adapter goes along: its prompts are projected by the rank's wk and wv, its gates are those of the rank's heads.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed import rank, world_size

CUT_ALONG = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}  # 0: rows, biases too; 1: columns


class Part(NamedTuple):
    """One of so many equal parts along a dimension."""

    dim: int
    index: int
    number: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.number, self.dim)[self.index]

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what has parts of that shape."""
        return tuple(size * self.number if dim == self.dim else size for dim, size in enumerate(shape))


WHOLE = Part(dim=0, index=0, number=1)


def base_of_rank(config, weights: dict) -> tuple:
    """The part that this rank has of a base: the shape of a LLaMA, and how to fill each weight, as of `read_base`.

    Raises ValueError where the ranks cannot share evenly.
    """
    ranks = world_size()
    for name in ("n_kv_heads", "hidden_dim"):
        if getattr(config, name) % ranks:
            raise ValueError(f"{ranks} processes cannot share the base's {name} {getattr(config, name)} evenly")
    shares = {name: getattr(config, name) // ranks for name in ("n_heads", "n_kv_heads", "hidden_dim")}
    parts = dict(weights)
    for name, write in weights.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in CUT_ALONG:
            parts[name] = partial(write, part=Part(CUT_ALONG[module], rank(), ranks))
    return replace(config, **shares), parts


def join_ranks(model: nn.Module) -> None:
    """Let every layer's attention and feed-forward, each a term on every rank, end with their sum.

    The attention is given the gates of its heads, of those (1|B, H, 1, 1) of all. An all-reduce leaves the same sum, to
    the last bit, on all ranks: with the same seed all go on with the same tokens.
    """
    if world_size() > 1:
        for block in model.layers:
            block.attention.register_forward_pre_hook(take_gates)
            for module in (block.attention, block.feed_forward):
                module.register_forward_hook(all_reduce_output)


def take_gates(attention: nn.Module, inputs: tuple) -> tuple:
    x, positions, adaption_prompt, cache = inputs
    if adaption_prompt is not None:
        adaption_prompt = adaption_prompt._replace(gate=Part(1, rank(), world_size()).of(adaption_prompt.gate))
    return x, positions, adaption_prompt, cache


def all_reduce_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output
