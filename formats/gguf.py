"""GGUF, the format of llama.cpp, Ollama and LM Studio: a base and its tokenizer, in one file or split over several.

The layout of the header is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantized blocks
are dequantized by ggml-org's own package, gguf.
"""

import re
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats.hugging_face import ARCHITECTURES, ROTATED, copy_in_pairs, translated
from formats.rope import linear_rope_factors
from formats.tensors import Weights, copy, prefix_errors
from model import Config
from runtime.files import require_file
from runtime.quantization import GROUP, QuantizedLinear
from runtime.schema import require_number
from runtime.tensor_parallel import Part

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
# Format characters of the module struct, keyed by GGUF value type.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # the numbers of the other two value types

# GGUF's names of the modules with weights, and Meta's; {} is the index of a layer.
TO_META = {
    "token_embd": "tok_embeddings",
    "blk.{}.attn_q": "layers.{}.attention.wq",
    "blk.{}.attn_k": "layers.{}.attention.wk",
    "blk.{}.attn_v": "layers.{}.attention.wv",
    "blk.{}.attn_output": "layers.{}.attention.wo",
    "blk.{}.attn_q_norm": "layers.{}.attention.q_norm",
    "blk.{}.attn_k_norm": "layers.{}.attention.k_norm",
    "blk.{}.ffn_gate": "layers.{}.feed_forward.w1",
    "blk.{}.ffn_down": "layers.{}.feed_forward.w2",
    "blk.{}.ffn_up": "layers.{}.feed_forward.w3",
    "blk.{}.attn_norm": "layers.{}.attention_norm",
    "blk.{}.ffn_norm": "layers.{}.ffn_norm",
    "output_norm": "norm",
    "output": "output",
}


class TensorInfo(NamedTuple):
    """Location, shape and type of a tensor in a file."""

    file: Path
    offset: int  # in bytes, from the beginning of the file
    shape: tuple[int, ...]  # as in PyTorch: the last dimension is contiguous
    block_type: int  # a GGMLQuantizationType


class Header(NamedTuple):
    """The header of a file: its metadata values and tensor infos, keyed by name."""

    values: dict[str, object]
    tensors: dict[str, TensorInfo]


class Cursor:
    """Reader of consecutive values in a header. Its methods raise ValueError if the file ends or a type is unknown."""

    def __init__(self, content: np.ndarray):
        self.content = content
        self.position = 0

    def bytes(self, number: int) -> bytes:
        end = self.position + number
        if end > len(self.content):
            raise ValueError(f"ends within its header: expected {number:,} bytes at offset {self.position:,}")
        found = self.content[self.position : end].tobytes()
        self.position = end
        return found

    def number(self, code: str) -> int | float | bool:  # a format character of struct
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, value_type: int) -> object:
        if value_type == STRING:
            return self.string()
        if value_type == ARRAY:
            item_type, length = self.number("I"), self.number("Q")
            if item_type == STRING:
                return [self.string() for _ in range(length)]
            if item_type not in SCALARS:
                raise ValueError(f"has an array whose items have the unsupported type {item_type}")
            return np.frombuffer(
                self.bytes(length * struct.calcsize(SCALARS[item_type])), f"<{SCALARS[item_type]}"
            ).tolist()
        if value_type not in SCALARS:
            raise ValueError(f"has a value of the unknown type {value_type}")
        return self.number(SCALARS[value_type])


