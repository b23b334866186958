"""Gradients, schedule, the run's files, resuming, and what happens to bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, make_adapter, make_model
from safetensors.torch import load_file

from adapter import Adapter
from data import Tokens
from model import load_llama
from train import accumulate_gradient, learning_rate, main, make_optimizer, mean_loss, read_metrics


def make_examples(vocab_size, lengths=((3, 9), (7, 8), (2, 30), (12, 17), (5, 6)), seed=0):
    random = torch.Generator().manual_seed(seed)
    examples = []
    for record, (prompt_length, length) in enumerate(lengths):
        ids = torch.randint(vocab_size, (length,), generator=random).tolist()
        examples.append(Tokens(ids, prompt_length, record))
    return examples


def naive_loss(model, adapter, examples):
    """Mean over all response tokens, one example and one position at a time."""
    losses = []
    for ids, prompt_length, _ in examples:
        log_probabilities = model(torch.tensor([ids]), adapter())[0].log_softmax(-1)
        losses += [-log_probabilities[t - 1, ids[t]] for t in range(prompt_length, len(ids))]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_accumulated_gradient_is_that_of_the_whole_batch(max_tokens):
    """Parts of unequal numbers of response tokens must weigh by their tokens, not each the same."""
    model = make_model()
    examples = make_examples(model.config.vocab_size)
    whole, parts = make_adapter(model), make_adapter(model)
    loss = naive_loss(model, whole, examples)
    loss.backward()
    assert accumulate_gradient(model, parts, examples, max_tokens) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parts.prompts.grad, whole.prompts.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.gates.grad, whole.gates.grad, rtol=1e-4, atol=1e-6)
    assert mean_loss(model, parts, examples, max_tokens) == pytest.approx(loss.item(), rel=1e-5)


def test_schedule_reaches_its_rate_and_ends_near_zero():
    """litgpt 132: warm-up that counts the wrong steps never reaches the rate."""
    rates = [learning_rate(step, peak=2.0, warmup=4, total=12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])
    assert rates[4] == max(rates) == 2.0 and rates[-1] < 0.1
    assert learning_rate(0, peak=1.0, warmup=0, total=1) == 1.0
    assert learning_rate(4, peak=1.0, warmup=10, total=5) == 0.5  # a warm-up longer than the run


def test_gates_are_not_decayed():
    adapter = make_adapter(make_model())
    optimizer = make_optimizer(adapter, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(adapter.gates, before["gates"])
    torch.testing.assert_close(adapter.prompts, before["prompts"] * (1 - 0.1 * 0.5))


# ---------------------------------------------------------------------------------------------------
# The command


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Forty instructions of unequal length."""
    records = [
        {
            "instruction": f"Name the number {i}.",
            "input": "of animals" * (i % 3),
            "output": "cat " * (1 + i % 7) + str(i),
        }
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "forty.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def args(tiny_base, instructions, tmp_path):
    """5 steps an epoch, 3 epochs."""
    return [
        "--base", tiny_base, "--data", instructions, "--out", tmp_path / "run", "--epochs", 3, "--batch-size", 8,
        "--val-size", 4, "--length", 3, "--lr", 0.05, "--warmup-epochs", 0.5, "--device", "cpu",
    ]  # fmt: skip


def test_a_run_leaves_its_files(args, tiny_base, tmp_path):
    weights = (tiny_base / "consolidated.00.pth").read_bytes()
    result = run(*args)
    assert result.exit_code == 0, result.output
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} == {"adapter.safetensors", "metrics.jsonl", "summary.json", "curves.png"}
    assert (tiny_base / "consolidated.00.pth").read_bytes() == weights

    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert [line["epoch"] for line in steps] == [0] * 5 + [1] * 5 + [2] * 5
    assert {"step", "epoch", "loss", "lr", "tokens_per_second", "gate_mean_abs"} == set(steps[0])
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 15]
    assert max(line["lr"] for line in steps) == pytest.approx(0.05, rel=0.02)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainable_parameters"] == 1 * 3 * 16 + 1 * 2  # L = N - 2 = 1
    assert summary["adapter_bytes"] == (out / "adapter.safetensors").stat().st_size
    assert summary["examples"] == 36 and summary["dropped"] == 0
    assert summary["val_loss_before"] == evaluations[0]["val_loss"]
    assert summary["val_loss_after"] == evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert summary["peak_memory_bytes"] > 10**7 and summary["tokens"] > 36 * 3 * 20
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    adapter = Adapter.load(out / "adapter.safetensors")
    assert adapter.gates.abs().min() > 0
    known = {"base": str(tiny_base), "base_layers": "3", "data": "forty.json", "examples": "36", "steps": "15"}
    assert known.items() <= adapter.metadata.items()
    assert float(adapter.metadata["val_loss_after"]) == summary["val_loss_after"]


