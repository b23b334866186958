"""Compare training methods on encoders: a given vision transformer, and a small RoBERTa that is pretrained here."""

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
from encoder_tuning.data import read_labeled
from encoder_tuning.labeled import Labeled, subset
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
# The best of TRIED_RATES, evaluated on the first tenth of the training digits. (--search now draws a random tenth.)
VIT_RATES = {"head only": 0.01, "prompts and gates": 0.1, "no gates": 0.1, "LoRA": 0.03, "full tuning": 0.01}
# The best of TRIED_RATES, evaluated on a tenth of SST-2's training sentences.
ROBERTA_RATES = {"head only": 0.03, "prompts and gates": 0.03, "no gates": 0.1, "LoRA": 0.03, "full tuning": 0.001}


class EncoderRun(NamedTuple):
    """Settings of one training run on an encoder."""

    method: str
    lr: float
    epochs: int  # the first epoch is the warm-up
    number: int | None = None  # number of training examples; None means all
    on_tenth: bool = False  # hold out a tenth of the training examples and evaluate on it, to choose a learning rate


@dataclass(frozen=True)
class LabeledSets:
    """An encoder, its training and test examples, and the settings that all methods share."""

    base: Path
    training: list[Labeled]
    testing: list[Labeled]
    num_classes: int
    batch_size: int
    length: int  # K
    rank: int  # rank of LoRA


def set_up_encoder(method: str, sets: LabeledSets, seed: int) -> Trainable:
    """Load a fresh encoder, and create the parameters that the method trains, their optimizer and their loss function.

    The encoder's own head is used if it has the right number of classes; otherwise the head is a new linear layer.
    """
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


def encoder_accuracy(model: nn.Module, adapter: nn.Module, examples: Sequence[Labeled]) -> float:
    predictions = classify(model, adapter, examples, MICRO_BATCH_TOKENS)
    return accuracy(predictions, [example.labels[0] for example in examples])


COLUMNS = (
    Column("trained", "parameters", ","),
    Column("lr", "lr", "g"),
    Column("accuracy", "accuracy", ".2%", spread=True),
    Column("seconds", "seconds", ".0f"),
)


def train_and_score(sets: LabeledSets, run: EncoderRun, seed: int) -> dict:
    """Train with one seed, which also selects the examples if `run.number` is set. Return the results by name.

    The accuracy is measured on the test examples or, if `run.on_tenth`, on the held-out tenth of the training examples.
    "seconds" covers loading, training and scoring.
    """
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


def compare_encoders(runs: Runs, sets: LabeledSets, rates: dict[str, float], epochs: int) -> dict[str, dict]:
    """Train every method with every seed. Return the results of `train_and_score` by method, as lists over seeds."""
    import_peft()  # fail before training if PEFT is missing
    settings = {method: EncoderRun(method, lr, epochs) for method, lr in rates.items()}
    return runs.table(COLUMNS, settings, partial(train_and_score, sets))


def search_encoder_rates(runs: Runs, sets: LabeledSets, epochs: int, number: int | None = None) -> dict[str, float]:
    """Return the learning rate at which each method is most accurate on a held-out tenth of the training examples.

    Tries TRIED_RATES with one seed. All runs hold out the same tenth, and train on the remaining examples, or on
    `number` of them. The tenth is drawn at random, because the first tenth of a file sorted by class may have only one
    class. Raises ValueError if there are fewer than ten examples.
    """
    import_peft()
    if len(sets.training) < 10:
        raise ValueError(
            f"--train: has {len(sets.training)} examples; the search needs at least 10, because it holds out a tenth"
        )
    settings = {
        f"{method}, {lr:g}": EncoderRun(method, lr, epochs, number, on_tenth=True)
        for lr in TRIED_RATES
        for method in METHODS
    }
    rows = runs.table(COLUMNS, settings, partial(train_and_score, sets), once=settings)
    return {method: max(TRIED_RATES, key=lambda lr: rows[f"{method}, {lr:g}"]["accuracy"][0]) for method in METHODS}


