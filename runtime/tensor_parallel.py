"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019): each rank has an equal shard of every layer.

A rank has an equal share of the heads and of the feed-forward's hidden units: the rows of wq, wk, wv, w1 and w3 that
compute them, and the columns of wo and w2 that read them. This shard is a narrower layer of the same kind. The outputs
of its attention and of its feed-forward are summed over the ranks, with two all-reduces per layer. Norms, residuals,
embeddings and output head are replicated on every rank.

Adapters need no special treatment: the adaption prompts are projected with the rank's wk and wv, and each rank uses
the gates of its own heads.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed import rank, world_size

SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}  # 0: rows and biases, 1: columns


class Part(NamedTuple):
    """One of `number` equal shards of a tensor along the dimension `dim`; `index` counts from 0."""

    dim: int
    index: int
    number: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.number, self.dim)[self.index]

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole tensor, if its shards have this shape."""
        return tuple(size * self.number if dim == self.dim else size for dim, size in enumerate(shape))


WHOLE = Part(dim=0, index=0, number=1)


def base_of_rank(config, weights: dict) -> tuple:
    """Return this rank's shard of a base: its Config, and the functions that read its weights, as from `read_base`.

    Raises ValueError if the base cannot be split evenly.
    """
    ranks = world_size()
    for name in ("n_kv_heads", "hidden_dim"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"the base's {name}, {getattr(config, name)}, cannot be split evenly over {ranks} processes; "
                f"start a number of processes that divides it"
            )
    shares = {name: getattr(config, name) // ranks for name in ("n_heads", "n_kv_heads", "hidden_dim")}
    parts = dict(weights)
    for name, write in weights.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in SPLIT_DIM:
            parts[name] = partial(write, part=Part(SPLIT_DIM[module], rank(), ranks))
    return replace(config, **shares), parts


def join_ranks(model: nn.Module) -> None:
    """Add hooks that sum the outputs of every attention and feed-forward over the ranks.

    The hooks also select the gates of the rank's own heads from all gates (1|B, H, 1, 1). An all-reduce gives exactly
    the same sum on all ranks, so with the same seed all of them sample the same tokens.
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
