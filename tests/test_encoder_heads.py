"""Adapter files for encoders: the head is saved and loaded with the prompts and gates."""

import pytest
import torch
from safetensors.torch import load_file

from adapter import Adapter
from encoders.heads import HeadAdapter
from formats.adapters import load_adapter


@pytest.mark.parametrize("widths", [[32, 5], [32, 7, 5]])
def test_adapter_file_contains_the_head(tmp_path, widths):
    adapter = HeadAdapter(layers=2, length=3, dim=32, heads=4, widths=widths, head_activation="gelu")
    adapter.save(tmp_path / "a.safetensors", task="text-classification")
    for load in (HeadAdapter.load, load_adapter):
        loaded = load(tmp_path / "a.safetensors")
        assert type(loaded) is HeadAdapter
        assert torch.equal(loaded.head(torch.ones(32)), adapter.head(torch.ones(32)))
        assert torch.equal(loaded.prompts, adapter.prompts)
    names = set(load_file(tmp_path / "a.safetensors"))
    assert names == {"prompts", "gates"} | {
        f"head.{i}.{k}" for i in range(0, 2 * len(widths) - 2, 2) for k in ("weight", "bias")
    }
    for name, value in (("stride", "-1"), ("unanswerable", "many"), ("max_seq_len", "0")):
        adapter.save(tmp_path / "b.safetensors", task="question-answering", **{name: value})
        with pytest.raises(ValueError, match=f"b.safetensors: {name}"):
            load_adapter(tmp_path / "b.safetensors")
        del adapter.metadata[name]
    Adapter(layers=1, length=1, dim=8, heads=2).save(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="has no head, so it is not an adapter for an encoder"):
        HeadAdapter.load(tmp_path / "text.safetensors")
