"""Adapters of others, and a look into any: python exchange.py show|import|export.

The published implementations compute the same attention and differ in their files and in the gate:

- the authors' release: one .pth, `adapter_query.weight` (L*K, C) and a gate per head in every layer. Their training
  code puts tanh around the gate, their published inference code does not;
- lit-llama and litgpt: one .pth, `adapter_wte` and `gating_factor` per adapted layer, the gate as it is; older files
  have one gate for all heads;
- PEFT's AdaptionPrompt: a folder, one gate a layer, as it is.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapter import Adapter
from runtime.files import atomic_write
from formats.bases import check_dense, load_pth, open_tensors
from runtime.cli import one_line_errors
from encoder_tuning.heads import HeadAdapter
from multimodal import ImageAdapter
from training.runs import draw_gates


def load_adapter(path: str | Path, *, heads: int | None = None, gate: str = "tanh", length: int = 10) -> Adapter:
    """An adapter of ours or of anybody; what lies at `path` tells whose.

    `heads` is the base's H, needed where a file has one gate for all of them. `gate` and `length` are what the authors'
    files leave unsaid: their activation and K. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if path.is_dir():
        return read_peft(path, heads)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    with open(path, "rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02"):  # what torch.save writes, and wrote once
        return kind_of(path).load(path)
    tensors = load_pth(path)
    tensors = tensors.get("model", tensors)  # litgpt's are one level down
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: not a file of tensors by name")
    if "adapter_query.weight" in tensors:
        return read_authors(path, tensors, gate, length)
    if any(".adapter_wte." in name for name in tensors):
        return read_lit(path, tensors, heads)
    raise ValueError(f"{path}: an adapter of neither kind known; it holds {', '.join(sorted(tensors)[:3])} ...")


def kind_of(path: Path) -> type[Adapter]:
    """For words, for images, or for an encoder: what tensors a file of ours has beside prompts and gates."""
    kinds = {"projection.0.weight": ImageAdapter, "head.0.weight": HeadAdapter}
    try:
        with safe_open(path, "pt") as file:
            return next((kinds[name] for name in kinds if name in file.keys()), Adapter)
    except SafetensorError:
        return Adapter  # which will say what is wrong


def read_authors(path: Path, tensors: Mapping[str, Tensor], gate: str, length: int) -> Adapter:
    query = tensors["adapter_query.weight"]
    if (
        not isinstance(query, Tensor)
        or query.layout != torch.strided
        or query.dim() != 2
        or len(query) == 0
        or len(query) % length
    ):
        shape = tuple(getattr(query, "shape", ()))
        raise ValueError(f"{path}: adapter_query.weight {shape} is no whole number of layers of {length} prompts each")
    gates = numbered(tensors, r"layers\.(\d+)\.attention\.gate")
    layers = len(query) // length
    if len(gates) < layers:
        raise ValueError(f"{path}: has prompts for {layers} layers of {length} each, but gates for {len(gates)}")
    topmost = sorted(gates)[-layers:]
    prompts = dict(zip(topmost, query.split(length)))
    return assemble(path, "the authors' release", prompts, {i: gates[i] for i in topmost}, None, gate)


