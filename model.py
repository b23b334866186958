"""LLaMA (1, 2 and 3) in plain PyTorch, with room for prompts, and the reading of its checkpoints.

Parameters carry the names of Meta's checkpoints. Notation as in adapter.py.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import Prompt, attend, gated_attention
from data import Tokenizer


@dataclass(frozen=True)
class Config:
    """The shape of a LLaMA; the defaults are 7B's."""

    dim: int = 4096  # C
    n_layers: int = 32  # N
    n_heads: int = 32  # H
    n_kv_heads: int = 32  # Hkv
    head_dim: int = 128  # D
    hidden_dim: int = 11008  # of the feed-forward
    vocab_size: int = 32000  # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int | None = None  # how far it was trained to see, where the checkpoint says so


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        wide = x.float()  # squares overflow or vanish in 16 bits
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rope_angles(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's D/2 rotations, each (1|B, 1, T, D/2) for positions (1|B, T).

    Made anew at each forward, for all layers at once: less work than one row of one matrix product,
    and a table kept in the module would be rounded by `model.bfloat16()`.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # (D/2,)
    angles = positions[:, None, :, None] * frequencies  # float32
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, D): neighbours 2i and 2i+1 are a pair, as in Meta's checkpoints."""
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, T, D/2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


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
        self.length = length


class Attention(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        C, H, Hkv, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim = D
        self.wq = nn.Linear(C, H * D, bias=False)
        self.wk = nn.Linear(C, Hkv * D, bias=False)
        self.wv = nn.Linear(C, Hkv * D, bias=False)
        self.wo = nn.Linear(H * D, C, bias=False)
        self.gated = gated

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def project_prompt(self, prompt: Prompt, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt's tokens, unrotated: a prompt has no position."""
        if cache is not None and cache.prompt is not None:
            return cache.prompt
        kv = self.heads(self.wk(prompt.tokens)), self.heads(self.wv(prompt.tokens))  # 2 x (1|B, Hkv, K, D)
        if cache is not None:
            cache.prompt = kv
        return kv

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        positions: Tensor,  # (1|B, T)
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        prompt: Prompt | None,
        cache: LayerCache | None,
    ) -> Tensor:
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, H, T, D), (B, Hkv, T, D)
        if cache is not None:
            k, v = cache.write(k, v, positions)  # (B, Hkv, S, D)
        causal = mask is None
        if prompt is None:
            output = attend(q, k, v, mask, causal)  # (B, H, T, D)
        else:
            prompt_k, prompt_v = self.project_prompt(prompt, cache)
            output = self.gated(q, k, v, prompt_k, prompt_v, prompt.gate, mask, causal)
        return self.wo(output.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Config, gated: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, gated)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, positions, rope, mask, prompt, cache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, rope, mask, prompt, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    """A LLaMA. `attention` is `gated_attention` or `gated_attention_paper`: the same function, two ways."""

    def __init__(self, config: Config, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def hidden_states(self, tokens: Tensor, prompts: Sequence[Prompt] = (), cache: KVCache | None = None) -> Tensor:
        """What the output head reads, (B, T, C), for tokens (B, T). The last len(prompts) layers get them."""
        first_adapted = len(self.layers) - len(prompts)
        if first_adapted < 0:
            raise ValueError(f"{len(prompts)} layers of prompts for a model of {len(self.layers)} layers")
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        mask = None  # plain causal attention
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
            mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        rope = rope_angles(positions, self.config)
        x = self.tok_embeddings(tokens)  # (B, T, C)
        for i, block in enumerate(self.layers):
            prompt = prompts[i - first_adapted] if i >= first_adapted else None
            x = block(x, positions, rope, mask, prompt, cache.layers[i] if cache is not None else None)
        return self.norm(x)

    def forward(self, tokens: Tensor, prompts: Sequence[Prompt] = (), cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T)."""
        return self.output(self.hidden_states(tokens, prompts, cache))


def fingerprint(model: LLaMA) -> str:
    """A hash of a few weights, rounded to bfloat16 so that it is the same in whatever dtype they are held."""
    first, last = model.layers[0], model.layers[-1]
    some = (model.tok_embeddings, first.attention.wq, last.feed_forward.w2, model.output)
    rows = torch.cat([module.weight[:4].detach().flatten().to("cpu", torch.bfloat16) for module in some])
    return hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def choose(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where a base lives and in what dtype, decided here alone: bfloat16 on a GPU, float32 elsewhere.

    Raises ValueError where this machine, or this PyTorch, has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}") from None
    return torch.device(device), getattr(torch, dtype)


def load_llama(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
) -> tuple[LLaMA, Tokenizer]:
    """A frozen LLaMA and its tokenizer.

    `path` is a folder in Meta's layout (params.json, consolidated.00.pth, tokenizer.model), a
    llama2.c .bin (of either layout) with tokenizer.model beside it, or the folder that holds one.
    Raises FileNotFoundError or ValueError, in a line that names the file and both numbers.
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

    with torch.device("meta"):  # names and shapes without memory
        model = LLaMA(config, attention)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in expected.keys() - weights.keys():
        raise ValueError(f"{path}: has no weight {name}")
    for name in weights.keys() - expected.keys():
        raise ValueError(f"{path}: has a weight {name} that this model does not know")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"{path}: {name} is {tuple(weights[name].shape)}, its configuration says {tuple(shape)}")
        weights[name] = weights[name].to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False), tokenizer


