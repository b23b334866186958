"""The experiments with ViT and RoBERTa: vit, roberta and few."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import HALF, make_vit, timm_state_dict
from torch.nn.functional import cross_entropy

from encoder_tuning.labeled import Labeled
from encoder_tuning.objective import class_loss
from encoders.models import make_mlp
from encoders.models import Roberta, RobertaConfig, ViTConfig
from experiments import encoders, few_examples
from experiments.__main__ import main
from experiments.methods import NoPrompts, Trainable, finite_steps
from experiments.runs import Runs
from formats.encoders import load_encoder, save_encoder
from formats.roberta_tokenizer import RobertaTokenizer
from train import TrainConfig, mean_loss


@pytest.mark.parametrize("method", encoders.METHODS)
def test_every_method_trains_its_own_parameters_only(tmp_path, method):
    """The loss falls, and of the encoder's weights, only those that the method trains change."""
    config = ViTConfig(16, 8, 64, 2, 1, 64, 1e-6, "gelu", clip=False, mean=HALF, std=HALF)
    torch.save(timm_state_dict(make_vit(config), make_mlp([64, 3], "tanh")), tmp_path / "vit.pth")
    sets = encoders.LabeledSets(tmp_path / "vit.pth", [], [], num_classes=3, batch_size=4, length=2, rank=1)
    trainable = encoders.set_up_encoder(method, sets, seed=0)
    model, adapter = trainable.model, trainable.adapter
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    examples = [Labeled(image, (i % 3,), str(i), 5) for i, image in enumerate(images)]
    config = TrainConfig(epochs=8, warmup_epochs=1, batch_size=4, lr=0.01)
    before = mean_loss(model, adapter, examples, config, class_loss)
    assert len(list(finite_steps(trainable, examples, config))) == 8 * 3
    assert mean_loss(model, adapter, examples, config, class_loss) < before - 0.05
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, frozen[name])}
    assert changed == {
        "head only": set(), "prompts and gates": set(), "no gates": set(), "full tuning": set(frozen),
        "LoRA": {name for name in frozen if "lora_" in name},
    }[method]  # fmt: skip
    if method == "no gates":
        assert adapter.gates.abs().max() == 0


class Recorder:
    """Replacement for training and evaluation. Records their examples and the TrainConfigs; accuracies are 0.5."""

    def __init__(self, monkeypatch):
        self.trained, self.scored = [], []
        monkeypatch.setattr(encoders, "finite_steps", self.steps)
        monkeypatch.setattr(encoders, "encoder_accuracy", self.accuracy)

    def steps(self, trainable, examples, config):
        self.trained.append((examples, config))
        return iter(())

    def accuracy(self, model, adapter, examples):
        self.scored.append(examples)
        return 0.5


