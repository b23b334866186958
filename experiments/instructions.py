"""What a base that tells stories, and follows no instruction, can be brought to do; and with how many examples."""

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
from experiments.stories import KINDS, StorySets, Told, follows, is_story, make_instructions, read_stories
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

# Each method's best of those that --search tries, by instructions that are held out for that.
TRIED = {method: (0.01, 0.03, 0.1, 0.3, 1.0) for method in (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE)}
TRIED |= {LORA: (0.001, 0.003, 0.01, 0.03), FULL: (0.0001, 0.0003, 0.001, 0.003)}
BEST = {ZERO_INIT: 0.3, ONE_SOFTMAX: 0.3, GATES_AT_ONE: 0.3, LORA: 0.03, FULL: 0.0003}
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the examples
LEAST_STEPS = 30  # where examples are few there are more epochs
TESTED = 40  # instructions of each kind
PLAIN_WORDS, TEMPLATE = "the base as it is", "the base in the template"  # beside the methods: nothing is trained


class StoryRun(NamedTuple):
    """Settings of one run: a method and its learning rate, or the base alone."""

    method: str  # or PLAIN_WORDS, TEMPLATE
    lr: float = 0.0
    share: float = 1.0  # of the examples


@dataclass(frozen=True)
class StoryBed:
    """What all methods have in common."""

    base: Path
    tokenizer: Tokenizer
    sets: StorySets
    text: Tensor  # (rows, T) ids of other stories
    setting: Setting
    batch_size: int
    max_tokens: int  # of a story
    device: torch.device
    dtype: torch.dtype

    def tokens(self, told: Sequence[Told]) -> list[TokenizedExample]:
        return tokenize(AlpacaTemplate(self.tokenizer), [each.example() for each in told], self.text.shape[1])[0]

    def examples(self, share: float) -> list[TokenizedExample]:
        """So many of all, drawn from all kinds."""
        order = np.random.default_rng(0).permutation(len(self.sets.training))[: round(share * len(self.sets.training))]
        return self.tokens([self.sets.training[i] for i in order])


def tell(
    bed: StoryBed, model: LLaMA, told: Sequence[Told], adapter: nn.Module | None = None, raw: bool = False
) -> list[str]:
    """The whole sentences of the model's greedy responses; `raw` is without the template."""
    name = "base" if adapter is None else "adapter"
    adapters = {} if adapter is None else {name: adapter}
    responder = Responder(model, bed.tokenizer, adapters, raw=raw, max_new_tokens=bed.max_tokens)
    requests = []
    for example in (each.example() for each in told):
        if raw:
            requests.append(Request(f"{example.instruction}\n{example.input}".strip(), adapter=name))
        else:
            requests.append(Request(example.instruction, example.input, name))
    texts = generate_responses(responder, requests, batch_size=100, unit="story")
    return [whole_sentences((text or "").strip()) for text in texts]


def scores(told: Sequence[Told], texts: Sequence[str]) -> dict[str, float]:
    """Shares: of answers that are stories, of those that are one and do as told, in all and by kind."""
    stories = [is_story(text) for text in texts]
    right = [story and follows(each, text) for story, each, text in zip(stories, told, texts)]
    by_kind = {kind: statistics.mean(ok for ok, each in zip(right, told) if each.kind == kind) for kind in KINDS}
    return {"stories": statistics.mean(stories), "accuracy": statistics.mean(right)} | by_kind


COLUMNS = (
    Column("trained", "trained", ","),
    Column("stories", "stories"),
    Column("accuracy", "as told", spread=True),
    *(Column(kind, kind) for kind in KINDS),
    Column("perplexity", "perplexity", ".2f"),
    Column("seconds", "seconds", ".0f"),
)


def train_and_ask(bed: StoryBed, told: Sequence[Told], run: StoryRun, seed: int) -> dict:
    """Scores, perplexity of other stories, and the responses."""
    start = time.perf_counter()
    if run.method in (PLAIN_WORDS, TEMPLATE):
        model, _ = load_llama(bed.base, bed.dtype, bed.device)
        adapter, adaption_prompts, trained = None, (), []
    else:
        tokens = bed.examples(run.share)
        epochs = max(bed.setting.epochs, math.ceil(LEAST_STEPS / math.ceil(len(tokens) / bed.batch_size)))
        how = {"epochs": epochs, "warmup_epochs": WARMUP_EPOCHS * epochs / bed.setting.epochs, "lr": run.lr}
        setting = bed.setting._replace(method=run.method, lr=run.lr)
        model, adapter, *_ = trainable = set_up(setting, seed, bed.base, bed.dtype, bed.device)
        for _ in finite_steps(trainable, tokens, TrainConfig(batch_size=bed.batch_size, seed=seed, **how)):
            pass
        adaption_prompts = adapter(dtype=bed.dtype)
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    seconds = time.perf_counter() - start
    texts = tell(bed, model, told, adapter, raw=run.method == PLAIN_WORDS)
    return scores(told, texts) | {
        "perplexity": text_perplexity(model, bed.text, adaption_prompts),
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "lr": run.lr,
        "responses": texts,
    }


