"""Records of conversations: `messages`, ShareGPT's `conversations`, `prompt` and `completion`."""

from dataclasses import replace
from pathlib import Path

from data import MEDIA, Example, Turn, check_record, check_text

# Who speaks, by what the records call them.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Fields of a record that hold its turns, and of a turn: who speaks, and what.
LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}


def read_conversation(record: object, path: str | Path, name: str) -> Example:
    """An Example of a record of any kind, told by its fields: a conversation, prompt and completion, or Alpaca's.

    Raises ValueError as data.check_record, naming record and turn.
    """
    if not isinstance(record, dict):
        return check_record(record, path, name)
    where = f"{path}: {name}"
    if (field := turns_field(record)) is not None:
        about = check_record({key: record[key] for key in MEDIA if key in record}, path, name, needed=())
        turns = check_turns(record[field], where, field)
        if [turn.role for turn in turns] == ["user", "assistant"]:
            about = replace(about, instruction=turns[0].content, output=turns[1].content)
        return replace(about, turns=turns)
    if {"prompt", "completion"} <= record.keys() and not {"instruction", "output"} & record.keys():
        for field in ("prompt", "completion"):
            check_text(record[field], where, field)
        record = record | {"instruction": record["prompt"], "output": record["completion"]}
    return check_record(record, path, name)


def turns_field(record: object) -> str | None:
    """The field that holds a record's turns; None where it is no conversation."""
    return next((field for field in LAYOUTS if isinstance(record, dict) and field in record), None)


def check_turns(values: object, where: str, field: str, with_response: bool = True) -> tuple[Turn, ...]:
    """Check the value of a record's field, and return its turns; one must be the assistant's if `with_response`.

    Raises ValueError at an unknown role, an empty content, or an order that cannot be.
    """
    if not isinstance(values, list):
        raise ValueError(f"{where}: field '{field}' is a {type(values).__name__}, not a list")
    role_name, content_name = LAYOUTS[field]
    turns: list[Turn] = []
    for index, value in enumerate(values):
        here = f"{where}: turn {index}"
        if not isinstance(value, dict):
            raise ValueError(f"{here}: is a {type(value).__name__}, not an object")
        for name in (role_name, content_name):
            if name not in value:
                raise ValueError(f"{here}: has no field '{name}' (it has: {', '.join(map(repr, value)) or 'nothing'})")
            check_text(value[name], here, name)
        role, content = ROLES.get(value[role_name]), value[content_name]
        if role is None:
            raise ValueError(f"{here}: {role_name} {value[role_name]!r} is none of {', '.join(ROLES)}")
        if not content.strip():
            raise ValueError(f"{here}: field '{content_name}' is empty")
        before = turns[-1].role if turns else None
        if before not in {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}[role]:
            after = f"follows the {before}'s" if before else "is the first"
            raise ValueError(f"{here}: the {role}'s {after}; the order is system (or none), user, assistant, user ...")
        turns.append(Turn(role, content))
    if with_response and not any(turn.role == "assistant" for turn in turns):
        raise ValueError(f"{where}: none of its {len(turns)} turns is the assistant's: there is nothing to learn")
    return tuple(turns)
