"""The comparison for encoders: a ViT, and a small RoBERTa that is pretrained here, for want of a trained one."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from cloup import option, option_group
from matplotlib.figure import Figure
from torch import Tensor, nn

from adapter import gated_attention
from data import MICRO_BATCH_TOKENS, hold_out
from encoder_tuning.data import read_labelled
from encoder_tuning.labelled import Labelled, subset
from encoder_tuning.objective import accuracy, class_loss, classify
from encoders.heads import head_adapter
from encoders.models import Roberta, RobertaConfig
from experiments.cached import cached_folder
from experiments.drawing import draw_bars, percent
from experiments.methods import (
    WEIGHT_DECAY,
    NoPrompts,
    Trainable,
    add_lora,
    finite_steps,
    import_peft,
    ungated_attention,
)
from experiments.runs import Column, Runs, experiment, training_options
from formats.encoders import load_encoder, save_encoder
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.cli import PATH
from runtime.files import read_text, write_text
from toy.pretraining import pretrain
from train import TrainConfig, learning_rate, make_optimizer

METHODS = ("head only", "prompts and gates", "no gates", "LoRA", "full tuning")
TRIED_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
# The best of these for each method, asked about the first tenth of the training digits; --search draws its tenth.
VIT_RATES = {"head only": 0.01, "prompts and gates": 0.1, "no gates": 0.1, "LoRA": 0.03, "full tuning": 0.01}
# The best of these on a tenth of SST-2's sentences.
ROBERTA_RATES = {"head only": 0.03, "prompts and gates": 0.03, "no gates": 0.1, "LoRA": 0.03, "full tuning": 0.001}


class EncoderRun(NamedTuple):
    """Settings of one training run over an encoder."""

    method: str
    lr: float
    epochs: int  # the first of them is warm-up
    number: int | None = None  # of training examples; None is all
    on_tenth: bool = False  # scored on a tenth of the training examples, which is held out, to choose a learning rate


@dataclass(frozen=True)
class LabelledSets:
    """An encoder, what it learns from and is scored on, and what all methods have in common."""

    base: Path
    training: list[Labelled]
    testing: list[Labelled]
    num_classes: int
    batch_size: int
    length: int  # K
    rank: int  # of LoRA


def set_up_encoder(method: str, sets: LabelledSets, seed: int) -> Trainable:
    """Load a fresh encoder, and make what is trained of it or on top of it; the head is the base's own if that fits."""
    generator = torch.Generator().manual_seed(seed)
    model, head = load_encoder(sets.base, attention=ungated_attention if method == "no gates" else gated_attention)
    dimensions = {"layers": model.config.n_layers, "length": sets.length}
    adapter = head_adapter(model, head, sets.num_classes, **dimensions, generator=generator)
    if method in ("prompts and gates", "no gates"):
        adapter.gates.requires_grad_(method == "prompts and gates")
        return Trainable(model, adapter, make_optimizer(adapter, WEIGHT_DECAY), class_loss)
    trained = []
    if method == "LoRA":
        trained = add_lora(model, sets.rank, seed)
    if method == "full tuning":
        trained = model.requires_grad_(True).parameters()
    headed = NoPrompts(trained, adapter.head)
    return Trainable(model, headed, headed.make_optimizer(), class_loss)


def encoder_accuracy(model: nn.Module, adapter: nn.Module, examples: Sequence[Labelled]) -> float:
    predictions = classify(model, adapter, examples, MICRO_BATCH_TOKENS)
    return accuracy(predictions, [example.labels[0] for example in examples])


COLUMNS = (
    Column("trained", "trained", ","),
    Column("lr", "rate", "g"),
    Column("accuracy", "accuracy", ".2%", spread=True),
    Column("seconds", "seconds", ".0f"),
)


