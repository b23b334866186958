"""Devices, files, compilation and quantisation."""

import pytest
import torch

from runtime.device import select_device


def test_select_device():
    assert select_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert select_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert select_device("auto", "auto")[1] == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    for absent in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{absent}' is not available"):
            select_device(absent)
