"""Hugging Face's layout of LLaMA, Mistral, Qwen2 and Qwen3: config.json, model*.safetensors or pytorch_model*.bin."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from formats.rope import linear_rope_factors, llama3_rope_factors
from formats.tensors import Weights, copy, prefix_errors, open_shards, require_dense
from model import Config
from runtime.cli import warn
from runtime.files import read_json_object
from runtime.schema import brief, require_number
from runtime.tensor_parallel import Part

CONFIG = "config.json"

# Meta's names of the modules that have weights, and the corresponding names in Hugging Face's layout. {} stands for the
# index of a layer.
TO_HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
TO_META = {theirs: ours for ours, theirs in TO_HUGGING_FACE.items()}
# Weights of q and k, which RoPE rotates in pairs: rows i and i + D/2 of a head in Hugging Face's order, 2i and 2i+1 in
# Meta's.
ROTATED = (".wq.weight", ".wk.weight", ".wq.bias", ".wk.bias", ".q_norm.weight", ".k_norm.weight")

# The supported architectures, keyed by model_type, and the fields of Config that are the same for all their models.
ARCHITECTURES = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
# Reasons why other models are not supported, keyed by the beginning of their model_type.
UNSUPPORTED = {
    "gemma": "its embeddings are scaled, and its norms add one to their weights",
    "phi": "its q, k and v are in one matrix (Phi-3), or it rotates only a part of each head",
    "gpt": "its layers differ from LLaMA's (GPT-2 has LayerNorm and learned positions)",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "qwen2_vl": "it is a vision-language model",
    "llama4": "it is a mixture of experts",
    "olmo": "its norms have no weights (OLMo), or come after the attention and the feed-forward (OLMo 2)",
    "falcon": "its attention and feed-forward run in parallel",
}


def translated(name: str, modules: Mapping[str, str]) -> str:
    """Translate the name of a weight or bias from one layout to another. An unknown name is returned unchanged.

    `modules` maps the names of modules in the first layout to those in the second, with {} for a layer's index.
    """
    numbers, (place, _, kind) = re.findall(r"(?:layers|blk)\.(\d+)\.", name), name.rpartition(".")
    module = modules.get(re.sub(r"(layers|blk)\.\d+\.", r"\1.{}.", place + ".").removesuffix("."))
    return f"{module.replace('{}', ''.join(numbers))}.{kind}" if module else name


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of wq or wk (heads*D, C), of a bias, or of a q or k norm from Meta's to Hugging Face's order."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def copy_in_pairs(source: Tensor, target: Tensor, head_dim: int, part: Part | None = None) -> None:
    """Copy wq or wk, a bias, or a q or k norm from Hugging Face's row order (halves of each head) to Meta's (pairs).

    Raises as `copy` does.
    """
    if source.shape == (part.whole_shape(target.shape) if part else target.shape):  # otherwise `copy` raises
        source = source.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)  # a part consists of whole heads
        target = target.unflatten(0, (-1, head_dim // 2, 2))
    copy(source, target, part)


def config_values(config: Config) -> dict[str, int | float]:
    """Return the dimensions of a LLaMA and the epsilon of its norms, keyed by their names in config.json."""
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
    }


def to_hugging_face(state_dict: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Convert the names and row orders of a LLaMA's weights to those of LlamaForCausalLM."""
    weights = {}
    for name, weight in state_dict.items():
        if name.endswith(ROTATED):
            weight = pairs_to_halves(weight, config.head_dim)
        weights[translated(name, TO_HUGGING_FACE)] = weight
    return weights


