"""The method: both attention implementations, the gates and the adapter file."""

import math

import pytest
import reference
import torch
from helpers import CONFIGS, QWEN, make_adapter, make_model, make_tokens
from safetensors.torch import load_file, save_file

from adapter import Adapter, attend, gated_attention, gated_attention_paper
from formats.adapters import load_adapter

FORMS = [gated_attention, gated_attention_paper]


def random_inputs(H, Hkv, D, *, B=3, T=5, S=5, K=4, per_sample, dtype):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    P = B if per_sample else 1
    q, k, v = normal(B, H, T, D), normal(B, Hkv, S, D), normal(B, Hkv, S, D)
    prompt_k, prompt_v, gate = normal(P, Hkv, K, D), normal(P, Hkv, K, D), normal(P, H, 1, 1)
    return q, k, v, prompt_k, prompt_v, gate


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("masking", ["causal", "cached", "none"])
@pytest.mark.parametrize("H, Hkv, D", [(4, 4, 8), (4, 2, 8), (6, 1, 5)])
def test_both_forms_agree_in_value_and_gradient(H, Hkv, D, masking, per_sample, dtype, tolerance, device):
    """Adding gated prompt attention equals concatenating the prompts (lit-llama issue 263, OpenGVLab issue 47)."""
    S = 9 if masking == "cached" else 5
    mask = None
    if masking == "cached":  # the rows have different numbers of cached tokens
        positions = torch.tensor([4, 2, 0])[:, None] + torch.arange(5)  # (B, T)
        mask = (torch.arange(S) <= positions[:, None, :, None]).to(device)
    results = []
    for form in FORMS:
        inputs = random_inputs(H, Hkv, D, S=S, per_sample=per_sample, dtype=dtype)
        inputs = [x.detach().to(device).requires_grad_() for x in inputs]
        output = form(*inputs, mask, masking == "causal")
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([output, *torch.autograd.grad((output * probe.to(device, dtype)).sum(), inputs)])
    for fused, paper in zip(*results):
        assert fused.dtype == dtype
        torch.testing.assert_close(fused, paper, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_attention_equals_the_reference(form):
    """Compare three single queries. The first two query heads share key/value head 0, the last two head 1."""
    q, k, v, prompt_k, prompt_v, gate = random_inputs(4, 2, 8, per_sample=True, dtype=torch.float64)
    output = form(q, k, v, prompt_k, prompt_v, gate, causal=True)
    for b, h, t in [(0, 0, 0), (1, 3, 4), (2, 2, 1)]:
        kv = h // 2
        expected = reference.gated_attention(
            q[b, h, t],
            list(k[b, kv, : t + 1]),
            list(v[b, kv, : t + 1]),
            list(prompt_k[b, kv]),
            list(prompt_v[b, kv]),
            gate[b, h, 0, 0],
        )
        torch.testing.assert_close(output[b, h, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [*CONFIGS, *QWEN])
def test_model_with_nonzero_gates_equals_the_reference(config, form):
    """Compare logits and the adapter's gradients of a whole model, float32 against float64."""
    model = make_model(config, attention=form)
    adapter = make_adapter(model)
    tokens = make_tokens(model, 1, 6)
    logits = model(tokens, adapter())[0]
    prompts, gates = (p.detach().double().requires_grad_() for p in adapter.parameters())
    expected = reference.logits(model.state_dict(), model.config, tokens[0].tolist(), prompts, gates)
    assert (model(tokens)[0] - logits).abs().max() > 0.1  # the prompts have an effect
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)

    logits.log_softmax(-1)[:, 7].sum().backward()
    expected.log_softmax(-1)[:, 7].sum().backward()
    torch.testing.assert_close(adapter.prompts.grad.double(), prompts.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(adapter.gates.grad.double(), gates.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeroed_by", ["gate", "strength"])
def test_zero_gates_equal_the_base_bit_for_bit(dtype, zeroed_by, device):
    """Zero gates and `gate_scale=0` leave the logits unchanged."""
    model = make_model().to(device, dtype)
    adapter = make_adapter(model, layers=3, gates=zeroed_by == "strength").to(device)
    prompts = adapter(gate_scale=0.0 if zeroed_by == "strength" else 1.0, dtype=dtype)
    tokens = make_tokens(model, 2, 7).to(device)
    assert torch.equal(model(tokens, prompts), model(tokens))


def test_gates_move_first():
    """Zero-init attention: in the first step, the gradient of the prompts is exactly zero and that of the gates is not.

    The first step changes only the gates. After the second step, the prompts have changed, too.
    """
    model = make_model()
    adapter = make_adapter(model, gates=False)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    tokens = make_tokens(model, 2, 7)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, adapter()).logsumexp(-1).sum().backward()
        if not moved:
            assert adapter.prompts.grad.abs().max() == 0
            assert (adapter.gates.grad != 0).all()
        optimizer.step()
        moved.append({name: not torch.equal(p, before[name]) for name, p in adapter.named_parameters()})
    assert moved == [{"prompts": False, "gates": True}, {"prompts": True, "gates": True}]


def test_topmost_layers_are_adapted():
    """The adapted layers are the last L, so the states below them do not change (OpenGVLab issue 145)."""
    model = make_model()
    adapter = make_adapter(model, layers=1)
    states = []
    for block in model.layers:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    tokens = make_tokens(model, 1, 4)
    model(tokens)
    model(tokens, adapter())
    base, adapted = states[:3], states[3:]
    assert torch.equal(base[1], adapted[1])
    assert not torch.equal(base[2], adapted[2])


def test_autograd_starts_at_the_first_adapted_layer():
    """Autograd records nothing below the lowest adapted layer, and frozen weights get no gradient."""
    model = make_model()
    adapter = make_adapter(model, layers=1)
    requires_grad = []
    for block in model.layers:
        block.register_forward_hook(lambda _, __, output: requires_grad.append(output.requires_grad))
    model(make_tokens(model, 1, 4), adapter()).sum().backward()
    assert requires_grad == [False, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_condition_is_added_to_every_prompt():
    """A sample's image vector I is added to its prompts, P + I (section 3.3). A zero vector has no effect."""
    model = make_model()
    adapter = make_adapter(model)
    condition = torch.randn(2, model.config.dim, generator=torch.Generator().manual_seed(3))
    condition[1] = 0
    tokens = make_tokens(model, 2, 6)
    logits = model(tokens, adapter(condition))
    shifted = make_adapter(model)
    with torch.no_grad():
        shifted.prompts += condition[0]
    torch.testing.assert_close(logits[0], model(tokens[:1], shifted())[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], model(tokens[1:], adapter())[0], rtol=1e-4, atol=1e-4)


def test_gate_scale_applies_after_the_activation():
    adapter = make_adapter(make_model())
    for full, half in zip(adapter(), adapter(gate_scale=0.5)):
        assert torch.equal(half.gate, full.gate / 2)
        assert torch.equal(half.embeddings, full.embeddings)
    assert torch.equal(adapter()[0].gate.flatten(), adapter.gates[0].tanh())


def test_llama_7b_has_the_papers_parameter_count():
    """The 1.2M parameters are counted on the meta device, without allocating them."""
    with torch.device("meta"):
        adapter = Adapter(layers=30, length=10, dim=4096, heads=32)
    assert sum(p.numel() for p in adapter.parameters()) == 30 * 10 * 4096 + 30 * 32 == 1_229_760


def test_prompts_are_drawn_from_a_normal_distribution_and_gates_are_zero():
    """Users ask how both are initialized (OpenGVLab issue 9, PEFT issue 1175)."""
    adapter = Adapter(layers=4, length=10, dim=256, heads=8, generator=torch.Generator().manual_seed(0))
    assert adapter.gates.abs().max() == 0
    assert abs(adapter.prompts.mean()) < 0.05 and abs(adapter.prompts.std() - 1) < 0.05


def test_parameters_stay_float32_and_outputs_are_cast():
    """Prompts stored in bfloat16 would lose small updates, as they do in PEFT. Only the output of forward() is cast."""
    adapter = make_adapter(make_model())
    prompts = adapter(dtype=torch.bfloat16)
    assert {p.embeddings.dtype for p in prompts} | {p.gate.dtype for p in prompts} == {torch.bfloat16}
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_saved_adapter_is_loaded_unchanged(tmp_path):
    adapter = make_adapter(make_model())
    adapter.save(tmp_path / "a.safetensors", base_layers=3, note="für alle")
    loaded = Adapter.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.prompts, adapter.prompts) and torch.equal(loaded.gates, adapter.gates)
    assert loaded.metadata == adapter.metadata
    assert loaded.metadata["note"] == "für alle" and loaded.metadata["base_dim"] == "32"
    assert set(load_file(tmp_path / "a.safetensors")) == {"prompts", "gates"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_file_stores_the_gate_activation(tmp_path):
    """The authors' training code applies tanh, but their inference code does not, so the file names the activation."""
    adapter = Adapter(layers=1, length=2, dim=4, heads=2, gate_activation="identity")
    torch.nn.init.constant_(adapter.gates, 3.0)
    adapter.save(tmp_path / "a.safetensors")
    loaded = Adapter.load(tmp_path / "a.safetensors")
    assert (loaded.gate_values() == 3.0).all()


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make_adapter(make_model()).save(path)
    before = path.read_bytes()

    def fail(file):
        file.truncate(100)
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full.*a.safetensors"):
        make_adapter(make_model(), seed=9).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


GOOD = {
    "format": "llama-adapter",
    "version": "1",
    "base_dim": "4",
    "base_heads": "2",
    "gate_activation": "tanh",
}


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({}, {"format": "other", "ss_lr": "1"}, r"expected format 'llama-adapter', .* found .'other', '1'.$"),
        ({}, {"version": "7"}, "found .'llama-adapter', '7'."),
        ({}, {"gate_activation": "relu"}, "'relu'; expected one of 'tanh', 'identity'"),
        ({}, {"base_dim": "5"}, "base_dim is 5 in the metadata, but 4 in the tensors"),
        ({}, {"base_heads": "x"}, "base_heads is x in the metadata, but 2 in the tensors"),
        ({}, {"base_layers": "many"}, "base_layers is 'many'"),
        ({}, {"base_layers": "0"}, "base_layers is 0, not an integer from 1"),
        ({"prompts": torch.zeros(1, 0, 4)}, {}, r"prompts \(1, 0, 4\)"),
        ({"prompts": torch.zeros(3, 4)}, {}, r"prompts \(3, 4\)"),
        ({"prompts": torch.zeros(2, 3, 4)}, {}, r"prompts \(2, 3, 4\) and gates \(1, 2\)"),
        ({"gates": torch.full((1, 2), math.nan)}, {}, "gates contains values that are not finite"),
        ({"gates": torch.zeros(1, 2, dtype=torch.float16)}, {}, "expected float32, found torch.float16 in gates"),
        ({"more": torch.zeros(1)}, {}, "more"),
    ],
)
def test_bad_files_are_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "bad.safetensors"
    save_file({"prompts": torch.zeros(1, 3, 4), "gates": torch.zeros(1, 2)} | tensors, path, GOOD | metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(path)
    assert "bad.safetensors" in str(caught.value)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    make_adapter(make_model()).save(path)
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_adapter(path)
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        load_adapter(tmp_path / "absent")


@pytest.mark.parametrize(
    "base, message",
    [
        (dict(layers=4, dim=32, heads=4), "layers = 3, but this base has layers = 4"),
        (dict(layers=3, dim=64, heads=4), "dim = 32, but this base has dim = 64"),
        (dict(layers=3, dim=32, heads=8), "heads = 4, but this base has heads = 8"),
    ],
)
def test_error_about_a_base_of_a_different_shape_names_both_numbers(base, message):
    adapter = make_adapter(make_model())
    adapter.metadata["base_layers"] = "3"
    adapter.check_base(layers=3, dim=32, heads=4)
    with pytest.raises(ValueError, match=message):
        adapter.check_base(**base)
    del adapter.metadata["base_layers"]
    with pytest.raises(ValueError, match="prompts for 2 layers, but the base has 1 layers"):
        adapter.check_base(layers=1, dim=32, heads=4)


def test_plain_attention_is_scaled_and_causal():
    """Compare one query of `attend`, which the base uses without an adapter, with the reference."""
    q, k, v, *_ = random_inputs(2, 2, 8, per_sample=False, dtype=torch.float64)
    output = attend(q, k, v, causal=True)
    expected = reference.gated_attention(q[1, 1, 2], list(k[1, 1, :3]), list(v[1, 1, :3]), [], [], None)
    torch.testing.assert_close(output[1, 1, 2], expected, rtol=1e-12, atol=1e-12)
