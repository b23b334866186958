"""LLaMA (1, 2 and 3) in plain PyTorch, with room for prompts.

Parameters carry the names of Meta's checkpoints. Notation as in adapter.py.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter import Prompt, attend, gated_attention


class RopeScaling(NamedTuple):
    """Llama 3.1's stretching of the rotary frequencies, for contexts longer than the pre-trained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclass(frozen=True)
class Config:
    """The shape of a LLaMA; the defaults are 7B's. Raises ValueError where the numbers make no model."""

    dim: int = 4096  # C
    n_layers: int = 32  # N
    n_heads: int = 32  # H
    n_kv_heads: int = 32  # Hkv
    head_dim: int = 128  # D
    hidden_dim: int = 11008  # of the feed-forward
    vocab_size: int = 32000  # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int | None = None  # how far it was trained to see, where the checkpoint says so

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**24:
                raise ValueError(f"{name} is {value!r}, not a whole number that a LLaMA could have")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"{name} is {value!r}, not a positive number")
        if self.max_seq_len is not None and (type(self.max_seq_len) is not int or self.max_seq_len < 1):
            raise ValueError(f"max_seq_len is {self.max_seq_len!r}, not a positive whole number")
        for value in self.rope_scaling or ():
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"rope_scaling has {value!r}, not a positive number")
        if self.rope_scaling and self.rope_scaling.low_freq_factor >= self.rope_scaling.high_freq_factor:
            raise ValueError(f"rope_scaling {tuple(self.rope_scaling)} has no room between low and high frequencies")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embedding needs it even")


# The sizes that were published, smallest first.
SIZES = {
    #                 dim  layers heads kv  D  hidden   vocab   eps    theta     rope scaling
    "TinyLlama-1.1B": Config(2048, 22, 32, 4, 64, 5632, 32000, 1e-5, 1e4, None, 2048),
    "Llama-3.2-1B": Config(2048, 16, 32, 8, 64, 8192, 128256, 1e-5, 5e5, RopeScaling(32, 1, 4, 8192), 131072),
    "Llama-3.2-3B": Config(3072, 28, 24, 8, 128, 8192, 128256, 1e-5, 5e5, RopeScaling(32, 1, 4, 8192), 131072),
    "LLaMA-7B": Config(4096, 32, 32, 32, 128, 11008, 32000, 1e-6, 1e4, None, 2048),
    "Llama-2-7B": Config(4096, 32, 32, 32, 128, 11008, 32000, 1e-5, 1e4, None, 4096),
    "Llama-3-8B": Config(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, None, 8192),
    "Llama-3.1-8B": Config(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, RopeScaling(8, 1, 4, 8192), 131072),
    "LLaMA-13B": Config(5120, 40, 40, 40, 128, 13824, 32000, 1e-6, 1e4, None, 2048),
    "Llama-2-13B": Config(5120, 40, 40, 40, 128, 13824, 32000, 1e-5, 1e4, None, 4096),
    "LLaMA-33B": Config(6656, 60, 52, 52, 128, 17920, 32000, 1e-6, 1e4, None, 2048),
    "LLaMA-65B": Config(8192, 80, 64, 64, 128, 22016, 32000, 1e-5, 1e4, None, 2048),
    "Llama-2-70B": Config(8192, 80, 64, 8, 128, 28672, 32000, 1e-5, 1e4, None, 4096),
    "Llama-3-70B": Config(8192, 80, 64, 8, 128, 28672, 128256, 1e-5, 5e5, None, 8192),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """Without bias.

    In compiled code on a CPU a single row goes through as a product and a sum, which become one pass over
    the weights, and that is quicker than the library's matrix product.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dim() == 2 and len(x) == 1:
            return (x.float() * self.weight).sum(dim=1).to(x.dtype)[None]
        return F.linear(x, self.weight)


def rope_turns(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What `rotate` needs for positions (n,): cos (n, 1, D/2, 1), and -sin and sin (n, 1, D/2, 2).

    Made anew at each forward, for all layers at once: less work than one row of one matrix product,
    and a table kept in the module would be rounded by `model.bfloat16()`.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # (D/2,), turns per token times 2 pi
    if config.rope_scaling is not None:
        factor, low, high, context = config.rope_scaling
        turns = context * frequencies / (2 * math.pi)  # within the pre-trained context
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pairs stay, 0: slow ones are stretched
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    angles = positions[:, None, None, None] * frequencies[:, None]  # float32
    return angles.cos(), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (n, H, D): neighbours 2i and 2i+1 are a pair, as in Meta's checkpoints.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    cos, sin = turns
    pairs = x.unflatten(-1, (-1, 2))  # (n, H, D/2, 2)
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2).to(x.dtype)


class Layout(NamedTuple):
    """How the tokens of one forward pass lie, the same for all layers.

    All but attention looks at one token at a time. So the layers work on a list of tokens, x (n, C), in which
    the first P tokens of the B rows of T, where they are the same in all rows (an instruction template), occur
    once: n = P + B (T - P). Under causal attention what follows them cannot tell.
    """

    batch: int  # B
    shared: int  # P
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, S), or None for plain causal attention

    def rows(self, x: Tensor) -> Tensor:
        """(n, ...) to (B, T, ...)."""
        own = x[self.shared :].unflatten(0, (self.batch, -1))
        if not self.shared:
            return own
        return torch.cat([x[: self.shared].expand(self.batch, *[-1] * x.dim()), own], dim=1)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (n, ...)."""
        if not self.shared:
            return x.flatten(0, 1)
        return torch.cat([x[0, : self.shared], x[:, self.shared :].flatten(0, 1)])


class LayerCache:
    """One layer's keys and values of the tokens so far, and of its prompt."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v  # (B, Hkv, length, D)
        self.prompt: tuple[Tensor, Tensor] | None = None  # projected once, at the first forward

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, Hkv, T, D) at positions (B, T); return the whole cache (B, Hkv, length, D)."""
        index = positions[:, None, :, None].expand_as(k)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)
        return self.k, self.v


