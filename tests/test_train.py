"""Training: loss and gradients, schedule, the files of a run, resuming, and bad input."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, QWEN, ROOT, before_step, copy_base, make_adapter, make_example, make_model
from helpers import run, tensors_and_metrics
from safetensors.torch import load_file

from adapter import Adapter, gated_attention, gated_attention_paper
from data import AlpacaTemplate, hold_out, read_examples, tokenize
from formats.bases import load_llama
from runtime.compilation import compile_layers
from toy import toys
from train import TrainConfig, learning_rate, make_optimizer, mean_loss, train_step
from training.loss import ROWS, chunked_cross_entropy
from training.options import RunOptions
from training.run import CTRL_C, Run
from training.run_files import read_metrics


def make_examples(vocab_size, lengths=((3, 9), (7, 8), (2, 30), (12, 17), (5, 6)), seed=0):
    """Return examples in which both prompts and responses have unequal lengths."""
    random = torch.Generator().manual_seed(seed)
    examples = []
    for record, (prompt_length, length) in enumerate(lengths):
        ids = [record % 2, 7] + torch.randint(vocab_size, (length - 2,), generator=random).tolist()
        examples.append(make_example(ids, prompt_length, record))
    return examples


def loss_and_gradient(model, adapter, examples, max_tokens, checkpoint_activations=False):
    """Return train_step's loss at a learning rate of zero. The gradient is left in the adapter's parameters."""
    optimizer = torch.optim.SGD([{"params": list(adapter.parameters()), "lr_scale": 1.0}], lr=0.0)
    config = TrainConfig(micro_batch_tokens=max_tokens, checkpoint_activations=checkpoint_activations)
    return train_step(model, adapter, optimizer, examples, 0.0, config)


def naive_loss(model, adapter, examples):
    """Return the mean loss of all response tokens, computed one example and one position at a time."""
    losses = []
    for ids, loss_mask, *_ in examples:
        log_probabilities = model(torch.tensor([ids]), adapter())[0].log_softmax(-1)
        losses += [-log_probabilities[t - 1, ids[t]] for t in range(len(ids)) if loss_mask[t]]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("config", [*CONFIGS, *QWEN])
@pytest.mark.parametrize("form", [gated_attention, gated_attention_paper])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("max_tokens, checkpointed", [(1, False), (40, True), (10_000, False), (10_000, True)])
def test_train_step_equals_the_naive_loss_and_gradient(config, form, layers, max_tokens, checkpointed, monkeypatch):
    """The step computes chunks of logits, at response tokens only, with and without checkpointing and micro-batches."""
    monkeypatch.setitem(ROWS, "cpu", 7)
    model = make_model(config, attention=form)
    examples = make_examples(model.config.vocab_size)
    examples += examples[:1]
    plain, fast = make_adapter(model, layers), make_adapter(model, layers)
    loss = naive_loss(model, plain, examples)
    loss.backward()
    assert loss_and_gradient(model, fast, examples, max_tokens, checkpointed) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        gradient = fast.get_parameter(name).grad
        assert (gradient - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    config = TrainConfig(micro_batch_tokens=max_tokens)
    assert mean_loss(model, fast, examples, config) == pytest.approx(loss.item(), rel=1e-5)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("ids, number", [([5, 6, 7, 8], 2), ([5, 6], 3), ([5, 6, 7], 1)])
def test_equal_rows_give_the_naive_loss_and_gradient(ids, number):
    model = make_model()
    examples = [make_example(ids, 1, 0)] * number
    plain, fast = make_adapter(model), make_adapter(model)
    loss = naive_loss(model, plain, examples)
    loss.backward()
    assert loss_and_gradient(model, fast, examples, 100) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(fast.prompts.grad, plain.prompts.grad, rtol=1e-4, atol=1e-6)


def test_compiled_layers_equal_eager_layers():
    """Different lengths and numbers of rows need no recompilation."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    eager, compiled = make_model(), make_model()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled.layers)
    for seed, lengths in enumerate([((3, 9), (4, 12)) * 3, ((6, 31), (3, 9)) * 5]):
        examples = make_examples(eager.config.vocab_size, lengths, seed)
        a, b = make_adapter(eager, layers=1), make_adapter(eager, layers=1)
        loss = loss_and_gradient(eager, a, examples, 10_000)
        assert loss_and_gradient(compiled, b, examples, 10_000) == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(b.prompts.grad, a.prompts.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b.gates.grad, a.gates.grad, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one without and one with adaption prompts


def test_schedule_reaches_its_rate_and_ends_near_zero():
    """A warm-up in micro-batches instead of steps would never reach the peak (litgpt's pull request 132)."""
    rates = [learning_rate(step, peak=2.0, warmup=4, total=12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])
    assert rates[4] == max(rates) == 2.0 and rates[-1] < 0.1
    assert learning_rate(0, peak=1.0, warmup=0, total=1) == 1.0
    assert learning_rate(4, peak=1.0, warmup=10, total=5) == 0.5  # a warm-up longer than the run


def test_gradient_is_clipped_only_if_gradient_clip_is_given():
    model, norms = make_model(), []
    for clip in (None, 0.01, 1e6):
        adapter = make_adapter(model)
        optimizer = torch.optim.SGD([{"params": list(adapter.parameters()), "lr_scale": 1.0}], lr=0.0)
        train_step(model, adapter, optimizer, make_examples(50), 0.0, TrainConfig(gradient_clip=clip))
        norms.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]).norm().item())
    assert norms[0] == norms[2] > 0.02 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_gates_have_no_weight_decay():
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