def some_responses(told: Sequence[Told], rows: dict[str, dict[str, list]]) -> list[dict]:
    """To two instructions of each kind, what the first seed of every row told."""
    chosen = [[i for i, each in enumerate(told) if each.kind == kind][:2] for kind in KINDS]
    return [
        {
            "kind": told[i].kind,
            "asked": told[i].asked,
            "told": {label: row["responses"][0][i] for label, row in rows.items()},
        }
        for i in sum(chosen, [])
    ]


def planned_runs(search: bool, curve: bool) -> dict[str, StoryRun]:
    """The base, and every method at its best rate; or each at all its rates; or on more and more examples."""
    if search:
        return {f"{method}, {lr:g}": StoryRun(method, lr) for method, rates in TRIED.items() for lr in rates}
    if curve:
        return {
            f"{method}, {share:.0%}": StoryRun(method, BEST[method], share)
            for share in SHARES
            for method in (ZERO_INIT, ONE_SOFTMAX, LORA)
        }
    base = {PLAIN_WORDS: StoryRun(PLAIN_WORDS), TEMPLATE: StoryRun(TEMPLATE)}
    return base | {method: StoryRun(method, lr) for method, lr in BEST.items()}


def draw_stories(rows: dict[str, dict[str, list]], curve: bool) -> Figure:
    figure = Figure(figsize=(7, 4) if curve else (12, 4), layout="constrained")
    if curve:
        axes = figure.subplots()
        for method in (ZERO_INIT, ONE_SOFTMAX, LORA):
            shares = [rows[f"{method}, {share:.0%}"]["accuracy"] for share in SHARES]
            draw_line(axes, [100 * share for share in SHARES], list(map(percent, shares)), method)
        axes.set(xlabel="examples, % of all", xscale="log", ylabel="stories that do as told, %")
        axes.set_xticks([100 * share for share in SHARES], [f"{100 * share:g}" for share in SHARES], minor=False)
        axes.legend()
        return figure
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, {label: percent(row["accuracy"]) for label, row in rows.items()}, "stories that do as told, %")
    draw_bars(right, {label: row["perplexity"] for label, row in rows.items()}, "perplexity of other stories")
    return figure


def make_story_bed(base, data, per_kind, max_tokens, epochs, layers, length, batch_size, device) -> StoryBed:
    """Raises OSError, or ValueError where the base or the stories do not suffice."""
    device, dtype = select_device(device, "float32")
    config, _ = read_base(base)
    tokenizer = load_tokenizer(base)
    sets = make_instructions(read_stories(data, tokenizer, max_tokens), per_kind, TESTED)
    text = text_rows(tokenizer, sets.others, min(256, config.max_seq_len or 256))
    setting = Setting(layers or config.n_layers, 0.0, length=length, epochs=epochs)
    return StoryBed(base, tokenizer, sets, text.to(device), setting, batch_size, max_tokens, device, dtype)


@experiment(
    "stories",
    option_group(
        "Options",
        option("--base", type=PATH, required=True, help="A LLaMA that tells stories."),
        option("--data", type=PATH, required=True, help="Stories, divided by <|endoftext|>."),
        option("--per-kind", type=Count(), default=100, help="Instructions of each of five kinds to train on."),
        option("--max-tokens", type=Count(2), default=64, help="Of a story; it is truncated at the end of a sentence."),
        option("--at-a-time", type=Count(), default=2, help="Number of processes, with one thread each."),
        option("--search", is_flag=True, help="Four or five learning rates of each method, on other instructions."),
        option("--curve", is_flag=True, help="Zero-init, random init and LoRA on 1 to 100 % of the examples."),
        device_options[0],
    ),
    training_options(layers="all", length=10, epochs=5, batch_size=16),
)
def stories(runs: Runs, at_a_time, search, curve, **options) -> None:
    """Bring a base that tells stories to follow instructions.

    Five kinds of them, by every method: how many stories do as told, and what is forgotten.
    """
    import_peft()  # or say at once that it is missing
    bed = make_story_bed(**options)
    told = bed.sets.validation if search else bed.sets.testing
    click.echo(
        f"{len(bed.sets.training):,} instructions to learn from, {len(told):,} to be asked, "
        f"{len(bed.text):,} rows of other stories\n"
    )
    planned = planned_runs(search, curve)
    once = planned if search else [PLAIN_WORDS, TEMPLATE]
    rows = runs.table(COLUMNS, planned, partial(train_and_ask, bed, told), once=once, at_a_time=at_a_time)
    name = "stories_rates" if search else "stories_curve" if curve else "stories"
    values = {
        "rows": {
            label: {key: found for key, found in row.items() if key != "responses"} for label, row in rows.items()
        },
        "examples": some_responses(told, rows),
    }
    runs.save(name, values, None if search else draw_stories(rows, curve))
