"""The methods that are compared with LLaMA-Adapter, the loop that trains them, and their settings."""

import builtins
import math

import pytest
import reference
import torch
from helpers import make_adapter, make_example, make_model, make_testbed, make_tokens, make_vit, run
from safetensors.torch import load_file

from adapter import Adapter, gated_attention
from data import AlpacaTemplate, hold_out, read_examples, tokenize
from experiments.methods import (
    FULL,
    GATES_AT_ONE,
    LORA,
    ONE_SOFTMAX,
    ZERO_INIT,
    LowAdapter,
    NoPrompts,
    Trainable,
    add_lora,
    finite_steps,
    lora_layers,
    set_up,
    whole_model_loss,
    ungated_attention,
)
from formats.bases import load_llama
from train import TrainConfig, make_optimizer, mean_loss, response_loss
from training.run_files import read_metrics

METHODS = (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE, LORA, FULL)


def test_ungated_attention_is_one_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    prompt_k, prompt_v = torch.randn(2, 1, 4, 3, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    ours = ungated_attention(q, k, v, prompt_k, prompt_v, None, mask)
    scores = q @ torch.cat([prompt_k.expand(2, -1, -1, -1), k], 2).transpose(2, 3) / 8**0.5
    scores[..., 3:] = scores[..., 3:].masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ torch.cat([prompt_v.expand(2, -1, -1, -1), v], 2)
    torch.testing.assert_close(ours, expected)
    causal = ungated_attention(q, k, v, prompt_k, prompt_v, None, None, True)
    before = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(causal, ungated_attention(q, k, v, prompt_k, prompt_v, None, before))
    assert not torch.allclose(causal, ungated_attention(q, k, v, prompt_k, prompt_v, None))


def test_lora_starts_as_the_base():
    """The outputs of a LLaMA and a ViT are unchanged bit for bit. Initial values depend on the given seed only."""
    model = make_model()
    tokens = make_tokens(model, 1, 6)
    before, state = model(tokens), torch.get_rng_state()
    trained = add_lora(model, 2, seed=0)
    assert torch.equal(model(tokens), before) and torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in trained) == 3 * 2 * ((32 + 32) + (32 + 16))  # N r (wq's two widths + wv's)
    torch.manual_seed(5)
    again, other = add_lora(make_model(), 2, seed=0), add_lora(make_model(), 2, seed=1)
    assert all(map(torch.equal, trained, again)) and not all(map(torch.equal, trained, other))
    vit = make_vit()
    image = torch.randn(1, 3, 24, 24)
    before = vit.encode(image)
    add_lora(vit, 2, seed=0)
    assert torch.equal(vit.encode(image), before)


def test_lora_adds_a_product_to_wq_and_wv():
    """LoRA with scale 1 equals a model with B A added to its weights. Disabled, it equals the base bit for bit."""
    model, plain = make_model(), make_model()
    for n, p in enumerate(add_lora(model, 2, seed=0)):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(n))
    tokens, weights = make_tokens(model, 2, 6), dict(plain.named_parameters())
    before = plain(tokens)
    products = 0
    for name, layer in model.named_modules():
        if any(layer is lora for lora in lora_layers(model)):
            weights[f"{name}.weight"] += layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            products += 1
    assert products == 3 * 2
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(tokens), before, atol=0.1)
    for layer in lora_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(model(tokens), before)


def test_missing_peft_is_a_one_line_error(monkeypatch):
    original = builtins.__import__

    def import_without_peft(name, *args, **options):
        if name == "peft":
            raise ImportError
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_peft)
    with pytest.raises(ValueError, match="^the comparison with LoRA .* pip install peft$"):
        add_lora(make_model(), 2, seed=0)


def test_adapter_of_the_lowest_layers_equals_the_reference():
    """The reference has an adapter of all layers, with zero gates in the topmost one."""
    model = make_model()
    low = LowAdapter(above=1, layers=2, length=4, dim=32, heads=4, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(low.gates, generator=torch.Generator().manual_seed(2))
    tokens = make_tokens(model, 1, 5)
    prompts = torch.cat([low.prompts.detach(), torch.ones(1, 4, 32)])
    gates = torch.cat([low.gates.detach(), torch.zeros(1, 4)])
    theirs = reference.logits(model.state_dict(), model.config, tokens[0].tolist(), prompts, gates)
    torch.testing.assert_close(model(tokens, low())[0].double(), theirs, rtol=1e-4, atol=1e-4)
    model(tokens, low()).sum().backward()
    assert low.gates.grad.abs().min() > 0 and low.prompts.grad.abs().amax(dim=(1, 2)).min() > 0


def test_full_tuning_has_the_gradient_of_every_weight():
    """Compare with autograd on plain logits. The output head and the embeddings are included."""
    examples = [make_example([1, 5, 9, 3, 8, 2], 3, "a"), make_example([1, 5, 7, 2], 2, "b")]
    model, other = make_model().requires_grad_(True), make_model().requires_grad_(True)
    loss = whole_model_loss(model, NoPrompts(model.parameters()), examples)
    loss.backward()
    expected = 0
    for example in examples:
        log_p = other(torch.tensor([example.ids[:-1]]))[0].log_softmax(dim=1)
        expected = expected - sum(log_p[t, id] for t, id in enumerate(example.ids[1:]) if example.loss_mask[t + 1])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
        assert p.grad.abs().max() > 0, name
    with torch.no_grad():
        torch.testing.assert_close(response_loss(model, NoPrompts([]), examples), loss)
    assert sum(example.num_targets for example in examples) == 5


def test_no_prompts_contains_the_trained_parameters():
    model = make_model()
    trained = add_lora(model, 2, seed=0)
    adapter = NoPrompts(trained)
    assert adapter(dtype=torch.float32, gate_scale=0.0) == []
    (group,) = adapter.make_optimizer().param_groups
    assert [id(p) for p in group["params"]] == list(map(id, trained)) and group["weight_decay"] == 0.02
    head = torch.nn.Linear(3, 2)
    assert set(NoPrompts(trained, head).parameters()) == {*trained, *head.parameters()}
    assert make_adapter(model)() != []


def test_finite_steps_equal_the_loop_of_train_py(args, tiny_base, instructions, tmp_path):
    """The losses and the trained adapter are equal bit for bit."""
    options = [*args, "--warmup-epochs", 1, "--seed", 3]
    assert run(*options).exit_code == 0
    theirs = load_file(tmp_path / "run" / "adapter.safetensors")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]

    model, tokenizer = load_llama(tiny_base)
    tokens, _ = tokenize(AlpacaTemplate(tokenizer), read_examples(instructions), 512)
    training, _ = hold_out(tokens, 4, seed=3)
    adapter = Adapter(layers=1, length=3, dim=16, heads=2, generator=torch.Generator().manual_seed(3))
    trainable = Trainable(model, adapter, make_optimizer(adapter, 0.02))
    config = TrainConfig(epochs=3, warmup_epochs=1, batch_size=8, lr=0.05, seed=3)
    steps = list(finite_steps(trainable, training, config))
    assert [step.loss for step in steps] == losses and [step.number for step in steps] == list(range(1, 16))
    assert torch.equal(adapter.prompts, theirs["prompts"]) and torch.equal(adapter.gates, theirs["gates"])


