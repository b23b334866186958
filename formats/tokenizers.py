"""Load tokenizers: SentencePiece (LLaMA 1, 2), tiktoken (Llama 3), and tokenizer.json (any base)."""

import base64
import hashlib
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
    """Convert exceptions of a tokenizer library to a ValueError whose message begins with `what`.

    Rust panics are converted, too, although they are not subclasses of Exception. An OSError is raised unchanged.
    """
    try:
        yield
    except BaseException as error:
        panic = "Panic" in type(error).__name__
        if isinstance(error, OSError) or not (isinstance(error, Exception) or panic):
            raise
        raise ValueError(f"{what}: {first_line(error)}") from None


# Some tokenizers insert a space before the first character of their input. If the input begins with this mark, which no
# token contains, the ids of both the space and the mark can be removed.
MARK = "\ufdd4"


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of LLaMA 1 and 2.

    Raises ValueError if the file is not a SentencePiece model, or if the model has no <bos> or no <eos>.
    """

    def __init__(self, path: str | Path):
        try:
            self.model = SentencePieceProcessor(model_file=str(require_file(path)))
        except RuntimeError:
            raise ValueError(f"{path}: is neither a SentencePiece model nor a tiktoken file") from None
        self.path = path
        self.num_pieces = self.vocab_size = self.model.vocab_size()
        bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.start_ids, self.end_ids = [bos_id], [self.eos_id]
        if min(bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: <bos> or <eos> is missing (their ids are {bos_id} and {self.eos_id})")
        with library_errors(f"{path}: is a corrupt SentencePiece model"):
            control = [id for id in range(self.num_pieces) if self.model.is_control(id)]
            self.special_ids = {self.model.id_to_piece(id): id for id in (bos_id, self.eos_id, *control)}
        self.named_tokens = dict(zip(("bos_token", "eos_token"), self.special_ids))
        self.space_after_special = True  # as in Meta's code, which inserts a space after <bos>
        self.mark_ids = self.model.encode(MARK)

    def encode(self, text: str, preceding: str = "") -> list[int]:
        text = require_utf8(text)
        with library_errors(f"{self.path}: cannot encode the text"):
            if preceding and not self.space_after_special:
                ids = self.model.encode(MARK + text)
                if ids[: len(self.mark_ids)] == self.mark_ids:
                    return ids[len(self.mark_ids) :]
            return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        with library_errors(f"{self.path}: cannot decode the response"):
            special = set(self.special_ids.values())
            return self.model.decode([id for id in ids if id < self.num_pieces and id not in special])

    def token_id(self, token: str) -> int | None:
        id = self.model.piece_to_id(token)
        return None if id == self.model.unk_id() else id

    def token_text(self, id: int) -> str | None:
        return self.model.id_to_piece(id) if id < self.num_pieces else None


class TiktokenTokenizer(Tokenizer):
    """The tokenizer of Llama 3. Each line of the file contains the bytes of a token in base64, and its id.

    The ids of 256 special tokens follow those in the file. Text that spells a special token is encoded as plain text.
    Raises ValueError if the file is not a tiktoken file.
    """

    # The regular expression by which Llama 3 splits text before merging bytes.
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    # Very long runs of whitespace, or of other characters, overflow the library's stack. Like Meta's tokenizer, split
    # them after 25,000 characters.
    LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")
    SPECIAL = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",  # since Llama 3.1, like <|eom_id|> and <|python_tag|>
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }

    def __init__(self, path: str | Path):
        try:
            lines = [line.split() for line in read_bytes(path).splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise ValueError(f"{path}: is not a tiktoken file: {error}") from None
        count = len(ranks)
        if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError(
                f"{path}: expected ranks 0 to {len(lines) - 1} for its {len(lines)} tokens, and a token for every byte"
            )
        special = {self.SPECIAL.get(i, f"<|reserved_special_token_{i}|>"): count + i for i in range(256)}
        self.model = tiktoken.Encoding(
            Path(path).name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.eos_id, self.vocab_size = count + 1, count + 256
        self.start_ids = [count]
        # These tokens end a document, a message to a tool, and a message to the user.
        self.end_ids = [count + 1, count + 8, count + 9]
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
        """Return the text of the ids without special tokens."""
        return self.model.decode([id for id in ids if id <= self.model.max_token_value - 256])

    def token_id(self, token: str) -> int | None:
        return self.special_ids.get(token)

    def token_text(self, id: int) -> str | None:
        return None  # other tokens consist of bytes, not text, and `special_ids` contains all special tokens


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, which was loaded from the file `path`, usually a tokenizer.json.

    Text that spells a special token is encoded as plain text. Padding and truncation are turned off. Raises ValueError
    if the tokenizer cannot encode text, or if its start token is not in its vocabulary.
    """

    def __init__(self, model: tokenizers.Tokenizer, path: Path):
        self.path = path
        self.model = model
        with library_errors(f"{path}: cannot be read as a tokenizer"):
            self.model.no_padding()
            self.model.no_truncation()
            ids, alone = (self.model.encode("a", add_special_tokens=special).ids for special in (True, False))
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=0)
        self.start_ids = ids[: next((i for i in range(len(ids)) if ids[i : i + len(alone)] == alone), 0)]
        if max(self.start_ids, default=0) >= self.vocab_size:
            raise ValueError(f"{path}: its start token {max(self.start_ids)} is not among its {self.vocab_size} tokens")
        self.end_ids = []  # set later by `apply_settings` or `load_gguf_tokenizer`
        self.named_tokens = {}
        added = self.model.get_added_tokens_decoder().items()
        self.special_ids = {token.content: id for id, token in added if token.special and token.content}
        self.special_ids |= {self.token_text(id): id for id in self.start_ids if self.token_text(id)}

    def encode(self, text: str, preceding: str = "") -> list[int]:
        text = require_utf8(text)
        with library_errors(f"{self.path}: cannot encode the text"):
            if not preceding:
                return self.encode_as_text(text)
            # Some tokenizers insert a space at the beginning of text, but not after a special token. The library
            # recognizes `preceding` only in a mode in which it also recognizes special tokens that the text spells.
            # Therefore, in this mode, the text is encoded only up to the first special token that it spells.
            end = min((text.index(token) for token in self.special_ids if token in text), default=len(text))
            self.model.encode_special_tokens = False
            first, *ids = self.model.encode(preceding + text[:end], add_special_tokens=False).ids
            if first != self.special_ids[preceding]:
                return self.encode_as_text(text)
            if end == len(text):
                return ids
            mark_ids = self.encode_as_text(MARK)
            rest = self.encode_as_text(MARK + text[end:])
            return ids + (
                rest[len(mark_ids) :] if rest[: len(mark_ids)] == mark_ids else self.encode_as_text(text[end:])
            )

    def encode_as_text(self, text: str) -> list[int]:
        self.model.encode_special_tokens = True
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with library_errors(f"{self.path}: cannot decode the response"):
            return self.model.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def token_text(self, id: int) -> str | None:
        return self.model.id_to_token(id)


