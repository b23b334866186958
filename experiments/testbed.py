"""Testbeds for comparing settings: a base, training examples, held-out questions, and text to measure perplexity on."""

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
from encoder_tuning.labeled import subset
from experiments.cached import toy_base
from experiments.methods import Setting
from experiments.runs import training_options
from formats.bases import read_base
from formats.hub import find_base
from formats.tokenizers import load_tokenizer
from runtime.cli import DEVICE_HELP, DTYPE_HELP, PATH, Count, options_of, setting
from runtime.device import select_device
from runtime.files import read_text
from tasks import TASKS, load_task
from toy import almanac
from toy.language_model import ROW
from train import TrainConfig
from training.memory import default_micro_batch_tokens


@dataclass(frozen=True)
class TestbedOptions:
    """Options of the commands that use a testbed. None means the default that the help states."""

    base: Path | None = setting(None, "Base model.  [default: the toy's]", PATH)
    data: Path | None = setting(None, "Training data.  [default: the toy's]", PATH)
    task: str | None = setting(
        None, "Task of --data, as for train.py.  [default: instructions]", click.Choice(list(TASKS))
    )
    text: Path | None = setting(
        None, "Text similar to the pretraining data, to measure the perplexity on.  [default: the toy's, or none]", PATH
    )
    limit: int | None = setting(None, "Maximum number of training examples, drawn at random.  [default: all]", Count())
    held_out: int | None = setting(
        None, "Maximum number of held-out questions.  [default: 200 of --data; all for the toy]", Count()
    )
    max_seq_len: int = setting(
        512, "Maximum tokens per example; longer ones are truncated, or dropped if their prompt is too long.", Count(2)
    )
    toy_layers: int | None = setting(
        None, "Layers of the toy's base; one with a different number is pretrained on first use.  [default: 4]", Count()
    )
    device: str = setting("auto", DEVICE_HELP)
    dtype: str = setting("auto", DTYPE_HELP, click.Choice(["auto", "float32", "bfloat16"]))
    # `training_options` declares these options:
    layers: int | None = None
    length: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None


testbed_options = (
    options_of(TestbedOptions, "Data and model"),
    training_options(
        layers="all but two; 4 for the toy",
        length="10",
        epochs="5",
        batch_size="64; 32 for the toy",
        lr="9e-3 * batch size / 256; 0.05 for the toy",
    ),
)


class TestbedParts(NamedTuple):
    """The parts of a testbed before tokenization."""

    base: Path
    default: Setting
    batch_size: int
    training: list[Example]
    questions: list[Example]
    documents: Iterable[str]  # similar to what the base was pretrained on
    micro_batch_tokens: int | None = None  # None: the default for the device


@dataclass(eq=False)
class Testbed:
    """The base, data and defaults that all settings share.

    Testbeds are compared by identity, so that functions can cache a value for each of them.
    """

    base: Path
    tokenizer: Tokenizer
    training: list[TokenizedExample]
    held_out: list[TokenizedExample]
    questions: list[Example]  # the examples of held_out
    text: Tensor  # (rows, T) token ids of text similar to the pretraining data; 0 rows if there is no text
    n_layers: int  # N
    batch_size: int
    micro_batch_tokens: int
    default: Setting
    device: torch.device
    dtype: torch.dtype

    def train_config(self, setting: Setting, seed: int) -> TrainConfig:
        schedule = {"epochs": setting.epochs, "warmup_epochs": setting.warmup_epochs, "lr": setting.lr}
        sizes = {"batch_size": self.batch_size, "micro_batch_tokens": self.micro_batch_tokens}
        return TrainConfig(**sizes, **schedule, seed=seed)


def toy_parts(options: TestbedOptions, searching: bool) -> TestbedParts:
    """Return the parts of the toy's testbed. Raises ValueError if an option requires --base and --data."""
    if options.task or options.text:
        raise ValueError("--task and --text require --base and --data; the toy has its own task and text")
    training, questions = toy_examples(searching)
    default = Setting(layers=options.toy_layers or toy.TRAINING["layers"], lr=toy.TRAINING["lr"])
    documents = islice(almanac.documents(seed=1), 500)  # the base was pretrained on the documents of seed 0
    batch_size = options.batch_size or toy.TRAINING["batch_size"]
    base = toy_base() if options.toy_layers is None else toy_base(n_layers=options.toy_layers)
    questions = subset(questions, options.held_out)
    positions = toy.TRAINING["micro_batch_tokens"]
    return TestbedParts(base, default, batch_size, training, questions, documents, positions)


