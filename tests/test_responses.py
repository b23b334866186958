"""Many questions at once: the same answers and likelihoods as one by one, and what leaves no room is left out."""

from dataclasses import replace

import pytest
import torch
from helpers import make_adapter

from data import Request
from formats.bases import load_llama
from generate import Responder
from multimodal import ImageAdapter
from tasks import scoring
from tasks.responses import choice_log_likelihoods, most_likely_choices, generate_responses


@pytest.fixture
def responder(tiny_base):
    model, tokenizer = load_llama(tiny_base)
    return Responder(model, tokenizer, {"a": make_adapter(model)}, max_new_tokens=9)


def one_by_one(responder, request, answer):
    """log p of an answer and its end, by the softmax of the whole model's logits, in float64."""
    prompt = responder.prompt_ids(request)
    ids = prompt + responder.tokenizer.encode(answer) + [responder.tokenizer.eos_id]
    with torch.no_grad():
        log_p = responder.model(torch.tensor([ids]), responder.adaption_prompts(request))[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_likelihoods_are_those_of_the_tokens_one_by_one(responder):
    """Requests with an adapter and without share batches; so do continuations of contexts of any length."""
    rows = [
        (Request("Hi", "", "a"), ["Yes, no.", "", "Yes"]),
        (Request("Hello you", "", "base"), ["No", "No, it is not so at all"]),
        (Request("A", "", "a"), [""]),
        (Request("Hi", "", "base"), ["Yes, no."]),
    ]
    for batch_size in (1, 2, 64):
        found = choice_log_likelihoods(responder, *map(list, zip(*rows)), batch_size)
        for (request, ours), likelihoods in zip(rows, found):
            expected = [one_by_one(responder, request, answer) for answer in ours]
            assert likelihoods == pytest.approx(expected, abs=1e-4)


def test_a_context_is_processed_once(responder, monkeypatch):
    """However many choices it has; and images of their own make contexts of their own."""
    read, prefill = [], scoring.prefill
    monkeypatch.setattr(scoring, "prefill", lambda model, rows, *more: read.extend(rows) or prefill(model, rows, *more))
    requests = [Request("Hi", "", "a"), Request("Hi", "", "base"), Request("Hi", "", "a")]
    choice_log_likelihoods(responder, requests, [["Yes", "No", "Perhaps"]] * 3)
    assert len(read) == 2  # with the adapter, and without


def test_choices_about_images_of_their_own(tiny_base):
    """Each row keeps the prompts of its image, when contexts are repeated for their choices."""
    model, tokenizer = load_llama(tiny_base)
    adapter = ImageAdapter(layers=3, length=3, dim=16, heads=2, features=4, bottleneck=3)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    responder = Responder(model, tokenizer, {"a": adapter})
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 5
    requests = [Request("Hi", "", "a", features=row) for row in features]
    choices = [["Yes", "No, never"], ["a b c"], ["No", "Yes", ""]]
    found = choice_log_likelihoods(responder, requests, choices)
    for request, ours, likelihoods in zip(requests, choices, found):
        expected = [one_by_one(responder, request, answer) for answer in ours]
        assert likelihoods == pytest.approx(expected, abs=1e-4)
    assert len({likelihoods[0] for likelihoods in found}) == 3


def test_the_most_likely_is_the_most_likely_one_by_one(responder):
    """In the order of the requests, which is not that of their lengths, however many are asked at once."""
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    choices = [["Yes", "No"], ["a b", "c", "d"], ["No", "Yes"], ["", "x"], ["z", "y"], ["y", "z"]]
    expected = [max(ours, key=lambda text: one_by_one(responder, r, text)) for r, ours in zip(requests, choices)]
    assert len({ours.index(text) for ours, text in zip(choices, expected)}) > 1
    for size in (1, 4, 64):
        assert most_likely_choices(responder, requests, choices, size) == expected


def test_written_answers_are_those_of_one_by_one(responder):
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    expected = [next(responder.respond_all([request], 1, "request")) for request in requests]
    assert len(set(expected)) > 1
    for size in (1, 4, 64):
        assert generate_responses(responder, requests, size) == expected


def test_answers_must_fit_too(responder):
    """At the last of the base's positions an answer's last word is read, and its end foretold."""
    request, answer = Request("Hi"), "Yes, yes."
    needed = len(responder.prompt_ids(request)) + len(responder.tokenizer.encode(answer))
    for spare, best in ((-1, [None]), (0, [answer])):
        responder.model.config = replace(responder.model.config, max_seq_len=needed + spare)
        assert most_likely_choices(responder, [request], [[answer]], 4) == best


def test_written_answers_need_room_for_one_token(responder):
    short, long = Request("Hi"), Request("word " * 30)
    for room, answered in ((0, False), (1, True)):
        context = len(responder.prompt_ids(long)) + room
        responder.model.config = replace(responder.model.config, max_seq_len=context)
        first, second = generate_responses(responder, [long, short])
        assert (first is not None) == answered and second is not None
