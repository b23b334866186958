"""Read instruction data, format it with a prompt template, tokenize and batch it.

The notation is that of adapter.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.files import parse_json, read_text
from runtime.schema import brief, listed

MEDIA = ("image", "video", "audio")  # fields that name the media file of a record
IGNORE = -100  # ignore_index of the cross entropy

# The Stanford Alpaca template, which the paper uses.
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
    """A message of a conversation. The first one may be a system message; then user and assistant alternate."""

    role: str  # "system", "user" or "assistant"
    content: str
    learned: bool = True  # False for an assistant's response that the loss does not cover


@dataclass(frozen=True)
class Example:
    """A record of a data file. A task may add fields in a subclass; see tasks/."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    image: str = ""  # the file name of an image, video or sound, if there is one
    name: str = ""  # a label for error messages, such as "record 3"
    turns: tuple[Turn, ...] = ()  # a conversation; if it has two turns, they are also in instruction and output
    features: Tensor | None = field(default=None, repr=False, compare=False)  # (F,), features of the image


class Request(NamedTuple):
    """An instruction to respond to."""

    instruction: str
    input: str = ""
    adapter: str = "base"  # the name of the adapter that responds; "base" is the base without an adapter
    features: Tensor | None = None  # (F,), features of the image, if there is one
    history: Sequence[Turn] = ()  # earlier turns, oldest first


class TokenizedExample(NamedTuple):
    """The token ids of one example, and the positions that the loss covers."""

    ids: list[int]  # <bos> prompt response <eos> in Alpaca's template, or a conversation
    loss_mask: list[bool]  # True for the tokens that the loss covers: responses, including their end tokens
    name: str  # label of the example, for error messages
    features: Tensor | None = None  # (F,), features of the image, if there is one

    @property
    def num_tokens(self) -> int:
        """Number of token ids."""
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Number of target tokens, over which the loss is averaged."""
        return sum(self.loss_mask)


class Batch(NamedTuple):
    """A padded batch of examples."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORE at padding and at tokens that the loss does not cover
    features: Tensor | None = None  # (B, F), zeros for a row without an image; None if no row has an image
    has_image: Tensor | None = None  # (B,), bool; None if no row has an image


class Tokenizer(Protocol):
    """The interface of the tokenizers of LLaMA bases. (RoBERTa's, for encoders, has a smaller one.)"""

    start_ids: list[int]  # <bos>, or empty
    eos_id: int  # ends a response in training with the templates alpaca and llama-2; the others write their own
    end_ids: list[int]  # any of them ends a response in generation
    vocab_size: int  # all ids are smaller, except those of special tokens without an embedding
    special_ids: dict[str, int]  # ids of the special tokens by their text
    named_tokens: dict[str, str]  # texts of special tokens by name, such as "bos_token" or "eos_token"
    chat_template: str | None  # the base's own Jinja template

    def encode(self, text: str, preceding: str = "") -> list[int]:
        """Return the ids of the text, without <bos> and <eos>.

        `preceding` is the special token before the text, if any; some tokenizers then omit a leading space. Raises
        ValueError if the text has an unpaired surrogate.
        """

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids, without special tokens.

        Ids outside the vocabulary, which a padded output head can produce, are skipped.
        """

    def token_id(self, token: str) -> int | None:
        """Return the id of the token with this text, or None. tiktoken finds special tokens only."""

    def token_text(self, id: int) -> str | None:
        """Return the vocabulary entry of a token, or None if it has none that is text. tiktoken always returns None."""


def read_examples(path: str | Path) -> list[Example]:
    """Read records in Alpaca's format. Raises OSError, or a ValueError that names the file and the record or line."""
    records = enumerate(read_records(path))
    return [check_record(record, path, f"record {index}") for index, record in records]


def read_records(path: str | Path) -> list:
    """Return the records of a JSON list, a JSONL file, or a single JSON object. The file may be a .gz or .xz.

    Raises OSError, or a ValueError that names the file, and the line of a syntax error.
    """
    readers = {".csv": "csv({!r})", ".tsv": r"csv({!r}, sep='\t')", ".parquet": "parquet({!r})", ".xlsx": "excel({!r})"}
    if reader := readers.get(Path(path).suffix):
        conversion = f"pandas.read_{reader.format(str(path))}.fillna('').to_json('data.json', orient='records')"
        raise ValueError(f"{path}: is not JSON; convert it with {conversion}")
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = parse_json(text, path)
    else:
        lines = enumerate(text.split("\n"), start=1)
        try:
            records = [parse_json(line, path, number) for number, line in lines if line.strip()]
        except ValueError as error:
            records = [parse_whole(text, path, error)]
    if not records:
        raise ValueError(f"{path}: contains no records")
    fields = {"instruction", "messages", "conversations"}
    if len(records) == 1 and isinstance(records[0], dict) and not fields & records[0].keys():
        for key, value in records[0].items():
            if isinstance(value, list) and value and all(isinstance(item, dict) and len(item) > 2 for item in value):
                raise ValueError(
                    f"{path}: is one object, whose key {key!r} contains {len(value)} records; "
                    f"the file must contain only this list"
                )
    return records