def read_tokenizer_json(path: Path) -> JsonTokenizer:
    """Read tokenizer.json. Raises OSError or ValueError."""
    text = read_text(path)
    values = parse_json(text, path)
    growth = max_growth(values.get("normalizer") if isinstance(values, dict) else None)
    if growth > MAX_GROWTH:
        raise ValueError(
            f"{path}: its normalizers can make text {growth:.3g} times as long; the maximum is {MAX_GROWTH}"
        )
    with library_errors(f"{path}: cannot be read as a tokenizer"):
        model = tokenizers.Tokenizer.from_str(text)
    return JsonTokenizer(model, path)


MAX_GROWTH = 100  # largest factor by which normalizers may lengthen text
MAX_TOKENS = 2**24  # added tokens whose id is not smaller are ignored


def max_growth(normalizer: object) -> float:
    """Return the largest factor by which the replacements of a tokenizer.json's normalizer can lengthen text."""
    if not isinstance(normalizer, dict):
        return 1.0
    inner = normalizer.get("normalizers")
    growth = prod(map(max_growth, inner)) if isinstance(inner, list) else 1.0
    if normalizer.get("type") == "Replace":
        pattern = normalizer.get("pattern")
        matched = pattern.get("String") if isinstance(pattern, dict) else None  # a Regex may match one character
        growth *= max(1.0, len(str(normalizer.get("content"))) / max(1, len(str(matched or ""))))
    return growth


