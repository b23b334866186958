"""What the method is compared with, each against an independent way to compute it; and what a run measures."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from helpers import make_adapter, make_model, make_tokens, make_vit, run
from safetensors.torch import load_file

from adapter import Adapter, gated_attention
from data import Tokens, collate, read_examples, tokenize
from experiments import comparison
from experiments.comparison import (
    FULL,
    GATES_AT_ONE,
    LORA,
    ONE_SOFTMAX,
    ZERO_INIT,
    AllWeights,
    Inside,
    LowAdapter,
    Setting,
    exact,
    fit,
    perplexity,
    set_up,
    tune,
    ungated_attention,
    untouched,
    with_lora,
)
from experiments.comparison import run as run_one
from experiments.paper import make_world
from formats.bases import load_llama
from training.prepare import split
from training.runs import read_metrics
from training.step import RESPONSES, make_optimizer, mean_loss


def test_attention_without_gates_is_one_softmax():
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
    """Bit for bit, of a LLaMA and of an encoder."""
    model = make_model()
    tokens = make_tokens(model, 1, 6)
    before = model(tokens)
    trained = with_lora(model, 2, torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), before)
    assert sum(p.numel() for p in trained) == 3 * 2 * ((32 + 32) + (32 + 16))  # N r (wq's two widths + wv's)
    vit = make_vit()
    image = torch.randn(1, 3, 24, 24)
    before = vit.encode(image)
    with_lora(vit, 2, torch.Generator().manual_seed(0))
    assert torch.equal(vit.encode(image), before)


def test_lora_is_that_of_peft():
    """Of the same A and B, and alpha = r."""
    peft = pytest.importorskip("peft")
    model = make_model()
    for n, p in enumerate(with_lora(model, 2, torch.Generator().manual_seed(0))):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(n))
    theirs = make_model()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["wq", "wv"], bias="none")
    peft.inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for ours, layer in zip(model.layers, theirs.layers):
            for name in ("wq", "wv"):
                lora, other = getattr(ours.attention, name), getattr(layer.attention, name)
                other.lora_A["default"].weight.copy_(lora.a)
                other.lora_B["default"].weight.copy_(lora.b)
    tokens = make_tokens(model, 2, 6)
    torch.testing.assert_close(model(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(tokens), make_model()(tokens), atol=0.1)


def test_an_adapter_of_the_lowest_layers():
    """Against the reference, with an adapter of all layers whose topmost gates are zero."""
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


def test_full_tuning_has_the_whole_gradient():
    """Of every weight, the output head's and the embeddings' included, as autograd has it of plain logits."""
    examples = [Tokens([1, 5, 9, 3, 8, 2], 3, "a"), Tokens([1, 5, 7, 2], 2, "b")]
    batch = collate(examples)
    assert batch.shared == 2
    model, other = make_model().requires_grad_(True), make_model().requires_grad_(True)
    loss = AllWeights().loss_sum(model, Inside(model.parameters()), batch)
    loss.backward()
    expected = 0
    for example in examples:
        log_p = other(torch.tensor([example.ids[:-1]]))[0].log_softmax(dim=1)
        expected = expected - sum(log_p[t, example.ids[t + 1]] for t in range(example.prompt_length - 1, len(log_p)))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
        assert p.grad.abs().max() > 0, name
    with torch.no_grad():
        torch.testing.assert_close(RESPONSES.loss_sum(model, Inside([]), batch), loss)


def test_it_is_the_loop_of_train_py(args, tiny_base, instructions, tmp_path):
    """The same losses, and the same adapter to the last bit."""
    options = [*args, "--warmup-epochs", 1, "--seed", 3]
    assert run(*options).exit_code == 0
    theirs = load_file(tmp_path / "run" / "adapter.safetensors")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]

    model, tokenizer = load_llama(tiny_base)
    tokens, _ = tokenize(tokenizer, read_examples(instructions), 512)
    training, _ = split(tokens, 4, seed=3)
    adapter = Adapter(layers=1, length=3, dim=16, heads=2, generator=torch.Generator().manual_seed(3))
    watched = []
    ours = fit(
        model, adapter, make_optimizer(adapter, 0.02), training, RESPONSES,
        epochs=3, warmup_epochs=1, batch_size=8, lr=0.05, seed=3, watch=watched.append,
    )  # fmt: skip
    assert ours == losses and watched == list(range(len(losses) + 1))
    assert torch.equal(adapter.prompts, theirs["prompts"]) and torch.equal(adapter.gates, theirs["gates"])


def test_what_is_inside_has_no_prompts():
    model = make_model()
    trained = with_lora(model, 2, torch.Generator())
    inside = Inside(trained)
    assert inside(dtype=torch.float32, strength=0.0) == []
    groups = inside.optimizer(0.02).param_groups
    assert [id(p) for group in groups for p in group["params"]] == list(map(id, trained))
    assert make_adapter(model)() != []


# ---------------------------------------------------------------------------------------------------
# One run

METHODS = (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE, LORA, FULL)


@pytest.fixture(scope="module")
def world(tiny_base, instructions):
    examples = read_examples(instructions)
    documents = ["The capital of Peru is Lima, and Anna went home."] * 100
    default, place = Setting(layers=2, lr=0.05, length=3, epochs=3), (torch.device("cpu"), torch.float32)
    return make_world(tiny_base, examples[:30], examples[30:], documents, default, 8, 512, *place)


def test_where_every_method_starts(world):
    """Zero-init, LoRA and full tuning at the base's own loss, bit for bit; random init elsewhere. Each learns."""
    model, learner, _, objective = set_up(world, world.default._replace(method=LORA), 0)
    base = mean_loss(model, learner, world.held_out, 1000)
    for method in METHODS:
        setting = world.default._replace(method=method, lr=0.02)
        model, learner, optimizer, objective = set_up(world, setting, 0)
        loss = mean_loss(model, learner, world.held_out, 1000)
        assert (loss == base) == (method in (ZERO_INIT, LORA, FULL)), method
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in learner.parameters()} == held
        # what a figure says is trained, is; what isn't, is as it was
        frozen = {name: p.clone() for name, p in model.named_parameters() if id(p) not in held}
        gates = learner.gates.clone() if method in METHODS[:3] else None
        before = mean_loss(model, learner, world.tuning, 1000)
        tuned, learner, losses, _ = tune(world, setting, 0)
        assert mean_loss(tuned, learner, world.tuning, 1000) < before and losses == run_one(world, setting, 0)["losses"]
        after = dict(tuned.named_parameters())
        assert all(torch.equal(after[name], p) for name, p in frozen.items())
        if gates is not None:
            assert torch.equal(learner.gates, gates) == (method != ZERO_INIT)


