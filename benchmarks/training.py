"""Benchmark of training: seconds per epoch of this implementation, its ablations, and other implementations."""

import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from cloup import command, option
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapter import Adapter
from benchmarks.measuring import (
    compare_seconds,
    interleave,
    matmul_work,
    measured_on,
    peak_growth,
    publish,
    ratio_text,
    share_of,
)
from benchmarks.peers import Adapted, Contestant, Ours, Plain, Variant, installed_peers, padded
from benchmarks.workload import Workload, compile_option, precisions, precisions_option, prepare_workload
from benchmarks.workload import workload_options
from data import IGNORE, TokenizedExample, collate, epoch_batches
from model import LLaMA
from runtime.cli import Count, one_line_errors

TRAINING_COLUMNS = {
    "seconds": lambda row: f"{row['median']:.2f}",
    "times ours": ratio_text,
    "examples/s": lambda row: f"{row['examples_per_second']:.1f}",
    "response tokens/s": lambda row: f"{row['response_tokens_per_second']:,.0f}",
    "memory beyond the model": lambda row: f"{row['peak_bytes_beyond_the_model'] / 2**20:,.0f} MiB",
    "share of matmul peak": lambda row: f"{100 * row['utilization']:.0f} %" if row["utilization"] else "",
}


class Ablation(Adapted):
    """Intermediate versions between `Plain` and `Ours`.

    Each of LEVELS adds one optimization to the previous level, the first one to `Plain`. `Ours` also has the
    optimization LAST.
    """

    LEVELS = [
        "+ fused attention",
        "+ logits at response tokens only",
        "+ padded to the longest of the batch",
        "+ batches of similar length",
    ]
    LAST = "+ logits and their gradient in chunks: ours"

    def __init__(self, model: LLaMA, adapter: Adapter, level: str):
        super().__init__(model, adapter)
        self.level = self.LEVELS.index(level)
        self.groups_by_length = self.level >= 3

    def loss(self, examples: list[TokenizedExample]) -> Tensor:
        inputs, targets = padded(examples, 512) if self.level < 2 else collate(examples)[:2]
        device = self.model.device
        inputs, targets = inputs.to(device), targets.to(device)
        hidden = self.model.hidden_states(inputs, self.adapter(dtype=self.model.dtype))
        if self.level >= 1:
            hidden, targets = hidden[targets != IGNORE], targets[targets != IGNORE]
        logits = self.model.output(hidden).float().flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)


def epoch(contestant: Contestant, examples: list[TokenizedExample], batch_size: int) -> Callable[[], None]:
    """Return a function that trains the contestant for one epoch. All calls use the same batches and optimizer.

    If `contestant.groups_by_length`, the examples of a batch have similar lengths; otherwise batches are random.
    """
    optimizer = contestant.optimizer()
    if contestant.groups_by_length:
        batches = epoch_batches([example.num_tokens for example in examples], batch_size, seed=0, epoch=0)
    else:
        order = np.random.default_rng(0).permutation(len(examples)).tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def run_epoch() -> None:
        for batch in batches:
            contestant.step(optimizer, [examples[i] for i in batch])

    return run_epoch


def training_contestants(
    workload: Workload, variant: Variant, micro_batch_tokens: int, ablation: bool
) -> tuple[dict[str, Contestant], str]:
    """Return the contestants by name, and the name of this implementation."""
    model, name = workload.new_model(), Ablation.LAST if ablation else "ours"
    contestants: dict[str, Contestant] = {}
    if ablation:
        contestants["plain"] = Plain(model, workload.new_adapter())
        for level in Ablation.LEVELS:
            contestants[level] = Ablation(model, workload.new_adapter(), level)
    contestants[name] = Ours(model, workload.new_adapter(), variant, micro_batch_tokens)
    for precision, other in precisions(workload, variant).items():
        contestants[precision] = Ours(model, workload.new_adapter(), other, micro_batch_tokens)
    if workload.compiled:
        compiled = variant._replace(compiled=True)
        contestants["ours, compiled"] = Ours(model, workload.new_adapter(), compiled, micro_batch_tokens)
    if workload.peers:
        contestants |= installed_peers(model, workload.new_adapter(), ["adaption prompt", "lora", "full tuning"])
    return contestants, name


