"""Measure the perplexity of bases whose layers are stored in float32, bfloat16, 8 bits or 4 bits."""

from functools import partial
from pathlib import Path

import torch
from cloup import option, option_group
from matplotlib.figure import Figure

from experiments.measures import text_perplexity
from experiments.runs import Column, Runs, experiment
from experiments.testbed import ROW, text_rows
from formats.bases import load_llama, read_base
from formats.hub import find_base
from formats.tokenizers import load_tokenizer
from runtime.cli import PATH, Count, device_options
from runtime.device import select_device
from runtime.files import read_text
from runtime.quantization import held_bytes, quantizer

STORAGE = {  # dtype of the base, and number of bits of the layers' weights
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "8 bits": (torch.float32, "8"),
    "4 bits": (torch.float32, "4"),
}


COLUMNS = (Column("perplexity", "perplexity", ".4f"), Column("layer_bytes", "layer bytes", ","))


def label(base: Path) -> str:
    return base.parent.name if base.is_file() else base.name


def measure(text: str, rows: int, device: torch.device, setting: tuple[Path, str], seed: int) -> dict[str, float]:
    """Return the perplexity of the base on the first `rows` rows of `text`, and the size of its layers in bytes.

    `setting` is a pair of a base and a key of STORAGE; `seed` is not used.
    """
    base, storage = setting
    dtype, bits = STORAGE[storage]
    length = min(ROW, read_base(base)[0].max_seq_len or ROW)
    tokens = text_rows(load_tokenizer(base), [text], length)[:rows]
    model, _ = load_llama(base, dtype, device, prepare_layer=quantizer(bits))
    return {"perplexity": text_perplexity(model, tokens.to(device)), "layer_bytes": held_bytes(model.layers)}


@experiment(
    "bits",
    option_group(
        "Options",
        option("--base", "bases", type=PATH, multiple=True, required=True, help="Base model; repeatable."),
        option("--text", type=PATH, required=True, help="File of text similar to what the bases were pretrained on."),
        option(
            "--rows", type=Count(), default=64, help="Number of rows of text, at most 64; each has up to 128 tokens."
        ),
        device_options[0],
    ),
    seeds=False,
)
def bits(runs: Runs, bases, text, rows, device) -> None:
    """Measure how quantization changes the perplexity.

    Evaluates each base on the text in float32, in bfloat16, with 8-bit layers and with 4-bit layers.
    """
    device, _ = select_device(device, "float32")
    paths = {label(base): find_base(base) for base in bases}
    if len(paths) < len(bases):
        raise ValueError("--base: two bases have the same name in the results, that of their folder; rename a folder")
    settings = {f"{name}, {storage}": (base, storage) for name, base in paths.items() for storage in STORAGE}
    results = runs.table(COLUMNS, settings, partial(measure, read_text(text), rows, device))
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name in paths:
        perplexities = [results[f"{name}, {storage}"]["perplexity"][0] for storage in STORAGE]
        axes.plot(list(STORAGE), [100 * (each / perplexities[0] - 1) for each in perplexities], "o-", label=name)
    axes.set_ylabel("perplexity above float32's, %")
    axes.legend()
    runs.save("bits", {"rows": results}, figure)