def test_what_a_run_says_of_a_method(world):
    rows = {method: run_one(world, world.default._replace(method=method, lr=0.01), 0) for method in METHODS}
    C, L, K, H = 16, 2, 3, 2
    weights = sum(p.numel() for p in load_llama(world.base)[0].parameters())
    trained = {ZERO_INIT: L * K * C + L * H, ONE_SOFTMAX: L * K * C, GATES_AT_ONE: L * K * C, FULL: weights}
    trained[LORA] = 3 * 8 * (C + C) * 2  # N layers, rank 8, wq and wv
    assert {method: row["trained"] for method, row in rows.items()} == trained
    for method, row in rows.items():
        assert row["bytes"] == 4 * trained[method]
        assert row["recovered"] == (method != FULL)
        assert row["recovered_after_merging"] == (False if method == LORA else None)
        assert row["perplexity"] != untouched(world)[0]


def test_perplexity_of_the_base_s_own_text(world):
    model, adapter, *_ = set_up(world, world.default, 0)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    rows = len(world.text)
    assert rows > 8 and rows % 8 and world.text.shape[1] == 128  # more than go at once, and a rest
    found = []
    for prompts in ((), adapter()):
        log_p = model(world.text, prompts).double().log_softmax(dim=2)
        total = sum(log_p[row, t, world.text[row, t + 1]].item() for row in range(rows) for t in range(127))
        found.append(math.exp(-total / (rows * 127)))
        assert perplexity(world, model, prompts) == pytest.approx(found[-1], rel=1e-5)
    assert untouched(world)[0] == pytest.approx(found[0], rel=1e-5) and found[0] != found[1]