def test_rate_search_draws_a_random_tenth(monkeypatch, tmp_path):
    """The data are sorted by class, but the held-out tenth has both classes. It is the same for all runs."""
    examples = [Labeled(torch.zeros(3), (i // 50,), str(i), 3) for i in range(100)]
    recorder = Recorder(monkeypatch)
    trainable = Trainable(None, NoPrompts([]), None)
    monkeypatch.setattr(encoders, "set_up_encoder", lambda method, sets, seed: trainable)
    sets = encoders.LabeledSets(tmp_path, examples, [], 2, batch_size=4, length=1, rank=1)
    for _ in range(2):
        encoders.search_encoder_rates(Runs("search", tmp_path / "out", 3, {}), sets, 2)
    held_out = [example.name for example in recorder.scored[0]]
    assert len(held_out) == 10 and {example.labels for example in recorder.scored[0]} == {(0,), (1,)}
    training = [example.name for example in recorder.trained[0][0]]
    assert {example.labels for example in recorder.trained[0][0]} == {(0,), (1,)}
    assert sorted(held_out + training) == sorted(example.name for example in examples)
    assert len(recorder.scored) == 2 * len(encoders.METHODS) * len(encoders.TRIED_RATES)
    assert all([example.name for example in scored] == held_out for scored in recorder.scored)
    with pytest.raises(ValueError, match="--train: has 9 examples; the search needs at least 10"):
        encoders.search_encoder_rates(Runs("search", tmp_path, 3, {}), replace(sets, training=examples[:9]), 2)


def test_small_roberta_learns_masked_tokens(bpe, tmp_path, monkeypatch):
    """The loss falls, and our loader and transformers read the saved files."""
    monkeypatch.setattr(encoders, "MASK", 265)
    monkeypatch.setitem(encoders.SCHEDULE, "warmup", 5)
    tokenizer = RobertaTokenizer(bpe)
    rows = encoders.token_rows(["the km the 12 km of the river " * 80], tokenizer)
    assert rows.shape[1] == 64 and (rows[:, 0] == 0).all() and (rows[:, -1] == 2).all()
    config = RobertaConfig(266, 70, 32, 2, 4, 48)
    losses = []
    monkeypatch.setattr(encoders.F, "cross_entropy", lambda *a: losses.append(cross_entropy(*a)) or losses[-1])
    model = encoders.pretrain_roberta(rows, steps=80, config=config)
    assert losses[-1].item() < losses[0].item() - 1.5
    save_encoder(model, tmp_path / "small")
    loaded, head = load_encoder(tmp_path / "small")
    ids = rows[:2, :9]
    assert head is None and loaded.config == config and torch.equal(loaded.encode(ids), model.encode(ids))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaModel.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(theirs(ids).last_hidden_state, model.encode(ids), rtol=1e-4, atol=1e-4)


def test_vit_experiment_writes_its_results(tmp_path, data):
    """The command trains on 200 real digits, and evaluates on 100 others."""
    usps = np.load(data / "vision" / "usps" / "usps_int16_x2000.npz")
    for name, number in (("train", 200), ("test", 100)):
        images = (
            np.clip(usps[f"{name}_x2000"][:number].reshape(-1, 16, 16) / 2000 * 255, 0, 255).round().astype(np.uint8)
        )
        np.savez(tmp_path / f"{name}.npz", images=images, labels=usps[f"{name}_y"][:number])
    args = ["vit", "--base", data / "vision" / "vit_mnist_ckpt" / "vit_mnist.pth", "--seeds", 1, "--epochs", 2]
    args += ["--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "out" / "vit.json").read_text())
    assert 0.5 < values["untrained"] < 0.9 and set(values["rows"]) == set(encoders.METHODS)


def test_roberta_experiment_writes_its_results_and_reuses_its_base(bpe, tmp_path, monkeypatch):
    """The RoBERTa is pretrained once per text: a second run on the same text takes it from the cache."""
    pretrained = []

    def pretrain_roberta(rows):
        pretrained.append(rows)
        torch.manual_seed(0)
        return Roberta(RobertaConfig(266, 130, 32, 2, 4, 48))

    monkeypatch.setattr("experiments.cached.CACHE", tmp_path / "cache")
    monkeypatch.setattr(encoders, "pretrain_roberta", pretrain_roberta)
    (tmp_path / "text.txt").write_text("the km the 12 km of the river " * 80)
    lines = [
        "sentence\tlabel",
        *(f"the {word} {i}\t{label}" for i in range(10) for label, word in enumerate(("km", "river"))),
    ]
    (tmp_path / "lines.tsv").write_text("\n".join(lines))
    args = ["roberta", "--text", tmp_path / "text.txt", "--tokenizer", bpe, "--seeds", 1, "--out", tmp_path / "out"]
    args += ["--train", tmp_path / "lines.tsv", "--test", tmp_path / "lines.tsv"]
    for more in ([], ["--search"]):
        result = CliRunner().invoke(main, list(map(str, [*args, *more])))
        assert result.exit_code == 0, result.output
        assert "20 training sentences, 20 test sentences" in result.output
    values = json.loads((tmp_path / "out" / "roberta.json").read_text())
    assert values["majority"] == 0.5 and set(values["rows"]) == set(encoders.METHODS)
    options = {name: values["options"][name] for name in ("epochs", "batch_size", "length", "rank")}
    assert options == {"epochs": "2", "batch_size": "64", "length": "10", "rank": "3"}
    assert values["rows"]["head only"]["trained"] == [2 * (32 + 1)]
    assert result.output.count("full tuning") == len(encoders.TRIED_RATES)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert len(pretrained) == 1 and (folder / "vocab.json").read_bytes() == (bpe / "vocab.json").read_bytes()
    (tmp_path / "text.txt").write_text("the river of the km " * 80)
    encoders.make_roberta([tmp_path / "text.txt"], bpe)
    assert len(pretrained) == 2


def test_few_examples_experiment_searches_rates_for_each_number(tmp_path, data, monkeypatch):
    """Each number of examples has its own rates, epochs and samples. Rates are compared on held-out examples."""
    usps = np.load(data / "vision" / "usps" / "usps_int16_x2000.npz")
    for name, number in (("train", 60), ("test", 40)):
        images = np.clip(usps[f"{name}_x2000"][:number].reshape(-1, 16, 16) / 2000 * 255, 0, 255).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=usps[f"{name}_y"][:number])
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(few_examples, "NUMBERS", (8, 500))
    monkeypatch.setattr(few_examples, "MIN_STEPS", 4)
    monkeypatch.setattr(encoders, "TRIED_RATES", (0.001, 0.01))
    for module in (encoders, few_examples):
        monkeypatch.setattr(module, "METHODS", ("LoRA",))
    args = ["few", "--base", data / "vision" / "vit_mnist_ckpt" / "vit_mnist.pth", "--seeds", 2, "--epochs", 2]
    args += ["--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, [*args, "--batch-size", 16])))
    assert result.exit_code == 0, result.output
    numbers = [(len(examples), config.epochs, config.lr, config.seed) for examples, config in recorder.trained]
    assert numbers == [
        (8, 4, 0.001, 0), (8, 4, 0.01, 0), (8, 4, 0.001, 0), (8, 4, 0.001, 1),
        (54, 2, 0.001, 0), (54, 2, 0.01, 0), (60, 2, 0.001, 0), (60, 2, 0.001, 1),
    ]  # fmt: skip
    assert list(map(len, recorder.scored[1:])) == [6, 6, 40, 40] * 2  # scored[0] is the model before training
    names = [{example.name for example in examples} for examples, _ in recorder.trained]
    for tried in (0, 1, 4, 5):
        assert not names[tried] & {example.name for example in recorder.scored[1 + tried]}
    assert names[2] != names[3] and names[6] == names[7]
    rows = json.loads((tmp_path / "out" / "few.json").read_text())["by_number"]
    assert set(rows) == {"8", "60"} and all(row["LoRA"]["accuracy"] == [0.5, 0.5] for row in rows.values())
