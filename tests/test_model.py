"""LLaMA itself: against transformers and llama2.c, the cache, the checkpoints."""

import json
import struct

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_adapter, make_model, make_tokens

from adapter import gated_attention_paper
from model import Config, KVCache, LLaMA, choose, fingerprint, load_llama


def to_hugging_face(weights, config):
    """Meta's names to Hugging Face's, rows of q and k from interleaved pairs to halves."""

    def halves(w):
        return w.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    renamed = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for n in range(config.n_layers):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        for a, b in names.items():
            renamed[f"{theirs}{b}.weight"] = weights[f"{ours}{a}.weight"]
        for a, b in (("wq", "q_proj"), ("wk", "k_proj")):
            renamed[f"{theirs}self_attn.{b}.weight"] = halves(weights[f"{ours}attention.{a}.weight"])
    return renamed


@pytest.mark.parametrize("config", CONFIGS)
def test_base_equals_transformers(config):
    transformers = pytest.importorskip("transformers")
    model = make_model(config)
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.hidden_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
        )
    )
    theirs.load_state_dict(to_hugging_face(model.state_dict(), c))
    tokens = make_tokens(model, 2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", [{}, {"attention": gated_attention_paper}])
def test_decoding_equals_rescoring(config, form, device):
    """Cached output must equal uncached output (nanoGPT 613), rows of unequal length and open gates included."""
    model = make_model(config, **form).to(device)
    prompts = make_adapter(model).to(device)()
    tokens = make_tokens(model, 3, 12).to(device)
    lengths = torch.tensor([7, 4, 1], device=device)
    whole = model(tokens, prompts)

    cache = KVCache(model, batch=3, length=16)
    padded = tokens[:, :7].clone()
    padded[1, 4:], padded[2, 1:] = 0, 0  # what follows a row's own tokens is of no account
    logits = model(padded, prompts, cache)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], whole[row, :length], rtol=1e-4, atol=1e-5)
    cache.lengths += lengths
    for _ in range(5):
        step = tokens.gather(1, cache.lengths[:, None])
        logits = model(step, prompts, cache)[:, 0]
        expected = whole[torch.arange(3, device=device), cache.lengths]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        cache.lengths += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gates_are_the_base_in_cached_decoding_too(dtype, device):
    model = make_model().to(device, dtype)
    tokens = make_tokens(model, 2, 9).to(device)
    runs = []
    for prompts in ((), make_adapter(model).to(device)(strength=0.0, dtype=dtype)):
        cache, logits = KVCache(model, batch=2, length=9), []
        for chunk in tokens.split([5, 1, 1, 1, 1], dim=1):
            logits.append(model(chunk, prompts, cache))
            cache.lengths += chunk.shape[1]
        runs.append(torch.cat(logits, dim=1))
    assert torch.equal(*runs)


def test_prompts_are_projected_once_per_generation():
    """The authors' code projects them anew at every token."""
    model = make_model()
    adapter = make_adapter(model, layers=1)
    projected = []
    model.layers[-1].attention.wk.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[1]))
    cache = KVCache(model, batch=1, length=8)
    for token in make_tokens(model, 1, 3).split(1, dim=1):
        model(token, adapter(), cache)
        cache.lengths += 1
    assert projected == [1, 5, 1, 1]  # a prompt of 5, among three single tokens


def test_too_many_prompts_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="4 layers of prompts for a model of 3 layers"):
        model(make_tokens(model, 1, 2), make_adapter(model, layers=3)() + make_adapter(model, layers=1)())


def test_positions_far_out_stay_exact_in_bfloat16():
    """Angles are float32 whatever the model is: a table in bfloat16 would mix up positions beyond 256."""
    model = make_model()
    q = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    from model import rope_angles, rotate

    at = [rotate(q, *rope_angles(torch.tensor([[p]]), model.bfloat16().config)) for p in (1000, 1001)]
    assert (at[0] - at[1]).abs().max() > 0.1


def test_choose():
    assert choose("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert choose("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    for absent in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{absent}' is not to be had"):
            choose(absent)


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def test_meta_folder(tiny_base):
    model, tokenizer = load_llama(tiny_base)
    weights = torch.load(tiny_base / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config == Config(16, 3, 2, 2, 8, 48, tokenizer.vocab_size)
    assert load_llama(tiny_base, torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16


def test_fingerprint_knows_the_weights_and_not_the_dtype(tiny_base):
    model, _ = load_llama(tiny_base)
    same, _ = load_llama(tiny_base, torch.bfloat16)
    assert fingerprint(model) == fingerprint(same) != fingerprint(make_model())


def copy_base(source, target, **changes):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    params = json.loads((target / "params.json").read_text()) | changes
    (target / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=None), "params.json: has no field 'dim'"),
        (dict(dim="x"), "params.json: not the parameters of a LLaMA"),
        (dict(n_heads=0), "params.json: not the parameters of a LLaMA"),
        (
            dict(dim=32),
            r"attention_norm.weight is \(16,\), its configuration says \(32,\)|is \(1024, 16\), its",
        ),
        (dict(n_layers=4), "has no weight layers.3"),
        (dict(n_layers=2), "has a weight layers.2"),
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
    path.write_bytes(np.random.default_rng(0).bytes(300))
    with pytest.raises(ValueError, match="model.bin: not a llama2.c checkpoint"):
        load_llama(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        load_llama(path)


def test_stories260k_both_layouts_are_the_same_model(data):
    legacy, _ = load_llama(data / "stories260K")
    modern, _ = load_llama(data / "stories260K_v1" / "checkpoint_v1.bin")
    assert sum(p.numel() for p in legacy.parameters()) - legacy.output.weight.numel() == 260_032
    for (name, a), (_, b) in zip(legacy.named_parameters(), modern.named_parameters()):
        assert torch.equal(a, b), name
