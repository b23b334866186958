"""What fewer bits cost: the perplexity of text, by how the frozen layers are held."""

from pathlib import Path

import click
import cloup
import torch
from cloup import option, option_group
from matplotlib.figure import Figure

from experiments.measures import text_perplexity
from experiments.tables import out_option, save_results
from experiments.testbed import ROW, text_rows
from formats.bases import load_llama, read_base
from formats.hub import find_base
from formats.tokenizers import load_tokenizer
from runtime.cli import PATH, Count, device_options, one_line_errors
from runtime.device import select_device
from runtime.files import read_text
from runtime.quantization import held_bytes, quantizer

HELD = {  # dtype, and bits of the layers' weights
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "8 bits": (torch.float32, 8),
    "4 bits": (torch.float32, 4),
}


def label(base: Path) -> str:
    return base.parent.name if base.is_file() else base.name


def compare_holdings(base: Path, text: Path, rows: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Perplexity of the text and bytes of the layers, for each of HELD. Raises OSError or ValueError."""
    found = {}
    length = min(ROW, read_base(base)[0].max_seq_len or ROW)
    tokens = text_rows(load_tokenizer(base), [read_text(text)], length)[:rows]
    for name, (dtype, bits) in HELD.items():
        prepare_layer = quantizer(bits, device) if bits else None
        model, _ = load_llama(base, dtype, device, prepare_layer=prepare_layer)
        values = {"perplexity": text_perplexity(model, tokens.to(device)), "layer_bytes": held_bytes(model.layers)}
        found[name] = values
        click.echo(f"{label(base):24}{name:>10}{values['perplexity']:>12.4f}{values['layer_bytes']:>16,}")
    return found


@cloup.command("bits", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--base", "bases", type=PATH, multiple=True, required=True, help="The base model; repeatable."),
    option("--text", type=PATH, required=True, help="Text of the kind that it was made of."),
    option("--rows", type=Count(), default=64, help="So many rows of it, at most; of 128 tokens."),
    device_options[0],
    out_option,
)
@one_line_errors()
def compare_bits(bases, text, rows, device, out):
    """Measure what fewer bits cost.

    Perplexity of a text by bases in float32, bfloat16, and with their layers in 8 and in 4 bits.
    """
    device, _ = select_device(device, "float32")
    click.echo(f"{'':24}{'held in':>10}{'perplexity':>12}{'bytes, layers':>16}")
    found = {label(base): compare_holdings(find_base(base), text, rows, device) for base in bases}
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name, rows_of in found.items():
        wide = rows_of["float32"]["perplexity"]
        axes.plot(list(rows_of), [100 * (row["perplexity"] / wide - 1) for row in rows_of.values()], "o-", label=name)
    axes.set_ylabel("perplexity above float32's, %")
    axes.legend()
    save_results(out, "bits", {"text": text.name, "bases": found}, figure)