def test_a_run_on_a_gpu_in_bfloat16(args, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    position = args.index("--device")
    result = run(*args[:position], *args[position + 2 :])
    assert result.exit_code == 0, result.output
    assert "on cuda in torch.bfloat16" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert 0 < summary["peak_memory_bytes"] < 10**9


def test_what_is_reported_is_what_the_adapter_does(args, tmp_path, tiny_base):
    """The saved adapter on the base gives the reported validation loss; strength 0 gives the loss before."""
    import train
    from data import read_examples

    run(*args)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model, tokenizer = load_llama(tiny_base)
    adapter = Adapter.load(tmp_path / "run" / "adapter.safetensors")
    options = dict(max_seq_len=512, val_size=4, seed=0)
    _, held_out, _ = train.prepare(tokenizer, read_examples(args[3]), options)
    assert mean_loss(model, adapter, held_out, 10_000) == pytest.approx(summary["val_loss_after"], rel=1e-5)
    torch.nn.init.zeros_(adapter.gates)
    assert mean_loss(model, adapter, held_out, 10_000) == pytest.approx(summary["val_loss_before"], rel=1e-5)


def test_base_is_untouched_and_only_the_adapter_trains(tiny_base):
    from train import train as run_training

    model, tokenizer = load_llama(tiny_base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = make_adapter(model, layers=1, gates=False)
    examples = make_examples(model.config.vocab_size)
    options = dict(
        batch_size=2,
        epochs=3,
        warmup_epochs=1,
        weight_decay=0.02,
        seed=0,
        lr=0.1,
        micro_batch_tokens=50,
        log_every=1,
        save_every=99,
    )
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as out:
        run_training(model, adapter, examples, [], Path(out), options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert adapter.gates.abs().min() > 0


def test_same_seed_same_adapter(args, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*args, "--out", tmp_path / name, "--seed", seed).exit_code == 0
        files.append(load_file(tmp_path / name / "adapter.safetensors")["prompts"])
    assert torch.equal(files[0], files[1]) and not torch.equal(files[0], files[2])


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_resumed_run_equals_an_uninterrupted_one(args, tmp_path, monkeypatch, stop_at):
    """Data order must not repeat after a resume (nanoGPT 467), the optimizer's state be there (litgpt 1354)."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    import train

    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: the step is finished, then all is saved
        return accumulate_gradient(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradient", interrupted)
        result = run(*args)
    assert result.exit_code == 130
    assert f"step {stop_at} of 15" in result.stderr and "--resume" in result.stderr
    assert "Traceback" not in result.output
    Adapter.load(tmp_path / "run" / "adapter.safetensors")

    again = run(*args)
    assert again.exit_code == 2 and "unfinished run" in again.stderr
    assert run(*args, "--resume").exit_code == 0
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = []
    for name in ("whole", "run"):
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        metrics.append([{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines])
    assert metrics[0] == metrics[1]


def test_a_resumed_run_cannot_change_its_options(args, tmp_path, monkeypatch):
    import train

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return accumulate_gradient(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradient", interrupted)
        run(*args)
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = run(*args, "--length", 4, "--resume")
    assert result.exit_code == 2 and "length = 3, not 4" in result.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint
    (tmp_path / "run" / "checkpoint.pt").write_bytes(checkpoint[:500])
    result = run(*args, "--resume")
    assert result.exit_code == 2 and "checkpoint.pt: not a checkpoint" in result.stderr


def test_a_real_ctrl_c(args, tmp_path):
    """The whole process, with a signal from outside."""
    command = [sys.executable, "train.py", *map(str, args), "--epochs", "5000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(read_metrics(metrics)) > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_adapter(args, tmp_path, monkeypatch, broken):
    """ "Loss is nan, stopping" (OGV 144, 67, 59): ours names the records and keeps what was good."""
    import train

    calls = []

    def fail(model, adapter, *rest):
        calls.append(1)
        loss = accumulate_gradient(model, adapter, *rest)
        if len(calls) == 4:
            if broken == "loss":
                return math.nan
            adapter.prompts.grad[0, 0, 0] = math.inf
        return loss

    monkeypatch.setattr(train, "accumulate_gradient", fail)
    result = run(*args)
    assert result.exit_code == 2
    assert "not finite" in result.stderr and "records [" in result.stderr and "step 3 of 15" in result.stderr
    Adapter.load(tmp_path / "run" / "adapter.safetensors")  # refuses what is not finite
    monkeypatch.undo()
    assert run(*args, "--resume").exit_code == 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--base", "absent"], "absent: no such base model"),
        (["--data", "absent.json"], "absent.json: no such data file"),
        (["--epochs", 2, "--warmup-epochs", 2], "--warmup-epochs 2 of --epochs 2"),
        (["--layers", 4], "--layers 4"),
        (["--layers", 0], "--layers"),
        (["--length", 0], "--length"),
        (["--val-size", 40], "--val-size holds out 40"),
        (["--max-seq-len", 8], "of the 0 examples that fit"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--resume"], "nothing to resume"),
        (["--out", "FILE"], "file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, tmp_path, more, message):
    (tmp_path / "file").write_text("")
    result = run(*args, *(tmp_path / "file" if arg == "FILE" else arg for arg in more))
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.output
    assert not list(tmp_path.glob("run/*"))


def test_dropped_and_cut_examples_are_counted_and_said(args, tmp_path, tiny_base):
    records = [{"instruction": "a", "output": "b " * n} for n in (1, 2, 500)]
    records.append({"instruction": "a " * 500, "output": "b"})
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    result = run(*args, "--data", tmp_path / "mixed.json", "--val-size", 0)
    assert result.exit_code == 0, result.output
    assert "1 dropped" in result.stderr and "1 cut" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dropped"] == 1 and summary["cut"] == 1 and summary["examples"] == 3
    assert summary["val_loss_after"] is None


def test_default_rate_is_the_papers(args, tmp_path):
    """9e-3 is a base rate, and the rate used is 9e-3 * batch / 256 (OGV 90)."""
    position = args.index("--lr")
    assert run(*args[:position], *args[position + 2 :], "--epochs", 1, "--warmup-epochs", 0).exit_code == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[1]["lr"] == pytest.approx(9e-3 * 8 / 256)


def test_real_alpaca_on_a_real_model(data, tmp_path):
    """stories260K learns the form of real instructions within a few steps."""
    result = run(
        "--base", data / "stories260K", "--data", data / "instructions" / "alpaca_data.json.xz", "--limit", 400,
        "--out", tmp_path / "run", "--epochs", 2, "--lr", 0.02, "--warmup-epochs", 0.5, "--val-size", 40,
        "--max-seq-len", 256,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trainable_parameters"] == 3 * 10 * 64 + 3 * 8
    assert summary["val_loss_after"] < summary["val_loss_before"] - 0.1
