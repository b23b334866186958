"""Token classification: named entities in sentences, in the column format of CoNLL-2003.

    EU      NNP  B-NP  B-ORG
    rejects VBZ  B-VP  O
    German  JJ   B-NP  B-MISC

The first column is a word, and the last column is its tag. An empty line ends a sentence. In BIO, B- begins an
entity, I- continues it, and O marks a word outside of any entity. CoNLL-2003's own files use IOB1, where most entities
begin with I-; their tags are converted to BIO.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data import IGNORE
from encoder_tuning.labeled import Labeled, LabeledData, class_names
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import read_text
from runtime.schema import listed

OUTSIDE = "O"  # the tag of a word outside of any entity


class TaggedSentence(NamedTuple):
    words: list[str]
    tags: list[str]  # one per word, in BIO
    name: str


def read_conll(path: Path) -> list[TaggedSentence]:
    """Read the sentences of a file, with their tags converted to BIO. -DOCSTART- lines are skipped.

    Raises OSError, or ValueError if a line is invalid or there are no sentences.
    """
    sentences, rows = [], []
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        columns = re.split(r"[ \t]+", line.strip(" \t\r"))
        if columns[0] in ("", "-DOCSTART-"):
            if rows:
                words, tags = zip(*rows)
                sentences.append(TaggedSentence([*words], to_bio(tags), f"sentence {len(sentences)}"))
            rows = []
            continue
        if len(columns) < 2:
            raise ValueError(f"{path}: line {number}: has 1 column; expected a word and its tag")
        check_tag(columns[-1], f"{path}: line {number}")
        rows.append((columns[0], columns[-1]))
    if not sentences:
        raise ValueError(f"{path}: contains no sentences")
    return sentences


def check_tag(tag: str, where: str) -> None:
    """Raise ValueError unless the tag is O, B-TYPE or I-TYPE. `where` is the beginning of the message."""
    if tag != OUTSIDE and not re.fullmatch(r"[BI]-.+", tag):
        raise ValueError(f"{where}: the tag is {tag!r}; expected O, B-TYPE or I-TYPE")


def to_bio(tags: Sequence[str]) -> list[str]:
    """Convert IOB1, where most entities begin with I-, as in CoNLL-2003, to BIO. Tags in BIO do not change."""
    converted, before = [], OUTSIDE
    for tag in tags:
        begins = before[2:] != tag[2:]  # O has no type
        converted.append("B" + tag[1:] if tag.startswith("I-") and begins else tag)
        before = tag
    return converted


def labeled_sentences(
    sentences: Sequence[TaggedSentence], tokenizer: RobertaTokenizer, max_length: int, classes: Sequence[str]
) -> LabeledData:
    """Tokenize sentences word by word, as <s> words </s>.

    The label of the first token of a word is the word's class, and the label of every other token is IGNORE. A sentence
    is truncated to `max_length` tokens, and dropped if that leaves no room for a word. Raises ValueError if a tag is
    not in `classes`.
    """
    examples, num_truncated, dropped = [], 0, 0
    for sentence in sentences:
        ids, labels = [], []
        for word, tag in zip(sentence.words, sentence.tags):
            if tag not in classes:
                raise ValueError(f"{sentence.name}: unknown tag {tag!r}; expected one of {listed(classes)}")
            # Every word, even the first, gets a leading space, so that it has the same tokens as within a sentence.
            pieces = tokenizer.encode(f" {word}")
            ids += pieces
            labels += [classes.index(tag)] + [IGNORE] * (len(pieces) - 1)
        room = max_length - 2
        if room < 1:
            dropped += 1
        else:
            num_truncated += len(ids) > room
            inputs = torch.tensor([tokenizer.bos_id, *ids[:room], tokenizer.eos_id])
            examples.append(Labeled(inputs, (IGNORE, *labels[:room], IGNORE), sentence.name, len(inputs)))
    return LabeledData(examples, list(classes), num_truncated, dropped)


def tag_classes(sentences: Sequence[TaggedSentence], known: Sequence[str]) -> list[str]:
    """Return `known`, the labels of the base's own head, if they include all tags; otherwise the tags that occur."""
    found = {tag for sentence in sentences for tag in sentence.tags}
    return list(known) if found <= set(known) else class_names([*found])


def entity_metric() -> Callable[..., tuple]:
    """Return seqeval's function for precision, recall and F1. Raises ValueError if seqeval is not installed."""
    try:
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
    except ImportError:
        raise ValueError("scoring entities needs a package that is not installed: pip install seqeval") from None
    return precision_recall_fscore_support


def entity_scores(predicted: list[list[str]], expected: list[list[str]]) -> dict[str, float]:
    """Return the micro-averaged `precision`, `recall` and `f1` of whole entities, in [0, 1].

    `predicted` and `expected` are lists of tags, one list per sentence. The result also contains `entities`, the number
    of expected entities. Raises ValueError as `entity_metric` does.
    """
    values = entity_metric()(expected, predicted, average="micro", zero_division=0)
    return dict(zip(("precision", "recall", "f1", "entities"), map(float, values)))
