"""Teach a base that was pretrained only on stories to follow instructions, with all examples or a share of them."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from cloup import option, option_group
from matplotlib.figure import Figure
from torch import Tensor, nn

from data import AlpacaTemplate, Request, Tokenizer, TokenizedExample, tokenize
from experiments.drawing import draw_bars, draw_line, percent
from experiments.measures import text_perplexity
from experiments.methods import FULL, GATES_AT_ONE, LORA, ONE_SOFTMAX, ZERO_INIT
from experiments.methods import WARMUP_EPOCHS, Setting, finite_steps, import_peft, set_up
from experiments.runs import Column, Runs, experiment, training_options
from experiments.stories import KINDS, StorySets, StoryInstruction, follows, is_story, make_instructions, read_stories
from experiments.stories import whole_sentences
from experiments.testbed import text_rows
from formats.bases import load_llama, read_base
from formats.tokenizers import load_tokenizer
from generate import Responder
from model import LLaMA
from runtime.cli import PATH, Count, device_options
from runtime.device import select_device
from tasks.responses import generate_responses
from train import TrainConfig

# TRIED are the learning rates that --search compares on the validation instructions; BEST is the best for each method.
TRIED = {method: (0.01, 0.03, 0.1, 0.3, 1.0) for method in (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE)}
TRIED |= {LORA: (0.001, 0.003, 0.01, 0.03), FULL: (0.0001, 0.0003, 0.001, 0.003)}
BEST = {ZERO_INIT: 0.3, ONE_SOFTMAX: 0.3, GATES_AT_ONE: 0.3, LORA: 0.03, FULL: 0.0003}
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the training examples
MIN_STEPS = 30  # minimum number of optimizer steps; few examples get more epochs to reach it
TESTED = 40  # number of test instructions of each kind
# The base without training, prompted with the instruction alone or in Alpaca's template.
RAW_BASE, TEMPLATE_BASE = "the base as it is", "the base in the template"


class StoryRun(NamedTuple):
    """Settings of one run: a method and its learning rate, or the base without training."""

    method: str  # a method, or RAW_BASE or TEMPLATE_BASE for the base without training
    lr: float = 0.0
    share: float = 1.0  # share of the training examples


@dataclass(frozen=True)
class StoryTestbed:
    """The base, data and settings that all methods share."""

    base: Path
    tokenizer: Tokenizer
    sets: StorySets
    text: Tensor  # (rows, T) token ids of other stories
    setting: Setting
    batch_size: int
    max_tokens: int  # maximum number of tokens of a story
    device: torch.device
    dtype: torch.dtype

    def tokens(self, chosen: Sequence[StoryInstruction]) -> list[TokenizedExample]:
        return tokenize(AlpacaTemplate(self.tokenizer), [each.example() for each in chosen], self.text.shape[1])[0]

    def examples(self, share: float) -> list[TokenizedExample]:
        """Tokenize a random share of the training instructions."""
        order = np.random.default_rng(0).permutation(len(self.sets.training))[: round(share * len(self.sets.training))]
        return self.tokens([self.sets.training[i] for i in order])


def generate_stories(
    testbed: StoryTestbed,
    model: LLaMA,
    instructions: Sequence[StoryInstruction],
    adapter: nn.Module | None = None,
    raw: bool = False,
) -> list[str]:
    """Generate greedy responses, and remove an unfinished last sentence. If `raw` is True, no template is used."""
    name = "base" if adapter is None else "adapter"
    adapters = {} if adapter is None else {name: adapter}
    responder = Responder(model, testbed.tokenizer, adapters, raw=raw, max_new_tokens=testbed.max_tokens)
    requests = []
    for example in (instruction.example() for instruction in instructions):
        if raw:
            requests.append(Request(f"{example.instruction}\n{example.input}".strip(), adapter=name))
        else:
            requests.append(Request(example.instruction, example.input, name))
    texts = generate_responses(responder, requests, batch_size=100, unit="story")
    return [whole_sentences((text or "").strip()) for text in texts]


def score_stories(instructions: Sequence[StoryInstruction], texts: Sequence[str]) -> dict[str, float]:
    """Return the share of texts that are stories, and the share that also follow their instructions.

    The second share, "accuracy", is also returned for each kind of instruction.
    """
    stories = [is_story(text) for text in texts]
    correct = [story and follows(each, text) for story, each, text in zip(stories, instructions, texts)]
    by_kind = {
        kind: statistics.mean(ok for ok, each in zip(correct, instructions) if each.kind == kind) for kind in KINDS
    }
    return {"stories": statistics.mean(stories), "accuracy": statistics.mean(correct)} | by_kind


COLUMNS = (
    Column("trained", "parameters", ","),
    Column("stories", "stories"),
    Column("accuracy", "correct", spread=True),
    *(Column(kind, kind) for kind in KINDS),
    Column("perplexity", "perplexity", ".2f"),
    Column("seconds", "seconds", ".0f"),
)


def train_and_evaluate(
    testbed: StoryTestbed, instructions: Sequence[StoryInstruction], run: StoryRun, seed: int
) -> dict:
    """Train with one seed, unless the run is the base without training, and evaluate. Return the results by name.

    These are the values of `score_stories`, the perplexity on other stories, the number of trained parameters, the
    seconds of loading and training, the learning rate, and the responses.
    """
    start = time.perf_counter()
    if run.method in (RAW_BASE, TEMPLATE_BASE):
        model, _ = load_llama(testbed.base, testbed.dtype, testbed.device)
        adapter, adaption_prompts, trained = None, (), []
    else:
        examples = testbed.examples(run.share)
        epochs = max(testbed.setting.epochs, math.ceil(MIN_STEPS / math.ceil(len(examples) / testbed.batch_size)))
        schedule = {"epochs": epochs, "warmup_epochs": WARMUP_EPOCHS * epochs / testbed.setting.epochs, "lr": run.lr}
        setting = testbed.setting._replace(method=run.method, lr=run.lr)
        model, adapter, *_ = trainable = set_up(setting, seed, testbed.base, testbed.dtype, testbed.device)
        for _ in finite_steps(trainable, examples, TrainConfig(batch_size=testbed.batch_size, seed=seed, **schedule)):
            pass
        adaption_prompts = adapter(dtype=testbed.dtype)
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    seconds = time.perf_counter() - start
    texts = generate_stories(testbed, model, instructions, adapter, raw=run.method == RAW_BASE)
    return score_stories(instructions, texts) | {
        "perplexity": text_perplexity(model, testbed.text, adaption_prompts),
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "lr": run.lr,
        "responses": texts,
    }


def sample_responses(instructions: Sequence[StoryInstruction], rows: dict[str, dict[str, list]]) -> list[dict]:
    """Return two instructions of each kind, with the responses of every row's first seed."""
    chosen = [[i for i, each in enumerate(instructions) if each.kind == kind][:2] for kind in KINDS]
    return [
        {
            "kind": instructions[i].kind,
            "asked": instructions[i].required,
            "told": {label: row["responses"][0][i] for label, row in rows.items()},
        }
        for i in sum(chosen, [])
    ]


