"""The same comparisons for encoders, a ViT and a RoBERTa: python encoder_experiments.py vit --help."""

import hashlib
import inspect
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from encoder_tuning import heads
from adapter import gated_attention
from runtime.cli import one_line_errors
from experiments.comparison import POSITIONS, WEIGHT_DECAY, Inside, fit, ungated_attention, with_lora
from data import read_text
from formats.encoders import load_encoder, save_roberta
from encoders.models import Roberta, RobertaConfig
from experiments.paper import HERE, draw_bars, percent, report, spread
from training.step import learning_rate, make_optimizer


class Headed(Inside):
    """A head, and what else is trained with it inside the base: in the place of a HeadAdapter, without prompts."""

    def __init__(self, head: nn.Module, trained: Sequence[nn.Parameter]):
        super().__init__(trained)
        self.head = head


METHODS = ("head only", "prompts and gates", "no gates", "LoRA", "full tuning")


def prepare(method: str, base: Path, seed: int, classes: int, length: int, rank: int):
    """Model, what is trained, and its optimizer, for one of the methods; the head is the base's own if it fits."""
    generator = torch.Generator().manual_seed(seed)
    attention = ungated_attention if method == "no gates" else gated_attention
    model, head = load_encoder(base, attention=attention)
    layers = model.config.n_layers
    adapter = heads.head_adapter(model, head, classes, layers=layers, length=length, generator=generator)
    if method in ("prompts and gates", "no gates"):
        if method == "no gates":
            adapter.gates.requires_grad_(False)
        return model, adapter, make_optimizer(adapter, WEIGHT_DECAY)
    inside = []
    if method == "LoRA":
        inside = with_lora(model, rank, generator)
    if method == "full tuning":
        inside = list(model.requires_grad_(True).parameters())
    headed = Headed(adapter.head, inside)
    return model, headed, headed.optimizer(WEIGHT_DECAY)


def accuracy(model: nn.Module, adapter: nn.Module, examples: list) -> float:
    found = heads.classify(model, adapter, examples, POSITIONS)
    return sum(best == example.labels[0] for best, example in zip(found, examples)) / len(examples)


def compare(
    base: Path,
    training: list,
    testing: list,
    classes: int,
    rates: dict[str, float],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    length: int,
    rank: int,
) -> dict[str, dict]:
    """Accuracy of every method on the testing examples, seed by seed, and what it trains and takes."""
    rows = {}
    for method, lr in rates.items():
        accuracies, start = [], time.perf_counter()
        for seed in seeds:
            model, adapter, optimizer = prepare(method, base, seed, classes, length, rank)
            how = {"epochs": epochs, "warmup_epochs": 1, "batch_size": batch_size, "lr": lr, "seed": seed}
            fit(model, adapter, optimizer, training, heads.Labels(spans=False), **how)
            accuracies.append(accuracy(model, adapter, testing))
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        rows[method] = {
            "trained": trained,
            "lr": lr,
            "accuracy": accuracies,
            "seconds": (time.perf_counter() - start) / len(seeds),
        }
        click.echo(
            f"{method:20}{trained:>10,}{lr:>9g}{statistics.mean(accuracies):>10.2%} ± {spread(accuracies):.2%}"
            f"{rows[method]['seconds']:>8.0f} s   " + ", ".join(f"{share:.2%}" for share in accuracies)
        )
    return rows


def try_rates(base: Path, examples: list, classes: int, how: dict) -> None:
    """Every method at every learning rate, asked about the first tenth of the examples; ValueError if there is none."""
    if len(examples) < 10:
        raise ValueError(f"{len(examples)} examples have no tenth to try learning rates on")
    tenth = len(examples) // 10
    for lr in RATES:
        compare(base, examples[tenth:], examples[:tenth], classes, dict.fromkeys(METHODS, lr), [0], **how)


