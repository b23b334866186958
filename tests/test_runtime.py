"""Devices, files, compilation and quantisation."""

import os

import pytest
import torch

from runtime import device
from runtime.device import select_device


def test_select_device():
    assert select_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert select_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert select_device("auto", "auto")[1] == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    for absent in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{absent}' is not available"):
            select_device(absent)


@pytest.mark.parametrize(
    "threads, busy, environment, advised",
    [
        (2, 1.2, {}, True),
        (2, 0.1, {}, False),  # idle
        (1, 1.2, {}, False),  # a thread that waits for nobody
        (2, 1.2, {"OMP_WAIT_POLICY": "passive"}, False),
    ],
)
def test_a_shared_cpu_is_said(monkeypatch, capsys, threads, busy, environment, advised):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(device, "busy_cores", lambda: busy)
    select_device("cpu")
    assert ("OMP_WAIT_POLICY=passive" in capsys.readouterr().err) == advised


def test_other_processes_are_counted(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (5.0, 0.0, 0.0))
    assert 0 <= device.busy_cores() <= 5
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    assert device.busy_cores() == 0
