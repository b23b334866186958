"""Many questions at once: the same answers and likelihoods as one by one, and what leaves no room is left out."""

from dataclasses import replace

import pytest
import torch
from helpers import make_adapter

from formats.bases import load_llama
from generate import Request, Responder
from tasks.answering import likeliest_answers, log_likelihoods, written_answers


@pytest.fixture
def responder(tiny_base):
    model, tokenizer = load_llama(tiny_base)
    return Responder(model, tokenizer, {"a": make_adapter(model)}, max_new_tokens=9)


def one_by_one(responder, request, answer):
    """log p of an answer and its end, by the softmax of the whole model's logits, in float64."""
    prompt = responder.tokens(request)
    ids = prompt + responder.tokenizer.encode(answer) + [responder.tokenizer.eos_id]
    with torch.no_grad():
        log_p = responder.model(torch.tensor([ids]), responder.prompts(request))[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_likelihoods_are_those_of_the_tokens_one_by_one(responder):
    """Of rows with adapters of their own and none."""
    rows = [
        (Request("Hi", "", "a"), "Yes, no."),
        (Request("Hello you", "", "base"), "No"),
        (Request("A", "", "a"), ""),
    ]
    for (request, answer), likelihood in zip(rows, log_likelihoods(responder, rows)):
        assert likelihood == pytest.approx(one_by_one(responder, request, answer), abs=1e-4)


def test_the_likeliest_is_the_likeliest_one_by_one(responder):
    """In the order of the requests, which is not that of their lengths, however many are asked at once."""
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    choices = [["Yes", "No"], ["a b", "c", "d"], ["No", "Yes"], ["", "x"], ["z", "y"], ["y", "z"]]
    expected = [max(ours, key=lambda text: one_by_one(responder, r, text)) for r, ours in zip(requests, choices)]
    assert len({ours.index(text) for ours, text in zip(choices, expected)}) > 1
    for size in (1, 4, 64):
        assert likeliest_answers(responder, requests, choices, size) == expected


def test_written_answers_are_those_of_one_by_one(responder):
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    expected = [next(responder.answer_all([request], 1, "request")) for request in requests]
    assert len(set(expected)) > 1
    for size in (1, 4, 64):
        assert written_answers(responder, requests, size) == expected


def test_answers_must_fit_too(responder):
    """At the last of the base's positions an answer's last word is read, and its end foretold."""
    request, answer = Request("Hi"), "Yes, yes."
    needed = len(responder.tokens(request)) + len(responder.tokenizer.encode(answer))
    for spare, best in ((-1, [None]), (0, [answer])):
        responder.model.config = replace(responder.model.config, max_seq_len=needed + spare)
        assert likeliest_answers(responder, [request], [[answer]], 4) == best


def test_written_answers_need_room_for_one_token(responder):
    short, long = Request("Hi"), Request("word " * 30)
    for room, answered in ((0, False), (1, True)):
        context = len(responder.tokens(long)) + room
        responder.model.config = replace(responder.model.config, max_seq_len=context)
        first, second = written_answers(responder, [long, short])
        assert (first is not None) == answered and second is not None
