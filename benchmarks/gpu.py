"""A GPU measured whole by one command, the most important first; what is done when the time is up is kept."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from cloup import command, option, option_group
from matplotlib.figure import Figure
from torch import Tensor

from adapter import Adapter, gated_attention, gated_attention_paper
from benchmarks.measuring import copy_speed, matmul_speed, measured_on, peak_growth, seconds_of
from benchmarks.memory import EXAMPLE_TOKENS, EXAMPLES, PAPER, count_bytes, step_operations
from benchmarks.peers import installed_peers
from benchmarks.workload import SHAPES, random_adapter, random_examples, random_model
from generate import decode, generate
from model import LLaMA
from runtime.cli import Real, device_options, one_line_errors
from runtime.compilation import compile_decoding, compile_layers, prepare_to_compile
from runtime.device import select_device
from runtime.files import atomic_write, write_json
from runtime.quantization import held_bytes, quantizer
from train import TrainConfig, make_optimizer, train_step

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "training, of the matmul peak": 0.55,
    "decoding at batch 1, of the copy speed": 0.8,
    "adapter, of decoding": 0.03,
}
TRAINED = {  # how: bits, checkpoint activations, compile, attention
    "eager": (None, False, False, gated_attention),
    "checkpointed": (None, True, False, gated_attention),
    "compiled": (None, False, True, gated_attention),
    "attention as the paper writes it": (None, False, False, gated_attention_paper),
    "8 bits": (8, True, False, gated_attention),
    "4 bits": (4, True, False, gated_attention),
}
DECODED = {  # how: bits, compiled (on a GPU a CUDA graph), rows, with an adapter
    "graph, batch 1": (None, True, 1, True),
    "graph, batch 1, base alone": (None, True, 1, False),
    "eager, batch 1": (None, False, 1, True),
    "graph, batch 16": (None, True, 16, True),
    "graph, batch 64": (None, True, 64, True),
    "4 bits, batch 1": (4, False, 1, True),
}


class Bench:
    """A device, a random base on it, and how fast both can be."""

    SECONDS = 6  # that a step is repeated, at most five times
    BATCH = 64  # examples of a step, as in the paper

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.config = device, dtype, SHAPES[size]
        self.model, self.adapter = random_model(self.config, device, dtype), random_adapter(self.config, device)
        self.matmul, self.copy = matmul_speed(device, dtype), copy_speed(device)
        lengths = np.linspace(40, 214, self.BATCH).round().astype(int).tolist()  # as long as Alpaca's, 127 on average
        self.examples = random_examples(self.config, lengths)

    def other(self, attention: Callable[..., Tensor], bits: int | None) -> LLaMA:
        """A model of the same weights: the very same memory, unless they are rounded."""
        with torch.device("meta"):
            model = LLaMA(self.config, attention)
        model.load_state_dict(self.model.state_dict(), assign=True)
        model.requires_grad_(False)
        if bits is not None:
            quantize = quantizer(bits, self.device)
            for block in model.layers:
                quantize(block)
        return model

    def training(self, bits: int | None, again: bool, compiled: bool, attention: Callable[..., Tensor]) -> dict:
        """One optimizer step on all examples, as often as goes into a few seconds."""
        model = self.other(attention, bits)
        if compiled:
            prepare_to_compile(self.device)
            compile_layers(model.layers)
        adapter: Adapter = random_adapter(self.config, self.device)
        optimizer, config = make_optimizer(adapter, 0.02), TrainConfig(checkpoint_activations=again)

        def step() -> None:
            train_step(model, adapter, optimizer, self.examples, 1e-3, config)

        step()
        return self.rate(step, again, peak_growth(step, self.device) + held_bytes(model))

    def rate(self, step: Callable[[], None], again: bool, peak: int | None) -> dict:
        """Tokens/s of a step on all examples, and how much of the peak that is."""
        taken: list[float] = []
        while sum(taken) < self.SECONDS and len(taken) < 5:
            taken.append(seconds_of(step, self.device))
        seconds, tokens = min(taken), sum(example.size for example in self.examples)
        operations = step_operations(self.config, tokens, sum(example.num_targets for example in self.examples), again)
        five_epochs = PAPER.epochs * (1 - PAPER.val_size) * EXAMPLES * EXAMPLE_TOKENS
        row = {"seconds": taken, "tokens_per_second": tokens / seconds, "peak_bytes": peak}
        row |= {"matmul_share": operations / seconds / self.matmul}
        return row | {"alpaca_minutes": five_epochs / (tokens / seconds) / 60}

    def decoding(self, bits: int | None, compiled: bool, rows: int, adapted: bool) -> dict:
        """So many rows at once, greedy, after 60 tokens: the time of the newest, without that of the prompt's."""
        model, step = self.other(gated_attention, bits), decode
        if compiled:
            prepare_to_compile(self.device)
            step = compile_decoding(decode, model)
        with torch.no_grad():
            prompts = self.adapter(dtype=self.dtype) if adapted else ()
        tokens = [self.examples[i % self.BATCH].ids[:40] + [5] * 20 for i in range(rows)]

        def answer(number: int) -> float:
            work = lambda: generate(model, tokens, prompts, max_new_tokens=number, decode=step)  # noqa: E731
            return seconds_of(work, self.device)

        few, many = (8, 136) if self.device.type == "cuda" else (2, 18)
        answer(many)
        fewest, most = (min(answer(number) for _ in range(3)) for number in (few, many))
        seconds = (most - fewest) / (many - few)
        read = held_bytes(model) - model.tok_embeddings.weight.nbytes
        return {"tokens_per_second": rows / seconds, "copy_share": read / seconds / self.copy, "bytes_per_step": read}

    def peer(self, kind: str) -> dict:
        """PEFT's adaption prompt or LoRA at the same work, where it is installed."""
        for name, contestant in installed_peers(self.model, self.adapter, [kind]).items():
            optimizer = contestant.optimizer(1e-3)
            step = lambda: contestant.step(optimizer, self.examples)  # noqa: B023, E731
            step()
            return {"peer": name} | self.rate(step, False, peak_growth(step, self.device) + held_bytes(self.model))
        return {"error": "not installed"}


