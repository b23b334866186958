"""Instructions in Stanford Alpaca's format, and conversations: JSON or JSONL, one's own or anybody's."""

from pathlib import Path

from data import Example, read_records
from formats.conversations import read_conversation


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """Every record. Raises OSError, or ValueError that names file, record, and field or turn."""
    return [read_conversation(record, path, f"record {i}") for i, record in enumerate(read_records(path))]
