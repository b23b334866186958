"""From a file of instructions to batches of token ids: records, the template, tokens, batches.

Notation as in adapter.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.files import parse_json, read_text

MEDIA = ("image", "video", "audio")  # fields that may name a file that a record is about
IGNORE = -100  # a target that carries no loss; never a token's id

# The Stanford Alpaca template, as the paper trains with it.
ALPACA = {
    "with_input": (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "without_input": (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
}


class Turn(NamedTuple):
    """Of a conversation: one by "system" or none, then by "user" and "assistant" in turns."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One record of a data file. A task may know more of its own; see tasks/."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    image: str = ""  # the name of a picture, or a video, or a sound, that it is about, if any
    name: str = ""  # how messages call it: "record 3"
    turns: tuple[Turn, ...] = ()  # of a conversation; one question and its answer are instruction and output as well
    features: Tensor | None = field(default=None, repr=False, compare=False)  # (F,), of its image


class Tokens(NamedTuple):
    """One example as ids."""

    ids: list[int]  # <bos> prompt response <eos>, or a conversation
    loss_mask: list[bool]  # which of them are learnt: responses, each with its end
    name: str  # the example's
    features: Tensor | None = None  # (F,), of its image, if it has one

    @property
    def size(self) -> int:
        """How many positions it takes."""
        return len(self.ids)


class Batch(NamedTuple):
    """Examples side by side, as a model reads them."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORE where there is no loss
    features: Tensor | None = None  # (B, F), of the images, or zeros; None where no row has an image
    has_image: Tensor | None = None  # (B,), which rows have one


class Tokenizer(Protocol):
    """Text to ids and back, whatever the kind of its file."""

    start_ids: list[int]  # <bos>, where texts begin with one
    eos_id: int  # ends an answer; so do all of `end_ids`
    end_ids: list[int]
    vocab_size: int
    special_ids: dict[str, int]  # of special tokens, by what spells them
    named_tokens: dict[str, str]  # what spells "bos_token" and "eos_token"
    chat_template: str | None  # the base's own, for formats/chat_templates.py

    def encode(self, text: str, after: str = "") -> list[int]:
        """Ids of the text alone, without <bos> and <eos>; `after` is a special token that stands before it.

        Raises ValueError at half a character (a lone surrogate).
        """

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; those beyond the vocabulary, which a padded embedding can yield, have none."""


def read_examples(path: str | Path) -> list[Example]:
    """Alpaca-format records, as of `read_records`. Raises OSError, or ValueError that names file, record and field."""
    records = enumerate(read_records(path))
    return [check_record(record, path, f"record {index}") for index, record in records]


