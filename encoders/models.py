"""Vision transformers (Dosovitskiy et al., 2021), including CLIP's vision encoder, and RoBERTa (Liu et al., 2019).

Their attention is bidirectional. Adaption prompts work as in LLaMA: in each of the topmost layers, every token attends
to the K prompts of that layer. Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import AdaptionPrompt, attend, gated_attention
from runtime.schema import require_number

RESAMPLES = {"bilinear": 2, "bicubic": 3}  # Pillow's constants, also used in preprocessor_config.json
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def check_config(config, names: Sequence[str]) -> None:
    """Raise ValueError if a value is out of range, n_heads does not divide dim, or the activation is unknown.

    `names` are the fields that must be positive integers.
    """
    require_number("norm_eps", config.norm_eps, 1e-30, 1)
    for name in names:
        require_number(name, getattr(config, name), 1, 2**20, whole=True)
    if config.dim % config.n_heads:
        raise ValueError(f"dim {config.dim} is not a multiple of n_heads {config.n_heads}")
    if str(config.activation) not in ACTIVATIONS:
        found = f"activation (hidden_act in config.json) is {config.activation!r}"
        raise ValueError(f"{found}; expected one of {list(ACTIVATIONS)}")


MLP_ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU}


def make_mlp(widths: Sequence[int], activation: str, generator: torch.Generator | None = None) -> nn.Sequential:
    """Create linear layers of these widths with activations in between.

    They are initialized as nn.Linear is by default, with random numbers from `generator`.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        linear = nn.Linear(fan_in, fan_out)
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        layers += [linear, MLP_ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention with biases."""

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
    """Transformer layer: pre-norm if `norm_first` (ViT), otherwise post-norm (RoBERTa)."""

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
    """Return the outputs (B, T, C) of all N layers for x (B, T, C). The topmost layers get the adaption prompts."""
    states, first_adapted = [], len(layers) - len(adaption_prompts)
    for i, layer in enumerate(layers):
        x = layer(x, adaption_prompts[i - first_adapted] if i >= first_adapted else None, mask)
        states.append(x)
    return states


@dataclass(frozen=True)
class ViTConfig:
    """Dimensions and preprocessing of a vision transformer; the defaults are those of CLIP's ViT-B/32.

    Raises ValueError if the values are inconsistent.
    """

    image_size: int = 224  # side length in pixels
    patch_size: int = 32
    dim: int = 768  # C
    n_layers: int = 12  # N
    n_heads: int = 12  # H
    hidden_dim: int = 3072  # width of the feed-forward network
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    channels: int = 3  # 3 for RGB, 1 for gray
    clip: bool = True  # True: norm before the layers, no bias in patch_embedding, as in CLIP; False: bias, no norm
    final_norm: bool = True  # False: no norm after the last layer
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per channel, to normalize pixels
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    squeezed: bool = False  # resize images to a square; otherwise the aspect ratio is kept
    resized: int | None = None  # short side in pixels before center cropping; None: image_size
    resample: str = "bicubic"

    def __post_init__(self):
        check_config(self, ("image_size", "patch_size", "dim", "n_layers", "n_heads", "hidden_dim", "channels"))
        if self.channels not in (1, 3) or not self.channels == len(self.mean) == len(self.std):
            raise ValueError(
                f"has {self.channels} channels, {len(self.mean)} means and {len(self.std)} standard deviations; "
                f"expected 1 of each, or 3 of each"
            )
        for mean, std in zip(self.mean, self.std):
            require_number("a mean of the pixels", mean, -1e3, 1e3)
            require_number("a standard deviation of the pixels", std, 1e-6, 1e3)
        if self.resized is not None:
            require_number("the size before cropping", self.resized, self.image_size, 4 * self.image_size, whole=True)
        if self.resample not in RESAMPLES:
            raise ValueError(f"resample is {self.resample!r}; expected one of {', '.join(RESAMPLES)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


class ViT(nn.Module):
    """Vision transformer over a class token and the patches of an image, with learned position embeddings."""

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
        """Return the outputs of all N layers, (B, T, C) each, for normalized images (B, channels, size, size).

        The class token comes first. The final `norm` is not applied. The topmost layers get one adaption prompt each.
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, T - 1, C)
        class_token = self.class_embedding.expand(len(images), 1, -1)
        x = self.embedding_norm(torch.cat([class_token, patches], dim=1) + self.positions)
        return layer_outputs(self.layers, x, adaption_prompts)

    def encode(self, images: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> Tensor:
        """Return the final hidden states (B, T, C), the input of heads."""
        return self.norm(self(images, adaption_prompts)[-1])


@dataclass(frozen=True)
class RobertaConfig:
    """Dimensions of a RoBERTa; the defaults are those of roberta-base.

    Raises ValueError if the values are inconsistent.
    """

    vocab_size: int = 50265  # V
    max_positions: int = 514  # context length + 2; see `max_length`
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
            raise ValueError(f"pad_id (pad_token_id in config.json) is {self.pad_id!r}; only 1 is supported")
        if self.max_length < 1:
            found = f"max_positions (max_position_embeddings in config.json) is {self.max_positions}"
            raise ValueError(f"{found}; expected at least 3, because tokens begin at position 2")

    @property
    def max_length(self) -> int:
        """The context length in tokens. It is less than max_positions, because positions start at pad_id + 1."""
        return self.max_positions - self.pad_id - 1


class Roberta(nn.Module):
    """RoBERTa, with learned position embeddings. Every input begins with <s>, and batches are padded on the right."""

    def __init__(self, config: RobertaConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(1, config.dim)  # added to all tokens; BERT has two types, for pairs of sentences
        self.embedding_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, False, attention) for _ in range(config.n_layers))

    def forward(self, ids: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> list[Tensor]:
        """Return the outputs of all N layers, (B, T, C) each, for token ids (B, T), int64.

        No token attends to padding, and the outputs at padding have no meaning.
        """
        is_token = ids != self.config.pad_id  # (B, T), False at padding
        positions = is_token.cumsum(dim=1) * is_token + self.config.pad_id  # from pad_id + 1 on; pad_id at padding
        x = self.embedding_norm(self.tok_embeddings(ids) + self.positions(positions) + self.types.weight[0])
        return layer_outputs(self.layers, x, adaption_prompts, is_token[:, None, None])  # broadcasts to (B, H, T, T)

    def encode(self, ids: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> Tensor:
        """Return the final hidden states (B, T, C), the input of heads."""
        return self(ids, adaption_prompts)[-1]