def train_and_score(sets: LabelledSets, run: EncoderRun, seed: int) -> dict:
    """Train with one seed, which also draws the examples if not all are used; return what stands in a table."""
    training, testing = sets.training, sets.testing
    if run.on_tenth:
        training, testing = hold_out(training, len(training) // 10, seed=0)
    start = time.perf_counter()
    trainable = set_up_encoder(run.method, sets, seed)
    config = TrainConfig(epochs=run.epochs, warmup_epochs=1, batch_size=sets.batch_size, lr=run.lr, seed=seed)
    for _ in finite_steps(trainable, subset(training, run.number, seed), config):
        pass
    return {
        "trained": sum(p.numel() for p in trainable.adapter.parameters() if p.requires_grad),
        "lr": run.lr,
        "accuracy": encoder_accuracy(trainable.model, trainable.adapter, testing),
        "seconds": time.perf_counter() - start,
    }


def compare_encoders(runs: Runs, sets: LabelledSets, rates: dict[str, float], epochs: int) -> dict[str, dict]:
    """Train by every method with every seed; return the values of `train_and_score`."""
    import_peft()  # or say at once that it is missing
    settings = {method: EncoderRun(method, lr, epochs) for method, lr in rates.items()}
    return runs.table(COLUMNS, settings, partial(train_and_score, sets))


def search_encoder_rates(runs: Runs, sets: LabelledSets, epochs: int, number: int | None = None) -> dict[str, float]:
    """Return each method's best learning rate on a tenth of the training examples. Raises ValueError if it is empty.

    The tenth is drawn from all of them, the same for every run: in files that are sorted by class the first has one.
    Trained on are the others, or `number` of them.
    """
    import_peft()
    if len(sets.training) < 10:
        raise ValueError(f"{len(sets.training)} examples have no tenth to try learning rates on")
    settings = {
        f"{method}, {lr:g}": EncoderRun(method, lr, epochs, number, on_tenth=True)
        for lr in TRIED_RATES
        for method in METHODS
    }
    found = runs.table(COLUMNS, settings, partial(train_and_score, sets), once=settings)
    return {method: max(TRIED_RATES, key=lambda lr: found[f"{method}, {lr:g}"]["accuracy"][0]) for method in METHODS}


def read_picture_sets(base: Path, train_path: Path, test_path: Path, **options) -> LabelledSets:
    """For a vision transformer with a head. Raises OSError or ValueError."""
    model, head = load_encoder(base)
    if head is None:
        raise ValueError(f"{base}: has no head")
    classes = list(map(str, range(head[-1].out_features)))
    training, testing = (
        read_labelled("image-classification", model, base, path, 512, classes).examples
        for path in (train_path, test_path)
    )
    return LabelledSets(base, training, testing, len(classes), **options)


def base_accuracy(sets: LabelledSets) -> float:
    """With the head that the encoder came with."""
    model, head = load_encoder(sets.base)
    return encoder_accuracy(model, head_adapter(model, head, sets.num_classes, layers=1, length=1), sets.testing)


def print_numbers(sets: LabelledSets, examples: str) -> None:
    click.echo(f"{len(sets.training):,} {examples} to learn from, {len(sets.testing):,} to be asked about")


def draw_accuracies(rows: dict[str, dict], baseline: str, share: float) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    values = {baseline: percent([share])} | {method: percent(row["accuracy"]) for method, row in rows.items()}
    draw_bars(figure.subplots(), values, "accuracy, %")
    return figure


SEARCH = option("--search", is_flag=True, help="Learning rates, on a tenth of the training examples.")


def encoder_options(*of_command, epochs: int) -> list[Callable]:
    """Return the groups of options of a command, its own and those of all; the data decide how many epochs suit."""
    data = option_group(
        "Data",
        *of_command,
        option("--train", "train_path", type=PATH, required=True, help="What to train on."),
        option("--test", "test_path", type=PATH, required=True, help="What to measure on."),
    )
    return [data, training_options(epochs=epochs, batch_size=64, length=10, rank=3)]


VIT = option("--base", type=PATH, required=True, help="A vision transformer with a head.")


@experiment("vit", *encoder_options(VIT, SEARCH, epochs=5))
def vit(runs: Runs, base, train_path, test_path, search, epochs, **options) -> None:
    """Train over a vision transformer, on other pictures.

    Head only, prompts and gates, LoRA, full tuning.
    """
    sets = read_picture_sets(base, train_path, test_path, **options)
    print_numbers(sets, "pictures")
    if search:
        search_encoder_rates(runs, sets, epochs)
        return
    share = base_accuracy(sets)
    click.echo(f"untrained: {share:.2%}\n")
    rows = compare_encoders(runs, sets, VIT_RATES, epochs)
    runs.save("vit", {"untrained": share, "rows": rows}, draw_accuracies(rows, "untrained", share))


TEXTS = option("--text", "texts", type=PATH, multiple=True, required=True, help="To pretrain on.")
TOKENIZER = option("--tokenizer", type=PATH, required=True, help="RoBERTa's, a folder.")


@experiment("roberta", *encoder_options(TEXTS, TOKENIZER, SEARCH, epochs=2))
def roberta(runs: Runs, texts, tokenizer, train_path, test_path, search, epochs, **options) -> None:
    """Train over a small RoBERTa, on sentences.

    It is pretrained here. Head only, prompts and gates, LoRA, full tuning.
    """
    base, task = make_roberta(texts, tokenizer), "text-classification"
    model, _ = load_encoder(base)
    training, classes, *_ = read_labelled(task, model, base, train_path, 128)
    testing = read_labelled(task, model, base, test_path, 128, classes).examples
    sets = LabelledSets(base, training, testing, len(classes), **options)
    print_numbers(sets, "sentences")
    if search:
        search_encoder_rates(runs, sets, epochs)
        return
    commonest = Counter(example.labels[0] for example in testing).most_common(1)[0][1] / len(testing)
    click.echo(f"always the commonest: {commonest:.2%}\n")
    rows = compare_encoders(runs, sets, ROBERTA_RATES, epochs)
    figure = draw_accuracies(rows, "always the commonest", commonest)
    runs.save("roberta", {"majority": commonest, "rows": rows}, figure)


SMALL = RobertaConfig(vocab_size=50265, max_positions=130, dim=128, n_layers=4, n_heads=4, hidden_dim=512)
MASK = 50264  # RoBERTa's <mask>
ROW, ROWS, STEPS = 64, 32, 1000  # tokens in a row, rows in a step
SCHEDULE = {"peak": 1e-3, "warmup": 100}
OPTIMIZER = {"betas": (0.9, 0.98), "weight_decay": 0.01, "clip": 1.0}
TOKENIZER_FILES = ("merges.txt", "vocab.json", "vocab.bpe", "encoder.json", "dict.txt")  # those of them that are there


def make_roberta(paths: Sequence[Path], tokenizer: Path) -> Path:
    """The folder of a small RoBERTa that has read these texts, with its tokenizer; made at the first call.

    Raises OSError or ValueError.
    """
    texts = [read_text(path) for path in paths]
    files = {name: read_text(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).exists()}

    def make(folder: Path) -> None:
        rows = masked_rows(texts, RobertaTokenizer(tokenizer))
        for name, text in files.items():
            write_text(folder / name, text)
        save_encoder(pretrain_roberta(rows), folder)

    numbers = [asdict(SMALL), ROW, ROWS, STEPS, SCHEDULE, OPTIMIZER]
    return cached_folder("toy-roberta", [*numbers, texts, files], make)


def masked_rows(texts: Sequence[str], tokenizer: RobertaTokenizer) -> Tensor:
    """Text cut into rows (number, ROW), each from <s> to </s>. Raises ValueError where it fills none."""
    ids = [id for text in texts for id in tokenizer.encode(text)]
    number = len(ids) // (ROW - 2)
    if not number:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a row of {ROW - 2}")
    rows = torch.tensor(ids[: number * (ROW - 2)]).view(number, -1)
    edge = torch.ones(number, 1, dtype=torch.long)
    return torch.cat([tokenizer.bos_id * edge, rows, tokenizer.eos_id * edge], dim=1)


def pretrain_roberta(rows: Tensor, steps: int = STEPS, config: RobertaConfig = SMALL) -> Roberta:
    """Masked-language modelling of rows (number, ROW), with a head that is thrown away."""
    torch.manual_seed(0)
    model = Roberta(config)
    for embedding in (model.tok_embeddings, model.positions, model.types):
        nn.init.normal_(embedding.weight, std=0.02)
    dense, norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim)
    bias = nn.Parameter(torch.zeros(config.vocab_size))

    def losses() -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(0)
        for _ in range(steps):
            ids = rows[torch.randint(len(rows), (ROWS,), generator=random)]  # (B, T)
            shown, masked = mask_tokens(ids, random)
            hidden = norm(F.gelu(dense(model.encode(shown)[masked])))  # (R, C)
            yield F.cross_entropy(hidden @ model.tok_embeddings.weight.T + bias, ids[masked])

    parameters = [*model.parameters(), *dense.parameters(), *norm.parameters(), bias]
    schedule, in_turn = partial(learning_rate, total=steps, **SCHEDULE), losses()
    options = {"steps": steps, "desc": "pretraining RoBERTa"} | OPTIMIZER
    pretrain(parameters, lambda step: next(in_turn), schedule, **options)
    return model


def mask_tokens(ids: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the model is shown of ids (B, T), and which of them it is asked.

    15 % of the words are asked: eight of ten of them masked, one as it was, one another.
    """
    masked = (torch.rand(ids.shape, generator=random) < 0.15) & (ids > 3)
    lot = torch.rand(ids.shape, generator=random)
    shown = ids.masked_fill(masked & (lot < 0.8), MASK)
    other = torch.randint(4, MASK, ids.shape, generator=random)
    return torch.where(masked & (lot >= 0.9), other, shown), masked
