"""Benchmark of greedy decoding in tokens per second, including the time of the prefill."""

import copy
import importlib.util
import statistics

import torch
from cloup import command, option
from torch import nn

from adapter import Adapter
from benchmarks.measuring import compare_seconds, interleave, measured_on, publish, ratio_text, read_work, share_of
from benchmarks.peers import Contestant, LlamaCpp, Ours, Variant, installed_peers
from benchmarks.workload import Workload, compile_option, precisions, precisions_option, prepare_workload
from benchmarks.workload import workload_options
from formats.gguf import is_gguf
from generate import decode_step
from model import LLaMA
from runtime.cli import Count, one_line_errors
from runtime.compilation import compile_decoding
from runtime.decoding import PackedBfloat16, PackedLinear
from runtime.quantization import QuantizedLinear, held_bytes

PROMPT = 60  # tokens
GENERATION_COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "times ours": ratio_text,
    "share of read speed": lambda row: f"{100 * row['bandwidth_share']:.0f} %" if row["bytes"] else "",
}


def bytes_per_step(model: nn.Module) -> int:
    """Return the bytes that a decoding step reads from the linear layers of this implementation's model.

    For a layer that has a packed copy of its weights for decoding, only the copy is counted.
    """
    total = 0
    replaced = {id(module.layer) for module in model.modules() if isinstance(module, PackedLinear)}
    for module in model.modules():
        if id(module) in replaced:
            continue
        if isinstance(module, PackedLinear):
            total += module.packed.nbytes + module.factors.nbytes
        elif isinstance(module, PackedBfloat16):
            total += 2 * module.packed.numel()
        elif isinstance(module, nn.Linear | QuantizedLinear):
            total += held_bytes(module)
    return total


def create_variants(model: LLaMA, adapter: Adapter, variants: dict[str, Variant]) -> dict[str, Ours]:
    """Return one contestant of this implementation per variant, keyed by the name of the variant.

    Variants that read the same weights share a model, to save memory.
    """
    models: dict[tuple, Ours] = {}
    contestants = {}
    for name, variant in variants.items():
        weights = (variant.dtype, variant.bits, variant.compiled and variant.bits is None)
        if weights not in models:
            models[weights] = Ours(model, adapter, variant)
        contestants[name] = copy.copy(models[weights])
        contestants[name].adapter = adapter if variant.adapted else None
        if variant.compiled:
            contestants[name].decode_step = compile_decoding(decode_step, contestants[name].model)
    return contestants


def generation_contestants(workload: Workload, capacity: int, batch_size: int) -> dict[str, Contestant]:
    """Return the contestants by name: this implementation in several variants and, with --peers, other packages.

    `capacity` is the context length of llama.cpp in tokens.
    """
    model, adapter = workload.new_model(), workload.new_adapter()
    variant = Variant(decoding=True)
    variants = {"ours": variant, "ours, base alone": variant._replace(adapted=False), **precisions(workload, variant)}
    if workload.compiled:
        quantized = [name for name, each in variants.items() if each.bits]
        variants |= {f"{name}, compiled": variants[name]._replace(compiled=True) for name in ["ours", *quantized]}
    contestants: dict[str, Contestant] = create_variants(model, adapter, variants)
    if workload.peers:
        peers = installed_peers(model, adapter, ["adaption prompt", "full tuning"])
        if "full tuning" in peers:
            peers["transformers, base alone"] = peers.pop("full tuning")
        if batch_size > 1:
            peers.pop("litgpt adapter", None)
        contestants |= peers
    if workload.peers and batch_size == 1 and workload.base and is_gguf(workload.base):
        if importlib.util.find_spec("llama_cpp"):
            contestants["llama.cpp, base alone"] = LlamaCpp(workload.base, capacity)
    return contestants


def check_same_texts(contestants: dict[str, Contestant], rows: list[list[int]], number: int) -> None:
    """Raise ValueError if a contestant and this implementation generate different tokens.

    All contestants must run in float32. Contestants without an adapter are compared with the base alone.
    """
    base_alone = contestants["ours, base alone"].continuations(rows, number)
    adapted = contestants["ours"].continuations(rows, number)
    for name, contestant in contestants.items():
        tokens, expected = contestant.continuations(rows, number), base_alone if "base alone" in name else adapted
        if tokens != expected:
            row = next(i for i, (theirs, ours) in enumerate(zip(tokens, expected)) if theirs != ours)
            found = f"{name} generates the tokens {tokens[row]}, but this implementation generates {expected[row]}"
            raise ValueError(f"prompt {row}: {found}; their times are not comparable")


@command("generate", context_settings={"show_default": True})
@workload_options(
    compile_option,
    precisions_option,
    option("--tokens", "number", type=Count(2), default=128, help=f"New tokens after a prompt of {PROMPT} tokens."),
    option(
        "--batch-size", type=Count(), default=1, help="Prompts per batch; above 1, litgpt and llama.cpp are omitted."
    ),
)
@one_line_errors()
def time_generation(json_path, number, batch_size, **options):
    """Time greedy decoding.

    Reports tokens per second; the time of the prefill is included.
    """
    workload = prepare_workload(**options)
    examples = workload.examples(1000)
    prompts = [(examples[i % len(examples)].ids * PROMPT)[:PROMPT] for i in range(batch_size)]
    contestants = generation_contestants(workload, PROMPT + number, batch_size)
    if workload.dtype == torch.float32:
        exact = {name: each for name, each in contestants.items() if not any(w in name for w in ("bits", "bf", "cpp"))}
        check_same_texts(exact, prompts, number)

    functions = {name: lambda one=each: one.continuations(prompts, number) for name, each in contestants.items()}
    functions["read speed"], read_bytes = read_work(workload.device)
    seconds = interleave(functions, workload.repeat, workload.device)
    read_seconds = seconds.pop("read speed")
    rows = compare_seconds(seconds, "ours")
    base_bytes = bytes_per_step(contestants["ours, base alone"].model)
    for name, row in rows.items():
        ours = isinstance(contestants[name], Ours)
        row["bytes"] = bytes_per_step(contestants[name].model) if ours else 0 if "cpp" in name else base_bytes
        row["tokens_per_second"] = batch_size * number / row["median"]
        row["bandwidth_share"] = share_of(row["bytes"] * number, row["seconds"], read_bytes, read_seconds)
    about = measured_on(workload.name, workload.device, workload.dtype)
    about |= {"batch_size": batch_size, "new_tokens": number, "prompt_tokens": PROMPT}
    about |= {"read_bytes_per_second": read_bytes / statistics.median(read_seconds)}
    publish(
        "generate" if batch_size == 1 else f"generate {batch_size} rows", rows, GENERATION_COLUMNS, about, json_path
    )