def read_meta(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Meta's layout, with one file of weights."""
    file = folder / "params.json"
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
        dim, n_layers, n_heads = params["dim"], params["n_layers"], params["n_heads"]
        hidden_dim = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
        hidden_dim += -hidden_dim % params["multiple_of"]
        config = dict(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=params.get("n_kv_heads") or n_heads,
            head_dim=dim // n_heads,
            hidden_dim=hidden_dim,
            norm_eps=params["norm_eps"],
            rope_theta=params.get("rope_theta", 10000.0),
        )
    except KeyError as error:
        raise ValueError(f"{file}: has no field {error}") from None
    except (TypeError, AttributeError, ZeroDivisionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not the parameters of a LLaMA: {error}") from None

    shards = sorted(folder.glob("consolidated.*.pth"))
    if len(shards) != 1:
        raise ValueError(f"{folder}: has {len(shards)} files consolidated.*.pth, only 1 is supported so far")
    try:
        weights = torch.load(shards[0], map_location="cpu", mmap=True, weights_only=True)
        weights.pop("rope.freqs", None)  # LLaMA 1 carries the table that rope_angles computes
        vocab_size = len(weights["tok_embeddings.weight"])  # params.json often says -1
    except Exception as error:  # torch.load raises whatever a broken file makes it meet
        raise ValueError(f"{shards[0]}: not a checkpoint of LLaMA weights: {str(error).splitlines()[0]}") from None
    return Config(vocab_size=vocab_size, **config), weights


def read_llama2c(file: Path) -> tuple[Config, dict[str, Tensor]]:
    """llama2.c's float32 .bin: a header of integers, then every tensor in a fixed order, layers stacked."""
    raw = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
    if len(raw) < 28:
        raise ValueError(f"{file}: {len(raw)} bytes are not a llama2.c checkpoint")
    magic, version = struct.unpack("<Ii", raw[:8].tobytes())
    modern = magic == 0x616B3432  # "ak42"
    if modern and version != 1:
        raise ValueError(f"{file}: llama2.c version {version}, only 1 (float32) and the older layout are supported")
    header = struct.unpack("<7i", raw[8:36].tobytes() if modern else raw[:28].tobytes())
    C, hidden, N, H, Hkv, V, max_seq_len = header
    tied = bool(raw[36]) if modern else V > 0
    V = abs(V)
    if min(C, hidden, N, H, Hkv, V, max_seq_len) < 1 or C % H or H % Hkv:
        raise ValueError(f"{file}: not a llama2.c checkpoint (its header reads {header})")
    D = C // H

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

    start = 256 if modern else 28
    size = start + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(raw) != size:
        raise ValueError(f"{file}: {len(raw)} bytes, but its header asks for {size}")
    tensors = {}
    for name, shape in shapes.items():
        stop = start + 4 * int(np.prod(shape))
        tensors[name] = torch.from_numpy(np.array(raw[start:stop]).view("<f4").reshape(shape))
        start = stop

    weights = {f"{name}.weight": tensors[name] for name in ("tok_embeddings", "norm")}
    weights["output.weight"] = tensors["tok_embeddings" if tied else "output"]
    for i in range(N):
        weights |= {f"layers.{i}.{name}.weight": tensors[name][i] for name in norms}
        weights |= {f"layers.{i}.attention.{name}.weight": tensors[name][i] for name in attention}
        weights |= {f"layers.{i}.feed_forward.{name}.weight": tensors[name][i] for name in mlp}
    config = Config(C, N, H, Hkv, D, hidden, V, max_seq_len=max_seq_len)
    return config, weights
