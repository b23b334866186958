"""Reading encoders in the layouts they come in, and writing those that are trained here."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapter import gated_attention
from runtime.files import atomic_write
from formats.bases import check_dense, copy, filled, load_pth, named, open_shards, read_json
from encoders.heads import make_head
from encoders.roberta import Roberta, RobertaConfig
from encoders.vit import ViT, ViTConfig

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
    save_as(model, folder, CLIP, SHAPE, {"model_type": "clip_vision_model"})


def save_roberta(model: Roberta, folder: Path) -> None:
    """Write an encoder as Hugging Face's RobertaModel: model.safetensors, then config.json."""
    shape = {ours: theirs for ours, theirs in (SHAPE | VOCABULARY).items() if hasattr(model.config, ours)}
    save_as(model, folder, ROBERTA, shape, {"model_type": "roberta", "type_vocab_size": 1})


def save_as(model: ViT | Roberta, folder: Path, names: dict[str, str], shape: dict[str, str], values: dict) -> None:
    """The weights and the shape by their names of others; `values` are what else config.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {renamed(name, names): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    values = values | {theirs: getattr(model.config, ours) for ours, theirs in shape.items()}
    with atomic_write(folder / "config.json") as temporary:
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
        return unbatched(name, tensors[prefix + renamed(name, names)]())

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
        return unbatched(name, theirs(name))

    def unused() -> list[str]:
        return sorted(name for name in tensors if name.startswith(names["layers."]) and name not in used)

    return Source(config, fetch, unused, head, "gelu")


def unbatched(name: str, tensor: Tensor) -> Tensor:
    """Class token (C,) and positions (T, C), which others keep as (1, 1, C) and (1, T, C)."""
    if name in ("class_embedding", "positions") and tensor.dim() == 3:
        return tensor[0, 0] if name == "class_embedding" else tensor[0]
    return tensor


def renamed(name: str, names: dict[str, str]) -> str:
    """Part by part: "layers.3.w1.bias" has the parts "layers", "w1" and "bias"."""
    for ours, theirs in names.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(ours)}", theirs, name)
    return name
