"""Weights of the base in 8 bits."""

import json

import pytest
import torch
from helpers import make_adapter, make_example, make_model, make_tokens, run

from model import Config
from runtime.quantization import quantize_int8
from train import TrainConfig, make_optimizer, train_step


def test_8_bits_train():
    pytest.importorskip("torchao")
    model, rounded = (make_model(Config(64, 3, 4, 4, 16, 96, 50)) for _ in range(2))
    quantize_int8(rounded.layers)
    examples = [make_example(make_tokens(model, n).tolist(), 4, f"row {n}") for n in (9, 6, 21)]
    losses, gradients = [], []
    for base in (model, rounded):
        adapter, config = make_adapter(model), TrainConfig(checkpoint_activations=True)
        losses.append(train_step(base, adapter, make_optimizer(adapter, 0.02), examples, 1e-3, config))
        gradients.append(adapter.prompts.grad.flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_run_over_8_bits(args, tmp_path):
    """From the command line; the fingerprint is that of the weights before they are rounded."""
    pytest.importorskip("torchao")
    results = [run(*args, "--out", tmp_path / name, *more) for name, more in (("wide", []), ("int8", ["--int8"]))]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    wide, rounded = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("wide", "int8"))
    assert wide["options"] == rounded["options"] | {"int8": False}
    assert rounded["val_loss_after"] == pytest.approx(wide["val_loss_after"], rel=0.1)
    assert rounded["val_loss_after"] != wide["val_loss_after"]
