"""A vision transformer tuned on few examples and on many (Table 6 of the final version has 1,000), each method at the
best of its learning rates for that many."""

import math
import statistics
from dataclasses import asdict, replace

import click
import numpy as np
from cloup import command, option
from matplotlib.figure import Figure

from encoder_tuning.data import Labelled, read_labelled
from encoders.heads import head_adapter
from experiments.encoders import METHODS, PATH, TRIED_RATES, EncoderSetting, LabelledSets, compare_encoder_methods
from experiments.encoders import encoder_accuracy, encoder_options
from experiments.tables import draw_line, percent, save_results
from formats.encoders import load_encoder
from runtime.cli import one_line_errors

NUMBERS = (100, 300, 1000)  # and all
LEAST_STEPS = 200  # where examples are few there are more epochs


def draw_examples(examples: list[Labelled], number: int, seed: int) -> list[Labelled]:
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:number]]


def for_number(setting: EncoderSetting, number: int) -> EncoderSetting:
    """With as many epochs as so few examples need."""
    steps_per_epoch = math.ceil(number / setting.batch_size)
    return replace(setting, epochs=max(setting.epochs, math.ceil(LEAST_STEPS / steps_per_epoch)))


def best_rates(sets: LabelledSets, setting: EncoderSetting, number: int) -> dict[str, float]:
    """For so many examples, each method's best learning rate by a tenth of all that are there, tuned on others."""
    order = draw_examples(sets.training, len(sets.training), seed=0)
    tenth = len(order) // 10
    inner = LabelledSets(sets.base, order[tenth:][:number], order[:tenth], sets.num_classes)
    found = {lr: compare_encoder_methods(inner, dict.fromkeys(METHODS, lr), setting, [0]) for lr in TRIED_RATES}
    return {method: max(found, key=lambda lr: found[lr][method]["accuracy"][0]) for method in METHODS}


def draw_by_number(rows: dict[int, dict[str, dict]], untuned: float) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        draw_line(axes, list(rows), [percent(row[method]["accuracy"]) for row in rows.values()], method)
    axes.axhline(100 * untuned, color="black", linewidth=1)
    axes.set(xlabel="examples", xscale="log", ylabel="accuracy, %")
    axes.set_xticks(list(rows), [f"{number:,}" for number in rows], minor=False)
    axes.legend()
    return figure


@command("few", context_settings={"show_default": True})
@encoder_options(option("--base", type=PATH, required=True, help="A vision transformer with a head."), epochs=5)
def few_examples(base, train_path, test_path, seeds, out, **options):
    """Tune a vision transformer on few pictures.

    On 100, 300, 1,000 and all, every method at its best of six learning rates.
    """
    with one_line_errors():
        model, head = load_encoder(base)
        if head is None:
            raise ValueError(f"{base}: has no head")
        classes = list(map(str, range(head[-1].out_features)))
        training, testing = (
            read_labelled("image-classification", model, base, path, 512, classes).examples
            for path in (train_path, test_path)
        )
        sets, setting = LabelledSets(base, training, testing, len(classes)), EncoderSetting(**options)
        if len(training) < 10:
            raise ValueError(f"{train_path}: {len(training)} examples have no tenth to try learning rates on")
        untuned = encoder_accuracy(model, head_adapter(model, head, len(classes), layers=1, length=1), testing)
        click.echo(f"untuned: {untuned:.2%} of {len(testing):,} pictures")
        rows, rates = {}, {}
        for number in sorted({n for n in NUMBERS if n < len(training)} | {len(training)}):
            chosen = for_number(setting, number)
            click.echo(f"\n{number:,} pictures, {chosen.epochs} epochs: learning rates")
            rates[number] = best_rates(sets, chosen, number)
            click.echo(f"\n{number:,} pictures, each at its best")
            by_seed = [
                compare_encoder_methods(
                    replace(sets, training=draw_examples(training, number, seed)), rates[number], chosen, [seed]
                )
                for seed in range(seeds)
            ]
            rows[number] = {
                method: by_seed[0][method] | {"accuracy": [row[method]["accuracy"][0] for row in by_seed]}
                for method in METHODS
            }
        print_by_number(rows)
        values = {"untuned": untuned, "options": asdict(setting), "by_number": rows}
        save_results(out, "few", values, draw_by_number(rows, untuned))


def print_by_number(rows: dict[int, dict[str, dict]]) -> None:
    click.echo(f"\n{'':20}" + "".join(f"{number:>18,}" for number in rows))
    for method in METHODS:
        cells = [f"{statistics.mean(row[method]['accuracy']):.2%} at {row[method]['lr']:g}" for row in rows.values()]
        click.echo(f"{method:20}" + "".join(f"{cell:>18}" for cell in cells))
