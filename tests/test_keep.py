"""The options --keep best, --eval-every and --tensorboard."""

import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import before_step, run, tensors_and_metrics
from safetensors.torch import load_file

import train
from adapter import Adapter
from data import tokenize
from formats.bases import load_llama
from formats.chat_templates import load_template
from tasks import load_task
from training.run_files import read_metrics

BEST = ("--eval-every", 2, "--keep", "best")


def validation_losses(out):
    return {line["step"]: line["val_loss"] for line in read_metrics(out / "metrics.jsonl") if "val_loss" in line}


def loss_with_minimum(model, adapter, *rest, mean_loss=train.mean_loss):
    """Return the validation loss plus a term with its minimum at a mean absolute gate of 0.2."""
    return mean_loss(model, adapter, *rest) + 100 * abs(adapter.gates.abs().mean().item() - 0.2)


def stop_before(patch, step):
    patch.setattr(train, "train_step", before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))


@pytest.fixture
def best(args, tmp_path, monkeypatch):
    """Train 15 steps with a faked validation loss, so that the last adapter is not the best.

    Returns the best step, and a dict from steps to validation losses. With the true loss, the last step would be best.
    The loss stays faked for the rest of the test.
    """
    monkeypatch.setattr(train, "mean_loss", loss_with_minimum)
    result = run(*args, *BEST)
    assert result.exit_code == 0, result.output
    losses = validation_losses(tmp_path / "run")
    assert list(losses) == [0, 2, 4, 6, 8, 10, 12, 14, 15]  # every other step, and the last one
    step = min(losses, key=losses.get)
    assert 0 < step < 15
    return step, losses


def test_adapter_with_the_lowest_validation_loss_is_kept(args, best, tiny_base, instructions, tmp_path, monkeypatch):
    step, losses = best
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kept_step"], summary["val_loss_after"]) == (step, losses[step])
    assert summary["val_loss_before"] == losses[0]
    adapter = Adapter.load(out / "adapter.safetensors")
    assert adapter.metadata["steps"] == str(step) and adapter.metadata["val_loss_after"] == str(losses[step])
    # The kept adapter equals the last one of a run that is stopped at this step.
    with monkeypatch.context() as patch:
        stop_before(patch, step)
        assert run(*args, *BEST[:-1], "last", "--out", tmp_path / "stopped").exit_code == 0
    stopped = load_file(tmp_path / "stopped" / "adapter.safetensors")
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in load_file(out / "adapter.safetensors").items())
    # The kept adapter has the recorded loss.
    model, tokenizer = load_llama(tiny_base)
    template = load_template("alpaca", tokenizer)
    examples, _ = tokenize(template, load_task("instructions").read(instructions), 512)
    _, validation = train.hold_out(examples, 4, 0)
    assert loss_with_minimum(model, adapter, validation, train.TrainConfig()) == pytest.approx(losses[step], rel=1e-6)


def test_toy_evaluates_the_kept_adapter(tmp_path, monkeypatch):
    toy, gates = train.load_toy("text"), []

    def record_gates(model, tokenizer, adapter):
        gates.append(adapter.gates.detach().clone())
        return {"questions": 0.0}

    monkeypatch.setattr(
        train, "load_toy", lambda _: SimpleNamespace(examples=toy.examples, base=toy.base, evaluate=record_gates)
    )
    monkeypatch.setattr(train, "mean_loss", loss_with_minimum)
    options = ("--limit", 40, "--batch-size", 8, "--val-size", 4, "--epochs", 3)
    assert run(*options, *BEST, "--lr", 0.05, "--warmup-epochs", 0.5, "--out", tmp_path / "run").exit_code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["kept_step"] < 14
    assert torch.equal(gates[0], load_file(tmp_path / "run" / "adapter.safetensors")["gates"])


