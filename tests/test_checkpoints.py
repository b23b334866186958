"""Reading base models: every layout, and every way in which its files can be wrong."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import copy_base, make_model, peak_anonymous, split_for_parallel

from formats.bases import load_llama, meta_config
from model import SIZES, Config, LLaMA

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
        (dict(vocab_size=7), "params.json: vocab_size is 7, but the weights have 1024"),
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
    (folder / "consolidated.01.pth").write_bytes(whole)
    with pytest.raises(ValueError, match="consolidated.01.pth: .* is in only one of it and consolidated.00.pth"):
        load_llama(folder)
    with pytest.raises(FileNotFoundError, match="absent: no such base"):
        load_llama(tmp_path / "absent")
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match="params.json"):
        load_llama(folder)
    for file in folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(ValueError, match="holds neither params.json"):
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


def test_llama_31s_scaled_rope_in_metas_layout(tiny_base, tmp_path):
    """params.json says only that it is scaled: by 8 in 3.1, by 32 in the small models of 3.2."""
    folder = copy_base(tiny_base, tmp_path / "base", use_scaled_rope=True, rope_theta=5e5)
    assert load_llama(folder)[0].config.rope_scaling == (32, 1, 4, 8192)
    assert meta_config(LLAMA_31_8B, 128256) == replace(SIZES["Llama-3.1-8B"], max_seq_len=None)


def test_sizes_are_those_of_params_json():
    """The files that Meta ships with the weights, against the table."""
    assert meta_config(LLAMA_2_70B, 32000) == replace(SIZES["Llama-2-70B"], max_seq_len=None)
    assert meta_config(LLAMA_13B, 32000) == replace(SIZES["LLaMA-13B"], max_seq_len=None)
    numbers = {
        "LLaMA-7B": 6738415616,
        "Llama-2-70B": 68976648192,
        "Llama-3-8B": 8030261248,
        "TinyLlama-1.1B": 1100048384,
    }
    for name, number in numbers.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in LLaMA(SIZES[name]).parameters()) == number


@pytest.mark.parametrize(
    "weight", [7, torch.zeros(7, 7, 7), torch.zeros(1024, 16, dtype=torch.long), torch.zeros(1024, 16).to_sparse()]
)
def test_weights_that_are_none(tiny_base, tmp_path, weight):
    folder = copy_base(tiny_base, tmp_path / "base")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True) | {"output.weight": weight}
    torch.save(weights, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match="output.weight is (no|of)"):
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


# ---------------------------------------------------------------------------------------------------
# Hugging Face's layout, against transformers itself

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "mha": dict(num_attention_heads=4, num_key_value_heads=4),
    "gqa": dict(num_attention_heads=4, num_key_value_heads=2),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "wide heads": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24),
    "llama3 rope": dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
}


def save_hugging_face(folder, tiny_base, shard_size="1GB", **kind):
    """A random LlamaForCausalLM of logits of order 10, written by save_pretrained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1056,  # more than the tokenizer has, as in many published models
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=256,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        **kind,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        model.lm_head.weight *= 5
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    return model


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_folder_gives_transformers_logits(tiny_base, tmp_path, kind, shard_size):
    theirs = save_hugging_face(tmp_path / "hf", tiny_base, shard_size, **KINDS[kind])
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 2) == (shard_size == "100KB")
    model, _ = load_llama(tmp_path / "hf")
    tokens = torch.randint(1056, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (model(tokens) - expected).abs().max()
    assert expected.abs().max() > 5
    assert difference < 1e-4
    assert model.config.max_seq_len == 256
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_old_config_json_is_read_as_well(tiny_base, tmp_path):
    """Before transformers 5 rope_theta stood by itself, and rope_scaling beside it."""
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["llama3 rope"])
    new, _ = load_llama(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    del values["head_dim"]
    file.write_text(json.dumps(values))
    assert load_llama(tmp_path / "hf")[0].config == new.config


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("vocabulary_first", [False, True])  # LLaMA 1 and 2 split embeddings by width, Llama 3 by token
def test_model_parallel_shards_join_to_the_same_model(tiny_base, tmp_path, n, vocabulary_first):
    """13B comes in 2 files, 33B in 4, 65B and 70B in 8 (OGV 86, 134, 131; lit-llama 405)."""
    config = Config(64, 2, 8, 8, 8, 176, 1024)
    model = make_model(config)
    folder = copy_base(tiny_base, tmp_path / "base", dim=64, n_layers=2, n_heads=8, multiple_of=16)
    for i, shard in enumerate(split_for_parallel(model.state_dict(), n, vocabulary_first)):
        torch.save(shard | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")
    loaded, _ = load_llama(folder)
    assert loaded.config == config
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())


def test_meta_and_hugging_face_layouts_of_the_same_weights_are_one_model(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    first, _ = load_llama(tmp_path / "hf")
    params = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=32, norm_eps=1e-6, ffn_dim_multiplier=0.5)
    folder = copy_base(tiny_base, tmp_path / "meta", **params)
    for i, shard in enumerate(split_for_parallel(first.state_dict(), 2, False)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    second, _ = load_llama(folder)
    tokens = torch.arange(50)[None]
    assert torch.equal(first(tokens), second(tokens))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen2"), "config.json: model_type is 'qwen2'; only 'llama' is supported"),
        (dict(attention_bias=True), "config.json: attention_bias is True; only False"),
        (dict(hidden_act="gelu"), "config.json: hidden_act is 'gelu'"),
        (dict(quantization_config={"bits": 4}), "config.json: quantization_config is"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "config.json: rope_type is 'yarn'"),
        (dict(rope_parameters={"rope_type": "llama3"}), "config.json: has no field 'factor'"),
        (dict(rope_parameters=LLAMA3_ROPE | {"factor": "8"}), "config.json: rope_scaling has '8'"),
        (dict(rope_parameters=LLAMA3_ROPE | {"high_freq_factor": 0.5}), "config.json: rope_scaling .* no room"),
        (dict(hidden_size=None), "config.json: has no field 'hidden_size'"),
        (dict(hidden_size=128), r"is \(\d+,.*its configuration says"),
        (dict(num_hidden_layers=4), "weights of 3 layers, its configuration says 4"),
        (dict(intermediate_size=97), r"w\d.weight is \(\d+, \d+\), its configuration says"),
        (dict(num_key_value_heads=3), "config.json: 4 query heads cannot share 3"),
        (dict(vocab_size=1000), "1000 embeddings, but its tokenizer has 1024"),
        (dict(max_position_embeddings="many"), "config.json: max_seq_len is 'many'"),
        (dict(rms_norm_eps=10**400), "config.json: norm_eps is 1"),
        (dict(hidden_size=2**23, head_dim=16, vocab_size=2**23), "tok_embeddings.weight"),
    ],
)
def test_config_json_that_does_not_fit(tiny_base, tmp_path, changes, message):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_llama(tmp_path / "hf")


