"""Answers to a task's examples, and how they are written where the task has no way of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from data import Example
from runtime.files import read_json, write_json


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
