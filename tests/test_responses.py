"""Batched requests get the responses and likelihoods of single ones. A request that exceeds the context gets None."""

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


def log_likelihood(responder, request, response):
    """Return the log-likelihood of a response and its <eos>, from one forward pass, summed in float64."""
    prompt = responder.prompt_ids(request)
    ids = prompt + responder.tokenizer.encode(response) + [responder.tokenizer.eos_id]
    with torch.no_grad():
        log_p = responder.model(torch.tensor([ids]), responder.adaption_prompts(request))[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_batched_likelihoods_equal_single_ones(responder):
    """Requests with and without an adapter, and contexts of different lengths, share batches."""
    rows = [
        (Request("Hi", "", "a"), ["Yes, no.", "", "Yes"]),
        (Request("Hello you", "", "base"), ["No", "No, it is not so at all"]),
        (Request("A", "", "a"), [""]),
        (Request("Hi", "", "base"), ["Yes, no."]),
    ]
    for batch_size in (1, 2, 64):
        found = choice_log_likelihoods(responder, *map(list, zip(*rows)), batch_size)
        for (request, texts), likelihoods in zip(rows, found):
            expected = [log_likelihood(responder, request, choice) for choice in texts]
            assert likelihoods == pytest.approx(expected, abs=1e-4)


def test_shared_context_is_processed_once(responder, monkeypatch):
    """Requests with the same text and adapter share one context, whatever the number of choices."""
    processed, prefill = [], scoring.prefill
    monkeypatch.setattr(
        scoring, "prefill", lambda model, rows, *args: processed.extend(rows) or prefill(model, rows, *args)
    )
    requests = [Request("Hi", "", "a"), Request("Hi", "", "base"), Request("Hi", "", "a")]
    choice_log_likelihoods(responder, requests, [["Yes", "No", "Perhaps"]] * 3)
    assert len(processed) == 2  # one with the adapter, one without


def test_choices_about_different_images_can_share_a_batch(tiny_base):
    """Each row keeps the adaption prompts of its image when its context is repeated for its choices."""
    model, tokenizer = load_llama(tiny_base)
    adapter = ImageAdapter(layers=3, length=3, dim=16, heads=2, features=4, bottleneck=3)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    responder = Responder(model, tokenizer, {"a": adapter})
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 5
    requests = [Request("Hi", "", "a", features=row) for row in features]
    choices = [["Yes", "No, never"], ["a b c"], ["No", "Yes", ""]]
    found = choice_log_likelihoods(responder, requests, choices)
    for request, texts, likelihoods in zip(requests, choices, found):
        expected = [log_likelihood(responder, request, choice) for choice in texts]
        assert likelihoods == pytest.approx(expected, abs=1e-4)
    assert len({likelihoods[0] for likelihoods in found}) == 3


def test_most_likely_choices_equal_single_requests(responder):
    """Requests are batched by length, but the results have the order of the requests, at any batch size."""
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    choices = [["Yes", "No"], ["a b", "c", "d"], ["No", "Yes"], ["", "x"], ["z", "y"], ["y", "z"]]
    expected = [max(texts, key=lambda text: log_likelihood(responder, r, text)) for r, texts in zip(requests, choices)]
    assert len({texts.index(text) for texts, text in zip(choices, expected)}) > 1
    for size in (1, 4, 64):
        assert most_likely_choices(responder, requests, choices, size) == expected


def test_generated_responses_equal_single_requests(responder):
    requests = [Request("word " * n, "", name) for n in (9, 1, 5) for name in ("a", "base")]
    expected = [next(responder.respond_all([request], 1, "request")) for request in requests]
    assert len(set(expected)) > 1
    for size in (1, 4, 64):
        assert generate_responses(responder, requests, size) == expected


def test_choices_must_fit_into_the_context(responder):
    """The last token of a choice may be at the last position of the context, from which <eos> is predicted."""
    request, choice = Request("Hi"), "Yes, yes."
    needed = len(responder.prompt_ids(request)) + len(responder.tokenizer.encode(choice))
    for spare, expected in ((-1, [None]), (0, [choice])):
        responder.model.config = replace(responder.model.config, max_seq_len=needed + spare)
        assert most_likely_choices(responder, [request], [[choice]], 4) == expected


def test_generated_responses_need_room_for_one_token(responder):
    short, long = Request("Hi"), Request("word " * 30)
    for room, fits in ((0, False), (1, True)):
        context = len(responder.prompt_ids(long)) + room
        responder.model.config = replace(responder.model.config, max_seq_len=context)
        first, second = generate_responses(responder, [long, short])
        assert (first is not None) == fits and second is not None