def read_image_sets(base: Path, train_path: Path, test_path: Path, **options) -> LabeledSets:
    """Read training and test images for a vision transformer with a classification head.

    Raises OSError or ValueError if the base has no head, or if a file is missing or invalid.
    """
    model, head = load_encoder(base)
    if head is None:
        raise ValueError(f"{base}: has no classification head; give an image classifier")
    classes = list(map(str, range(head[-1].out_features)))
    training, testing = (
        read_labeled("image-classification", model, base, path, 512, classes).examples
        for path in (train_path, test_path)
    )
    return LabeledSets(base, training, testing, len(classes), **options)


def base_accuracy(sets: LabeledSets) -> float:
    """Return the test accuracy of the encoder with its own head before training."""
    model, head = load_encoder(sets.base)
    return encoder_accuracy(model, head_adapter(model, head, sets.num_classes, layers=1, length=1), sets.testing)


def print_counts(sets: LabeledSets, examples: str) -> None:
    click.echo(f"{len(sets.training):,} training {examples}, {len(sets.testing):,} test {examples}")


def draw_accuracies(rows: dict[str, dict], baseline: str, score: float) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    values = {baseline: percent([score])} | {method: percent(row["accuracy"]) for method, row in rows.items()}
    draw_bars(figure.subplots(), values, "accuracy, %")
    return figure


SEARCH = option(
    "--search",
    is_flag=True,
    help="Only print the accuracy at each learning rate, on a held-out tenth of the training data.",
)


def encoder_options(*own_options, data_help: str, epochs: int) -> list[Callable]:
    """Return the option groups of a command: data, with `own_options` first, and training, with `epochs` as default.

    `data_help` says what the files of --train and --test contain.
    """
    data = option_group(
        "Data",
        *own_options,
        option(
            "--train",
            "train_path",
            type=PATH,
            required=True,
            help=f"Training data: {data_help}.",
        ),
        option("--test", "test_path", type=PATH, required=True, help="Test data, in the same format."),
    )
    return [data, training_options(epochs=epochs, batch_size=64, length=10, rank=3)]


IMAGES, SENTENCES = "images, a folder or .npz", "sentences, as .tsv, .csv or .json"
VIT = option("--base", type=PATH, required=True, help="Vision transformer with a classification head.")


@experiment("vit", *encoder_options(VIT, SEARCH, data_help=IMAGES, epochs=5))
def vit(runs: Runs, base, train_path, test_path, search, epochs, **options) -> None:
    """Train a vision transformer on new images.

    Compares five methods: training the head only, prompts and gates, prompts without gates, LoRA, and full fine-tuning.
    """
    sets = read_image_sets(base, train_path, test_path, **options)
    print_counts(sets, "images")
    if search:
        search_encoder_rates(runs, sets, epochs)
        return
    untrained = base_accuracy(sets)
    click.echo(f"accuracy before training: {untrained:.2%}\n")
    rows = compare_encoders(runs, sets, VIT_RATES, epochs)
    runs.save("vit", {"untrained": untrained, "rows": rows}, draw_accuracies(rows, "untrained", untrained))


TEXTS = option(
    "--text", "texts", type=PATH, multiple=True, required=True, help="File of text to pretrain on; repeatable."
)
TOKENIZER = option("--tokenizer", type=PATH, required=True, help="Folder with RoBERTa's tokenizer.")


@experiment("roberta", *encoder_options(TEXTS, TOKENIZER, SEARCH, data_help=SENTENCES, epochs=2))
def roberta(runs: Runs, texts, tokenizer, train_path, test_path, search, epochs, **options) -> None:
    """Train a small RoBERTa on sentences.

    First pretrains the model on --text. Then compares five methods: training the head only, prompts and gates, prompts
    without gates, LoRA, and full fine-tuning.
    """
    base, task = make_roberta(texts, tokenizer), "text-classification"
    model, _ = load_encoder(base)
    training, classes, *_ = read_labeled(task, model, base, train_path, 128)
    testing = read_labeled(task, model, base, test_path, 128, classes).examples
    sets = LabeledSets(base, training, testing, len(classes), **options)
    print_counts(sets, "sentences")
    if search:
        search_encoder_rates(runs, sets, epochs)
        return
    majority = Counter(example.labels[0] for example in testing).most_common(1)[0][1] / len(testing)
    click.echo(f"share of the most frequent class: {majority:.2%}\n")
    rows = compare_encoders(runs, sets, ROBERTA_RATES, epochs)
    figure = draw_accuracies(rows, "most frequent class", majority)
    runs.save("roberta", {"majority": majority, "rows": rows}, figure)


