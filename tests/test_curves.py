"""Plots of a training run."""

import pytest
import torch
from helpers import make_adapter, make_model

from training.curves import draw_curves


@pytest.mark.filterwarnings("ignore:No artists")
def test_curves_show_the_losses_and_the_gates(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    plotted = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: plotted.append((list(x), list(y))))
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, image, **more: plotted.append(image) or imshow(self, image, **more)
    )
    adapter = make_adapter(make_model())
    lines = [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    draw_curves(lines, adapter, tmp_path / "curves.png")
    training, validation, gates = plotted
    assert training == ([1, 2], [2.5, 2.0]) and validation == ([0], [3.0])
    assert torch.equal(torch.as_tensor(gates), adapter.gates.tanh())