def read_records(path: str | Path) -> list:
    """The values of a JSON list or of JSONL, plain, .gz or .xz. Raises OSError, or ValueError that names the line."""
    if kind := {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".xlsx": "excel"}.get(Path(path).suffix):
        cure = f"pandas.read_{kind}({str(path)!r}).fillna('').to_json('data.json', orient='records')"
        raise ValueError(f"{path}: is not JSON; {cure} makes it so")
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = parse_json(text, path)
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [parse_json(line, path, number) for number, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{path}: holds no examples")
    return records


def check_record(
    record: object, path: str | Path, name: str, needed: Sequence[str] = ("instruction", "output")
) -> Example:
    """An Example of one JSON value; path and name ("record 3", counted from 0) begin the error message.

    Only the fields that are needed, `input`, and one of `image`, `video` and `audio` are looked at.
    """
    where, wanted = f"{path}: {name}", " and ".join(map(repr, needed))
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is a {type(record).__name__}, not an object with {wanted}")
    for needed_field in needed:
        if needed_field not in record:
            raise ValueError(f"{where}: has no field '{needed_field}' (it has: {', '.join(record) or 'nothing'})")
    fields = {key: record[key] for key in (*needed, "input", *MEDIA) if key in record}
    for key, value in fields.items():
        check_text(value, where, key)
    media = list(filter(None, (fields.pop(key) for key in MEDIA if key in fields)))
    if len(media) > 1:
        raise ValueError(f"{where}: has more than one of the fields {', '.join(map(repr, MEDIA))}")
    return Example(**fields, image=media[0] if media else "", name=name)


def check_text(value: object, where: str, name: str) -> None:
    """Raise ValueError where the value of a field is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{name}' is a {type(value).__name__}, not a string")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: field '{name}' has half a character (a lone surrogate)")


def format_prompt(instruction: str, input: str = "") -> str:
    """The instruction in Alpaca's template, up to where the response begins."""
    return ALPACA["with_input" if input else "without_input"].format(instruction=instruction, input=input)


class Round(NamedTuple):
    """A question and its answer, as ids."""

    prompt: list[int]  # all that stands before the answer, and behind the one before
    answer: list[int]  # with its end; this is learnt


class Template(Protocol):
    """How questions and answers are written for a model: `AlpacaTemplate`, or one of formats/chat_templates.py."""

    name: str
    end_ids: list[int]  # each of them ends an answer
    has_turns: bool  # whether an answer may be followed by another question

    def prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        """What training conditions on, and what generation starts from."""

    def rounds(self, examples: Sequence[Example]) -> Iterator[list[Round]]:
        """Of every example. Raises ValueError, naming it, at one that cannot be written so."""


class AlpacaTemplate(Template):
    """One question, one answer."""

    name, has_turns = "alpaca", False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.end_ids = tokenizer, tokenizer.end_ids

    def prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        return self.tokenizer.start_ids + self.tokenizer.encode(format_prompt(instruction, input))

    def rounds(self, examples: Sequence[Example]) -> Iterator[list[Round]]:
        for example in examples:
            if example.turns and not example.output:
                wanted = "alpaca takes a question and an answer: --template auto, llama-2, llama-3 or chatml"
                raise ValueError(f"{example.name}: is a conversation of {len(example.turns)} turns; {wanted}")
            answer = self.tokenizer.encode(example.output) + [self.tokenizer.eos_id]
            yield [Round(self.prompt(example.instruction, example.input), answer)]


def tokenize(template: Template, examples: Sequence[Example], max_length: int) -> tuple[list[Tokens], int]:
    """Every example that fits, and how many had to be cut at `max_length`: a response (which then has no <eos>), or
    whole rounds from the end of a conversation.

    An example whose prompt leaves no room for a response is dropped: it has nothing to learn from.
    Prompt and response are tokenized apart and joined as ids. In one go a token could straddle the two
    (as in 3.3 % of Alpaca), and the prompt in training would not be the one that generation starts from.
    """
    tokenized, cut = [], 0
    for example, rounds in zip(examples, template.rounds(examples)):
        ids, loss_mask = [], []
        for prompt, answer in rounds:
            if ids and len(ids) + len(prompt) + len(answer) > max_length:
                break
            ids += prompt + answer
            loss_mask += [False] * len(prompt) + [True] * len(answer)
        if any(loss_mask[:max_length]):
            tokenized.append(Tokens(ids[:max_length], loss_mask[:max_length], example.name, example.features))
            cut += sum(len(prompt) + len(answer) for prompt, answer in rounds) > max_length
    return tokenized, cut


def hold_out(examples: list, val_size: float, seed: int) -> tuple[list, list]:
    """To train on, and held out: a share of them where `val_size` is below 1, else so many.

    Raises ValueError where nothing is left to train on.
    """
    number = round(val_size * len(examples)) if val_size < 1 else round(val_size)
    if number >= len(examples):
        raise ValueError(f"--val-size holds out {number} of the {len(examples)} examples that fit: none is left")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in order[number:]], [examples[i] for i in order[:number]]


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as lists of example indices; every index occurs once.

    Examples of like length share a batch: next to no padding. The order stays random all the same: they are shuffled,
    sorted only within pools of 64 batches, and the batches shuffled. It follows from the arguments: resuming is exact.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = 64 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool].tolist(), key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def num_targets(examples: Sequence[Tokens]) -> int:
    """How many tokens of the examples have a loss."""
    return sum(sum(example.loss_mask) for example in examples)


def split_over_ranks(examples: Sequence, world_size: int) -> list[list]:
    """A batch in as many parts as there are ranks: about as many positions for each, of like length."""
    parts, before, total = [[] for _ in range(world_size)], 0, sum(example.size for example in examples)
    for example in sorted(examples, key=lambda example: example.size):
        middle = before + example.size / 2  # of the example, in the row of all positions
        parts[int(world_size * middle / total)].append(example)
        before += example.size
    return parts


def group_by_size(examples: Sequence, max_tokens: int) -> Iterator[list]:
    """The examples, shortest first, in parts of at most `max_tokens` positions once padded (or of one example)."""
    part: list = []
    for example in sorted(examples, key=lambda example: example.size):
        if part and (len(part) + 1) * example.size > max_tokens:  # the newest is the longest
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def micro_batches(examples: Sequence[Tokens], max_tokens: int) -> list[Batch]:
    """The examples as batches of at most `max_tokens` positions each (or of one example)."""
    return [collate(part) for part in group_by_size(examples, max_tokens)]


def collate(examples: Sequence[Tokens]) -> Batch:
    """Side by side: targets[b, t] is the token that follows inputs[b, t].

    Where there is no loss (the prompt, the padding) the target is IGNORE. Padding goes to the
    right, where causal attention keeps it from ever being looked at: its id is of no account.
    """
    T = max(len(example.ids) for example in examples) - 1
    inputs = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids, loss_mask = torch.tensor(example.ids), torch.tensor(example.loss_mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(loss_mask[1:], IGNORE)
    known = [example.features for example in examples if example.features is not None]
    if not known:
        return Batch(inputs, targets)
    features = [torch.zeros_like(known[0]) if e.features is None else e.features for e in examples]
    return Batch(inputs, targets, torch.stack(features), torch.tensor([e.features is not None for e in examples]))
