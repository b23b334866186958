"""Tokenizers in the files they come in: SentencePiece (LLaMA 1, 2), tiktoken (Llama 3), tokenizer.json (all else)."""

import base64
import re
from contextlib import contextmanager
from math import prod
from pathlib import Path

import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor

from data import Tokenizer, require_utf8
from runtime.cli import warn
from runtime.files import first_line, parse_json, read_bytes, read_json_object, read_text, require_file


@contextmanager
def library_errors(what: str):
    """Convert whatever the library raises to ValueError; panics of Rust are not subclasses of Exception."""
    try:
        yield
    except BaseException as error:
        panic = "Panic" in type(error).__name__
        if isinstance(error, OSError) or not (isinstance(error, Exception) or panic):
            raise
        raise ValueError(f"{what}: {first_line(error)}") from None


class SentencePieceTokenizer(Tokenizer):
    """LLaMA 1 and 2's kind. Raises ValueError where the file is none."""

    def __init__(self, path: str | Path):
        try:
            self.model = SentencePieceProcessor(model_file=str(require_file(path)))
        except RuntimeError:
            raise ValueError(f"{path}: neither a SentencePiece model nor a tiktoken file") from None
        self.path = path
        bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.start_ids, self.end_ids, self.vocab_size = [bos_id], [self.eos_id], self.model.vocab_size()
        if min(bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: has no <bos> or no <eos> (ids {bos_id} and {self.eos_id})")
        with library_errors(f"{path}: a broken SentencePiece model"):
            self.special_ids = {self.model.id_to_piece(id): id for id in (bos_id, self.eos_id)}
        self.named_tokens = dict(zip(("bos_token", "eos_token"), self.special_ids))

    def encode(self, text: str, preceding: str = "") -> list[int]:
        text = require_utf8(text)
        with library_errors(f"{self.path}: cannot encode the text"):
            return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        with library_errors(f"{self.path}: cannot decode the response"):
            return self.model.decode([id for id in ids if id < self.vocab_size])


class TiktokenTokenizer(Tokenizer):
    """Llama 3's kind: lines of a token's bytes in base64 and its rank, and 256 special tokens behind them.

    Special tokens are known by id alone: text that spells one out is encoded as the text that it is. Raises
    ValueError where the file is none.
    """

    # How Llama 3 splits text before merging bytes.
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    # The library's stack overflows at longer runs. Meta's tokenizer cuts them at the same length.
    LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")
    SPECIAL = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }

    def __init__(self, path: str | Path):
        try:
            lines = [line.split() for line in read_bytes(path).splitlines()]
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
            Path(path).name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.eos_id, self.vocab_size = count + 1, count + 256
        self.start_ids, self.end_ids = [count], [count + 1, count + 9]  # a conversation's turns end with <|eot_id|>
        self.special_ids = special
        self.named_tokens = {"bos_token": self.SPECIAL[0], "eos_token": self.SPECIAL[1]}

    def encode(self, text: str, preceding: str = "") -> list[int]:
        pieces = []
        start = 0
        for run in self.LONG_RUN.finditer(require_utf8(text)):
            pieces.append(text[start : run.end()])
            start = run.end()
        return [id for piece in (*pieces, text[start:]) for id in self.model.encode_ordinary(piece)]

    def decode(self, ids: list[int]) -> str:
        """The text of ordinary ids alone: special tokens have none."""
        return self.model.decode([id for id in ids if id < self.vocab_size - 256])