SMALL = RobertaConfig(vocab_size=50265, max_positions=130, dim=128, n_layers=4, n_heads=4, hidden_dim=512)
MASK = 50264  # RoBERTa's <mask>
ROW, ROWS, STEPS = 64, 32, 1000  # tokens per row, rows per optimizer step, number of steps
SCHEDULE = {"peak": 1e-3, "warmup": 100}
OPTIMIZER = {"betas": (0.9, 0.98), "weight_decay": 0.01, "clip": 1.0}
TOKENIZER_FILES = ("merges.txt", "vocab.json", "vocab.bpe", "encoder.json", "dict.txt")  # copied if they exist


def make_roberta(paths: Sequence[Path], tokenizer: Path) -> Path:
    """Return a folder with a small RoBERTa that is pretrained on the text files `paths`, and with its tokenizer.

    The first call pretrains the model; later calls use the cached folder. Raises OSError or ValueError if a file is
    missing or invalid, or if there is too little text.
    """
    texts = [read_text(path) for path in paths]
    files = {name: read_text(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).exists()}

    def make(folder: Path) -> None:
        rows = token_rows(texts, RobertaTokenizer(tokenizer))
        for name, text in files.items():
            write_text(folder / name, text)
        save_encoder(pretrain_roberta(rows), folder)

    numbers = [asdict(SMALL), ROW, ROWS, STEPS, SCHEDULE, OPTIMIZER]
    return cached_folder("toy-roberta", [*numbers, texts, files], make)


def token_rows(texts: Sequence[str], tokenizer: RobertaTokenizer) -> Tensor:
    """Tokenize texts into int64 rows (number, ROW), each from <s> to </s>.

    Raises ValueError if the texts do not fill one row.
    """
    ids = [id for text in texts for id in tokenizer.encode(text)]
    number = len(ids) // (ROW - 2)
    if not number:
        raise ValueError(f"--text: has {len(ids)} tokens; at least {ROW - 2} are needed to pretrain; give more text")
    rows = torch.tensor(ids[: number * (ROW - 2)]).view(number, -1)
    edge = torch.ones(number, 1, dtype=torch.long)
    return torch.cat([tokenizer.bos_id * edge, rows, tokenizer.eos_id * edge], dim=1)


def pretrain_roberta(rows: Tensor, steps: int = STEPS, config: RobertaConfig = SMALL) -> Roberta:
    """Pretrain a RoBERTa by masked language modeling on token ids (number, ROW). The output head is discarded."""
    torch.manual_seed(0)
    model = Roberta(config)
    for embedding in (model.tok_embeddings, model.positions, model.types):
        nn.init.normal_(embedding.weight, std=0.02)
    dense, norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim)
    bias = nn.Parameter(torch.zeros(config.vocab_size))

    def batch_losses() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            ids = rows[torch.randint(len(rows), (ROWS,), generator=generator)]  # (B, T)
            inputs, masked = mask_tokens(ids, generator)
            hidden = norm(F.gelu(dense(model.encode(inputs)[masked])))  # (R, C)
            yield F.cross_entropy(hidden @ model.tok_embeddings.weight.T + bias, ids[masked])

    parameters = [*model.parameters(), *dense.parameters(), *norm.parameters(), bias]
    schedule, losses = partial(learning_rate, total=steps, **SCHEDULE), batch_losses()
    options = {"steps": steps, "desc": "pretraining RoBERTa"} | OPTIMIZER
    pretrain(parameters, lambda step: next(losses), schedule, **options)
    return model


def mask_tokens(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (B, T) for masked language modeling of `ids` (B, T), and the bool mask (B, T) of tokens to predict.

    Each token is selected for prediction with a probability of 15 %, except special tokens. Of the selected tokens,
    about 80 % are replaced by <mask>, 10 % are replaced by a random token, and 10 % are kept.
    """
    masked = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids > 3)
    draw = torch.rand(ids.shape, generator=generator)
    inputs = ids.masked_fill(masked & (draw < 0.8), MASK)
    random_ids = torch.randint(4, MASK, ids.shape, generator=generator)
    return torch.where(masked & (draw >= 0.9), random_ids, inputs), masked
