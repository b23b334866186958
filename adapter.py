"""LLaMA-Adapter (Zhang et al., 2023, arXiv 2303.16199): the method, and nothing else.

A frozen transformer learns to follow instructions from K learnable prompt vectors and one
learnable gate per head, added to each of its topmost L layers:

    q = rope(Wq x)   k = rope(Wk x)   v = Wv x           as in plain LLaMA
    kp = Wk P        vp = Wv P                            the layer's own frozen Wk, Wv
    scores  = q [kp ; k]^T / sqrt(D)
    weights = [ tanh(g) * softmax(scores over prompts) ; softmax(scores over words) ]
    output  = Wo ( weights [vp ; v] )

The two softmaxes are separate. With g = 0, where training starts, the words' share of the output
is exactly that of the frozen layer, so the adapter begins as the pre-trained model and lets its
prompts in only as far as they help ("zero-init attention", section 3.2).

Notation, here and in every other file:
    B batch   T tokens   S keys: tokens, those in the cache included   C model width   V vocabulary
    H query heads   Hkv key/value heads   D head width   N layers   L adapted layers   K prompt length
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runtime.files import require_file, write_tensors
from runtime.schema import whole_number


class Prompt(NamedTuple):
    """What one adapted layer is given; the layer projects the tokens with its own weights.

    A leading 1 means that the whole batch shares it, a leading B that each sample has its own.
    """

    tokens: Tensor  # (1|B, K, C)
    gate: Tensor  # (1|B, H, 1, 1), its activation already applied


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; Hkv may divide H (grouped queries).

    q (B, H, T, D); k, v (B, Hkv, S, D); returns (B, H, T, D). `mask` is boolean, broadcasts to
    (B, H, T, S), and is True where a query may look; `causal` needs no mask, and T = S.
    """
    grouped, dtype = k.shape[1] != q.shape[1], q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # faster there, above all in the backward pass
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped).to(dtype)


def gated_attention_paper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Zero-init attention as the paper writes it (equations 5 to 9), every step in the open.

    q (B, H, T, D); k, v (B, Hkv, S, D); prompt_k, prompt_v (1|B, Hkv, K, D); gate (1|B, H, 1, 1);
    returns (B, H, T, D). Prompts have no position and no causal order: every query sees them all.
    """
    B, H, T, D = q.shape
    group = H // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, S, D)
    prompt_k, prompt_v = (
        x.expand(B, -1, -1, -1).repeat_interleave(group, dim=1) for x in (prompt_k, prompt_v)
    )  # (B, H, K, D)
    K, S = prompt_k.shape[2], k.shape[2]

    scores = q @ torch.cat([prompt_k, k], dim=2).transpose(2, 3) / math.sqrt(D)  # (B, H, T, K + S)
    over_prompts, over_words = scores.split([K, S], dim=3)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        over_words = over_words.masked_fill(~mask, -math.inf)
    weights = torch.cat([gate * over_prompts.softmax(dim=3), over_words.softmax(dim=3)], dim=3)
    return weights @ torch.cat([prompt_v, v], dim=2)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The same as `gated_attention_paper`, from two fused attentions that never store the weights.

    [g A ; W] [vp ; v] = g (A vp) + W v, so the prompts are one more attention, scaled and added.
    At gate zero the sum is the frozen layer's own attention, bit for bit (the other form's is equal up to rounding).
    """
    B = q.shape[0]
    words = attend(q, k, v, mask, causal)  # (B, H, T, D)
    prompts = attend(q, prompt_k.expand(B, -1, -1, -1), prompt_v.expand(B, -1, -1, -1))  # (B, H, T, D)
    return words + gate * prompts


ATTENTIONS = {"fused": gated_attention, "paper": gated_attention_paper}  # the same function, two ways


