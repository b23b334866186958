"""Load encoders from third-party layouts, and save encoders in Hugging Face's layout."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import gated_attention
from encoders.models import make_mlp
from encoders.models import RESAMPLES, Roberta, RobertaConfig, ViT, ViTConfig
from formats.tensors import (
    check_layers,
    copy,
    download_hint,
    frozen_parameter,
    prefix_errors,
    open_shards,
    open_tensors,
    require_dense,
)
from runtime.cli import warn
from runtime.distributed import rank
from runtime.files import read_json_object, write_json, write_tensors
from runtime.schema import brief, require_number


def columns(table: str) -> list[dict[str, str]]:
    """Parse a table into one dict per column except the first, which contains the keys. "-" marks a missing entry."""
    rows = [line.split() for line in table.strip().splitlines()]
    return [{row[0]: row[i] for row in rows if row[i] != "-"} for i in range(1, len(rows[0]))]


# Parts of parameter names in this project, and the corresponding parts in Hugging Face's CLIP, OpenAI's CLIP, timm, and
# the first versions of vit-pytorch. The second table is for Hugging Face's ViT and RoBERTa.
CLIP, OPENAI, TIMM, VIT_PYTORCH = columns("""
    class_embedding  embeddings.class_embedding           class_embedding        cls_token         cls_token
    patch_embedding. embeddings.patch_embedding.          conv1.                 patch_embed.proj. patch_to_embedding.
    positions        embeddings.position_embedding.weight positional_embedding   pos_embed         pos_embedding
    embedding_norm.  pre_layrnorm.                        ln_pre.                -                 -
    layers.          encoder.layers.                      transformer.resblocks. blocks.           transformer.layers.
    attention_norm.  layer_norm1.                         ln_1.                  norm1.            0.fn.norm.
    ffn_norm.        layer_norm2.                         ln_2.                  norm2.            1.fn.norm.
    attention.wq.    self_attn.q_proj.                    -                      -                 -
    attention.wk.    self_attn.k_proj.                    -                      -                 -
    attention.wv.    self_attn.v_proj.                    -                      -                 -
    attention.qkv.   -                                    attn.in_proj_          attn.qkv.         0.fn.fn.to_qkv.
    attention.wo.    self_attn.out_proj.                  attn.out_proj.         attn.proj.        0.fn.fn.to_out.
    w1.              mlp.fc1.                             mlp.c_fc.              mlp.fc1.          1.fn.fn.net.0.
    w2.              mlp.fc2.                             mlp.c_proj.            mlp.fc2.          1.fn.fn.net.2.
    norm.            post_layernorm.                      ln_post.               -                 -
""")
HUGGING_FACE_VIT, ROBERTA = columns("""
    class_embedding  embeddings.cls_token                    -
    patch_embedding. embeddings.patch_embeddings.projection. -
    tok_embeddings.  -                                       embeddings.word_embeddings.
    positions        embeddings.position_embeddings          embeddings.position_embeddings
    types.           -                                       embeddings.token_type_embeddings.
    embedding_norm.  -                                       embeddings.LayerNorm.
    layers.          encoder.layer.                          encoder.layer.
    attention_norm.  layernorm_before.                       attention.output.LayerNorm.
    ffn_norm.        layernorm_after.                        output.LayerNorm.
    attention.wq.    attention.attention.query.              attention.self.query.
    attention.wk.    attention.attention.key.                attention.self.key.
    attention.wv.    attention.attention.value.              attention.self.value.
    attention.wo.    attention.output.dense.                 attention.output.dense.
    w1.              intermediate.dense.                     intermediate.dense.
    w2.              output.dense.                           output.dense.
    norm.            layernorm.                              -
