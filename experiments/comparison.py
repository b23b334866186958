"""What the method is compared with, for comparison only: prompts without gates, LoRA, full tuning; and one such run.

All of it is trained by the same step (step.py) on the same batches: what is trained is an argument of it, and either
adds prompts, as an adapter does, or has none. experiments.py asks how they do.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adapter import Adapter, Prompt, attend, gated_attention
from formats.bases import load_llama
from data import Batch, Example, Tokenizer, Tokens, epoch_batches
from evaluate import ask
from model import LLaMA
from training.step import IDLE, RESPONSES, Responses, learning_rate, make_optimizer, mean_loss, states_and_answers, update


def ungated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """What the paper compares with: prompts in one softmax with the words, from the start ("random-init attention").

    Shapes as for `gated_attention`; the gate is left out.
    """
    B, _, T, _ = q.shape
    prompt_k, prompt_v = prompt_k.expand(B, -1, -1, -1), prompt_v.expand(B, -1, -1, -1)
    seen = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device)
    words = (seen.tril() if causal else seen) if mask is None else mask
    words = words.expand(B, 1, T, k.shape[2])
    prompts = torch.ones(B, 1, T, prompt_k.shape[2], dtype=torch.bool, device=q.device)
    k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
    return attend(q, k, v, torch.cat([prompts, words], dim=3))


class LowAdapter(Adapter):
    """An adapter of the lowest layers: the `above` others have prompts as well, but their gates stay shut."""

    def __init__(self, *, above: int, **shape):
        super().__init__(**shape)
        self.above = above

    def forward(self, *args, **options) -> list[Prompt]:
        prompts = super().forward(*args, **options)
        shut = Prompt(prompts[0].tokens.detach(), torch.zeros_like(prompts[0].gate))
        return prompts + [shut] * self.above


class LoRALinear(nn.Module):
    """W x + B A x, of rank r (Hu et al., 2022); B is zero at the start."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        bound = linear.in_features**-0.5
        self.a = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x.to(self.a.dtype) @ self.a.T @ self.b.T).to(x.dtype)


