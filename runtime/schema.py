"""Validation of values that were read from files."""

import json
import reprlib
from collections.abc import Collection


# Current names of metadata keys and options, by their names in files of earlier versions.
RENAMED = {
    "tower": "vision_encoder",
    "tower_fingerprint": "vision_encoder_fingerprint",
    "tower_depths": "vision_encoder_depths",
}


def renamed(values: dict[str, object]) -> dict[str, object]:
    """Return a copy of the dict with old keys replaced by their current names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def brief(value: object) -> str:
    """Return a JSON value as text for an error message, with at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Collection[object], most: int = 20) -> str:
    """Return names in quotes for an error message; if there are more than `most`, the first ones and the total."""
    text = ", ".join(map(repr, list(names)[:most])) or "nothing"
    return text if len(names) <= most else f"{text} and others, {len(names):,} in all"


def require_number(name: str, value: object, least: float, most: float, whole: bool = False) -> None:
    """Raise ValueError if a value is not a number (with `whole`, an int) from `least` to `most`, or if it is a bool."""
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        span = f"an integer from {least:,} to {most:,}" if whole else f"a number from {least:g} to {most:g}"
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {span}")


def whole_number(name: str, text: str, least: int = 1, most: int = 2**24) -> int:
    """Return the integer in a metadata string. Raises ValueError if it is not an integer from `least` to `most`."""
    value = int(text) if text.isdecimal() and len(text) < 20 else text
    require_number(name, value, least, most, whole=True)
    return value
