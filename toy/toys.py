"""The toys: base, training data and evaluation of a run without --data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data import Example
from toy import almanac, digits
from toy.exam import evaluate_almanac, evaluate_digits
from toy.language_model import BASE


class Toy(NamedTuple):
    """A base, its training data, and its evaluation."""

    base: Path
    # Takes DataOptions; returns Examples and DataOptions. The toy "images" fills in `images` and `vision_encoder`.
    examples: Callable
    evaluate: Callable[..., dict[str, float]]  # takes model, tokenizer and adapter; prints tables, returns scores


def named_examples(questions: list[almanac.ExamQuestion]) -> list[Example]:
    return [replace(question.example, name=f"toy question {i}") for i, question in enumerate(questions)]


def text_examples(options):
    return named_examples(almanac.instructions()["training"]), options


def image_examples(options):
    """Return Examples about pictures and the almanac, and the options with `images` and `vision_encoder` filled in.

    The pictures are written to a folder in `options.features`.
    """
    folder = options.features / "digits"
    digits.write_pictures(folder)
    files, _ = digits.pictures(folder)
    questions = digits.questions(files[: digits.TRAINED_ON]) + almanac.instructions()["training"]
    return named_examples(questions), replace(options, images=str(folder), vision_encoder=str(digits.ENCODER))


def blind_examples(options):
    """Return the Examples of `image_examples`, and unchanged options: without a vision encoder, images are ignored."""
    return image_examples(options)[0], options


def evaluate_both(model, tokenizer, adapter) -> dict[str, float]:
    return evaluate_digits(model, tokenizer, adapter) | evaluate_almanac(model, tokenizer, adapter)


TOYS = {
    "text": Toy(BASE, text_examples, evaluate_almanac),
    "images": Toy(BASE, image_examples, evaluate_both),
    "blind": Toy(BASE, blind_examples, evaluate_both),
}
