"""What fewer bits cost: the perplexity of text, by how the frozen layers are held."""

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

HELD = {  # dtype, and bits of the layers' weights
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "8 bits": (torch.float32, "8"),
    "4 bits": (torch.float32, "4"),
}


COLUMNS = (Column("perplexity", "perplexity", ".4f"), Column("layer_bytes", "bytes, layers", ","))


def label(base: Path) -> str:
    return base.parent.name if base.is_file() else base.name


def measure(text: str, rows: int, device: torch.device, setting: tuple[Path, str], seed: int) -> dict[str, float]:
    """Perplexity of the text and bytes of the layers, for a base and a key of HELD. Nothing is random."""
    base, held = setting
    dtype, bits = HELD[held]
    length = min(ROW, read_base(base)[0].max_seq_len or ROW)
    tokens = text_rows(load_tokenizer(base), [text], length)[:rows]
    model, _ = load_llama(base, dtype, device, prepare_layer=quantizer(bits))
    return {"perplexity": text_perplexity(model, tokens.to(device)), "layer_bytes": held_bytes(model.layers)}


@experiment(
    "bits",
    option_group(
        "Options",
        option("--base", "bases", type=PATH, multiple=True, required=True, help="The base model; repeatable."),
        option("--text", type=PATH, required=True, help="Text of the kind that it was pretrained on."),
        option("--rows", type=Count(), default=64, help="Maximum number of rows of it, of 128 tokens each."),
        device_options[0],
    ),
    seeds=False,
)
def bits(runs: Runs, bases, text, rows, device) -> None:
    """Measure what fewer bits cost.

    Perplexity of a text by bases in float32, bfloat16, and with their layers in 8 and in 4 bits.
    """
    device, _ = select_device(device, "float32")
    names = {label(base): find_base(base) for base in bases}
    settings = {f"{name}, {held}": (base, held) for name, base in names.items() for held in HELD}
    found = runs.table(COLUMNS, settings, partial(measure, read_text(text), rows, device))
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name in names:
        perplexities = [found[f"{name}, {held}"]["perplexity"][0] for held in HELD]
        axes.plot(list(HELD), [100 * (each / perplexities[0] - 1) for each in perplexities], "o-", label=name)
    axes.set_ylabel("perplexity above float32's, %")
    axes.legend()
    runs.save("bits", {"rows": found}, figure)