def test_finite_steps_end_at_non_finite_values(tiny_base, instructions):
    """The parameters keep their values from before the failed step."""
    model, tokenizer = load_llama(tiny_base)
    tokens, _ = tokenize(AlpacaTemplate(tokenizer), read_examples(instructions), 512)
    adapter = Adapter(layers=1, length=3, dim=16, heads=2)
    trainable = Trainable(model, adapter, make_optimizer(adapter, 0.0))
    steps = finite_steps(trainable, tokens, TrainConfig(epochs=3, warmup_epochs=1, batch_size=8, lr=0.05))
    taken = [next(steps) for _ in range(4)]
    before = [p.detach().clone() for p in adapter.parameters()]
    model.norm.weight.data.fill_(math.nan)
    assert list(steps) == [] and [step.number for step in taken] == [1, 2, 3, 4]
    assert all(map(torch.equal, adapter.parameters(), before))


# ---------------------------------------------------------------------------------------------------
# Settings


@pytest.fixture(scope="module")
def testbed(tiny_base, instructions):
    return make_testbed(tiny_base, instructions)


def set_up_method(testbed, **changes):
    return set_up(testbed.default._replace(**changes), 0, testbed.base, testbed.dtype, testbed.device)


def test_every_method_starts_and_trains_as_described(testbed):
    """Zero-init, LoRA and full tuning start exactly at the base's loss, unlike the other two. Every loss falls."""
    base, _ = load_llama(testbed.base)
    start = mean_loss(base, NoPrompts([torch.nn.Parameter(torch.zeros(1))]), testbed.held_out, TrainConfig())
    for method in METHODS:
        model, adapter, optimizer, _ = trainable = set_up_method(testbed, method=method, lr=0.02)
        loss = mean_loss(model, adapter, testbed.held_out, TrainConfig())
        assert (loss == start) == (method in (ZERO_INIT, LORA, FULL)), method
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in adapter.parameters() if p.requires_grad} == optimized
        # The optimizer has all trainable parameters, and no other parameter changes.
        frozen = {name: p.clone() for name, p in model.named_parameters() if id(p) not in optimized}
        gates = adapter.gates.clone() if method in METHODS[:3] else None
        before = mean_loss(model, adapter, testbed.training, TrainConfig())
        steps = list(
            finite_steps(trainable, testbed.training, testbed.train_config(testbed.default._replace(lr=0.02), 0))
        )
        assert len(steps) == 12 and mean_loss(model, adapter, testbed.training, TrainConfig()) < before
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], p) for name, p in frozen.items())
        if gates is not None:
            assert torch.equal(adapter.gates, gates) == (method != ZERO_INIT)


@pytest.mark.parametrize("change", [
    {"method": ONE_SOFTMAX}, {"method": GATES_AT_ONE}, {"layers": 1}, {"where": "bottom"}, {"length": 7},
    {"scale": 0.1}, {"activation": "identity"}, {"gate_per": "layer"}, {"gate_decay": 0.5},
], ids=str)  # fmt: skip
def test_settings_of_an_adapter_are_applied(testbed, change):
    ((name, value),) = change.items()
    adapter, (model, changed, optimizer, _) = set_up_method(testbed).adapter, set_up_method(testbed, **change)
    used = model.layers[-1].attention.gated
    assert used is (ungated_attention if value == ONE_SOFTMAX else gated_attention)
    expected = {
        "method": lambda: (
            value == ONE_SOFTMAX or all(prompt.gate.min() == prompt.gate.max() == 1 for prompt in changed())
        ),
        "layers": lambda: len(changed.gates) == value,
        "where": lambda: len(changed()) == 3 and all(prompt.gate.abs().max() == 0 for prompt in changed()[2:]),
        "length": lambda: changed.prompts.shape[1] == value,
        "scale": lambda: torch.equal(changed.prompts, value * adapter.prompts),
        "activation": lambda: changed.gate_activation == value,
        "gate_per": lambda: changed.gates.shape == (2, 1) and adapter.gates.shape == (2, 2),
        "gate_decay": lambda: [group["weight_decay"] for group in optimizer.param_groups] == [0.02, value],
    }
    assert expected[name]()
