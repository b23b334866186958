"""How fast and how large: python bench.py train|generate|memory, ours and, with --peers, the others in the same run."""

import ctypes
import gc
import json
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from toy import almanac as toy
from adapter import Adapter
from runtime.files import atomic_write
from runtime.cli import Real, device_options, one_line_errors
from data import (
    IGNORE,
    SentencePieceTokenizer,
    Tokens,
    collate,
    epoch_batches,
    read_examples,
    response_tokens,
    tokenize,
)
from generate import compiled_decoding
from model import SIZES, Config, LLaMA, select_device, compile_layers, number_of_weights, prepare_to_compile
from training.distributed import too_large
from benchmarks.peers import Contestant, HuggingFace, LitGPT, Ours, Plain, installed, padded
from training.step import HeadLoss, accumulate_gradient

SHAPES = {
    #            dim layers heads kv D hidden vocab
    "15M": Config(288, 6, 6, 6, 48, 768, 32000),  # of llama2.c's stories15M, with a head of its own: 24M in all
    "110M": Config(768, 12, 12, 12, 64, 2048, 32000),
    "7B": SIZES["LLaMA-7B"],
}
LENGTH = 10  # K


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> LLaMA:
    """Frozen, with weights of which only the size matters, made where they are to be."""
    with torch.device("meta"):
        model = LLaMA(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02, generator=generator)
    return model


def make_adapter(config: Config, device: torch.device, layers: int | None = None) -> Adapter:
    return Adapter(
        layers=layers or max(1, config.n_layers - 2),
        length=LENGTH,
        dim=config.dim,
        heads=config.n_heads,
        generator=torch.Generator().manual_seed(0),
    ).to(device)


def others(model: LLaMA, adapter: Adapter, kinds: list[str]) -> dict[str, Contestant]:
    """The peers that are installed, those on transformers in these kinds; with as many layers as the adapter has."""
    layers, field = len(adapter.gates), {"plain, as the authors'": Plain(model, adapter)}
    if installed("peft"):
        for kind in kinds:
            field[kind if kind == "full tuning" else f"PEFT {kind}"] = HuggingFace(model, kind, layers, LENGTH)
    if installed("litgpt"):
        field["litgpt adapter"] = LitGPT(model, layers, LENGTH)
    return field


