"""Other frozen transformers tuned the same way: prompts and gates inside, a head on top (section 3.4 of the paper).

    image classification    a vision transformer; the class token's state to classes
    text classification     RoBERTa; <s>'s state to classes
    question answering      RoBERTa; each token's state to how well the answer begins and ends there

The mechanism is adapter.py's, the training step.py's. Notation as in adapter.py.
"""

import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import check_text, read_records
from encoders.heads import HeadAdapter
from encoders.media import open_image
from encoders.roberta import Roberta
from encoders.vit import ViT, ViTConfig
from runtime.files import read_json, read_text
from runtime.fingerprints import hash_tensors

TASKS = ("image-classification", "text-classification", "question-answering")


def suits(head: nn.Sequential | None, task: str) -> bool:
    """Whether a head that an encoder came with is one for the task: RoBERTa's for sentences has two linear layers."""
    return head is not None and (task == "image-classification" or (len(head) == 1) == (task == "question-answering"))


# ---------------------------------------------------------------------------------------------------
# Data


class Labelled(NamedTuple):
    """One example, as an encoder reads it."""

    inputs: Tensor  # ids (T,), or pixels (c, S, S)
    labels: tuple[int, ...]  # its class, or the first and the last token of the answer
    name: str
    size: int  # how many positions it takes
    kind: str = ""


class LabelledBatch(NamedTuple):
    """Examples side by side."""

    inputs: Tensor  # ids (B, T), padded to the right, or pixels (B, c, S, S)
    labels: Tensor  # (B, 1) or (B, 2)


def read_pictures(path: Path) -> list[tuple[Image.Image | Path, str, str]]:
    """Picture, class and name, of a folder with a folder for each class, or of arrays `images` and `labels` in a .npz.

    Images are (number, height, width) or (number, height, width, 3), of bytes. Raises OSError or ValueError.
    """
    if path.is_dir():
        found = [(file, file.parent.name) for file in sorted(path.glob("*/*")) if file.is_file()]
        if not found:
            raise ValueError(f"{path}: has no folders of images, one for each class")
        return [(file, label, f"{label}/{file.name}") for file, label in found]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (ValueError, KeyError, OSError, EOFError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: is no .npz with arrays 'images' and 'labels': {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not len(images):
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}, not bytes (number, height, width[, 3])")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape} for {len(images)} images, not whole numbers"
        )
    return [(Image.fromarray(image), str(label), f"image {i}") for i, (image, label) in enumerate(zip(images, labels))]


def read_sentences(path: Path) -> list[tuple[str, str, str]]:
    """Text, class and name, of a .tsv or .csv with a header, or of JSON: fields `text` (or `sentence`) and `label`.

    Raises OSError, or ValueError that names the record.
    """
    if path.suffix in (".tsv", ".csv"):
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        try:
            records = list(csv.DictReader(io.StringIO(read_text(path)), **quoting))
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
    else:
        records = read_records(path)
    if not records:
        raise ValueError(f"{path}: holds no examples")
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


class Question(NamedTuple):
    """Of SQuAD: what is asked about a paragraph, and what people answered."""

    id: str
    question: str
    context: str
    answers: list[str]
    starts: list[int]  # the character of the context at which each begins


