"""What `python train.py` trains over and on, if the user gives neither data nor a base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data import Example
from toy import almanac, digits
from toy.exam import evaluate_almanac, evaluate_digits
from toy.language_model import make_base


class Toy(NamedTuple):
    """A base, training data, and an evaluation."""

    base: Callable[[], Path]  # returns the folder of the base, which is pretrained at the first call
    examples: Callable  # takes DataOptions; returns Examples, and the options with `images` and `tower` filled in
    evaluate: Callable[..., dict[str, float]]  # takes model, tokenizer and adapter; prints tables, returns scores


def numbered(asked: list[almanac.ExamQuestion]) -> list[Example]:
    return [replace(question.example, name=f"toy question {i}") for i, question in enumerate(asked)]


def text_examples(options):
    return numbered(almanac.instructions()["tuning"]), options


def image_examples(options):
    folder = digits.make_digits()
    files, _ = digits.pictures(folder)
    asked = digits.questions(files[: digits.TUNED_ON]) + almanac.instructions()["tuning"]
    return numbered(asked), replace(options, images=str(folder), tower=str(folder / "tower"))


def blind_examples(options):
    """The same examples without their images."""
    return image_examples(options)[0], options


def evaluate_both(model, tokenizer, adapter) -> dict[str, float]:
    return evaluate_digits(model, tokenizer, adapter) | evaluate_almanac(model, tokenizer, adapter)


TOYS = {
    "text": Toy(make_base, text_examples, evaluate_almanac),
    "images": Toy(make_base, image_examples, evaluate_both),
    "blind": Toy(make_base, blind_examples, evaluate_both),
}
