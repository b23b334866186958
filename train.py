"""Tune an adapter: python train.py --data alpaca.json --base LLaMA-7B --out out."""

import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click
import numpy as np
import torch
import torch.nn.functional as F
from click.core import ParameterSource
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import toy
from adapter import Adapter, Prompt, replacing
from data import (
    IGNORE,
    Example,
    Tokenizer,
    Tokens,
    collate,
    epoch_batches,
    input_errors,
    micro_batches,
    read_examples,
    tokenize,
)
from evaluate import examine
from model import LLaMA, choose, fingerprint, load_llama


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Of step 0 .. total-1: up in a line over `warmup` steps, then down to zero along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(adapter: Adapter, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the adapter alone; no decay for the gates, which it would pull shut."""
    groups = [
        {"params": [adapter.prompts], "weight_decay": weight_decay},
        {"params": [adapter.gates], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def loss_sum(model: LLaMA, prompts: Sequence[Prompt], inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over the response tokens; the output head sees only their positions."""
    hidden = model.hidden_states(inputs, prompts)  # (B, T, C)
    learnt = targets != IGNORE  # (B, T)
    logits = model.output(hidden[learnt]).float()  # (R, V) for R response tokens
    return F.cross_entropy(logits, targets[learnt], reduction="sum")


def accumulate_gradient(model: LLaMA, adapter: Adapter, examples: list[Tokens], max_tokens: int) -> float:
    """Add the gradient of the mean loss over all response tokens of a batch; return that loss.

    Dividing by the tokens of the whole batch, not of each part, makes the parts' gradients
    add up to the gradient of one big batch, however it is split.
    """
    weight = model.tok_embeddings.weight
    lengths = [len(example.ids) for example in examples]
    tokens = sum(len(example.ids) - example.prompt_length for example in examples)
    loss = torch.zeros((), device=weight.device)
    for part in micro_batches(list(range(len(examples))), lengths, max_tokens):
        inputs, targets = (x.to(weight.device) for x in collate([examples[i] for i in part]))
        part_loss = loss_sum(model, adapter(dtype=weight.dtype), inputs, targets) / tokens
        part_loss.backward()
        loss += part_loss.detach()
    return loss.item()


@torch.no_grad()
def mean_loss(model: LLaMA, adapter: Adapter, examples: list[Tokens], max_tokens: int) -> float:
    """Mean loss over all response tokens of the examples."""
    weight = model.tok_embeddings.weight
    lengths = [len(example.ids) for example in examples]
    prompts, loss = adapter(dtype=weight.dtype), 0.0
    for part in micro_batches(list(range(len(examples))), lengths, max_tokens):
        inputs, targets = (x.to(weight.device) for x in collate([examples[i] for i in part]))
        loss += loss_sum(model, prompts, inputs, targets).item()
    return loss / sum(len(example.ids) - example.prompt_length for example in examples)


def update(
    model: LLaMA, adapter: Adapter, optimizer: torch.optim.Optimizer, examples: list[Tokens], lr: float, max_tokens: int
) -> float:
    """One optimizer step; returns the loss before it. Raises FloatingPointError, and changes nothing, where
    the loss or its gradient is not finite."""
    loss = accumulate_gradient(model, adapter, examples, max_tokens)
    finite = all(parameter.grad.isfinite().all() for parameter in adapter.parameters())
    if finite and math.isfinite(loss):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return loss
    records = sorted(example.record for example in examples)
    raise FloatingPointError(f"the loss ({loss}) or its gradient is not finite in the batch of records {records}")


class Stopped(Exception):
    """Training ended early, with its state saved."""

    def __init__(self, why: str, exit_code: int):
        super().__init__(why)
        self.exit_code = exit_code


@contextmanager
def interrupt():
    """Turns the first Ctrl-C into an event to look at between steps; a second one stops at once."""
    asked = threading.Event()

    def ask(*_):
        asked.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    model: LLaMA,
    adapter: Adapter,
    examples: list[Tokens],
    validation: list[Tokens],
    out: Path,
    options: dict,
    resume: dict | None = None,
) -> tuple[int, float]:
    """Tune the adapter in place. Returns the tokens trained on and the seconds that took.

    `options` are the command's, `resume` is what `save_checkpoint` wrote. The order of the data and the
    learning rate follow from the step alone, so a resumed run goes on as if it had never stopped. Writes
    a line to out/metrics.jsonl for every step and evaluation. Raises Stopped, the last good state saved,
    at Ctrl-C and where a loss or gradient is not finite.
    """
    lengths = [len(example.ids) for example in examples]
    steps_per_epoch = math.ceil(len(examples) / options["batch_size"])
    total = options["epochs"] * steps_per_epoch
    warmup = round(options["warmup_epochs"] * steps_per_epoch)
    optimizer = make_optimizer(adapter, options["weight_decay"])
    step, tokens, seconds = 0, 0, 0.0  # steps done; this run's tokens and time
    if resume:
        step = resume["step"]
        adapter.load_state_dict(resume["adapter"])
        optimizer.load_state_dict(resume["optimizer"])

    def validate() -> None:
        if validation:
            val_loss = mean_loss(model, adapter, validation, options["micro_batch_tokens"])
            write_line(metrics, {"step": step, "val_loss": val_loss})
            progress.write(f"step {step}: validation loss {val_loss:.4f}", file=sys.stderr)

    def stop(why: object, exit_code: int) -> None:
        save_checkpoint(out, adapter, optimizer, step, options)
        raise Stopped(f"{why}; {out}/adapter.safetensors and checkpoint.pt are of step {step} of {total}", exit_code)

    progress = tqdm(total=total, initial=step, unit="step", file=sys.stderr, dynamic_ncols=True)
    with progress, open_metrics(out / "metrics.jsonl", step) as metrics, interrupt() as asked:
        for epoch in range(step // steps_per_epoch, options["epochs"]):
            if step == epoch * steps_per_epoch:
                validate()
            batches = epoch_batches(lengths, options["batch_size"], options["seed"], epoch)
            for batch in batches[step - epoch * steps_per_epoch :]:
                start = time.perf_counter()
                lr = learning_rate(step, peak=options["lr"], warmup=warmup, total=total)
                try:
                    part = [examples[i] for i in batch]
                    loss = update(model, adapter, optimizer, part, lr, options["micro_batch_tokens"])
                except FloatingPointError as error:
                    stop(f"error: {error}", 2)
                step += 1

                step_tokens, step_seconds = sum(lengths[i] for i in batch), time.perf_counter() - start
                tokens, seconds = tokens + step_tokens, seconds + step_seconds
                speed, gate = step_tokens / step_seconds, adapter.opening().abs().mean().item()
                line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr}
                write_line(metrics, line | {"tokens_per_second": speed, "gate_mean_abs": gate})
                progress.update()
                if step % options["log_every"] == 0:
                    progress.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
                if step % options["save_every"] == 0:
                    save_checkpoint(out, adapter, optimizer, step, options)
                if asked.is_set():
                    stop("interrupted", 130)
        validate()
    save_checkpoint(out, adapter, optimizer, step, options)
    return tokens, seconds


