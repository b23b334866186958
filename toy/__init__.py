"""Data and models for a run without --data: an almanac, handwritten digits, and tiny models pretrained on them."""

from importlib import import_module

TOYS = ("text", "images", "blind")  # the values of --toy; each names a Toy in toy/toys.py
TRAINING = {  # defaults of all toys
    "layers": 4,
    "epochs": 12,
    "warmup_epochs": 1,
    "batch_size": 32,
    "lr": 0.05,
    "micro_batch_tokens": 8192,  # a tiny model is faster with whole batches, even on a CPU
}


def load_toy(name: str):
    """Import and return the Toy with this name, one of TOYS."""
    return import_module("toy.toys").TOYS[name]