def planned_runs(search: bool, curve: bool) -> dict[str, StoryRun]:
    """Return the runs of the command, by label.

    By default, these are the base without training, and every method at its best learning rate. If `search` is True,
    every method is run at each of its learning rates. Otherwise, if `curve` is True, three methods are run on several
    shares of the examples.
    """
    if search:
        return {f"{method}, {lr:g}": StoryRun(method, lr) for method, rates in TRIED.items() for lr in rates}
    if curve:
        return {
            f"{method}, {share:.0%}": StoryRun(method, BEST[method], share)
            for share in SHARES
            for method in (ZERO_INIT, ONE_SOFTMAX, LORA)
        }
    base = {RAW_BASE: StoryRun(RAW_BASE), TEMPLATE_BASE: StoryRun(TEMPLATE_BASE)}
    return base | {method: StoryRun(method, lr) for method, lr in BEST.items()}


def draw_stories(rows: dict[str, dict[str, list]], curve: bool) -> Figure:
    figure = Figure(figsize=(7, 4) if curve else (12, 4), layout="constrained")
    if curve:
        axes = figure.subplots()
        for method in (ZERO_INIT, ONE_SOFTMAX, LORA):
            shares = [rows[f"{method}, {share:.0%}"]["accuracy"] for share in SHARES]
            draw_line(axes, [100 * share for share in SHARES], list(map(percent, shares)), method)
        axes.set(xlabel="training examples, % of all", xscale="log", ylabel="correct stories, %")
        axes.set_xticks([100 * share for share in SHARES], [f"{100 * share:g}" for share in SHARES], minor=False)
        axes.legend()
        return figure
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, {label: percent(row["accuracy"]) for label, row in rows.items()}, "correct stories, %")
    draw_bars(right, {label: row["perplexity"] for label, row in rows.items()}, "perplexity of other stories")
    return figure


