"""A model's answers to many questions, what it writes or holds for the likeliest, and how they are written to files."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, Example, Round, Tokens, collate
from generate import Request, Responder, concat_prompts
from runtime.files import read_json, write_json


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
    room = [
        max(len(answered(responder, request, choice).answer) - 1 for choice in ours)
        for request, ours in zip(requests, choices)
    ]
    for batch, bar in in_batches(responder, requests, room, size, unit):
        rows = [(requests[i], choice) for i in batch for choice in choices[i]]
        likelihoods = iter(log_likelihoods(responder, rows))
        for i in batch:
            ours = {choice: next(likelihoods) for choice in choices[i]}
            answers[i] = max(ours, key=ours.get)
        bar.update(len(batch))
    return answers


def answered(responder: Responder, request: Request, text: str) -> Round:
    """The request with that answer, as it is learnt."""
    example = Example(request.instruction, request.input, text)
    return next(responder.templates[request.adapter].rounds([example]))[0]


def token_log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """log p, in nats, of ids (R,) by logits (R, V): (R,)."""
    return logits.float().log_softmax(dim=1).gather(1, ids[:, None]).squeeze(1)


@torch.no_grad()
def log_likelihoods(responder: Responder, rows: Sequence[tuple[Request, str]]) -> list[float]:
    """log p(answer and its end | request), in nats, of each of B rows."""
    model, tokens = responder.model, []
    for request, text in rows:
        prompt, answer = answered(responder, request, text)
        tokens.append(Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer), ""))
    batch, device = collate(tokens), model.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)  # (B, T)
    loss_mask = targets != IGNORE  # (B, T), R of them
    prompts = concat_prompts([responder.prompts(request) for request, _ in rows])
    hidden = model.hidden_states(inputs, prompts)[loss_mask]  # (R, C)
    of_token = token_log_p(model.output(hidden), targets[loss_mask])  # (R,)
    of_row = torch.zeros(len(rows), device=device).index_add(0, loss_mask.nonzero()[:, 0], of_token)  # (B,)
    return of_row.tolist()


@dataclass(frozen=True)
class Answers:
    """Whose they are, to what, and how they were found."""

    task: str
    split: str | None
    examples: Sequence[Example]
    texts: Sequence[str | None]  # None: the question left no room for an answer
    method: str
    generated: bool  # they are in the model's own words
    model_name: str  # the adapter's, or "base", or that of a file of answers
    num_parameters: int | None = None  # of the adapter; None where nobody knows


def write_scores(answers: Answers, scores: dict[str, float | None], folder: Path) -> None:
    """Print the scores; write results.json, the answers by the examples' names, and scores.json. Raises OSError."""
    number = len(answers.examples)
    click.echo(f"{answers.task}, {number:,} examples; answers: {answers.method}\n")
    for name, score in scores.items():
        click.echo(f"{name:20}{'-' if score is None else f'{score:.4f}':>12}")
    results = {example.name: text for example, text in zip(answers.examples, answers.texts)}
    write_json(folder / "results.json", results)
    write_json(folder / "scores.json", scores | {"examples": number})
    click.echo(f"wrote results.json and scores.json to {folder}", err=True)


def read_answers(path: str | Path, examples: Sequence[Example]) -> list[str | None]:
    """The answer to each example, of a results.json as `write_scores` writes it. Raises OSError or ValueError."""
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(text, str | None) for text in results.values()):
        raise ValueError(f"{path}: is not an object of answers by the names of examples")
    absent = [example.name for example in examples if example.name not in results]
    if absent:
        raise ValueError(f"{path}: answers {len(examples) - len(absent)} of {len(examples)} examples, not {absent[0]}")
    return [results[example.name] for example in examples]
