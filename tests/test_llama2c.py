"""Both layouts of llama2.c checkpoints."""

import struct

import numpy as np
import pytest
import torch
from helpers import make_model

from formats.bases import load_llama
from model import Config


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_both_layouts_are_read(tiny_base, tmp_path, modern, tied):
    """The test writes the files tensor by tensor, in the order of llama2.c's export.py. Invalid files are refused."""
    config = Config(16, 3, 4, 2, 4, 24, 1024, max_seq_len=32)
    model = make_model(config)
    w = model.state_dict()
    stack = {name: torch.stack([w[f"layers.{i}.{name}.weight"] for i in range(3)]) for name in (
        "attention_norm", "ffn_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}  # fmt: skip
    qkvo = [stack[f"attention.{name}"] for name in ("wq", "wk", "wv", "wo")]
    mlp = [stack[f"feed_forward.{name}"] for name in ("w1", "w2", "w3")]
    emb, norm = w["tok_embeddings.weight"], w["norm.weight"]
    numbers = [16, 24, 3, 4, 2, 1024 if tied or modern else -1024, 32]
    if modern:
        header = struct.pack("<Ii7iB", 0x616B3432, 1, *numbers, tied).ljust(256, b"\0")
        tensors = [stack["attention_norm"], stack["ffn_norm"], norm, emb, *qkvo, *mlp]
    else:
        header = struct.pack("<7i", *numbers)
        tables = [torch.zeros(32, 2), torch.zeros(32, 2)]
        tensors = [emb, stack["attention_norm"], *qkvo, stack["ffn_norm"], *mlp, norm, *tables]
    if not tied:
        tensors.append(w["output.weight"])
    path = tmp_path / "model.bin"
    path.write_bytes(header + b"".join(t.numpy().astype("<f4").tobytes() for t in tensors))
    (tmp_path / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())

    for source in (path, tmp_path):
        loaded, _ = load_llama(source)
        expected = w | ({"output.weight": emb} if tied else {})
        assert loaded.config == config
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())

    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model.bin: has [\d,]+ bytes, but its header requires [\d,]+"):
        load_llama(path)
    path.write_bytes(np.random.default_rng(0).bytes(300))  # no magic number: read as the older layout
    with pytest.raises(ValueError, match="model.bin: not a llama2.c checkpoint"):
        load_llama(path)
    for size in (0, 4, 27, 30, 37, 200):
        path.write_bytes((header + bytes(300))[:size])
        with pytest.raises(ValueError, match=rf"model.bin: has (only )?{size} bytes"):
            load_llama(path)


def test_both_layouts_of_stories260k_give_the_same_model(data):
    legacy, _ = load_llama(data / "stories260K")
    modern, _ = load_llama(data / "stories260K_v1" / "checkpoint_v1.bin")
    assert sum(p.numel() for p in legacy.parameters()) == 260_032  # the tied head is counted once
    for (name, a), (_, b) in zip(legacy.named_parameters(), modern.named_parameters()):
        assert torch.equal(a, b), name
