"""The measurements of a run: losses, accuracy, perplexity, number of parameters, and whether the base is recovered."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import make_testbed

import train
from experiments import measures
from experiments.measures import base_measures, exact_accuracy, perplexity, train_setting
from experiments.methods import FULL, GATES_AT_ONE, LORA, ONE_SOFTMAX, ZERO_INIT, NoPrompts, set_up
from formats.bases import load_llama

run_setting = cache(measures.run_setting)
METHODS = (ZERO_INIT, ONE_SOFTMAX, GATES_AT_ONE, LORA, FULL)


@pytest.fixture(scope="module")
def testbed(tiny_base, instructions):
    return make_testbed(tiny_base, instructions)


def test_every_method_is_measured(testbed):
    rows = {method: run_setting(testbed, testbed.default._replace(method=method, lr=0.01), 0) for method in METHODS}
    C, L, K, H = 16, 2, 3, 2
    weights = sum(p.numel() for p in load_llama(testbed.base)[0].parameters())
    trained = {ZERO_INIT: L * K * C + L * H, ONE_SOFTMAX: L * K * C, GATES_AT_ONE: L * K * C, FULL: weights}
    trained[LORA] = 3 * 8 * (C + C) * 2  # N layers, rank 8, wq and wv
    assert {method: row["trained"] for method, row in rows.items()} == trained
    for method, row in rows.items():
        assert row["bytes"] == 4 * trained[method]
        assert row["recovered"] == (method != FULL)
        assert row["recovered_after_merging"] == (False if method == LORA else None)
        assert row["perplexity"] != base_measures(testbed)[0]
        assert len(row["losses"]) == 12 and row["train_loss"] == sum(row["losses"][8:]) / 4
        assert train_setting(testbed, testbed.default._replace(method=method, lr=0.01), 0)[1] == row["losses"]


def test_perplexity_equals_its_definition(testbed):
    model, adapter, *_ = set_up(testbed.default, 0, testbed.base, testbed.dtype, testbed.device)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    rows = len(testbed.text)
    assert rows > 8 and rows % 8 and testbed.text.shape[1] == 128  # several batches of 8, the last one smaller
    found = []
    for prompts in ((), adapter()):
        log_p = model(testbed.text, prompts).double().log_softmax(dim=2)
        total = sum(log_p[row, t, testbed.text[row, t + 1]].item() for row in range(rows) for t in range(127))
        found.append(math.exp(-total / (rows * 127)))
        assert perplexity(testbed, model, prompts) == pytest.approx(found[-1], rel=1e-5)
    assert base_measures(testbed)[0] == pytest.approx(found[0], rel=1e-5) and found[0] != found[1]


def test_only_exact_answers_count(testbed, monkeypatch):
    """An answer that continues after the expected text is wrong, and so is a missing answer.

    The token limit is two above the longest expected answer.
    """
    tokenizer, limits = testbed.tokenizer, []
    longest = max(len(tokenizer.encode(question.output)) for question in testbed.questions)

    def answer(responder, requests, batch_size, unit):
        limits.append(responder.sampling.max_new_tokens)
        outputs = [question.output for question in testbed.questions]
        return [outputs[0] + " indeed", None, *outputs[2:]]  # None: the prompt left no room for an answer

    monkeypatch.setattr(measures, "generate_responses", answer)
    model, _ = load_llama(testbed.base)
    assert exact_accuracy(testbed, model, NoPrompts([])) == (len(testbed.questions) - 2) / len(testbed.questions)
    assert limits == [longest + 2]


@pytest.mark.parametrize("change", [
    {"method": ONE_SOFTMAX}, {"method": GATES_AT_ONE}, {"layers": 1}, {"where": "bottom"}, {"length": 7}, {"lr": 0.5},
    {"epochs": 4}, {"scale": 0.1}, {"activation": "identity"}, {"gate_per": "layer"}, {"gate_decay": 0.5},
], ids=str)  # fmt: skip
def test_settings_change_the_losses(testbed, change):
    changed, default = (
        run_setting(testbed, testbed.default._replace(**change), 0),
        run_setting(testbed, testbed.default, 0),
    )
    assert changed["losses"] != default["losses"] and changed["val_loss"] != default["val_loss"]
    assert (len(changed["losses"]) != len(default["losses"])) == ("epochs" in change)


def test_diverging_run_still_has_a_row(testbed, monkeypatch):
    """The run ends with the parameters from before the failed step. The losses from that step on are NaN."""
    train_step, calls = train.train_step, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", failing)
    found = run_setting(testbed, testbed.default._replace(lr=0.07), 0)
    assert [math.isnan(loss) for loss in found["losses"]] == [False] * 4 + [True] * 8 and len(calls) == 5
    assert math.isnan(found["train_loss"]) and math.isfinite(found["val_loss"]) and found["recovered"]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_base_trains_like_float32(testbed, method):
    """The trained parameters are float32, and the validation loss is within 2% of that on a float32 base."""
    bfloat16_testbed = replace(testbed, dtype=torch.bfloat16)
    setting = testbed.default._replace(method=method, lr=0.02)
    model, adapter, _, _ = set_up(setting, 0, bfloat16_testbed.base, bfloat16_testbed.dtype, bfloat16_testbed.device)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert model.norm.weight.dtype == (torch.float32 if method == FULL else torch.bfloat16)
    found, expected = run_setting(bfloat16_testbed, setting, 0), run_setting(testbed, setting, 0)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=0.02)
    assert found["recovered"] == (method != FULL)
