"""Benchmarks: equal results of all implementations, and correct counts of memory and floating-point operations."""

import gc
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import make_adapter, make_example, make_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measuring, workload
from benchmarks.__main__ import main
from benchmarks.memory import kept_per_token, plan_run
from benchmarks.peers import HuggingFace, LitGPT, Ours, Plain
from benchmarks.sizes import SIZES
from benchmarks.training import Ablation, epoch
from model import Config
from train import TrainConfig, make_optimizer, train_step

EXAMPLES = [make_example(torch.arange(2, 2 + n).tolist(), 4, f"row {n}") for n in (9, 6, 21)]


@pytest.mark.parametrize("config", ["mha", "gqa"])
def test_plain_baseline_equals_our_model(config):
    model = make_model(config)
    ours, plain = (kind(model, make_adapter(model)) for kind in (Ours, Plain))
    losses = [implementation.loss(EXAMPLES) for implementation in (ours, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.adapter.prompts.grad, plain.adapter.prompts.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.adapter.gates.grad, plain.adapter.gates.grad, rtol=1e-4, atol=1e-6)
    row = make_tokens(model, 6).tolist()
    assert ours.continuations([row, row[::-1]], 10) == plain.continuations([row, row[::-1]], 10)


@pytest.mark.parametrize("level", Ablation.LEVELS)
def test_every_ablation_level_equals_our_model(level):
    model = make_model()
    ours, ablation = Ours(model, make_adapter(model)), Ablation(model, make_adapter(model), level)
    losses = [implementation.loss(EXAMPLES) for implementation in (ours, ablation)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.adapter.prompts.grad, ablation.adapter.prompts.grad, rtol=1e-4, atol=1e-6)


def test_train_step_equals_the_last_ablation_level():
    """An epoch of train.py's steps, in micro-batches, gives the same adapter as an epoch of the ablation."""
    model = make_model()
    ours = Ours(model, make_adapter(model), micro_batch_tokens=20)
    ablation = Ablation(model, make_adapter(model), Ablation.LEVELS[-1])
    for implementation in (ours, ablation):
        epoch(implementation, EXAMPLES, batch_size=2)()
    before = make_adapter(model).prompts
    assert (ours.adapter.prompts - before).abs().min() > 1e-4
    torch.testing.assert_close(ours.adapter.prompts, ablation.adapter.prompts, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.adapter.gates, ablation.adapter.gates, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["adaption prompt", "lora", "full tuning", "litgpt"])
def test_peers_compute_our_loss_and_continuations_before_training(kind):
    pytest.importorskip("litgpt" if kind == "litgpt" else "peft")
    model = make_model("mha")
    peer = LitGPT(model, 2, 5) if kind == "litgpt" else HuggingFace(model, kind, 2, 5)
    ours = Ours(model, make_adapter(model, gates=False))
    torch.testing.assert_close(peer.loss(EXAMPLES), ours.loss(EXAMPLES), rtol=1e-4, atol=1e-4)
    row = make_tokens(model, 6).tolist()
    rows = [row] if kind == "litgpt" else [row, row[::-1]]
    assert peer.continuations(rows, 10) == ours.continuations(rows, 10)
    peer.loss(EXAMPLES).backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in peer.parameters() if parameter.grad is not None)


