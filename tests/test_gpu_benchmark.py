"""python -m benchmarks gpu, every part of it, on a tiny shape: on a GPU only the speed is unknown."""

import json
import time

import pytest
import torch
from click.testing import CliRunner
from helpers import make_example

from adapter import gated_attention_paper
from benchmarks import gpu, measuring, workload
from benchmarks.__main__ import main
from benchmarks.memory import step_operations
from benchmarks.peers import Ours, Variant
from data import group_by_length
from model import Config

SHAPE = Config(64, 4, 4, 4, 16, 128, 500)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(workload.CONFIGS, "7B", SHAPE)
    monkeypatch.setitem(measuring.MATRIX, "cpu", 64)
    monkeypatch.setitem(measuring.COPIED, "cpu", 2**10)
    monkeypatch.setattr(gpu.Bench, "SECONDS", 0.01)
    monkeypatch.setattr(gpu.Bench, "BATCH", 2)
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **more: eager(*args, **more | {"backend": "eager"}))


def run(tmp_path, *args):
    args = ["gpu", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "gpu.json"), *map(str, args)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "gpu.json").read_text()), result.stdout


def test_every_part_runs(tiny, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(gpu, "gpu_tests", lambda: {"exit_code": 0, "said": ["1 passed"]})
    found, said = run(tmp_path)
    measures = found["measures"]
    assert list(measures) == list(gpu.ORDER) and len(measures) == 1 + len(gpu.TRAINED) + len(gpu.DECODED) + 2
    assert not [row for row in measures.values() if "error" in row], measures
    for name, row in measures.items():
        if name.startswith("train"):
            assert row["peak_bytes"] > 0 and row["matmul_share"] > 0 and row["alpaca_minutes"] > 0
        if name.startswith("decode"):
            assert row["tokens_per_second"] > 0 and row["copy_share"] > 0
    wide, narrow = (measures[f"decode: {how}, batch 1"]["bytes_per_step"] for how in ("eager", "4 bits, graph"))
    assert narrow < wide and "train: eager: " in said and "adapter_share_of_decoding" in found
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_what_fails_or_comes_too_late_is_noted_and_the_rest_kept(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(gpu.Bench, "training", fail)
    monkeypatch.setattr(gpu.Bench, "decoding", lambda *_: time.sleep(0.2) or {"tokens_per_second": 1, "copy_share": 1})
    monkeypatch.setitem(gpu.ORDER, "peer: lora", 1e4)
    found, _ = run(tmp_path, "--skip-tests", "--minutes", 10)
    measures = found["measures"]
    assert measures["train: eager"] == {"error": "OutOfMemoryError: no memory"}
    assert measures["decode: graph, batch 1"]["tokens_per_second"] == 1
    assert measures["peer: lora"] == {"error": "no time was left"}


def test_the_end_is_in_time():
    """A clock on which every part takes as long as is expected: none goes on after the deadline, later ones fit."""
    now, ran = [0.0], []

    def part(name):
        def run():
            now[0] += gpu.ORDER[name]
            return ran.append(name)

        return run

    gpu.run_parts({name: part(name) for name in gpu.ORDER}, 510, lambda name, row: None, lambda: now[0])
    assert 450 < now[0] <= 510 and ran[:3] == ["train: eager", "decode: graph, batch 1", "tests"]
    assert {"peer: adaption prompt", "peer: lora", "train: compiled"} <= set(ran) < set(gpu.ORDER)


def test_batches_are_of_like_length():
    """Padding would count as time without work; as in training, there is next to none."""
    lengths = [example.num_tokens for batch in gpu.alpaca_batches(SHAPE, 64, 4) for example in batch]
    assert len(lengths) == 256 and 120 < sum(lengths) / 256 < 134
    positions = 0
    for batch in gpu.alpaca_batches(SHAPE, 64, 4):
        for micro_batch in group_by_length(batch, 8192):
            positions += len(micro_batch) * max(example.num_tokens for example in micro_batch)
    assert positions < 1.02 * sum(lengths)


def test_the_suite_s_gpu_cases_are_found():
    """They are skipped here, one by one: the command finds them, and pytest is content."""
    found = gpu.gpu_tests("tests/test_model.py")
    assert found["exit_code"] == 0 and "14 " in found["said"][-1], found


def test_other_models_share_the_weights_and_the_rounded_have_their_own():
    model = workload.random_model(SHAPE, torch.device("cpu"), torch.float32)
    variants = Variant(attention=gated_attention_paper), Variant(bits="4"), Variant(decoding=True, compiled=True)
    same, rounded, compiled = (Ours(model, None, variant).model for variant in variants)
    for other in (same, compiled):
        assert other.layers[0].attention.wq.weight.data_ptr() == model.layers[0].attention.wq.weight.data_ptr()
    assert same.layers[0].attention.gated is gated_attention_paper and type(model.output) is torch.nn.Linear
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(same(tokens), model(tokens)) and not torch.equal(rounded(tokens), same(tokens))


def test_operations_are_those_that_pytorch_counts():
    """Of a step, nothing recomputed: forward, backwards through adapted layers, and the head where there is a loss."""
    from torch.utils.flop_counter import FlopCounterMode

    from train import TrainConfig, make_optimizer, train_step

    config = Config(64, 6, 4, 4, 16, 128, 500)
    model = workload.random_model(config, torch.device("cpu"), torch.float32)
    adapter = workload.random_adapter(config, torch.device("cpu"))
    example = make_example(list(range(3, 103)), 50)
    with FlopCounterMode(display=False) as counter:
        train_step(model, adapter, make_optimizer(adapter, 0.02), [example], 1e-3, TrainConfig())
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert counted == pytest.approx(step_operations(config, 99, 50, False), rel=0.15)