def toy_examples(searching: bool) -> tuple[list[Example], list[Example]]:
    """Return training examples and held-out questions.

    If `searching` is True, the questions about a fifth of the training subjects are held out instead, and are not
    trained on.
    """
    sets = almanac.instructions()
    training, questions = sets["training"], [question for name in almanac.HELD_OUT for question in sets[name]]
    if searching:

        def subject(question: almanac.ExamQuestion) -> str:
            return min(question.entity, question.answer) if question.kind == "opposite" else question.entity

        subjects = sorted(set(map(subject, training)))
        fifth = set(np.random.default_rng(0).permutation(subjects)[: len(subjects) // 5])
        questions = [question for question in training if subject(question) in fifth]
        training = [question for question in training if subject(question) not in fifth]
    return [question.example for question in training], [question.example for question in questions]


def data_parts(options: TestbedOptions, searching: bool) -> TestbedParts:
    """Return the parts of a testbed on --data, a tenth of which is held out.

    If `searching` is True, a tenth of the training examples then replaces the held-out questions. Raises OSError or
    ValueError if the base or the data cannot be read, or if there are too few examples.
    """
    n_layers, batch_size = read_base(options.base)[0].n_layers, options.batch_size or 64
    default = Setting(layers=max(1, n_layers - 2), lr=TrainConfig(batch_size=batch_size).peak_lr)
    training = examples = load_task(options.task or "instructions").read(options.data)
    times = 1 + searching  # how often a tenth of the training examples is held out
    for _ in range(times):
        if len(training) < 2:
            raise ValueError(
                f"{options.data}: the number of examples is {len(examples)}, but at least {1 + times} are needed, "
                f"because some are held out; give more data"
            )
        training, questions = hold_out(training, max(1, len(training) // 10), seed=0)
    documents = [] if options.text is None else [read_text(options.text)[:100_000]]
    questions = subset(questions, options.held_out or 200)
    return TestbedParts(options.base, default, batch_size, training, questions, documents)


def read_testbed(options: TestbedOptions, searching: bool = False) -> Testbed:
    """Create the testbed that the options describe. If `searching` is True, its questions come from the training data.

    Raises OSError if a file cannot be read, or ValueError if a file is invalid, if options contradict each other, or if
    no example fits.
    """
    device, dtype = select_device(options.device, options.dtype)
    if (options.base is None) != (options.data is None):
        raise ValueError("give both --base and --data, or neither of them to use the toy's base and data")
    if options.base is not None and options.toy_layers is not None:
        raise ValueError(f"--toy-layers applies only to the toy's base; it cannot be used with --base {options.base}")
    if options.base is None:
        parts = toy_parts(options, searching)
    else:
        parts = data_parts(replace(options, base=find_base(options.base)), searching)
    changed = {name: getattr(options, name) for name in ("layers", "lr", "length", "epochs")}
    default = parts.default._replace(**{name: value for name, value in changed.items() if value is not None})
    parts = parts._replace(default=default, training=subset(parts.training, options.limit))
    return make_testbed(parts, options.max_seq_len, device, dtype)


def make_testbed(parts: TestbedParts, max_seq_len: int, device: torch.device, dtype: torch.dtype) -> Testbed:
    """Create a testbed by tokenizing the parts in Alpaca's template.

    Examples whose prompt leaves no room for a response are dropped. Raises OSError if the base cannot be read, or
    ValueError if no example is left, the base has too few layers, or the text for the perplexity is too short.
    """
    default, training = parts.default, parts.training
    base, (config, _) = parts.base, read_base(parts.base)
    if default.layers > config.n_layers:
        raise ValueError(f"--layers {default.layers}: the base {base} has only {config.n_layers} layers")
    tokenizer = load_tokenizer(base)
    max_length = min(max_seq_len, config.max_seq_len or max_seq_len)
    template = AlpacaTemplate(tokenizer)
    tokens, _ = tokenize(template, training, max_length)
    fitting = [
        (example, found[0]) for example in parts.questions if (found := tokenize(template, [example], max_length)[0])
    ]
    if not tokens or not fitting:
        raise ValueError(
            f"{len(tokens)} of {len(training)} training examples and {len(fitting)} of {len(parts.questions)} "
            f"questions leave room for a response in {max_length} tokens; expected at least one of each; shorten the "
            f"prompts, or increase --max-seq-len, which the base's context limits"
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
        micro_batch_tokens=parts.micro_batch_tokens or default_micro_batch_tokens(device),
        default=parts.default,
        device=device,
        dtype=dtype,
    )


def text_rows(tokenizer: Tokenizer, documents: Iterable[str], length: int) -> Tensor:
    """Tokenize documents into at most 64 rows of ids, int64 (rows, length).

    Returns 0 rows if there are no documents. Raises ValueError if the documents do not fill one row.
    """
    ids = [id for document in documents for id in (*tokenizer.start_ids, *tokenizer.encode(document), tokenizer.eos_id)]
    if 0 < len(ids) < length:
        raise ValueError(
            f"the text for the perplexity has {len(ids)} tokens, but needs at least {length}; give more text"
        )
    return torch.tensor(ids[: min(64, len(ids) // length) * length], dtype=torch.long).view(-1, length)
