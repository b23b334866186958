"""The vision transformer (Dosovitskiy et al., 2021), of which CLIP's tower is one. Notation as in adapter.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapter import Prompt, gated_attention
from encoders.layers import Layer, check_shape, layer_outputs


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a vision transformer; the defaults are those of CLIP's ViT-B/32.

    Raises ValueError where the numbers make no model.
    """

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

    def __post_init__(self):
        check_shape(self, ("image_size", "patch_size", "dim", "n_layers", "n_heads", "hidden_dim", "channels"))
        if self.channels not in (1, 3) or not self.channels == len(self.mean) == len(self.std):
            raise ValueError(
                f"{self.channels} channels, {len(self.mean)} means and {len(self.std)} deviations of pixels"
            )
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

    def forward(self, images: Tensor, prompts: Sequence[Prompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for normalised images (B, 3, S, S); the class token is first.

        `norm` is for the last layer's, and is left to whoever wants it. The last len(prompts) layers get them.
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, T - 1, C)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.embedding_norm(torch.cat([first, patches], dim=1) + self.positions)
        return layer_outputs(self.layers, x, prompts)

    def encode(self, images: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self.norm(self(images, prompts)[-1])
