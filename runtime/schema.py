"""Validation of values that were read from files."""

import reprlib


# Current names of metadata keys and options, by their names in files of earlier versions.
RENAMED = {
    "tower": "vision_encoder",
    "tower_fingerprint": "vision_encoder_fingerprint",
    "tower_depths": "vision_encoder_depths",
}


def renamed(values: dict[str, object]) -> dict[str, object]:
    """Return a copy of the dict with old keys replaced by their current names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def require_number(name: str, value: object, least: float, most: float, whole: bool = False) -> None:
    """Raise ValueError if a value is not a number from `least` to `most`. NaN and bools are rejected."""
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        span = f"an integer from {least:,} to {most:,}" if whole else f"a number from {least:g} to {most:g}"
        raise ValueError(f"{name} is {reprlib.repr(value)}, not {span}")


def whole_number(name: str, text: str, least: int = 1, most: int = 2**24) -> int:
    """Return the integer in a metadata string. Raises ValueError if it is not an integer from `least` to `most`."""
    value = int(text) if text.isdecimal() and len(text) < 20 else text
    require_number(name, value, least, most, whole=True)
    return value
