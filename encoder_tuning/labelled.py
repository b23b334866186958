"""Examples for encoders, whatever the task, and the tokenizer that they are read with."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data import IGNORE
from encoders.models import Roberta
from formats.roberta_tokenizer import RobertaTokenizer


class Labelled(NamedTuple):
    """One example, as an encoder reads it."""

    inputs: Tensor  # ids (T,), or pixels (c, S, S)
    labels: tuple[int, ...]  # its class; the positions of an answer's first and last token; or T classes, some IGNORE
    name: str  # the windows of one question share theirs
    num_tokens: int  # the number of positions in a batch

    @property
    def num_targets(self) -> int:
        """The number of labels that the loss is a mean over."""
        return sum(label != IGNORE for label in self.labels)


class LabelledData(NamedTuple):
    """What there is to learn from a file."""

    examples: list[Labelled]
    classes: list[str]  # none for spans
    num_truncated: int = 0  # texts that were too long
    dropped: int = 0  # texts that leave nothing to learn
    questions: int = 0
    windowed: int = 0  # questions whose context is read in several windows
    unanswerable: int = 0  # questions


def roberta_tokenizer(model: Roberta, base: Path) -> RobertaTokenizer:
    """The tokenizer in the base's folder. Raises FileNotFoundError, or ValueError where it does not fit."""
    tokenizer = RobertaTokenizer(base)
    largest = max(tokenizer.ids)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{base}: its tokenizer has ids up to {largest}, its model {model.config.vocab_size} tokens")
    return tokenizer


def class_names(labels: Sequence[str]) -> list[str]:
    """Each once, numbers by size."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def subset(rows: list, limit: int | None, seed: int = 0) -> list:
    """At most so many, drawn from all of them, for files are often sorted by class."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]