class Adapter(nn.Module):
    """The learnable part: K prompts and H gates for each of the topmost L layers.

    L*K*C + L*H parameters, 1,229,760 for LLaMA-7B with K = 10 and L = 30; float32 whatever the
    base is. Row 0 belongs to the lowest adapted layer, N - L. Prompts start as N(0, 1), gates at
    zero. `metadata` is what the file says of it, strings only.
    """

    ACTIVATIONS = {"tanh": torch.tanh, "identity": lambda g: g}  # the published copies disagree: docs/method.md

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
    ) -> list[Prompt]:
        """The prompts of the L adapted layers, lowest first, in the base's dtype.

        `condition` (B, C), an image's global feature say, is added to every prompt (section 3.3).
        `gate_scale` scales the gates after their activation: 0 is the frozen base.
        """
        tokens = self.prompts.unsqueeze(1)  # (L, 1, K, C)
        if condition is not None:
            tokens = tokens + condition[None, :, None, :]  # (L, B, K, C)
        gates = gate_scale * self.gate_values()[:, None, :, None, None]  # (L, 1, H, 1, 1)
        dtype = dtype or tokens.dtype
        return [Prompt(p, g) for p, g in zip(tokens.to(dtype), gates.to(dtype))]  # the one cast

    def gate_values(self) -> Tensor:
        """How far each gate is open, (L, H): tanh(g), or g itself where `gate_activation` is "identity"."""
        return self.ACTIVATIONS[self.gate_activation](self.gates)

    @classmethod
    def extra_arguments(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, object]:
        """What a subclass with further tensors is made with besides, as a file's tensors and metadata say."""
        return {}

    def check_base(self, *, layers: int, dim: int, heads: int) -> None:
        """Raise ValueError, with both numbers, where this adapter cannot belong to such a base."""
        base = {"layers": layers, "dim": dim, "heads": heads}
        made_for = {"dim": self.prompts.shape[2], "heads": self.gates.shape[1]}
        made_for["layers"] = int(self.metadata.get("base_layers", layers))
        for name, number in made_for.items():
            if number != base[name]:
                raise ValueError(f"the adapter was made for {name} {number}, the base has {name} {base[name]}")
        if len(self.gates) > layers:
            raise ValueError(f"the adapter has prompts for {len(self.gates)} layers, the base has {layers} layers")

    def save(self, path: str | Path, **metadata) -> None:
        """Write the adapter file, wholly or not at all; `metadata` is added to what is known."""
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
        """Read an adapter file. Raises FileNotFoundError, or ValueError that says what is wrong."""
        try:
            with safe_open(require_file(path, "adapter file"), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
        if (metadata.get("format"), metadata.get("version")) != ("llama-adapter", "1"):
            raise ValueError(f"{path}: is not of the format 'llama-adapter', version '1', but says {metadata}")
        if not {"prompts", "gates"} <= set(tensors):
            raise ValueError(f"{path}: holds {sorted(tensors)}, without the tensors 'gates' and 'prompts'")
        activation = metadata.get("gate_activation")
        if activation not in cls.ACTIVATIONS:
            raise ValueError(f"{path}: gate_activation {activation!r} is none of {list(cls.ACTIVATIONS)}")
        prompts, gates = tensors["prompts"], tensors["gates"]
        if prompts.dim() != 3 or gates.dim() != 2 or len(prompts) != len(gates) or 0 in (*prompts.shape, *gates.shape):
            raise ValueError(
                f"{path}: prompts {tuple(prompts.shape)} and gates {tuple(gates.shape)} are not (L, K, C) and (L, H)"
            )
        for name, size in (("base_dim", prompts.shape[2]), ("base_heads", gates.shape[1])):
            if metadata.get(name) != str(size):
                raise ValueError(f"{path}: metadata says {name} {metadata.get(name)}, the tensors say {size}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f"{path}: {name}, of {tensor.dtype}, holds what is not finite or not float32")
        layers, length, dim = prompts.shape
        shape = dict(layers=layers, length=length, dim=dim, heads=gates.shape[1], gate_activation=activation)
        try:
            whole_number("base_layers", metadata.get("base_layers", str(len(gates))), least=len(gates))
            with torch.device("meta"):
                adapter = cls(**shape, **cls.extra_arguments(tensors, metadata))
            adapter.load_state_dict(tensors, assign=True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
        adapter.metadata = dict(metadata)
        return adapter