def read_squad(path: Path) -> list[Question]:
    """The questions of a file in the format of SQuAD 1.1, where all have an answer.

    Raises OSError, or ValueError that names the question.
    """
    values = read_json(path)
    try:
        paragraphs = [paragraph for article in values["data"] for paragraph in article["paragraphs"]]
        found = [
            Question(
                qa["id"],
                qa["question"],
                paragraph["context"],
                [answer["text"] for answer in qa["answers"]],
                [answer["answer_start"] for answer in qa["answers"]],
            )
            for paragraph in paragraphs
            for qa in paragraph["qas"]
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not in SQuAD's format: {type(error).__name__}: {error}") from None
    for question in found:
        where = f"{path}: question {question.id}"
        for field, value in (("id", question.id), ("question", question.question), ("context", question.context)):
            check_text(value, where, field)
        if not question.answers:
            raise ValueError(f"{where}: has no answers")
        for answer, start in zip(question.answers, question.starts):
            check_text(answer, where, "answers")
            if (
                type(start) is not int
                or start < 0
                or question.context[start : start + len(answer)] != answer
                or not answer
            ):
                raise ValueError(f"{where}: the answer {answer!r} does not stand at character {start!r} of its context")
    if not found:
        raise ValueError(f"{path}: holds no questions")
    return found


def prepared_picture(picture: Image.Image | Path, config: ViTConfig) -> Tensor:
    """As vision transformers take it: the whole picture to (c, S, S), bilinear, normalised. Raises as open_image."""
    image = open_image(picture) if isinstance(picture, Path) else picture
    image = image.convert("L" if config.channels == 1 else "RGB")
    image = image.resize((config.image_size, config.image_size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(*image.size, config.channels) / 255
    return ((pixels - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


class RobertaTokenizer:
    """GPT-2's byte-level BPE with RoBERTa's ids, of vocab.json and merges.txt, as Hugging Face has them.

    Or of what they were made of: GPT-2's encoder.json and vocab.bpe, and fairseq's dict.txt. Raises FileNotFoundError
    or ValueError.
    """

    WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how GPT-2 cuts text
    bos_id, pad_id, eos_id, unknown_id = 0, 1, 2, 3

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        names = ["merges.txt", "vocab.bpe"]
        merges = next((folder / name for name in names if (folder / name).is_file()), None)
        if merges is None:
            raise FileNotFoundError(f"{folder}: has neither {names[0]} nor {names[1]}, RoBERTa's tokenizer")
        printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
        try:
            ranks = {bytes([byte]): rank for rank, byte in enumerate([*printable, *others])}
            for line in read_text(merges).splitlines():
                if line and not line.startswith("#version"):
                    first, second = line.split(" ")
                    ranks[bytes(letters[letter] for letter in first + second)] = len(ranks)
            self.ids = self.roberta_ids(folder, ranks, letters)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{folder}: cannot be read as RoBERTa's tokenizer: {error}") from None
        self.model = tiktoken.Encoding("roberta", pat_str=self.WORDS, mergeable_ranks=ranks, special_tokens={})

    @staticmethod
    def roberta_ids(folder: Path, ranks: dict[bytes, int], letters: dict[str, int]) -> dict[int, int]:
        """RoBERTa's id of every rank."""
        if (folder / "vocab.json").is_file():
            vocabulary = read_json(folder / "vocab.json")
            tokens = {token: id for token, id in vocabulary.items() if all(letter in letters for letter in token)}
            as_bytes = {bytes(letters[letter] for letter in token): id for token, id in tokens.items()}
            return {rank: as_bytes[token] for token, rank in ranks.items()}
        theirs = read_json(folder / "encoder.json").values()  # GPT-2's ids, which are the ranks, and <|endoftext|>'s
        lines = [line.split(" ")[0] for line in read_text(folder / "dict.txt").splitlines()[: len(theirs)]]
        return {int(number): 4 + i for i, number in enumerate(lines) if number.isdecimal()}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without <s> and </s>."""
        return [self.ids.get(rank, self.unknown_id) for rank in self.model.encode_ordinary(text)]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Also at which character of the text each token begins."""
        ranks = self.model.encode_ordinary(text)
        _, starts = self.model.decode_with_offsets(ranks)
        return [self.ids.get(rank, self.unknown_id) for rank in ranks], starts


def class_names(labels: Sequence[str]) -> list[str]:
    """Each once, numbers by size."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def labelled_pictures(rows: Sequence[tuple], config: ViTConfig, classes: Sequence[str]) -> list[Labelled]:
    positions = 1 + (config.image_size // config.patch_size) ** 2
    return [
        Labelled(prepared_picture(picture, config), (classes.index(label),), name, positions)
        for picture, label, name in rows
    ]


def labelled_sentences(
    rows: Sequence[tuple[str, str, str]], tokenizer: RobertaTokenizer, classes: Sequence[str], max_length: int
) -> tuple[list[Labelled], int]:
    """<s> text </s>, and how many had to be cut at `max_length`."""
    examples, cut = [], 0
    for text, label, name in rows:
        ids = tokenizer.encode(text)
        cut += len(ids) > max_length - 2
        ids = [tokenizer.bos_id, *ids[: max_length - 2], tokenizer.eos_id]
        examples.append(Labelled(torch.tensor(ids), (classes.index(label),), name, len(ids)))
    return examples, cut


class Span(NamedTuple):
    """A question as RoBERTa reads it, <s> question </s> </s> context </s>, and where in the context its tokens are."""

    ids: list[int]
    first: int  # the position of the context's first token
    starts: list[int]  # at which character of the context each of its tokens begins
    ends: list[int]

    def positions(self, start: int, end: int) -> tuple[int, int] | None:
        """Of the first and the last token of those characters; None where the context was cut before their end."""
        inside = [i for i, (begin, stop) in enumerate(zip(self.starts, self.ends)) if begin < end and stop > start]
        if not inside or self.ends[-1] < end:
            return None
        return self.first + inside[0], self.first + inside[-1]

    def text(self, context: str, first: int, last: int) -> str:
        """What stands at the tokens from one position to another."""
        return context[self.starts[first - self.first] : self.ends[last - self.first]].strip()


def span_of(question: Question, tokenizer: RobertaTokenizer, max_length: int) -> Span:
    """The question, and as much of its context as fits."""
    asked = [tokenizer.bos_id, *tokenizer.encode(question.question.strip()), tokenizer.eos_id, tokenizer.eos_id]
    ids, starts = tokenizer.encode_with_starts(question.context)
    room = max(0, max_length - len(asked) - 1)
    ends = [*starts[1:], len(question.context)]
    return Span([*asked, *ids[:room], tokenizer.eos_id][:max_length], len(asked), starts[:room], ends[:room])


def labelled_questions(
    questions: Sequence[Question], tokenizer: RobertaTokenizer, max_length: int
) -> tuple[list[Labelled], int]:
    """Those whose first answer is in what fits of the context, and how many had their context cut."""
    examples, cut = [], 0
    for question in questions:
        span = span_of(question, tokenizer, max_length)
        cut += not span.ends or span.ends[-1] < len(question.context)
        start = question.starts[0]
        positions = span.positions(start, start + len(question.answers[0])) if span.ends else None
        if positions is not None:
            examples.append(Labelled(torch.tensor(span.ids), positions, f"question {question.id}", len(span.ids)))
    return examples, cut


def tokenizer_for(model: Roberta, base: Path) -> RobertaTokenizer:
    """The tokenizer in the base's folder. Raises FileNotFoundError, or ValueError where it does not fit."""
    tokenizer = RobertaTokenizer(base)
    largest = max(tokenizer.ids.values())
    if largest >= model.config.vocab_size:
        raise ValueError(f"{base}: its tokenizer has ids up to {largest}, its model {model.config.vocab_size} words")
    return tokenizer


def fingerprint(model: ViT | Roberta) -> str:
    """A hash of a few weights."""
    return hash_tensors([model.layers[0].attention.wq.weight[:4], model.layers[-1].w2.weight[:4]])


def check_task(task: str, model: ViT | Roberta, base: Path) -> None:
    """Raise ValueError where the model cannot do it."""
    if isinstance(model, ViT) != (task == "image-classification"):
        wanted = "a vision transformer" if task == "image-classification" else "a RoBERTa"
        raise ValueError(f"{base}: --task {task} needs {wanted}")


def some(rows: list, limit: int | None) -> list:
    """At most so many, drawn from all of them, for files are often sorted by class."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:limit])]


class Lesson(NamedTuple):
    """What there is to learn for a task."""

    examples: list[Labelled]
    classes: list[str]  # none for spans
    cut: int  # texts that were too long
    dropped: int  # questions whose answer is in what was cut


def read_lesson(
    task: str,
    model: ViT | Roberta,
    base: Path,
    data: Path,
    max_length: int,
    classes: Sequence[str] = (),
    limit: int | None = None,
) -> Lesson:
    """A data file for an encoder; the classes are those that occur, unless they are given.

    Raises OSError or ValueError, naming file and record.
    """
    check_task(task, model, base)
    if task == "question-answering":
        questions = some(read_squad(data), limit)
        examples, cut = labelled_questions(questions, tokenizer_for(model, base), max_length)
        return Lesson(examples, [], cut, len(questions) - len(examples))
    rows = (read_pictures if task == "image-classification" else read_sentences)(data)
    classes = list(classes) or class_names([label for _, label, _ in rows])
    if len(classes) < 2:
        raise ValueError(f"{data}: has only one class, {classes[0]!r}: there is nothing to tell apart")
    rows = some(rows, limit)
    for _, label, name in rows:
        if label not in classes:
            raise ValueError(f"{data}: {name}: its class {label!r} is none of {', '.join(classes)}")
    if isinstance(model, ViT):
        return Lesson(labelled_pictures(rows, model.config, classes), classes, 0, 0)
    examples, cut = labelled_sentences(rows, tokenizer_for(model, base), classes, max_length)
    return Lesson(examples, classes, cut, 0)


# ---------------------------------------------------------------------------------------------------
# What is learnt


def collate(examples: Sequence[Labelled], pad_id: int = RobertaTokenizer.pad_id) -> LabelledBatch:
    """Side by side; ids are padded to the right."""
    inputs = nn.utils.rnn.pad_sequence([example.inputs for example in examples], batch_first=True, padding_value=pad_id)
    return LabelledBatch(inputs, torch.tensor([example.labels for example in examples]))


def batches(examples: Sequence[Labelled], max_tokens: int) -> Iterator[LabelledBatch]:
    """The examples, of like length, in parts of at most `max_tokens` positions (or of one example)."""
    part: list[Labelled] = []
    for example in sorted(examples, key=lambda example: example.size):
        if part and (len(part) + 1) * example.size > max_tokens:  # the newest is the longest
            yield collate(part)
            part = []
        part.append(example)
    if part:
        yield collate(part)


def scores(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor, spans: bool) -> Tensor:
    """Of the classes (B, classes); or of where the answer begins and ends, (B, T, 2), -inf where there is padding."""
    weight = next(model.parameters())
    inputs = inputs.to(weight.device) if inputs.dtype == torch.long else inputs.to(weight.device, weight.dtype)
    states = model.encode(inputs, adapter(dtype=weight.dtype)).float()  # (B, T, C)
    if not spans:
        return adapter.head(states[:, 0])
    padding = inputs == model.config.pad_id  # (B, T)
    return adapter.head(states).masked_fill(padding[:, :, None], -torch.inf)


class Labels:
    """The objective of heads, for step.py: cross entropy of every label, a class or an end of a span."""

    def __init__(self, spans: bool):
        self.spans = spans

    def learnt(self, examples: Sequence[Labelled]) -> int:
        return sum(len(example.labels) for example in examples)

    def batches(self, examples: Sequence[Labelled], max_tokens: int) -> list[LabelledBatch]:
        return list(batches(examples, max_tokens))

    def loss_sum(
        self, model: ViT | Roberta, adapter: HeadAdapter, batch: LabelledBatch | None, recompute: bool = False
    ) -> Tensor:
        """Summed over the labels; zero, with a gradient, for None: a rank out of work."""
        if batch is None:
            return sum(parameter.sum() * 0 for parameter in adapter.parameters())
        found = scores(model, adapter, batch.inputs, self.spans)
        found = found.transpose(1, 2) if self.spans else found[:, None]  # (B, labels, classes or T)
        return F.cross_entropy(found.flatten(0, 1), batch.labels.flatten().to(found.device), reduction="sum")


# ---------------------------------------------------------------------------------------------------
# Answers and marks


@torch.no_grad()
def classify(model: ViT | Roberta, adapter: HeadAdapter, examples: Sequence[Labelled], max_tokens: int) -> list[int]:
    """The likeliest class of each."""
    found, order = [0] * len(examples), sorted(range(len(examples)), key=lambda i: examples[i].size)
    start = 0
    for batch in batches(examples, max_tokens):
        for i, best in zip(order[start:], scores(model, adapter, batch.inputs, False).argmax(dim=1).tolist()):
            found[i] = best
        start += len(batch.inputs)
    return found


@torch.no_grad()
def answer(
    model: Roberta,
    adapter: HeadAdapter,
    tokenizer: RobertaTokenizer,
    question: Question,
    max_length: int,
    longest: int = 30,
) -> str:
    """The likeliest span of at most `longest` tokens of the context."""
    span = span_of(question, tokenizer, max_length)
    if not span.starts:
        return ""
    begin, end = scores(model, adapter, torch.tensor([span.ids]), True)[0].unbind(dim=1)  # (T,) each
    inside = slice(span.first, span.first + len(span.starts))
    both = begin[inside, None] + end[None, inside]  # of every pair
    allowed = torch.ones_like(both, dtype=torch.bool).triu() & ~torch.ones_like(both, dtype=torch.bool).triu(longest)
    best = both.masked_fill(~allowed, -torch.inf).argmax().item()
    first, last = divmod(best, len(span.starts))
    return span.text(question.context, span.first + first, span.first + last)


def normalised(text: str) -> str:
    """As SQuAD compares answers: small letters, without punctuation, articles and superfluous space."""
    text = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def exact_match(text: str, answers: Sequence[str]) -> bool:
    return any(normalised(text) == normalised(answer) for answer in answers)


def f1(text: str, answers: Sequence[str]) -> float:
    """Of the words in common, the best over the answers (Rajpurkar et al., 2016)."""

    def one(answer: str) -> float:
        ours, theirs = normalised(text).split(), normalised(answer).split()
        same = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * same / (len(ours) + len(theirs)) if same else 0.0

    return max(map(one, answers))
