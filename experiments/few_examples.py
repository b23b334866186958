"""A vision transformer tuned on few examples and on many (Table 6 of the final version has 1,000), each method at the
best of its learning rates for that many."""

import math
import statistics
from dataclasses import asdict, replace

import click
from cloup import command, option
from matplotlib.figure import Figure

from encoder_tuning.labelled import subset
from experiments.encoders import METHODS, EncoderSetting, compare_encoder_methods, encoder_options, read_picture_sets
from experiments.encoders import search_encoder_rates, untuned_accuracy
from experiments.tables import draw_line, percent, save_results
from runtime.cli import PATH, one_line_errors

NUMBERS = (100, 300, 1000)  # and all
LEAST_STEPS = 200  # where examples are few there are more epochs


def for_number(setting: EncoderSetting, number: int) -> EncoderSetting:
    """With as many epochs as so few examples need."""
    steps_per_epoch = math.ceil(number / setting.batch_size)
    return replace(setting, epochs=max(setting.epochs, math.ceil(LEAST_STEPS / steps_per_epoch)))


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
        sets, setting = read_picture_sets(base, train_path, test_path), EncoderSetting(**options)
        training, untuned = sets.training, untuned_accuracy(sets)
        click.echo(f"untuned: {untuned:.2%} of {len(sets.testing):,} pictures")
        rows = {}
        for number in sorted({n for n in NUMBERS if n < len(training)} | {len(training)}):
            chosen = for_number(setting, number)
            click.echo(f"\n{number:,} pictures, {chosen.epochs} epochs: learning rates")
            rates = search_encoder_rates(sets, chosen, number)
            click.echo(f"\n{number:,} pictures, each at its best")
            by_seed = [
                compare_encoder_methods(replace(sets, training=subset(training, number, seed)), rates, chosen, [seed])
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
