"""A frozen LLaMA and its tokenizer, out of whatever layout they come in.

Every reader returns a Config and, under Meta's names, a function for each weight that copies it from its file to where
it belongs. Files are mapped, not read, so that nothing is in memory but the model that is being filled.
"""

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapter import gated_attention
from data import Tokenizer, load_tokenizer
from model import Config, LLaMA, RopeScaling

Weights = dict[str, Callable[[Tensor], None]]


def load_llama(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: Callable[..., Tensor] = gated_attention,
    split: Callable[[nn.Module], None] | None = None,
    opened: tuple[Config, Weights] | None = None,
) -> tuple[LLaMA, Tokenizer]:
    """A frozen LLaMA and its tokenizer. What lies at `path` says how to read it:

    - a folder in Meta's layout: params.json, consolidated.*.pth (one or several), tokenizer.model;
    - a folder in Hugging Face's: config.json, model*.safetensors or pytorch_model*.bin, tokenizer.model;
    - a llama2.c .bin of either float32 layout with tokenizer.model beside it, or the folder of one.

    `split` is called on every layer once it is filled, before the next has any memory, and on the model at the end.
    `opened` is what `read_base` said of the path, where it has been asked before.
    Raises FileNotFoundError or ValueError, in one line that names the file and both numbers.
    """
    path = Path(path)
    config, weights = opened or read_base(path)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: {config.vocab_size} embeddings, but its tokenizer has {tokenizer.vocab_size} tokens")

    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != config.n_layers:
        raise ValueError(f"{path}: has weights of {len(layers)} layers, its configuration says {config.n_layers}")
    with torch.device("meta"):  # names and shapes without memory
        model = LLaMA(config, attention)
    expected = {name for name, _ in model.named_parameters()}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"{path}: has no weight {missing[0]}")
    if unknown := sorted(weights.keys() - expected):
        raise ValueError(f"{path}: has a weight {unknown[0]} that a LLaMA does not have")

    def fill(part: str) -> None:
        for name, parameter in list(model.get_submodule(part).named_parameters(part)):
            owner = model.get_submodule(name.removesuffix(".weight"))
            owner.weight = filled(parameter, weights[name], f"{path}: {name}", dtype, device)

    fill("tok_embeddings")
    for i, block in enumerate(model.layers):
        fill(f"layers.{i}")
        if split is not None:
            split(block)
    fill("norm")
    if weights["output.weight"] is weights["tok_embeddings.weight"]:  # a tied head
        model.output.weight = model.tok_embeddings.weight
    else:
        fill("output")
    if split is not None:
        split(model)
    return model, tokenizer