def is_gguf(path: Path) -> bool:
    """Return True if the file begins with GGUF's magic number. Its suffix does not matter: Ollama's files have none."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def find_file(path: Path) -> Path | None:
    """Return `path` if it is a GGUF file, or the file of the only GGUF model in the folder `path`; otherwise None.

    If the model in the folder is split over several files, the first one is returned. Raises ValueError if the folder
    contains several models.
    """
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        later_part = re.compile(r"-(?!0*1-)\d+-of-\d+\.gguf$")
        files = [file for file in found if not later_part.search(file.name)]
        files = files or found[:1]  # without its first part, the model cannot be read; `read_header` names that part
        if len(files) > 1:
            raise ValueError(
                f"{path}: contains {len(files)} GGUF models ({files[0].name} ...); give the path of one of the files"
            )
        return files[0] if files else None
    return path if is_gguf(path) else None


def read_header(file: Path) -> Header:
    """Read the header of a model, merged from all files that the model is split over.

    Raises OSError, or ValueError if a file is not a GGUF file or its header is invalid.
    """
    header = read_part(file)
    number = header.values.get("split.count", 1)
    if number in (0, 1):  # llama.cpp writes 0 when it merges the parts of a model
        return header
    require_number(f"{file}: split.count", number, 2, 2**16, whole=True)
    stem = re.sub(r"-\d+-of-\d+\.gguf$", "", file.name)
    parts = [read_part(file.with_name(f"{stem}-{i:05}-of-{number:05}.gguf")) for i in range(1, number + 1)]
    return Header(parts[0].values, {name: info for part in parts for name, info in part.tensors.items()})


def read_part(file: Path) -> Header:
    """Read the header of one file. Raises OSError or ValueError."""
    stat = require_file(file).stat()
    return parse_part(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def parse_part(file: Path, size: int, modified: int) -> Header:
    """Parse the header of one file. The result is cached, because the tokenizer is read from the header, too.

    `size` and `modified` are part of the cache key, so that a file that has changed is parsed again.
    """
    with prefix_errors(file):
        if size < 24:
            raise ValueError(f"is not a GGUF file: it has only {size} bytes; expected at least 24")
        cursor = Cursor(np.memmap(file, mode="r"))
        if cursor.bytes(4) != MAGIC:
            raise ValueError("is not a GGUF file: it does not begin with the bytes 'GGUF'")
        if (version := cursor.number("I")) not in (2, 3):
            raise ValueError(f"has GGUF version {version}; only versions 2 and 3 in little-endian order are supported")
        num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
        values: dict[str, object] = {}
        for _ in range(num_values):
            name = cursor.string()
            values[name] = cursor.value(cursor.number("I"))
        infos = []
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(cursor.number("Q") for _ in range(min(cursor.number("I"), 8)))[::-1]
            infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
        alignment = values.get("general.alignment", 32)
        require_number("general.alignment", alignment, 1, 2**20, whole=True)
        start = cursor.position + -cursor.position % alignment
        tensors = {
            name: TensorInfo(file, start + offset, shape, block_type) for name, shape, block_type, offset in infos
        }
        return Header(values, tensors)


def read_blocks(info: TensorInfo) -> "tuple[GGMLQuantizationType, np.ndarray]":
    """Return the type of a tensor's blocks, and its memory-mapped bytes, uint8 (..., bytes per row).

    Raises ValueError if the type is unknown, if a row does not consist of whole blocks, or if the file does not contain
    the whole tensor.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_type = GGMLQuantizationType(info.block_type)
        per_block, block_bytes = GGML_QUANT_SIZES[block_type]
    except (ValueError, KeyError):
        advice = "a newer version may read it: pip install --upgrade gguf"
        raise ValueError(
            f"has the block type {info.block_type}, which the package gguf does not know; {advice}"
        ) from None
    if not info.shape or not all(info.shape) or info.shape[-1] % per_block:
        raise ValueError(
            f"has shape {info.shape}, whose rows do not consist of {block_type.name} blocks of {per_block} values"
        )
    number = prod(info.shape) // per_block * block_bytes
    if info.offset + number > info.file.stat().st_size:
        raise ValueError(f"extends beyond the end of the file: it has {number:,} bytes at offset {info.offset:,}")
    shape = (*info.shape[:-1], number // prod(info.shape[:-1]))
    return block_type, np.memmap(info.file, np.uint8, "r", info.offset, shape)


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor, dequantized to float32.

    Raises ValueError as `read_blocks` does, or if the package gguf cannot dequantize the type.
    """
    from gguf import dequantize

    block_type, content = read_blocks(info)
    try:
        return torch.from_numpy(np.array(dequantize(content, block_type), np.float32))
    except NotImplementedError:
        raise ValueError(f"has the block type {block_type.name}, which the package gguf cannot dequantize") from None


class StoredWeight(NamedTuple):
    """A weight in a file. Calling it copies the dequantized weight, or only a part of it, into a tensor."""

    info: TensorInfo
    halves_of: int | None  # head dimension if the rows are in Hugging Face's order (halves of each head), else None

    def __call__(self, target: Tensor, part: Part | None = None) -> None:
        if self.halves_of is None:
            copy(read_tensor(self.info), target, part)
        else:
            copy_in_pairs(read_tensor(self.info), target, self.halves_of, part)

    def quantized(self, shape: torch.Size) -> QuantizedLinear | None:
        """Return a linear layer with the quantized numbers of the file, without quantizing the weight again.

        Returns None for a weight that is not a matrix, and for any type but Q8_0, Q4_0 and Q4_1. Raises ValueError as
        `read_blocks` does, if the weight does not have this shape, or if a scale or offset is not finite.
        """
        if len(shape) != 2:
            return None
        block_type, content = read_blocks(self.info)
        if block_type.name not in ("Q8_0", "Q4_0", "Q4_1"):
            return None
        if self.info.shape != tuple(shape):
            raise ValueError(f"has shape {self.info.shape}, but the configuration requires {tuple(shape)}")
        N, K = shape
        # A block consists of a float16 scale, a float16 offset (only in Q4_1), and the quantized numbers.
        blocks = torch.from_numpy(np.array(content)).view(N, K // GROUP, -1)
        if self.halves_of is not None:
            blocks = blocks.unflatten(0, (-1, 2, self.halves_of // 2)).transpose(1, 2).flatten(0, 2)
        scales = blocks[..., :2].contiguous().view(torch.float16).float()  # (N, K/32, 1)
        offsets, start = None, 2
        if block_type.name == "Q4_0":
            offsets = -8 * scales
        elif block_type.name == "Q4_1":
            offsets, start = blocks[..., 2:4].contiguous().view(torch.float16).float(), 4
        q = blocks[..., start:].contiguous()
        if not all(each.isfinite().all() for each in (scales, offsets) if each is not None):
            raise ValueError("contains scales or offsets that are not finite")
        return QuantizedLinear(q.view(torch.int8) if offsets is None else q, scales, offsets, K)


def read(path: Path) -> tuple[Config, Weights]:
    """Read the header of a GGUF model: a file, or the only model in a folder.

    Raises OSError, or ValueError if the model is invalid or not supported, or if the package gguf is not installed.
    """
    file = find_file(path)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(f"{file}: reading GGUF needs one more package: pip install gguf") from None
    header = read_header(file)
    with prefix_errors(file):
        config = gguf_config(header)

    as_hugging_face = header.values["general.architecture"] != "llama"  # llama's q and k are in Meta's order
    weights: Weights = {}
    for name, info in header.tensors.items():
        if name != "rope_freqs.weight":
            meta_name = translated(name, TO_META)
            halves_of = config.head_dim if as_hugging_face and meta_name.endswith(ROTATED) else None
            weights[meta_name] = StoredWeight(info, halves_of)
    if "output.weight" not in weights and "tok_embeddings.weight" in weights:  # a tied head
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def gguf_config(header: Header) -> Config:
    """Convert the metadata to a Config.

    Raises KeyError if a value is missing, or ValueError if a value is invalid or the model is not supported.
    """
    values = header.values
    if values.get("general.type", "model") != "model":
        raise ValueError(f"general.type is {values['general.type']!r}; expected 'model'")
    architecture = values["general.architecture"]
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"general.architecture is {architecture!r}; only 'llama', 'qwen2' and 'qwen3' are supported")

    def get(name: str, *default: object) -> object:
        name = f"{architecture}.{name}"
        return values.get(name, *default) if default else values[name]

    if get("expert_count", 0):
        raise ValueError(f"{architecture}.expert_count is {get('expert_count')}; a mixture of experts is not supported")
    dim, n_heads = get("embedding_length"), get("attention.head_count")
    for name, value in (("embedding_length", dim), ("attention.head_count", n_heads)):
        require_number(name, value, 1, 2**24, whole=True)
    head_dim = get("attention.key_length", dim // n_heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"rope.dimension_count is {get('rope.dimension_count')}; only the head dimension, {head_dim}, is supported"
        )
    scaling = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    if scaling not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type is {scaling!r}; only 'none' and 'linear' are supported")
    require_number("the scaling factor of the rotary embedding", factor, 1e-3, 1e6)
    rope_factors = None
    if "rope_freqs.weight" in header.tensors:  # the divisors of Llama 3.1
        rope_factors = tuple((read_tensor(header.tensors["rope_freqs.weight"]) * factor).tolist())
    elif factor != 1:
        rope_factors = linear_rope_factors(head_dim, factor)
    context, window = get("context_length", None), get("attention.sliding_window", None)
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ValueError("the weight token_embd.weight is missing or is not a matrix")
    return Config(
        dim=dim,
        n_layers=get("block_count"),
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=get("feed_forward_length"),
        vocab_size=embeddings.shape[0],
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_factors=rope_factors,
        max_seq_len=min(filter(None, (context, window)), default=None),
        **ARCHITECTURES[architecture],
    )