class JsonTokenizer(Tokenizer):
    """tokenizer.json, whatever kind it holds, by the library that writes it.

    Text that spells a special token is encoded as the text that it is. Raises ValueError where the file is none, or
    where nothing beside it says which token ends a text.
    """

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        self.path = path
        text = read_text(path)
        values = parse_json(text, path)
        growth = max_growth(values.get("normalizer") if isinstance(values, dict) else None)
        if growth > MAX_GROWTH:
            raise ValueError(f"{path}: its normalizers make a text up to {growth:.3g} times as long")
        with library_errors(f"{path}: cannot be read as a tokenizer"):
            self.model = tokenizers.Tokenizer.from_str(text)
            self.model.no_padding()
            self.model.no_truncation()
            ids, alone = (self.model.encode("a", add_special_tokens=special).ids for special in (True, False))
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=0)
        self.start_ids = ids[: next((i for i in range(len(ids)) if ids[i : i + len(alone)] == alone), 0)]
        if max(self.start_ids, default=0) >= self.vocab_size:
            raise ValueError(f"{path}: a text starts with token {max(self.start_ids)} of {self.vocab_size}")
        self.named_tokens = read_named_tokens(folder)
        self.end_ids = self.read_end_ids(folder)
        self.eos_id = self.end_ids[0]
        added = self.model.get_added_tokens_decoder().items()
        self.special_ids = {token.content: id for id, token in added if token.special and token.content}
        ends = {self.model.id_to_token(id): id for id in (*self.start_ids, *self.end_ids)}
        self.special_ids |= {text: id for text, id in ends.items() if text}
        self.spells_special = re.compile("|".join(map(re.escape, self.special_ids)))

    def read_end_ids(self, folder: Path) -> list[int]:
        """That of tokenizer_config.json first, for training; then what generation_config.json and config.json name."""
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        found = [self.model.token_to_id(self.named_tokens["eos_token"])] if "eos_token" in self.named_tokens else []
        for values in (read_json_object(folder / name) for name in names[1:] if (folder / name).is_file()):
            ids = values.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        found = list(dict.fromkeys(id for id in found if type(id) is int and 0 <= id < self.vocab_size))
        if not found:
            raise ValueError(f"{folder}: none of {', '.join(names)} says which token ends a text")
        return found

    def encode(self, text: str, preceding: str = "") -> list[int]:
        # Some put a space before the first token of all, and none behind a special token. The library finds those in a
        # text, or it does not: with one in front it may, as long as there is none within.
        text = require_utf8(text)
        with library_errors(f"{self.path}: cannot encode the text"):
            if preceding and not self.spells_special.search(text):
                self.model.encode_special_tokens = False
                first, *ids = self.model.encode(preceding + text, add_special_tokens=False).ids
                if first == self.special_ids[preceding]:
                    return ids
            self.model.encode_special_tokens = True
            return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with library_errors(f"{self.path}: cannot decode the response"):
            return self.model.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=True)


MAX_GROWTH = 100


def max_growth(normalizer: object) -> float:
    """Return how many times as long the replacements of a tokenizer.json's normalizer can make a text."""
    if not isinstance(normalizer, dict):
        return 1.0
    inner = normalizer.get("normalizers")
    growth = prod(map(max_growth, inner)) if isinstance(inner, list) else 1.0
    if normalizer.get("type") == "Replace":
        pattern = normalizer.get("pattern")
        matched = pattern.get("String") if isinstance(pattern, dict) else None  # a Regex may match one character
        growth *= max(1.0, len(str(normalizer.get("content"))) / max(1, len(str(matched or ""))))
    return growth


def read_named_tokens(folder: Path) -> dict[str, str]:
    """What spells "bos_token", "eos_token" and others, by tokenizer_config.json, or an older file beside it."""
    values = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values |= read_json_object(folder / name) if (folder / name).is_file() else {}
    tokens = {name: values.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def read_chat_template(folder: Path) -> str | None:
    """That of chat_template.jinja, or of tokenizer_config.json, where one of several is named "default"; else None."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    path = folder / "tokenizer_config.json"
    found = read_json_object(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = (one for one in found if isinstance(one, dict) and one.get("name") == "default")
        found = next(named, {}).get("template")
    return found if isinstance(found, str) else None


PROBES = ("Below is an instruction.", "  two spaces,\ttab\n\nlines", "naïve 漢字 🦙 3.14159", "def f(x): return x['a']")


def load_tokenizer(base: str | Path, num_embeddings: int | None = None) -> Tokenizer:
    """Load the tokenizer in a base's folder, or beside its file: tokenizer.json, or tokenizer.model of either kind.

    If both are there, the first is used, unless they make different ids of a text. Raises FileNotFoundError, or
    ValueError, also if the base has too few embeddings.
    """
    base = Path(base)
    folder = base.parent if base.is_file() else base
    places = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]  # the latter: Llama 3
    path = next((place for place in places if place.is_file()), None)
    found: list[Tokenizer] = []
    if (folder / "tokenizer.json").is_file():
        found.append(JsonTokenizer(folder))
    if path is not None:
        with open(require_file(path), "rb") as file:
            is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
        found.append(TiktokenTokenizer(path) if is_tiktoken else SentencePieceTokenizer(path))
    if not found:
        raise FileNotFoundError(f"{places[0]}: no such tokenizer file, and no tokenizer.json beside it")
    tokenizer = found[0]
    if len(found) == 2:
        differing = next((text for text in PROBES if found[0].encode(text) != found[1].encode(text)), None)
        if differing is not None:
            warn(f"{folder}: tokenizer.json and tokenizer.model make other ids of {differing!r}; the latter is used")
            tokenizer = found[1]
    tokenizer.chat_template = read_chat_template(folder)
    if num_embeddings is not None and tokenizer.vocab_size > num_embeddings:
        raise ValueError(f"{base}: {num_embeddings} embeddings, but its tokenizer has {tokenizer.vocab_size} tokens")
    return tokenizer
