"""A model's answers to many questions: what it writes, or which of several answers is the likeliest to it."""

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from data import IGNORE, Tokens, collate
from generate import Request, Responder, concat_prompts


def in_batches(
    responder: Responder, requests: Sequence[Request], room: Sequence[int], size: int, unit: str
) -> Iterator[tuple[list[int], tqdm]]:
    """Numbers of requests of like length, so many at once, and a progress bar.

    Those that leave less room in the base's context than they need, in tokens, are left out.
    """
    lengths = [len(responder.tokens(request)) for request in requests]
    limit = responder.model.config.max_seq_len or math.inf
    fitting = [i for i, length in enumerate(lengths) if length + room[i] <= limit]
    order = sorted(fitting, key=lengths.__getitem__)
    with tqdm(total=len(order), unit=unit, file=sys.stderr) as bar:
        for start in range(0, len(order), size):
            yield order[start : start + size], bar


def written_answers(
    responder: Responder, requests: Sequence[Request], size: int = 64, unit: str = "request"
) -> list[str | None]:
    """What is generated for each, so many at once; None where the request leaves no room for an answer."""
    answers: list[str | None] = [None] * len(requests)
    for batch, bar in in_batches(responder, requests, [1] * len(requests), size, unit):
        for i, text in zip(batch, responder.answer_batch([requests[i] for i in batch], bar)):
            answers[i] = text
    return answers


def likeliest_answers(
    responder: Responder,
    requests: Sequence[Request],
    choices: Sequence[list[str]],
    size: int = 64,
    unit: str = "request",
) -> list[str | None]:
    """Which of its choices is the likeliest after each request; None where there is no room for them."""
    answers: list[str | None] = [None] * len(requests)
    room = [max(len(responder.tokenizer.encode(choice)) for choice in ours) for ours in choices]
    for batch, bar in in_batches(responder, requests, room, size, unit):
        rows = [(requests[i], choice) for i in batch for choice in choices[i]]
        likelihoods = iter(log_likelihoods(responder, rows))
        for i in batch:
            ours = {choice: next(likelihoods) for choice in choices[i]}
            answers[i] = max(ours, key=ours.get)
        bar.update(len(batch))
    return answers


@torch.no_grad()
def log_likelihoods(responder: Responder, rows: Sequence[tuple[Request, str]]) -> list[float]:
    """log p(answer and its end | request), in nats, of each of B rows."""
    model, tokenizer = responder.model, responder.tokenizer
    tokens = []
    for request, answer in rows:
        prompt = responder.tokens(request)
        tokens.append(Tokens(prompt + tokenizer.encode(answer) + [tokenizer.eos_id], len(prompt), ""))
    batch, device = collate(tokens), model.tok_embeddings.weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)  # (B, T)
    loss_mask = targets != IGNORE  # (B, T), R of them
    prompts = concat_prompts([responder.prompts(request) for request, _ in rows])
    hidden = model.hidden_states(inputs, prompts)[loss_mask]  # (R, C)
    log_p = model.output(hidden).float().log_softmax(dim=1)  # (R, V)
    of_token = log_p.gather(1, targets[loss_mask][:, None]).squeeze(1)  # (R,)
    of_row = torch.zeros(len(rows), device=device).index_add(0, loss_mask.nonzero()[:, 0], of_token)  # (B,)
    return of_row.tolist()