def read_settings(path: Path) -> dict:
    """Read a JSON file beside a tokenizer. Return an empty dict if it does not exist."""
    return read_json_object(path) if path.is_file() else {}


def apply_settings(tokenizer: Tokenizer, folder: Path) -> None:
    """Apply the settings in the JSON files beside a tokenizer: special tokens, use of <bos>, and end-of-text tokens.

    Raises ValueError if no token ends text, or if a file is invalid.
    """
    settings = read_settings(folder / "special_tokens_map.json") | read_settings(folder / "tokenizer_config.json")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = token_content(settings.get(name))
        if token or (token == "" and name not in tokenizer.named_tokens):
            tokenizer.named_tokens[name] = token
    tokenizer.special_ids |= read_added_tokens(tokenizer, folder, settings)
    tokenizer.vocab_size = max(tokenizer.vocab_size, *(id + 1 for id in tokenizer.special_ids.values()))

    tokenizer.end_ids = read_end_ids(tokenizer, folder, settings)
    tokenizer.eos_id = tokenizer.end_ids[0]
    unnamed = set(tokenizer.end_ids) - set(tokenizer.special_ids.values())
    tokenizer.special_ids |= {tokenizer.token_text(id): id for id in unnamed}
    # A tokenizer.json has its own rule for <bos>.
    if settings.get("add_bos_token") is False and not isinstance(tokenizer, JsonTokenizer):
        tokenizer.start_ids = []
    if settings and isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.space_after_special = settings.get("legacy") is True  # as in transformers 5


def token_content(token: object) -> str | None:
    """Return the text of a token, which is stored as a string or as an object; None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_added_tokens(tokenizer: Tokenizer, folder: Path, settings: dict) -> dict[str, int]:
    """Return the ids of the special tokens that the files beside a tokenizer add or name, keyed by the tokens' text."""
    added = read_settings(folder / "added_tokens.json")
    decoder = settings.get("added_tokens_decoder")
    for id, token in decoder.items() if isinstance(decoder, dict) else ():
        text = token_content(token)
        # A token that is not special, and that the library knows, is found in text by the library itself.
        if text and id.isdecimal() and (token.get("special", True) or tokenizer.token_id(text) is None):
            added[text] = int(id)
    named = list(tokenizer.named_tokens.values())
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(name) or ()
        named += map(token_content, tokens.values() if isinstance(tokens, dict) else tokens)
    added |= {text: tokenizer.token_id(text) for text in named if text and text not in added}
    return {text: id for text, id in added.items() if text and type(id) is int and 0 <= id < MAX_TOKENS}