def test_run_writes_its_files(args, tiny_base, tmp_path):
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
    assert steps[-1]["gate_mean_abs"] == pytest.approx(adapter.gates.tanh().abs().mean().item(), rel=1e-5)
    expected = {"base": str(tiny_base), "base_layers": "3", "data": "forty.json", "examples": "36", "steps": "15"}
    assert expected.items() <= adapter.metadata.items()
    assert float(adapter.metadata["val_loss_after"]) == summary["val_loss_after"]


def test_run_uses_the_device_and_its_default_dtype(args, tmp_path, device):
    """The device, with the index of a GPU, and the dtype are printed. The summary contains the peak memory."""
    result = run(*args, "--device", device)
    assert result.exit_code == 0, result.output
    where = {"cpu": "cpu in torch.float32", "cuda": "cuda:0 in torch.bfloat16"}[device]
    assert f" frozen, on {where}\n" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert summary["peak_memory_bytes"] > 0
    if device == "cuda":
        assert summary["peak_memory_bytes"] < 10**9  # of tensors only, without the process


def test_reported_losses_are_those_of_the_saved_adapter(args, tmp_path, tiny_base):
    """The saved adapter has the reported loss after training; with its gates set to zero, the loss before training."""
    run(*args)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model, tokenizer = load_llama(tiny_base)
    adapter = Adapter.load(tmp_path / "run" / "adapter.safetensors")
    _, held_out = hold_out(tokenize(AlpacaTemplate(tokenizer), read_examples(args[3]), 512)[0], 4, 0)
    assert mean_loss(model, adapter, held_out, TrainConfig()) == pytest.approx(summary["val_loss_after"], rel=1e-5)
    torch.nn.init.zeros_(adapter.gates)
    assert mean_loss(model, adapter, held_out, TrainConfig()) == pytest.approx(summary["val_loss_before"], rel=1e-5)


def test_only_the_adapter_is_trained(tiny_base, tmp_path):
    model, _ = load_llama(tiny_base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = make_adapter(model, layers=1, gates=False)
    optimizer = make_optimizer(adapter, weight_decay=0.02)
    for _ in range(3):
        train_step(model, adapter, optimizer, make_examples(model.config.vocab_size), 0.1, TrainConfig())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert adapter.gates.abs().min() > 0
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in adapter.parameters()}


def test_no_example_is_both_trained_on_and_held_out():
    """The authors' code also trains on the 200 examples on which it validates."""
    examples = make_examples(50, lengths=[(2, 5)] * 30)
    for size, number in ((0, 0), (0.1, 3), (7, 7)):
        training, held_out = hold_out(examples, size, seed=0)
        assert len(held_out) == number
        assert sorted(e.name for e in training + held_out) == list(range(30))
    assert hold_out(examples, 7, seed=0) != hold_out(examples, 7, seed=1)


