"""What is measured of a run, for every method."""

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
def bed(tiny_base, instructions, tmp_path_factory):
    return make_testbed(tiny_base, instructions, tmp_path_factory.mktemp("testbed"))


def test_what_a_run_says_of_a_method(bed):
    rows = {method: run_setting(bed, bed.default._replace(method=method, lr=0.01), 0) for method in METHODS}
    C, L, K, H = 16, 2, 3, 2
    weights = sum(p.numel() for p in load_llama(bed.base)[0].parameters())
    trained = {ZERO_INIT: L * K * C + L * H, ONE_SOFTMAX: L * K * C, GATES_AT_ONE: L * K * C, FULL: weights}
    trained[LORA] = 3 * 8 * (C + C) * 2  # N layers, rank 8, wq and wv
    assert {method: row["trained"] for method, row in rows.items()} == trained
    for method, row in rows.items():
        assert row["bytes"] == 4 * trained[method]
        assert row["recovered"] == (method != FULL)
        assert row["recovered_after_merging"] == (False if method == LORA else None)
        assert row["perplexity"] != base_measures(bed)[0]
        assert len(row["losses"]) == 12 and row["train_loss"] == sum(row["losses"][8:]) / 4
        assert train_setting(bed, bed.default._replace(method=method, lr=0.01), 0)[1] == row["losses"]


def test_perplexity_of_the_base_s_own_text(bed):
    model, adapter, *_ = set_up(bed.default, 0, bed.base, bed.dtype, bed.device)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    rows = len(bed.text)
    assert rows > 8 and rows % 8 and bed.text.shape[1] == 128  # more than go at once, and a rest
    found = []
    for prompts in ((), adapter()):
        log_p = model(bed.text, prompts).double().log_softmax(dim=2)
        total = sum(log_p[row, t, bed.text[row, t + 1]].item() for row in range(rows) for t in range(127))
        found.append(math.exp(-total / (rows * 127)))
        assert perplexity(bed, model, prompts) == pytest.approx(found[-1], rel=1e-5)
    assert base_measures(bed)[0] == pytest.approx(found[0], rel=1e-5) and found[0] != found[1]


def test_an_answer_is_exact_or_not(bed, monkeypatch):
    """The very words, and then the end: room for one token more than the longest answer shows that."""
    tokenizer, limits = bed.tokenizer, []
    longest = max(len(tokenizer.encode(question.output)) for question in bed.questions)

    def answer(responder, requests, batch_size, unit):
        limits.append(responder.sampling.max_new_tokens)
        outputs = [question.output for question in bed.questions]
        return [outputs[0] + " indeed", None, *outputs[2:]]  # in other words, and without room for an answer

    monkeypatch.setattr(measures, "generate_responses", answer)
    model, _ = load_llama(bed.base)
    assert exact_accuracy(bed, model, NoPrompts([])) == (len(bed.questions) - 2) / len(bed.questions)
    assert limits == [longest + 2]


@pytest.mark.parametrize("change", [
    {"method": ONE_SOFTMAX}, {"method": GATES_AT_ONE}, {"layers": 1}, {"where": "bottom"}, {"length": 7}, {"lr": 0.5},
    {"epochs": 4}, {"scale": 0.1}, {"activation": "identity"}, {"gate_per": "layer"}, {"gate_decay": 0.5},
], ids=str)  # fmt: skip
def test_a_setting_changes_what_comes_of_it(bed, change):
    ours, theirs = run_setting(bed, bed.default._replace(**change), 0), run_setting(bed, bed.default, 0)
    assert ours["losses"] != theirs["losses"] and ours["val_loss"] != theirs["val_loss"]
    assert (len(ours["losses"]) != len(theirs["losses"])) == ("epochs" in change)


def test_a_run_that_diverges_is_a_row_all_the_same(bed, monkeypatch):
    """Ended with the parameters before that step; its losses from there on are no numbers."""
    train_step, calls = train.train_step, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", failing)
    found = run_setting(bed, bed.default._replace(lr=0.07), 0)
    assert [math.isnan(loss) for loss in found["losses"]] == [False] * 4 + [True] * 8 and len(calls) == 5
    assert math.isnan(found["train_loss"]) and math.isfinite(found["val_loss"]) and found["recovered"]


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_bfloat16(bed, method):
    """What learns is float32 all the same, and learns as on a base in float32."""
    half = replace(bed, dtype=torch.bfloat16)
    setting = bed.default._replace(method=method, lr=0.02)
    model, adapter, _, _ = set_up(setting, 0, half.base, half.dtype, half.device)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert model.norm.weight.dtype == (torch.float32 if method == FULL else torch.bfloat16)
    ours, theirs = run_setting(half, setting, 0), run_setting(bed, setting, 0)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.02)
    assert ours["recovered"] == (method != FULL)
