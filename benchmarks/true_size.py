"""Write checkpoints of published sizes with random weights, and measure loading, training and decoding."""

import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from cloup import command, option, option_group
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from benchmarks.measuring import json_option, measured_on, peak_anonymous, publish, seconds_of
from benchmarks.sizes import SCALED, SIZES
from benchmarks.workload import CONFIGS, random_adapter, random_examples
from formats.bases import read_base
from formats.gguf import TO_META
from formats.hugging_face import config_values, to_hugging_face, translated
from formats.loading import load_part_of_rank
from generate import decode_step, prefill
from model import Config, KVCache, LLaMA
from runtime.cli import Count, bits_options, device_options, one_line_errors
from runtime.decoding import prepare_to_decode
from runtime.device import peak_memory, select_device
from runtime.distributed import all_reduce_max, inference_ranks, rank, world_size
from runtime.errors import printable
from runtime.files import require_file, require_writable, write_json, write_tensors
from runtime.quantization import held_bytes, quantizer
from train import TrainConfig, make_optimizer, train_step

SHARD_BYTES = 10**9


def random_parts(config: Config, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield random bfloat16 weights with Hugging Face's names, one part at a time.

    The parts are the embeddings, each layer, the final norm and the output head.
    """
    with torch.device("meta"):
        model = LLaMA(config)
    for part in ("tok_embeddings", *(f"layers.{i}" for i in range(config.n_layers)), "norm", "output"):
        weights = {}
        for name, weight in model.get_submodule(part).named_parameters(part):
            new = torch.ones(weight.shape, dtype=torch.bfloat16)
            weights[name] = new if "norm" in name else new.normal_(0, 0.02, generator=generator)
        yield {name: weight.contiguous() for name, weight in to_hugging_face(weights, config).items()}


def hugging_face_values(config: Config, scaled: float | None) -> dict:
    """Return the content of config.json.

    If `scaled` is not None, it is the scaling factor of the rotary embedding, which is scaled as in Llama 3.1.
    """
    rope: dict = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaled is not None:
        rope |= {"rope_type": "llama3", "factor": scaled, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    more = {"max_position_embeddings": config.max_seq_len or 2048, "rope_parameters": rope}
    return {"model_type": "llama"} | config_values(config) | more


@command("checkpoint", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--size", type=click.Choice([*SIZES, *CONFIGS]), default="LLaMA-7B", help="Size of the model."),
    option("--tokenizer", type=click.Path(path_type=Path), required=True, help="A tokenizer.model to include."),
    option(
        "--out", type=click.Path(path_type=Path), required=True, help="Output folder; with --gguf, the output file."
    ),
    option("--gguf", is_flag=True, help="Write a GGUF file: layers in Q4_1, embeddings and output head in Q8_0."),
)
@one_line_errors()
def write_checkpoint(size, tokenizer, out, gguf):
    """Write a checkpoint of random weights.

    The checkpoint has Hugging Face's layout, with bfloat16 weights in shards of about 1 GB. Only one shard is in memory
    at a time. With --gguf, the checkpoint is one GGUF file.
    """
    if gguf:
        write_gguf((SIZES | CONFIGS)[size], tokenizer, out)
        return
    config, scaled, generator = (SIZES | CONFIGS)[size], SCALED.get(size), torch.Generator().manual_seed(0)
    content = require_file(tokenizer, "tokenizer").read_bytes()
    require_writable(out, folder=True)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty; choose a new or an empty one")
    out.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    shard_names: list[list[str]] = []

    def write_shard() -> None:
        write_tensors(out / f"model-{len(shard_names) + 1:05}.safetensors", shard)
        shard_names.append(list(shard))
        shard.clear()

    for part in random_parts(config, generator):
        shard |= part
        if sum(weight.nbytes for weight in shard.values()) > SHARD_BYTES:
            write_shard()
    if shard:
        write_shard()
    weight_map = {}
    for number, names in enumerate(shard_names, start=1):
        file = f"model-{number:05}-of-{len(shard_names):05}.safetensors"
        (out / f"model-{number:05}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(file.stat().st_size for file in out.iterdir())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(out / "config.json", hugging_face_values(config, scaled))
    (out / "tokenizer.model").write_bytes(content)
    click.echo(f"wrote {size:,} bytes in {len(shard_names)} shards to {printable(str(out))}")


def write_gguf(config: Config, tokenizer: Path, out: Path) -> None:
    """Write random weights and a SentencePiece tokenizer to a GGUF file, with the package `gguf`.

    Raises OSError if the tokenizer cannot be read or the file cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    pieces = SentencePieceProcessor(model_file=str(require_file(tokenizer, "tokenizer")))
    require_writable(out)
    writer = GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len or 2048)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    kinds = {TokenType.UNKNOWN: pieces.IsUnknown, TokenType.CONTROL: pieces.IsControl, TokenType.BYTE: pieces.IsByte}
    ids = range(pieces.vocab_size())
    types = [next((kind for kind, matches in kinds.items() if matches(id)), TokenType.NORMAL) for id in ids]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.IdToPiece(id) for id in ids])
    writer.add_token_scores([pieces.GetScore(id) for id in ids])
    writer.add_token_types(types)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    names = {theirs: ours for ours, theirs in TO_META.items()}
    with torch.device("meta"):
        model = LLaMA(config)
    random = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        kind = GGMLQuantizationType.Q4_1 if name.startswith("layers.") else GGMLQuantizationType.Q8_0
        numbers = 0.02 * random.standard_normal(weight.shape, np.float32)
        if weight.shape[-1] % 32:  # quantized rows must consist of whole blocks of 32 weights
            kind = GGMLQuantizationType.F16
        if weight.dim() == 1:
            kind, numbers = GGMLQuantizationType.F32, np.ones(weight.shape, np.float32)
        writer.add_tensor(translated(name, names), quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    click.echo(f"wrote {out.stat().st_size:,} bytes to {printable(str(out))}")


@command("load", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--base", type=click.Path(path_type=Path), required=True, help="Base to load; its weights may be random."),
    option(
        "--tokens",
        "number",
        type=Count(2),
        default=64,
        help="Number of tokens of the training example, and of the prompt.",
    ),
    option("--new", type=Count(2), default=4, help="Number of tokens to generate."),
    *device_options,
    *bits_options,
    json_option,
)
def time_loading(base, number, new, json_path, device, dtype, bits):
    """Measure the time and memory that a base needs.

    Reports the seconds needed to load the base, to train on one example and to decode a token, and the peak memory of
    the process in loading and training. Under torchrun, the base is split over the ranks, nothing is trained, and the
    memory is that of the rank that needs the most.
    """
    with one_line_errors(), inference_ranks():
        device, dtype = select_device(device, dtype)
        row = measure_base(base, number, new, device, dtype, bits)
        step = {
            f"step of {number} tokens": lambda row: f"{row['step_seconds']:.2f} s",
            "step memory": lambda row: f"{row['step_bytes'] / 1e9:.3f} GB",
        }
        columns = {
            "load": lambda row: f"{row['load_seconds']:.1f} s",
            "weights": lambda row: f"{row['weights_bytes'] / 1e9:.3f} GB",
            "load memory": lambda row: f"{row['load_bytes'] / 1e9:.3f} GB",
            **(step if "step_seconds" in row else {}),
            "per token": lambda row: f"{row['token_seconds']:.4f} s",
        }
        about = measured_on(base.name, device, dtype) | {"bits": bits or "as dtype", "tokens": number}
        ranks = world_size()
        about |= {"ranks": ranks} if ranks > 1 else {}
        kind = " ".join(["load", *([bits] if bits else []), *([f"{ranks} ranks"] if ranks > 1 else [])])
        publish(kind, {base.name: row}, columns, about, json_path if rank() == 0 else None)


def measure_base(
    base: Path, number: int, new: int, device: torch.device, dtype: torch.dtype, bits: str | None
) -> dict[str, float]:
    """Measure loading, training and decoding. Return the seconds and bytes by name.

    Training is measured only in a single process. Bytes are those of the rank that needs the most. Raises OSError or
    ValueError if the base cannot be loaded.
    """
    row: dict[str, float] = {}
    model_config, weights = read_base(base)

    def load():
        start = time.perf_counter()
        options = {"prepare_layer": quantizer(bits), "keep_blocks": bits is None}
        model = load_part_of_rank(base, model_config, weights, dtype, device, **options)
        row["load_seconds"] = time.perf_counter() - start
        return model

    model, row["load_bytes"] = peak_anonymous(load)
    row["weights_bytes"] = held_bytes(model)
    adapter = random_adapter(model_config, device)
    (example,) = random_examples(model_config, [number])

    if world_size() == 1:
        config, optimizer = TrainConfig(), make_optimizer(adapter, 0.02)

        def step():
            return seconds_of(lambda: train_step(model, adapter, optimizer, [example], 1e-3, config), device)

        row["step_seconds"], row["step_bytes"] = peak_anonymous(step)

    @torch.inference_mode()
    def respond():
        prepare_to_decode(model)
        adaption_prompts = adapter(dtype=dtype)
        cache = KVCache(model, batch=1, capacity=number + new)
        first = prefill(model, [example.ids], adaption_prompts, cache).argmax(dim=1)  # (1,)

        def steps():  # `stream` is not used, because on a GPU it takes eight steps before it returns the first token
            newest = first
            for _ in range(new - 1):
                newest = decode_step(model, newest, adaption_prompts, cache).argmax(dim=1)

        return seconds_of(steps, device) / (new - 1)

    row["token_seconds"], row["response_bytes"] = peak_anonymous(respond)
    row["peak_bytes"] = peak_memory(device)
    return {name: all_reduce_max(value) if name.endswith("bytes") else value for name, value in row.items()}
