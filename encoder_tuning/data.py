"""From labelled pictures, sentences and questions to what encoders read.

image-classification    a folder for each class, or arrays in a .npz
text-classification     a .tsv, .csv or JSON of sentences and labels
question-answering      SQuAD 1.1: the answer to a question is a part of its context
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import check_text, read_records
from encoders.media import open_image, preprocess_whole
from encoders.models import Roberta, ViT
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import max_bytes, read_json, read_text, require_file

HEAD_TASKS = ("image-classification", "text-classification", "question-answering")


class Labelled(NamedTuple):
    """One example, as an encoder reads it."""

    inputs: Tensor  # ids (T,), or pixels (c, S, S)
    labels: tuple[int, ...]  # its class, or the positions of the first and the last token of the answer
    name: str
    size: int  # how many positions it takes


class SquadQuestion(NamedTuple):
    """What is asked about a paragraph, and what people answered."""

    id: str
    question: str
    context: str
    answers: list[str]
    starts: list[int]  # the character of the context at which each begins


# ---------------------------------------------------------------------------------------------------
# Files


def read_labelled_images(path: Path) -> list[tuple[Image.Image | Path, str, str]]:
    """Picture, class and name, of a folder with a folder for each class, or of arrays `images` and `labels` in a .npz.

    Images are (number, height, width) or (number, height, width, 3), of bytes. Raises OSError or ValueError.
    """
    if path.is_dir():
        found = [(file, file.parent.name) for file in sorted(path.glob("*/*")) if file.is_file()]
        if not found:
            raise ValueError(f"{path}: has no folders of images, one for each class")
        return [(file, label, f"{label}/{file.name}") for file, label in found]
    require_file(path, "data")
    try:
        if sum(entry.file_size for entry in ZipFile(path).infolist()) > max_bytes():
            raise ValueError(f"holds more than {max_bytes():,} bytes; $LLAMA_ADAPTER_MAX_BYTES allows for more")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = map(np.asarray, (arrays["images"], arrays["labels"]))
    except Exception as error:  # whatever a broken file makes numpy meet
        raise ValueError(f"{path}: is no .npz with arrays 'images' and 'labels': {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not len(images):
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}, not bytes (number, height, width[, 3])")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape} for {len(images)} images, not whole numbers"
        )
    return [(Image.fromarray(image), str(label), f"image {i}") for i, (image, label) in enumerate(zip(images, labels))]


def read_labelled_texts(path: Path) -> list[tuple[str, str, str]]:
    """Text, class and name, of a .tsv or .csv with a header, or of JSON: fields `text` (or `sentence`) and `label`.

    Raises OSError, or ValueError that names the record.
    """
    if path.suffix in (".tsv", ".csv"):
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        try:
            records = list(csv.DictReader(io.StringIO(read_text(path)), **quoting))
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        if not records:
            raise ValueError(f"{path}: holds no examples")
    else:
        records = read_records(path)
    rows = []
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        if not isinstance(record, dict) or "label" not in record or not {"text", "sentence"} & set(record):
            raise ValueError(f"{where}: has no fields 'text' (or 'sentence') and 'label'")
        text, label = record.get("text", record.get("sentence")), record["label"]
        label = str(label) if type(label) is int else label
        check_text(text, where, "text")
        check_text(label, where, "label")
        rows.append((text, label, f"record {index}"))
    return rows


def read_squad(path: Path) -> list[SquadQuestion]:
    """The questions of a file in the format of SQuAD 1.1, where all have an answer.

    Raises OSError, or ValueError that names the question.
    """
    values, questions = read_json(path), []
    try:
        for paragraph in [paragraph for article in values["data"] for paragraph in article["paragraphs"]]:
            for qa in paragraph["qas"]:
                asked = (qa["id"], qa["question"], paragraph["context"])
                texts = [answer["text"] for answer in qa["answers"]]
                starts = [answer["answer_start"] for answer in qa["answers"]]
                question = SquadQuestion(*asked, texts, starts)
                check_squad_question(question, f"{path}: question {question.id}")
                questions.append(question)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not in SQuAD's format: {type(error).__name__}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def check_squad_question(question: SquadQuestion, where: str) -> None:
    """Raise ValueError where a field is no text, or an answer does not stand where it should."""
    for field in ("id", "question", "context"):
        check_text(getattr(question, field), where, field)
    if not question.answers:
        raise ValueError(f"{where}: has no answers")
    for answer, start in zip(question.answers, question.starts):
        check_text(answer, where, "answers")
        found = question.context[start : start + len(answer)] if type(start) is int and start >= 0 else None
        if found != answer or not answer:
            raise ValueError(f"{where}: the answer {answer!r} does not stand at character {start!r} of its context")


# ---------------------------------------------------------------------------------------------------
# What encoders read


class Span(NamedTuple):
    """A question as RoBERTa reads it, <s> question </s> </s> context </s>, and where in the context its tokens are."""

    ids: list[int]
    first: int  # the position of the context's first token
    offsets: list[tuple[int, int]]  # from which character of the context to which each of its tokens goes

    def positions(self, start: int, end: int) -> tuple[int, int] | None:
        """Of the first and the last token of those characters; None where the context was cut before their end."""
        inside = [i for i, (begin, stop) in enumerate(self.offsets) if begin < end and stop > start]
        if not inside or self.offsets[-1][1] < end:
            return None
        return self.first + inside[0], self.first + inside[-1]

    def text(self, context: str, first: int, last: int) -> str:
        """What stands at the tokens from one position to another."""
        return context[self.offsets[first - self.first][0] : self.offsets[last - self.first][1]].strip()


def span_of(question: SquadQuestion, tokenizer: RobertaTokenizer, max_length: int) -> Span:
    """The question, and as much of its context as fits."""
    asked = [tokenizer.bos_id, *tokenizer.encode(question.question.strip()), tokenizer.eos_id, tokenizer.eos_id]
    ids, offsets = tokenizer.encode_with_offsets(question.context)
    room = max(0, max_length - len(asked) - 1)
    return Span([*asked, *ids[:room], tokenizer.eos_id][:max_length], len(asked), offsets[:room])


class LabelledData(NamedTuple):
    """What there is to learn from a file."""

    examples: list[Labelled]
    classes: list[str]  # none for spans
    cut: int = 0  # texts that were too long
    dropped: int = 0  # questions whose answer is in what was cut


def labelled_questions(
    questions: Sequence[SquadQuestion], tokenizer: RobertaTokenizer, max_length: int
) -> LabelledData:
    """Those whose first answer is in what fits of the context."""
    examples, cut = [], 0
    for question in questions:
        span = span_of(question, tokenizer, max_length)
        cut += not span.offsets or span.offsets[-1][1] < len(question.context)
        positions = span.positions(question.starts[0], question.starts[0] + len(question.answers[0]))
        if positions is not None:
            examples.append(Labelled(torch.tensor(span.ids), positions, f"question {question.id}", len(span.ids)))
    return LabelledData(examples, [], cut, len(questions) - len(examples))


def read_labelled(
    task: str,
    model: ViT | Roberta,
    base: Path,
    data: Path,
    max_length: int,
    classes: Sequence[str] = (),
    limit: int | None = None,
) -> LabelledData:
    """A data file for an encoder from the folder `base`; the classes are those that occur, unless they are given.

    Raises OSError or ValueError, naming file and record.
    """
    check_head_task(task, model, base)
    if task == "question-answering":
        return labelled_questions(subset(read_squad(data), limit), roberta_tokenizer(model, base), max_length)
    rows = (read_labelled_images if task == "image-classification" else read_labelled_texts)(data)
    classes = list(classes) or class_names([label for _, label, _ in rows])
    if len(classes) < 2:
        raise ValueError(f"{data}: has only one class, {classes[0]!r}: there is nothing to tell apart")
    tokenizer = None if isinstance(model, ViT) else roberta_tokenizer(model, base)
    examples, cut = [], 0
    for source, label, name in subset(rows, limit):
        if label not in classes:
            raise ValueError(f"{data}: {name}: its class {label!r} is none of {', '.join(classes)}")
        if tokenizer is None:
            image = open_image(source) if isinstance(source, Path) else source
            inputs, size = preprocess_whole(image, model.config), len(model.positions)
        else:  # <s> text </s>
            ids = tokenizer.encode(source)
            cut += len(ids) > max_length - 2
            inputs = torch.tensor([tokenizer.bos_id, *ids[: max_length - 2], tokenizer.eos_id])
            size = len(inputs)
        examples.append(Labelled(inputs, (classes.index(label),), name, size))
    return LabelledData(examples, classes, cut)


def check_head_task(task: str, model: ViT | Roberta, base: Path) -> None:
    """Raise ValueError where the model cannot do it."""
    if isinstance(model, ViT) != (task == "image-classification"):
        needed = "a vision transformer" if task == "image-classification" else "a RoBERTa"
        raise ValueError(f"{base}: --task {task} needs {needed}")


def roberta_tokenizer(model: Roberta, base: Path) -> RobertaTokenizer:
    """The tokenizer in the base's folder. Raises FileNotFoundError, or ValueError where it does not fit."""
    tokenizer = RobertaTokenizer(base)
    largest = max(tokenizer.ids)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{base}: its tokenizer has ids up to {largest}, its model {model.config.vocab_size} words")
    return tokenizer


def class_names(labels: Sequence[str]) -> list[str]:
    """Each once, numbers by size."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def subset(rows: list, limit: int | None) -> list:
    """At most so many, drawn from all of them, for files are often sorted by class."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:limit])]