# Suffixes of tensor names, and the quantization methods that use them. The config.json of a quantized checkpoint does
# not always mention the method.
QUANTIZED = {
    (".qweight", ".qzeros", ".g_idx"): "GPTQ or AWQ",
    (".absmax", ".quant_map", ".SCB"): "bitsandbytes",
}


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if weight names have the prefix of a wrapper module, or show that the weights are quantized."""
    for name in names:
        for suffixes, method in QUANTIZED.items():
            if name.endswith(suffixes):
                raise ValueError(f"{folder}: is quantized with {method} (contains {name}); use the original model")
        prefix, _, rest = name.partition("model.embed_tokens.weight")
        if prefix and not rest and "model.embed_tokens.weight" in name:
            raise ValueError(
                f"{folder}: the weight names begin with {prefix!r} ({name}); save the model without its wrapper"
            )


def read(folder: Path) -> tuple[Config, Weights]:
    """Read config.json and the headers of the weight files.

    Warns, and uses lm_head.weight, if config.json ties the output head to the embeddings, but the two differ. Raises
    OSError, or ValueError if a file is invalid or the model is not supported.
    """
    values = read_json_object(folder / CONFIG)
    with prefix_errors(folder / CONFIG):
        config = hugging_face_config(values)

    def fill(fetch: Callable[[], Tensor], rotated: bool, target: Tensor, part: Part | None = None) -> None:
        if rotated:
            copy_in_pairs(require_dense(fetch()), target, config.head_dim, part)
        else:
            copy(fetch(), target, part)

    found = open_shards(folder)
    check_names(folder, found)
    tensors = {translated(name, TO_META): fetch for name, fetch in found.items()}
    embeddings, head = tensors.get("tok_embeddings.weight"), tensors.get("output.weight")
    tied = bool(values.get("tie_word_embeddings"))
    if tied and embeddings and head and not torch.equal(require_dense(embeddings()), require_dense(head())):
        warn(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embeddings; "
            f"using lm_head.weight"
        )
        tied = False
    if embeddings is None and (head is None or not tied):
        raise ValueError(f"{folder}: has no weight model.embed_tokens.weight")
    if tied:
        tensors["tok_embeddings.weight"] = embeddings or head  # the checkpoint may contain only one of them
    elif head is None:
        raise ValueError(f"{folder}: has no weight lm_head.weight, and {CONFIG} does not tie it to the embeddings")

    weights: Weights = {}
    for name, fetch in tensors.items():
        if not name.endswith(".rotary_emb.inv_freq"):  # in old files; rope_cos_sin computes it
            weights[name] = partial(fill, fetch, name.endswith(ROTATED))
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def hugging_face_config(values: dict) -> Config:
    """Convert config.json to a Config.

    Raises KeyError if a field is missing, or ValueError if a field is invalid or not supported.
    """
    kind = values.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        reason = next((reason for start, reason in UNSUPPORTED.items() if str(kind).startswith(start)), None)
        hint = f" ({reason})" if reason else ""
        raise ValueError(f"model_type is {kind!r}; only {', '.join(map(repr, ARCHITECTURES))} are supported{hint}")
    for name, value in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {brief(values[name])}; only {brief(value)} is supported")
    if values.get("quantization_config") is not None:
        raise ValueError("the weights are quantized (quantization_config); use the original model")
    for name in ("hidden_size", "num_attention_heads"):
        require_number(name, values[name], 1, 2**24, whole=True)
    dim, n_heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = dim // n_heads if values.get("head_dim") is None else values["head_dim"]
    require_number("head_dim", head_dim, 1, 2**24, whole=True)
    rope_theta, rope_factors = rotary_embedding(values, head_dim)
    return Config(
        dim=dim,
        n_layers=values["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if values.get("num_key_value_heads") is None else values["num_key_value_heads"],
        head_dim=head_dim,
        hidden_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=rope_theta,
        rope_factors=rope_factors,
        max_seq_len=context_length(values),
        **ARCHITECTURES[kind],
    )


def rotary_embedding(values: dict, head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """Return rope_theta, and the D/2 divisors of the rotary frequencies, or None if the frequencies are not scaled.

    As in transformers, `rope_scaling` takes precedence over `rope_parameters`, which transformers 5 writes. Raises
    KeyError if a field is missing, or ValueError if a field is invalid or not supported.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling or rope_parameters is {rope!r}; expected an object")
    for place in (rope, values):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor is {place['partial_rotary_factor']!r}; only 1 is supported")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, linear_rope_factors(head_dim, rope["factor"])
    if rope_type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return theta, llama3_rope_factors(head_dim, theta, *(rope[name] for name in names))
    raise ValueError(f"rope_type is {rope_type!r}; only 'default', 'linear' and 'llama3' are supported")


def context_length(values: dict) -> int | None:
    """Return the context length in tokens, or None if config.json does not state it.

    If the attention uses a sliding window, the context length is at most the size of the window. Raises ValueError if
    the sliding window is used, and it or the context length is invalid.
    """
    length, window = values.get("max_position_embeddings"), values.get("sliding_window")
    if window is None or not values.get("use_sliding_window", values.get("model_type") == "mistral"):
        return length
    require_number("sliding_window", window, 1, 2**40, whole=True)
    if length is None:
        return window
    require_number("max_position_embeddings", length, 1, 2**40, whole=True)
    return min(length, window)
