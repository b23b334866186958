"""Tokenizers in the files that they come in: SentencePiece (LLaMA 1 and 2), tiktoken (Llama 3)."""

import base64
import re
from pathlib import Path

import tiktoken
from sentencepiece import SentencePieceProcessor

from data import Tokenizer
from runtime.files import read_bytes


class SentencePieceTokenizer(Tokenizer):
    """LLaMA 1 and 2's kind. Raises ValueError where the file is none."""

    def __init__(self, path: str | Path):
        try:
            self.model = SentencePieceProcessor()
            self.model.LoadFromSerializedProto(read_bytes(path))
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
    folder = Path(folder)
    places = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]  # Llama 3's on Hugging Face is below
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        hint = ""
        if (folder / "tokenizer.json").is_file():
            hint = "; fetch it (Llama 3: original/tokenizer.model) from where tokenizer.json came from"
        raise FileNotFoundError(f"{places[0]}: no such tokenizer file{hint}")
    with open(path, "rb") as file:
        looks_like_text = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return TiktokenTokenizer(path) if looks_like_text else SentencePieceTokenizer(path)
