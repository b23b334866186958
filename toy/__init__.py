"""Data and models for a run without --data: an almanac, handwritten digits, and tiny models pretrained on them."""

from importlib import import_module

TOYS = ("text", "images", "blind")  # the values of --toy; each names a Toy in toy/toys.py
TRAINING = {"layers": 4, "epochs": 12, "warmup_epochs": 1, "batch_size": 32, "lr": 0.05}  # defaults of all toys


def load_toy(name: str):
    """Import and return the Toy with this name, one of TOYS."""
    return import_module("toy.toys").TOYS[name]
