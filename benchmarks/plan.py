"""On paper: memory, time and what travels between GPUs, for the paper's run over LLaMAs of all sizes."""

import math

import click

from benchmarks.tables import publish
from benchmarks.workload import LENGTH
from model import SIZES, Config
from runtime.cli import Real
from train import TrainConfig
from training.distributed import too_large

PAPER = TrainConfig()
EXAMPLES = 52_002  # of Stanford Alpaca, those held out among them
EXAMPLE_TOKENS, RESPONSE_TOKENS = 127.1, 65.5  # LLaMA's, on average

PLAN_COLUMNS = {
    "strategy": lambda row: row["strategy"],
    "weights": lambda row: f"{row['weights'] / 1e9:.0f} GB",
    "activations": lambda row: f"{row['activations'] / 1e9:.0f} GB",
    "in all": lambda row: f"{row['sum'] / 1e9:.0f} GB" if row["fits"] else f"{row['sum'] / 1e9:.0f} GB: too much",
    "checkpointed": lambda row: "yes" if row["checkpointed"] else "no",
    "hours": lambda row: f"{row['hours']:.1f}" if row["fits"] else "",
    "travels per step and GPU": lambda row: f"{row['travels'] / 1e6:,.0f} MB" if row["travels"] else "",
}


def plan_run(config: Config, gpus: int, memory: float, speed: float) -> dict:
    """For one size on so many GPUs of so many bytes and operations per second, with a base in bfloat16."""
    C, N, adapted = config.dim, config.n_layers, config.n_layers - 2
    step_tokens = PAPER.batch_size * EXAMPLE_TOKENS
    heads = config.n_heads + config.n_kv_heads
    layer = 2 * C * config.head_dim * heads + 3 * C * config.hidden_dim  # numbers
    outside = 2 * config.vocab_size * C
    strategy = "fsdp" if gpus > 1 and too_large(2 * (N * layer + outside), memory) else "ddp"
    # A split base: a part of each layer, and two whole ones, the one at work and the next.
    weights = 2 * (outside + (N * layer / gpus + 2 * layer if strategy == "fsdp" else N * layer))

    positions = min(PAPER.micro_batch_tokens, step_tokens / gpus)  # of a micro-batch
    kept = 2 * positions * (7 * C + 3 * config.hidden_dim)  # bytes in a layer, as memory.kept_per_token counts them
    activations, checkpointed = (adapted + 1) * kept, False
    if weights + activations > 0.9 * memory:
        activations, checkpointed = 2 * positions * C * adapted + 2 * kept, True
    adapter = 4 * adapted * (LENGTH * C + config.n_heads)

    # Two operations a weight and token forward; as many backwards where there are prompts; and where activations are
    # not kept, forward again. The head sees the response alone, forward and backwards.
    per_token = 2 * layer * (N + adapted * (2 if checkpointed else 1))
    operations = EXAMPLE_TOKENS * per_token + RESPONSE_TOKENS * 4 * config.vocab_size * C
    travels = 0.0
    if gpus > 1:
        travels = 2 * (gpus - 1) / gpus * adapter  # around a ring
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


@click.command("plan")
@click.option("--gpu-memory", type=Real(1), default=80, help="GB of each GPU.")
@click.option("--peak", type=Real(1), default=312, help="TFLOP/s of each GPU in bfloat16; 312 is an A100's.")
@click.option("--utilisation", type=Real(0, 1, min_open=True), default=0.4, help="Share of that; an assumption.")
def plan_runs(gpu_memory, peak, utilisation):
    """On paper: memory, time and what travels for the paper's run (Alpaca, 5 epochs, batch 64) by size and GPUs."""
    rows = {
        f"{size[6:]} on {gpus}": plan_run(SIZES[size], gpus, gpu_memory * 1e9, peak * 1e12 * utilisation)
        for size in ("LLaMA-7B", "LLaMA-13B", "LLaMA-33B", "LLaMA-65B")
        for gpus in (1, 8)
    }
    about = {"GB a GPU": gpu_memory, "TFLOP/s": peak, "utilisation": utilisation, "K": LENGTH}
    publish("plan", rows, PLAN_COLUMNS, about)
