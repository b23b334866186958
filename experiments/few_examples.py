"""Train a vision transformer on 100, 300, 1,000 and all examples (Table 6 of the paper has 1,000).

For each number of examples, every method uses its best learning rate.
"""

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
    IMAGES,
    encoder_options,
    read_image_sets,
    search_encoder_rates,
    train_and_score,
    base_accuracy,
)
from experiments.runs import Runs, experiment

NUMBERS = (100, 300, 1000)  # numbers of training examples; the whole training set is used as well
MIN_STEPS = 200  # minimum number of optimizer steps; a small training set gets more epochs to reach it


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


@experiment("few", *encoder_options(VIT, data_help=IMAGES, epochs=5))
def few(runs: Runs, base, train_path, test_path, epochs, **options) -> None:
    """Train a vision transformer on few images.

    The training sets contain 100, 300, 1,000 and all images. Small sets get more epochs, for at least 200 steps. On
    each set, every method uses the best of six learning rates.
    """
    sets = read_image_sets(base, train_path, test_path, **options)
    untrained = base_accuracy(sets)
    click.echo(f"accuracy before training: {untrained:.2%} of {len(sets.testing):,} test images")
    rows = {}
    for number in sorted({n for n in NUMBERS if n < len(sets.training)} | {len(sets.training)}):
        num_epochs = max(epochs, math.ceil(MIN_STEPS / math.ceil(number / sets.batch_size)))
        click.echo(f"\n{number:,} training images, {num_epochs} epochs: searching for the best learning rates")
        rates = search_encoder_rates(runs, sets, num_epochs, number)
        click.echo(f"\n{number:,} training images, {num_epochs} epochs: training each method at its best learning rate")
        settings = {method: EncoderRun(method, lr, num_epochs, number) for method, lr in rates.items()}
        rows[number] = runs.table(COLUMNS, settings, partial(train_and_score, sets))
    print_by_number(rows)
    runs.save("few", {"untrained": untrained, "by_number": rows}, draw_by_number(rows, untrained))


def print_by_number(rows: dict[int, dict[str, dict]]) -> None:
    click.echo(f"\n{'':20}" + "".join(f"{number:>18,}" for number in rows))
    for method in METHODS:
        cells = [f"{statistics.mean(row[method]['accuracy']):.2%} at {row[method]['lr'][0]:g}" for row in rows.values()]
        click.echo(f"{method:20}" + "".join(f"{cell:>18}" for cell in cells))
