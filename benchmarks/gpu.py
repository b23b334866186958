"""Benchmark a GPU with one command, within a time limit. The most important parts run first.

The results are saved after each part.
"""

import importlib.util
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

from adapter import gated_attention_paper
from benchmarks.generation import bytes_per_step
from benchmarks.measuring import copy_speed, interleave, matmul_speed, measured_on, peak_growth
from benchmarks.measuring import sustained_matmul_speed
from benchmarks.memory import EXAMPLE_TOKENS, EXAMPLES, PAPER, count_bytes, step_operations
from benchmarks.peers import Contestant, HuggingFace, Ours, Variant
from benchmarks.workload import CONFIGS, random_adapter, random_examples, random_model
from data import MICRO_BATCH_TOKENS, TokenizedExample, epoch_batches
from model import Config
from runtime.cli import Real, device_options, one_line_errors
from runtime.device import select_device
from runtime.files import atomic_write, write_json
from runtime.quantization import held_bytes

ROOT = Path(__file__).resolve().parent.parent
GOALS = {  # minimum shares of the peak speeds, and the adapter's maximum share of the decoding time
    "training, of the matmul peak": 0.55,
    "decoding at batch 1, of the copy speed": 0.8,
    "adapter, of decoding": 0.03,
}
GRAPH = Variant(decoding=True, compiled=True)  # decodes with a CUDA graph on a GPU
TRAINED = {
    "eager": Variant(),
    "compiled": Variant(compiled=True),
    "checkpointed": Variant(checkpoint_activations=True),
    "4 bits": Variant(bits="4"),
    "8 bits": Variant(bits="8"),
    "attention as the paper writes it": Variant(attention=gated_attention_paper),
}
DECODED = {  # variant, and number of rows
    "graph, batch 1": (GRAPH, 1),
    "graph, batch 1, base alone": (GRAPH._replace(adapted=False), 1),
    "4 bits, graph, batch 1": (GRAPH._replace(bits="4"), 1),
    "eager, batch 1": (Variant(decoding=True), 1),
    "graph, batch 16": (GRAPH, 16),
    "graph, batch 64": (GRAPH, 64),
}
ORDER = {  # the parts in order of importance, with their estimated duration in seconds for a 7B model
    "train: eager": 20,
    "decode: graph, batch 1": 45,
    "tests": 120,
    "decode: graph, batch 1, base alone": 45,
    "train: compiled": 90,
    "peer: adaption prompt": 30,
    "peer: lora": 30,
    "train: 4 bits": 25,
    "decode: 4 bits, graph, batch 1": 45,
    "train: checkpointed": 25,
    "decode: eager, batch 1": 20,
    "decode: graph, batch 16": 45,
    "train: 8 bits": 25,
    "train: attention as the paper writes it": 25,
    "decode: graph, batch 64": 45,
}


