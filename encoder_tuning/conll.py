"""Token classification: names in sentences, in the column format of CoNLL-2003.

    EU      NNP  B-NP  B-ORG
    rejects VBZ  B-VP  O
    German  JJ   B-NP  B-MISC

A line has a word first and its tag last; an empty line ends a sentence. B- begins an entity and I- goes on with it.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data import IGNORE
from encoder_tuning.labelled import Labelled, LabelledData, class_names
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import read_text

OUTSIDE = "O"  # the tag of a word that is in no entity


class TaggedSentence(NamedTuple):
    words: list[str]
    tags: list[str]  # one a word, in BIO
    name: str


def read_conll(path: Path) -> list[TaggedSentence]:
    """The sentences of a file, their tags in BIO. Lines of -DOCSTART- are left out.

    Raises OSError, or ValueError that names the line.
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
            raise ValueError(f"{path}: line {number}: has 1 column, a word and its tag are 2 or more")
        check_tag(columns[-1], f"{path}: line {number}")
        rows.append((columns[0], columns[-1]))
    if not sentences:
        raise ValueError(f"{path}: holds no sentences")
    return sentences


def check_tag(tag: str, where: str) -> None:
    """Raise ValueError where it is none of BIO's."""
    if tag != OUTSIDE and not re.fullmatch(r"[BI]-.+", tag):
        raise ValueError(f"{where}: the tag {tag!r} is neither O nor B-... nor I-...")


def to_bio(tags: Sequence[str]) -> list[str]:
    """An entity that begins with I-, as in CoNLL-2003's own files (IOB1), begins with B-; BIO stays as it is."""
    converted, before = [], OUTSIDE
    for tag in tags:
        begins = before[2:] != tag[2:]  # O has no type
        converted.append("B" + tag[1:] if tag.startswith("I-") and begins else tag)
        before = tag
    return converted


def labelled_sentences(
    sentences: Sequence[TaggedSentence], tokenizer: RobertaTokenizer, max_length: int, classes: Sequence[str]
) -> LabelledData:
    """<s> words </s>, tokenized word by word; the label of a word is at its first token, that of all others IGNORE.

    A sentence is cut to fit, and dropped where not one word is left. Raises ValueError at a tag that is no class.
    """
    examples, num_truncated, dropped = [], 0, 0
    for sentence in sentences:
        ids, labels = [], []
        for word, tag in zip(sentence.words, sentence.tags):
            if tag not in classes:
                raise ValueError(f"{sentence.name}: its tag {tag!r} is none of {', '.join(classes)}")
            pieces = tokenizer.encode(f" {word}")  # as within a text; the first word, too
            ids += pieces
            labels += [classes.index(tag)] + [IGNORE] * (len(pieces) - 1)
        room = max_length - 2
        num_truncated += len(ids) > room
        inputs = torch.tensor([tokenizer.bos_id, *ids[:room], tokenizer.eos_id])
        if room < 1:
            dropped += 1
        else:
            examples.append(Labelled(inputs, (IGNORE, *labels[:room], IGNORE), sentence.name, len(inputs)))
    return LabelledData(examples, list(classes), num_truncated, dropped)


def tag_classes(sentences: Sequence[TaggedSentence], known: Sequence[str]) -> list[str]:
    """Those in the order of a head that knows all of them, else those that occur."""
    found = {tag for sentence in sentences for tag in sentence.tags}
    return list(known) if found <= set(known) else class_names([*found])


def entity_metric() -> Callable[..., tuple]:
    """seqeval's own. Raises ValueError where it is not installed."""
    try:
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
    except ImportError:
        raise ValueError("scores of entities need a package that is not installed: pip install seqeval") from None
    return precision_recall_fscore_support


def entity_scores(predicted: list[list[str]], expected: list[list[str]]) -> dict[str, float]:
    """Of the tags of sentences, micro-averaged `precision`, `recall` and `f1` of whole entities, in [0, 1].

    `entities` is how many are expected. Raises as `entity_metric`.
    """
    values = entity_metric()(expected, predicted, average="micro", zero_division=0)
    return dict(zip(("precision", "recall", "f1", "entities"), map(float, values)))