def filled(
    like: Tensor, write: Callable[[Tensor], None], where: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """A frozen parameter of the shape and layout of another. Raises ValueError, which `where` begins."""
    try:
        target = torch.empty_like(like, dtype=dtype, device=device)
        write(target)
    except (ValueError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{where} {first_line(error)}") from None
    return nn.Parameter(target, requires_grad=False)


def read_base(path: Path) -> tuple[Config, Weights]:
    """What lies at `path`, as of `load_llama`, with nothing read but headers."""
    if not path.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            hint = f"; if Hugging Face has it: `hf download {path} --local-dir {path.name}`, then --base {path.name}"
        raise FileNotFoundError(f"{path}: no such base model{hint}")
    if path.is_file() and (path.suffix in (".safetensors", ".pth", ".json") or zipfile.is_zipfile(path)):
        raise ValueError(f"{path}: is a part of a base model; give its folder, {path.parent}")
    if path.is_file():
        return read_llama2c(path)
    if any(path.glob("consolidated.*.pth")) or (path / "params.json").exists():
        return read_meta(path)
    if any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*")) or (path / "config.json").exists():
        return read_hugging_face(path)
    if len(found := sorted(path.glob("*.bin"))) == 1:
        return read_llama2c(found[0])
    raise ValueError(f"{path}: holds neither params.json, nor config.json, nor one llama2.c .bin")


def check_dense(tensor: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError("is no dense tensor")
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"is of {tensor.dtype}, not of floating-point numbers")


def copy(source: Tensor, target: Tensor) -> None:
    check_dense(source)
    if source.shape != target.shape:
        raise ValueError(f"is {tuple(source.shape)}, its configuration says {tuple(target.shape)}")
    target.copy_(source)


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: is a {type(values).__name__}, not an object")
    return values


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def named(file: Path):
    """What is missing from a file or wrong in it is said with the file's name."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file}: has no field {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def meta_config(params: dict, vocab_size: int) -> Config:
    """Of Meta's params.json, which leaves the feed-forward's width to a formula. Raises KeyError or ValueError."""
    dim, n_heads, multiple_of = params["dim"], params["n_heads"], params["multiple_of"]
    multiplier = params.get("ffn_dim_multiplier") or 1
    try:
        hidden_dim = int(multiplier * int(2 * 4 * dim / 3))
        hidden_dim += -hidden_dim % multiple_of  # up to the next multiple
        head_dim = dim // n_heads
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"dim, n_heads, multiple_of and ffn_dim_multiplier make no model: {error}") from None
    scaling = None
    if params.get("use_scaled_rope"):  # params.json leaves the factor to Meta's code: 8 in 3.1, 32 in 3.2's 1B and 3B
        scaling = RopeScaling(32.0 if dim < 4096 else 8.0, 1.0, 4.0, 8192)
    return Config(
        dim=dim,
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if params.get("n_kv_heads") is None else params["n_kv_heads"],
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=scaling,
    )


def read_meta(folder: Path) -> tuple[Config, Weights]:
    """Meta's layout. Each of n files has a part of every weight, as the model ran on n GPUs in parallel."""
    params = read_json(folder / "params.json")
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    if [file.name for file in files] != names:
        found = ", ".join(file.name for file in files) or "no weights"
        raise ValueError(f"{folder}: has {found}, not {', '.join(names)}")
    shards = [read_meta_shard(file) for file in files]
    for file, shard in zip(files, shards):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{file}: {differing[0]} is in only one of it and {files[0].name}")

    def fill(name: str, target: Tensor) -> None:
        parts, n = [shard[name] for shard in shards], len(shards)
        shape, whole = tuple(parts[0].shape), tuple(target.shape)
        for part in parts:
            check_dense(part)
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"has different shapes in the {n} files")
        for dim in range(len(shape) if n > 1 else 0):
            if shape[:dim] + (n * shape[dim],) + shape[dim + 1 :] == whole:  # each has a part along this dimension
                for part, place in zip(parts, target.chunk(n, dim)):
                    copy(part, place)
                return
        if n > 1 and len(shape) > 1:
            raise ValueError(f"is {shape} in each of {n} files, its configuration says {whole} in all")
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):  # norms: each has all
            raise ValueError(f"is not the same in the {n} files")
        copy(parts[0], target)

    weights: Weights = {name: partial(fill, name) for name in shards[0]}
    for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight"):
        if name not in weights:
            raise ValueError(f"{folder}: has no weight {name}")
    if "output.weight" in weights:  # always split by rows; params.json often says -1
        vocab_size = sum(len(shard["output.weight"]) for shard in shards)
    else:
        vocab_size = len(shards[0]["tok_embeddings.weight"])
        weights["output.weight"] = weights["tok_embeddings.weight"]
    with named(folder / "params.json"):
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise ValueError(f"vocab_size is {params['vocab_size']}, but the weights have {vocab_size} tokens")
        return meta_config(params, vocab_size), weights


def read_meta_shard(file: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file and not yet read."""
    tensors = load_pth(file)
    tensors.pop("rope.freqs", None)  # LLaMA 1 carries the table that rope_cos_sin computes
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() not in (1, 2):
            raise ValueError(f"{file}: {name} is no vector or matrix")
    return tensors


def load_pth(file: Path, content: bytes | None = None) -> dict[str, object]:
    """What torch.save wrote, by name; no code in it is run. Tensors are mapped, unless the content is given.

    Raises ValueError, whatever is broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange protocols: what matters raises
            source = file if content is None else io.BytesIO(content)
            mapped = content is None and zipfile.is_zipfile(file)  # before PyTorch 1.6 files were none
            values = torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: not a file of tensors alone: it is broken, or holds code, which is not run"
        ) from None
    except Exception as error:  # torch.load raises whatever a broken file makes it meet
        raise ValueError(f"{file}: not a file of tensors: {first_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{file}: not a file of tensors by name")
    return values


