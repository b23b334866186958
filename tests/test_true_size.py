"""python -m benchmarks checkpoint and load, with a small shape."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers import CONFIGS

from benchmarks import true_size
from benchmarks.__main__ import main
from formats.bases import load_llama
from formats.rope import llama3_rope_factors


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def checkpoint(tiny_base, tmp_path, monkeypatch):
    """Write a checkpoint in several shards, with a small shape in place of TinyLlama's.

    Returns the shape, the folder, and the command's standard output.
    """
    shape = replace(CONFIGS["wide"], vocab_size=1100, dim=64, hidden_dim=96, norm_eps=2e-5, rope_theta=7e4)
    shape = replace(shape, rope_factors=llama3_rope_factors(12, 7e4, 32.0), max_seq_len=300)
    monkeypatch.setitem(true_size.SIZES, "TinyLlama-1.1B", shape)
    monkeypatch.setitem(true_size.SCALED, "TinyLlama-1.1B", 32.0)
    monkeypatch.setattr(true_size, "SHARD_BYTES", 150_000)
    args = ("checkpoint", "--size", "TinyLlama-1.1B", "--tokenizer", tiny_base / "tokenizer.model")
    result = run(*args, "--out", tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert "is not empty" in run(*args, "--out", tmp_path / "base").stderr
    return shape, tmp_path / "base", result.stdout


def test_checkpoint_has_the_requested_shape(checkpoint):
    shape, folder, printed = checkpoint
    model, _ = load_llama(folder, torch.bfloat16)
    assert model.config == shape
    shards = sorted(folder.glob("*.safetensors"))
    assert (
        len(shards) > 1
        and f"wrote {sum(file.stat().st_size for file in shards):,} bytes in {len(shards)} sh" in printed
    )
    weights = torch.cat([weight.flatten() for name, weight in model.named_parameters() if "norm" not in name]).float()
    assert weights.std().item() == pytest.approx(0.02, rel=0.02) and weights.mean().abs() < 1e-3
    assert all((weight == 1).all() for name, weight in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("bits", [None, "8", "4"])
def test_load_measures_time_and_memory(checkpoint, tmp_path, bits):
    args = ["load", "--base", checkpoint[1], "--tokens", 16, "--new", 3, "--device", "cpu", "--dtype", "bfloat16"]
    result = run(*args, *(["--bits", bits] if bits else []), "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "a.json").read_text()).values()
    row = found["rows"]["base"]
    assert found["bits"] == (bits or "as dtype") and all(row[name] > 0 for name in row) and len(row) == 8
    assert row["load_bytes"] <= row["peak_bytes"] and row["step_bytes"] <= row["peak_bytes"]
