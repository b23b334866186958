"""Count and measure the memory of a training step, and estimate memory, time and traffic of the paper's training."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import click
import torch
from cloup import command, option, option_group
from torch import Tensor

from benchmarks.measuring import json_option, measured_on, peak_growth, publish
from benchmarks.sizes import SIZES
from benchmarks.workload import LENGTH, CONFIGS, random_adapter, random_examples, random_model
from data import MICRO_BATCH_TOKENS
from model import Config, num_parameters
from runtime.cli import Real, device_options, one_line_errors
from runtime.device import select_device
from train import TrainConfig, make_optimizer, train_step
from training.loss import ROWS
from training.memory import activation_bytes, logit_bytes
from training.sharding import too_large


@cache
def kept_per_token(config: Config, checkpoint_activations: bool) -> int:
    """Return how many numbers autograd saves per token in one adapted layer.

    It is computed as the difference between models with three and with two adapted layers.
    """
    two, three = (kept_numbers(config, layers, 256, checkpoint_activations) for layers in (2, 3))
    return (three - two) // 256


def kept_numbers(config: Config, layers: int, tokens: int, checkpoint_activations: bool) -> int:
    """Return how many numbers, except weights, autograd saves for the backward pass of a float32 model on the CPU.

    The model has `layers` adapted layers, and one layer without an adapter below them.
    """
    small = Config(config.dim, layers + 1, config.n_heads, config.n_kv_heads, config.head_dim, config.hidden_dim, 64)
    model = random_model(small, torch.device("cpu"), torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by address; keeps storages alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    adaption_prompts, ids = (
        random_adapter(small, torch.device("cpu"), layers)(),
        torch.zeros(1, tokens, dtype=torch.long),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(ids, adaption_prompts, checkpoint_activations=checkpoint_activations)
    return sum(storage.nbytes() for storage in kept.values()) // 4


def count_bytes(
    config: Config, tokens: int, itemsize: int, checkpoint_activations: bool, device: str = "cuda"
) -> dict[str, int]:
    """Return the bytes of each kind at the peak of a training step on `tokens` tokens, and their sum.

    `itemsize` is the number of bytes per number in the base's dtype. `device` is a device type, "cuda" or "cpu".
    All but two layers are adapted.
    """
    adapted = config.n_layers - 2
    kept, whole = (tokens * itemsize * kept_per_token(config, again) for again in (checkpoint_activations, False))
    adapter = adapted * (LENGTH * config.dim + config.n_heads) * 4
    rows_at_a_time = min(ROWS.get(device, ROWS["cpu"]), tokens)
    rows = {
        "weights": num_parameters(config) * itemsize,
        "adapter, gradient, AdamW": adapter * 4,
        "activations kept": adapted * kept,
        # The gradients of the activations; with checkpointing also the activations that are recomputed.
        "one layer at work": whole * (2 if checkpoint_activations else 1),
        "logits of a few rows": logit_bytes(config, rows_at_a_time, itemsize),
    }
    return rows | {"sum": sum(rows.values())}


def measure_step(
    config: Config, tokens: int, device: torch.device, dtype: torch.dtype, checkpoint_activations: bool
) -> int:
    """Return the peak memory of a training step on `tokens` positions in bytes, including the weights.

    Each example has 128 positions, about half of them in the response.
    """
    model, adapter = random_model(config, device, dtype), random_adapter(config, device)
    optimizer = make_optimizer(adapter, 0.02)
    train_config = TrainConfig(micro_batch_tokens=tokens, checkpoint_activations=checkpoint_activations)
    examples = random_examples(config, [129] * (tokens // 128))
    train_step(model, adapter, optimizer, examples[:1], 1e-3, train_config)
    growth = peak_growth(lambda: train_step(model, adapter, optimizer, examples, 1e-3, train_config), device)
    return growth + sum(weight.nbytes for weight in model.parameters())


@command("memory", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--size", type=click.Choice(list(CONFIGS)), default="7B", help="Size of the model."),
    option("--check", is_flag=True, help="Also measure training steps of a model of this size on this machine."),
    *device_options,
    json_option,
)
@one_line_errors()
def count_memory(size, check, json_path, device, dtype):
    """Count the bytes of a training step.

    Lists the bytes by kind, for several numbers of tokens in a micro-batch. The base is in bfloat16, or in --dtype if
    --check is given.
    """
    device, dtype = select_device(device, dtype)
    config, itemsize, rows = CONFIGS[size], dtype.itemsize if check else 2, {}
    for checkpointed in (False, True):
        for tokens in (512, 1024, 2048, 4096, 8192):
            row = count_bytes(config, tokens, itemsize, checkpointed, device.type if check else "cuda")
            if check:
                context = multiprocessing.get_context("spawn")  # a new process has no memory from earlier steps
                with ProcessPoolExecutor(1, context) as process:
                    row["measured"] = process.submit(measure_step, config, tokens, device, dtype, checkpointed).result()
            rows[f"{tokens} tokens{', --checkpoint-activations' if checkpointed else ''}"] = row
    about = measured_on(size, device, dtype) | {"K": LENGTH, "L": config.n_layers - 2, "check": check}
    about["dtype"] = {2: "bfloat16", 4: "float32"}[itemsize]
    columns = {name: lambda row, name=name: f"{row[name] / 2**30:.2f} GiB" for name in next(iter(rows.values()))}
    publish("memory", rows, columns, about, json_path)


PAPER = TrainConfig()
EXAMPLES = 52_002  # number of examples of Stanford Alpaca, including the validation set
EXAMPLE_TOKENS, RESPONSE_TOKENS = 127.1, 65.5  # averages with LLaMA's tokenizer

PLAN_COLUMNS = {
    "strategy": lambda row: row["strategy"],
    "weights": lambda row: f"{row['weights'] / 1e9:.0f} GB",
    "activations": lambda row: f"{row['activations'] / 1e9:.0f} GB",
    "total": lambda row: f"{row['sum'] / 1e9:.0f} GB" if row["fits"] else f"{row['sum'] / 1e9:.0f} GB: too much",
    "checkpointed": lambda row: "yes" if row["checkpointed"] else "no",
    "hours": lambda row: f"{row['hours']:.1f}" if row["fits"] else "",
    "traffic per step and GPU": lambda row: f"{row['travels'] / 1e6:,.0f} MB" if row["travels"] else "",
}


def step_operations(config: Config, tokens: float, responses: float, checkpointed: bool) -> float:
    """Return the number of floating-point operations of a training step on `tokens` tokens.

    In the forward pass, a layer needs two operations per weight and token. All but two layers are adapted: they need
    the same number in the backward pass, and with checkpointing also for the recomputation. The output head runs
    forward and backward on the `responses` response tokens only. The matmuls with keys and values are not counted.
    """
    heads = config.n_heads + config.n_kv_heads
    layer = 2 * config.dim * config.head_dim * heads + 3 * config.dim * config.hidden_dim  # number of weights
    per_token = 2 * layer * (config.n_layers + (config.n_layers - 2) * (2 if checkpointed else 1))
    return tokens * per_token + responses * 4 * config.vocab_size * config.dim


def plan_run(config: Config, gpus: int, memory: float, speed: float) -> dict:
    """Estimate memory, time and traffic of the paper's training with a bfloat16 base.

    Each GPU has `memory` bytes and performs `speed` floating-point operations per second.
    """
    C, N, adapted = config.dim, config.n_layers, config.n_layers - 2
    step_tokens = PAPER.batch_size * EXAMPLE_TOKENS
    heads = config.n_heads + config.n_kv_heads
    layer = 2 * C * config.head_dim * heads + 3 * C * config.hidden_dim  # number of weights
    outside = 2 * config.vocab_size * C
    strategy = "fsdp" if gpus > 1 and too_large(2 * (N * layer + outside), memory) else "ddp"
    # With FSDP, a GPU holds its shard of each layer, and two gathered layers: the current one and the next.
    weights = 2 * (outside + (N * layer / gpus + 2 * layer if strategy == "fsdp" else N * layer))

    positions = min(MICRO_BATCH_TOKENS, step_tokens / gpus)  # positions per micro-batch
    activations, checkpointed = positions * activation_bytes(config, adapted, 2, False), False
    if weights + activations > 0.9 * memory:
        activations, checkpointed = positions * activation_bytes(config, adapted, 2, True), True
    adapter = 4 * adapted * (LENGTH * C + config.n_heads)

    operations = step_operations(config, EXAMPLE_TOKENS, RESPONSE_TOKENS, checkpointed)
    travels = 0.0
    if gpus > 1:
        travels = 2 * (gpus - 1) / gpus * adapter  # all-reduce around a ring
    if strategy == "fsdp":
        travels += (gpus - 1) / gpus * 2 * layer * (N + adapted) * math.ceil(step_tokens / gpus / positions)
    total = weights + activations + 4 * adapter
    return {
        "strategy": strategy if gpus > 1 else "",
        "weights": weights,
        "activations": activations,
        "sum": total,
        "fits": total < 0.95 * memory,
        "checkpointed": checkpointed,
        "hours": PAPER.epochs * (1 - PAPER.val_size) * EXAMPLES * operations / (gpus * speed) / 3600,
        "operations": operations,
        "travels": travels,
    }


@command("plan", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--gpu-memory", type=Real(1), default=80, help="Memory per GPU, in GB."),
    option("--peak", type=Real(1), default=312, help="Peak TFLOP/s per GPU in bfloat16; an A100 has 312."),
    option(
        "--utilization",
        type=Real(0, 1, min_open=True),
        default=0.4,
        help="Share of --peak that training is assumed to reach.",
    ),
)
def plan_runs(gpu_memory, peak, utilization):
    """Estimate the paper's training for several model sizes.

    Estimates memory, time and traffic of 5 epochs on Alpaca with batch size 64, for bases of 7B to 65B parameters, on 1
    and 8 GPUs.
    """
    rows = {
        f"{size[6:]} on {gpus}": plan_run(SIZES[size], gpus, gpu_memory * 1e9, peak * 1e12 * utilization)
        for size in ("LLaMA-7B", "LLaMA-13B", "LLaMA-33B", "LLaMA-65B")
        for gpus in (1, 8)
    }
    about = {"GB per GPU": gpu_memory, "TFLOP/s": peak, "utilization": utilization, "K": LENGTH}
    publish("plan", rows, PLAN_COLUMNS, about)
