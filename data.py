"""From files of instructions to batches of token ids: tokenizer, template, reading, batching."""

import base64
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tiktoken
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

MEDIA = ("image", "video", "audio")  # fields that may name a file that a record is about
IGNORE = -100  # a target that carries no loss; never a token's id

# The Stanford Alpaca templates, as the paper trains with them.
TEMPLATES = {
    "alpaca": {
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
}


class Example(NamedTuple):
    """One record of an instruction file."""

    instruction: str
    input: str = ""
    output: str = ""
    image: str = ""  # the name of a picture, or a video, or a sound, that it is about, if any
    name: str = ""  # how messages call it: "record 3"


class Tokens(NamedTuple):
    """One example as ids."""

    ids: list[int]  # <bos> prompt response <eos>
    prompt_length: int  # so many of them, <bos> included, are not to be learnt
    name: str  # the example's
    kind: str = ""  # those of one kind begin alike: their prompts fill the same form, and have an image or not
    features: Tensor | None = None  # (F,), of its image, if it has one

    @property
    def size(self) -> int:
        """How many positions it takes."""
        return len(self.ids)


class Batch(NamedTuple):
    """Examples side by side, as a model reads them."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORE where nothing is to be learnt
    shared: int  # the first so many inputs are the same in all rows
    features: Tensor | None = None  # (B, F), of the images, or zeros; None where no row has an image
    seen: Tensor | None = None  # (B,), which rows have one


class Tokenizer(Protocol):
    """Text to ids and back, whatever the kind of its file."""

    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without <bos> and <eos>. Raises ValueError at half a character (a lone surrogate)."""

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; those beyond the vocabulary, which a padded embedding can yield, have none."""


class SentencePieceTokenizer(Tokenizer):
    """LLaMA 1 and 2's kind. Raises ValueError where the file is none."""

    def __init__(self, path: str | Path):
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: neither a SentencePiece model nor a tiktoken file") from None
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = self.model.vocab_size()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: has no <bos> or no <eos> (ids {self.bos_id} and {self.eos_id})")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text.encode("utf-8").decode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([id for id in ids if id < self.vocab_size])


class TiktokenTokenizer(Tokenizer):
    """Llama 3's kind: lines of a token's bytes in base64 and its rank, and 256 special tokens behind them.

    Special tokens are known by id alone: text that spells one out is encoded as the text that it is. Raises
    ValueError where the file is none.
    """

    # How Llama 3 cuts text into words before merging bytes.
    WORDS = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    SPECIAL = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }

    def __init__(self, path: str | Path):
        try:
            lines = [line.split() for line in Path(path).read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise ValueError(f"{path}: not a tiktoken file: {error}") from None
        count = len(ranks)
        if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError(
                f"{path}: its {len(lines)} tokens do not have the ranks 0 to {len(lines) - 1}, all bytes among them"
            )
        special = {self.SPECIAL.get(i, f"<|reserved_special_token_{i}|>"): count + i for i in range(256)}
        self.model = tiktoken.Encoding(
            Path(path).name, pat_str=self.WORDS, mergeable_ranks=ranks, special_tokens=special
        )
        self.bos_id, self.eos_id = count, count + 1
        self.vocab_size = count + 256

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text.encode("utf-8").decode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """The text of ordinary ids alone: special tokens have none."""
        return self.model.decode([id for id in ids if id < self.bos_id])


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a base's folder; its content tells the kind. Raises FileNotFoundError or ValueError."""
    places = [
        Path(folder) / "tokenizer.model",
        Path(folder) / "original" / "tokenizer.model",
    ]  # Llama 3's on Hugging Face
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        hint = ""
        if (Path(folder) / "tokenizer.json").is_file():
            hint = "; fetch it (Llama 3: original/tokenizer.model) from where tokenizer.json came from"
        raise FileNotFoundError(f"{places[0]}: no such tokenizer file{hint}")
    with open(path, "rb") as file:
        looks_like_text = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return TiktokenTokenizer(path) if looks_like_text else SentencePieceTokenizer(path)


def kind_of(input: str) -> str:
    """Which form of a template it takes."""
    return "with_input" if input else "without_input"


def format_prompt(instruction: str, input: str = "", template: str = "alpaca") -> str:
    """The instruction in its template, up to where the response begins."""
    return TEMPLATES[template][kind_of(input)].format(instruction=instruction, input=input)


def tokenize_prompt(tokenizer: Tokenizer, instruction: str, input: str = "", template: str = "alpaca") -> list[int]:
    """<bos> and the prompt: what training conditions on, and what generation starts from."""
    return [tokenizer.bos_id] + tokenizer.encode(format_prompt(instruction, input, template))


def tokenize(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int, features: Sequence[Tensor] = ()
) -> tuple[list[Tokens], int]:
    """Every example that fits, and how many responses had to be cut at `max_length` (and so have no <eos>).

    `features` are those of the images, one for each example that has one.

    An example whose prompt leaves no room for a response is dropped: it has nothing to learn from.
    Prompt and response are tokenized apart and joined as ids. In one go a token could straddle the two
    (as in 3.3 % of Alpaca), and the prompt in training would not be the one that generation starts from.
    """
    tokenized, cut, features = [], 0, iter(features)
    for example in examples:
        seen = next(features) if example.image else None
        prompt = tokenize_prompt(tokenizer, example.instruction, example.input)
        if len(prompt) < max_length:
            ids = prompt + tokenizer.encode(example.output) + [tokenizer.eos_id]
            kind = kind_of(example.input) + (" and image" if example.image else "")
            tokenized.append(Tokens(ids[:max_length], len(prompt), example.name, kind, seen))
            cut += len(ids) > max_length
    return tokenized, cut


def read_examples(path: str | Path) -> list[Example]:
    """Alpaca-format records, as of `read_records`. Raises OSError, or ValueError that names file, record and field."""
    named = ((f"record {index}", record) for index, record in enumerate(read_records(path)))
    return [check_record(record, f"{path}: {name}")._replace(name=name) for name, record in named]


def read_text(path: str | Path) -> str:
    """Of a file, plain, .gz or .xz. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such data file") from None
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix or 'UTF-8'} text: {error}") from None


def parse(text: str, path: str | Path, first_line: int = 1) -> object:
    """The value of a text in JSON, which begins in that line of a file. Raises ValueError that names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}: {where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise ValueError(f"{path}: line {first_line}: cannot be read: {error}") from None


def read_value(path: str | Path) -> object:
    """The one value of a JSON file, plain, .gz or .xz. Raises OSError, or ValueError that names the line."""
    return parse(read_text(path), path)


def read_records(path: str | Path) -> list:
    """The values of a JSON list or of JSONL, plain, .gz or .xz. Raises OSError, or ValueError that names the line."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = parse(text, path)
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [parse(line, path, number) for number, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{path}: holds no examples")
    return records


def check_record(record: object, where: str, needed: Sequence[str] = ("instruction", "output")) -> Example:
    """An Example of one JSON value; `where` begins the error message. Records count from 0.

    Only the fields that are needed, `input`, and one of `image`, `video` and `audio` are looked at.
    """
    if not isinstance(record, dict):
        fields = " and ".join(map(repr, needed))
        raise ValueError(f"{where}: is a {type(record).__name__}, not an object with {fields}")
    for field in needed:
        if field not in record:
            raise ValueError(f"{where}: has no field '{field}' (it has: {', '.join(record) or 'nothing'})")
    fields = {field: record[field] for field in (*needed, "input", *MEDIA) if field in record}
    for name, value in fields.items():
        check_text(value, where, name)
    media = list(filter(None, (fields.pop(name) for name in MEDIA if name in fields)))
    if len(media) > 1:
        raise ValueError(f"{where}: has more than one of the fields {', '.join(map(repr, MEDIA))}")
    return Example(**fields, image=media[0] if media else "")


def check_text(value: object, where: str, field: str) -> None:
    """Raise ValueError where the value of a field is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{field}' is a {type(value).__name__}, not a string")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: field '{field}' has half a character (a lone surrogate)")


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as lists of example indices; every index occurs once.

    Examples of like length share a batch, so that there is next to no padding. So that the order stays
    random all the same, they are shuffled, sorted by length only within pools of 64 batches, and
    the batches shuffled again. The result depends on the arguments alone: that is what makes resuming exact.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = 64 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool].tolist(), key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def response_tokens(examples: Sequence[Tokens]) -> int:
    """How many tokens of the examples are to be learnt."""
    return sum(len(example.ids) - example.prompt_length for example in examples)


