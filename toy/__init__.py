"""The embedded default: an almanac, handwritten digits, and the tiny models that are pretrained on them."""

from importlib import import_module

TOYS = ("text", "images", "blind")  # the names of --toy; each is a Toy in toy/toys.py
TRAINING = {"layers": 4, "epochs": 12, "warmup_epochs": 1, "batch_size": 32, "lr": 0.05}  # their defaults


def load_toy(name: str):
    """Import the Toy of one of the names in TOYS."""
    return import_module("toy.toys").TOYS[name]
