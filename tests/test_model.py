"""The LLaMA model: logits, decoding with a cache, RoPE, norms, and its configuration."""

import pytest
import torch
from helpers import CONFIGS, QWEN, make_adapter, make_model, make_tokens

from adapter import gated_attention_paper
from benchmarks.peers import as_transformers
from model import Config, KVCache, apply_rope, rope_cos_sin


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_equal_transformers(config):
    pytest.importorskip("transformers")
    model = make_model(config)
    theirs = as_transformers(model)
    tokens = make_tokens(model, 2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [*CONFIGS, *QWEN])
@pytest.mark.parametrize("form", [{}, {"attention": gated_attention_paper}])
def test_cached_decoding_equals_uncached(config, form, device):
    """Rows have unequal lengths, and gates are nonzero. (The cache in nanoGPT's pull request 613 changes outputs.)"""
    model = make_model(config, **form).to(device)
    adaption_prompts = make_adapter(model).to(device)()
    tokens = make_tokens(model, 3, 12).to(device)
    lengths = torch.tensor([7, 4, 1], device=device)
    uncached = model(tokens, adaption_prompts)

    cache = KVCache(model, batch=3, capacity=16)
    padded = tokens[:, :7].clone()
    padded[1, 4:], padded[2, 1:] = 0, 0  # padding must have no effect
    logits = model(padded, adaption_prompts, cache)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], uncached[row, :length], rtol=1e-4, atol=1e-5)
    cache.lengths += lengths
    for _ in range(5):
        step = tokens.gather(1, cache.lengths[:, None])
        logits = model(step, adaption_prompts, cache)[:, 0]
        expected = uncached[torch.arange(3, device=device), cache.lengths]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        cache.lengths += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gates_equal_the_base_in_cached_decoding(dtype, device):
    model = make_model().to(device, dtype)
    tokens = make_tokens(model, 2, 9).to(device)
    results = []
    for adaption_prompts in ((), make_adapter(model).to(device)(gate_scale=0.0, dtype=dtype)):
        cache, logits = KVCache(model, batch=2, capacity=9), []
        for chunk in tokens.split([5, 1, 1, 1, 1], dim=1):
            logits.append(model(chunk, adaption_prompts, cache))
            cache.lengths += chunk.shape[1]
        results.append(torch.cat(logits, dim=1))
    assert torch.equal(*results)


def test_adaption_prompts_are_projected_once_per_generation():
    """The authors' code projects them again at every token."""
    model = make_model()
    adapter = make_adapter(model, layers=1)
    projected = []
    model.layers[-1].attention.wk.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[-2]))
    cache = KVCache(model, batch=1, capacity=8)
    for token in make_tokens(model, 1, 3).split(1, dim=1):
        model(token, adapter(), cache)
        cache.lengths += 1
    assert projected == [1, 5, 1, 1]  # the K = 5 prompts once, and three single tokens


def test_adaption_prompts_for_too_many_layers_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="prompts for 4 layers, but the model has 3 layers"):
        model(make_tokens(model, 1, 2), make_adapter(model, layers=3)() + make_adapter(model, layers=1)())


def test_rope_angles_are_float32_in_a_bfloat16_model(monkeypatch):
    """A table stored in the model would be cast with it. Bfloat16 cannot represent odd positions above 256."""
    model = make_model().bfloat16()
    seen = []
    monkeypatch.setattr("model.apply_rope", lambda x, cos, sin: seen.append((cos, sin)) or apply_rope(x, cos, sin))
    model(make_tokens(model, 1, 300))
    position = torch.arange(300, dtype=torch.float64)[:, None]
    angles = position * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = (part[0, :, 0] for part in seen[0])  # (300, 4)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-4)


def test_rope_keeps_norms_and_depends_only_on_distance():
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def at(vector, position):
        return apply_rope(vector, *rope_cos_sin(torch.tensor([[position]]), Config(head_dim=8)))

    torch.testing.assert_close(at(x, 7).norm(), x.norm(), rtol=1e-6, atol=0)
    near, far = ((at(x, p) * at(y, p + 3)).sum() for p in (0, 50))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_large_values_does_not_overflow():
    """Squares of activations can exceed 65504 (OpenGVLab issue 124), so they must not be computed in float16."""
    norm = make_model().norm.half()
    x = torch.full((1, 32), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(norm(x), norm.weight.detach()[None], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(dim=0), "dim is 0"),
        (dict(dim=True), "dim is True"),
        (dict(n_layers=2.0), "n_layers is 2.0"),
        (dict(n_layers=10**30), "n_layers is 10"),
        (dict(norm_eps=float("nan")), "norm_eps is nan"),
        (dict(rope_theta="10000"), "rope_theta is '10000'"),
        (dict(rope_factors=(1.0, 2.0)), "rope_factors has 2 numbers; expected 64, half of head_dim"),
        (dict(rope_factors=(0.0,) * 64), "an element of rope_factors is 0.0"),
        (dict(n_kv_heads=3), "n_heads 32 is not a multiple of n_kv_heads 3"),
        (dict(head_dim=127), "head_dim is 127"),
    ],
)
def test_invalid_config_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Config(**numbers)
