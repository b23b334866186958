"""Inspect adapters, and exchange them with other implementations: python convert.py show|import|export."""

from pathlib import Path

import click
from matplotlib.figure import Figure

from adapter import Adapter
from formats.adapters import describe_reading, load_adapter, write_peft
from runtime.cli import one_line_errors
from runtime.errors import printable
from runtime.files import atomic_write, require_writable
from training.curves import draw_gates


def adapter_summary(adapter: Adapter) -> str:
    """Return the shape, gates and metadata of an adapter, one item per line, and a character plot of its gate values.

    The plot shows absolute values, with one row per layer, topmost first, and one character per head.
    """
    (layers, length, dim), heads = adapter.prompts.shape, adapter.gates.shape[1]
    gates = adapter.gate_values().detach().abs()
    lines = {
        "layers x length x width": f"{layers} x {length} x {dim}, {heads} heads",
        "parameters": f"{sum(p.numel() for p in adapter.parameters()):,}",
        "gates": f"{adapter.gate_activation}, absolute value {gates.mean():.4f} (mean), {gates.max():.4f} (max)",
    }
    omitted = {"format", "version", "base_dim", "base_heads", "gate_activation"}
    lines |= {name: value for name, value in sorted(adapter.metadata.items()) if name not in omitted}
    text = [printable(f"{name + ':':28}{value}") for name, value in lines.items()]
    marks, largest = " .:-=+*#%@", gates.max().clamp(min=1e-12)
    first = int(adapter.metadata.get("base_layers", layers)) - layers
    text += ["", f"|gate| of each layer and head, from '{marks[0]}' 0 to '{marks[-1]}' {largest:.4f}:"]
    for i in reversed(range(layers)):
        row = "".join(marks[round((value / largest).item() * (len(marks) - 1))] for value in gates[i])
        text.append(f"{first + i:>5} |{row}|")
    return "\n".join(text)


@click.group(context_settings={"show_default": True})
def main():
    """Inspect adapters, and exchange them with other implementations."""


def reading_options(command):
    """Add options to a command for what third-party files might not state: heads, gate activation and K."""
    activations = click.Choice(list(Adapter.ACTIVATIONS))
    options = [
        click.option(
            "--heads",
            type=click.IntRange(1),
            help="Number of heads of the base; required if the file has one gate per layer.",
        ),
        click.option(
            "--gate",
            type=activations,
            help="Gate activation of a file from the authors' code.  [default: tanh; identity for one gate per layer]",
        ),
        click.option(
            "--length",
            type=click.IntRange(1),
            default=10,
            help="K, prompt embeddings per layer, if the file is from the authors' code.",
        ),
    ]
    for option in options:
        command = option(command)
    return command


@main.command("show")
@click.argument("path", type=click.Path())
@click.option("--png", type=click.Path(path_type=Path), help="Plot the gates to this PNG file.")
@reading_options
def show_adapter(path, png, **reading):
    """Print an adapter's shape, metadata and gates."""
    with one_line_errors():
        adapter = load_adapter(path, **reading)
        click.echo(adapter_summary(adapter))
        if png:
            figure = Figure(figsize=(6, 4), layout="constrained")
            draw_gates(figure.subplots(), adapter)
            with atomic_write(png) as temporary:
                figure.savefig(temporary, format="png", dpi=120)


@main.command("import")
@click.argument("path", type=click.Path())
@click.argument("out", type=click.Path())
@reading_options
def import_adapter(path, out, **reading):
    """Convert a third-party adapter to this project's format.

    PATH is a file written by the authors' code, lit-llama or litgpt, or a folder written by PEFT. OUT is the new file.
    """
    with one_line_errors():
        require_writable(out)
        adapter = load_adapter(path, **reading)
        adapter.save(out)
        click.echo(printable(describe_reading(adapter)), err=True)


@main.command("export")
@click.argument("path", type=click.Path())
@click.argument("folder", type=click.Path(path_type=Path))
@reading_options
def export_adapter(path, folder, **reading):
    """Write an adapter in the format of PEFT's AdaptionPrompt.

    This works only if all gates of a layer are equal, because PEFT has one gate for all heads of a layer. In a trained
    adapter, they usually differ. Adapters for images or encoders cannot be exported.
    """
    with one_line_errors():
        write_peft(load_adapter(path, **reading), folder)


if __name__ == "__main__":
    main()
