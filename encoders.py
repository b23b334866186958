"""Frozen encoders: the vision transformer, of which CLIP's tower is one, and RoBERTa. Notation as in adapter.py.

They look in both directions, and take prompts as LLaMA does: in the topmost layers, every token sees them all.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adapter import Prompt, attend, gated_attention, replacing
from checkpoints import check_dense, copy, filled, load_pth, named, open_shards, read_json


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


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa; the defaults are those of roberta-base.

    Raises ValueError where the numbers make no model.
    """

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
        check_shape(self, ("vocab_size", "max_positions", "dim", "n_layers", "n_heads", "hidden_dim"))
        if self.pad_id != 1:
            raise ValueError(f"pad_id is {self.pad_id!r}, RoBERTa's is 1")
        if self.max_length < 1:
            raise ValueError(f"{self.max_positions} positions leave none for words")

    @property
    def max_length(self) -> int:
        """So many tokens it can read: positions count from pad_id + 1."""
        return self.max_positions - self.pad_id - 1


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

    def __init__(self, config: ViTConfig | RobertaConfig, norm_first: bool, gated: Callable[..., Tensor]):
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


def through(layers: nn.ModuleList, x: Tensor, prompts: Sequence[Prompt], mask: Tensor | None = None) -> list[Tensor]:
    """What every layer puts out, N times (B, T, C), for x (B, T, C); the last len(prompts) layers get them."""
    states, first_adapted = [], len(layers) - len(prompts)
    for i, layer in enumerate(layers):
        x = layer(x, prompts[i - first_adapted] if i >= first_adapted else None, mask)
        states.append(x)
    return states


class ViT(nn.Module):
    """A class token and an image's patches, with learned positions (Dosovitskiy et al., 2021)."""

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
        return through(self.layers, x, prompts)

    def encode(self, images: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self.norm(self(images, prompts)[-1])


class Roberta(nn.Module):
    """Words, with learned positions (Liu et al., 2019). The first is <s>; a batch is padded to the right."""

    def __init__(self, config: RobertaConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(1, config.dim)  # one alone, added to all: BERT's two kinds of sentence are gone
        self.embedding_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, False, attention) for _ in range(config.n_layers))

    def forward(self, ids: Tensor, prompts: Sequence[Prompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for ids (B, T). Padding is seen by none; what comes of it is
        of no account."""
        word = ids != self.config.pad_id  # (B, T)
        positions = word.cumsum(dim=1) * word + self.config.pad_id  # of words from pad_id + 1 on, of padding pad_id
        x = self.embedding_norm(self.words(ids) + self.positions(positions) + self.types.weight[0])
        return through(self.layers, x, prompts, word[:, None, None])  # the mask broadcasts to (B, H, T, T)

    def encode(self, ids: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self(ids, prompts)[-1]


def make_head(widths: Sequence[int], activation: str, generator: torch.Generator | None = None) -> nn.Sequential:
    """Linear layers from the width of an encoder to the number of classes, with an activation between any two."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        linear = nn.Linear(before, after)
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -(before**-0.5), before**-0.5, generator=generator)
        layers += [linear, HEAD_ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


HEAD_ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU}

# ---------------------------------------------------------------------------------------------------
# Reading encoders

# Our names, part by part, and theirs.
CLIP = {
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
    "attention.qkv.": "attn.in_proj_",
    "attention.wo.": "attn.out_proj.",
    "w1.": "mlp.c_fc.",
    "w2.": "mlp.c_proj.",
    "norm.": "ln_post.",
}
HUGGING_FACE_VIT = {
    "class_embedding": "embeddings.cls_token",
    "patch_embedding.": "embeddings.patch_embeddings.projection.",
    "positions": "embeddings.position_embeddings",
    "layers.": "encoder.layer.",
    "attention_norm.": "layernorm_before.",
    "ffn_norm.": "layernorm_after.",
    "attention.wq.": "attention.attention.query.",
    "attention.wk.": "attention.attention.key.",
    "attention.wv.": "attention.attention.value.",
    "attention.wo.": "attention.output.dense.",
    "w1.": "intermediate.dense.",
    "w2.": "output.dense.",
    "norm.": "layernorm.",
}
TIMM = {
    "class_embedding": "cls_token",
    "patch_embedding.": "patch_embed.proj.",
    "positions": "pos_embed",
    "layers.": "blocks.",
    "attention_norm.": "norm1.",
    "ffn_norm.": "norm2.",
    "attention.qkv.": "attn.qkv.",
    "attention.wo.": "attn.proj.",
    "w1.": "mlp.fc1.",
    "w2.": "mlp.fc2.",
}
VIT_PYTORCH = {  # of its first versions
    "class_embedding": "cls_token",
    "patch_embedding.": "patch_to_embedding.",
    "positions": "pos_embedding",
    "layers.": "transformer.layers.",
    "attention_norm.": "0.fn.norm.",
    "ffn_norm.": "1.fn.norm.",
    "attention.qkv.": "0.fn.fn.to_qkv.",
    "attention.wo.": "0.fn.fn.to_out.",
    "w1.": "1.fn.fn.net.0.",
    "w2.": "1.fn.fn.net.2.",
}
ROBERTA = {
    "words.": "embeddings.word_embeddings.",
    "positions.": "embeddings.position_embeddings.",
    "types.": "embeddings.token_type_embeddings.",
    "embedding_norm.": "embeddings.LayerNorm.",
    "layers.": "encoder.layer.",
    "attention_norm.": "attention.output.LayerNorm.",
    "ffn_norm.": "output.LayerNorm.",
    "attention.wq.": "attention.self.query.",
    "attention.wk.": "attention.self.key.",
    "attention.wv.": "attention.self.value.",
    "attention.wo.": "attention.output.dense.",
    "w1.": "intermediate.dense.",
    "w2.": "output.dense.",
}

# config.json's names for a shape; what it leaves out has the same default here and there.
SHAPE = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}


