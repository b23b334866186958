"""The embedded default: an almanac, handwritten digits, and the tiny models that are pre-trained for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data import Example
from toy import almanac, digits
from toy.exam import evaluate_almanac, evaluate_digits
from toy.language_model import make_base


class Toy(NamedTuple):
    """What `python train.py` needs where the user gives neither data nor a base."""

    tuning: dict[str, float]  # options, where the user says nothing
    make: Callable[[], object]  # all that the others find made, from then on
    base: Callable[[], Path]  # the folder of the base
    examples: Callable  # of options with `images` and `tower`: the examples, and the options with those filled in
    evaluate: Callable[..., dict[str, float]]  # of model, tokenizer and adapter: prints tables, returns summary.json's


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
    """The same, but nobody gets to see the images."""
    return image_examples(options)[0], options


def make_base_and_digits() -> None:
    digits.make_digits()
    make_base()


def evaluate_both(model, tokenizer, adapter) -> dict[str, float]:
    return evaluate_digits(model, tokenizer, adapter) | evaluate_almanac(model, tokenizer, adapter)


TUNING = {"layers": 4, "epochs": 12, "warmup_epochs": 1, "batch_size": 32, "lr": 0.05}
TOYS = {
    "text": Toy(TUNING, make_base, make_base, text_examples, evaluate_almanac),
    "images": Toy(TUNING, make_base_and_digits, make_base, image_examples, evaluate_both),
    "blind": Toy(TUNING, make_base_and_digits, make_base, blind_examples, evaluate_both),
}