def test_optimizer_uses_the_scheduled_learning_rate(args, tmp_path, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def spy(self, *more):
        used.append([group["lr"] for group in self.param_groups])
        assert [group["weight_decay"] for group in self.param_groups] == [0.02, 0.0]
        assert self.param_groups[0]["betas"] == (0.9, 0.95)
        return step(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert run(*args).exit_code == 0
    logged = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert used == [[lr, lr] for lr in logged]
    assert logged[:3] == pytest.approx([0.025, 0.05, 0.05])  # half an epoch of 5 steps, rounded to 2


def test_every_epoch_has_all_examples_in_a_different_order(args, monkeypatch):
    import train

    seen = []
    monkeypatch.setattr(train, "train_step", lambda *a: seen.append([e.name for e in a[3]]) or train_step(*a))
    assert run(*args).exit_code == 0
    epochs = [seen[i : i + 5] for i in (0, 5, 10)]
    records = [sorted(r for batch in epoch for r in batch) for epoch in epochs]
    assert records[0] == records[1] == records[2] and len(set(records[0])) == 36
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_determines_prompts_and_split(args, tmp_path):
    """The learning rate is zero, so that the prompts stay as they were initialized."""
    prompts, first_losses = [], []
    for seed in (0, 1):
        assert run(*args, "--lr", 0, "--out", tmp_path / str(seed), "--seed", seed).exit_code == 0
        prompts.append(Adapter.load(tmp_path / str(seed) / "adapter.safetensors").prompts)
        first_losses.append(read_metrics(tmp_path / str(seed) / "metrics.jsonl")[0]["val_loss"])
    assert not torch.equal(*prompts) and first_losses[0] != first_losses[1]


def test_same_seed_gives_the_same_adapter(args, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*args, "--out", tmp_path / name, "--seed", seed).exit_code == 0
        files.append(load_file(tmp_path / name / "adapter.safetensors")["prompts"])
    assert torch.equal(files[0], files[1]) and not torch.equal(files[0], files[2])


def is_same_run(one, other):
    """Return whether two runs have equal adapters, bit for bit, and equal metrics except for the speed."""
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, other)]
    return tensors_and_metrics(one) == tensors_and_metrics(other) and all(
        summaries[0][name] == summaries[1][name] for name in ("tokens", "val_loss_before", "val_loss_after")
    )


