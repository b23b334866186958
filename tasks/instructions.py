"""Instructions in Stanford Alpaca's format: JSON or JSONL, of the author's own or anybody else's making."""

from pathlib import Path

from data import Example, read_examples


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """Every record. Raises OSError, or ValueError that names file, record and field."""
    return read_examples(path)