def shares(examples: Sequence[Tokens], world: int) -> list[list[Tokens]]:
    """A batch in as many parts as there are ranks: about as many tokens for each, of like kind and length."""
    parts, before, all_tokens = [[] for _ in range(world)], 0, sum(example.size for example in examples)
    for example in sorted(examples, key=lambda example: (example.kind, example.size)):
        middle = before + example.size / 2  # of the example, in the row of all tokens
        parts[int(world * middle / all_tokens)].append(example)
        before += example.size
    return parts


def micro_batches(examples: Sequence[Tokens], max_tokens: int) -> Iterator[Batch]:
    """The examples in parts of one kind each, with at most `max_tokens` positions (or of one example)."""
    part: list[Tokens] = []
    for example in sorted(examples, key=lambda example: (example.kind, len(example.ids))):
        # Within a kind the newest is the longest.
        full = (len(part) + 1) * (len(example.ids) - 1) > max_tokens
        if part and (full or example.kind != part[0].kind):
            yield collate(part)
            part = []
        part.append(example)
    if part:
        yield collate(part)


def collate(examples: Sequence[Tokens]) -> Batch:
    """Side by side: targets[b, t] is the token that follows inputs[b, t].

    Where nothing is to be learnt (the prompt, the padding) the target is IGNORE. Padding goes to the
    right, where causal attention keeps it from ever being looked at: its id is of no account.
    Rows with images share no beginning: each has prompts of its own, and so reads it in its own way.
    """
    T = max(len(example.ids) for example in examples) - 1
    inputs = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, example.prompt_length - 1 : len(ids) - 1] = ids[example.prompt_length :]
    pictured = [example.features for example in examples if example.features is not None]
    if pictured:
        features = [torch.zeros_like(pictured[0]) if e.features is None else e.features for e in examples]
        seen = torch.tensor([example.features is not None for example in examples])
        return Batch(inputs, targets, 0, torch.stack(features), seen)
    shared = len(commonprefix([example.ids[:-1] for example in examples])) if len(examples) > 1 else 0
    return Batch(inputs, targets, min(shared, T - 1))
