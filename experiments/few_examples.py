"""A vision transformer trained on few examples and on many (Table 6 of the final version has 1,000), each method at the
best of its learning rates for that many."""

import math
import statistics
from functools import partial

import click
from matplotlib.figure import Figure

from experiments.drawing import draw_line, percent
from experiments.encoders import (
    COLUMNS,
    METHODS,
    VIT,
    EncoderRun,
    encoder_options,
    read_picture_sets,
    search_encoder_rates,
    train_and_score,
    base_accuracy,
)
from experiments.runs import Runs, experiment

NUMBERS = (100, 300, 1000)  # and all
LEAST_STEPS = 200  # where examples are few there are more epochs


def draw_by_number(rows: dict[int, dict[str, dict]], untrained: float) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        draw_line(axes, list(rows), [percent(row[method]["accuracy"]) for row in rows.values()], method)
    axes.axhline(100 * untrained, color="black", linewidth=1)
    axes.set(xlabel="examples", xscale="log", ylabel="accuracy, %")
    axes.set_xticks(list(rows), [f"{number:,}" for number in rows], minor=False)
    axes.legend()
    return figure


@experiment("few", *encoder_options(VIT, epochs=5))
def few(runs: Runs, base, train_path, test_path, epochs, **options) -> None:
    """Train over a vision transformer on few pictures.

    On 100, 300, 1,000 and all, every method at its best of six learning rates.
    """
    sets = read_picture_sets(base, train_path, test_path, **options)
    untrained = base_accuracy(sets)
    click.echo(f"untrained: {untrained:.2%} of {len(sets.testing):,} pictures")
    rows = {}
    for number in sorted({n for n in NUMBERS if n < len(sets.training)} | {len(sets.training)}):
        enough = max(epochs, math.ceil(LEAST_STEPS / math.ceil(number / sets.batch_size)))
        click.echo(f"\n{number:,} pictures, {enough} epochs: learning rates")
        rates = search_encoder_rates(runs, sets, enough, number)
        click.echo(f"\n{number:,} pictures, each at its best")
        settings = {method: EncoderRun(method, lr, enough, number) for method, lr in rates.items()}
        rows[number] = runs.table(COLUMNS, settings, partial(train_and_score, sets))
    print_by_number(rows)
    runs.save("few", {"untrained": untrained, "by_number": rows}, draw_by_number(rows, untrained))


def print_by_number(rows: dict[int, dict[str, dict]]) -> None:
    click.echo(f"\n{'':20}" + "".join(f"{number:>18,}" for number in rows))
    for method in METHODS:
        cells = [f"{statistics.mean(row[method]['accuracy']):.2%} at {row[method]['lr'][0]:g}" for row in rows.values()]
        click.echo(f"{method:20}" + "".join(f"{cell:>18}" for cell in cells))
