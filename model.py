"""LLaMA (1, 2 and 3), Mistral, Qwen2 and Qwen3 in plain PyTorch, with an optional adaption prompt per layer.

The names of the parameters are those of Meta's checkpoints. The notation is that of adapter.py.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter import AdaptionPrompt, attend, gated_attention
from runtime.schema import require_number


@dataclass(frozen=True)
class Config:
    """Architecture of a LLaMA; the defaults are those of Llama 2 7B. Raises ValueError if a value is invalid."""

    dim: int = 4096  # C
    n_layers: int = 32  # N
    n_heads: int = 32  # H
    n_kv_heads: int = 32  # Hkv
    head_dim: int = 128  # D
    hidden_dim: int = 11008  # width of the feed-forward network
    vocab_size: int = 32000  # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None  # (D/2,), divisors of the rotary frequencies, for longer contexts
    max_seq_len: int | None = None  # context length in tokens, if the checkpoint states it
    qkv_bias: bool = False  # used by Qwen2
    qk_norm: bool = False  # used by Qwen3: RMSNorm over each head of q and k, before the rotary embedding

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            require_number(name, getattr(self, name), 1, 2**24, whole=True)
        require_number("norm_eps", self.norm_eps, 1e-30, 1)
        require_number("rope_theta", self.rope_theta, 1e-30, 1e12)
        if self.max_seq_len is not None:
            require_number("max_seq_len", self.max_seq_len, 1, 2**40, whole=True)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but the rotary embedding needs an even number")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            expected = f"{self.head_dim // 2}, half of head_dim"
            raise ValueError(f"rope_factors has {len(self.rope_factors)} numbers; expected {expected}")
        for factor in self.rope_factors or ():
            require_number("an element of rope_factors", factor, 1e-30, 1e12)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_cos_sin(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine (1|B, T, 1, D/2), in float32, of the rotary angles at positions (1|B, T).

    They are recomputed in every forward pass, once for all layers, because a table stored in the module would be
    rounded by `model.bfloat16()`.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # (D/2,), radians per position
    if config.rope_factors is not None:
        runs = [(factor, len(list(run))) for factor, run in groupby(config.rope_factors)]
        # The factors are filled in on the device, because a copy from the host could not be recorded in a CUDA graph.
        factors = [torch.full((length,), factor, device=positions.device) for factor, length in runs]
        frequencies = frequencies / torch.cat(factors)  # (D/2,)
    angles = positions[:, :, None, None] * frequencies  # (1|B, T, 1, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x (B, T, H, D). Dimensions 2i and 2i+1 form a pair, as in Meta's checkpoints."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D/2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


@dataclass
class LayerCache:
    """Cached keys and values of one layer, for the tokens and for the adaption prompt."""

    k: Tensor  # (B, Hkv, capacity, D)
    v: Tensor
    prompt_kv: tuple[Tensor, Tensor] | None = None  # (1|B, Hkv, K, D) each, projected at the first forward pass

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write k, v (B, T, Hkv, D) at positions (B, T)."""
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        self.k[rows, :, positions] = k
        self.v[rows, :, positions] = v