@torch.no_grad()
def first_losses(contestants: dict[str, Contestant], ours: str, examples: list[TokenizedExample]) -> dict[str, float]:
    """Return the loss of each contestant on the same examples.

    Raises ValueError if a loss differs from that of this implementation, because the times would not be
    comparable. Variants in other precisions are not checked.
    """
    losses = {name: contestant.loss(examples).item() for name, contestant in contestants.items()}
    tolerance = 1e-3 if contestants[ours].model.dtype == torch.float32 else 5e-3
    for name, loss in losses.items():
        rounded = name.endswith(("bits", "float32", "bfloat16"))  # these variants compute a slightly different loss
        if not rounded and abs(loss - losses[ours]) > tolerance * losses[ours]:
            raise ValueError(
                f"{name} has a first loss of {loss:.5f}, but this implementation has {losses[ours]:.5f}; "
                "their times are not comparable"
            )
    return losses


@command("train", context_settings={"show_default": True})
@workload_options(
    compile_option,
    precisions_option,
    option("--examples", "number", type=Count(), default=32, help="Number of examples to train on."),
    option("--batch-size", type=Count(), default=8, help="Number of examples per optimizer step."),
    option("--micro-batch-tokens", type=Count(), default=8192, help="Maximum number of positions per forward pass."),
    option("--checkpoint-activations", is_flag=True, help="Recompute activations in the backward pass."),
    option(
        "--ablation", is_flag=True, help="Also time a plain version to which the optimizations are added one by one."
    ),
)
@one_line_errors()
def time_training(json_path, number, batch_size, micro_batch_tokens, checkpoint_activations, ablation, **options):
    """Time one epoch of training.

    The time includes all optimizer steps of the epoch. All contestants train on the same examples.
    """
    workload = prepare_workload(**options)
    variant = Variant(checkpoint_activations=checkpoint_activations)
    device, examples = workload.device, workload.examples(number)
    contestants, ours = training_contestants(workload, variant, micro_batch_tokens, ablation)
    losses = first_losses(contestants, ours, examples[:batch_size])
    epochs = {name: epoch(contestant, examples, batch_size) for name, contestant in contestants.items()}
    for run_epoch in epochs.values():
        run_epoch()
    peaks = {name: peak_growth(run_epoch, device) for name, run_epoch in epochs.items()}
    peak_work, peak_operations = matmul_work(device, workload.dtype)
    seconds = interleave(epochs | {"matmul peak": peak_work}, workload.repeat, device)
    peak_seconds = seconds.pop("matmul peak")
    rows = compare_seconds(seconds, ours)
    with FlopCounterMode(display=False) as counter:
        epochs[ours]()
    flops = counter.get_total_flops()
    for name, row in rows.items():
        row["examples_per_second"] = len(examples) / row["median"]
        row["response_tokens_per_second"] = sum(example.num_targets for example in examples) / row["median"]
        row["peak_bytes_beyond_the_model"] = peaks[name]
        row["first_loss"] = losses[name]
        row["utilization"] = None
        if isinstance(contestants[name], Ours) and contestants[name].model.dtype == workload.dtype:
            row["utilization"] = share_of(flops, row["seconds"], peak_operations, peak_seconds)
    about = measured_on(workload.name, device, workload.dtype) | {
        "examples": len(examples),
        "batch_size": batch_size,
        "micro_batch_tokens": micro_batch_tokens,
        "checkpoint_activations": checkpoint_activations,
        "ablation": ablation,
        "tokens": sum(example.num_tokens for example in examples),
        "flops_of_ours": flops,
        "matmul_flops_per_second": peak_operations / statistics.median(peak_seconds),
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }
    publish("ablation" if ablation else "train", rows, TRAINING_COLUMNS, about, json_path)
