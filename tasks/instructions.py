"""Instructions in Stanford Alpaca's format, and conversations, as JSON or JSONL."""

from pathlib import Path

from data import Example, read_records
from formats.conversations import read_conversation
from runtime.distributed import print_rank0
from tasks import Task


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Example]:
    """Read every record. Conversations without a turn to train on are skipped, and their number is printed.

    Raises OSError, or ValueError if no record is left or one is invalid. The message names the invalid field or turn.
    """
    examples = [read_conversation(record, path, f"record {i}") for i, record in enumerate(read_records(path))]
    learned = list(filter(has_learned_turn, examples))
    if len(learned) < len(examples):
        print_rank0(
            f"{path}: {len(examples) - len(learned):,} of {len(examples):,} records skipped: no turn to train on"
        )
    if not learned:
        raise ValueError(f"{path}: none of the {len(examples):,} records has a turn to train on")
    return learned


def has_learned_turn(example: Example) -> bool:
    """Return True for an instruction, and for a conversation with a response that the loss covers."""
    return not example.turns or any(turn.learned for turn in example.turns if turn.role == "assistant")


TASK = Task(read)
