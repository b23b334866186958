"""The contestants do the same work, and what is counted is what there is."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import make_adapter, make_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed as bench
from benchmarks.peers import HuggingFace, LitGPT, Ours, Plain
from data import Tokens
from model import Config, quantize_int8
from training.step import accumulate_gradient

EXAMPLES = [Tokens(torch.arange(2, 2 + n).tolist(), 4, n) for n in (9, 6, 21)]


@pytest.mark.parametrize("config", ["mha", "gqa"])
def test_the_plain_baseline_is_the_same_model(config):
    model = make_model(config)
    ours, plain = (kind(model, make_adapter(model)) for kind in (Ours, Plain))
    losses = [contestant.loss(EXAMPLES) for contestant in (ours, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.adapter.prompts.grad, plain.adapter.prompts.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.adapter.gates.grad, plain.adapter.gates.grad, rtol=1e-4, atol=1e-6)
    row = make_tokens(model, 6).tolist()
    assert ours.decode(row, 10) == plain.decode(row, 10)


@pytest.mark.parametrize("level", bench.Ablation.LEVELS)
def test_every_level_of_the_ablation_is_the_same_model(level):
    model = make_model()
    ours, ablation = Ours(model, make_adapter(model)), bench.Ablation(model, make_adapter(model), level)
    losses = [contestant.loss(EXAMPLES) for contestant in (ours, ablation)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.adapter.prompts.grad, ablation.adapter.prompts.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["adaption prompt", "lora", "full tuning", "litgpt"])
def test_peers_have_the_same_base(kind):
    pytest.importorskip("litgpt" if kind == "litgpt" else "peft")
    model = make_model("mha")
    peer = LitGPT(model, 2, 5) if kind == "litgpt" else HuggingFace(model, kind, 2, 5)
    ours = Ours(model, make_adapter(model, gates=False))
    torch.testing.assert_close(peer.loss(EXAMPLES), ours.loss(EXAMPLES), rtol=1e-4, atol=1e-4)
    row = make_tokens(model, 6).tolist()
    assert peer.decode(row, 10) == ours.decode(row, 10)
    peer.loss(EXAMPLES).backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in peer.parameters() if parameter.grad is not None)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "15M", Config(32, 4, 4, 4, 8, 48, 2000))


def run(*args):
    return CliRunner().invoke(bench.main, [str(arg) for arg in args])


def test_the_commands_write_their_figures(tiny, tmp_path):
    path = tmp_path / "figures.json"
    common = ["--json", path, "--device", "cpu"]
    for command in (
        ["train", "--repeat", 2, "--examples", 4, "--batch-size", 4, "--peers"],
        ["train", "--repeat", 1, "--examples", 4, "--batch-size", 4, "--ablation"],
        ["generate", "--repeat", 2, "--tokens", 4, "--peers"],
        ["memory", "--size", "15M"],
    ):
        result = run(*command, *common)
        assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())
    kinds = ("train", "ablation", "generate", "memory")
    assert set(figures) == {f"{kind} 15M {'bfloat16' if kind == 'memory' else 'float32'}" for kind in kinds}
    rows = figures["train 15M float32"]["rows"]
    assert rows["ours"]["ratio"] == {"median": 1, "least": 1, "most": 1}
    assert len(rows["plain, as the authors'"]["seconds"]) == 2
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_other_work_is_not_timed(tiny, monkeypatch):
    """A contestant with another loss would be compared for nothing."""
    monkeypatch.setattr(Plain, "loss", lambda *_: torch.tensor(1.0))
    result = run("train", "--peers", "--device", "cpu", "--examples", 4, "--batch-size", 4)
    assert result.exit_code == 2 and "has a first loss of 1.00000, ours is" in result.output


def test_what_is_kept_is_counted():
    config = Config(32, 4, 4, 4, 8, 48, 2000)
    assert bench.kept_per_token(config, True) == 32  # a layer's input
    # Two norms (input; one number), q, k, v, the attention over words and its sum, over prompts, the same numbers of
    # heads (logarithms of sums), gate, up, their silu.
    kept = bench.kept_per_token(config, False)
    assert 32 * 7 + 3 * 48 <= kept <= 32 * 12 + 4 * 48


def test_the_plan_counts_what_the_model_does():
    """Bytes and operations of the formulas against those of a model: within the few things that they leave out."""
    config = Config(256, 12, 4, 4, 64, 688, 500)
    plan = bench.plan(config, 1, 80e9, 1e12)
    model = make_model(config)
    assert plan["weights"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.01)
    assert 7 * 256 + 3 * 688 == pytest.approx(bench.kept_per_token(config, False), rel=0.02)
    examples = [Tokens(row, 62, i) for i, row in enumerate(make_tokens(model, 4, 128).tolist())]
    with FlopCounterMode(display=False) as counter:
        accumulate_gradient(model, make_adapter(model, layers=10, length=10), examples, 10_000)
    assert plan["operations"] == pytest.approx(counter.get_total_flops() / 4, rel=0.1)


def test_a_plan_splits_what_does_not_fit():
    one, eight = (bench.plan(bench.SIZES["LLaMA-65B"], gpus, 80e9, 1e14) for gpus in (1, 8))
    assert not one["fits"] and eight["fits"] and eight["strategy"] == "fsdp"
    assert eight["weights"] < one["weights"] / 4 and eight["travels"] > 100e9
    seven = bench.plan(bench.SIZES["LLaMA-7B"], 8, 80e9, 1e14)
    assert seven["strategy"] == "ddp" and seven["travels"] == pytest.approx(2 * 7 / 8 * 4 * 1_229_760)


def test_8_bits_train():
    pytest.importorskip("torchao")
    model, rounded = (make_model(Config(64, 3, 4, 4, 16, 96, 50)) for _ in range(2))
    quantize_int8(rounded)
    adapters = [make_adapter(model) for _ in range(2)]
    losses = [accumulate_gradient(m, a, EXAMPLES, 10_000, True) for m, a in zip((model, rounded), adapters)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    a, b = (adapter.prompts.grad.flatten() for adapter in adapters)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