# Hugging Face's names for Meta's, within a layer.
HUGGING_FACE = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def read_hugging_face(folder: Path) -> tuple[Config, Weights]:
    """Hugging Face's layout, of LlamaForCausalLM. Raises ValueError at what a LLaMA does not have."""
    file = folder / "config.json"
    values = read_json(file)
    with named(file):
        config = hugging_face_config(values)
    H, Hkv, D = config.n_heads, config.n_kv_heads, config.head_dim

    def fill(fetch: Callable[[], Tensor], heads: int, target: Tensor) -> None:
        source = fetch()
        check_dense(source)
        if heads and source.shape == target.shape:
            # Rotated pairs are the two halves of a head there, neighbours in Meta's checkpoints and here. The rows
            # change places once, and then one code serves both.
            source = source.view(heads, 2, D // 2, -1).transpose(1, 2)
            target = target.view(heads, D // 2, 2, -1)
        copy(source, target)

    weights: Weights = {}
    for name, fetch in open_shards(folder).items():
        if name.endswith(".rotary_emb.inv_freq"):  # old files carry what rope_cos_sin computes
            continue
        ours = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}.get(
            name, name
        )
        ours = ours.replace("lm_head.", "output.")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            ours = f"layers.{match[1]}.{HUGGING_FACE.get(match[2], match[2])}.weight"
        heads = H if ours.endswith(".wq.weight") else Hkv if ours.endswith(".wk.weight") else 0
        weights[ours] = partial(fill, fetch, heads)
    if values.get("tie_word_embeddings") and "tok_embeddings.weight" in weights:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def hugging_face_config(values: dict) -> Config:
    """Of config.json. Raises KeyError, or ValueError at an architecture other than LLaMA's."""
    only = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in (only | {"quantization_config": None}).items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}; only {value!r} is supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(*(rope[name] for name in fields))
    elif kind != "default":
        raise ValueError(f"rope_type is {kind!r}; only 'default' and 'llama3' are supported")
    dim, n_heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim")
    if head_dim is None:
        try:
            head_dim = dim // n_heads
        except (TypeError, ZeroDivisionError):
            raise ValueError(f"hidden_size {dim!r} and num_attention_heads {n_heads!r} make no model") from None
    return Config(
        dim=dim,
        n_layers=values["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if values.get("num_key_value_heads") is None else values["num_key_value_heads"],
        head_dim=head_dim,
        hidden_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        rope_scaling=scaling,
        max_seq_len=values.get("max_position_embeddings"),
    )


def open_shards(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """How to get every tensor by name, of the single file of a folder or of all that its index names."""
    singles = ["model.safetensors", "pytorch_model.bin"]
    indexes = [folder / f"{name}.index.json" for name in singles if (folder / f"{name}.index.json").exists()]
    found = [name for name in singles if (folder / name).exists()]
    if indexes:
        places = read_json(indexes[0]).get("weight_map")
        if not places or not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{indexes[0]}: has no weight_map from tensors to files")
        names = sorted(set(places.values()))
    elif found:
        places, names = {}, found[:1]
    else:
        raise ValueError(f"{folder}: has neither model.safetensors, nor pytorch_model.bin, nor an index of several")
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{file}: {indexes[0].name} names it, but there is no such file")
        tensors |= open_tensors(file)
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{indexes[0]}: says that {missing[0]} is in {places[missing[0]]}, which does not have it")
    return tensors


def open_tensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    """How to get every tensor of a file by name, of safetensors by its ending, else of what torch.save wrote."""
    if file.suffix != ".safetensors":
        mapped = load_pth(file)
        return {name: partial(mapped.get, name) for name in mapped}
    try:
        handle = safe_open(file, "pt")
        return {name: partial(handle.get_tensor, name) for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {first_line(error)}") from None


def read_llama2c(file: Path) -> tuple[Config, Weights]:
    """llama2.c's float32 .bin: a header of integers, then every tensor in a fixed order, layers stacked."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        raw = opened.read(256)
    modern = raw[:4] == b"24ka"  # "ak42", little-endian
    if size < (256 if modern else 28):
        raise ValueError(f"{file}: {size} bytes are not a llama2.c checkpoint")
    version = struct.unpack("<i", raw[4:8])[0]
    if modern and version != 1:
        raise ValueError(f"{file}: llama2.c version {version}, only 1 (float32) and the older layout are supported")
    header = struct.unpack("<7i", raw[8:36] if modern else raw[:28])
    C, hidden, N, H, Hkv, V, max_seq_len = header
    tied = bool(raw[36]) if modern else V > 0
    V = abs(V)
    try:
        D = C // H
        config = Config(C, N, H, Hkv, D, hidden, V, max_seq_len=max_seq_len)
        if C % H or max_seq_len < 1:
            raise ValueError(f"width {C}, {H} heads, context {max_seq_len}")
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: not a llama2.c checkpoint (its header reads {header}: {error})") from None

    # Where each tensor lies.
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

    start, places = 256 if modern else 28, {}
    for name, shape in shapes.items():
        places[name] = start
        start += 4 * int(np.prod(shape, dtype=object))
    if size != start:
        raise ValueError(f"{file}: {size} bytes, but its header asks for {start}")
    floats = np.memmap(file, dtype="<f4", mode="c")  # copy on write, and nothing is written
    stacked = {}
    for name, shape in shapes.items():
        place = places[name] // 4
        stacked[name] = torch.from_numpy(floats[place : place + int(np.prod(shape))]).view(shape)
    weights: Weights = {f"{name}.weight": partial(copy, stacked[name]) for name in ("tok_embeddings", "norm")}
    weights["output.weight"] = weights["tok_embeddings.weight"] if tied else partial(copy, stacked["output"])
    for i in range(N):
        weights |= {f"layers.{i}.{name}.weight": partial(copy, stacked[name][i]) for name in norms}
        weights |= {f"layers.{i}.attention.{name}.weight": partial(copy, stacked[name][i]) for name in attention}
        weights |= {f"layers.{i}.feed_forward.{name}.weight": partial(copy, stacked[name][i]) for name in mlp}
    return config, weights