def gpu_tests(tests: str = "tests") -> dict:
    """Those of the suite that need a GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    return {"exit_code": result.returncode, "said": (result.stdout or result.stderr).strip().splitlines()[-8:]}


def all_parts(bench: Bench) -> dict[str, Callable[[], dict]]:
    """The measures by name, in the order of their worth."""
    training = {f"train: {how}": lambda of=of: bench.training(*of) for how, of in TRAINED.items()}
    decoding = {f"decode: {how}": lambda of=of: bench.decoding(*of) for how, of in DECODED.items()}
    first = ("train: eager", "decode: graph, batch 1", "decode: graph, batch 1, base alone", "train: checkpointed")
    parts = training | decoding
    ordered = {name: parts[name] for name in first} | parts
    peers = {f"peer: {kind}": lambda kind=kind: bench.peer(kind) for kind in ("adaption prompt", "lora")}
    return ordered | peers


def run_parts(parts: dict[str, Callable[[], dict]], deadline: float, done: Callable[[str, dict], None]) -> None:
    """One after the other while there is time; what fails is noted, and the others go on."""
    for name, part in parts.items():
        if time.perf_counter() > deadline:
            done(name, {"error": "no time was left"})
            continue
        try:
            done(name, part())
        except Exception as error:  # one that does not run here must not cost the others
            done(name, {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw_shares(found: dict[str, dict], path: Path) -> None:
    """How much of what the device can do each measure reached, the goals beside."""
    bars = {name: row.get("matmul_share", row.get("copy_share")) for name, row in found.items() if "error" not in row}
    bars = {name: share for name, share in bars.items() if share is not None}
    if not bars:
        return
    figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), [100 * share for share in bars.values()])
    axes.bar_label(drawn, [f"{100 * share:.0f}" for share in bars.values()], padding=4)
    for name, style in (("training, of the matmul peak", "--"), ("decoding at batch 1, of the copy speed", ":")):
        axes.axvline(100 * GOALS[name], linestyle=style, color="gray", label=f"goal: {name}")
    axes.invert_yaxis()
    axes.set_xlabel("% of the matmul peak (train, peer), of the copy speed (decode)")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def summary_line(name: str, row: dict) -> str:
    if "tokens_per_second" not in row:
        return f"{name}: {row.get('error', row)}"
    share = row.get("matmul_share", row.get("copy_share"))
    line = f"{name}: {row['tokens_per_second']:,.0f} tokens/s, {100 * share:.0f} %"
    return line + (f", {row['peak_bytes'] / 1e9:.1f} GB" if row.get("peak_bytes") else "")


@command("gpu", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--size", type=click.Choice(list(SHAPES)), default="7B", help="Shape of the model, with random weights."),
    option("--minutes", type=Real(0, min_open=True), default=8.5, help="When they are over nothing more is begun."),
    option("--skip-tests", is_flag=True, help="Leave out the suite's GPU cases, which come first."),
    option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "gpu.json",
           show_default="benchmarks/results/gpu.json", help="Where the figures go, with a picture beside."),
    *device_options,
)  # fmt: skip
@one_line_errors()
def time_gpu(size, minutes, skip_tests, out, device, dtype):
    """Measure a GPU, whole.

    The suite's GPU cases, then training and decoding, plain, compiled and in fewer bits, and others at the same work;
    saved after each.
    """
    deadline = time.perf_counter() + 60 * minutes
    device, dtype = select_device(device, dtype)
    found: dict[str, dict] = {}
    about = measured_on(size, device, dtype)

    def done(name: str, row: dict) -> None:
        found[name] = row
        click.echo(summary_line(name, row))
        write_json(out, about | {"goals": GOALS, "measures": found})

    if not skip_tests:
        run_parts({"tests": gpu_tests}, deadline, done)
    bench = Bench(size, device, dtype)
    about |= {"matmul_flops": bench.matmul, "copy_bytes_per_second": bench.copy}
    counted = count_bytes(bench.config, PAPER.micro_batch_tokens, dtype.itemsize, False)
    about |= {"counted_bytes": counted["sum"], "adapter_parameters": sum(p.numel() for p in bench.adapter.parameters())}
    run_parts(all_parts(bench), deadline, done)
    plain, alone = (found[f"decode: graph, batch 1{which}"].get("tokens_per_second") for which in ("", ", base alone"))
    if plain and alone:
        about["adapter_share_of_decoding"] = 1 - plain / alone
    write_json(out, about | {"goals": GOALS, "measures": found})
    draw_shares(found, out.with_suffix(".png"))