""")
# Fields of ViTConfig and RobertaConfig, and their names in config.json. A field that config.json does not contain has
# the default of its class; for "vit", `read_folder` sets other defaults.
CONFIG_NAMES = dict(
    pair.split("=")
    for pair in """
        image_size=image_size patch_size=patch_size vocab_size=vocab_size max_positions=max_position_embeddings
        pad_id=pad_token_id dim=hidden_size n_layers=num_hidden_layers n_heads=num_attention_heads
        hidden_dim=intermediate_size norm_eps=layer_norm_eps activation=hidden_act
    """.split()
)
HUGGING_FACE = {  # keyed by model_type: configuration class, names, and their prefix within a larger model
    "clip": (ViTConfig, CLIP, "vision_model."),
    "clip_vision_model": (ViTConfig, CLIP, "vision_model."),
    "vit": (ViTConfig, HUGGING_FACE_VIT, "vit."),
    "roberta": (RobertaConfig, ROBERTA, "roberta."),
}
HALF = (0.5, 0.5, 0.5)  # default mean and standard deviation of pixels
# Fields of ViTConfig in which all other vision transformers differ from CLIP.
NOT_CLIP = {"clip": False, "squeezed": True, "resample": "bilinear"}

Tensors = dict[str, Callable[[], Tensor]]  # functions that read the tensors, keyed by their names in a file


@dataclass
class Source:
    """An encoder in a file: its configuration, and its tensors with their names in the file."""

    config: ViTConfig | RobertaConfig
    tensors: Tensors
    names: dict[str, str]  # maps parts of names in this project to those in the file
    prefix: str = ""  # beginning of all names in the file
    head: Sequence[str] = ()  # names of the linear layers of the head
    head_activation: str = "tanh"
    used: set[str] = field(default_factory=set)  # names of the tensors that were fetched

    def fetch(self, name: str) -> Tensor:
        """Return the tensor that has this name in this project, and add its name in the file to `used`.

        Raises KeyError if it is missing, or ValueError if it is not a dense floating-point tensor.
        """
        packed = re.search(r"(?<=attention\.w)[qkv](?=\.)", name) if "attention.qkv." in self.names else None
        theirs = self.prefix + renamed(name.replace(f"w{packed[0]}.", "qkv.") if packed else name, self.names)
        self.used.add(theirs)
        tensor = require_dense(self.tensors[theirs]())
        if packed:
            return tensor.tensor_split(3)["qkv".index(packed[0])]  # one matrix contains q, k and v
        if name in ("class_embedding", "positions") and tensor.dim() == 3:  # (1, 1, C) and (1, T, C)
            return tensor.reshape(tensor.shape[2 if name == "class_embedding" else 1 :])
        return tensor


class VitPytorch(Source):
    """An encoder of vit-pytorch's first versions.

    They flatten patches row by row with the channels innermost, have no biases for q, k and v, and divide attention
    scores by sqrt(C) instead of sqrt(D).
    """

    def fetch(self, name: str) -> Tensor:
        config = self.config
        if re.search(r"attention\.w[qkv]\.bias", name):
            return torch.zeros(config.dim)
        tensor = super().fetch(name)
        if name == "patch_embedding.weight":  # (C, P * P * channels)
            return tensor.view(-1, config.patch_size, config.patch_size, config.channels).permute(0, 3, 1, 2)
        return tensor * config.n_heads**-0.5 if name.endswith("attention.wq.weight") else tensor


def load_encoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
) -> tuple[ViT | Roberta, nn.Sequential | None]:
    """Load a frozen encoder and its head, which is trainable and in float32, or None if the file has no head.

    `path` is a Hugging Face folder (config.json and weights) of CLIP, ViT or RoBERTa, a timm folder, or the file of a
    state dict from OpenAI's CLIP, open_clip, timm, or the first versions of vit-pytorch. Raises FileNotFoundError or
    ValueError, with a one-line message that names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such encoder{download_hint(path)}")
    source = read_folder(path) if path.is_dir() else read_state_dict(open_tensors(path), path)
    layers = source.prefix + source.names["layers."]
    check_layers(path, source.tensors, layers, source.config.n_layers)
    with torch.device("meta"):
        model = (ViT if isinstance(source.config, ViTConfig) else Roberta)(source.config, attention)
    load_parameters(model, source.fetch, path, dtype, device)
    unused = sorted(name for name in source.tensors if name.startswith(layers) and name not in source.used)
    if unused:
        raise ValueError(
            f"{path}: has unknown weights in its layers, such as {unused[0]}; this architecture is not supported"
        )
    return model.requires_grad_(False), read_head(source, path, device) if source.head else None


