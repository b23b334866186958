"""Parts of `experiments real` in which the model classifies film reviews (SST-2) with a one-word response."""

import hashlib
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from matplotlib.figure import Figure

from data import Example
from encoder_tuning.data import read_labeled_texts
from experiments.ablations import epoch_means, without_losses
from experiments.cached import CACHE
from experiments.drawing import draw_bars, draw_line, percent
from experiments.measures import exact_accuracy, perplexity, run_setting
from experiments.methods import FULL, GATES_AT_ONE, LORA, ONE_SOFTMAX, ZERO_INIT, Setting, finite_steps
from experiments.methods import set_up
from experiments.runs import Column, Runs, rounded
from experiments.testbed import Testbed, TestbedParts, make_testbed
from formats.bases import load_llama, read_base
from formats.hub import find_base
from runtime.device import peak_memory, select_device
from runtime.files import read_json_object, read_text

QUESTION = "Is this review of a film positive or negative? Answer with one word."
ANSWERS = {"0": "Negative", "1": "Positive"}
SENTENCES = 800  # default number of training sentences
SEARCH = 200  # number of sentences of train.tsv that are held out to choose a learning rate
BATCH_SIZE = 16
EPOCHS = 3
MIN_STEPS = 75  # minimum number of optimizer steps, half of those for 800 sentences; few sentences get more epochs

PROMPT_RATES = (0.003, 0.01, 0.03)
TRIED = {method: PROMPT_RATES for method in (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE)}
TRIED |= {LORA: (0.0003, 0.001, 0.003), FULL: (0.00001, 0.00003, 0.0001)}


class Sources(NamedTuple):
    """Input files of the experiment, and the device, dtype and number of processes that it uses."""

    base: Path
    reviews: Path  # folder of SST-2, with train.tsv and dev.tsv
    text: Path  # text to measure the perplexity on
    problems: Path | None  # ScienceQA's problems.json
    alpaca: Path | None  # Stanford Alpaca's JSON file
    device: str
    dtype: str
    at_a_time: int


class ReviewRun(NamedTuple):
    """A training run on film reviews."""

    setting: Setting
    sentences: int = SENTENCES
    searching: bool = False  # True: evaluate on held-out sentences of train.tsv; False: on dev.tsv


@cache
def review_testbed(sources: Sources, sentences: int, searching: bool) -> Testbed:
    """Return the testbed of film reviews. A smaller training set is a subset of every larger one.

    `sentences` and `searching` have the same meaning as in ReviewRun. Raises OSError or ValueError if an input file is
    missing or invalid.
    """
    rows = read_labeled_texts(sources.reviews / "train.tsv")
    order = np.random.default_rng(0).permutation(len(rows))
    examples = [as_instruction(*rows[i]) for i in order]
    held_out = examples[-SEARCH:]
    if not searching:
        held_out = [as_instruction(*row) for row in read_labeled_texts(sources.reviews / "dev.tsv")]
    base = find_base(sources.base)
    default = Setting(read_base(base)[0].n_layers - 2, lr=0.01, **schedule(sentences))
    text = [read_text(sources.text)[:100_000]]
    parts = TestbedParts(base, default, BATCH_SIZE, examples[:sentences], held_out, text)
    return make_testbed(parts, 512, *select_device(sources.device, sources.dtype))


def as_instruction(text: str, label: str, name: str) -> Example:
    if label not in ANSWERS:
        raise ValueError(f"{name}: the label is {label!r}; expected one of {', '.join(ANSWERS)}")
    return Example(QUESTION, text, ANSWERS[label], name=name)


def schedule(sentences: int) -> dict[str, float]:
    """Return the numbers of epochs and warm-up epochs; the latter are two thirds of the former.

    Training lasts at least EPOCHS epochs and at least MIN_STEPS optimizer steps.
    """
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / math.ceil(sentences / BATCH_SIZE)))
    return {"epochs": epochs, "warmup_epochs": epochs * 2 / 3}


def cache_file(sources: Sources, run: object, seed: int, suffix: str = "pt") -> Path:
    """Return the path of a run's checkpoint or adapter file in the cache. Creates the folder of the cache.

    The name depends on the base's name, the dtype, the run and the seed, but not on the data files.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr((sources.base.name, sources.dtype, run, seed)).encode()).hexdigest()[:12]
    return CACHE / f"real-{digest}.{suffix}"


@contextmanager
def checkpoint_file(sources: Sources, run: object, seed: int) -> Iterator[Path]:
    """Yield the path of a run's checkpoint. The file is deleted at the end, unless there was an error."""
    path = cache_file(sources, run, seed)
    yield path
    path.unlink(missing_ok=True)


def run_review(sources: Sources, run: ReviewRun, seed: int) -> dict:
    """Train, and return the results of `run_setting`.

    Training resumes from the run's checkpoint if there is one.
    """
    testbed = review_testbed(sources, run.sentences, run.searching)
    with checkpoint_file(sources, run, seed) as checkpoint:
        return run_setting(testbed, run.setting, seed, checkpoint)