def load_examples(data: str | None, tokenizer: str | None, number: int) -> list[Tokens]:
    """So many, evenly spread over the file, or over the embedded default."""
    if data is None:
        examples = [question.example for question in toy.instructions()["tuning"]]
        with tempfile.TemporaryDirectory() as folder:
            ids = toy.train_tokenizer(Path(folder) / "tokenizer.model", seed=0)
    elif tokenizer is None:
        raise ValueError(f"--data {data} needs --tokenizer FILE")
    else:
        examples, ids = read_examples(data), SentencePieceTokenizer(tokenizer)
    return tokenize(ids, examples[:: max(1, len(examples) // number)][:number], 512)[0]


# ---------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable, device: torch.device) -> float:
    """Seconds."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what the machine has to give."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(8))


def copy_speed(device: torch.device) -> float:
    """Bytes/s that a large copy moves, read and written."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(8))


def reset_peak(device: torch.device) -> int:
    """Start looking for the highest use of memory; returns the present one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free; Linux, as the next line
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def interleaved(contestants: dict[str, Callable], repeat: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, round by round, so that a slow moment of the machine hits all alike; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    bar = tqdm(total=(repeat + 1) * len(contestants), unit="run", file=sys.stderr, leave=False)
    for round in range(repeat + 1):
        for name, work in contestants.items():
            bar.set_postfix_str(name)
            bar.update()
            taken = timed(work, device)
            if round:
                seconds[name].append(taken)
    bar.close()
    return seconds


def summarize(seconds: dict[str, list[float]], first: str) -> dict[str, dict]:
    """Median, and how many times as long as the first, round by round: median, least and most."""
    rows = {}
    for name, taken in seconds.items():
        ratios = [mine / its for mine, its in zip(taken, seconds[first])]
        spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows[name] = {"seconds": taken, "median": statistics.median(taken), "ratio": spread}
    return rows


# ---------------------------------------------------------------------------------------------------
# The commands


@click.group(context_settings={"show_default": True})
def main():
    """Measure on this machine; with --peers also PEFT, LoRA, full tuning, litgpt, and plain code as the authors'."""


def shared_options(command):
    for option in (
        click.option("--size", type=click.Choice(list(SHAPES)), default="15M"),
        click.option("--data", type=click.Path(), help="Whose lengths to take.  [default: toy.py's]"),
        click.option("--tokenizer", type=click.Path(), help="A SentencePiece model, for --data."),
        click.option("--repeat", type=click.IntRange(1), default=5, help="Rounds; the contestants take turns."),
        click.option("--peers", is_flag=True, help="The others too, as far as they are installed."),
        click.option("--compile", "compiled", is_flag=True, help="Ours under torch.compile too."),
        click.option("--json", "json_path", type=click.Path(), help="Where the figures go, added to what is there."),
        device_options,
    ):
        command = option(command)
    return command


@main.command("train")
@shared_options
@click.option("--examples", "number", type=click.IntRange(1), default=32, help="So many of the data file.")
@click.option("--batch-size", type=click.IntRange(1), default=8)
@click.option("--micro-batch-tokens", type=click.IntRange(1), default=8192)
@click.option("--checkpoint-activations", is_flag=True)
@click.option("--ablation", is_flag=True, help="What each measure brings, one added to the other.")
def bench_train(size, data, tokenizer, repeat, peers, compiled, json_path, device, dtype, number, batch_size, **how):
    """Seconds of one epoch, every optimizer step included, over the same examples."""
    with one_line_errors(ValueError, OSError, torch.OutOfMemoryError):
        device, dtype = select_device(device, dtype)
        if compiled:
            prepare_to_compile(device)
        config, examples = SHAPES[size], load_examples(data, tokenizer, number)
        budget, recompute = how["micro_batch_tokens"], how["checkpoint_activations"]
        model = random_model(config, device, dtype)
        field = {"ours": OursTraining(model, make_adapter(config, device), budget, recompute)}
        if compiled:
            other = random_model(config, device, dtype)
            compile_layers(other)
            field["ours, compiled"] = OursTraining(other, make_adapter(config, device), budget, recompute)
        if how["ablation"]:
            field["plain"] = Plain(model, make_adapter(config, device))
            for level in Ablation.LEVELS:
                field[level] = Ablation(model, make_adapter(config, device), level)
        if peers:
            field |= others(model, make_adapter(config, device), ["adaption prompt", "lora", "full tuning"])

        with torch.no_grad():
            losses = {name: contestant.loss(examples[:batch_size]).item() for name, contestant in field.items()}
        for name, loss in losses.items():
            if abs(loss - losses["ours"]) > 1e-3 * losses["ours"]:
                raise ValueError(
                    f"{name} has a first loss of {loss:.5f}, ours is {losses['ours']:.5f}: not the same work"
                )
        peaks, epochs = {}, {}
        for name, contestant in field.items():
            epochs[name] = epoch(contestant, examples, batch_size)
            before = reset_peak(device)
            epochs[name]()
            peaks[name] = peak(device) - before
        rows = summarize(interleaved(epochs, repeat, device), "ours")
        with FlopCounterMode(display=False) as counter:
            epochs["ours"]()
        speed, flops = matmul_speed(device, dtype), counter.get_total_flops()
        for name, row in rows.items():
            row["examples_per_second"] = len(examples) / row["median"]
            row["response_tokens_per_second"] = response_tokens(examples) / row["median"]
            row["peak_bytes_beyond_the_model"] = peaks[name]
            row["first_loss"] = losses[name]
            row["utilisation"] = flops / row["median"] / speed if name.startswith("ours") else None
        about = describe(size, device, dtype) | {
            "examples": len(examples),
            "batch_size": batch_size,
            **how,
            "tokens": sum(len(example.ids) for example in examples),
            "flops_of_ours": flops,
            "matmul_flops_per_second": speed,
            "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
        columns = {
            "seconds": lambda row: f"{row['median']:.2f}",
            "times ours": ratio_text,
            "examples/s": lambda row: f"{row['examples_per_second']:.1f}",
            "response tokens/s": lambda row: f"{row['response_tokens_per_second']:,.0f}",
            "memory beyond the model": lambda row: f"{row['peak_bytes_beyond_the_model'] / 2**20:,.0f} MiB",
            "of the matmul peak": lambda row: f"{100 * row['utilisation']:.0f} %" if row["utilisation"] else "",
        }
        kind = "ablation" if how["ablation"] else "train"
        report(kind, rows, columns, about, json_path)


@main.command("generate")
@shared_options
@click.option("--tokens", "number", type=click.IntRange(2), default=128, help="New ones, after a prompt of 60.")
def bench_generate(size, data, tokenizer, repeat, peers, compiled, json_path, device, dtype, number):
    """Tokens per second at batch 1, greedy, prefill included."""
    with one_line_errors(ValueError, OSError, torch.OutOfMemoryError):
        device, dtype = select_device(device, dtype)
        if compiled:
            prepare_to_compile(device)
        config, examples = SHAPES[size], load_examples(data, tokenizer, 1000)
        prompt = (examples[0].ids * 60)[:60]
        model, adapter = random_model(config, device, dtype), make_adapter(config, device)
        field = {"ours": Ours(model, adapter), "ours, base alone": Ours(model, None)}
        if compiled:
            field["ours, compiled"] = Ours(other := deepcopy(model), adapter, compiled_decoding(other))
        if peers:
            field |= others(model, adapter, ["adaption prompt"])
        texts = {name: contestant.decode(prompt, number) for name, contestant in field.items()}
        for name, text in texts.items():
            if dtype == torch.float32 and text != texts["ours"]:
                raise ValueError(f"{name} goes on {text[:8]}, ours {texts['ours'][:8]}: not the same work")
        runs = {name: lambda its=contestant: its.decode(prompt, number) for name, contestant in field.items()}
        rows = summarize(interleaved(runs, repeat, device), "ours")
        weights = sum(weight.nbytes for weight in model.parameters()) - model.tok_embeddings.weight.nbytes
        speed = copy_speed(device)
        for row in rows.values():
            row["tokens_per_second"] = number / row["median"]
            row["bandwidth_share"] = weights * number / row["median"] / speed
        about = describe(size, device, dtype) | {
            "new_tokens": number,
            "bytes_per_token": weights,
            "copy_bytes_per_second": speed,
        }
        columns = {
            "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
            "times ours": ratio_text,
            "weights read, of the copy speed": lambda row: f"{100 * row['bandwidth_share']:.0f} %",
        }
        report("generate", rows, columns, about, json_path)


@main.command("memory")
@click.option("--size", type=click.Choice(list(SHAPES)), default="7B")
@click.option("--check", is_flag=True, help="Also measure a step of this size here, beside the count.")
@click.option("--json", "json_path", type=click.Path(), help="Where the figures go, added to what is there.")
@device_options
def bench_memory(size, check, json_path, device, dtype):
    """Bytes of a training step by kind, by the number of tokens in a micro-batch, for a base in bfloat16."""
    with one_line_errors(ValueError, OSError, torch.OutOfMemoryError):
        device, dtype = select_device(device, dtype)
        config, itemsize = SHAPES[size], dtype.itemsize if check else 2
        rows = {}
        for recompute in (False, True):
            for tokens in (512, 1024, 2048, 4096, 8192):
                row = count_bytes(config, tokens, itemsize, recompute)
                if check:
                    fresh = multiprocessing.get_context("spawn")  # no memory left over from before
                    with ProcessPoolExecutor(1, fresh) as process:
                        what = config, tokens, device, dtype, recompute
                        row["measured"] = process.submit(measure_step, *what).result()
                rows[f"{tokens} tokens{', --checkpoint-activations' if recompute else ''}"] = row
        about = describe(size, device, dtype) | {"K": LENGTH, "L": config.n_layers - 2, "check": check}
        about["dtype"] = {2: "bfloat16", 4: "float32"}[itemsize]
        columns = {name: lambda row, name=name: f"{row[name] / 2**30:.2f} GiB" for name in next(iter(rows.values()))}
        report("memory", rows, columns, about, json_path)


@main.command("plan")
@click.option("--gpu-memory", type=Real(1), default=80, help="GB of each GPU.")
@click.option("--peak", type=Real(1), default=312, help="TFLOP/s of each GPU in bfloat16; 312 is an A100's.")
@click.option("--utilisation", type=Real(0, 1, min_open=True), default=0.4, help="Share of that; an assumption.")
def bench_plan(gpu_memory, peak, utilisation):
    """On paper: memory, time and what travels for the paper's run (Alpaca, 5 epochs, batch 64) by size and GPUs."""
    rows = {}
    for size in ("LLaMA-7B", "LLaMA-13B", "LLaMA-33B", "LLaMA-65B"):
        for gpus in (1, 8):
            rows[f"{size[6:]} on {gpus}"] = plan(SIZES[size], gpus, gpu_memory * 1e9, peak * 1e12 * utilisation)
    columns = {
        "strategy": lambda row: row["strategy"],
        "weights": lambda row: f"{row['weights'] / 1e9:.0f} GB",
        "activations": lambda row: f"{row['activations'] / 1e9:.0f} GB",
        "in all": lambda row: f"{row['sum'] / 1e9:.0f} GB" if row["fits"] else f"{row['sum'] / 1e9:.0f} GB: too much",
        "checkpointed": lambda row: "yes" if row["checkpointed"] else "no",
        "hours": lambda row: f"{row['hours']:.1f}" if row["fits"] else "",
        "travels per step and GPU": lambda row: f"{row['travels'] / 1e6:,.0f} MB" if row["travels"] else "",
    }
    about = {"GB a GPU": gpu_memory, "TFLOP/s": peak, "utilisation": utilisation, "K": LENGTH}
    report("plan", rows, columns, about, None)


# Stanford Alpaca in LLaMA's tokens, an example on average; 2 % are held out.
EXAMPLES, TOKENS, RESPONSE = 52_002, 127.1, 65.5


def plan(config: Config, gpus: int, memory: float, speed: float) -> dict:
    """For one size on so many GPUs of so many bytes and operations per second, with a base in bfloat16."""
    C, N, adapted = config.dim, config.n_layers, config.n_layers - 2
    heads = config.n_heads + config.n_kv_heads
    layer = 2 * C * config.head_dim * heads + 3 * C * config.hidden_dim  # numbers
    outside = 2 * config.vocab_size * C
    strategy = "fsdp" if gpus > 1 and too_large(2 * (N * layer + outside), memory) else "ddp"
    # A split base: a part of each layer, and two whole ones, the one at work and the next.
    weights = 2 * (outside + (N * layer / gpus + 2 * layer if strategy == "fsdp" else N * layer))

    positions = min(8192, 64 * TOKENS / gpus)  # of a micro-batch
    kept = 2 * positions * (7 * C + 3 * config.hidden_dim)  # bytes in a layer, as bench.py memory counts them
    activations, checkpointed = (adapted + 1) * kept, False
    if weights + activations > 0.9 * memory:
        activations, checkpointed = 2 * positions * C * adapted + 2 * kept, True
    adapter = 4 * adapted * (LENGTH * C + config.n_heads)

    # Two operations a weight and token forward; as many backwards where there are prompts; and where activations are
    # not kept, forward again. The head sees the response alone, forward and backwards.
    per_token = 2 * layer * (N + adapted * (2 if checkpointed else 1))
    operations = TOKENS * per_token + RESPONSE * 4 * config.vocab_size * C
    travels = 0.0
    if gpus > 1:
        travels = 2 * (gpus - 1) / gpus * adapter  # around a ring
    if strategy == "fsdp":
        travels += (gpus - 1) / gpus * 2 * layer * (N + adapted) * math.ceil(64 * TOKENS / gpus / positions)
    total = weights + activations + 4 * adapter
    return {
        "strategy": strategy if gpus > 1 else "",
        "weights": weights,
        "activations": activations,
        "sum": total,
        "fits": total < 0.95 * memory,
        "checkpointed": checkpointed,
        "hours": 5 * 0.98 * EXAMPLES * operations / (gpus * speed) / 3600,
        "operations": operations,
        "travels": travels,
    }


# ---------------------------------------------------------------------------------------------------
# Training


class OursTraining(Ours):
    """The step of train.py: batches of like length, in micro-batches."""

    like_length = True

    def __init__(self, model: LLaMA, adapter: Adapter, budget: int, recompute: bool):
        super().__init__(model, adapter)
        self.how = budget, recompute

    def backward(self, examples: list[Tokens]) -> None:
        accumulate_gradient(self.model, self.adapter, examples, *self.how)


class Ablation(Ours):
    """From the plain way to ours: each level has the measures of those before it, and one more."""

    LEVELS = [
        "+ fused attention",
        "+ logits at response tokens only",
        "+ padded to the longest of the batch",
        "+ batches of like length",
        "+ gradient by the logits in few rows",
        "+ last layer at response tokens only",
    ]

    def __init__(self, model: LLaMA, adapter: Adapter, level: str):
        super().__init__(model, adapter)
        self.level = self.LEVELS.index(level)
        self.like_length = self.level >= 3

    def loss(self, examples: list[Tokens]) -> Tensor:
        inputs, targets = padded(examples, 512) if self.level < 2 else collate(examples)[:2]
        device = self.model.tok_embeddings.weight.device
        inputs, targets = inputs.to(device), targets.to(device)
        learnt, prompts = targets != IGNORE, self.adapter(dtype=self.model.tok_embeddings.weight.dtype)
        hidden = self.model.hidden_states(inputs, prompts, wanted=learnt if self.level >= 5 else None)
        if self.level < 1:
            return F.cross_entropy(self.model.output(hidden).float().flatten(0, 1), targets.flatten())
        hidden, answers = hidden if self.level >= 5 else hidden[learnt], targets[learnt]
        if self.level < 4:
            return F.cross_entropy(self.model.output(hidden).float(), answers)
        return HeadLoss.apply(hidden, self.model.output.weight, answers) / len(answers)


def epoch(contestant: Contestant, examples: list[Tokens], batch_size: int) -> Callable[[], None]:
    """One epoch with AdamW; batches are of like length where that is the contestant's way, else random."""
    optimizer = contestant.optimizer(lr=1e-3)
    if contestant.like_length:
        batches = epoch_batches([len(example.ids) for example in examples], batch_size, seed=0, epoch=0)
    else:
        order = np.random.default_rng(0).permutation(len(examples)).tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def run() -> None:
        for batch in batches:
            contestant.backward([examples[i] for i in batch])
            optimizer.step()
            optimizer.zero_grad()

    return run


# ---------------------------------------------------------------------------------------------------
# Memory


@cache
def kept_per_token(config: Config, recompute: bool) -> int:
    """How many numbers autograd keeps of each token in an adapted layer: what a third one adds to two."""
    two, three = (kept_numbers(config, layers, 256, recompute) for layers in (2, 3))
    return (three - two) // 256


def kept_numbers(config: Config, layers: int, tokens: int, recompute: bool) -> int:
    """How many numbers autograd keeps for the backward pass, found in a float32 model on the CPU; weights don't count.

    `layers` are adapted, and one below them is not.
    """
    small = Config(config.dim, layers + 1, config.n_heads, config.n_kv_heads, config.head_dim, config.hidden_dim, 64)
    model = random_model(small, torch.device("cpu"), torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    prompts = make_adapter(small, torch.device("cpu"), layers)()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(torch.zeros(1, tokens, dtype=torch.long), prompts, recompute=recompute)
    return sum(storage.nbytes() for storage in kept.values()) // 4


def count_bytes(config: Config, tokens: int, itemsize: int, recompute: bool) -> dict[str, int]:
    """Bytes by kind, at the worst moment of a step."""
    adapted = config.n_layers - 2
    kept, whole = (tokens * itemsize * kept_per_token(config, again) for again in (recompute, False))
    adapter = adapted * (LENGTH * config.dim + config.n_heads) * 4
    rows = {
        "weights": number_of_weights(config) * itemsize,
        "adapter, gradient, AdamW": adapter * 4,
        "activations kept": adapted * kept,
        "one layer at work": whole * (2 if recompute else 1),  # the gradients in it, and what it computes again
        "logits of a few rows": HeadLoss.ROWS * config.vocab_size * (itemsize + 4 + 4),  # and twice log p
    }
    return rows | {"sum": sum(rows.values())}


def measure_step(config: Config, tokens: int, device: torch.device, dtype: torch.dtype, recompute: bool) -> int:
    """The peak of one micro-batch of examples of 128 tokens, half of them response, the weights included."""
    model, adapter = random_model(config, device, dtype), make_adapter(config, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (tokens // 128, 129), generator=generator).tolist()
    examples = [Tokens(row, 64, f"row {i}") for i, row in enumerate(ids)]
    weights = sum(weight.nbytes for weight in model.parameters())
    accumulate_gradient(model, adapter, examples[:1], tokens, recompute)
    before = reset_peak(device)
    accumulate_gradient(model, adapter, examples, tokens, recompute)
    return peak(device) - before + weights


# ---------------------------------------------------------------------------------------------------
# Reporting


def describe(size: str, device: torch.device, dtype: torch.dtype) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    return {"size": size, "device": name, "threads": threads, "dtype": str(dtype)[6:], "torch": torch.__version__}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ratio_text(row: dict) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def report(kind: str, rows: dict[str, dict], columns: dict[str, Callable], about: dict, json_path: str | None) -> None:
    """A table on standard output; in the JSON file, the figures under a name of their own, and a picture beside it."""
    click.echo(f"{kind}: {', '.join(f'{name} {value}' for name, value in about.items())}")
    click.echo("| | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in rows.items():
        click.echo(f"| {name} | " + " | ".join(text(row) for text in columns.values()) + " |")
    if json_path is not None:
        path = Path(json_path)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        special = [name for name in ("checkpoint_activations", "check") if about.get(name)]
        known[" ".join([kind, about["size"], about["dtype"], *special])] = about | {"rows": rows}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        draw(known, path.with_suffix(".png"))


def draw(known: dict[str, dict], path: Path) -> None:
    """Bars of how many times as long as ours each takes, with the spread over the rounds."""
    panels = {title: part["rows"] for title, part in known.items() if "ratio" in next(iter(part["rows"].values()))}
    if not panels:
        return
    heights = [0.9 + 0.28 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    for axes, (title, rows) in zip(np.ravel(figure.subplots(len(panels), 1, height_ratios=heights)), panels.items()):
        ratios = [row["ratio"] for row in rows.values()]
        middle = [ratio["median"] for ratio in ratios]
        spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
        bars = axes.barh(list(rows), middle, xerr=spread, capsize=3, color="C0")
        axes.bar_label(bars, [f"{value:.2f}" for value in middle], padding=6)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="time, in times ours (less is better)")
        axes.margins(x=0.12)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
