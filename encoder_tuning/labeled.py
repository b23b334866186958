"""Labeled examples for encoders, in a form that all tasks share, and the tokenizer for RoBERTa."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data import IGNORE
from encoders.models import Roberta
from formats.roberta_tokenizer import RobertaTokenizer


class Labeled(NamedTuple):
    """A labeled example of any task."""

    inputs: Tensor  # token ids (T,), or pixels (c, S, S)
    labels: tuple[int, ...]  # one class; first and last position of an answer; or T classes, some of them IGNORE
    name: str  # used in error messages and as key of predictions; the windows of one question have the same name
    num_tokens: int  # number of positions that the encoder processes

    @property
    def num_targets(self) -> int:
        """The number of labels other than IGNORE, over which the loss is averaged."""
        return sum(label != IGNORE for label in self.labels)


class LabeledData(NamedTuple):
    """The examples of a data file, and the counts that are reported about them."""

    examples: list[Labeled]
    classes: list[str]  # empty for question answering
    num_truncated: int = 0  # texts or sentences
    dropped: int = 0  # sentences without room for a word, questions whose answer is in no window
    questions: int = 0  # including dropped ones
    windowed: int = 0  # questions whose context is split into several windows
    unanswerable: int = 0  # questions without an answer


def roberta_tokenizer(model: Roberta, base: Path) -> RobertaTokenizer:
    """Load the tokenizer in the folder of the base.

    Raises FileNotFoundError, or ValueError if the tokenizer is invalid or has ids without an embedding.
    """
    tokenizer = RobertaTokenizer(base)
    largest = max(tokenizer.ids)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"{base}: the tokenizer has ids up to {largest}, but the model has {model.config.vocab_size} embeddings"
        )
    return tokenizer


def class_names(labels: Sequence[str]) -> list[str]:
    """Return the distinct labels: first the integers, sorted by value, then the names, sorted alphabetically."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def subset(rows: list, limit: int | None, seed: int = 0) -> list:
    """Return at most `limit` rows in file order, sampled at random, because files are often sorted by class."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]
