"""All parts of `python -m benchmarks gpu`, run with a tiny model on a CPU."""

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
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compile_model(*args, **options | {"backend": "eager"})
    )


def run(tmp_path, *args):
    """Run the command; return the values in its JSON file, and its standard output."""
    args = ["gpu", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "gpu.json"), *map(str, args)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "gpu.json").read_text()), result.stdout


def test_every_part_runs(tiny, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(gpu, "gpu_tests", lambda: {"exit_code": 0, "output": ["1 passed"]})
    found, printed = run(tmp_path)
    measures = found["measures"]
    assert list(measures) == list(gpu.ORDER) and len(measures) == 1 + len(gpu.TRAINED) + len(gpu.DECODED) + 2
    assert not [row for row in measures.values() if "error" in row], measures
    for name, row in measures.items():
        if name.startswith("train"):
            assert row["peak_bytes"] > 0 and row["matmul_share"] > 0 and row["alpaca_minutes"] > 0
        if name.startswith("decode"):
            assert row["tokens_per_second"] > 0 and row["copy_share"] > 0
    float_bytes, int4_bytes = (
        measures[f"decode: {variant}, batch 1"]["bytes_per_step"] for variant in ("eager", "4 bits, graph")
    )
    assert int4_bytes < float_bytes and "train: eager: " in printed and "adapter_share_of_decoding" in found
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_failed_and_skipped_parts_are_recorded(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(gpu.Bench, "training", fail)
    monkeypatch.setattr(gpu.Bench, "decoding", lambda *_: time.sleep(0.2) or {"tokens_per_second": 1, "copy_share": 1})
    monkeypatch.setitem(gpu.ORDER, "peer: lora", 1e4)
    found, _ = run(tmp_path, "--skip-tests", "--minutes", 10)
    measures = found["measures"]
    assert measures["train: eager"] == {"error": "OutOfMemoryError: no memory"}
    assert measures["decode: graph, batch 1"]["tokens_per_second"] == 1
    assert measures["peer: lora"] == {"error": "skipped, because too little time was left"}


def test_parts_end_before_the_deadline():
    """Each part takes its expected time on a fake clock. Parts that would end too late are skipped."""
    now, ran = [0.0], []

    def part(name):
        def run():
            now[0] += gpu.ORDER[name]
            return ran.append(name)

        return run

    gpu.run_parts({name: part(name) for name in gpu.ORDER}, 510, lambda name, row: None, lambda: now[0])
    assert 450 < now[0] <= 510 and ran[:3] == ["train: eager", "decode: graph, batch 1", "tests"]
    assert {"peer: adaption prompt", "peer: lora", "train: compiled"} <= set(ran) < set(gpu.ORDER)


def test_batches_have_examples_of_similar_length():
    """Padding takes time, but is not counted as tokens. It adds less than 2% to the number of positions."""
    lengths = [example.num_tokens for batch in gpu.alpaca_batches(SHAPE, 64, 4) for example in batch]
    assert len(lengths) == 256 and 120 < sum(lengths) / 256 < 134
    positions = 0
    for batch in gpu.alpaca_batches(SHAPE, 64, 4):
        for micro_batch in group_by_length(batch, 8192):
            positions += len(micro_batch) * max(example.num_tokens for example in micro_batch)
    assert positions < 1.02 * sum(lengths)


def test_gpu_test_cases_are_found():
    """Without a GPU all cases are collected and skipped, and pytest exits with 0."""
    found = gpu.gpu_tests("tests/test_model.py")
    assert found["exit_code"] == 0 and "14 " in found["output"][-1], found


def test_layers_share_memory_unless_they_are_quantized():
    model = workload.random_model(SHAPE, torch.device("cpu"), torch.float32)
    variants = Variant(attention=gated_attention_paper), Variant(bits="4"), Variant(decoding=True, compiled=True)
    shared, quantized, compiled = (Ours(model, None, variant).model for variant in variants)
    for other in (shared, compiled):
        assert other.layers[0].attention.wq.weight.data_ptr() == model.layers[0].attention.wq.weight.data_ptr()
    assert shared.layers[0].attention.gated is gated_attention_paper and type(model.output) is torch.nn.Linear
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(shared(tokens), model(tokens)) and not torch.equal(quantized(tokens), shared(tokens))


def test_step_operations_are_close_to_those_counted_by_pytorch():
    """Both counts agree to within 15% for a step without recomputation. Neither has the matmuls with keys and values.

    The step has a forward pass, a backward pass through the adapted layers, and the output head at response tokens.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from train import TrainConfig, make_optimizer, train_step

    config = Config(64, 6, 4, 4, 16, 128, 500)
    model = workload.random_model(config, torch.device("cpu"), torch.float32)
    adapter = workload.random_adapter(config, torch.device("cpu"))
    example = make_example(list(range(3, 103)), 50)
    with FlopCounterMode(display=False) as counter:
        train_step(model, adapter, make_optimizer(adapter, 0.02), [example], 1e-3, TrainConfig())
    counted = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert counted == pytest.approx(step_operations(config, 99, 50, False), rel=0.15)
