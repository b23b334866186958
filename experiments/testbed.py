"""What settings are compared on: a base, what it is trained on, what it is asked, and text of the base's own kind."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

import toy
from data import AlpacaTemplate, Example, Tokenizer, TokenizedExample, hold_out, tokenize
from encoder_tuning.data import subset
from experiments.cached import toy_base
from experiments.methods import Setting
from experiments.runs import training_options
from formats.bases import read_base
from formats.hub import find_base
from formats.tokenizers import load_tokenizer
from runtime.cli import DEVICE_HELP, PATH, Count, options_of, setting
from runtime.device import select_device
from runtime.files import read_text
from tasks import TASKS, load_task
from toy import almanac
from toy.language_model import ROW
from train import TrainConfig


@dataclass(frozen=True)
class TestbedOptions:
    """Options of the commands that train a LLaMA. None is the toy's value, or the default there."""

    base: Path | None = setting(None, "The base model.  [default: the toy's]", PATH)
    data: Path | None = setting(None, "What to train on.  [default: the toy's]", PATH)
    task: str | None = setting(None, "What the data is, as for train.py.", click.Choice(list(TASKS)))
    text: Path | None = setting(None, "Text of the kind that the base was pretrained on.", PATH)
    limit: int | None = setting(None, "Train on this many examples only, drawn from all.", Count())
    held_out: int | None = setting(None, "Number of questions.  [default: all; 200 of --data]", Count())
    max_seq_len: int = setting(512, "In tokens; longer responses are truncated.", Count(2))
    toy_layers: int | None = setting(None, "N of the toy's base, made at the first use.  [default: 4]", Count())
    device: str = setting("auto", DEVICE_HELP)
    dtype: str = setting("auto", "Of the base.", click.Choice(["auto", "float32", "bfloat16"]))
    # Declared as options by `training_options`:
    layers: int | None = None
    length: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None


testbed_options = (
    options_of(TestbedOptions, "Data and model"),
    training_options(
        layers="all but two; the toy's 4",
        length="10",
        epochs="5",
        batch_size="64; the toy's 32",
        lr="9e-3 * batch size / 256; the toy's 0.05",
    ),
)


class TestbedParts(NamedTuple):
    """Where a testbed comes from."""

    base: Path
    default: Setting
    batch_size: int
    training: list[Example]
    asked: list[Example]
    documents: Iterable[str]  # of the base's own kind


@dataclass(eq=False)
class Testbed:
    """What all settings have in common. No two are equal: what is cached of one is its own."""

    base: Path
    tokenizer: Tokenizer
    training: list[TokenizedExample]
    held_out: list[TokenizedExample]
    questions: list[Example]  # those of held_out
    text: Tensor  # (rows, T) token ids, of the kind that the base was pretrained on; of no rows where there is none
    n_layers: int  # N
    batch_size: int
    default: Setting
    device: torch.device
    dtype: torch.dtype

    def train_config(self, setting: Setting, seed: int) -> TrainConfig:
        how = {"epochs": setting.epochs, "warmup_epochs": setting.warmup_epochs, "lr": setting.lr}
        return TrainConfig(batch_size=self.batch_size, seed=seed, **how)


def toy_parts(options: TestbedOptions, searching: bool) -> TestbedParts:
    """Raises ValueError where options are for another base."""
    if options.task or options.text:
        raise ValueError("--task and --text need --base and --data: the toy brings all that it needs")
    training, asked = toy_examples(searching)
    default = Setting(layers=options.toy_layers or toy.TRAINING["layers"], lr=toy.TRAINING["lr"])
    documents = islice(almanac.documents(seed=1), 500)  # the base was pretrained on those of seed 0
    batch_size = options.batch_size or toy.TRAINING["batch_size"]
    base = toy_base() if options.toy_layers is None else toy_base(n_layers=options.toy_layers)
    return TestbedParts(base, default, batch_size, training, subset(asked, options.held_out), documents)


