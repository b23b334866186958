"""Plots of a training run: its losses, and the value of each gate."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from adapter import Adapter
from runtime.files import atomic_write


def draw_curves(metrics: list[dict], adapter: Adapter, path: Path) -> None:
    """Plot the losses, and the gates as an image of layers by heads, and write the plots to a PNG file."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, style in (("loss", "training", {"linewidth": 1}), ("val_loss", "validation", {"marker": "o"})):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            left.plot(*zip(*points), label=label, **style)
    left.set(xlabel="step", ylabel="loss per target, nats", title="Loss")
    left.set_ylim(bottom=0)
    left.legend()
    draw_gates(right, adapter)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_gates(axes: Axes, adapter: Adapter) -> None:
    """Plot the gates of an adapter as an image of layers by heads, in which 0 is white."""
    gates = adapter.gate_values().detach().cpu()  # (L, H)
    first_layer = int(adapter.metadata.get("base_layers", len(gates))) - len(gates)
    image = paint_gates(axes, gates.numpy(), first_layer, max(gates.abs().max().item(), 1e-6))
    axes.set(title="Gate values")
    axes.figure.colorbar(image, ax=axes)


def paint_gates(axes: Axes, gates: np.ndarray, first_layer: int, bound: float) -> AxesImage:
    """Plot gates (L, H) as an image whose colors range from -bound to bound. `first_layer` is the layer of row 0."""
    edges = (-0.5, gates.shape[1] - 0.5, first_layer - 0.5, first_layer + len(gates) - 0.5)
    image = axes.imshow(gates, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower", extent=edges)
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image