@pytest.mark.parametrize("at", [1, 6, 9, 14, 15])
def test_resuming_with_keep_best_is_exact(args, best, tmp_path, monkeypatch, at):
    resumed = (*args, *BEST, "--out", tmp_path / "resumed")
    with monkeypatch.context() as patch:
        stop_before(patch, at)
        assert run(*resumed).exit_code == 0
    result = run(*resumed[:-3], "last", *resumed[-2:], "--resume")
    assert result.exit_code == 2 and "was made with keep = best, not last" in result.stderr
    assert run(*resumed, "--resume").exit_code == 0
    assert tensors_and_metrics(tmp_path / "resumed") == tensors_and_metrics(tmp_path / "run")
    names = ("adapter.safetensors", "curves.png")
    assert all((tmp_path / "resumed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes() for name in names)


def test_checkpoint_with_an_invalid_best_adapter_is_refused(args, tmp_path, monkeypatch):
    stop_before(monkeypatch, 4)
    assert run(*args, *BEST).exit_code == 0
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path)
    for best, message in (
        ({"loss": 1.0, "step": 99, "tensors": checkpoint["adapter"]}, "the step of the best adapter is 99"),
        ({"loss": 1.0, "step": 2, "tensors": {}}, "Missing key(s) in state_dict"),
        ({"loss": 1.0, "step": 2}, "has no field 'tensors'"),
    ):
        torch.save(checkpoint | {"best": best}, path)
        result = run(*args, *BEST, "--resume")
        assert result.exit_code == 2 and "checkpoint.pt: is not a valid checkpoint: " in result.stderr
        assert message in result.stderr


def test_initial_adapter_is_kept_if_no_loss_is_lower(args, tmp_path, monkeypatch):
    """A later adapter is kept only if its loss is strictly lower."""
    monkeypatch.setattr(train, "mean_loss", lambda *_: 3.0)
    result = run(*args, "--keep", "best", "--epochs", 1)
    assert result.exit_code == 0 and "no step reached a lower validation loss" in result.stderr
    assert not load_file(tmp_path / "run" / "adapter.safetensors")["gates"].any()


def test_keep_best_needs_validation_examples(args, tmp_path):
    result = run(*args, "--keep", "best", "--val-size", 0)
    assert (
        result.exit_code == 2
        and "--keep best needs validation examples, but --val-size holds out none" in result.stderr
    )
    assert not list((tmp_path / "run").glob("*"))


def read_scalars(folder):
    """Return the values that TensorBoard shows: a dict that maps each name to a dict from steps to values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)} for name in accumulator.Tags()["scalars"]
    }


def read_events(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        yield from EventFileLoader(str(file)).Load()


def test_tensorboard_equals_metrics_jsonl(args, tmp_path, monkeypatch):
    """A run that lost the steps since its last checkpoint, and repeated them, is compared as well."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert run(*args, "--epochs", 1, "--tensorboard").exit_code == 0
    finished = read_scalars(out / "tensorboard")
    options = (*args, "--tensorboard", "--save-every", 4)
    with monkeypatch.context() as patch:
        stop_before(patch, 4)
        assert run(*options).exit_code == 0
    shutil.copy(out / "checkpoint.pt", tmp_path)
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        assert run(*options, "--resume").exit_code == 0
    shutil.copy(tmp_path / "checkpoint.pt", out)  # as if steps 5 to 7 had not been saved
    assert run(*options, "--resume").exit_code == 0
    expected = {}
    for line in read_metrics(out / "metrics.jsonl"):
        for name in line.keys() - {"step"}:
            expected.setdefault(name, {})[line["step"]] = pytest.approx(line[name], rel=1e-6)
    assert read_scalars(out / "tensorboard") == expected
    assert read_scalars(out / "run-1" / "tensorboard") == finished
    restarts = [event.step for event in read_events(out / "tensorboard") if event.HasField("session_log")]
    assert restarts == [5, 5]  # TensorBoard hides earlier values from these steps on


def test_missing_tensorboard_is_reported(args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run(*args, "--tensorboard")
    assert result.exit_code == 2 and "--tensorboard needs one more package: pip install tensorboard" in result.stderr
    assert not (tmp_path / "run").exists()