VOCABULARY = {"vocab_size": "vocab_size", "max_positions": "max_position_embeddings", "pad_id": "pad_token_id"}


class Source(NamedTuple):
    """An encoder in a file: its shape, its tensors by our names, and those of its head's linear layers by theirs."""

    config: ViTConfig | RobertaConfig
    fetch: Callable[[str], Tensor]
    unused: Callable[[], list[str]]  # tensors of layers that were not fetched
    head: Sequence[str] = ()
    head_activation: str = "tanh"


def load_encoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
) -> tuple[ViT | Roberta, nn.Sequential | None]:
    """An encoder, frozen, and the head that was trained on it, if it has one, not frozen and in float32.

    A Hugging Face folder (config.json and weights) of CLIP, ViT or RoBERTa, a timm folder, or a state dict in a file,
    with OpenAI's names of CLIP, timm's, or those of vit-pytorch's first versions. Raises FileNotFoundError or
    ValueError, in one line that names the file and both numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such encoder")
    source = read_folder(path) if path.is_dir() else read_state_dict(load_weights(path), path)
    with torch.device("meta"):
        model = (ViT if isinstance(source.config, ViTConfig) else Roberta)(source.config, attention)
    fill(model, source.fetch, path, dtype, device)
    left = source.unused()
    if left:
        raise ValueError(f"{path}: has {len(left)} weights that such an encoder has no place for: {left[0]} ...")
    if not source.head:
        return model.requires_grad_(False), None
    try:
        linears = [source.fetch(f"{name}.weight") for name in source.head]
    except KeyError as error:
        raise ValueError(f"{path}: has no weight {error}") from None
    head = make_head([model.config.dim, *map(len, linears)], source.head_activation)
    numbers = dict(zip((0, 2), source.head))
    fill(head, lambda name: source.fetch(f"{numbers[int(name[0])]}{name[1:]}"), path, torch.float32, device)
    return model.requires_grad_(False), head.requires_grad_(True)


def load_vit(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> ViT:
    """CLIP's vision tower, frozen. Raises as `load_encoder` does, and ValueError where it is another encoder."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such vision tower")
    model, _ = load_encoder(path, dtype, device)
    if not isinstance(model, ViT) or not model.config.clip:
        raise ValueError(f"{path}: is no vision tower of CLIP's")
    return model


