"""What the encoders are made of: layers that look in both directions, and take prompts as LLaMA's do.

In the topmost layers every token sees all prompts. Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import Prompt, attend


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def check_shape(config, names: Sequence[str]) -> None:
    """Raise ValueError where the numbers of a configuration make no model."""
    if not isinstance(config.norm_eps, float):
        raise ValueError(f"norm_eps {config.norm_eps!r} is not a number")
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value < 2**20:
            raise ValueError(f"{name} is {value!r}, not a whole number that an encoder could have")
    if config.dim % config.n_heads:
        raise ValueError(f"{config.n_heads} heads do not share a width of {config.dim} evenly")
    if str(config.activation) not in ACTIVATIONS:
        raise ValueError(f"activation {config.activation!r} is none of {list(ACTIVATIONS)}")


class SelfAttention(nn.Module):
    """Of all tokens to all, with biases."""

    def __init__(self, dim: int, n_heads: int, gated: Callable[..., Tensor]):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.gated = gated

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x: Tensor, prompt: Prompt | None, mask: Tensor | None) -> Tensor:  # (B, T, C)
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))  # (B, H, T, D)
        if prompt is None:
            output = attend(q, k, v, mask)
        else:
            prompt_k, prompt_v = self.heads(self.wk(prompt.tokens)), self.heads(self.wv(prompt.tokens))
            output = self.gated(q, k, v, prompt_k, prompt_v, prompt.gate, mask)
        return self.wo(output.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Norms come before what they feed (ViT), or after it and what it is added to (RoBERTa)."""

    def __init__(self, config, norm_first: bool, gated: Callable[..., Tensor]):  # a ViTConfig or a RobertaConfig
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config.dim, config.n_heads, gated)
        self.ffn_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.w1 = nn.Linear(config.dim, config.hidden_dim)
        self.w2 = nn.Linear(config.hidden_dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))

    def forward(self, x: Tensor, prompt: Prompt | None, mask: Tensor | None = None) -> Tensor:  # (B, T, C)
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), prompt, mask)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, prompt, mask))
        return self.ffn_norm(x + self.feed_forward(x))


def layer_outputs(
    layers: nn.ModuleList, x: Tensor, prompts: Sequence[Prompt], mask: Tensor | None = None
) -> list[Tensor]:
    """Of every layer, N times (B, T, C), for x (B, T, C); the last len(prompts) layers get them."""
    states, first_adapted = [], len(layers) - len(prompts)
    for i, layer in enumerate(layers):
        x = layer(x, prompts[i - first_adapted] if i >= first_adapted else None, mask)
        states.append(x)
    return states
