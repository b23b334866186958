"""Bar and line plots for the experiments."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes


def draw_bars(axes: Axes, values: dict[str, Sequence[float]], xlabel: str) -> None:
    """Draw one bar per list of values: the bar shows their mean, and a dot shows each value."""
    labels = list(values)
    axes.barh(labels, [statistics.mean(row) for row in values.values()], color="#9ecae1")
    for i, row in enumerate(values.values()):
        axes.plot(row, [i] * len(row), "o", color="#08519c", markersize=4)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first bar on top
    axes.set_xlabel(xlabel)


def draw_line(axes: Axes, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str | None = None) -> None:
    """Draw a line through the mean of each row, and a dot for each value. A row contains one value per seed."""
    (line,) = axes.plot(xs, [statistics.mean(row) for row in rows], label=label)
    for x, row in zip(xs, rows):
        axes.plot([x] * len(row), row, "o", color=line.get_color(), markersize=4)


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