def with_lora(model: nn.Module, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Put it on wq and wv of every layer, as Alpaca-LoRA does; returns what is trained."""
    for layer in model.layers:
        layer.attention.wq = LoRALinear(layer.attention.wq, rank, generator)
        layer.attention.wv = LoRALinear(layer.attention.wv, rank, generator)
    return [p for layer in model.layers for x in (layer.attention.wq, layer.attention.wv) for p in (x.a, x.b)]


class Inside(nn.Module):
    """What is trained inside the base, in the place of an adapter: it has no prompts."""

    def __init__(self, trained: Iterable[nn.Parameter]):
        super().__init__()
        self.trained = nn.ParameterList(trained)

    def forward(self, *_, **__) -> list[Prompt]:
        return []

    def optimizer(self, weight_decay: float) -> torch.optim.AdamW:
        """As `step.make_optimizer`."""
        groups = [{"params": list(self.parameters()), "weight_decay": weight_decay, "scale": 1.0}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


class AllWeights(Responses):
    """Responses as an objective where the output head learns, too: step.py's loss has no gradient for it."""

    def loss_sum(self, model: LLaMA, adapter: nn.Module, batch: Batch | None, recompute: bool = False) -> Tensor:
        hidden, answers = states_and_answers(model, (), IDLE if batch is None else batch, recompute)
        return F.cross_entropy(model.output(hidden).float(), answers, reduction="sum")


POSITIONS = 8192  # per forward pass
WEIGHT_DECAY = 0.02


def fit(
    model: nn.Module,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: list,
    objective: Responses,
    *,
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    watch: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """train.py's steps, without its files; the loss of each. `watch` is called before every step, and at the end.

    Where values are no longer finite it ends, with the parameters before that step; the losses from there on are NaN.
    """
    lengths = [example.size for example in examples]
    per_epoch = math.ceil(len(examples) / batch_size)
    steps = [batch for epoch in range(epochs) for batch in epoch_batches(lengths, batch_size, seed, epoch)]
    losses = []
    for step, batch in enumerate(tqdm(steps, unit="step", file=sys.stderr, leave=False)):
        watch(step)
        rate = learning_rate(step, peak=lr, warmup=warmup_epochs * per_epoch, total=len(steps))
        how = POSITIONS, False, objective
        try:
            losses.append(update(model, learner, optimizer, [examples[i] for i in batch], rate, *how))
        except FloatingPointError:
            losses += [math.nan] * (len(steps) - step)
            break
    watch(len(steps))
    return losses


# ---------------------------------------------------------------------------------------------------
# One run

ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE = "zero-init attention", "random init, one softmax", "random init, gates at 1"
LORA, FULL = "LoRA", "full tuning"


class Setting(NamedTuple):
    """How to tune. What is not said in a table is as here, or as its command's options say."""

    layers: int  # L
    lr: float
    method: str = ZERO_INIT
    where: str = "top"
    length: int = 10  # K
    epochs: int = 5  # the paper's, and its two epochs of warm-up
    scale: float = 1.0  # prompts start as N(0, scale^2)
    activation: str = "tanh"
    gate_per: str = "head"
    gate_decay: float = 0.0
    rank: int = 8  # of LoRA


WARMUP_EPOCHS = 2


@dataclass(eq=False)
class World:
    """A base, what it is tuned on, what it is asked, and text like that which it was pre-trained on."""

    base: Path
    tokenizer: Tokenizer
    tuning: list[Tokens]
    held_out: list[Tokens]
    questions: list[Example]  # those of held_out
    text: Tensor  # (rows, T) token ids; of no rows where there is no such text
    layers: int  # N
    batch_size: int
    default: Setting
    device: torch.device
    dtype: torch.dtype


def set_up(world: World, setting: Setting, seed: int) -> tuple[LLaMA, nn.Module, torch.optim.Optimizer, Responses]:
    """A fresh base, what learns, its optimizer, and what is to be learnt. What learns is always in float32."""
    generator = torch.Generator().manual_seed(seed)
    if setting.method == FULL:
        model, _ = load_llama(world.base, torch.float32, world.device)
        learner = Inside(model.requires_grad_(True).parameters())
        return model, learner, learner.optimizer(WEIGHT_DECAY), AllWeights()
    attention = ungated_attention if setting.method == ONE_SOFTMAX else gated_attention
    model, _ = load_llama(world.base, world.dtype, world.device, attention)
    if setting.method == LORA:
        learner = Inside(with_lora(model, setting.rank, generator)).to(world.device)
        return model, learner, learner.optimizer(WEIGHT_DECAY), RESPONSES
    shape = {"layers": setting.layers, "length": setting.length, "dim": model.config.dim, "generator": generator}
    shape["heads"] = model.config.n_heads if setting.gate_per == "head" else 1  # a layer's only gate is for all heads
    shape["gate_activation"] = "identity" if setting.method == GATES_AT_ONE else setting.activation
    above = model.config.n_layers - setting.layers if setting.where == "bottom" else 0
    adapter = (LowAdapter(above=above, **shape) if above else Adapter(**shape)).to(world.device)
    with torch.no_grad():
        adapter.prompts *= setting.scale
        if setting.method == GATES_AT_ONE:
            adapter.gates.fill_(1.0)
    adapter.gates.requires_grad_(setting.method == ZERO_INIT)
    optimizer = make_optimizer(adapter, WEIGHT_DECAY)
    optimizer.param_groups[1]["weight_decay"] = setting.gate_decay
    return model, adapter, optimizer, RESPONSES


def tune(world: World, setting: Setting, seed: int, watch: Callable = lambda adapter, step: None):
    """The model, what has learnt, the loss of every step, and the seconds that it took."""
    model, learner, optimizer, objective = set_up(world, setting, seed)
    how = {"epochs": setting.epochs, "warmup_epochs": WARMUP_EPOCHS, "batch_size": world.batch_size, "lr": setting.lr}
    start = time.perf_counter()
    losses = fit(
        model, learner, optimizer, world.tuning, objective, **how, seed=seed, watch=lambda step: watch(learner, step)
    )
    return model, learner, losses, time.perf_counter() - start


@torch.no_grad()
def exact(world: World, model: LLaMA, prompts: Sequence[Prompt]) -> float:
    """The share of the held-out questions that are answered in the very words expected, and no more."""
    longest = max(len(tokens.ids) - tokens.prompt_length for tokens in world.held_out)
    answers = ask(model, world.tokenizer, prompts, world.questions, limit=longest + 1)
    return sum(ended and text == q.output for (text, ended), q in zip(answers, world.questions)) / len(answers)


@torch.no_grad()
def perplexity(world: World, model: LLaMA, prompts: Sequence[Prompt] = ()) -> float | None:
    """Of the base's own kind of text."""
    if not len(world.text):
        return None
    losses = [
        F.cross_entropy(model(rows[:, :-1], prompts).float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        for rows in world.text.to(world.device).split(8)
    ]
    return (torch.stack(losses).sum() / world.text[:, 1:].numel()).exp().item()


@cache
def untouched(world: World) -> tuple[float | None, Tensor]:
    """The base's perplexity, and its logits for some questions."""
    model, _ = load_llama(world.base, world.dtype, world.device)
    return perplexity(world, model), logits_of(world, model)


@torch.no_grad()
def logits_of(world: World, model: LLaMA, prompts: Sequence[Prompt] = ()) -> Tensor:
    """(tokens, V), for the first few questions and their answers."""
    rows = [torch.tensor([tokens.ids], device=world.device) for tokens in world.held_out[:8]]
    return torch.cat([model(row, prompts)[0] for row in rows])


@torch.no_grad()
def recovered(world: World, setting: Setting, model: LLaMA, learner: nn.Module) -> bool:
    """Whether the base's logits are had again, bit for bit, from the tuned model without what was learnt.

    Gates are shut, prompts without gates and LoRA's matrices are left out; of full tuning nothing can be.
    """
    kept = [lora.b.clone() for lora in loras(model)]
    for lora in loras(model):
        lora.b.zero_()
    prompts = () if setting.method == ONE_SOFTMAX else learner(strength=0.0, dtype=world.dtype)
    same = torch.equal(logits_of(world, model, prompts), untouched(world)[1])
    for lora, b in zip(loras(model), kept):
        lora.b.copy_(b)
    return same


@torch.no_grad()
def recovered_after_merging(model: LLaMA) -> bool | None:
    """Whether LoRA, added to the weights, can be subtracted again without a trace. None where there is no LoRA."""
    merged = [(lora.linear.weight, (lora.b @ lora.a).to(lora.linear.weight.dtype)) for lora in loras(model)]
    return all(torch.equal(w + change - change, w) for w, change in merged) if merged else None


def loras(model: LLaMA) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@cache
def run(world: World, setting: Setting, seed: int) -> dict:
    """Tune, and measure: what stands in a table, for one seed."""
    model, learner, losses, seconds = tune(world, setting, seed)
    prompts = learner(dtype=world.dtype)
    trained = [p for p in learner.parameters() if p.requires_grad]
    last_epoch = losses[-(len(losses) // setting.epochs) :]
    return {
        "accuracy": exact(world, model, prompts),
        "train_loss": statistics.mean(last_epoch),
        "val_loss": mean_loss(model, learner, world.held_out, POSITIONS),
        "seconds": seconds,
        "trained": sum(p.numel() for p in trained),
        "bytes": sum(p.numel() * p.element_size() for p in trained),
        "perplexity": perplexity(world, model, prompts),
        "recovered": recovered(world, setting, model, learner),
        "recovered_after_merging": recovered_after_merging(model),
        "losses": losses,
    }