def read_lit(path: Path, tensors: Mapping[str, Tensor], heads: int | None) -> Adapter:
    prompts = numbered(tensors, r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight")
    gates = numbered(tensors, r"transformer\.h\.(\d+)\.attn\.gating_factor")
    return assemble(path, "lit-llama or litgpt", prompts, gates, heads, "identity")


def read_peft(folder: Path, heads: int | None) -> Adapter:
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file, so {folder} is no adapter of PEFT's")
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{config}: not JSON with a peft_type") from None
    if kind != "ADAPTION_PROMPT":
        raise ValueError(f"{config}: peft_type is {kind!r}, not 'ADAPTION_PROMPT'")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        path = folder / "adapter_model.bin"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: has neither adapter_model.safetensors nor adapter_model.bin")
    tensors = {name: fetch() for name, fetch in open_tensors(path).items()}
    prompts = numbered(tensors, r".*\.layers\.(\d+)\.self_attn\.adaption_prompt")
    gates = numbered(tensors, r".*\.layers\.(\d+)\.self_attn\.adaption_gate")
    for i, prompt in prompts.items():
        if not isinstance(prompt, Tensor) or prompt.dim() != 3 or len(prompt) != 1:
            raise ValueError(f"{path}: the prompt of layer {i} is {tuple(getattr(prompt, 'shape', ()))}, not (1, K, C)")
    return assemble(path, "PEFT", {i: prompt[0] for i, prompt in prompts.items()}, gates, heads, "identity")


def numbered(tensors: Mapping[str, Tensor], pattern: str) -> dict[int, Tensor]:
    """Those whose name has the pattern, by layer."""
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    return {int(match[1]): tensors[name] for name, match in matches.items() if match and match[1] == str(int(match[1]))}


def assemble(
    path: Path, origin: str, prompts: dict[int, Tensor], gates: dict[int, Tensor], heads: int | None, activation: str
) -> Adapter:
    """An adapter of prompts (K, C) and gates (of H or 1 values) by layer. Raises ValueError where they don't fit."""
    layers = sorted(prompts)
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))) or layers != sorted(gates):
        raise ValueError(f"{path}: has prompts for layers {layers} and gates for layers {sorted(gates)}")
    for i in layers:
        try:
            for tensor in (prompts[i], gates[i]):
                check_dense(tensor)
                if not tensor.float().isfinite().all():
                    raise ValueError("holds values that are not finite")
        except ValueError as error:
            raise ValueError(f"{path}: layer {i}: {error}") from None
        if prompts[i].dim() != 2 or 0 in prompts[i].shape or prompts[i].shape != prompts[layers[0]].shape:
            shapes = f"{tuple(prompts[i].shape)} in layer {i}, {tuple(prompts[layers[0]].shape)} in layer {layers[0]}"
            raise ValueError(f"{path}: prompts are {shapes}, not (K, C) in all")
    widths = {gates[i].numel() for i in layers}
    if widths == {1} and heads is None:
        raise ValueError(
            f"{path}: has one gate for all heads; how many has the base? say --heads, or --base to generate.py"
        )
    heads = heads or max(widths)
    if not widths <= {1, heads} or 0 in widths:
        raise ValueError(f"{path}: layers have {sorted(widths)} gates, the base has {heads} heads")
    length, dim = prompts[layers[0]].shape
    adapter = Adapter(layers=len(layers), length=length, dim=dim, heads=heads, gate_activation=activation)
    with torch.no_grad():
        adapter.prompts.copy_(torch.stack([prompts[i].float() for i in layers]))
        adapter.gates.copy_(torch.stack([gates[i].float().flatten().expand(heads) for i in layers]))
    adapter.metadata = {"base_layers": str(layers[-1] + 1), "imported_from": f"{origin}: {path.name}"}
    return adapter


def reading_of(adapter: Adapter) -> str:
    """In a line, how a file of others was understood: what it leaves unsaid may be wrong."""
    layers, length, dim = adapter.prompts.shape
    origin = adapter.metadata.get("imported_from", "an adapter of ours")
    return f"{origin}: read as {layers} layers of {length} prompts of width {dim}, gates with {adapter.gate_activation}"