def draw(rows: dict[str, dict], others: dict[str, float]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    values = {name: percent([share]) for name, share in others.items()}
    values |= {method: percent(row["accuracy"]) for method, row in rows.items()}
    draw_bars(figure.subplots(), values, "accuracy, %")
    return figure


def comparing(epochs: int):
    """The options of commands that compare the methods; they differ in how many epochs suit the data."""
    options = [
        click.option("--train", "train_path", type=click.Path(path_type=Path), required=True),
        click.option("--test", "test_path", type=click.Path(path_type=Path), required=True),
        click.option("--seeds", type=click.IntRange(1), default=3),
        click.option("--epochs", type=click.IntRange(2), default=epochs),
        click.option("--batch-size", type=click.IntRange(1), default=64),
        click.option("--length", type=click.IntRange(1), default=10, help="K, prompt vectors per layer."),
        click.option("--rank", type=click.IntRange(1), default=3, help="Of LoRA."),
        click.option("--out", type=click.Path(path_type=Path), default=HERE, show_default="experiments"),
        click.option("--search", is_flag=True, help="Learning rates, on a tenth of the training examples."),
    ]

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


HEADER = f"{'':20}{'trained':>10}{'rate':>9}{'accuracy':>10}{'':10}{'each':>8}"


@click.group(context_settings={"show_default": True})
def main():
    """Compare the methods: a table, and a file and a picture in experiments/."""


RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
# The best of these for each method on a tenth of the training digits, as --search finds them.
VIT_RATES = {"head only": 0.01, "prompts and gates": 0.1, "no gates": 0.1, "LoRA": 0.03, "full tuning": 0.01}


@main.command(context_settings={"show_default": True})
@click.option("--base", type=click.Path(path_type=Path), required=True, help="A vision transformer with a head.")
@comparing(epochs=5)
def vit(base, train_path, test_path, seeds, epochs, batch_size, length, rank, out, search):
    """Other pictures for a trained vision transformer: head only, prompts and gates, LoRA, full tuning."""
    with one_line_errors():
        model, head = load_encoder(base)
        if head is None:
            raise ValueError(f"{base}: has no head")
        classes = list(map(str, range(head[-1].out_features)))
        task = "image-classification"
        training, testing = (
            heads.read_lesson(task, model, base, path, 512, classes).examples for path in (train_path, test_path)
        )
        how = {"epochs": epochs, "batch_size": batch_size, "length": length, "rank": rank}
        click.echo(f"{len(training):,} pictures to learn from, {len(testing):,} to be asked about\n\n{HEADER}")
        if search:
            return try_rates(base, training, len(classes), how)
        share = accuracy(model, heads.head_adapter(model, head, len(classes), layers=1, length=1), testing)
        click.echo(f"{'untuned':20}{0:>10}{'':>9}{share:>10.2%}")
        rows = compare(base, training, testing, len(classes), VIT_RATES, range(seeds), **how)
        out.mkdir(parents=True, exist_ok=True)
        values = {"untuned": share, "options": how, "methods": rows}
        report(out, "vit", values, draw(rows, {"untuned": share}))


# ---------------------------------------------------------------------------------------------------
# RoBERTa

SMALL = RobertaConfig(50265, 130, 128, 4, 4, 512)
MASK = 50264
ROW, ROWS, STEPS, PEAK_LR, WARMUP = 64, 32, 1000, 1e-3, 100  # tokens in a row, rows in a step


def masked_rows(texts: Sequence[str], tokenizer: heads.RobertaTokenizer) -> Tensor:
    """Text cut into rows (number, ROW), each from <s> to </s>."""
    ids = [id for text in texts for id in tokenizer.encode(text)]
    number = len(ids) // (ROW - 2)
    if not number:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a row of {ROW - 2}")
    rows = torch.tensor(ids[: number * (ROW - 2)]).view(number, -1)
    edge = torch.ones(number, 1, dtype=torch.long)
    return torch.cat([tokenizer.bos_id * edge, rows, tokenizer.eos_id * edge], dim=1)


def pretrain(rows: Tensor, steps: int = STEPS, config: RobertaConfig = SMALL) -> Roberta:
    """Masked-language modelling: of 15 % of the words, hidden in four of five cases, else another or the same."""
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Roberta(config)
    for embedding in (model.words, model.positions, model.types):
        nn.init.normal_(embedding.weight, std=0.02)
    dense, norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim)
    bias = nn.Parameter(torch.zeros(config.vocab_size))
    parameters = [*model.parameters(), *dense.parameters(), *norm.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(steps), desc="pre-training RoBERTa", unit="step", file=sys.stderr)
    for step in bar:
        ids = rows[torch.randint(len(rows), (ROWS,), generator=random)]  # (B, T)
        asked = (torch.rand(ids.shape, generator=random) < 0.15) & (ids > 3)
        lot = torch.rand(ids.shape, generator=random)
        shown = ids.masked_fill(asked & (lot < 0.8), MASK)
        other = torch.randint(4, MASK, ids.shape, generator=random)
        shown = torch.where(asked & (lot >= 0.9), other, shown)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=PEAK_LR, warmup=WARMUP, total=steps)
        states = norm(F.gelu(dense(model.encode(shown)[asked])))  # (R, C)
        loss = F.cross_entropy(states @ model.words.weight.T + bias, ids[asked])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model