def read_end_ids(tokenizer: Tokenizer, folder: Path, settings: dict) -> list[int]:
    """Return the ids of the tokens that end a response: the first one in training, any of them in generation.

    They are taken from `settings`, generation_config.json, config.json and the tokenizer itself, in this order. Tokens
    that text starts with are omitted, unless there are no others. Raises ValueError if no token is found.
    """
    bos = tokenizer.named_tokens.get("bos_token")
    found = [tokenizer.special_ids.get(token_content(settings.get("eos_token")))]
    for name in ("generation_config.json", "config.json"):
        ids = read_settings(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    found += tokenizer.end_ids
    found = list(dict.fromkeys(id for id in found if type(id) is int and 0 <= id < tokenizer.vocab_size))
    known = set(tokenizer.special_ids.values())
    end_ids = [id for id in found if id in known or tokenizer.token_text(id)]
    if not end_ids:
        files = "tokenizer_config.json, generation_config.json, config.json"
        advice = "set eos_token_id in config.json to its id"
        raise ValueError(f"{folder}: none of {files} names a token that ends text; {advice}")
    start_ids = {*tokenizer.start_ids, tokenizer.special_ids.get(bos)}
    return [id for id in end_ids if id not in start_ids] or end_ids  # some bases have one token for both


def read_chat_template(folder: Path) -> str | None:
    """Return the template in chat_template.jinja or tokenizer_config.json, or None if there is none.

    If tokenizer_config.json contains several templates, the one with the name "default" is returned.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    path = folder / "tokenizer_config.json"
    found = read_json_object(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        defaults = (each for each in found if isinstance(each, dict) and each.get("name") == "default")
        found = next(defaults, {}).get("template")
    return found if isinstance(found, str) else None


# Sample texts that show whether two tokenizers encode alike.
PROBES = ("Below is an instruction.", "  two spaces,\ttab\n\nlines", "naïve 漢字 🦙 3.14159", "def f(x): return x['a']")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of the special tokens, the vocabulary size, and the ids of sample texts."""
    ids = [tokenizer.encode(text) for text in PROBES]
    special = sorted(tokenizer.special_ids.items())
    content = repr((tokenizer.start_ids, tokenizer.end_ids, special, tokenizer.vocab_size, ids))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_tokenizer(base: str | Path, num_embeddings: int | None = None) -> Tokenizer:
    """Load the tokenizer of a base: tokenizer.json or tokenizer.model in its folder, or the one in a GGUF file.

    If both tokenizer.json and tokenizer.model exist, tokenizer.json is used, as in transformers. If `num_embeddings` is
    given, special tokens without an embedding are omitted. Raises FileNotFoundError, or ValueError if a file is invalid
    or the base has too few embeddings for the other tokens.
    """
    base = Path(base)
    tokenizer = None
    if base.is_file() or any(base.glob("*.gguf")):
        from formats.gguf_tokenizer import find_gguf_tokenizer

        tokenizer = find_gguf_tokenizer(base)
    if tokenizer is None:
        tokenizer = load_tokenizer_files(base.parent if base.is_file() else base)
    if num_embeddings is not None:
        omit_tokens_beyond(num_embeddings, tokenizer, base)
    return tokenizer


def load_tokenizer_files(folder: Path) -> Tokenizer:
    """Load tokenizer.json, or tokenizer.model (SentencePiece or tiktoken), and apply the settings beside it.

    If the folder is in Meta's layout, its parent may contain tokenizer.model. Warns if both files exist and encode a
    sample text differently. Raises FileNotFoundError or ValueError.
    """
    places = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]  # original/ is in Llama 3's folders
    found: list[Tokenizer] = []
    if (folder / "tokenizer.json").is_file():
        found.append(read_tokenizer_json(folder / "tokenizer.json"))
    elif (folder / "params.json").is_file():  # Meta's download.sh puts one tokenizer beside all folders
        places.append(folder.resolve().parent / "tokenizer.model")
    path = next((place for place in places if place.is_file()), None)
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
            warn(f"{folder}: tokenizer.json and tokenizer.model encode {differing!r} differently; using tokenizer.json")
    tokenizer.chat_template = read_chat_template(folder)
    apply_settings(tokenizer, folder)
    return tokenizer


def omit_tokens_beyond(num_embeddings: int, tokenizer: Tokenizer, base: Path) -> None:
    """Omit special tokens without an embedding, such as a <pad> that was added after pretraining.

    They are omitted from `vocab_size` and `end_ids`, but stay in `special_ids`, so that a chat template that writes one
    causes an error. Raises ValueError if an ordinary token, <bos> or <eos> has no embedding.
    """
    if tokenizer.vocab_size <= num_embeddings:
        return
    special = set(tokenizer.special_ids.values())
    needed = max(
        *tokenizer.start_ids, tokenizer.eos_id, *(id for id in range(tokenizer.vocab_size) if id not in special)
    )
    if needed >= num_embeddings:
        found = f"has {num_embeddings} embeddings, but its tokenizer has {tokenizer.vocab_size} tokens"
        raise ValueError(f"{base}: {found}; use the tokenizer that the model was trained with")
    tokenizer.vocab_size = num_embeddings
    tokenizer.end_ids = [id for id in tokenizer.end_ids if id < num_embeddings]
