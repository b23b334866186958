"""The vision transformer (Dosovitskiy et al., 2021), which CLIP's vision encoder is, and RoBERTa (Liu et al., 2019).

Their layers attend in both directions, and take adaption prompts as LLaMA's do: in the topmost layers every token
attends to all of them. Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import AdaptionPrompt, attend, gated_attention
from runtime.schema import require_number

RESAMPLES = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which preprocessor_config.json has, too
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def check_config(config, names: Sequence[str]) -> None:
    """Raise ValueError where the numbers of a configuration make no model."""
    require_number("norm_eps", config.norm_eps, 1e-30, 1)
    for name in names:
        require_number(name, getattr(config, name), 1, 2**20, whole=True)
    if config.dim % config.n_heads:
        raise ValueError(f"{config.n_heads} heads do not share a width of {config.dim} evenly")
    if str(config.activation) not in ACTIVATIONS:
        raise ValueError(f"activation {config.activation!r} is none of {list(ACTIVATIONS)}")


MLP_ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU}


def make_mlp(widths: Sequence[int], activation: str, generator: torch.Generator | None = None) -> nn.Sequential:
    """Linear layers of these widths, with an activation between two; initialized as PyTorch does, by the generator."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        linear = nn.Linear(before, after)
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -(before**-0.5), before**-0.5, generator=generator)
        layers += [linear, MLP_ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class SelfAttention(nn.Module):
    """Of all tokens to all, with biases."""

    def __init__(self, dim: int, n_heads: int, gated: Callable[..., Tensor]):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.gated = gated

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x: Tensor, adaption_prompt: AdaptionPrompt | None, mask: Tensor | None) -> Tensor:  # (B, T, C)
        q, k, v = (
            self.split_heads(self.wq(x)),
            self.split_heads(self.wk(x)),
            self.split_heads(self.wv(x)),
        )  # (B, H, T, D)
        if adaption_prompt is None:
            output = attend(q, k, v, mask)
        else:
            prompt_k, prompt_v = (
                self.split_heads(self.wk(adaption_prompt.embeddings)),
                self.split_heads(self.wv(adaption_prompt.embeddings)),
            )
            output = self.gated(q, k, v, prompt_k, prompt_v, adaption_prompt.gate, mask)
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

    def forward(
        self, x: Tensor, adaption_prompt: AdaptionPrompt | None, mask: Tensor | None = None
    ) -> Tensor:  # (B, T, C)
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), adaption_prompt, mask)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, adaption_prompt, mask))
        return self.ffn_norm(x + self.feed_forward(x))