def write_peft(adapter: Adapter, folder: Path) -> None:
    """A folder that PEFT loads. Raises ValueError where the gates of a layer differ: PEFT has one for all heads."""
    opening = adapter.gate_values().detach()  # (L, H); PEFT has no tanh
    for i, row in enumerate(opening):
        if (row != row[0]).any():
            spread = f"the gates of adapted layer {i + 1} are from {row.min():.4f} to {row.max():.4f}"
            raise ValueError(
                f"{spread}; PEFT has one gate for all heads of a layer, so nothing there would be the same"
            )
    if "base_layers" not in adapter.metadata:
        raise ValueError("the adapter's file does not say how many layers its base has")
    layers, length = adapter.prompts.shape[:2]
    first = int(adapter.metadata["base_layers"]) - layers
    tensors = {}
    for i in range(layers):
        place = f"base_model.model.model.layers.{first + i}.self_attn"
        tensors[f"{place}.adaption_prompt"] = adapter.prompts[i].detach()[None].clone()  # (1, K, C)
        tensors[f"{place}.adaption_gate"] = opening[i, :1].clone()
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "target_modules": "self_attn",
        "adapter_len": length,
        "adapter_layers": layers,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with atomic_write(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def describe(adapter: Adapter) -> str:
    """What there is to say of an adapter, and its gates drawn as text: a row a layer, topmost first, a mark a head."""
    (layers, length, dim), heads = adapter.prompts.shape, adapter.gates.shape[1]
    opening = adapter.gate_values().detach()
    lines = {
        "layers x length x width": f"{layers} x {length} x {dim}, {heads} heads",
        "parameters": f"{sum(p.numel() for p in adapter.parameters()):,}",
        "gates": f"{adapter.gate_activation}, open by {opening.abs().mean():.4f} (mean) to {opening.abs().max():.4f}",
    }
    known = {"format", "version", "base_dim", "base_heads", "gate_activation"}
    lines |= {name: value for name, value in sorted(adapter.metadata.items()) if name not in known}
    text = [f"{name + ':':26}{value}" for name, value in lines.items()]
    marks = " .:-=+*#%@"
    largest = opening.abs().max().clamp(min=1e-12)
    first = int(adapter.metadata.get("base_layers", layers)) - layers
    text += ["", f"|gate| of each layer and head, from '{marks[0]}' 0 to '{marks[-1]}' {largest:.4f}:"]
    for i in reversed(range(layers)):
        row = "".join(marks[round((value / largest).item() * (len(marks) - 1))] for value in opening[i].abs())
        text.append(f"{first + i:>5} |{row}|")
    return "\n".join(text)


# ---------------------------------------------------------------------------------------------------
# The command


@click.group(context_settings={"show_default": True})
def main():
    """Look into adapters, and exchange them with other implementations."""


def reading_options(command):
    """What files of others leave unsaid."""
    options = [
        click.option("--heads", type=click.IntRange(1), help="H of the base, where a file has one gate for all heads."),
        click.option(
            "--gate", type=click.Choice(list(Adapter.ACTIVATIONS)), default="tanh", help="Of the authors' files."
        ),
        click.option("--length", type=click.IntRange(1), default=10, help="K of the authors' files."),
    ]
    for option in options:
        command = option(command)
    return command


@main.command()
@click.argument("path", type=click.Path())
@click.option("--png", type=click.Path(path_type=Path), help="Draw the gates to this file.")
@reading_options
def show(path, png, **reading):
    """Shape, base, training record and gates of an adapter, ours or another's."""
    with one_line_errors():
        adapter = load_adapter(path, **reading)
        click.echo(describe(adapter))
        if png:
            figure = Figure(figsize=(6, 4), layout="constrained")
            draw_gates(figure.subplots(), adapter)
            with atomic_write(png) as temporary:
                figure.savefig(temporary, format="png", dpi=120)


@main.command("import")
@click.argument("path", type=click.Path())
@click.argument("out", type=click.Path())
@reading_options
def import_(path, out, **reading):
    """Write the adapter of the authors, lit-llama, litgpt or PEFT at PATH to OUT, a file of ours."""
    with one_line_errors():
        adapter = load_adapter(path, **reading)
        adapter.save(out)
        click.echo(reading_of(adapter), err=True)


@main.command("export")
@click.argument("path", type=click.Path())
@click.argument("folder", type=click.Path(path_type=Path))
@reading_options
def export(path, folder, **reading):
    """Write the adapter at PATH to FOLDER, as PEFT's AdaptionPrompt."""
    with one_line_errors():
        write_peft(load_adapter(path, **reading), folder)


if __name__ == "__main__":
    main()
