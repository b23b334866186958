"""Instructions in Stanford Alpaca's format, and conversations, as JSON or JSONL."""

from pathlib import Path

from data import Example, read_records
from formats.conversations import read_conversation
from tasks import Task


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """Read every record. Raises OSError, or ValueError that names file, record, and field or turn."""
    return [read_conversation(record, path, f"record {i}") for i, record in enumerate(read_records(path))]


TASK = Task(read)