def small_roberta(texts: Sequence[Path], tokenizer: Path) -> Path:
    """The folder of a small RoBERTa that has read these texts; made at the first call."""
    names = ("merges.txt", "vocab.json", "vocab.bpe", "encoder.json", "dict.txt")
    files = [*texts, *(tokenizer / name for name in names if (tokenizer / name).exists())]
    recipe = repr((SMALL, ROW, ROWS, STEPS, PEAK_LR, WARMUP)) + inspect.getsource(pretrain)
    content = hashlib.sha256(recipe.encode() + b"".join(map(Path.read_bytes, files))).hexdigest()[:8]
    folder = Path(__file__).parent / f"toy-roberta-{content}"
    if not (folder / "config.json").exists():
        rows = masked_rows([read_text(path) for path in texts], heads.RobertaTokenizer(tokenizer))
        folder.mkdir(exist_ok=True)
        for file in files[len(texts) :]:
            shutil.copy(file, folder / file.name)
        save_roberta(pretrain(rows), folder)
    return folder


# Guessed from those, not searched.
ROBERTA_RATES = {"head only": 0.01, "prompts and gates": 0.03, "no gates": 0.03, "LoRA": 0.01, "full tuning": 0.001}


@main.command(context_settings={"show_default": True})
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, required=True, help="To pre-train on.")
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, help="RoBERTa's, a folder.")
@comparing(epochs=2)
def roberta(texts, tokenizer, train_path, test_path, seeds, epochs, batch_size, length, rank, out, search):
    """Sentences for a small RoBERTa, pre-trained here: head only, prompts and gates, LoRA, full tuning."""
    with one_line_errors():
        base, task = small_roberta(texts, tokenizer), "text-classification"
        model, _ = load_encoder(base)
        lesson = heads.read_lesson(task, model, base, train_path, 128)
        testing = heads.read_lesson(task, model, base, test_path, 128, lesson.classes).examples
        training, classes = lesson.examples, len(lesson.classes)
        how = {"epochs": epochs, "batch_size": batch_size, "length": length, "rank": rank}
        click.echo(f"{len(training):,} sentences to learn from, {len(testing):,} to be asked about\n\n{HEADER}")
        if search:
            return try_rates(base, training, classes, how)
        most = max(sum(example.labels[0] == c for example in testing) for c in range(classes)) / len(testing)
        click.echo(f"{'always the commonest':20}{0:>10}{'':>9}{most:>10.2%}")
        rows = compare(base, training, testing, classes, ROBERTA_RATES, range(seeds), **how)
        out.mkdir(parents=True, exist_ok=True)
        values = {"majority": most, "options": how, "methods": rows}
        report(out, "roberta", values, draw(rows, {"always the commonest": most}))


if __name__ == "__main__":
    main()