def alpaca_batches(config: Config, batch_size: int, number: int) -> list[list[TokenizedExample]]:
    """Return `number` batches of random tokens, in which examples have similar lengths, as in train.py.

    The examples have about 127 tokens on average, as in Alpaca. The batches are ordered from short to long.
    """
    lengths = np.linspace(40, 214, 100 * batch_size).round().astype(int).tolist()
    batches = sorted(epoch_batches(lengths, batch_size, seed=0, epoch=0), key=lambda batch: lengths[batch[0]])
    spread = batches[100 // number // 2 :: 100 // number]  # from short to long
    return [random_examples(config, [lengths[i] for i in batch]) for batch in spread]


class Bench:
    """Benchmarks of a base with random weights, relative to the peak speeds of its device."""

    SECONDS = 4  # time limit for the rounds of one training part; no round begins later
    BATCH, BATCHES = 64, 4  # examples per step, as in the paper; steps per round
    PEER_BATCH = 16  # other implementations need more memory, because they store the logits of all positions

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.config = device, dtype, CONFIGS[size]
        self.model, self.adapter = random_model(self.config, device, dtype), random_adapter(self.config, device)
        self.matmul = matmul_speed(device, dtype)
        self.sustained = sustained_matmul_speed(device, dtype, self.SECONDS / 2)
        self.copy = copy_speed(device)
        self.batches = alpaca_batches(self.config, self.BATCH, self.BATCHES)

    def training(self, variant: Variant) -> dict:
        """Time training steps of this implementation; a batch has examples of similar lengths, as in train.py."""
        contestant = Ours(self.model, random_adapter(self.config, self.device), variant)
        return self.training_rate(contestant, self.batches, variant.checkpoint_activations)

    def peer(self, kind: str) -> dict:
        """Time training steps of PEFT's adaption prompt or LoRA on the first 16 examples of the same batches.

        If PEFT is not installed, the result contains only an "error".
        """
        if importlib.util.find_spec("peft") is None:
            return {"error": "skipped, because the package peft is not installed"}
        layers, length, _ = self.adapter.prompts.shape
        contestant = HuggingFace(self.model, kind, layers, length)
        return self.training_rate(contestant, [batch[: self.PEER_BATCH] for batch in self.batches], checkpointed=False)

    def training_rate(self, contestant: Contestant, batches: list[list[TokenizedExample]], checkpointed: bool) -> dict:
        """Time rounds with one optimizer step on each batch. Return the results by name.

        The results are the seconds of each round, the peak memory in bytes and, for the fastest round, tokens/s, the
        shares of the two matmul speeds and the minutes that the paper's training on Alpaca would take.
        """
        optimizer = contestant.optimizer()

        def steps() -> None:
            for batch in batches:
                contestant.step(optimizer, batch)

        rounds = interleave({"steps": steps}, 5, self.device, limit=self.SECONDS)["steps"]
        peak = peak_growth(steps, self.device) + held_bytes(contestant.model)
        examples = [example for batch in batches for example in batch]
        seconds, tokens = min(rounds), sum(example.num_tokens for example in examples)
        num_targets = sum(example.num_targets for example in examples)
        operations = step_operations(self.config, tokens, num_targets, checkpointed)
        five_epochs = PAPER.epochs * (1 - PAPER.val_size) * EXAMPLES * EXAMPLE_TOKENS
        return {
            "seconds": rounds,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": peak,
            "matmul_share": operations / seconds / self.matmul,
            "sustained_share": operations / seconds / self.sustained,
            "alpaca_minutes": five_epochs / (tokens / seconds) / 60,
        }

    def decoding(self, variant: Variant, rows: int) -> dict:
        """Time greedy decoding of `rows` prompts of 60 tokens each, without the time of the prefill.

        Returns tokens/s, the share of the copy speed, and the bytes of weights that a step reads.
        """
        contestant = Ours(self.model, self.adapter, variant)
        batch = self.batches[0]
        tokens = [batch[i % len(batch)].ids[:40] + [5] * 20 for i in range(rows)]
        # Numbers of tokens. The difference of their times includes neither the prefill nor the recording of a graph.
        numbers = (8, 264) if self.device.type == "cuda" else (2, 18)
        functions = {str(number): lambda n=number: contestant.continuations(tokens, n) for number in numbers}
        few, many = map(min, interleave(functions, 3, self.device).values())
        seconds = (many - few) / (numbers[1] - numbers[0])
        num_bytes = bytes_per_step(contestant.model)
        copy_share = num_bytes / seconds / self.copy
        return {"tokens_per_second": rows / seconds, "copy_share": copy_share, "bytes_per_step": num_bytes}


def gpu_tests(tests: str = "tests") -> dict:
    """Run the tests that need a GPU in a separate process. Return its exit code and the last lines of its output.

    Raises subprocess.TimeoutExpired after four minutes.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"exit_code": result.returncode, "output": (result.stdout or result.stderr).strip().splitlines()[-8:]}


def all_parts(bench: Bench) -> dict[str, Callable[[], dict]]:
    """Return the parts by name, in the order of ORDER."""
    parts: dict[str, Callable[[], dict]] = {"tests": gpu_tests}
    parts |= {f"train: {how}": lambda of=of: bench.training(of) for how, of in TRAINED.items()}
    parts |= {f"decode: {how}": lambda of=of: bench.decoding(*of) for how, of in DECODED.items()}
    parts |= {f"peer: {kind}": lambda kind=kind: bench.peer(kind) for kind in ("adaption prompt", "lora")}
    return {name: parts[name] for name in ORDER}


def run_parts(
    parts: dict[str, Callable[[], dict]],
    deadline: float,
    done: Callable[[str, dict], None],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Run the parts that are expected to end before the deadline, a time of `clock` in seconds.

    Calls done(name, result) for every part. If a part is skipped or raises an exception, the result is {"error": ...}.
    """
    for name, part in parts.items():
        if clock() + ORDER[name] > deadline:
            done(name, {"error": "skipped, because too little time was left"})
            continue
        try:
            done(name, part())
        except Exception as error:  # a part that fails on this machine must not stop the others
            done(name, {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw_shares(found: dict[str, dict], path: Path) -> None:
    """Plot the share of the peak speed that each part reached, and the goals. If no part has a share, write no file."""
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
    figure.legend(loc="outside lower center", ncols=2)
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
    option("--size", type=click.Choice(list(CONFIGS)), default="7B", help="Size of the model; its weights are random."),
    option("--minutes", type=Real(0, min_open=True), default=8.5,
           help="Time limit in minutes; parts that would probably exceed it are skipped."),
    option("--skip-tests", is_flag=True, help="Do not run the tests that need a GPU."),
    option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "gpu.json",
           show_default="benchmarks/results/gpu.json", help="JSON file for the results; a plot is written next to it."),
    *device_options,
)  # fmt: skip
@one_line_errors()
def time_gpu(size, minutes, skip_tests, out, device, dtype):
    """Measure training and decoding on a GPU.

    The most important parts run first: eager training, decoding with a CUDA graph, and the tests that need a GPU. Other
    variants and PEFT follow. The results are saved after each part.
    """
    deadline = time.perf_counter() + 60 * minutes
    device, dtype = select_device(device, dtype)
    found: dict[str, dict] = {}
    bench = Bench(size, device, dtype)
    about = measured_on(size, device, dtype)
    about |= {"matmul_flops": bench.matmul, "sustained_matmul_flops": bench.sustained}
    about |= {"copy_bytes_per_second": bench.copy, "goals": GOALS, "measures": found}
    counted = count_bytes(bench.config, MICRO_BATCH_TOKENS, dtype.itemsize, False)
    about |= {"counted_bytes": counted["sum"], "adapter_parameters": sum(p.numel() for p in bench.adapter.parameters())}

    def done(name: str, row: dict) -> None:
        found[name] = row
        click.echo(summary_line(name, row))
        adapted, alone = (found.get(f"decode: graph, batch 1{which}", {}) for which in ("", ", base alone"))
        if "tokens_per_second" in adapted and "tokens_per_second" in alone:
            about["adapter_share_of_decoding"] = 1 - adapted["tokens_per_second"] / alone["tokens_per_second"]
        write_json(out, about)
        draw_shares(found, out.with_suffix(".png"))

    parts = all_parts(bench)
    if skip_tests:
        del parts["tests"]
    run_parts(parts, deadline, done)