def test_an_answer_is_exact_or_not(world, monkeypatch):
    """The very words, and then the end: room for one token more than the longest answer shows that."""
    asked = {}

    def ask(model, tokenizer, prompts, questions, limit):
        asked["limit"] = limit
        said = [(question.output, True) for question in questions]
        return [(said[0][0] + " indeed", True), (said[1][0], False), *said[2:]]

    monkeypatch.setattr(comparison, "ask", ask)
    model, tokenizer = load_llama(world.base)
    assert exact(world, model, ()) == (len(world.questions) - 2) / len(world.questions)
    assert asked["limit"] == max(len(tokenizer.encode(q.output)) for q in world.questions) + 2


@pytest.mark.parametrize("change", [
    {"method": ONE_SOFTMAX}, {"method": GATES_AT_ONE}, {"layers": 1}, {"where": "bottom"}, {"length": 7}, {"lr": 0.5},
    {"epochs": 4}, {"scale": 0.1}, {"activation": "identity"}, {"gate_per": "layer"}, {"gate_decay": 0.5},
], ids=str)  # fmt: skip
def test_a_setting_changes_what_it_says(world, change):
    (name, value), setting = *change.items(), world.default._replace(**change)
    before, adapter, *_ = set_up(world, world.default, 0)
    model, changed, optimizer, _ = set_up(world, setting, 0)
    seen = {
        "layers": lambda: len(changed.gates) == value,
        "where": lambda: len(changed()) == 3 and all(prompt.gate.abs().max() == 0 for prompt in changed()[2:]),
        "length": lambda: changed.prompts.shape[1] == value,
        "scale": lambda: torch.equal(changed.prompts, value * adapter.prompts),
        "activation": lambda: changed.gate_activation == value,
        "gate_per": lambda: changed.gates.shape == (2, 1) and adapter.gates.shape == (2, 2),
        "gate_decay": lambda: [group["weight_decay"] for group in optimizer.param_groups] == [0.02, value],
    }
    if name in seen:
        assert seen[name]()
    if name == "method":
        used = model.layers[-1].attention.gated
        assert used is (ungated_attention if value == ONE_SOFTMAX else gated_attention)
        assert value == ONE_SOFTMAX or all(prompt.gate.min() == prompt.gate.max() == 1 for prompt in changed())
    ours, theirs = run_one(world, setting, 0), run_one(world, world.default, 0)
    assert ours["losses"] != theirs["losses"] and ours["val_loss"] != theirs["val_loss"]
    assert (len(ours["losses"]) != len(theirs["losses"])) == (name == "epochs")


def test_a_run_that_diverges_is_a_row_all_the_same(world, monkeypatch):
    """Ended with the parameters before that step; its losses from there on are no numbers."""
    update, calls = comparison.update, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError
        return update(*args)

    monkeypatch.setattr(comparison, "update", failing)
    found = run_one(world, world.default._replace(lr=0.07), 0)
    assert [math.isnan(loss) for loss in found["losses"]] == [False] * 4 + [True] * 8 and len(calls) == 5
    assert math.isnan(found["train_loss"]) and math.isfinite(found["val_loss"]) and found["recovered"]


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_bfloat16(world, method):
    """What learns is float32 all the same, and learns as on a base in float32."""
    half = replace(world, dtype=torch.bfloat16)
    model, learner, _, _ = set_up(half, half.default._replace(method=method, lr=0.02), 0)
    assert all(p.dtype == torch.float32 for p in learner.parameters())
    assert model.norm.weight.dtype == (torch.float32 if method == FULL else torch.bfloat16)
    ours, theirs = (run_one(w, w.default._replace(method=method, lr=0.02), 0) for w in (half, world))
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.02)
    assert ours["recovered"] == (method != FULL)