# ---------------------------------------------------------------------------------------------------
# Files


def open_metrics(path: Path, step: int) -> TextIO:
    """metrics.jsonl, to append to: without what an earlier run wrote after the step that it resumes from."""
    kept = []
    if step:  # an evaluation at the very step is made again
        kept = [line for line in read_metrics(path) if line["step"] <= step - ("val_loss" in line)]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line


def write_line(file: TextIO, line: dict) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def save_checkpoint(out: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, step: int, options: dict) -> None:
    """The adapter for use, and all that `--resume` needs."""
    adapter.save(out / "adapter.safetensors", steps=step)
    state = {
        "step": step,
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "options": {name: value for name, value in options.items() if name not in FREE},
    }
    with replacing(out / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, options: dict) -> dict:
    """Raises FileNotFoundError, or ValueError where it belongs to a run with other options."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["options"]
    except Exception as error:  # torch.load raises whatever a broken file makes it meet
        raise ValueError(f"{path}: not a checkpoint of train.py: {str(error).splitlines()[0]}") from None
    for name, value in options.items():
        if name not in FREE and before.get(name) != value:
            raise ValueError(
                f"{path}: was made with {name} = {before.get(name)}, not {value}: a resumed run cannot change it"
            )
    return checkpoint


def draw_curves(metrics: list[dict], adapter: Adapter, first_layer: int, path: Path) -> None:
    """The losses, and the gates as a picture of layers x heads."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in (("loss", {"linewidth": 1}), ("val_loss", {"marker": "o"})):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            left.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[name], **style)
    left.set(xlabel="step", ylabel="loss per response token", title="Loss")
    left.set_ylim(bottom=0)
    left.legend()
    gates = adapter.opening().detach().cpu()  # (L, H)
    bound = max(gates.abs().max().item(), 1e-6)
    image = right.imshow(gates.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
    right.set(xlabel="head", ylabel="layer", title="How far each gate is open: tanh(g)")
    right.set_yticks(range(len(gates)), [str(first_layer + i) for i in range(len(gates))])
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=right)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, elsewhere the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------
# The command

