"""Tables of many runs, and pictures of them: printed as they come, and written to files."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import click
from cloup import option
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.measures import run_setting
from experiments.methods import Setting
from experiments.testbed import Testbed
from runtime.cli import PATH
from runtime.files import atomic_write, write_json

RESULTS = Path(__file__).parent / "results"
out_option = option("--out", type=PATH, default=RESULTS, show_default="experiments/results", help="Folder for results.")


def compare_settings(testbed: Testbed, settings: dict[str, Setting], seeds: int) -> dict[str, dict[str, list]]:
    """Every setting with every seed, a line printed for each; returns lists of `run_setting`'s values, seed by seed."""
    click.echo(f"{'':36}{'trained':>12}{'exact':>9}{'±':>7}{'loss held out':>15}{'last epoch':>12}{'seconds':>9}")
    rows = {}
    for label, setting in settings.items():
        runs = [run_setting(testbed, setting, seed) for seed in range(seeds)]
        rows[label] = {name: [one[name] for one in runs] for name in runs[0]} | {"setting": setting._asdict()}
        exact, held_out, last, seconds = (
            statistics.mean(rows[label][name]) for name in ("accuracy", "val_loss", "train_loss", "seconds")
        )
        click.echo(
            f"{label:36}{runs[0]['trained']:>12,}{exact:>9.1%}{spread(rows[label]['accuracy']):>7.1%}"
            f"{held_out:>15.4f}{last:>12.4f}{seconds:>9.1f}"
        )
    return rows


def spread(values: Sequence[float]) -> float:
    """Their standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rounded(value: object) -> object:
    """A value with its numbers to six digits; None (null in JSON) where a run came to no finite one."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def without_losses(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows as they are written: without the loss of every step, but with mean and standard deviation."""
    written = {label: {name: value for name, value in row.items() if name != "losses"} for label, row in rows.items()}
    for row in written.values():
        row |= {"mean": statistics.mean(row["accuracy"]), "standard_deviation": spread(row["accuracy"])}
    return written


def save_results(out: Path, name: str, values: dict, figure: Figure | None = None) -> None:
    """NAME.json and NAME.png in the folder; what is known from the paper is printed as well."""
    for what, published in values.get("paper", {}).items():
        click.echo(f"the paper, {what}: " + ", ".join(f"{key}: {number}" for key, number in published.items()))
    out.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100)
    write_json(out / f"{name}.json", rounded(values), allow_nan=False)
    click.echo(f"wrote {name}.json{'' if figure is None else f' and {name}.png'} to {out}\n")


# ---------------------------------------------------------------------------------------------------
# Pictures


def draw_bars(axes: Axes, values: dict[str, Sequence[float]], xlabel: str) -> None:
    """A bar for the mean of each list, a dot for each of its values."""
    labels = list(values)
    axes.barh(labels, [statistics.mean(row) for row in values.values()], color="#9ecae1")
    for i, row in enumerate(values.values()):
        axes.plot(row, [i] * len(row), "o", color="#08519c", markersize=4)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    axes.set_xlabel(xlabel)


def draw_line(axes: Axes, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str | None = None) -> None:
    """Means over seeds, joined, and a dot for each seed."""
    (line,) = axes.plot(xs, [statistics.mean(row) for row in rows], label=label)
    for x, row in zip(xs, rows):
        axes.plot([x] * len(row), row, "o", color=line.get_color(), markersize=4)


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
