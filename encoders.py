"""Frozen encoders: the vision transformer, of which CLIP's tower is one. Notation as in adapter.py.

They look in both directions, and take prompts as LLaMA does: in the topmost layers, every token sees them all.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adapter import Prompt, attend, gated_attention, replacing
from checkpoints import check_dense, copy, filled, load_pth, named, open_shards, read_json


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

    def __post_init__(self):
        for name in ("image_size", "patch_size", "dim", "n_layers", "n_heads", "hidden_dim"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**20:
                raise ValueError(f"{name} is {value!r}, not a whole number that a vision transformer could have")
        if self.image_size % self.patch_size:
            raise ValueError(f"images of {self.image_size} pixels a side are no whole patches of {self.patch_size}")
        if self.dim % self.n_heads:
            raise ValueError(f"{self.n_heads} heads do not share a width of {self.dim} evenly")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {list(ACTIVATIONS)}")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}

# CLIP's towers.
TOWERS = {
    #                      image patch  C  layers heads hidden
    "ViT-B/32": ViTConfig(224, 32, 768, 12, 12, 3072),
    "ViT-B/16": ViTConfig(224, 16, 768, 12, 12, 3072),
    "ViT-L/14": ViTConfig(224, 14, 1024, 24, 16, 4096),
    "ViT-L/14@336": ViTConfig(336, 14, 1024, 24, 16, 4096),
}


class SelfAttention(nn.Module):
    """Of all tokens to all, with biases."""

    def __init__(self, dim: int, n_heads: int, gated: Callable[..., Tensor]):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.gated = gated

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:  # (B, T, C)
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))  # (B, H, T, D)
        if prompt is None:
            output = attend(q, k, v)
        else:
            prompt_k, prompt_v = self.heads(self.wk(prompt.tokens)), self.heads(self.wv(prompt.tokens))
            output = self.gated(q, k, v, prompt_k, prompt_v, prompt.gate)
        return self.wo(output.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Norms come first ("pre-norm")."""

    def __init__(self, config: ViTConfig, gated: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config.dim, config.n_heads, gated)
        self.ffn_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.w1 = nn.Linear(config.dim, config.hidden_dim)
        self.w2 = nn.Linear(config.hidden_dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:  # (B, T, C)
        x = x + self.attention(self.attention_norm(x), prompt)
        return x + self.w2(self.activation(self.w1(self.ffn_norm(x))))


class ViT(nn.Module):
    """CLIP's vision tower (Radford et al., 2021): a class token and an image's patches, with learned positions."""

    def __init__(self, config: ViTConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        C, P = config.dim, config.patch_size
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(C) * C**-0.5)
        self.positions = nn.Parameter(torch.randn(1 + (config.image_size // P) ** 2, C) * C**-0.5)  # (T, C)
        self.embedding_norm = nn.LayerNorm(C, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(C, config.norm_eps)

    def forward(self, images: Tensor, prompts: Sequence[Prompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for normalised images (B, 3, S, S); the class token is first.

        `norm` is for the last layer's class token, and is left to whoever wants it. The last len(prompts) layers get
        them.
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, T - 1, C)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.embedding_norm(torch.cat([first, patches], dim=1) + self.positions)
        states, first_adapted = [], len(self.layers) - len(prompts)
        for i, layer in enumerate(self.layers):
            x = layer(x, prompts[i - first_adapted] if i >= first_adapted else None)
            states.append(x)
        return states


# ---------------------------------------------------------------------------------------------------
# Reading CLIP's towers

# Our names, and theirs; what config.json leaves out has the same default here and there.
CONFIG = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
HUGGING_FACE = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding.": "embeddings.patch_embedding.",
    "positions": "embeddings.position_embedding.weight",
    "embedding_norm.": "pre_layrnorm.",
    "layers.": "encoder.layers.",
    "attention_norm.": "layer_norm1.",
    "ffn_norm.": "layer_norm2.",
    "attention.wq.": "self_attn.q_proj.",
    "attention.wk.": "self_attn.k_proj.",
    "attention.wv.": "self_attn.v_proj.",
    "attention.wo.": "self_attn.out_proj.",
    "w1.": "mlp.fc1.",
    "w2.": "mlp.fc2.",
    "norm.": "post_layernorm.",
}
OPENAI = {
    "patch_embedding.": "conv1.",
    "positions": "positional_embedding",
    "embedding_norm.": "ln_pre.",
    "layers.": "transformer.resblocks.",
    "attention_norm.": "ln_1.",
    "ffn_norm.": "ln_2.",
    "attention.wo.": "attn.out_proj.",
    "w1.": "mlp.c_fc.",
    "w2.": "mlp.c_proj.",
    "norm.": "ln_post.",
}


def load_vit(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> ViT:
    """CLIP's vision tower, frozen: of a Hugging Face folder (config.json and weights), or of OpenAI's state dict (.pt).

    Raises FileNotFoundError or ValueError, in one line that names the file and both numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such vision tower")
    config, fetch = read_hugging_face(path) if path.is_dir() else read_openai(path)
    with torch.device("meta"):
        model = ViT(config)
    weights = {}
    for name, parameter in model.named_parameters():
        try:
            weights[name] = filled(
                parameter, lambda target: copy(fetch(name), target), f"{path}: {name}", dtype, device
            )
        except KeyError as error:
            raise ValueError(f"{path}: has no weight {error}") from None
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def save_vit(model: ViT, folder: Path) -> None:
    """Write a tower as Hugging Face's CLIPVisionModel: model.safetensors, then config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {renamed(name, HUGGING_FACE): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    values = {"model_type": "clip_vision_model"}
    values |= {theirs: getattr(model.config, ours) for ours, theirs in CONFIG.items()}
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_hugging_face(folder: Path) -> tuple[ViTConfig, Callable[[str], Tensor]]:
    """Of CLIPModel or CLIPVisionModel."""
    file = folder / "config.json"
    values = read_json(file)
    with named(file):
        if values.get("model_type") not in ("clip", "clip_vision_model"):
            raise ValueError(f"model_type is {values.get('model_type')!r}; only CLIP's vision towers are supported")
        values = values.get("vision_config", values)
        config = ViTConfig(**{ours: values[theirs] for ours, theirs in CONFIG.items() if theirs in values})
    tensors = open_shards(folder)
    whole = "vision_model." if "vision_model.post_layernorm.weight" in tensors else ""

    def fetch(name: str) -> Tensor:
        return tensors[whole + renamed(name, HUGGING_FACE)]()

    return config, fetch


def read_openai(file: Path) -> tuple[ViTConfig, Callable[[str], Tensor]]:
    """What `torch.save(model.state_dict())` wrote, of the whole CLIP or its vision tower; heads are 64 wide."""
    try:
        tensors = load_pth(file)
    except ValueError as error:
        if "TorchScript" not in str(error):
            raise
        weights = f"torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), 'weights.pt')"
        raise ValueError(f"{file}: is a program, as OpenAI offers it; give its weights alone: {weights}") from None
    whole = "visual." if "visual.conv1.weight" in tensors else ""
    tensors = {name.removeprefix(whole): tensor for name, tensor in tensors.items() if name.startswith(whole)}
    with named(file):
        for name in ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"):
            check_dense(tensors[name])
        C, _, P, _ = tensors["conv1.weight"].shape
        config = ViTConfig(
            image_size=round((len(tensors["positional_embedding"]) - 1) ** 0.5) * P,
            patch_size=P,
            dim=C,
            n_layers=len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}),
            n_heads=max(1, C // 64),
            hidden_dim=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        )

    def fetch(name: str) -> Tensor:
        for i, projection in enumerate(("wq", "wk", "wv")):  # one matrix has all three
            part, found, kind = name.partition(f".attention.{projection}.")
            if found:
                return tensors[f"{renamed(part, OPENAI)}.attn.in_proj_{kind}"].chunk(3)[i]
        return tensors[renamed(name, OPENAI)]

    return config, fetch


def renamed(name: str, names: dict[str, str]) -> str:
    """Part by part: "layers.3.w1.bias" has the parts "layers", "w1" and "bias"."""
    for ours, theirs in names.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(ours)}", theirs, name)
    return name