def read_head(source: Source, path: Path, device: torch.device | str) -> nn.Sequential:
    """Read the head, trainable and in float32. Raises ValueError if its weights are missing or invalid."""
    names = dict(zip(("0", "2"), source.head))  # names of the linear layers, keyed by index in the head
    with prefix_errors(path, "weight"):
        weights = [require_dense(source.tensors[f"{name}.weight"]()) for name in source.head]
        if any(weight.dim() != 2 or 0 in weight.shape for weight in weights):
            shapes = [tuple(weight.shape) for weight in weights]
            raise ValueError(f"the weights of the head have shapes {shapes}; expected non-empty matrices")
        widths = [source.config.dim, *map(len, weights)]
    head = make_mlp(widths, source.head_activation)
    where = f"{path}: the head"
    load_parameters(head, lambda name: source.tensors[names[name[0]] + name[1:]](), where, torch.float32, device)
    return head.requires_grad_(True)


def head_labels(folder: Path) -> list[str]:
    """Return the labels of the head in a Hugging Face folder, in the order of its outputs.

    Returns [] if there is no config.json, or if its id2label is missing or invalid. Raises ValueError if the file
    cannot be read.
    """
    file = folder / "config.json"
    labels = read_json_object(file).get("id2label") if file.is_file() else None
    names = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else []
    return names if all(isinstance(name, str) for name in names) else []


