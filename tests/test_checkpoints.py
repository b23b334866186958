"""Reading base models: every layout, and every way in which its files can be wrong."""

import struct

import numpy as np
import pytest
import torch
from conftest import copy_base, make_model

from checkpoints import load_llama
from model import Config, LLaMA


def test_meta_folder(tiny_base):
    model, tokenizer = load_llama(tiny_base)
    weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config == Config(16, 3, 2, 2, 8, 48, tokenizer.vocab_size)
    assert load_llama(tiny_base, torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=None), "params.json: has no field 'dim'"),
        (dict(dim="x"), "params.json: dim, n_heads, multiple_of and ffn_dim_multiplier make no model"),
        (dict(n_heads=0), "params.json: dim, n_heads, multiple_of and ffn_dim_multiplier make no model"),
        (dict(ffn_dim_multiplier=float("inf")), "params.json: dim, n_heads, multiple_of"),
        (dict(n_layers="3"), "params.json: n_layers is '3'"),
        (dict(n_heads=3), "params.json: head_dim is 5"),
        (dict(n_heads=1, n_kv_heads=3), "params.json: 1 query heads cannot share 3"),
        (dict(norm_eps="x"), "params.json: norm_eps is 'x'"),
        (dict(rope_theta=0), "params.json: rope_theta is 0"),
        (dict(use_scaled_rope=True), "params.json: use_scaled_rope is not supported"),
        (
            dict(dim=32),
            r"attention_norm.weight is \(16,\), its configuration says \(32,\)|is \(1024, 16\), its",
        ),
        (dict(n_layers=4), "has weights of 3 layers, its configuration says 4"),
        (dict(n_layers=2), "has weights of 3 layers, its configuration says 2"),
        (dict(multiple_of=64), r"w\d.weight is \(\d+, \d+\), its configuration says"),
    ],
)
def test_params_that_disagree_with_the_weights(tiny_base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_llama(copy_base(tiny_base, tmp_path / "base", **changes))


class Malicious:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_broken_checkpoints(tiny_base, tmp_path, capsys):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = folder / "consolidated.00.pth"
    whole = weights.read_bytes()
    for content in (b"", whole[:1000], b"not a checkpoint"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="consolidated.00.pth: not a checkpoint"):
            load_llama(folder)
    torch.save({"tok_embeddings.weight": Malicious()}, weights)
    with pytest.raises(ValueError, match="consolidated.00.pth: not a checkpoint"):
        load_llama(folder)
    assert "ran code" not in capsys.readouterr().out
    torch.save([1, 2], weights)
    with pytest.raises(ValueError, match="consolidated.00.pth: not a checkpoint"):
        load_llama(folder)
    (folder / "consolidated.01.pth").write_bytes(whole)
    with pytest.raises(ValueError, match="has 2 files"):
        load_llama(folder)
    with pytest.raises(FileNotFoundError, match="absent: no such base"):
        load_llama(tmp_path / "absent")
    (folder / "params.json").unlink()
    with pytest.raises(ValueError, match="neither params.json"):
        load_llama(folder)


def test_every_field_of_params_json_counts(tiny_base, tmp_path):
    """Grouped queries, another theta, epsilon and feed-forward width, and LLaMA 1's own table of frequencies."""
    folder = copy_base(
        tiny_base, tmp_path / "base", n_heads=4, n_kv_heads=2, rope_theta=5e5, norm_eps=1e-6, ffn_dim_multiplier=1.3
    )
    config = Config(16, 3, 4, 2, 4, 56, 1024, norm_eps=1e-6, rope_theta=5e5)
    weights = LLaMA(config).state_dict() | {"rope.freqs": torch.ones(2)}
    torch.save(weights, folder / "consolidated.00.pth")
    assert load_llama(folder)[0].config == config


@pytest.mark.parametrize("weight", [7, torch.zeros(1024, 16, dtype=torch.long), torch.zeros(1024, 16).to_sparse()])
def test_weights_that_are_none(tiny_base, tmp_path, weight):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True) | {"output.weight": weight}
    torch.save(weights, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="output.weight is no dense tensor"):
        load_llama(folder)


def test_missing_and_unknown_weights_are_named(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"layers.1.attention.wq.bias": torch.zeros(16)}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="has a weight layers.1.attention.wq.bias that"):
        load_llama(folder)
    del weights["norm.weight"]
    torch.save(weights, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="has no weight norm.weight"):
        load_llama(folder)


def test_an_id_beyond_the_tokenizer_has_no_text(tiny_base):
    """Embeddings are often padded beyond the vocabulary, and such an id can be sampled."""
    _, tokenizer = load_llama(tiny_base)
    ids = tokenizer.encode("cat")
    assert tokenizer.decode([*ids, 1024, 5000]) == "cat"


def test_tokenizer_with_more_tokens_than_embeddings(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    torch.save(LLaMA(Config(16, 3, 2, 2, 8, 48, 1000)).state_dict(), folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="1000 embeddings, but its tokenizer has 1024 tokens"):
        load_llama(folder)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c_layouts(tiny_base, tmp_path, modern, tied):
    """Both of llama2.c's layouts, written here tensor by tensor as its run.c reads them."""
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

    for where in (path, tmp_path):
        loaded, _ = load_llama(where)
        expected = w | ({"output.weight": emb} if tied else {})
        assert loaded.config == config
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())

    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model.bin: \d+ bytes, but its header asks for \d+"):
        load_llama(path)
    path.write_bytes(np.random.default_rng(0).bytes(300))  # no magic, so a header of random numbers
    with pytest.raises(ValueError, match="model.bin: not a llama2.c checkpoint"):
        load_llama(path)
    for size in (0, 4, 27, 30, 37, 200):
        path.write_bytes((header + bytes(300))[:size])
        with pytest.raises(ValueError, match=rf"model.bin: {size} bytes"):
            load_llama(path)


def test_stories260k_both_layouts_are_the_same_model(data):
    legacy, _ = load_llama(data / "stories260K")
    modern, _ = load_llama(data / "stories260K_v1" / "checkpoint_v1.bin")
    assert sum(p.numel() for p in legacy.parameters()) == 260_032  # the tied head counts once
    for (name, a), (_, b) in zip(legacy.named_parameters(), modern.named_parameters()):
        assert torch.equal(a, b), name
