"""Read labeled images, sentences, words and questions as inputs of an encoder.

image-classification    one folder of images per class, or arrays in a .npz file
text-classification     a .tsv, .csv or JSON file of sentences and labels
token-classification    CoNLL-2003's format, one word and its tag per line: conll.py
question-answering      SQuAD's format; the answer is a span of the context, or there is none: squad.py
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image

from data import check_text, read_records
from encoder_tuning.conll import labeled_sentences, read_conll, tag_classes
from encoder_tuning.labeled import Labeled, LabeledData, class_names, roberta_tokenizer, subset
from encoder_tuning.squad import labeled_questions, read_squad
from encoders.media import open_image, preprocess
from encoders.models import Roberta, ViT
from formats.encoders import head_labels
from formats.tensors import prefix_errors
from runtime.files import MAX_BYTES, read_text, require_file
from runtime.schema import brief, listed

HEAD_TASKS = ("image-classification", "text-classification", "token-classification", "question-answering")
STRIDE = 128  # tokens that neighboring windows of a context share


# ---------------------------------------------------------------------------------------------------
# Files


def read_labeled_images(path: Path) -> list[tuple[Image.Image | Path, str, str]]:
    """Read labeled images as tuples (image or path, class, name).

    `path` is a folder with one subfolder of images per class, or a .npz file with the arrays `images`, uint8
    (n, height, width) or (n, height, width, 3), and `labels`, integers (n,). Raises OSError or ValueError.
    """
    if path.is_dir():
        files = [(file, file.parent.name) for file in sorted(path.glob("*/*")) if file.is_file()]
        if not files:
            raise ValueError(f"{path}: has no subfolders with images; expected one per class")
        return [(file, label, f"{label}/{file.name}") for file, label in files]
    require_file(path, "data")
    try:
        if sum(entry.file_size for entry in ZipFile(path).infolist()) > MAX_BYTES:
            raise ValueError(f"it contains more than {MAX_BYTES:,} bytes; set $LLAMA_ADAPTER_MAX_BYTES to allow more")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = map(np.asarray, (arrays["images"], arrays["labels"]))
    except Exception as error:  # zipfile and NumPy raise errors of many types for a broken file
        raise ValueError(
            f"{path}: cannot be read as a .npz file with the arrays 'images' and 'labels': {error}"
        ) from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not len(images):
        raise ValueError(
            f"{path}: 'images' is {images.dtype} with shape {images.shape}; expected uint8 (n, height, width[, 3])"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: 'labels' is {labels.dtype} with shape {labels.shape}; "
            f"expected one integer for each of the {len(images)} images"
        )
    return [(Image.fromarray(image), str(label), f"image {i}") for i, (image, label) in enumerate(zip(images, labels))]


def read_labeled_texts(path: Path) -> list[tuple[str, str, str]]:
    """Read labeled texts as tuples (text, class, name) from a .tsv or .csv file with a header, or from JSON.

    Records have the fields `text` (or `sentence`) and `label`. Raises OSError or ValueError.
    """
    if path.suffix in (".tsv", ".csv"):
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        try:
            records = list(csv.DictReader(io.StringIO(read_text(path)), **quoting))
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        if not records:
            raise ValueError(f"{path}: contains no examples")
    else:
        records = read_records(path)
    rows = []
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        if not isinstance(record, dict) or "label" not in record or not {"text", "sentence"} & set(record):
            present = listed(record) if isinstance(record, dict) else brief(record)
            raise ValueError(f"{where}: must have the fields 'text' (or 'sentence') and 'label' (found: {present})")
        text, label = record.get("text", record.get("sentence")), record["label"]
        label = str(label) if type(label) is int else label
        check_text(text, where, "text" if "text" in record else "sentence")
        check_text(label, where, "label")
        rows.append((text, label, f"record {index}"))
    return rows


# ---------------------------------------------------------------------------------------------------
# Inputs of an encoder


def read_labeled(
    task: str,
    model: ViT | Roberta,
    base: Path,
    data: Path,
    max_length: int,
    classes: Sequence[str] = (),
    limit: int | None = None,
    stride: int = STRIDE,
) -> LabeledData:
    """Read the data of a task as inputs of `model`, the encoder that was loaded from `base`.

    `data` is a file or folder. The inputs of RoBERTa have at most `max_length` tokens. `classes` are the names of the
    outputs of the head. By default they are the labels that occur in the data; for token classification, they are the
    labels of the base's own head if these include all tags of the data. `limit` is the maximum number of records,
    sampled at random. `stride` is the number of context tokens that neighboring windows of a question share.

    Raises OSError, or ValueError if the data is invalid, or the task needs a different kind of encoder.
    """
    check_head_task(task, model, base)
    if task == "question-answering":
        questions, tokenizer = subset(read_squad(data), limit), roberta_tokenizer(model, base)
        with prefix_errors(data):
            return labeled_questions(questions, tokenizer, max_length, stride)
    if task == "token-classification":
        sentences = read_conll(data)
        classes = list(classes) or tag_classes(sentences, head_labels(base))
        check_classes(classes, data)
        with prefix_errors(data):
            return labeled_sentences(subset(sentences, limit), roberta_tokenizer(model, base), max_length, classes)
    rows = (read_labeled_images if task == "image-classification" else read_labeled_texts)(data)
    source_of_classes = base if classes else data
    classes = list(classes) or class_names([label for _, label, _ in rows])
    check_classes(classes, source_of_classes)
    tokenizer = None if isinstance(model, ViT) else roberta_tokenizer(model, base)
    examples, num_truncated = [], 0
    for source, label, name in subset(rows, limit):
        if label not in classes:
            raise ValueError(f"{data}: {name}: unknown class {label!r}; expected one of {listed(classes)}")
        if tokenizer is None:
            image = open_image(source) if isinstance(source, Path) else source
            inputs, num_tokens = preprocess(image, model.config), len(model.positions)
        else:  # <s> text </s>
            ids = tokenizer.encode(source)
            num_truncated += len(ids) > max_length - 2
            inputs = torch.tensor([tokenizer.bos_id, *ids[: max_length - 2], tokenizer.eos_id])
            num_tokens = len(inputs)
        examples.append(Labeled(inputs, (classes.index(label),), name, num_tokens))
    return LabeledData(examples, classes, num_truncated)


def check_classes(classes: Sequence[str], where: str | Path) -> None:
    """Raise ValueError if there are fewer than two classes. `where` is the file or folder that names them."""
    if len(classes) < 2:
        raise ValueError(f"{where}: has only one class, {classes[0]!r}; expected two or more")


def check_head_task(task: str, model: ViT | Roberta, base: Path) -> None:
    """Raise ValueError if the task needs the other kind of encoder: ViT for images, RoBERTa for text."""
    if isinstance(model, ViT) != (task == "image-classification"):
        kinds = ["a RoBERTa", "a vision transformer"]
        found, needed = kinds[::-1] if isinstance(model, ViT) else kinds
        raise ValueError(f"{base}: is {found}, but the task {task} needs {needed}")