@pytest.mark.parametrize("stop_at", [3, 5, 15])
def test_resumed_run_equals_an_uninterrupted_one(args, tmp_path, monkeypatch, stop_at):
    """The data order must not restart (nanoGPT issue 467); the optimizer state must be restored (litgpt issue 1354)."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)  # within an epoch, at the end of one, at the end of all
        result = run(*args)
    assert result.exit_code == 130
    assert f"interrupted after step {stop_at}" in result.stderr and "--resume" in result.stderr
    assert "Traceback" not in result.output
    Adapter.load(tmp_path / "run" / "adapter.safetensors")

    again = run(*args)
    assert again.exit_code == 2 and "unfinished run" in again.stderr
    assert run(*args, "--resume").exit_code == 0
    assert is_same_run(tmp_path / "whole", tmp_path / "run")
    assert "this run is finished" in run(*args, "--resume").stderr


def test_second_ctrl_c_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end, Run(RunOptions(tmp_path / "run")) as run:
        run.in_loop = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert run.requested == CTRL_C
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert end.value.code == 130 and signal.getsignal(signal.SIGINT) == before


def stop_after(monkeypatch, steps, signal_number=signal.SIGINT):
    """Make this process signal itself in its `steps`-th training step from now. The run stops after that step."""
    monkeypatch.setattr("train.train_step", before_step(steps, lambda: os.kill(os.getpid(), signal_number)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--length", 4], "length = 3, not 4"),
        (["--layers", 2], "layers = 1, not 2"),
        (["--batch-size", 9], "batch_size = 8, not 9"),
        (["--seed", 1], "seed = 0, not 1"),
        (["--lr", 0.1], "lr = 0.05, not 0.1"),
        (["--epochs", 4], "epochs = 3, not 4"),
        (["--limit", 39], "limit = None, not 39"),
        (["--data", "OTHER"], "data_hash = "),
        (["--base", "OTHER"], "base_fingerprint = "),
    ],
)
def test_resumed_run_cannot_change_its_options(args, tiny_base, tmp_path, monkeypatch, changes, message):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(*args).exit_code == 130
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    if changes[0] == "--data":
        (tmp_path / "other.json").write_text(args[3].read_text().replace("animals", "minerals"))
        changes[1] = tmp_path / "other.json"
    if changes[0] == "--base":
        changes[1] = copy_base(tiny_base, tmp_path / "other")
        weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
        weights["output.weight"][0] += 1
        torch.save(weights, changes[1] / "consolidated.00.pth")
    result = run(*args, *changes, "--resume")
    assert result.exit_code == 2 and message in result.stderr
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("every, last", [(2, 4), (5, 5)])
def test_killed_run_resumes_from_its_last_checkpoint(args, tmp_path, every, last):
    """The last checkpoint is within an epoch or at its end. Later lines of metrics.jsonl are replaced."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    code = (
        "import sys; sys.path.insert(0, 'tests'); import os, train; step, calls = train.train_step, []\n"
        "def fatal(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), 9)\n"
        "    return step(*a)\n"
        "train.train_step = fatal; train.main()"
    )
    command = [sys.executable, "-c", code, *map(str, args), "--save-every", str(every)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -9
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == last
    assert run(*args, "--save-every", every, "--resume").exit_code == 0
    assert is_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("broken", ["cut", "list", "options", "progress", "shape", "metrics"])
def test_broken_files_of_a_run_are_named(args, tmp_path, monkeypatch, broken):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(*args)
    path = tmp_path / "run" / "checkpoint.pt"
    valid = torch.load(path, weights_only=True)
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif broken == "metrics":
        path = tmp_path / "run" / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\nrubbish\n')
    else:
        bad = {
            "list": [1, 2],
            "options": valid | {"options": 7},
            "progress": valid | {"progress": {"step": "2"}},
            "shape": valid | {"adapter": {"prompts": torch.zeros(1), "gates": torch.zeros(1)}},
        }
        torch.save(bad[broken], path)
    result = run(*args, "--resume")
    assert result.exit_code == 2
    assert f"{path}: " in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_ctrl_c_saves_a_checkpoint(args, tmp_path):
    """The signal is sent to a separate process."""
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
def test_non_finite_values_stop_the_run_and_keep_the_last_adapter(args, tmp_path, monkeypatch, broken):
    """The error names the records. (The authors' "Loss is nan, stopping" does not: OpenGVLab issues 144, 67, 59.)"""
    clip, calls, adapters = torch.nn.utils.clip_grad_norm_, [], []

    def spoil(parameters, *more):
        """Record the adapter before every optimizer step, and break the fourth gradient if `broken` is "gradient"."""
        calls.append(1)
        adapters.append([p.detach().clone() for p in parameters])
        if len(calls) == 4 and broken == "gradient":
            parameters[0].grad[0, 0, 0] = math.inf
        return clip(parameters, *more)

    def not_finite(*more):
        loss = chunked_cross_entropy(*more)
        return loss * math.nan if len(calls) == 3 and broken == "loss" and loss.requires_grad else loss

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
        patch.setattr("train.chunked_cross_entropy", not_finite)
        result = run(*args)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "not finite, for record " in last and last.startswith("error: after step 3: ")
    assert "checkpoint.pt and adapter.safetensors were saved after step 3;" in last
    kept = Adapter.load(tmp_path / "run" / "adapter.safetensors")
    assert all(torch.equal(p, expected) for p, expected in zip(kept.parameters(), adapters[3]))
    assert run(*args, "--resume").exit_code == 0


@pytest.mark.parametrize(
    "value, message",
    [
        (math.nan, "nan: norm.weight contains values that are not finite"),
        (
            3e38,
            "the validation loss is nan; nothing was saved yet; check the weights of the base",
        ),  # finite, but the logits are not
    ],
)
def test_base_with_non_finite_values_stops_the_run(args, tiny_base, tmp_path, value, message):
    folder = copy_base(tiny_base, tmp_path / "nan")
    weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
    weights["norm.weight"][0] = value
    torch.save(weights, folder / "consolidated.00.pth")
    result = run(*args, "--base", folder)
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("blocked", ["metrics.jsonl", "adapter.safetensors", "curves.png", "summary.json"])
def test_file_that_cannot_be_written_is_named(args, tmp_path, blocked):
    (tmp_path / "run" / blocked).mkdir(parents=True)
    result = run(*args)
    assert result.exit_code == 2
    assert blocked in result.stderr.splitlines()[-1] and "Traceback" not in result.output


def test_full_disk_is_a_one_line_error(args, tmp_path):
    """RLIMIT_FSIZE imitates a full disk: no file may grow beyond 1 KiB."""
    resource = pytest.importorskip("resource")
    del resource
    limited = f"ulimit -f 1; exec {sys.executable} train.py {' '.join(map(str, args))}"
    result = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "more, message",
    [
        (["--base", "absent"], "absent: no such base model"),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--epochs", 2, "--warmup-epochs", 2], "--warmup-epochs 2 of --epochs 2"),
        (["--layers", 4], "--layers 4"),
        (["--layers", 0], "--layers"),
        (["--length", 0], "--length"),
        (["--val-size", 40], "--val-size 40 holds out 40 examples"),
        (["--max-seq-len", 8], "every example was dropped"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--resume"], "no such checkpoint to resume from"),
        (["--data", ""], "is a folder, not a file"),
        (["--base", ""], "contains neither consolidated"),
        (["--lr", "nan"], "--lr"),
        (["--blr", "inf"], "--blr"),
        (["--warmup-epochs", "nan"], "--warmup-epochs"),
        (["--val-size", "inf"], "--val-size"),
        (["--seed", 2**64], "--seed"),
        (["--length", 10**12], "--length"),
        (["--out", "FILE"], "file: exists and is not a folder"),
        (["--out", "FILE/a"], "file/a: .*file is not a folder"),
        (["--batch-size", "9" * 400], "is not in the range 1 to 2**31 - 1"),
        (
            ["--data", "a.csv"],
            "a.csv: is not JSON; convert it with pandas.read_csv('a.csv').fillna('').to_json(",
        ),
        (["--data", "a.tsv"], "pandas.read_csv('a.tsv', sep='\\t').fillna('')"),
        (["--base", "llama.gguf"], "llama.gguf: no such base model"),
        (["--base", "roberta-base"], "`hf download roberta-base --local-dir roberta-base`"),
    ],
)
def test_bad_input_is_a_one_line_error(args, tmp_path, more, message):
    (tmp_path / "file").write_text("")
    result = run(*args, *(str(arg).replace("FILE", str(tmp_path / "file")) for arg in more))
    assert result.exit_code == 2
    assert (
        all(part in result.stderr.splitlines()[-1] for part in message.split(".*")) and "Traceback" not in result.output
    )
    assert not (tmp_path / "run").exists()


def test_dropped_and_truncated_examples_are_reported(args, tmp_path, tiny_base):
    records = [{"instruction": "a", "output": "b " * n} for n in (1, 2, 500)]
    records.append({"instruction": "a " * 500, "output": "b"})
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    result = run(*args, "--data", tmp_path / "mixed.json", "--val-size", 0)
    limited = run(
        *args, "--data", tmp_path / "mixed.json", "--val-size", 0, "--limit", 2, "--out", tmp_path / "limited"
    )
    assert "2 examples to train on, 0 held out, 0 dropped" in limited.stderr
    assert result.exit_code == 0, result.output
    assert "1 dropped" in result.stderr and "1 truncated" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dropped"] == 1 and summary["truncated"] == 1 and summary["examples"] == 3
    assert summary["val_loss_after"] is None


def test_default_learning_rate_is_the_papers(args, tmp_path):
    """The paper's 9e-3 is a base rate. The learning rate is 9e-3 * batch size / 256 (OpenGVLab issue 90)."""
    position = args.index("--lr")
    without = [*args[:position], *args[position + 2 :], "--epochs", 1, "--warmup-epochs", 0]
    for more, blr in (([], 9e-3), (["--blr", 1e-3], 1e-3)):
        assert run(*without, *more).exit_code == 0
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[1]["lr"] == pytest.approx(blr * 8 / 256)


def test_toy_is_trained_and_evaluated_by_default(tmp_path, monkeypatch, tiny_base):
    """The defaults of the options are those of the toy. The held-out accuracy is printed and written to the summary."""
    training = {"layers": 3, "epochs": 2, "warmup_epochs": 1, "batch_size": 32, "lr": 0.05}
    monkeypatch.setattr("train.TRAINING", training)
    monkeypatch.setitem(toys.TOYS, "text", toys.TOYS["text"]._replace(base=tiny_base))
    peak_rates = {}
    for name, more in (("own", []), ("given", ["--blr", 1e-3, "--batch-size", 64])):
        result = run("--out", tmp_path / name, "--limit", 64, "--device", "cpu", *more)
        assert result.exit_code == 0, result.output
        assert "new entities in new wordings" in result.stdout
        peak_rates[name] = max(line["lr"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "lr" in line)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["trainable_parameters"] == 3 * 10 * 16 + 3 * 2
        assert 0 == summary["heldout_accuracy_base"] <= summary["heldout_accuracy_adapter"] < 1
    assert peak_rates["own"] == pytest.approx(0.05) and peak_rates["given"] == pytest.approx(1e-3 * 64 / 256)


def test_data_without_a_base_prints_a_notice(args, tmp_path, monkeypatch, tiny_base):
    """Without --base, the adapter is for the toy's LLaMA, which is too small to learn from real data such as Alpaca."""
    monkeypatch.setitem(toys.TOYS, "text", toys.TOYS["text"]._replace(base=tiny_base))
    i = args.index("--base")
    result = run(*args[:i], *args[i + 2 :])
    assert result.exit_code == 0 and result.stderr.splitlines()[0].startswith("no --base: using the toy's")
    assert "no --base" not in run(*args).stderr


def test_four_functions_lead_from_the_command_to_backward(args, monkeypatch):
    """The functions main, train, training_steps and train_step are all in train.py."""
    frames = []

    def record_frames(self):
        frames.extend(f"{Path(frame.filename).name} {frame.function}" for frame in inspect.stack()[1:])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", record_frames)
    assert run(*args).exit_code == 130
    ours = [frame for frame in frames if frame.startswith(("train.py", "run.py", "options.py", "cli.py"))]
    assert ours == ["train.py train_step", "train.py training_steps", "train.py train", "train.py main"]


def test_real_model_learns_from_real_alpaca_data(data, tmp_path):
    """The validation loss of stories260K on Alpaca falls by more than 0.1 in two epochs of 160 examples."""
    result = run(
        "--base", data / "stories260K", "--data", data / "instructions" / "alpaca_data.json.xz", "--limit", 200,
        "--out", tmp_path / "run", "--epochs", 2, "--lr", 0.02, "--warmup-epochs", 0.5, "--val-size", 40,
        "--batch-size", 32, "--max-seq-len", 256,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trainable_parameters"] == 3 * 10 * 64 + 3 * 8
    assert summary["val_loss_after"] < summary["val_loss_before"] - 0.1


def test_base_without_data_is_an_error(args, tiny_base):
    i = args.index("--data")
    result = run(*args[:i], *args[i + 2 :])
    assert result.exit_code == 2 and "needs --data FILE, or --toy text to train on the toy's data" in result.stderr


def test_context_length_limits_max_seq_len(instructions, tmp_path, data):
    """The default is the context length, but at most 512 tokens. A value above the context length is refused."""
    args = ["--base", data / "stories260K", "--data", instructions, "--out", tmp_path / "run", "--epochs", 3]
    result = run(*args, "--limit", 20, "--max-seq-len", 513)
    assert (
        result.exit_code == 2
        and "--max-seq-len 513" in result.stderr
        and "a context of only 512 tokens" in result.stderr
    )
    config = TrainConfig().for_base("base", 3, 100)
    assert config.max_seq_len == 100 and TrainConfig().for_base("base", 3, math.inf).max_seq_len == 512


@pytest.mark.parametrize("more", [["--lr", 3], ["--batch-size", 100000]])
def test_extreme_learning_rate_causes_a_warning(args, more):
    i = args.index("--lr")
    result = run(*args[:i], *args[i + 2 :], *more)
    rate = "3 " if "--lr" in more else "3.51562"
    assert f"warning: the peak learning rate is {rate}" in result.stderr and "gives 0.00225" in result.stderr
    assert "warning" not in run(*args, "--lr", 0.01, "--out", args[5].with_name("other")).stderr


@pytest.mark.parametrize("losses, worse", [([2.0, 1.5, 2.5, 2.125], True), ([2.0, 2.5, 2.5, 1.9], False)])
def test_adapter_that_increases_the_loss_causes_a_warning(args, monkeypatch, losses, worse):
    """The losses are faked, because any training improves a random base. (On real text, --lr 1000 has this effect.)"""
    monkeypatch.setattr("train.mean_loss", lambda *_: losses.pop(0))
    result = run(*args)
    warning = "warning: the validation loss is 2.1250, but was 2.0000 before training; a lower --lr may help"
    assert result.exit_code == 0 and (warning in result.stderr) == worse
