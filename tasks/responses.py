"""Responses to many prompts, generated or chosen among options, and the files of responses and scores."""

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from data import Example, Request
from generate import UNSTATED_CONTEXT, Responder
from runtime.errors import printable
from runtime.files import read_json, write_json
from tasks.scoring import score_continuations


def generate_responses(
    responder: Responder, requests: Sequence[Request], batch_size: int = 64, unit: str = "request"
) -> list[str | None]:
    """Return a response to each request, in the order of the requests, or None if its prompt fills the context.

    The prompts of a batch have similar lengths.
    """
    context = responder.model.config.max_seq_len or UNSTATED_CONTEXT
    lengths = [len(responder.prompt_ids(request)) for request in requests]
    order = sorted((i for i, length in enumerate(lengths) if length < context), key=lengths.__getitem__)
    responses: list[str | None] = [None] * len(requests)
    with tqdm(total=len(order), unit=unit, file=sys.stderr) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, text in zip(batch, responder.respond_batch([requests[i] for i in batch])):
                responses[i] = text
            bar.update(len(batch))
    return responses


def choice_log_likelihoods(
    responder: Responder, requests: Sequence[Request], choices: Sequence[list[str]], batch_size: int = 64
) -> list[list[float] | None]:
    """Return log p(choice and its end token | request), in nats, for every choice of each request.

    The end token is the one that the template writes, such as <eos>. The result for a request is None if one of its
    choices does not fit into the context. Histories are ignored.
    """
    context = responder.model.config.max_seq_len or UNSTATED_CONTEXT
    likelihoods: list[list[float] | None] = [None] * len(requests)
    rows = []  # indices (request, choice) of each row
    adaption_prompts, tokens, continuations = [], [], []
    for i, (request, texts) in enumerate(zip(requests, choices)):
        template = responder.loaded[request.adapter].template
        examples = [Example(request.instruction, request.input, text) for text in texts]
        exchanges = [exchange for (exchange,) in template.encode_exchanges(examples)]
        if any(len(each.prompt_ids) + len(each.response_ids) - 1 > context for each in exchanges):
            continue
        likelihoods[i] = [math.nan] * len(texts)
        shared = responder.adaption_prompts(request)
        for j, (prompt_ids, response_ids) in enumerate(exchanges):
            rows.append((i, j))
            adaption_prompts.append(shared)
            tokens.append(prompt_ids)
            continuations.append(response_ids)
    with tqdm(total=len(rows), unit="choice", file=sys.stderr) as bar:
        scored = score_continuations(responder.model, tokens, continuations, adaption_prompts, batch_size, bar)
    for (i, j), (log_p, _) in zip(rows, scored):
        likelihoods[i][j] = log_p
    return likelihoods


def most_likely_choices(
    responder: Responder, requests: Sequence[Request], choices: Sequence[list[str]], batch_size: int = 64
) -> list[str | None]:
    """Return the most likely choice for each request, or None if one of the choices does not fit into the context."""
    likelihoods = choice_log_likelihoods(responder, requests, choices, batch_size)
    return [None if log_p is None else texts[log_p.index(max(log_p))] for log_p, texts in zip(likelihoods, choices)]


@dataclass(frozen=True)
class Responses:
    """Responses to the examples of a task, and the model and method that produced them."""

    task: str
    split: str | None
    examples: Sequence[Example]
    texts: Sequence[str | None]  # None: the prompt, or a choice after it, does not fit into the context
    method: str
    generated: bool  # True if the model generated the texts
    model_name: str  # the name of the adapter, "base", or the name of the file of responses without its suffix
    num_parameters: int | None = None  # trained parameters, 0 for the base alone; None if unknown


def write_scores(responses: Responses, scores: dict[str, float | None], folder: Path) -> None:
    """Print the scores, and write them to scores.json in `folder`.

    Also writes results.json, which maps the names of examples to their responses. Raises OSError.
    """
    number = len(responses.examples)
    click.echo(f"{responses.task}, {number:,} examples; responses: {responses.method}\n")
    for name, score in scores.items():
        click.echo(f"{name:20}{'-' if score is None else f'{score:.4f}':>12}")
    results = {example.name: text for example, text in zip(responses.examples, responses.texts)}
    (folder / "scores.json").unlink(missing_ok=True)  # an earlier call's scores do not belong to the new results
    write_json(folder / "results.json", results)
    write_json(folder / "scores.json", scores | {"examples": number})
    click.echo(f"wrote results.json and scores.json to {printable(str(folder))}", err=True)


def require_responses(path: str | Path, names: Sequence, found: Collection, unit: str) -> None:
    """Raise ValueError if one of the `names` is not in `found`, the names that a file of responses contains.

    `unit` is the singular noun for what is named, such as "example".
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{path}: has no response to {len(missing):,} of {len(names):,} {unit}s, for example {missing[0]}"
        )


def read_responses(path: str | Path, examples: Sequence[Example]) -> list[str | None]:
    """Read the response to each example from a results.json that `write_scores` wrote. Raises OSError or ValueError."""
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(text, str | None) for text in results.values()):
        raise ValueError(f"{path}: is not an object that maps the names of examples to responses")
    require_responses(path, [example.name for example in examples], results, "example")
    return [results[example.name] for example in examples]
