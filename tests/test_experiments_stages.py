"""python -m experiments stages: training on captions, then on questions."""

import json

import pytest
import torch
from click.testing import CliRunner

from experiments import stages
from experiments.__main__ import main


@pytest.fixture
def small_toy(small_digits, tiny_base, monkeypatch):
    """Replace the toy's base with a tiny one; `small_digits` reduces the number of held-out images to 30."""
    monkeypatch.setattr("experiments.stages.toy_base", lambda: tiny_base)


def run_stages(tmp_path, *args):
    """Run the command; return its standard output, and the values in stages.json."""
    args = ["stages", "--pictures", 4, "--epochs", 2, "--device", "cpu", "--out", tmp_path, *args]
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads((tmp_path / "stages.json").read_text())


def test_each_stage_trains_on_its_own_data(small_toy, tmp_path, monkeypatch):
    """Training in one stage and in two uses the same captions and questions; the first run has only the questions.

    The last run freezes the projection in its second stage.
    """
    adapters = []

    def evaluate(model, tokenizer, adapter):
        adapters.append({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
        return {f"picture_accuracy_{name}": len(adapters) / 10 for name in ("image", "no_image", "another_image")}

    steps, stages_run = stages.finite_steps, []

    def recorded(trainable, examples, config):
        stages_run.append((len(examples), sum(parameter.requires_grad for parameter in trainable.adapter.parameters())))
        return steps(trainable, examples, config)

    monkeypatch.setattr(stages, "evaluate_digits", evaluate)
    monkeypatch.setattr(stages, "finite_steps", recorded)
    stdout, found = run_stages(tmp_path, "--seeds", 1)
    assert "20 captions, 12 questions about 4 images" in stdout
    assert stages_run == [(12, 6), (32, 6), (20, 6), (12, 6), (20, 6), (12, 2)]  # the projection has four tensors
    assert [row["accuracy"] for row in found["rows"].values()] == [[0.1], [0.2], [0.3], [0.4]]
    monkeypatch.setattr(stages, "STAGES", {"captions alone": [(("captions",), ())]})
    run_stages(tmp_path, "--seeds", 1)
    (_, _, together, frozen, captions) = adapters
    assert torch.equal(frozen["projection.0.weight"], captions["projection.0.weight"])
    assert not torch.equal(frozen["prompts"], captions["prompts"])
    assert not torch.equal(together["projection.0.weight"], captions["projection.0.weight"])


def test_stages_command_writes_its_results(small_toy, tmp_path, monkeypatch):
    monkeypatch.setattr("toy.exam.greedy_answers", lambda model, tokenizer, adapter, requests: ["?"] * len(requests))
    stdout, found = run_stages(tmp_path, "--seeds", 2)
    assert stdout.count("0.0%") >= 4 and (tmp_path / "stages.png").stat().st_size > 1000
    assert all(len(row["accuracy"]) == 2 for row in found["rows"].values())
