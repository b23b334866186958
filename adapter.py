"""LLaMA-Adapter (Zhang et al., 2023, arXiv 2303.16199): gated attention, the adapter, and its file format.

A frozen transformer is adapted by K learned prompt embeddings and one learned gate per head in each
of its topmost L layers:

    q = rope(Wq x)   k = rope(Wk x)   v = Wv x           as in plain LLaMA
    kp = Wk P        vp = Wv P                            the layer's own frozen Wk, Wv
    scores  = q [kp ; k]^T / sqrt(D)
    weights = [ tanh(g) * softmax(scores over prompts) ; softmax(scores over tokens) ]
    output  = Wo ( weights [vp ; v] )

The two softmaxes are separate. Gates are initialized to 0, so the adapted model is exactly the
pretrained one when training starts ("zero-init attention", section 3.2).

Notation, here and in every other file:
    B batch   T tokens   S key length: T, or the capacity of the cache   C model width   V vocabulary size
    H query heads   Hkv key/value heads   D head dimension   N layers   L adapted layers
    K number of prompt embeddings ("prompts") per adapted layer; together they are its adaption prompt P (K, C)
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from runtime.files import write_tensors


class AdaptionPrompt(NamedTuple):
    """Prompt embeddings and gate values of one layer, which projects the embeddings with its own frozen Wk and Wv.

    The first dimension of either is 1 if the batch shares it, and B if each sample has its own.
    """

    embeddings: Tensor  # (1|B, K, C)
    gate: Tensor  # (1|B, H, 1, 1), after the activation


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, with grouped queries if Hkv < H.

    q (B, H, T, D); k, v (B, Hkv, S, D); returns (B, H, T, D). `mask` is boolean, (1|B, 1, T, S), or (1|B, 1, 1, S)
    if Hkv = H, and True where attention is allowed. `causal` requires T = S and no mask.
    """
    group, T, dtype = q.shape[1] // k.shape[1], q.shape[2], q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # faster on a CPU, especially in the backward pass
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1).to(dtype)
    # Queries that share a key/value head become rows of one head, because not every backend supports enable_gqa. A
    # causal mask would be wrong for such rows.
    q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, H/Hkv*T, D)
    if mask is not None:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)  # (B, 1, H/Hkv*T, S)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output.unflatten(2, (group, T)).flatten(1, 2).to(dtype)  # (B, H, T, D)


def gated_attention_paper(q, k, v, prompt_k, prompt_v, gate, mask=None, causal=False) -> Tensor:
    """Zero-init attention as in the paper (section 3.2, equations 5 to 8, before Wo), written out step by step.

    q (B, H, T, D); k, v (B, Hkv, S, D); prompt_k, prompt_v (1|B, Hkv, K, D); gate (1|B, H, 1, 1), after
    the activation; returns (B, H, T, D). Prompts have no position: every query attends to all of them.
    `mask` and `causal` are those of `attend`, and apply to the tokens only.
    """
    B, H, T, D = q.shape
    group = H // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, S, D)
    prompt_k, prompt_v = (
        x.expand(B, -1, -1, -1).repeat_interleave(group, dim=1) for x in (prompt_k, prompt_v)
    )  # (B, H, K, D)
    K, S = prompt_k.shape[2], k.shape[2]

    scores = q @ torch.cat([prompt_k, k], dim=2).transpose(2, 3) / math.sqrt(D)  # (B, H, T, K + S)
    prompt_scores, token_scores = scores.split([K, S], dim=3)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        token_scores = token_scores.masked_fill(~mask, -math.inf)
    weights = torch.cat([gate * prompt_scores.softmax(dim=3), token_scores.softmax(dim=3)], dim=3)
    return weights @ torch.cat([prompt_v, v], dim=2)


def gated_attention(q, k, v, prompt_k, prompt_v, gate, mask=None, causal=False) -> Tensor:
    """Compute the same as `gated_attention_paper`, but with fused attention, which stores no attention weights.

    With g the gate value, A the softmax over the prompts, and W the softmax over the tokens, the output is
    [g A ; W] [vp ; v] = g (A vp) + W v. If the gate value is zero, the output equals plain attention to the tokens
    bit for bit; that of `gated_attention_paper` equals it only up to rounding.
    """
    prompt_term = prompt_attention(q, prompt_k, prompt_v, gate)  # g A vp (B, H, T, D)
    return attend(q, k, v, mask, causal) + prompt_term