def layer_outputs(
    layers: nn.ModuleList, x: Tensor, adaption_prompts: Sequence[AdaptionPrompt], mask: Tensor | None = None
) -> list[Tensor]:
    """Return the outputs of all N layers, (B, T, C) each, for x (B, T, C). The topmost get the adaption prompts."""
    states, first_adapted = [], len(layers) - len(adaption_prompts)
    for i, layer in enumerate(layers):
        x = layer(x, adaption_prompts[i - first_adapted] if i >= first_adapted else None, mask)
        states.append(x)
    return states


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a vision transformer, by default of CLIP's ViT-B/32; ValueError where the numbers make no model."""

    image_size: int = 224  # pixels a side
    patch_size: int = 32
    dim: int = 768  # C
    n_layers: int = 12  # N
    n_heads: int = 12  # H
    hidden_dim: int = 3072  # of the feed-forward
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    channels: int = 3  # 1 for grey
    clip: bool = True  # CLIP norms the embedding, and its patches have no bias; others do it the other way round
    final_norm: bool = True
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that it was trained on, per channel
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    squeezed: bool = False  # a picture is resized to a square; otherwise its shape is kept
    resized: int | None = None  # pixels of the short side before the middle is cropped; None: image_size
    resample: str = "bicubic"

    def __post_init__(self):
        check_config(self, ("image_size", "patch_size", "dim", "n_layers", "n_heads", "hidden_dim", "channels"))
        if self.channels not in (1, 3) or not self.channels == len(self.mean) == len(self.std):
            raise ValueError(
                f"{self.channels} channels, {len(self.mean)} means and {len(self.std)} deviations of pixels"
            )
        for mean, std in zip(self.mean, self.std):
            require_number("a mean of pixels", mean, -1e3, 1e3)
            require_number("a deviation of pixels", std, 1e-6, 1e3)
        if self.resized is not None:
            require_number("the size before cropping", self.resized, self.image_size, 4 * self.image_size, whole=True)
        if self.resample not in RESAMPLES:
            raise ValueError(f"resample is {self.resample!r}, none of {', '.join(RESAMPLES)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"images of {self.image_size} pixels a side are no whole patches of {self.patch_size}")


class ViT(nn.Module):
    """A class token and an image's patches, with learned positions."""

    def __init__(self, config: ViTConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        C, P = config.dim, config.patch_size
        self.patch_embedding = nn.Conv2d(config.channels, C, kernel_size=P, stride=P, bias=not config.clip)
        self.class_embedding = nn.Parameter(torch.randn(C) * C**-0.5)
        self.positions = nn.Parameter(torch.randn(1 + (config.image_size // P) ** 2, C) * C**-0.5)  # (T, C)
        self.embedding_norm = nn.LayerNorm(C, config.norm_eps) if config.clip else nn.Identity()
        self.layers = nn.ModuleList(Layer(config, True, attention) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(C, config.norm_eps) if config.final_norm else nn.Identity()

    def forward(self, images: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for normalised images (B, 3, S, S); the class token is first.

        `norm` is for the last layer's, and is left to the caller. The last len(adaption_prompts) layers get one each.
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, T - 1, C)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.embedding_norm(torch.cat([first, patches], dim=1) + self.positions)
        return layer_outputs(self.layers, x, adaption_prompts)

    def encode(self, images: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self.norm(self(images, adaption_prompts)[-1])


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa, by default of roberta-base; ValueError where the numbers make no model."""

    vocab_size: int = 50265  # V
    max_positions: int = 514  # two more than the tokens that it can read
    dim: int = 768  # C
    n_layers: int = 12  # N
    n_heads: int = 12  # H
    hidden_dim: int = 3072
    norm_eps: float = 1e-5
    activation: str = "gelu"
    pad_id: int = 1

    def __post_init__(self):
        check_config(self, ("vocab_size", "max_positions", "dim", "n_layers", "n_heads", "hidden_dim"))
        if self.pad_id != 1:
            raise ValueError(f"pad_id is {self.pad_id!r}, RoBERTa's is 1")
        if self.max_length < 1:
            raise ValueError(f"{self.max_positions} positions leave none for tokens")

    @property
    def max_length(self) -> int:
        """So many tokens it can read: positions count from pad_id + 1."""
        return self.max_positions - self.pad_id - 1


class Roberta(nn.Module):
    """Words, with learned positions. The first is <s>; a batch is padded to the right."""

    def __init__(self, config: RobertaConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(1, config.dim)  # one alone, added to all: BERT's two kinds of sentence are gone
        self.embedding_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, False, attention) for _ in range(config.n_layers))

    def forward(self, ids: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for ids (B, T). Padding is seen by none; what comes of it is
        of no account."""
        is_token = ids != self.config.pad_id  # (B, T), False at padding
        positions = is_token.cumsum(dim=1) * is_token + self.config.pad_id  # from pad_id + 1 on; pad_id at padding
        x = self.embedding_norm(self.tok_embeddings(ids) + self.positions(positions) + self.types.weight[0])
        return layer_outputs(
            self.layers, x, adaption_prompts, is_token[:, None, None]
        )  # the mask broadcasts to (B, H, T, T)

    def encode(self, ids: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self(ids, adaption_prompts)[-1]
