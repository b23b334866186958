"""The comparisons for encoders."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import HALF, make_vit, timm_names
from torch.nn.functional import cross_entropy

from encoder_tuning.heads import Labelled, Labels, RobertaTokenizer
from encoders.models import RobertaConfig, ViTConfig, make_head
from experiments import encoders as encoder_experiments
from experiments.comparison import fit
from formats.encoders import load_encoder, save_roberta
from training.step import mean_loss


@pytest.mark.parametrize("method", encoder_experiments.METHODS)
def test_every_method_learns(tmp_path, method):
    """And trains what it says, and nothing else."""
    config = ViTConfig(16, 8, 64, 2, 1, 64, 1e-6, "gelu", clip=False, mean=HALF, std=HALF)
    torch.save(timm_names(make_vit(config), make_head([64, 3], "tanh")), tmp_path / "vit.pth")
    model, adapter, optimizer = encoder_experiments.prepare(method, tmp_path / "vit.pth", 0, 3, length=2, rank=1)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    examples = [Labelled(image, (i % 3,), str(i), 5) for i, image in enumerate(images)]
    before = mean_loss(model, adapter, examples, 1000, Labels(False))
    how = {"epochs": 8, "warmup_epochs": 1, "batch_size": 4, "lr": 0.01, "seed": 0}
    fit(model, adapter, optimizer, examples, Labels(False), **how)
    assert mean_loss(model, adapter, examples, 1000, Labels(False)) < before - 0.05
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, frozen[name])}
    assert changed == {
        "head only": set(), "prompts and gates": set(), "no gates": set(), "full tuning": set(frozen),
        "LoRA": {name for name in frozen if name.endswith((".a", ".b"))},
    }[method]  # fmt: skip
    if method == "no gates":
        assert adapter.gates.abs().max() == 0


def test_a_small_roberta_learns_words_that_are_hidden(bpe, tmp_path, monkeypatch):
    """And is read again by our loader and by transformers."""
    monkeypatch.setattr(encoder_experiments, "MASK", 265)
    monkeypatch.setattr(encoder_experiments, "WARMUP", 5)
    tokenizer = RobertaTokenizer(bpe)
    rows = encoder_experiments.masked_rows(["the km the 12 km of the river " * 80], tokenizer)
    assert rows.shape[1] == 64 and (rows[:, 0] == 0).all() and (rows[:, -1] == 2).all()
    config = RobertaConfig(266, 70, 32, 2, 4, 48)
    losses = []
    monkeypatch.setattr(
        encoder_experiments.F, "cross_entropy", lambda *a: losses.append(cross_entropy(*a)) or losses[-1]
    )
    model = encoder_experiments.pretrain(rows, steps=80, config=config)
    assert losses[-1].item() < losses[0].item() - 1.5
    save_roberta(model, tmp_path / "small")
    loaded, head = load_encoder(tmp_path / "small")
    ids = rows[:2, :9]
    assert head is None and loaded.config == config and torch.equal(loaded.encode(ids), model.encode(ids))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaModel.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(theirs(ids).last_hidden_state, model.encode(ids), rtol=1e-4, atol=1e-4)


def test_the_vit_experiment(tmp_path, data):
    """On a few real digits, from the command line to its file."""
    usps = np.load(data / "vision" / "usps" / "usps_int16_x2000.npz")
    for name, number in (("train", 200), ("test", 100)):
        images = (
            np.clip(usps[f"{name}_x2000"][:number].reshape(-1, 16, 16) / 2000 * 255, 0, 255).round().astype(np.uint8)
        )
        np.savez(tmp_path / f"{name}.npz", images=images, labels=usps[f"{name}_y"][:number])
    args = ["vit", "--base", data / "vision" / "vit_mnist_ckpt" / "vit_mnist.pth", "--seeds", 1, "--epochs", 2]
    args += ["--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz", "--out", tmp_path / "out"]
    result = CliRunner().invoke(encoder_experiments.main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "out" / "vit.json").read_text())
    assert 0.5 < values["untuned"] < 0.9 and set(values["methods"]) == set(encoder_experiments.METHODS)