def prompt_attention(q: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    """Return the prompts' term of gated attention, gate * softmax(q prompt_k^T / sqrt(D)) prompt_v (B, H, T, D).

    q (B, H, T, D); prompt_k, prompt_v (1|B, Hkv, K, D); gate (1|B, H, 1, 1).
    """
    B = q.shape[0]
    return gate * attend(q, prompt_k.expand(B, -1, -1, -1), prompt_v.expand(B, -1, -1, -1))


ATTENTIONS = {"fused": gated_attention, "paper": gated_attention_paper}  # the values of --attention


class Adapter(nn.Module):
    """The trainable parameters: K prompts and H gates for each of the topmost L layers.

    There are L*K*C + L*H parameters, 1,229,760 for LLaMA-7B with K = 10 and L = 30. They are float32, whatever the
    dtype of the base. Row 0 of both tensors belongs to the lowest adapted layer, N - L. Prompts are initialized from a
    standard normal distribution, and gates to zero. The arguments `layers`, `length`, `dim` and `heads` are L, K, C and
    H. The dict `metadata` (str to str) is stored in the adapter file.
    """

    # The published implementations disagree on the activation of the gate; see docs/method.md.
    ACTIVATIONS = {"tanh": torch.tanh, "identity": lambda g: g}

    def __init__(
        self,
        *,
        layers: int,
        length: int,
        dim: int,
        heads: int,
        gate_activation: str = "tanh",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(layers, length, dim, generator=generator))  # P (L, K, C)
        self.gates = nn.Parameter(torch.zeros(layers, heads))  # g (L, H)
        self.gate_activation = gate_activation
        self.metadata: dict[str, str] = {}

    def forward(
        self, condition: Tensor | None = None, gate_scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> list[AdaptionPrompt]:
        """Return the adaption prompts of the L adapted layers, lowest layer first, in `dtype` (by default float32).

        `condition` (B, C), such as a projected image, is added to all K prompts of every layer (section 3.3).
        `gate_scale` multiplies the gate values; with 0, the model computes the output of the frozen base.
        """
        embeddings = self.prompts.unsqueeze(1)  # (L, 1, K, C)
        if condition is not None:
            embeddings = embeddings + condition[None, :, None, :]  # (L, B, K, C)
        gates = gate_scale * self.gate_values()[:, None, :, None, None]  # (L, 1, H, 1, 1)
        dtype = dtype or embeddings.dtype
        return [AdaptionPrompt(p, g) for p, g in zip(embeddings.to(dtype), gates.to(dtype))]  # the adapter's only cast

    def gate_values(self) -> Tensor:
        """Return the gate values after the activation, (L, H)."""
        return self.ACTIVATIONS[self.gate_activation](self.gates)

    def check_base(self, *, layers: int, dim: int, heads: int) -> None:
        """Raise ValueError if the adapter does not fit a base with these dimensions."""
        base = {"layers": layers, "dim": dim, "heads": heads}
        made_for = {"dim": self.prompts.shape[2], "heads": self.gates.shape[1]}
        made_for["layers"] = int(self.metadata.get("base_layers", layers))
        for name, number in made_for.items():
            if number != base[name]:
                expected = f"the adapter was made for a base with {name} = {number}"
                raise ValueError(f"{expected}, but this base has {name} = {base[name]}")
        if len(self.gates) > layers:
            raise ValueError(f"the adapter has prompts for {len(self.gates)} layers, but the base has {layers} layers")

    def save(self, path: str | Path, **metadata) -> None:
        """Add the keywords, as strings, and the fields of the format to `metadata`, and write the file atomically."""
        self.metadata |= {key: str(value) for key, value in metadata.items()}
        self.metadata |= {
            "format": "llama-adapter",
            "version": "1",
            "base_dim": str(self.prompts.shape[2]),
            "base_heads": str(self.gates.shape[1]),
            "gate_activation": self.gate_activation,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_tensors(path, tensors, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Load a valid file with an adapter of exactly this class.

        `formats.adapters.load_adapter` checks the file, and detects its format and the class.
        """
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls.from_tensors(tensors, file.metadata())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str], **extra) -> "Adapter":
        """Build an adapter from the tensors and metadata of its file.

        `extra` are constructor arguments that a subclass infers from the tensors. Raises KeyError if prompts, gates or
        gate_activation are missing, and RuntimeError, ValueError or IndexError if names or shapes are wrong.
        """
        layers, length, dim = tensors["prompts"].shape
        heads = tensors["gates"].shape[1]
        activation = metadata["gate_activation"]
        adapter = cls(layers=layers, length=length, dim=dim, heads=heads, gate_activation=activation, **extra)
        adapter.load_state_dict(tensors)
        adapter.metadata = dict(metadata)
        return adapter