@pytest.fixture
def tiny(monkeypatch):
    """Replace the size 15M and the operations that measure the machine by tiny ones."""
    monkeypatch.setitem(workload.CONFIGS, "15M", Config(32, 4, 4, 4, 8, 48, 2000))
    monkeypatch.setitem(measuring.MATRIX, "cpu", 64)
    monkeypatch.setitem(measuring.COPIED, "cpu", 2**10)
    gc.freeze()  # the benchmark collects garbage before it measures memory; this skips the objects of earlier tests
    yield
    gc.unfreeze()


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_commands_write_their_measurements(tiny, instructions, tiny_base, tmp_path):
    path = tmp_path / "figures.json"
    data = ["--data", instructions, "--tokenizer", tiny_base / "tokenizer.model"]
    for command in (
        ["memory", "--size", "15M"],
        ["train", *data, "--repeat", 2, "--examples", 4, "--batch-size", 4, "--peers"],
        ["train", *data, "--repeat", 1, "--examples", 4, "--batch-size", 4, "--ablation"],
        ["generate", *data, "--repeat", 2, "--tokens", 4, "--peers"],
    ):
        result = run(*command, "--json", path, "--device", "cpu")
        assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())
    kinds = ("train", "ablation", "generate", "memory")
    assert set(figures) == {f"{kind} 15M {'bfloat16' if kind == 'memory' else 'float32'}" for kind in kinds}
    rows = figures["train 15M float32"]["rows"]
    assert rows["ours"]["ratio"] == {"median": 1, "least": 1, "most": 1}
    assert len(rows["plain, as the authors'"]["seconds"]) == 2
    assert list(figures["ablation 15M float32"]["rows"]) == ["plain", *Ablation.LEVELS, Ablation.LAST]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_implementation_with_a_different_loss_is_refused(tiny, monkeypatch):
    """Timing implementations that compute different losses would be meaningless."""
    monkeypatch.setattr(Plain, "loss", lambda *_: torch.tensor(1.0))
    result = run("train", "--peers", "--device", "cpu", "--examples", 4, "--batch-size", 4)
    assert result.exit_code == 2 and "has a first loss of 1.00000, but this implementation has" in result.output


@pytest.mark.parametrize("content", ["[]", '{"train 15M float32": {}}', '{"a": {"rows": {"ours": {"ratio": 1}}}}'])
def test_unrelated_json_file_is_refused_before_measuring(tiny, tmp_path, monkeypatch, content):
    monkeypatch.setattr(workload.Workload, "new_model", lambda _: pytest.fail("the measurement has begun"))
    (tmp_path / "f.json").write_text(content)
    result = run("generate", "--device", "cpu", "--json", tmp_path / "f.json")
    assert (
        result.exit_code == 2 and "f.json: " in " ".join(result.stderr.split("\n")) and "Traceback" not in result.stderr
    )


def test_data_requires_a_tokenizer(instructions):
    result = run("train", "--data", instructions)
    assert (
        result.exit_code == 2 and f"error: --data {instructions} requires --tokenizer FILE or --base" in result.output
    )


def test_peak_memory_is_measured():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    growth = measuring.peak_growth(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    assert 56 * 2**20 < growth < 96 * 2**20  # 64 MiB are allocated; Linux updates the counter in batches


def test_activations_kept_per_token_are_counted():
    config = Config(32, 4, 4, 4, 8, 48, 2000)
    assert kept_per_token(config, True) == 32  # with checkpointing, only the input of a layer
    # Inputs and scales of two norms; q, k, v; attention over tokens, over prompts, and their sum; a logsumexp per head
    # for each attention; gate, up, and the SiLU of the gate.
    kept = kept_per_token(config, False)
    assert 32 * 7 + 3 * 48 <= kept <= 32 * 12 + 4 * 48


def test_plan_matches_a_real_model():
    """The plan is accurate to 1% for weights and 10% for operations, and 7C + 3F activations per layer to 2%."""
    config = Config(256, 12, 4, 4, 64, 688, 500)
    plan = plan_run(config, 1, 80e9, 1e12)
    model = make_model(config)
    assert plan["weights"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.01)
    assert 7 * 256 + 3 * 688 == pytest.approx(kept_per_token(config, False), rel=0.02)
    examples = [make_example(row, 62, f"row {i}") for i, row in enumerate(make_tokens(model, 4, 128).tolist())]
    with FlopCounterMode(display=False) as counter:
        adapter = make_adapter(model, layers=10, length=10)
        train_step(
            model, adapter, make_optimizer(adapter, 0.02), examples, 1e-3, TrainConfig(micro_batch_tokens=10_000)
        )
    assert plan["operations"] == pytest.approx(counter.get_total_flops() / 4, rel=0.1)


def test_plan_uses_fsdp_if_the_weights_do_not_fit():
    one, eight = (plan_run(SIZES["LLaMA-65B"], gpus, 80e9, 1e14) for gpus in (1, 8))
    assert not one["fits"] and eight["fits"] and eight["strategy"] == "fsdp"
    assert eight["weights"] < one["weights"] / 4 and eight["travels"] > 100e9
    seven = plan_run(SIZES["LLaMA-7B"], 8, 80e9, 1e14)
    assert seven["strategy"] == "ddp" and seven["travels"] == pytest.approx(2 * 7 / 8 * 4 * 1_229_760)
