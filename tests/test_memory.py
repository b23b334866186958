"""The number of positions per forward pass is limited by memory, equal on all ranks, and kept by a resumed run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import run, tensors_and_metrics

import train
from benchmarks.memory import kept_per_token
from benchmarks.sizes import SIZES
from model import LLaMA, num_parameters
from training import memory
from training.memory import activation_bytes, choose_micro_batch_tokens, positions_that_fit


@pytest.fixture(scope="module")
def model():
    """LLaMA-7B in bfloat16 on the meta device."""
    with torch.device("meta"):
        return LLaMA(SIZES["LLaMA-7B"]).to(torch.bfloat16)


def test_activation_bytes_equal_what_autograd_saves(model):
    """The formula is within 2% of the bytes that autograd saves in small layers with the proportions of LLaMA-7B."""
    small = replace(SIZES["LLaMA-7B"], dim=256, n_heads=2, n_kv_heads=2, hidden_dim=688)
    for checkpointed in (False, True):
        per_layer = activation_bytes(small, 11, 4, checkpointed) - activation_bytes(small, 10, 4, checkpointed)
        assert per_layer == pytest.approx(4 * kept_per_token(small, checkpointed), rel=0.02)


@pytest.mark.parametrize("gigabytes, again, expected", [(80, False, 8192), (24, False, 1792), (24, True, 8192)])
def test_positions_depend_on_the_remaining_memory(model, gigabytes, again, expected):
    weights = 2 * num_parameters(model.config)
    positions = positions_that_fit(model, 30, again, gigabytes * 10**9, weights)
    assert positions == expected
    assert weights + positions * activation_bytes(model.config, 30, 2, again) < 0.9 * gigabytes * 10**9
    assert positions_that_fit(model, 30, again, weights, weights) == 256


def test_ranks_agree_on_the_smallest_number_of_positions(model, monkeypatch, capsys):
    """A rank with a GPU of 80 GB uses the number of a rank with 24 GB. On a CPU, the number is 1,024."""
    assert choose_micro_batch_tokens(SimpleNamespace(device=torch.device("cpu")), 30, False) == 1024
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2 * num_parameters(model.config))
    monkeypatch.setattr(memory, "all_reduce_max", lambda number: max(number, -1792))
    monkeypatch.setattr(LLaMA, "device", torch.device("cuda"))
    assert choose_micro_batch_tokens(model, 30, False) == 1792
    assert "1,792 positions per forward pass" in capsys.readouterr().err


def test_resumed_run_keeps_its_micro_batches(args, tmp_path, monkeypatch):
    """Different micro-batches would change the order of sums, and with it their last bits."""
    assert run(*args, "--out", tmp_path / "whole", "--micro-batch-tokens", 60).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_micro_batch_tokens", lambda *arguments: 60)
        assert run(*args, "--max-minutes", 1e-9).exit_code == 0
    assert run(*args, "--resume").exit_code == 0
    whole = tensors_and_metrics(tmp_path / "whole")
    assert tensors_and_metrics(tmp_path / "run") == whole
    assert run(*args, "--out", tmp_path / "other").exit_code == 0
    assert tensors_and_metrics(tmp_path / "other") != whole