def load_vit(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> ViT:
    """Load CLIP's vision encoder, frozen. Raises as `load_encoder` does, and ValueError for any other encoder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such vision encoder{download_hint(path)}")
    model, _ = load_encoder(path, dtype, device)
    if not isinstance(model, ViT) or not model.config.clip:
        raise ValueError(f"{path}: is not a CLIP vision encoder; expected one from Hugging Face, OpenAI or open_clip")
    return model


def load_parameters(
    model: nn.Module, fetch: Callable[[str], Tensor], where: str | Path, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Replace every parameter of a model with the tensor that `fetch` returns for its name, frozen, in `dtype`.

    Raises ValueError if a weight is missing, has the wrong shape, or is not finite. Messages begin with `where`.
    """
    weights = {}
    with prefix_errors(where, "weight"):
        for name, parameter in model.named_parameters():
            weights[name] = frozen_parameter(
                parameter, lambda target, name=name: copy(fetch(name), target), name, dtype, device
            )
    model.load_state_dict(weights, assign=True)


def save_encoder(model: ViT | Roberta, folder: Path) -> None:
    """Write config.json and model.safetensors of Hugging Face's CLIPVisionModel or RobertaModel into `folder`.

    A ViT must have CLIP's architecture. Its preprocessing is not written.
    """
    names, values = ROBERTA, {"model_type": "roberta", "type_vocab_size": 1}
    if isinstance(model, ViT):
        names, values = CLIP, {"model_type": "clip_vision_model"}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {renamed(name, names): tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    dimensions = {
        theirs: getattr(model.config, ours) for ours, theirs in CONFIG_NAMES.items() if hasattr(model.config, ours)
    }
    write_json(folder / "config.json", values | dimensions, indent=2)


def read_folder(folder: Path) -> Source:
    """Read a folder of timm, or of Hugging Face's CLIPModel, CLIPVisionModel, ViT... or Roberta... classes.

    Raises OSError, or ValueError if the encoder is not supported.
    """
    file = folder / "config.json"
    values = read_json_object(file)
    if values.get("model_type") is None and "architecture" in values:  # timm
        found = [values.get(name) for name in ("pretrained_cfg", "model_args")]
        return read_state_dict(open_shards(folder), file, *(each if isinstance(each, dict) else {} for each in found))
    with prefix_errors(file):
        kind = values.get("model_type")
        if str(kind) not in HUGGING_FACE:
            raise ValueError(f"model_type is {kind!r}; expected 'clip', 'clip_vision_model', 'vit' or 'roberta'")
        config_class, names, prefix = HUGGING_FACE[kind]
        values = values.get("vision_config", values)  # a complete CLIP
        if not isinstance(values, dict):
            raise ValueError(f"vision_config is {brief(values)}, not an object")
        dimensions = {
            f.name: values[CONFIG_NAMES[f.name]] for f in fields(config_class) if CONFIG_NAMES.get(f.name) in values
        }
        if kind == "vit":
            channels = values.get("num_channels", 3)
            half = HALF if channels == 3 else HALF[:1]
            dimensions = {"patch_size": 16, "activation": "gelu", "norm_eps": 1e-12} | dimensions
            dimensions |= {"channels": channels, "mean": half, "std": half} | NOT_CLIP
        config = config_class(**dimensions)
    if isinstance(config, ViTConfig):
        config = with_preprocessing(config, folder)
    tensors = open_shards(folder)
    prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    heads = (["classifier.dense", "classifier.out_proj"], ["classifier"], ["qa_outputs"])
    head = next((head for head in heads if f"{head[0]}.weight" in tensors), ())
    return Source(config, tensors, names, prefix, head)


def with_preprocessing(config: ViTConfig, folder: Path) -> ViTConfig:
    """Return the configuration with the preprocessing that a Hugging Face folder specifies, if any.

    Raises ValueError if the preprocessing is not supported.
    """
    file = folder / "processor_config.json"  # written by transformers 5 for multimodal models
    values = read_json_object(file).get("image_processor") if file.exists() else None
    if values is None:
        file = folder / "preprocessor_config.json"
        values = read_json_object(file) if file.exists() else {}
    S, channels = config.image_size, config.channels
    with prefix_errors(file):
        if not isinstance(values, dict):
            raise ValueError(f"image_processor is {brief(values)}, not an object")
        for step in ("do_resize", "do_rescale"):
            if not values.get(step, True):
                raise ValueError(f"{step} is {brief(values[step])}; only true is supported")
        factor = values.get("rescale_factor", 1 / 255)
        if not isinstance(factor, float) or abs(255 * factor - 1) > 1e-4:
            raise ValueError(f"rescale_factor is {factor!r}; only 1/255 is supported")
        number = values.get("resample", RESAMPLES[config.resample])
        resample = next((name for name in RESAMPLES if RESAMPLES[name] == number), None)
        if resample is None:
            raise ValueError(f"resample is {number!r}; only 2 (bilinear) and 3 (bicubic) are supported")

        size = values.get("size", S)
        squeezed = "height" in size if isinstance(size, dict) else config.squeezed
        resized = side_length("size", size, ("height", "width") if squeezed else ("shortest_edge",))
        is_cropped = values.get("do_center_crop", config.clip)
        if is_cropped and side_length("crop_size", values.get("crop_size", S), ("height", "width")) != S:
            raise ValueError(f"crop_size is {values['crop_size']!r}, but the encoder's image_size is {S}")
        if not is_cropped and not (squeezed and resized == S):
            raise ValueError(f"size is {size!r} without do_center_crop; expected height and width {S}, the image_size")

        mean, std = (0.0,) * channels, (1.0,) * channels
        if values.get("do_normalize", True):
            mean = require_numbers(values.get("image_mean", config.mean), "mean")
            std = require_numbers(values.get("image_std", config.std), "std")
        resized = None if resized == S else resized
        return replace(config, mean=mean, std=std, squeezed=squeezed, resized=resized, resample=resample)


def side_length(name: str, size: object, keys: Sequence[str]) -> object:
    """Return the side length in pixels. `size` is a number, or a dict with the same number under all `keys`.

    Raises ValueError for any other dict. A value that is not a dict is returned unchecked.
    """
    if not isinstance(size, dict):
        return size
    if set(size) != set(keys) or len({repr(length) for length in size.values()}) != 1:
        expected = f"an object with only {' and '.join(keys)}" + ", which must be equal" * (len(keys) > 1)
        raise ValueError(f"{name} is {size!r}; expected an integer, or {expected}")
    return size[keys[0]]


def require_numbers(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"the {name} of the pixels is {values!r}; expected a list of numbers")
    return tuple(values)


def read_state_dict(tensors: Tensors, file: Path, pixels: dict | None = None, args: dict | None = None) -> Source:
    """Read an encoder from a state dict. The names of its tensors identify the implementation that wrote it.

    The tensors do not determine the whole configuration: for example, heads are assumed to be 64 wide, or 8 in number
    for vit-pytorch. Such defaults are overridden by `pixels` and `args`, the `pretrained_cfg` and `model_args` of a
    timm folder, and by an open_clip_config.json beside `file`. Raises ValueError if the encoder is not supported.
    """
    is_openai = {"input_resolution", "context_length"} <= set(tensors)  # open_clip has neither
    prefix = "visual." if "visual.conv1.weight" in tensors else ""  # in a complete CLIP of OpenAI or open_clip
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    kind, head, settings = Source, (), {"activation": "gelu"} | NOT_CLIP
    with prefix_errors(file, "weight"):
        if "conv1.weight" in tensors:
            names, settings = OPENAI, {}
        elif "patch_embed.proj.weight" in tensors:
            names, head = TIMM, ["head"] if "head.weight" in tensors else ()
            settings |= {name: require_numbers((pixels or {}).get(name, HALF), name) for name in ("mean", "std")}
            settings |= {"norm_eps": 1e-6} | timm_settings(args or {})
        elif "patch_to_embedding.weight" in tensors:
            kind, names, head = VitPytorch, VIT_PYTORCH, ["mlp_head.0", "mlp_head.2"]
            settings |= {"final_norm": False, "n_heads": 8}  # the default of vit-pytorch
        else:
            expected = "expected a vision transformer of OpenAI's CLIP, open_clip, timm or vit-pytorch"
            raise ValueError(
                f"the architecture of the weights is unknown; {expected}; for Hugging Face, give the folder"
            )

        parts = ("patch_embedding.weight", "positions", "layers.0.w1.weight")
        shapes = [tuple(require_dense(tensors[renamed(part, names)]()).shape) for part in parts]
        if len(shapes[0]) not in (2, 4) or len(shapes[1]) < 2 or len(shapes[2]) != 2:
            expected = "expected 2 or 4, at least 2, and 2 dimensions"
            raise ValueError(f"the patch embedding, positions and feed-forward have the shapes {shapes}; {expected}")
        patches, (*_, T, _), (hidden_dim, _) = shapes
        if kind is VitPytorch:
            C, per_patch = patches
            channels = 1 if (per_patch**0.5).is_integer() else 3
            P = round((per_patch / channels) ** 0.5)
            if channels * P * P != per_patch:
                raise ValueError(f"has patches of {per_patch} values; expected square patches of 1 or 3 channels")
            if channels == 1:  # statistics of MNIST
                settings |= {"mean": (0.1307,), "std": (0.3081,)}
        else:
            C, channels, P, _ = patches
        if names is OPENAI and not is_openai:
            settings = open_clip_settings(file.parent / "open_clip_config.json", C)
        layers = [re.match(rf"{re.escape(names['layers.'])}(\d+)\.", name) for name in tensors]
        dimensions = {"dim": C, "patch_size": P, "channels": channels, "hidden_dim": hidden_dim}
        dimensions |= {"image_size": round((T - 1) ** 0.5) * P, "n_heads": max(1, C // 64)}
        config = ViTConfig(n_layers=len({match[1] for match in layers if match}), **dimensions | settings)
    return kind(config, tensors, names, head=head, head_activation="gelu")


OPEN_CLIP_WIDTHS = (1280, 1408, 1664)  # ViT-H/14, g/14 and bigG/14, whose heads are 80, 88 and 104 wide


def open_clip_settings(file: Path, dim: int) -> dict[str, object]:
    """Return the fields of ViTConfig that open_clip_config.json specifies for an encoder of width `dim`.

    If the file does not exist, the encoder is assumed to be OpenAI's: a warning says so, and the dict is empty. Raises
    ValueError if the file does not exist and only open_clip has encoders of this width, or if the file contains a
    setting that is not supported.
    """
    if not file.exists():
        needed = f"an encoder of open_clip needs its {file.name} in the same folder"
        if dim in OPEN_CLIP_WIDTHS:
            raise ValueError(f"has width {dim}, which only encoders of open_clip have; {needed}")
        if rank() == 0:
            warn(f"the vision encoder is assumed to be OpenAI's, with QuickGELU and heads 64 wide; {needed}")
        return {}
    values = read_json_object(file)
    with prefix_errors(file.name):
        model, pixels = values.get("model_cfg"), values.get("preprocess_cfg", {})
        vision = model.get("vision_cfg") if isinstance(model, dict) else None
        if not isinstance(vision, dict) or not isinstance(pixels, dict):
            raise ValueError(
                f"{'preprocess_cfg' if isinstance(vision, dict) else 'model_cfg.vision_cfg'} "
                f"is missing or not an object"
            )
        for name in ("timm_model_name", "act_kwargs", "norm_kwargs"):
            if vision.get(name):
                raise ValueError(f"vision_cfg has {name}, which is not supported")
        head_width = vision.get("head_width", 64)
        require_number("head_width", head_width, 1, dim, whole=True)
        if vision.get("width", dim) != dim or dim % head_width:
            raise ValueError(
                f"width is {vision.get('width', dim)} and head_width is {head_width}, but the weights have width "
                f"{dim}, which must be a multiple of head_width"
            )
        interpolation = pixels.get("interpolation", "bicubic")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {interpolation!r}; only 'bilinear' and 'bicubic' are supported")
        mode = pixels.get("resize_mode", "shortest")
        if mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode is {mode!r}; only 'shortest' and 'squash' are supported")
        settings = {name: require_numbers(pixels[name], name) for name in ("mean", "std") if name in pixels}
        settings |= {"n_heads": dim // head_width, "activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        return settings | {"squeezed": mode == "squash", "resample": interpolation}


def timm_settings(args: dict) -> dict[str, float]:
    """Return the fields of ViTConfig that timm's `num_heads` and `norm_eps` specify, if present in `args`.

    Raises ValueError if a value is invalid.
    """
    found = {}
    if "num_heads" in args:
        require_number("model_args' num_heads", args["num_heads"], 1, 2**16, whole=True)
        found["n_heads"] = args["num_heads"]
    if "norm_eps" in args:
        require_number("model_args' norm_eps", args["norm_eps"], 1e-12, 1e-2)
        found["norm_eps"] = args["norm_eps"]
    return found


def renamed(name: str, names: dict[str, str]) -> str:
    """Translate the name of a parameter in this project into its name in a file.

    `names` maps parts of names, such as "layers." or "attention.wq.", to those in the file. A part is replaced only
    where no letter or underscore precedes it: "norm." does not match in "ffn_norm.". Other text is kept.
    """
    for ours, theirs in names.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(ours)}", theirs, name)
    return name