def parse_whole(text: str, path: str | Path, error: ValueError) -> object:
    """Parse `text` as a single JSON value that spans several lines.

    If this fails, raise `error`, the error of one of the lines. But if the text only lacks the brackets of a list,
    raise a ValueError that says so.
    """
    with suppress(ValueError):
        return parse_json(text, path)
    with suppress(ValueError):
        records = parse_json(f"[{text.strip().removesuffix(',')}]", path)
        error = ValueError(f"{path}: contains {len(records)} records that are not in a list; enclose them in [ and ]")
    raise error from None


def check_record(
    record: object, path: str | Path, name: str, needed: Sequence[str] = ("instruction", "output")
) -> Example:
    """Check one JSON value and return an Example. Raises a ValueError that begins with `path` and `name` ("record 3").

    The fields in `needed`, the field `input`, and one of `image`, `video` and `audio` are read; all others are ignored.
    """
    where = f"{path}: {name}"
    if not isinstance(record, dict):
        expected = " and ".join(map(repr, needed))
        raise ValueError(f"{where}: is {brief(record)}, not an object with {expected}")
    for key in needed:
        if key not in record:
            raise ValueError(f"{where}: has no field {key!r} (it has: {listed(record)})")
    fields = {key: record[key] for key in (*needed, "input", *MEDIA) if key in record}
    if fields.get("input", "") is None:  # null is the same as no input
        del fields["input"]
    for key, value in fields.items():
        check_text(value, where, key)
    media = list(filter(None, (fields.pop(key) for key in MEDIA if key in fields)))
    if len(media) > 1:
        raise ValueError(f"{where}: has more than one of the fields {', '.join(map(repr, MEDIA))}; keep only one")
    return Example(**fields, image=media[0] if media else "", name=name)


def check_text(value: object, where: str, name: str) -> None:
    """Raise ValueError if the value of a field is not a string, or contains an unpaired surrogate."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{name}' is {brief(value)}, not a string")
    try:
        require_utf8(value)
    except ValueError:
        raise ValueError(f"{where}: field '{name}' has an unpaired surrogate") from None


def require_utf8(text: str) -> str:
    """Return the text. Raises ValueError if it has an unpaired surrogate, which may stand for an invalid UTF-8 byte."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has an unpaired surrogate, or bytes that are not UTF-8")
    return text


def format_prompt(instruction: str, input: str = "") -> str:
    """Return the prompt in Alpaca's template, which ends with "### Response:"."""
    return ALPACA["with_input" if input else "without_input"].format(instruction=instruction, input=input)


class Exchange(NamedTuple):
    """A prompt and its response, as token ids."""

    prompt_ids: list[int]  # tokens since the previous exchange, including responses that the loss does not cover
    response_ids: list[int]  # the response with its end token; the loss covers these tokens


class Template(Protocol):
    """The format of prompts and responses: `AlpacaTemplate`, or one of formats/chat_templates.py."""

    name: str
    end_ids: list[int]  # any of them ends a response
    has_turns: bool  # whether it supports conversations of several turns

    def encode_prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        """Return the ids of the prompt, as in training. `history` is ignored if `has_turns` is False.

        Raises ValueError if the text cannot be encoded, or if the base's own template fails.
        """

    def encode_exchanges(self, examples: Sequence[Example]) -> Iterator[list[Exchange]]:
        """Yield the exchanges of each example. Raises a ValueError that names an unsuitable example."""


class AlpacaTemplate(Template):
    """Stanford Alpaca's template: one instruction, one response."""

    name = "alpaca"
    has_turns = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.end_ids = tokenizer.end_ids

    def encode_prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        return self.tokenizer.start_ids + self.tokenizer.encode(format_prompt(instruction, input))

    def encode_exchanges(self, examples: Sequence[Example]) -> Iterator[list[Exchange]]:
        for example in examples:
            if example.turns and not example.output:
                expected = "the template alpaca takes one instruction and its response"
                advice = "use --template auto, llama-2, llama-3 or chatml"
                raise ValueError(
                    f"{example.name}: is a conversation of {len(example.turns)} turns, but {expected}; {advice}"
                )
            response_ids = self.tokenizer.encode(example.output) + [self.tokenizer.eos_id]
            yield [Exchange(self.encode_prompt(example.instruction, example.input), response_ids)]


