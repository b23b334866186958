"""Bases in Meta's layout, and errors for invalid files."""

from dataclasses import replace

import pytest
import torch
from helpers import Malicious, copy_base, make_model, split_for_parallel

from benchmarks.sizes import SIZES
from formats.bases import load_llama
from formats.meta import meta_config
from formats.rope import llama3_rope_factors
from model import Config, LLaMA

LLAMA_13B = dict(dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-6, vocab_size=-1)


LLAMA_2_70B = dict(
    dim=8192,
    multiple_of=4096,
    ffn_dim_multiplier=1.3,
    n_heads=64,
    n_kv_heads=8,
    n_layers=80,
    norm_eps=1e-5,
    vocab_size=-1,
)


LLAMA_31_8B = dict(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.3, multiple_of=1024,
    norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=None), "params.json: has no field 'dim'"),
        (dict(dim="x"), "params.json: dim is .x., not an integer"),
        (dict(n_heads=0), "params.json: n_heads is 0, not an integer"),
        (dict(ffn_dim_multiplier=float("inf")), "params.json: ffn_dim_multiplier is inf, not a number"),
        (dict(n_layers="3"), "params.json: n_layers is '3'"),
        (dict(n_heads=3), "params.json: head_dim is 5"),
        (dict(n_heads=1, n_kv_heads=3), "params.json: n_heads 1 is not a multiple of n_kv_heads 3"),
        (dict(norm_eps="x"), "params.json: norm_eps is 'x'"),
        (dict(rope_theta=0), "params.json: rope_theta is 0"),
        (dict(vocab_size=7), "params.json: vocab_size is 7, but the weights are for 1024 tokens"),
        (
            dict(dim=32),
            r"attention_norm.weight has shape \(16,\), but the configuration requires \(32,\)|shape \(1024, 16\), but",
        ),
        (dict(n_layers=4), "has weights for 3 layers, but the configuration requires 4"),
        (dict(n_layers=2), "has weights for 3 layers, but the configuration requires 2"),
        (dict(multiple_of=64), r"w\d.weight has shape \(\d+, \d+\), but the configuration requires"),
    ],
)
def test_invalid_params_json_is_refused(tiny_base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_llama(copy_base(tiny_base, tmp_path / "base", **changes))


def test_broken_checkpoints_are_refused(tiny_base, tmp_path, capsys):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = folder / "consolidated.00.pth"
    valid = weights.read_bytes()
    for content in (b"", valid[:1000], b"not a checkpoint"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="consolidated.00.pth: not a "):
            load_llama(folder)
    torch.save({"tok_embeddings.weight": Malicious()}, weights)
    with pytest.raises(ValueError, match="consolidated.00.pth: not a "):
        load_llama(folder)
    assert "ran code" not in capsys.readouterr().out
    torch.save([1, 2], weights)
    with pytest.raises(ValueError, match="consolidated.00.pth: not a "):
        load_llama(folder)
    torch.save({"tok_embeddings.weight": torch.zeros(2)}, weights)
    (folder / "consolidated.01.pth").write_bytes(valid)
    with pytest.raises(ValueError, match="consolidated.01.pth: .* is missing from this file or from consolidated.00"):
        load_llama(folder)
    with pytest.raises(FileNotFoundError, match="absent: no such base"):
        load_llama(tmp_path / "absent")
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match="params.json"):
        load_llama(folder)
    for file in folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(ValueError, match="contains neither consolidated"):
        load_llama(folder)


def test_every_field_of_params_json_is_used(tiny_base, tmp_path):
    """The checkpoint also contains the table rope.freqs, as LLaMA 1's files do. It is ignored."""
    folder = copy_base(
        tiny_base, tmp_path / "base", n_heads=4, n_kv_heads=2, rope_theta=5e5, norm_eps=1e-6, ffn_dim_multiplier=1.3
    )
    config = Config(16, 3, 4, 2, 4, 56, 1024, norm_eps=1e-6, rope_theta=5e5)
    weights = LLaMA(config).state_dict() | {"rope.freqs": torch.ones(2)}
    torch.save(weights, folder / "consolidated.00.pth")
    assert load_llama(folder)[0].config == config