class KVCache:
    """Key/value cache with room for `capacity` tokens per row, created and owned by the caller.

    `lengths` (B,), in int64, is the number of valid tokens in each row. A forward pass writes the new keys and values
    after them, and the caller then increases `lengths`. Rows of different lengths are padded on the right; each row is
    advanced by its own length, so that the next tokens overwrite the padding. `empty` is True until the first forward
    pass.
    """

    def __init__(self, model: "LLaMA", batch: int, capacity: int):
        config = model.config
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        options = {"dtype": model.dtype, "device": model.device}
        self.layers = [LayerCache(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in model.layers]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.capacity = capacity
        self.empty = True

    def longer_copy(self, capacity: int, rows: Tensor | None = None) -> "KVCache":
        """Return a copy with a new `capacity`, which must not be smaller than that of this cache.

        `rows` selects rows of the batch, in any order and with repeats; by default all rows are copied.
        """
        longer = copy.copy(self)
        rows = torch.arange(len(self.lengths), device=self.lengths.device) if rows is None else rows
        longer.capacity = capacity
        longer.lengths = self.lengths[rows]
        longer.layers = []
        for layer in self.layers:
            k, v = (F.pad(x[rows], (0, 0, 0, capacity - self.capacity)) for x in (layer.k, layer.v))
            prompt_kv = layer.prompt_kv
            if prompt_kv is not None and len(prompt_kv[0]) > 1:  # each row has its own adaption prompt
                prompt_kv = prompt_kv[0][rows], prompt_kv[1][rows]
            longer.layers.append(LayerCache(k, v, prompt_kv))
        return longer


class Positions(NamedTuple):
    """Positions of the tokens of one forward pass, and the attention mask, shared by all layers."""

    indices: Tensor  # (1|B, T)
    cos: Tensor  # (1|B, T, 1, D/2), from `rope_cos_sin`
    sin: Tensor
    mask: Tensor | None  # (B, 1, T, capacity) over the cached keys; None: causal attention over these tokens only


class Attention(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        C, D = config.dim, config.head_dim
        H, Hkv = config.n_heads, config.n_kv_heads
        self.head_dim = D
        self.wq = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.wk = nn.Linear(C, Hkv * D, bias=config.qkv_bias)
        self.wv = nn.Linear(C, Hkv * D, bias=config.qkv_bias)
        self.wo = nn.Linear(H * D, C, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk")
        self.gated = gated

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, H*D) -> (B, T, H, D)

    def project_adaption_prompt(
        self, adaption_prompt: AdaptionPrompt, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of an adaption prompt, (1|B, Hkv, K, D) each.

        Prompts have no position, hence no RoPE. With a cache, they are projected once and then read from the cache.
        """
        if cache is not None and cache.prompt_kv is not None:
            return cache.prompt_kv
        k = self.k_norm(self.split_heads(self.wk(adaption_prompt.embeddings))).transpose(1, 2)  # (1|B, Hkv, K, D)
        v = self.split_heads(self.wv(adaption_prompt.embeddings)).transpose(1, 2)  # (1|B, Hkv, K, D)
        if cache is not None:
            cache.prompt_kv = k, v
        return k, v

    def forward(
        self, x: Tensor, positions: Positions, adaption_prompt: AdaptionPrompt | None, cache: LayerCache | None
    ) -> Tensor:
        q = self.q_norm(self.split_heads(self.wq(x)))  # (B, T, H, D)
        k = self.k_norm(self.split_heads(self.wk(x)))  # (B, T, Hkv, D)
        v = self.split_heads(self.wv(x))  # (B, T, Hkv, D)
        q = apply_rope(q, positions.cos, positions.sin).transpose(1, 2)  # (B, H, T, D)
        k = apply_rope(k, positions.cos, positions.sin)  # (B, T, Hkv, D)
        if cache is not None:
            cache.write(k, v, positions.indices)
        mask = positions.mask
        causal = mask is None
        if causal:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, Hkv, T, D)
        else:
            k, v = cache.k, cache.v  # (B, Hkv, S, D)
        if adaption_prompt is None:
            output = attend(q, k, v, mask, causal)  # (B, H, T, D)
        else:
            prompt_k, prompt_v = self.project_adaption_prompt(adaption_prompt, cache)
            output = self.gated(q, k, v, prompt_k, prompt_v, adaption_prompt.gate, mask, causal)
        return self.wo(output.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    """Feed-forward network with SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, gated)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, positions: Positions, adaption_prompt: AdaptionPrompt | None, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, adaption_prompt, cache)  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    """Decoder-only transformer. Layers with an adaption prompt use `attention`, by default `gated_attention`."""

    def __init__(self, config: Config, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    def hidden_states(
        self,
        tokens: Tensor,  # (B, T)
        adaption_prompts: Sequence[AdaptionPrompt] = (),
        cache: KVCache | None = None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Return the final hidden states after the norm (B, T, C), the input of the output head.

        `adaption_prompts` are those of the topmost layers, lowest layer first. With a `cache`, the tokens follow the
        cached ones, and their keys and values are written to it. With `checkpoint_activations`, a layer stores only its
        input, and is recomputed in the backward pass. Raises ValueError if there are more adaption prompts than layers.
        """
        first_adapted = len(self.layers) - len(adaption_prompts)
        if first_adapted < 0:
            number = len(adaption_prompts)
            raise ValueError(f"found adaption prompts for {number} layers, but the model has {len(self.layers)} layers")
        index = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            index = cache.lengths[:, None] + index  # (B, T)
            if not cache.empty:
                keys = torch.arange(cache.capacity, device=tokens.device)  # (capacity,)
                mask = keys <= index[:, None, :, None]  # (B, 1, T, capacity)
            cache.empty = False
        positions = Positions(index, *rope_cos_sin(index, self.config), mask)

        x = self.tok_embeddings(tokens)  # (B, T, C)
        for i, block in enumerate(self.layers):
            adaption_prompt = adaption_prompts[i - first_adapted] if i >= first_adapted else None
            layer_cache = cache.layers[i] if cache is not None else None
            if checkpoint_activations:
                x = checkpoint(block, x, positions, adaption_prompt, layer_cache, use_reentrant=False)
            else:
                x = block(x, positions, adaption_prompt, layer_cache)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = (), cache: KVCache | None = None
    ) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T)."""
        return self.output(self.hidden_states(tokens, adaption_prompts, cache))


def num_parameters(config: Config) -> int:
    """Return the number of parameters of a LLaMA, without allocating them. Tied embeddings count twice."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in LLaMA(config).parameters())