class KVCache:
    """Keys and values of one generation: made and owned by its caller, of fixed size, gone with it.

    `lengths` (B,) says how many tokens of each row count. `LLaMA.forward` writes behind them but never
    moves them; the caller does (`cache.lengths += 1`). So rows of unequal prompts go in padded to the
    right, each advanced by its own length, and what the padding wrote is overwritten by what follows.
    """

    def __init__(self, model: "LLaMA", batch: int, length: int):
        weight, config = model.tok_embeddings.weight, model.config
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.layers = [LayerCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.layers]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.capacity = length


class Attention(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        C, H, Hkv, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim = D
        self.wq = Linear(C, H * D)
        self.wk = Linear(C, Hkv * D)
        self.wv = Linear(C, Hkv * D)
        self.wo = Linear(H * D, C)
        self.gated = gated

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (..., H*D) -> (..., H, D)

    def project_prompt(self, prompt: Prompt, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt's tokens, unrotated: a prompt has no position."""
        if cache is not None and cache.prompt is not None:
            return cache.prompt
        k, v = self.heads(self.wk(prompt.tokens)), self.heads(self.wv(prompt.tokens))  # (1|B, K, Hkv, D)
        kv = k.transpose(1, 2), v.transpose(1, 2)  # (1|B, Hkv, K, D)
        if cache is not None:
            cache.prompt = kv
        return kv

    def forward(
        self,
        x: Tensor,  # (n, C)
        turns: tuple[Tensor, Tensor],  # as of rope_turns
        layout: Layout,
        prompt: Prompt | None,
        cache: LayerCache | None,
        wanted: Tensor | None,  # (R,)
    ) -> Tensor:
        """(n, C), or (R, C) at those of the n tokens that are wanted."""
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))  # (n, H|Hkv, D)
        q, k = rotate(q, turns), rotate(k, turns)
        q, k, v = (layout.rows(y).transpose(1, 2) for y in (q, k, v))  # (B, H|Hkv, T, D)
        if cache is not None:
            k, v = cache.write(k, v, layout.positions)  # (B, Hkv, S, D)
        causal = layout.mask is None
        if prompt is None:
            output = attend(q, k, v, layout.mask, causal)  # (B, H, T, D)
        else:
            prompt_k, prompt_v = self.project_prompt(prompt, cache)
            output = self.gated(q, k, v, prompt_k, prompt_v, prompt.gate, layout.mask, causal)
        output = layout.tokens(output.transpose(1, 2)).flatten(1)  # (n, H*D)
        return self.wo(output if wanted is None else output[wanted])


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, gated)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, turns, layout, prompt, cache, wanted) -> Tensor:  # as of Attention
        attended = self.attention(self.attention_norm(x), turns, layout, prompt, cache, wanted)
        x = (x if wanted is None else x[wanted]) + attended
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    """A LLaMA. `attention` is `gated_attention` or `gated_attention_paper`: the same function, two ways."""

    def __init__(self, config: Config, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        # Held in memory as (C, V): a single row goes through it up to three times as fast on a CPU, uncompiled.
        self.output.weight = nn.Parameter(self.output.weight.detach().T.contiguous().T)

    def hidden_states(
        self,
        tokens: Tensor,  # (B, T)
        prompts: Sequence[Prompt] = (),
        cache: KVCache | None = None,
        *,
        wanted: Tensor | None = None,  # (B, T)
        shared: int = 0,
        recompute: bool = False,
    ) -> Tensor:
        """What the output head reads, (B, T, C), or (R, C) at the R positions where `wanted` is True.

        The last len(prompts) layers get them. The first `shared` tokens, known to be the same in all rows, are
        computed once; then there is no cache, and no row has a prompt of its own. Raises ValueError where that
        cannot be.
        With `recompute` a layer keeps only its input for the backward pass, and is run again there.
        """
        first_adapted = len(self.layers) - len(prompts)
        if first_adapted < 0:
            raise ValueError(f"{len(prompts)} layers of prompts for a model of {len(self.layers)} layers")
        B, T = tokens.shape
        if shared and (shared >= T or cache is not None or any(len(p) > 1 for prompt in prompts for p in prompt)):
            raise ValueError(f"{B} rows of {T}, with a cache or prompts of their own, cannot share {shared} tokens")
        positions, mask = torch.arange(T, device=tokens.device).expand(B, T), None
        if cache is not None:
            positions = cache.lengths[:, None] + positions
            mask = torch.arange(cache.capacity, device=tokens.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        layout = Layout(B, shared, positions, mask)
        turns = rope_turns(layout.tokens(positions), self.config)

        x = self.tok_embeddings(layout.tokens(tokens))  # (n, C)
        if wanted is not None:
            wanted = layout.rows(torch.arange(len(x), device=x.device))[wanted]  # (R,), which of the n they are
        for i, block in enumerate(self.layers):
            prompt = prompts[i - first_adapted] if i >= first_adapted else None
            last = i == len(self.layers) - 1  # from its attention on, only what is wanted matters
            kept = cache.layers[i] if cache is not None else None
            inputs = (x, turns, layout, prompt, kept, wanted if last else None)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        x = self.norm(x)
        return layout.rows(x) if wanted is None else x

    def forward(self, tokens: Tensor, prompts: Sequence[Prompt] = (), cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T)."""
        return self.output(self.hidden_states(tokens, prompts, cache))


def number_of_weights(config: Config) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in LLaMA(config).parameters())


def prepare_to_compile(device: torch.device, int8: bool = False) -> None:
    """Before `compile_layers` or `compiled_decoding`. Raises ValueError where torch.compile would fail later."""
    if int8 and device.type == "cpu":
        raise ValueError("--int8 and --compile go together on a GPU only")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, such as g++, and there is none")
    # Kinds of call; with the default of 8 the later ones would go back to plain PyTorch.
    torch._dynamo.config.cache_size_limit = 32


def compile_layers(model: LLaMA) -> None:
    """torch.compile every layer, in place; its code is compiled anew only for a few kinds of call.

    Below the adapted layers, at the first of them, above it, and at the last; with and without a shared beginning;
    for one row and for several; with and without gradients. Lengths and numbers of rows are variables of that code.
    """
    for block in model.layers:
        block.compile(dynamic=True)


def hold_in_8_bits(model: LLaMA) -> None:
    """Round the layers' weights, in place, to 8 bits with a scale per row. Raises ValueError without torchao.

    They are widened again wherever they are used, and autograd would keep the wide ones of all layers for the
    backward pass: train with `recompute`.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("--int8 needs a package that is not installed: pip install torchao") from None
    quantize_(model.layers, Int8WeightOnlyConfig(set_inductor_config=False))


def fingerprint(model: LLaMA) -> str:
    """A hash of a few weights, rounded to bfloat16 so that it is the same in whatever dtype they are held."""
    first, last = model.layers[0], model.layers[-1]
    some = (model.tok_embeddings, first.attention.wq, last.feed_forward.w2, model.output)
    weights = [module.weight.detach() for module in some]
    weights = [getattr(weight, "full_tensor", lambda: weight)() for weight in weights]  # of a base split over ranks
    return hash_of([weight[:4] for weight in weights])


def hash_of(weights: Sequence[Tensor]) -> str:
    """Of their values, rounded to bfloat16."""
    rounded = torch.cat([weight.detach().flatten().to("cpu", torch.bfloat16) for weight in weights])
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def choose(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where a base lives and in what dtype, decided here alone: bfloat16 on a GPU, float32 elsewhere.

    Raises ValueError where this machine, or this PyTorch, has no such device.
    """
    torch.set_float32_matmul_precision("highest")  # float32 means float32, not TF32: bfloat16 is there for speed
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}") from None
    return torch.device(device), getattr(torch, dtype)