COLUMNS = (
    Column("trained", "parameters", ","),
    Column("accuracy", "exact match", spread=True),
    Column("val_loss", "validation loss", ".4f"),
    Column("train_loss", "training loss", ".4f"),
    Column("perplexity", "perplexity", ".2f"),
    Column("seconds", "seconds", ".0f"),
)


def review_table(runs: Runs, sources: Sources, planned: dict[str, ReviewRun], **options) -> dict[str, dict]:
    """Execute the runs. Return their results as lists over the seeds, together with their settings."""
    do = partial(run_review, sources)
    rows = runs.table(COLUMNS, planned, do, in_rounds=True, at_a_time=sources.at_a_time, **options)
    return {label: row | {"setting": planned[label].setting._asdict()} for label, row in rows.items()}


# ---------------------------------------------------------------------------------------------------
# The parts


def search_rates(runs: Runs, sources: Sources) -> None:
    """Try three learning rates for each method, and a fourth if the best one is the lowest or the highest."""
    default = review_testbed(sources, SENTENCES, True).default

    def table(rates: dict[str, tuple[float, ...]]) -> dict[str, dict]:
        settings = [default._replace(method=method, lr=lr) for method, tried in rates.items() for lr in tried]
        planned = {f"{each.method}, {each.lr:g}": ReviewRun(each, searching=True) for each in settings}
        return review_table(runs, sources, planned)

    rows = table(TRIED)
    further = {}
    for method, tried in TRIED.items():
        rate = best_rate(rows, method)
        if rate in (tried[0], tried[-1]):
            further[method] = (rounded(rate / 3 if rate == tried[0] else rate * 3),)
    if further:
        rows |= table(further)
    best = {method: best_rate(rows, method) for method in TRIED}
    at_edge = [method for method in further if best[method] in further[method]]
    click.echo("best learning rates: " + ", ".join(f"{method} {lr:g}" for method, lr in best.items()))

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method in TRIED:
        method_rows = sorted((row for row in rows.values() if row["setting"]["method"] == method), key=rate_of)
        axes.plot(
            list(map(rate_of, method_rows)), percent([row["accuracy"][0] for row in method_rows]), "o-", label=method
        )
    axes.set(xlabel="learning rate", xscale="log", ylabel=f"{SEARCH} sentences answered exactly, %")
    axes.legend()
    runs.save("rates", {"best": best, "best_at_the_edge": at_edge, "rows": without_losses(rows)}, figure)


def rate_of(row: dict) -> float:
    return row["setting"]["lr"]


def best_rate(rows: dict[str, dict], method: str) -> float:
    """Return the learning rate with the highest exact-match accuracy; the validation loss breaks ties."""
    method_rows = [row for row in rows.values() if row["setting"]["method"] == method]
    return rate_of(max(method_rows, key=lambda row: (row["accuracy"][0], -row["val_loss"][0])))


def best_settings(runs: Runs, sources: Sources) -> dict[str, Setting]:
    """Return each method's setting with its best learning rate. Raises ValueError if the part `rates` has not run."""
    path = runs.out / "rates.json"
    if not path.exists():
        raise ValueError(f"{path}: does not exist; search for the learning rates first, with --part rates")
    default = review_testbed(sources, SENTENCES, False).default
    return {method: default._replace(method=method, lr=lr) for method, lr in read_json_object(path)["best"].items()}


def base_alone(testbed: Testbed) -> dict[str, float | None]:
    """Return the accuracy (exact match) and the perplexity of the base without an adapter."""
    model, _ = load_llama(testbed.base, testbed.dtype, testbed.device)
    return {"accuracy": exact_accuracy(testbed, model, None), "perplexity": perplexity(testbed, model)}