def make_story_testbed(base, data, per_kind, max_tokens, epochs, layers, length, batch_size, device) -> StoryTestbed:
    """Read the stories, and make instructions from them.

    Raises OSError or ValueError if a file cannot be read or there are too few stories.
    """
    device, dtype = select_device(device, "float32")
    config, _ = read_base(base)
    tokenizer = load_tokenizer(base)
    sets = make_instructions(read_stories(data, tokenizer, max_tokens), per_kind, TESTED)
    text = text_rows(tokenizer, sets.others, min(256, config.max_seq_len or 256))
    setting = Setting(layers or config.n_layers, 0.0, length=length, epochs=epochs)
    return StoryTestbed(base, tokenizer, sets, text.to(device), setting, batch_size, max_tokens, device, dtype)


@experiment(
    "stories",
    option_group(
        "Options",
        option("--base", type=PATH, required=True, help="LLaMA that was pretrained on stories."),
        option("--data", type=PATH, required=True, help="File of stories that are separated by <|endoftext|>."),
        option("--per-kind", type=Count(), default=100, help="Number of training instructions of each kind."),
        option("--max-tokens", type=Count(2), default=64, help="Maximum number of tokens per story."),
        option("--at-a-time", type=Count(), default=2, help="Number of processes; if several, each has one thread."),
        option("--search", is_flag=True, help="Only search for the best learning rates, on validation instructions."),
        option(
            "--curve",
            is_flag=True,
            help="Compare three methods on 1 to 100 % of the training examples; --search disables this.",
        ),
        device_options[0],
    ),
    training_options(layers="all", length=10, epochs=5, batch_size=16),
)
def stories(runs: Runs, at_a_time, search, curve, **options) -> None:
    """Teach a storytelling base to follow instructions.

    There are five kinds of instructions. For every method, the command measures how many responses are stories that
    follow their instructions, and how much the base forgets.
    """
    import_peft()  # fail before training if PEFT is missing
    testbed = make_story_testbed(**options)
    instructions = testbed.sets.validation if search else testbed.sets.testing
    click.echo(
        f"{len(testbed.sets.training):,} training instructions, {len(instructions):,} held-out instructions, "
        f"{len(testbed.text):,} rows of other stories for the perplexity\n"
    )
    planned = planned_runs(search, curve)
    once = planned if search else [RAW_BASE, TEMPLATE_BASE]
    rows = runs.table(
        COLUMNS, planned, partial(train_and_evaluate, testbed, instructions), once=once, at_a_time=at_a_time
    )
    name = "stories_rates" if search else "stories_curve" if curve else "stories"
    values = {
        "rows": {
            label: {name: value for name, value in row.items() if name != "responses"} for label, row in rows.items()
        },
        "examples": sample_responses(instructions, rows),
    }
    runs.save(name, values, None if search else draw_stories(rows, curve))
