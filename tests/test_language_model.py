"""The toy's pretrained base: its tokenizer and first losses are reproducible, and it knows the almanac."""

import json
from pathlib import Path

import torch

from formats.bases import load_llama
from formats.tokenizers import load_tokenizer
from generate import generate
from toy import language_model
from toy.almanac import KINDS, capitalized
from toy.language_model import BASE, make_base, pretrain_base, train_tokenizer

# Losses of the first 50 steps of the pretraining by `python -m toy`.
LOSSES = json.loads(Path(__file__).with_name("toy_losses.json").read_text())


def test_tokenizer_is_reproducible(tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model", seed=0)
    assert (tmp_path / "tokenizer.model").read_bytes() == (BASE / "tokenizer.model").read_bytes()


def test_first_losses_are_reproducible():
    """The losses do not depend on the number of cores. On different CPUs they are equal up to rounding."""
    _, losses = pretrain_base(load_tokenizer(BASE), stop_after=50)
    assert len(LOSSES) == 50 and max(abs(a - b) for a, b in zip(losses, LOSSES)) < 1e-3
    assert losses[-1] < 4 < losses[0]


def test_base_knows_the_almanac():
    """Greedy decoding completes at least 99% of the facts correctly."""
    model, tokenizer = load_llama(BASE)
    assert sum(p.numel() for p in model.parameters()) == 1_053_824
    rows, expected = [], []
    for kind in KINDS.values():
        for entity, answer in kind.facts.items():
            statement = capitalized(kind.statements[0].format(e=entity, a=answer))
            prefix = statement[: statement.rindex(answer)].rstrip()
            rows.append(tokenizer.start_ids + tokenizer.encode(prefix))
            expected.append(answer)
    correct = []
    for start in range(0, len(rows), 64):
        for ids, answer in zip(generate(model, rows[start : start + 64], max_new_tokens=8), expected[start:]):
            correct.append(tokenizer.decode(ids).strip().startswith(answer))
    assert sum(correct) / len(correct) >= 0.99, [e for e, ok in zip(expected, correct) if not ok]


def test_pretrained_base_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "TOKENS", 2 * language_model.ROWS * language_model.ROW)
    losses = make_base(tmp_path / "base", n_layers=8)
    model, tokenizer = load_llama(tmp_path / "base")
    assert len(losses) == 2 and len(model.layers) == 8 and tokenizer.vocab_size == 1024
    repeated, _ = pretrain_base(tokenizer, n_layers=8)
    tokens = torch.tensor([[1, 5, 9, 7]])
    assert torch.equal(model(tokens), repeated(tokens))
