"""Read records with `messages`, `conversations` (ShareGPT), `history` (LLaMA-Factory), or `prompt` and `completion`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data import MEDIA, Example, Turn, check_record, check_text
from runtime.schema import brief, listed

# Roles of Turn, keyed by their names in records.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Fields of each turn for role and content, keyed by the field of the record that contains the turns.
LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}

# Fields of a record or a turn that are not supported; empty values are ignored.
UNSUPPORTED = ("tools", "tool_calls", "function_call", "reasoning_content", "images", "videos", "audios")
# Placeholders of LLaVA and LLaMA-Factory, which mark the position of an image, video or sound in the text.
PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")
PLACEHOLDER_AT_EDGE = re.compile(rf"^\s*{PLACEHOLDER.pattern}\s*|\s*{PLACEHOLDER.pattern}\s*$")


def read_conversation(record: object, path: str | Path, name: str) -> Example:
    """Convert a record to an Example. A record is a conversation, a prompt and completion, or Alpaca's fields.

    `name` is the label of the record, such as "record 3". Raises a ValueError that names the record, and the turn if
    the error is in one turn.
    """
    where = f"{path}: {name}"
    if isinstance(record, dict) and {"prompt", "completion"} <= record.keys():
        if not {"instruction", "output", *LAYOUTS} & record.keys():
            for field in ("prompt", "completion"):
                check_text(record[field], where, field)
            record = record | {"instruction": record["prompt"], "output": record["completion"]}
    turns = read_turns(record, path, name)
    if turns is None:
        example = check_record(record, path, name)
        if record.get("context") and "input" not in record:
            raise ValueError(f"{where}: field 'context' is not supported; rename it to 'input'")
        if record.get("label") is False:
            raise ValueError(f"{where}: field 'label' is false, which marks an undesirable response; remove the record")
        if example.image:
            texts = remove_placeholder((example.instruction, example.input), where)
            example = replace(example, instruction=texts[0], input=texts[1])
        return example
    example = check_record({key: record[key] for key in MEDIA if key in record}, path, name, needed=())
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError(f"{where}: has no turn of the assistant, so there is nothing to learn")
    if example.image:
        contents = remove_placeholder([turn.content for turn in turns], where)
        turns = [turn._replace(content=content) for turn, content in zip(turns, contents)]
    if [turn.role for turn in turns] == ["user", "assistant"]:
        example = replace(example, instruction=turns[0].content, output=turns[1].content)
    return replace(example, turns=tuple(turns))


def read_turns(record: object, path: str | Path, name: str, with_output: bool = True) -> list[Turn] | None:
    """Check a record and return its turns, or None if it is not a conversation, for example a single instruction.

    The turns are those of `messages` or `conversations`, after an optional `system`. A record with Alpaca's fields has
    turns only if it also has LLaMA-Factory's `system` or `history`, which come first; its `output` is included if
    `with_output`. Raises ValueError if a field is missing, has the wrong type or is not supported, or if a turn
    of `messages` or `conversations` has an unknown role, has no content, or is in the wrong order.
    """
    if not isinstance(record, dict):
        return None
    where = f"{path}: {name}"
    check_supported(record, where)
    system = record.get("system") or ""
    check_text(system, where, "system")
    start = [Turn("system", system)] if system.strip() else []
    if field := next((field for field in LAYOUTS if field in record), None):
        return check_turns(record[field], where, field, start)
    history = record.get("history") or []
    if "instruction" not in record or not (start or history):
        return None
    example = check_record(record, path, name, needed=["instruction", "output"] if with_output else ["instruction"])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"{where}: field 'history' is not a list of pairs; each must be a prompt and its response")
    for text in sum(history, []):
        check_text(text, where, "history")
    turns = [Turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair)]
    turns.append(Turn("user", user_text(example.instruction, example.input)))
    return start + turns + ([Turn("assistant", example.output)] if with_output else [])


def user_text(instruction: str, input: str) -> str:
    """Join Alpaca's instruction and input into the text of one turn."""
    return f"{instruction}\n\n{input}" if input else instruction


def check_supported(values: dict, where: str) -> None:
    """Raise ValueError if an unsupported field of a record or a turn is not empty."""
    for field in UNSUPPORTED:
        if values.get(field):
            hint = (
                f"; put a single file in the record's field {field[:-1]!r}" if field.removesuffix("s") in MEDIA else ""
            )
            raise ValueError(f"{where}: field {field!r} is not supported{hint}")


def remove_placeholder(texts: Sequence[str], where: str) -> list[str]:
    """Return the texts without the placeholder of an image, which may be at the beginning or the end of one of them.

    The model takes an image through the adaption prompts, not as a token. Raises ValueError if there are several
    placeholders, or if one is within a text.
    """
    number = sum(len(PLACEHOLDER.findall(text)) for text in texts)
    texts = [PLACEHOLDER_AT_EDGE.sub("", text, count=1) for text in texts]
    if number > 1 or any(map(PLACEHOLDER.search, texts)):
        found = (
            f"{number} placeholders such as <image>" if number > 1 else "a placeholder such as <image> within a text"
        )
        raise ValueError(f"{where}: has {found}; expected only one, at the beginning or the end of a text")
    return texts


def is_learned(value: dict, role: str, where: str) -> bool:
    """Return False for a message with OpenAI's `weight: 0` or axolotl's `train: false`, and True otherwise.

    Raises ValueError if either field has an invalid value, or selects a turn for training that is not the assistant's.
    """
    weight, train = value.get("weight"), value.get("train")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}: field 'weight' is {weight!r}; expected 0 or 1")
    if train not in (None, False, True):
        raise ValueError(f"{where}: field 'train' is {train!r}; expected true or false")
    if role != "assistant" and (weight or train):
        field = "weight" if weight else "train"
        raise ValueError(f"{where}: field '{field}' selects a {role} turn for training; select only assistant turns")
    return not (weight == 0 or train is False)


def check_turns(values: object, where: str, field: str, start: Sequence[Turn] = ()) -> list[Turn]:
    """Check the turns in a field of a record, and return `start` followed by them. Raises as `read_turns` does."""
    if not isinstance(values, list):
        raise ValueError(f"{where}: field '{field}' is {brief(values)}, not a list")
    role_name, content_name = LAYOUTS[field]
    turns = list(start)
    for index, value in enumerate(values):
        here = f"{where}: turn {index}"
        if not isinstance(value, dict):
            raise ValueError(f"{here}: is {brief(value)}, not an object")
        for name in (role_name, content_name):
            if name not in value:
                raise ValueError(f"{here}: has no field '{name}' (it has: {listed(value)})")
            check_text(value[name], here, name)
        check_supported(value, here)
        role, content = ROLES.get(value[role_name]), value[content_name]
        if role is None:
            raise ValueError(f"{here}: {role_name} {value[role_name]!r} is not one of {', '.join(ROLES)}")
        if not content.strip():
            raise ValueError(f"{here}: field '{content_name}' is empty")
        before = turns[-1].role if turns else None
        if before not in {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}[role]:
            place = f"follows {before!r}" if before else "comes first"
            raise ValueError(f"{here}: {role!r} {place}; the order is system (optional), user, assistant, user ...")
        turns.append(Turn(role, content, is_learned(value, role, here)))
    return turns