def fill(
    model: nn.Module, fetch: Callable[[str], Tensor], path: Path, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give every parameter its value. Raises ValueError where it has none, or one of another shape."""
    weights = {}
    for name, parameter in model.named_parameters():
        try:
            weights[name] = filled(
                parameter, lambda target: copy(fetch(name), target), f"{path}: {name}", dtype, device
            )
        except KeyError as error:
            raise ValueError(f"{path}: has no weight {error}") from None
    model.load_state_dict(weights, assign=True)


def save_vit(model: ViT, folder: Path) -> None:
    """Write a tower as Hugging Face's CLIPVisionModel: model.safetensors, then config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {renamed(name, CLIP): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    values = {"model_type": "clip_vision_model"}
    values |= {theirs: getattr(model.config, ours) for ours, theirs in SHAPE.items()}
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def save_roberta(model: Roberta, folder: Path) -> None:
    """Write an encoder as Hugging Face's RobertaModel: model.safetensors, then config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {renamed(name, ROBERTA): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    values = {"model_type": "roberta", "type_vocab_size": 1}
    values |= {
        theirs: getattr(model.config, ours)
        for ours, theirs in (SHAPE | VOCABULARY).items()
        if hasattr(model.config, ours)
    }
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_folder(folder: Path) -> Source:
    """Of Hugging Face's CLIPModel, CLIPVisionModel, ViTFor..., RobertaFor..., or of timm's."""
    file = folder / "config.json"
    values = read_json(file)
    kind = values.get("model_type")
    if kind is None and "architecture" in values:  # timm's
        pixels = values.get("pretrained_cfg") if isinstance(values.get("pretrained_cfg"), dict) else {}
        with named(file):
            pixels = {name: numbers(pixels[name], name) for name in ("mean", "std") if name in pixels}
        return read_state_dict({name: tensor() for name, tensor in open_shards(folder).items()}, file, pixels)
    with named(file):
        if kind not in ("clip", "clip_vision_model", "vit", "roberta"):
            raise ValueError(f"model_type is {kind!r}; only 'clip', 'clip_vision_model', 'vit' and 'roberta' are read")
        values = values.get("vision_config", values)
        shape = {ours: values[theirs] for ours, theirs in SHAPE.items() if theirs in values}
        if kind == "vit":
            image = folder / "preprocessor_config.json"
            pixels = read_json(image) if image.exists() else {}
            channels = values.get("num_channels", 3)
            half = (0.5,) * (channels if channels == 1 else 3)
            defaults = {"patch_size": 16, "activation": "gelu", "norm_eps": 1e-12}
            mean, std = (numbers(pixels.get(f"image_{name}", half), name) for name in ("mean", "std"))
            more = {"channels": channels, "mean": mean, "std": std, "clip": False}
            config, names, prefix = ViTConfig(**defaults | shape | more), HUGGING_FACE_VIT, "vit."
        elif kind == "roberta":
            shape |= {ours: values[theirs] for ours, theirs in VOCABULARY.items() if theirs in values}
            shape = {name: value for name, value in shape.items() if name not in ("image_size", "patch_size")}
            config, names, prefix = RobertaConfig(**shape), ROBERTA, "roberta."
        else:
            config, names, prefix = ViTConfig(**shape), CLIP, "vision_model."
    tensors = open_shards(folder)
    prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    heads = (["classifier.dense", "classifier.out_proj"], ["classifier"], ["qa_outputs"])
    head = next((head for head in heads if f"{head[0]}.weight" in tensors), ())

    used = set()

    def fetch(name: str) -> Tensor:
        if any(name.startswith(f"{part}.") for part in head):
            return tensors[name]()
        used.add(prefix + renamed(name, names))
        tensor = tensors[prefix + renamed(name, names)]()
        if name in ("class_embedding", "positions") and tensor.dim() == 3:
            tensor = tensor[0, 0] if name == "class_embedding" else tensor[0]
        return tensor

    def unused() -> list[str]:
        layers = prefix + names["layers."]
        return sorted(name for name in tensors if name.startswith(layers) and name not in used)

    return Source(config, fetch, unused, head)


def numbers(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"the {name} of pixels is {values!r}, not a list of numbers")
    return tuple(values)


def load_weights(file: Path) -> dict[str, Tensor]:
    """A state dict. Raises ValueError."""
    try:
        return load_pth(file)
    except ValueError as error:
        if "TorchScript" not in str(error):
            raise
        weights = f"torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), 'weights.pt')"
        raise ValueError(f"{file}: is a program, as OpenAI offers it; give its weights alone: {weights}") from None


def read_state_dict(
    tensors: dict[str, Tensor], file: Path, pixels: dict[str, tuple[float, ...]] | None = None
) -> Source:
    """Told apart by its names. What the tensors do not say is as it is with all of its kind: the width of the heads."""
    whole = "visual." if "visual.conv1.weight" in tensors else ""  # OpenAI's, of the whole CLIP
    tensors = {name.removeprefix(whole): tensor for name, tensor in tensors.items() if name.startswith(whole)}
    if "conv1.weight" in tensors:
        names, head, more = OPENAI, (), {}
    elif "patch_embed.proj.weight" in tensors:
        names, head = TIMM, [name for name in ["head"] if "head.weight" in tensors]
        half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        more = {"activation": "gelu", "norm_eps": 1e-6, "clip": False} | half | (pixels or {})
    elif "patch_to_embedding.weight" in tensors:
        names, head = VIT_PYTORCH, ["mlp_head.0", "mlp_head.2"]
        # It has 8 heads by default, and scores q k / sqrt(C), not / sqrt(D).
        more = {"activation": "gelu", "clip": False, "final_norm": False, "n_heads": 8}
    else:
        raise ValueError(f"{file}: is of none of the kinds that are known: CLIP's, timm's and vit-pytorch's weights")

    used = set()

    def theirs(name: str) -> Tensor:
        used.add(renamed(name, names))
        return tensors[renamed(name, names)]

    with named(file):
        patches, first = theirs("patch_embedding.weight"), theirs("layers.0.w1.weight")
        for tensor in (patches, first, theirs("positions")):
            check_dense(tensor)
        if names is VIT_PYTORCH:  # a matrix, of patches that lie row by row, channels innermost
            channels = 1 if (patches.shape[1] ** 0.5).is_integer() else 3
            P = round((patches.shape[1] / channels) ** 0.5)
            if channels * P * P != patches.shape[1]:
                raise ValueError(f"patches of {patches.shape[1]} numbers are no squares")
            patches = patches.view(-1, P, P, channels).permute(0, 3, 1, 2)
            if channels == 1:  # MNIST's
                more |= {"mean": (0.1307,), "std": (0.3081,)}
        C, channels, P, _ = patches.shape
        depth = {
            int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(names['layers.'])}(\d+)\.", name))
        }
        config = ViTConfig(
            **{
                "image_size": round((theirs("positions").shape[-2] - 1) ** 0.5) * P,
                "patch_size": P,
                "dim": C,
                "n_layers": len(depth),
                "n_heads": max(1, C // 64),
                "hidden_dim": len(first),
                "channels": channels,
            }
            | more
        )

    def fetch(name: str) -> Tensor:
        if name in tensors:  # of the head
            return tensors[name]
        if name == "patch_embedding.weight":
            return patches
        for i, projection in enumerate(("wq", "wk", "wv")):  # one matrix has all three
            part, found, kind = name.partition(f".attention.{projection}.")
            if found:
                one = renamed(f"{part}.attention.qkv.{kind}", names)
                if kind == "bias" and names is VIT_PYTORCH:
                    return torch.zeros(C)
                used.add(one)
                tensor = tensors[one].chunk(3)[i]
                return tensor * config.n_heads**-0.5 if names is VIT_PYTORCH and i == 0 else tensor
        tensor = theirs(name)
        if name in ("class_embedding", "positions") and tensor.dim() == 3:
            tensor = tensor[0, 0] if name == "class_embedding" else tensor[0]
        return tensor

    def unused() -> list[str]:
        return sorted(name for name in tensors if name.startswith(names["layers."]) and name not in used)

    return Source(config, fetch, unused, head, "gelu")


def renamed(name: str, names: dict[str, str]) -> str:
    """Part by part: "layers.3.w1.bias" has the parts "layers", "w1" and "bias"."""
    for ours, theirs in names.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(ours)}", theirs, name)
    return name