def compare_methods(runs: Runs, sources: Sources) -> None:
    """Compare all methods at their best learning rates (Tables 1 and 5), and two of them at other rates (Figure 7)."""
    best = best_settings(runs, sources)
    base = base_alone(review_testbed(sources, SENTENCES, False))
    click.echo(f"base without an adapter: exact match {base['accuracy']:.1%}, perplexity {base['perplexity']:.2f}\n")
    planned = {method: ReviewRun(setting) for method, setting in best.items()}
    inits = {}
    for method in (ZERO_INIT, ONE_SOFTMAX):
        for factor in (1 / 3, 3):
            setting = best[method]._replace(lr=rounded(best[method].lr * factor))
            inits[f"{method}, {setting.lr:.3g}"] = ReviewRun(setting)
    rows = review_table(runs, sources, planned | inits)
    paper = {
        "ScienceQA, validation, %": {"zero-init attention": 83.85, "random-init attention": 40.77},
        "parameters": {"full tuning (Alpaca)": "7B", "LoRA (Alpaca-LoRA)": "4.2M", "LLaMA-Adapter": "1.2M"},
    }

    figure = Figure(figsize=(14, 4), layout="constrained")
    bars, forgetting, curves = figure.subplots(1, 3)
    draw_bars(bars, {label: percent(row["accuracy"]) for label, row in rows.items()}, "answered exactly, %")
    draw_bars(forgetting, {label: rows[label]["perplexity"] for label in planned}, "perplexity of WikiText-2")
    forgetting.axvline(base["perplexity"], color="black", linewidth=1)
    forgetting.set_xscale("log")
    for method in (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE, LORA, FULL):
        curves.plot(np.array(rows[method]["losses"]).mean(axis=0), label=method, linewidth=1)
    curves.set(xlabel="step", ylabel="training loss", yscale="log")
    curves.legend()
    steps_per_epoch = math.ceil(SENTENCES / BATCH_SIZE)
    by_epoch = {
        label: [epoch_means(losses, steps_per_epoch) for losses in row["losses"]] for label, row in rows.items()
    }
    values = {"paper": paper, "base": base, "rows": without_losses(rows), "loss_by_epoch": by_epoch}
    runs.save("methods", values, figure)


def compare_layers(runs: Runs, sources: Sources) -> None:
    """Compare different numbers of adapted layers (Table 4), and the topmost layers with the lowest."""
    setting = best_settings(runs, sources)[ZERO_INIT]
    N = setting.layers + 2
    top = {L: f"topmost {L} of {N} layers" for L in (N // 3, 2 * N // 3, N - 2, N)}
    low = f"lowest {N // 3} of {N} layers"
    planned = {label: ReviewRun(setting._replace(layers=L)) for L, label in top.items()}
    planned[low] = ReviewRun(setting._replace(layers=N // 3, where="bottom"))
    rows = review_table(runs, sources, planned)
    paper = {"ScienceQA, validation, %, by topmost layers of 32": {10: 55.95, 20: 73.36, 30: 83.85, 32: 81.03}}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw_line(axes, list(top), [percent(rows[label]["accuracy"]) for label in top.values()], "topmost")
    draw_line(axes, [N // 3], [percent(rows[low]["accuracy"])], "lowest")
    axes.set(xlabel=f"adapted layers of {N}", ylabel="answered exactly, %", xticks=list(top))
    axes.legend()
    runs.save("layers", {"paper": paper, "rows": without_losses(rows)}, figure)


def compare_samples(runs: Runs, sources: Sources) -> None:
    """Compare three methods on 50, 200 and 800 training sentences, and two of them, with one seed, on 2,400."""
    best = best_settings(runs, sources)
    methods = (ZERO_INIT, ONE_SOFTMAX, LORA)
    planned = {}
    for sentences in (50, 200, SENTENCES, 3 * SENTENCES):
        for method in methods:
            if sentences <= SENTENCES or method != ONE_SOFTMAX:
                setting = best[method]._replace(**schedule(sentences))
                planned[f"{method}, {sentences}"] = ReviewRun(setting, sentences)
    once = [label for label, run in planned.items() if run.sentences > SENTENCES]
    rows = review_table(runs, sources, planned, once=once)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        by_number = {run.sentences: rows[label] for label, run in planned.items() if run.setting.method == method}
        draw_line(axes, list(by_number), [percent(row["accuracy"]) for row in by_number.values()], method)
    axes.set(xlabel="training sentences", xscale="log", ylabel="answered exactly, %")
    axes.legend()
    runs.save("samples", {"rows": without_losses(rows)}, figure)


TIMED_STEPS = 12


def measure_price(runs: Runs, sources: Sources) -> None:
    """Measure the seconds per step and the peak memory of four methods; one process at a time uses all threads."""
    columns = (Column("step_seconds", "s per step", ".2f"), Column("peak_bytes", "peak memory, bytes", ",.0f"))
    settings = {m: s for m, s in best_settings(runs, sources).items() if m != GATES_AT_ONE}
    rows = runs.table(columns, settings, partial(in_new_process, measure_steps, sources), in_rounds=True)
    runs.save("price", {"steps": TIMED_STEPS, "rows": rows})


def in_new_process(function: Callable, *args) -> dict:
    """Call a function in a new process, so that the measured peak memory is that of the function alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure_steps(sources: Sources, setting: Setting, seed: int) -> dict:
    """Return the median time of a training step in seconds, without the first step, and the peak memory in bytes."""
    testbed = review_testbed(sources, BATCH_SIZE * TIMED_STEPS, False)
    trainable = set_up(setting, seed, testbed.base, testbed.dtype, testbed.device)
    steps = finite_steps(trainable, testbed.training, testbed.train_config(setting, seed))
    seconds = [step.seconds for step, _ in zip(steps, range(TIMED_STEPS))]
    return {"step_seconds": statistics.median(seconds[1:]), "peak_bytes": peak_memory(testbed.device)}