# Options that may differ between a run and its resumption.
FREE = {"out", "base", "data", "device", "micro_batch_tokens", "log_every", "save_every", "resume"}


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(),
    help="Alpaca-format JSON or JSONL (.gz, .xz too).  [default: toy.py's almanac]",
)
@click.option("--base", type=click.Path(), help="The LLaMA to adapt.  [default: toy.py's, pre-trained on first use]")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Folder for all that this writes.")
@click.option("--layers", type=click.IntRange(min=1), help="L, how many of the topmost layers.  [default: all but two]")
@click.option("--length", type=click.IntRange(min=1), default=10, help="K, prompt vectors per layer.")
@click.option("--epochs", type=click.IntRange(min=1), default=5)
@click.option("--warmup-epochs", type=click.FloatRange(min=0), default=2, help="The learning rate rises over these.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Examples per optimizer step.")
@click.option("--micro-batch-tokens", type=click.IntRange(min=1), default=8192, help="Positions per forward pass.")
@click.option("--blr", type=click.FloatRange(min=0), default=9e-3, help="Base rate: lr = blr * batch size / 256.")
@click.option("--lr", type=click.FloatRange(min=0), help="Peak learning rate.  [default: from --blr]")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.02, help="On prompts; gates have none.")
@click.option("--max-seq-len", type=click.IntRange(min=2), default=512, help="Longer responses are cut.")
@click.option(
    "--val-size",
    type=click.FloatRange(min=0),
    default=0.02,
    help="Held out: a share if below 1, else a number.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many examples.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of prompts, split and order.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="Of the base.")
@click.option("--log-every", type=click.IntRange(min=1), default=1, help="Steps between readings on the progress bar.")
@click.option("--save-every", type=click.IntRange(min=1), default=100, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with the same options.")
@click.pass_context
def main(context, **options):
    """Tune a LLaMA-Adapter: the base stays frozen, a few prompts and gates learn to follow instructions.

    Without --data and --base this makes a tiny LLaMA that knows an almanac by heart, tunes it, and
    shows what the adapter brought out of it.
    """
    start = time.perf_counter()
    out = options["out"]
    if options["data"] is None and options["base"] is None:
        for name, value in toy.TUNING.items():
            if context.get_parameter_source(name) == ParameterSource.DEFAULT:
                options[name] = value
                click.echo(f"--{name.replace('_', '-')} {value} (toy.py's default)", err=True)
    if options["lr"] is None:
        options["lr"] = options["blr"] * options["batch_size"] / 256

    with input_errors():
        if options["warmup_epochs"] >= options["epochs"]:
            warmup, epochs = options["warmup_epochs"], options["epochs"]
            raise ValueError(f"--warmup-epochs {warmup:g} of --epochs {epochs}: the learning rate would never get to fall")
        device, dtype = choose(options.pop("device"), options["dtype"])
        options["dtype"] = str(dtype)
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists() and not options["resume"]:
            raise ValueError(f"{out}/checkpoint.pt is of an unfinished run: go on with --resume, or use another --out")
        examples = (
            read_examples(options["data"]) if options["data"] else [q.example for q in toy.instructions()["tuning"]]
        )
        base = Path(options["base"] or toy.make_base())
        model, tokenizer = load_llama(base, dtype, device)
        config = model.config
        if options["layers"] is None:
            options["layers"] = max(1, config.n_layers - 2)
        for name, limit in (("layers", config.n_layers), ("max_seq_len", config.max_seq_len or math.inf)):
            if options[name] > limit:
                raise ValueError(f"--{name.replace('_', '-')} {options[name]}: {base} has only {limit}")
        training, validation, counts = prepare(tokenizer, examples[: options["limit"]], options)
        options["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
        options["base_fingerprint"] = fingerprint(model)
        checkpoint = load_checkpoint(out / "checkpoint.pt", options) if options["resume"] else None

    adapter = Adapter(
        layers=options["layers"],
        length=options["length"],
        dim=config.dim,
        heads=config.n_heads,
        generator=torch.Generator().manual_seed(options["seed"]),
    ).to(device)
    adapter.metadata = {
        "base": str(base.resolve()),
        "base_layers": str(config.n_layers),
        "base_fingerprint": options["base_fingerprint"],
        "prompt_template": "alpaca",
        "data": Path(options["data"] or "toy.py").name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    trainable, frozen = (sum(p.numel() for p in module.parameters()) for module in (adapter, model))
    click.echo(f"{trainable:,} parameters to train, {frozen:,} frozen, on {device} in {dtype}", err=True)

    try:
        tokens, seconds = train(model, adapter, training, validation, out, options, checkpoint)
    except Stopped as stopped:
        click.echo(f"{stopped}\nto go on: the same command with --resume", err=True)
        sys.exit(stopped.exit_code)

    metrics = read_metrics(out / "metrics.jsonl")
    losses = [line["val_loss"] for line in metrics if "val_loss" in line] or [None]
    adapter.save(out / "adapter.safetensors", val_loss_before=losses[0], val_loss_after=losses[-1])
    draw_curves(metrics, adapter, config.n_layers - options["layers"], out / "curves.png")
    summary = {
        "trainable_parameters": trainable,
        "adapter_bytes": (out / "adapter.safetensors").stat().st_size,
        "val_loss_before": losses[0],
        "val_loss_after": losses[-1],
        **counts,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
    if options["data"] is None:
        summary |= examine(model, tokenizer, adapter)
    summary |= {"wall_seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(device)}
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "checkpoint.pt").unlink()
    click.echo(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {out}", err=True)


def prepare(
    tokenizer: Tokenizer, examples: list[Example], options: dict
) -> tuple[list[Tokens], list[Tokens], dict[str, int]]:
    """What to train on, what is held out, and the numbers of both and of what was dropped or cut."""
    tokens, cut = tokenize(tokenizer, examples, options["max_seq_len"])
    size = options["val_size"]
    held_out = round(size * len(tokens)) if size < 1 else round(size)
    if held_out >= len(tokens):
        raise ValueError(f"--val-size holds out {held_out} of the {len(tokens)} examples that fit: none is left")
    order = np.random.default_rng(options["seed"]).permutation(len(tokens)).tolist()
    training, validation = [tokens[i] for i in order[held_out:]], [tokens[i] for i in order[:held_out]]
    dropped = len(examples) - len(tokens)
    click.echo(
        f"{len(training):,} examples to train on, {held_out:,} held out, {dropped:,} dropped (the prompt alone fills "
        f"{options['max_seq_len']} tokens), {cut:,} cut to fit",
        err=True,
    )
    return training, validation, {"examples": len(training), "held_out": held_out, "dropped": dropped, "cut": cut}


if __name__ == "__main__":
    main()