def test_missing_and_broken_shards_are_named(tiny_base, tmp_path):
    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, "100KB", **KINDS["gqa"])
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()

    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: .* names it"):
        load_llama(folder)
    for broken in (content[:-1], content[:20], b""):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{shard.name}: not a whole safetensors file"):
            load_llama(folder)
    shard.write_bytes(content)
    for text, message in [
        ("{", "not JSON"),
        ("[]", "is a list, not an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        (good.replace(shard.name, "../" + shard.name), "names it"),
        (good.replace("model.norm.weight", "model.norm.scale"), "says that model.norm.scale is in"),
    ]:
        index.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_llama(folder)
    index.unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors, nor pytorch_model.bin, nor an index"):
        load_llama(folder)
    with pytest.raises(ValueError, match=f"{shard.name}: is a part of a base model; give its folder"):
        load_llama(shard)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin_is_read_as_well(tiny_base, tmp_path, shards):
    """Older repositories, many of Vicuna's among them, have pickles alone: tensors are read, code is not run."""
    from safetensors.torch import load_file

    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    expected, _ = load_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: tensors[name] for name in names if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    loaded, _ = load_llama(folder)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in expected.state_dict().items())
    torch.save({"model.norm.weight": Malicious()}, next(folder.glob("pytorch_model*.bin")))
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        load_llama(folder)


def test_the_tokenizer_may_lie_where_llama_3_has_it(tiny_base, tmp_path):
    folder = tmp_path / "hf"
    save_hugging_face(folder, tiny_base, **KINDS["gqa"])
    (folder / "original").mkdir()
    (folder / "tokenizer.model").rename(folder / "original" / "tokenizer.model")
    assert load_llama(folder)[1].vocab_size == 1024


def test_shards_that_do_not_make_a_whole_are_refused(tiny_base, tmp_path):
    """A file twice, parts that are too many or too few for the width, norms that differ."""
    model = make_model(Config(64, 2, 8, 8, 8, 176, 1024))
    params = dict(dim=64, n_layers=2, n_heads=8, multiple_of=16)
    whole = model.state_dict()
    parts = split_for_parallel(whole, 4, False)
    cases = {
        "whole twice": ([whole, whole], params, "vocab_size|in each of 2 files"),
        "half twice": ([parts[0], parts[0]], params, "512 embeddings, but its tokenizer has 1024"),
        "too narrow": (parts, params | {"multiple_of": 10}, "its configuration says"),
        "norms": (
            [p | {"norm.weight": torch.full((64,), float(i))} for i, p in enumerate(parts)],
            params,
            "not the same",
        ),
        "shapes": ([*parts[:3], parts[3] | {"norm.weight": torch.ones(99)}], params, "different shapes in the 4 files"),
    }
    for case, (shards, numbers, message) in cases.items():
        folder = copy_base(tiny_base, tmp_path / case, **numbers)
        for i, shard in enumerate(shards):
            torch.save(shard, folder / f"consolidated.{i:02}.pth")
        with pytest.raises(ValueError, match=message):
            load_llama(folder)


def test_a_bias_that_a_llama_does_not_have_is_named(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    file = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match="has a weight model.layers.0.self_attn.q_proj.bias that a LLaMA does not have"
    ):
        load_llama(tmp_path / "hf")


def test_missing_meta_shards_are_named(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base")
    (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="has consolidated.01.pth, not consolidated.00.pth"):
        load_llama(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="has no weights, not consolidated.00.pth"):
        load_llama(folder)


def test_a_name_that_is_no_folder_is_told_how_to_become_one():
    with pytest.raises(FileNotFoundError, match="hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"):
        load_llama("meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_model(forks, tiny_base, large_base, dtype):
    """At most 1.15 times the model."""
    results = forks.SimpleQueue()
    process = forks.Process(target=load_and_watch, args=(tiny_base, large_base, dtype, results))
    process.start()
    size, peak = results.get()
    process.join()
    assert size > 250e6
    assert 0.9 * size < peak < 1.15 * size


def load_and_watch(tiny_base, base, dtype, results):
    load_llama(tiny_base)  # so that the libraries' own memory doesn't count
    (model, _), peak = peak_anonymous(lambda: load_llama(base, dtype))
    results.put((sum(p.numel() * p.element_size() for p in model.parameters()), peak))


def test_a_loaded_head_lies_as_a_made_one(tiny_base):
    """(C, V) in memory, which is what makes it fast; a file has it as (V, C)."""
    model, _ = load_llama(tiny_base)
    assert model.output.weight.stride() == LLaMA(model.config).output.weight.stride() == (1, model.config.vocab_size)