def toy_examples(searching: bool) -> tuple[list[Example], list[Example]]:
    """Return training examples and questions. A search holds out a fifth of the training subjects for its questions."""
    sets = almanac.instructions()
    training, asked = sets["training"], [question for name in almanac.HELD_OUT for question in sets[name]]
    if searching:

        def about(question: almanac.ExamQuestion) -> str:
            return min(question.entity, question.answer) if question.kind == "opposite" else question.entity

        things = sorted(set(map(about, training)))
        fifth = set(np.random.default_rng(0).permutation(things)[: len(things) // 5])
        asked = [question for question in training if about(question) in fifth]
        training = [question for question in training if about(question) not in fifth]
    return [question.example for question in training], [question.example for question in asked]


def data_parts(options: TestbedOptions, searching: bool, asked: list[Example] | None) -> TestbedParts:
    """What is asked is a tenth of the data, held out, or given. Raises OSError or ValueError."""
    n_layers, batch_size = read_base(options.base)[0].n_layers, options.batch_size or 64
    default = Setting(layers=max(1, n_layers - 2), lr=TrainConfig(batch_size=batch_size).peak_lr)
    training = examples = load_task(options.task or "instructions").read(options.data)
    for _ in range((asked is None) + searching):  # a search has its own questions, from what is trained on
        if len(training) < 2:
            raise ValueError(f"{options.data}: {len(examples)} examples are too few to learn from some and ask others")
        training, asked = hold_out(training, max(1, len(training) // 10), seed=0)
    documents = [] if options.text is None else [read_text(options.text)[:100_000]]
    return TestbedParts(options.base, default, batch_size, training, subset(asked, options.held_out or 200), documents)


def read_testbed(options: TestbedOptions, searching: bool = False, asked: list[Example] | None = None) -> Testbed:
    """As the options say; of the examples, those that fit. Raises OSError, or ValueError where nothing is left."""
    device, dtype = select_device(options.device, options.dtype)
    if (options.base is None) != (options.data is None):
        raise ValueError("--base and --data go together; without them it is the toy's")
    if options.base is not None and options.toy_layers is not None:
        raise ValueError(f"--toy-layers is for the toy's base, not for --base {options.base}")
    if options.base is None:
        parts = toy_parts(options, searching)
    else:
        parts = data_parts(replace(options, base=find_base(options.base)), searching, asked)
    changed = {name: getattr(options, name) for name in ("layers", "lr", "length", "epochs")}
    default = parts.default._replace(**{name: value for name, value in changed.items() if value is not None})
    parts = parts._replace(default=default, training=subset(parts.training, options.limit))
    return make_testbed(parts, options.max_seq_len, device, dtype)


def make_testbed(parts: TestbedParts, max_seq_len: int, device: torch.device, dtype: torch.dtype) -> Testbed:
    """Tokenize the parts in Alpaca's template. Raises OSError, or ValueError where no example fits."""
    default, training = parts.default, parts.training
    base, (config, _) = parts.base, read_base(parts.base)
    if default.layers > config.n_layers:
        raise ValueError(f"--layers {default.layers}: {base} has only {config.n_layers}")
    tokenizer = load_tokenizer(base)
    max_length = min(max_seq_len, config.max_seq_len or max_seq_len)
    template = AlpacaTemplate(tokenizer)
    tokens, _ = tokenize(template, training, max_length)
    fitting = [
        (example, found[0]) for example in parts.asked if (found := tokenize(template, [example], max_length)[0])
    ]
    if not tokens or not fitting:
        raise ValueError(
            f"within {max_length} tokens there are {len(tokens)} of {len(training)} examples to learn from, "
            f"and {len(fitting)} of {len(parts.asked)} to be asked"
        )
    questions, held_out = map(list, zip(*fitting))
    text = text_rows(tokenizer, parts.documents, min(ROW, max_length))
    return Testbed(
        base,
        tokenizer,
        tokens,
        held_out,
        questions,
        text,
        n_layers=config.n_layers,
        batch_size=parts.batch_size,
        default=parts.default,
        device=device,
        dtype=dtype,
    )


def text_rows(tokenizer: Tokenizer, documents: Iterable[str], length: int) -> Tensor:
    """The documents, one after the other, in at most 64 rows (rows, length) of ids. ValueError where they fill none."""
    ids = [id for document in documents for id in (*tokenizer.start_ids, *tokenizer.encode(document), tokenizer.eos_id)]
    if 0 < len(ids) < length:
        raise ValueError(f"--text has {len(ids)} tokens, fewer than a row of {length}")
    return torch.tensor(ids[: min(64, len(ids) // length) * length], dtype=torch.long).view(-1, length)
