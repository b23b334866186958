"""Prompts made by a small network, a variant beside the method (arXiv 2502.03029, "non-linear prompts").

    P = W2 relu(W1 e + b1) + b2         e (L, E) learnt, one embedding a layer; the MLP is shared by all layers

P is as large as the plain prompts are, and used in the same way. Where an adapter is saved it is evaluated, once and
for all: the file holds P, and whoever loads it knows of no network. PyTorch calls this a parametrization.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapter import Adapter

WIDTH = 64  # E, and of the hidden layer


class PromptMLP(nn.Module):
    """From embeddings (L, E) to prompts (L, K, C)."""

    def __init__(self, length: int, dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.length, width = length, min(WIDTH, length * dim)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, length * dim))
        for linear in (self.mlp[0], self.mlp[2]):
            bound = linear.in_features**-0.5  # as PyTorch does it, but from the generator
            for parameter in (linear.weight, linear.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.mlp(embeddings).unflatten(1, (self.length, -1))  # (L, K, C)

    def right_inverse(self, prompts: Tensor) -> Tensor:
        """What is learnt in place of prompts (L, K, C): embeddings (L, E), at first as random as the prompts were."""
        return prompts.flatten(1)[:, : self.mlp[0].in_features].clone()


def make_prompts_by_mlp(adapter: Adapter, generator: torch.Generator | None = None) -> None:
    """From now on the adapter's prompts are what a network makes; they start with a standard deviation of 1."""
    _, K, C = adapter.prompts.shape
    network = PromptMLP(K, C, generator).to(adapter.prompts.device)
    parametrize.register_parametrization(adapter, "prompts", network)
    with torch.no_grad():
        scale = adapter.prompts.std()
        network.mlp[2].weight /= scale
        network.mlp[2].bias /= scale


def with_plain_prompts(adapter: Adapter) -> Adapter:
    """The same adapter, its prompts as they are now; itself, where no network makes them."""
    if not parametrize.is_parametrized(adapter, "prompts"):
        return adapter
    plain = copy.deepcopy(adapter)
    plain.__class__ = parametrize.type_before_parametrizations(adapter)  # remove_parametrizations would change both
    del plain.parametrizations
    plain.prompts = nn.Parameter(adapter.prompts.detach().clone())
    return plain
