"""Measure a trained model: exact match, perplexity on pretraining-like text, and whether the base can be recovered."""

import math
import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import AdaptionPrompt
from data import Request
from experiments.methods import FULL, LORA, ONE_SOFTMAX, Setting, Trainable, finite_steps, load_state, lora_layers
from experiments.methods import save_state, set_up
from experiments.testbed import Testbed
from formats.bases import load_llama
from generate import Responder
from model import LLaMA
from tasks.responses import generate_responses
from train import TrainConfig, mean_loss


def share_equal(texts: Sequence[str | None], expected: Sequence[str | None]) -> float:
    """Return the share of texts that equal their expected texts."""
    return statistics.mean(text == other for text, other in zip(texts, expected))


def exact_accuracy(testbed: Testbed, model: LLaMA, adapter: nn.Module | None) -> float:
    """Return the share of held-out questions whose greedy response equals the expected response exactly.

    If `adapter` is None, the base responds alone.
    """
    limit = 1 + max(tokens.num_targets for tokens in testbed.held_out)
    name, adapters = ("base", {}) if adapter is None else ("adapter", {"adapter": adapter})
    responder = Responder(model, testbed.tokenizer, adapters, max_new_tokens=limit)
    requests = [Request(question.instruction, question.input, name) for question in testbed.questions]
    responses = generate_responses(responder, requests, batch_size=128, unit="question")
    return share_equal(responses, [question.output for question in testbed.questions])


@torch.no_grad()
def text_perplexity(model: LLaMA, text: Tensor, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> float:
    """Return the perplexity of the model on token ids (rows, T)."""
    losses = [
        F.cross_entropy(
            model(rows[:, :-1], adaption_prompts).float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        for rows in text.split(8)
    ]
    return (torch.stack(losses).sum() / text[:, 1:].numel()).exp().item()


def perplexity(testbed: Testbed, model: LLaMA, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> float | None:
    """Return the perplexity of the model on the testbed's text, or None if the testbed has no text."""
    return text_perplexity(model, testbed.text.to(testbed.device), adaption_prompts) if len(testbed.text) else None


@torch.no_grad()
def first_logits(testbed: Testbed, model: LLaMA, adaption_prompts: Sequence[AdaptionPrompt] = ()) -> Tensor:
    """Return the logits (tokens, V) at all positions of the first eight held-out examples."""
    rows = [torch.tensor([tokens.ids], device=testbed.device) for tokens in testbed.held_out[:8]]
    return torch.cat([model(row, adaption_prompts)[0] for row in rows])


@cache
def base_measures(testbed: Testbed) -> tuple[float | None, Tensor]:
    """Return the `perplexity` and the `first_logits` of the base before training."""
    model, _ = load_llama(testbed.base, testbed.dtype, testbed.device)
    return perplexity(testbed, model), first_logits(testbed, model)


@torch.no_grad()
def base_recovered(testbed: Testbed, method: str, model: LLaMA, adapter: nn.Module) -> bool:
    """Return True if disabling the trained parameters restores the base's logits bit for bit.

    Gate values are multiplied by 0, and prompts without gates are omitted. LoRA layers are disabled, and remain
    disabled afterward. After full fine-tuning there is nothing to disable.
    """
    if method == LORA:
        for layer in lora_layers(model):
            layer.enable_adapters(False)
    adaption_prompts = () if method == ONE_SOFTMAX else adapter(gate_scale=0.0, dtype=testbed.dtype)
    return torch.equal(first_logits(testbed, model, adaption_prompts), base_measures(testbed)[1])


def recovered_after_merging(testbed: Testbed, method: str, model: LLaMA, adapter: nn.Module) -> bool | None:
    """Return `base_recovered` after merging LoRA into the weights and unmerging it; None for other methods."""
    if method != LORA:
        return None
    for layer in lora_layers(model):
        layer.merge()
        layer.unmerge()
    return base_recovered(testbed, method, model, adapter)


# ---------------------------------------------------------------------------------------------------
# One run


SAVE_EVERY = 120  # seconds


def train_setting(
    testbed: Testbed, setting: Setting, seed: int, checkpoint: Path | None = None
) -> tuple[Trainable, list[float], float]:
    """Train with one seed. Return the Trainable, the loss of every step, and the training time in seconds.

    Training ends early if the loss or its gradient is not finite; the losses of the remaining steps are then NaN. If
    `checkpoint` is given, the training state is saved to this file every two minutes, and training resumes from the
    file if it exists.
    """
    config = testbed.train_config(setting, seed)
    trainable = set_up(setting, seed, testbed.base, testbed.dtype, testbed.device)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint is not None and checkpoint.exists():
        losses, seconds = load_state(checkpoint, trainable)
    saved = time.perf_counter()
    for step in finite_steps(trainable, testbed.training, config, first_step=len(losses)):
        losses.append(step.loss)
        seconds += step.seconds
        if checkpoint is not None and time.perf_counter() - saved > SAVE_EVERY:
            save_state(checkpoint, trainable, losses, seconds)
            saved = time.perf_counter()
    total = config.epochs * math.ceil(len(testbed.training) / config.batch_size)
    return trainable, losses + [math.nan] * (total - len(losses)), seconds


def run_setting(testbed: Testbed, setting: Setting, seed: int, checkpoint: Path | None = None) -> dict:
    """Train with one seed, measure the model, and return the results by name. See `train_setting` for `checkpoint`."""
    (model, adapter, _, _), losses, seconds = train_setting(testbed, setting, seed, checkpoint)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    sizes = {"trained": sum(p.numel() for p in trained), "bytes": sum(p.nbytes for p in trained)}
    if setting.method == FULL:
        model.to(testbed.dtype)  # because the other methods are measured in this dtype
    adaption_prompts = adapter(dtype=testbed.dtype)
    last_epoch = losses[-(len(losses) // setting.epochs) :]
    return sizes | {
        "accuracy": exact_accuracy(testbed, model, adapter),
        "train_loss": statistics.mean(last_epoch),
        "val_loss": mean_loss(model, adapter, testbed.held_out, TrainConfig()),
        "seconds": seconds,
        "perplexity": perplexity(testbed, model, adaption_prompts),
        "recovered": base_recovered(testbed, setting.method, model, adapter),
        "recovered_after_merging": recovered_after_merging(testbed, setting.method, model, adapter),
        "losses": losses,
    }