def test_scaled_rope_of_llama_31_is_read(tiny_base, tmp_path):
    """params.json does not state the factor of the scaling: 8 in Llama 3.1, and 32 in the small models of 3.2."""
    folder = copy_base(tiny_base, tmp_path / "base", use_scaled_rope=True, rope_theta=5e5)
    assert load_llama(folder)[0].config.rope_factors == llama3_rope_factors(8, 5e5, 32.0)
    assert meta_config(LLAMA_31_8B, 128256) == replace(SIZES["Llama-3.1-8B"], max_seq_len=None)


def test_sizes_equal_those_of_params_json():
    """Some entries of SIZES are compared with Meta's params.json, or with the published numbers of parameters."""
    assert meta_config(LLAMA_2_70B, 32000) == replace(SIZES["Llama-2-70B"], max_seq_len=None)
    assert meta_config(LLAMA_13B, 32000) == replace(SIZES["LLaMA-13B"], max_seq_len=None)
    num_parameters = {
        "LLaMA-7B": 6738415616,
        "Llama-2-70B": 68976648192,
        "Llama-3-8B": 8030261248,
        "TinyLlama-1.1B": 1100048384,
    }
    for name, number in num_parameters.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in LLaMA(SIZES[name]).parameters()) == number


@pytest.mark.parametrize(
    "weight", [7, torch.zeros(7, 7, 7), torch.zeros(1024, 16, dtype=torch.long), torch.zeros(1024, 16).to_sparse()]
)
def test_invalid_weights_are_refused(tiny_base, tmp_path, weight):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True) | {"output.weight": weight}
    torch.save(weights, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="output.weight (is not|has dtype torch)"):
        load_llama(folder)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("vocabulary_first", [False, True])  # LLaMA 1 and 2 split embeddings by width, Llama 3 by token
def test_model_parallel_shards_are_joined(tiny_base, tmp_path, n, vocabulary_first):
    """LLaMA-13B has 2 files, 33B has 4, 65B and 70B have 8 (OpenGVLab issues 86, 131 and 134; lit-llama issue 405)."""
    config = Config(64, 2, 8, 8, 8, 176, 1024)
    model = make_model(config)
    folder = copy_base(tiny_base, tmp_path / "base", dim=64, n_layers=2, n_heads=8, multiple_of=16)
    for i, shard in enumerate(split_for_parallel(model.state_dict(), n, vocabulary_first)):
        torch.save(shard | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")
    loaded, _ = load_llama(folder)
    assert loaded.config == config
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())


def test_inconsistent_shards_are_refused(tiny_base, tmp_path):
    """A file is repeated, the parts do not add up to the configured width, or the norms differ in values or shape."""
    model = make_model(Config(64, 2, 8, 8, 8, 176, 1024))
    params = dict(dim=64, n_layers=2, n_heads=8, multiple_of=16)
    whole = model.state_dict()
    parts = split_for_parallel(whole, 4, False)
    cases = {
        "whole twice": ([whole, whole], params, "vocab_size|in each of 2 files"),
        "half twice": ([parts[0], parts[0]], params, "512 embeddings, but its tokenizer has 1024"),
        "too narrow": (parts, params | {"multiple_of": 10}, "but the configuration requires"),
        "norms": (
            [p | {"norm.weight": torch.full((64,), float(i))} for i, p in enumerate(parts)],
            params,
            "has different values in the",
        ),
        "shapes": ([*parts[:3], parts[3] | {"norm.weight": torch.ones(99)}], params, "different shapes in the 4 files"),
    }
    for case, (shards, fields, message) in cases.items():
        folder = copy_base(tiny_base, tmp_path / case, **fields)
        for i, shard in enumerate(shards):
            torch.save(shard, folder / f"consolidated.{i:02}.pth")
        with pytest.raises(ValueError, match=message):
            load_llama(folder)


def test_missing_meta_shards_are_named(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="contains consolidated.01.pth; expected consolidated.00.pth"):
        load_llama(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="contains no weights; expected consolidated.00.pth"):
        load_llama(folder)
