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

from adapter import gated_attention_paper
from benchmarks.measuring import copy_speed, interleave, matmul_speed, measured_on, peak_growth
from benchmarks.memory import EXAMPLE_TOKENS, EXAMPLES, PAPER, count_bytes, step_operations
from benchmarks.peers import Contestant, Ours, Variant, installed_peers
from benchmarks.workload import CONFIGS, random_adapter, random_examples, random_model
from runtime.cli import Real, device_options, one_line_errors
from runtime.device import select_device
from runtime.files import atomic_write, write_json
from runtime.quantization import held_bytes

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "training, of the matmul peak": 0.55,
    "decoding at batch 1, of the copy speed": 0.8,
    "adapter, of decoding": 0.03,
}
TRAINED = {
    "eager": Variant(),
    "checkpointed": Variant(checkpoint_activations=True),
    "compiled": Variant(compiled=True),
    "attention as the paper writes it": Variant(attention=gated_attention_paper),
    "8 bits": Variant(bits="8"),
    "4 bits": Variant(bits="4"),
}
GRAPH = Variant(decoding=True, compiled=True)  # on a GPU a CUDA graph
DECODED = {  # how, and rows
    "graph, batch 1": (GRAPH, 1),
    "graph, batch 1, base alone": (GRAPH._replace(adapted=False), 1),
    "eager, batch 1": (Variant(decoding=True), 1),
    "graph, batch 16": (GRAPH, 16),
    "graph, batch 64": (GRAPH, 64),
    "4 bits, batch 1": (Variant(bits="4", decoding=True), 1),
}


class Bench:
    """A device, a random base on it, and how fast both can be."""

    SECONDS = 6  # that a step is repeated, at most five times
    BATCH = 64  # examples of a step, as in the paper

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.config = device, dtype, CONFIGS[size]
        self.model, self.adapter = random_model(self.config, device, dtype), random_adapter(self.config, device)
        self.matmul, self.copy = matmul_speed(device, dtype), copy_speed(device)
        lengths = np.linspace(40, 214, self.BATCH).round().astype(int).tolist()  # as long as Alpaca's, 127 on average
        self.examples = random_examples(self.config, lengths)

    def training(self, variant: Variant) -> dict:
        """Ours, in steps on all examples."""
        contestant = Ours(self.model, random_adapter(self.config, self.device), variant)
        return self.training_rate(contestant, variant.checkpoint_activations)

    def peer(self, kind: str) -> dict:
        """PEFT's adaption prompt or LoRA at the same work, where it is installed."""
        peers = installed_peers(self.model, self.adapter, [kind])
        if f"PEFT {kind}" not in peers:
            return {"error": "not installed"}
        return self.training_rate(peers[f"PEFT {kind}"], checkpointed=False)

    def training_rate(self, contestant: Contestant, checkpointed: bool) -> dict:
        """Tokens/s of optimizer steps on all examples, and how much of the matmul peak that is."""
        optimizer = contestant.optimizer()

        def step() -> None:
            contestant.step(optimizer, self.examples)

        taken = interleave({"step": step}, 5, self.device, limit=self.SECONDS)["step"]
        peak = peak_growth(step, self.device) + held_bytes(contestant.model)
        seconds, tokens = min(taken), sum(example.num_tokens for example in self.examples)
        num_targets = sum(example.num_targets for example in self.examples)
        operations = step_operations(self.config, tokens, num_targets, checkpointed)
        five_epochs = PAPER.epochs * (1 - PAPER.val_size) * EXAMPLES * EXAMPLE_TOKENS
        return {
            "seconds": taken,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": peak,
            "matmul_share": operations / seconds / self.matmul,
            "alpaca_minutes": five_epochs / (tokens / seconds) / 60,
        }

    def decoding(self, variant: Variant, rows: int) -> dict:
        """Several rows at once, greedy, after 60 tokens: the time of the newest, without that of the prompt's."""
        contestant = Ours(self.model, self.adapter, variant)
        tokens = [self.examples[i % self.BATCH].ids[:40] + [5] * 20 for i in range(rows)]
        numbers = (8, 136) if self.device.type == "cuda" else (2, 18)
        works = {str(number): lambda n=number: contestant.continuations(tokens, n) for number in numbers}
        few, many = map(min, interleave(works, 3, self.device).values())
        seconds = (many - few) / (numbers[1] - numbers[0])
        read = held_bytes(contestant.model) - contestant.model.tok_embeddings.weight.nbytes
        return {"tokens_per_second": rows / seconds, "copy_share": read / seconds / self.copy, "bytes_per_step": read}


def gpu_tests(tests: str = "tests") -> dict:
    """Those of the suite that need a GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    return {"exit_code": result.returncode, "said": (result.stdout or result.stderr).strip().splitlines()[-8:]}


def all_parts(bench: Bench) -> dict[str, Callable[[], dict]]:
    """The measures by name, in the order of their worth."""
    training = {f"train: {how}": lambda of=of: bench.training(of) for how, of in TRAINED.items()}
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
    option("--size", type=click.Choice(list(CONFIGS)), default="7B", help="Shape of the model, with random weights."),
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