def tokenize(template: Template, examples: Sequence[Example], max_length: int) -> tuple[list[TokenizedExample], int]:
    """Return the tokenized examples, at most `max_length` tokens each, and the number of truncated ones.

    Truncation removes whole exchanges from the end of a conversation. If the first response is too long, it is
    shortened and has no <eos>. An example whose prompt leaves no room for a response is dropped, which does not count
    as truncated.

    Prompt and response are tokenized separately and joined as ids. If they were tokenized together, a token could span
    both (as in 3.3 % of Alpaca with Llama 2's tokenizer), so the prompt in training would differ from the one that
    generation starts from.
    """
    tokenized = []
    num_truncated = 0
    for example, exchanges in zip(examples, template.encode_exchanges(examples)):
        total = sum(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in exchanges)
        ids = []
        loss_mask = []
        for prompt_ids, response_ids in exchanges:
            if ids and len(ids) + len(prompt_ids) + len(response_ids) > max_length:
                break
            ids += prompt_ids + response_ids
            loss_mask += [False] * len(prompt_ids) + [True] * len(response_ids)
        if any(loss_mask[:max_length]):
            tokenized.append(TokenizedExample(ids[:max_length], loss_mask[:max_length], example.name, example.features))
            num_truncated += total > max_length
    return tokenized, num_truncated


def hold_out(examples: list, val_size: float, seed: int) -> tuple[list, list]:
    """Split randomly into (training, validation); `val_size` < 1 is a fraction, otherwise a count.

    Raises ValueError if the training set would be empty.
    """
    if not examples:
        raise ValueError("every example was dropped, because it is too long for --max-seq-len; increase --max-seq-len")
    number = round(val_size * len(examples)) if val_size < 1 else round(val_size)
    if number >= len(examples):
        raise ValueError(
            f"--val-size {val_size:g} holds out {number:,} examples, but there are only {len(examples):,}; "
            f"decrease it, so that some are left for training"
        )
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in order[number:]], [examples[i] for i in order[:number]]


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch as lists of example indices; every index occurs once.

    Examples of similar length share a batch, which leaves almost no padding. To keep the order random, the examples
    are shuffled, then sorted by length only within pools of 64 batches, and the batches are shuffled. The result is
    deterministic in (seed, epoch), so that resuming is exact.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = 64 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool].tolist(), key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def split_over_ranks(examples: Sequence, world_size: int) -> list[list]:
    """Split a batch into one shard per rank, the shortest examples first.

    Shards have about the same number of tokens, and the examples of a shard have similar lengths. A shard may be empty.
    """
    parts = [[] for _ in range(world_size)]
    total = sum(example.num_tokens for example in examples)
    before = 0  # cumulative number of tokens
    for example in sorted(examples, key=lambda example: example.num_tokens):
        middle = before + example.num_tokens / 2
        parts[int(world_size * middle / total)].append(example)
        before += example.num_tokens
    return parts


MICRO_BATCH_TOKENS = 8192


def group_by_length(examples: Sequence, max_tokens: int | None = None) -> list[list]:
    """Group the examples, shortest first, into micro-batches.

    After padding, a micro-batch has at most `max_tokens` positions, by default 8,192, unless it is a single example.
    """
    max_tokens = max_tokens or MICRO_BATCH_TOKENS
    groups = []
    for example in sorted(examples, key=lambda example: example.num_tokens):
        padded = example.num_tokens  # the longest of its group so far, because the examples are sorted
        if not groups or (len(groups[-1]) + 1) * padded > max_tokens:
            groups.append([])
        groups[-1].append(example)
    return groups


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Pad the examples to a batch, where targets[b, t] is the token after inputs[b, t].

    Targets in prompts and in the padding are IGNORE. The padding is on the right, where causal attention never sees it,
    so that its token id does not matter. For an empty list, the batch is one position whose target is IGNORE.
    """
    if not examples:
        return Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE))
    T = max(len(example.ids) for example in examples) - 1
    inputs = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        loss_mask = torch.tensor(example.loss_mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(loss_mask[1:], IGNORE)
    given = [example.features for example in examples if example.features is not None]
    if not given:
        return Batch(inputs, targets)
    features = [torch.zeros_like(given[0]) if example.features is None else example.features for example in examples]
    has_image = [example.features is not None for example in examples]
    return Batch(inputs, targets, torch.stack(features), torch.tensor(has_image))
