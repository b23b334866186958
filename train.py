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

import click
import numpy as np
import torch
from click.core import ParameterSource
from torch import Tensor
from tqdm import tqdm

import toy
from adapter import Adapter, Prompt, replacing
from checkpoints import load_llama
from cli import SEED, Real, device_options, one_line_errors
from data import IGNORE, Batch, Tokens, epoch_batches, micro_batches, read_examples, response_tokens, tokenize
from evaluate import examine
from model import LLaMA, choose, compile_layers, fingerprint, hold_in_8_bits, prepare_to_compile
from runs import draw_curves, load_checkpoint, open_metrics, peak_memory, read_metrics, save_checkpoint, write_metrics


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


class HeadLoss(torch.autograd.Function):
    """Cross entropy, summed, of hidden states (R, C) through the frozen output head (V, C) with answers (R,).

    Few rows at a time: with 32,000 words and more, the logits of a whole batch in float32, and the gradient by
    them, would take gigabytes. So the gradient is taken while a row's logits are at hand: by the logits it is
    softmax - 1 at the answer, softmax elsewhere.
    """

    ROWS = 256

    @staticmethod
    def forward(context, hidden: Tensor, head: Tensor, answers: Tensor) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for rows, right in zip(hidden.split(HeadLoss.ROWS), answers[:, None].split(HeadLoss.ROWS)):
            log_p = (rows @ head.T).log_softmax(dim=1, dtype=torch.float32)  # (ROWS, V)
            total -= log_p.gather(1, right).sum()
            if context.needs_input_grad[0]:
                p = log_p.exp_()
                gradients.append(
                    p.scatter_add_(1, right, -torch.ones_like(p[:, :1])).to(head.dtype) @ head
                )  # (ROWS, C)
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(context, scale: Tensor):
        return scale * torch.cat(context.saved_tensors), None, None


def loss_sum(model: LLaMA, prompts: Sequence[Prompt], batch: Batch, recompute: bool = False) -> Tensor:
    """Cross entropy summed over the response tokens; the last layer and the output head see only these."""
    device = model.tok_embeddings.weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    learnt = targets != IGNORE  # (B, T), R of them
    hidden = model.hidden_states(inputs, prompts, wanted=learnt, shared=batch.shared, recompute=recompute)  # (R, C)
    return HeadLoss.apply(hidden, model.output.weight, targets[learnt])


def accumulate_gradient(
    model: LLaMA, adapter: Adapter, examples: list[Tokens], max_tokens: int, recompute: bool = False
) -> float:
    """Add the gradient of the mean loss over all response tokens of a batch; return that loss.

    Dividing by the tokens of the whole batch, not of each part, makes the parts' gradients
    add up to the gradient of one big batch, however it is split.
    """
    weight, tokens = model.tok_embeddings.weight, response_tokens(examples)
    loss = torch.zeros((), device=weight.device)
    for batch in micro_batches(examples, max_tokens):
        part = loss_sum(model, adapter(dtype=weight.dtype), batch, recompute) / tokens
        part.backward()
        loss += part.detach()
    return loss.item()


@torch.no_grad()
def mean_loss(model: LLaMA, adapter: Adapter, examples: list[Tokens], max_tokens: int) -> float:
    """Mean loss over all response tokens of the examples."""
    prompts = adapter(dtype=model.tok_embeddings.weight.dtype)
    loss = sum(loss_sum(model, prompts, batch).item() for batch in micro_batches(examples, max_tokens))
    return loss / response_tokens(examples)


def update(
    model: LLaMA,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    examples: list[Tokens],
    lr: float,
    max_tokens: int,
    recompute: bool = False,
) -> float:
    """One optimizer step; returns the loss before it.

    Raises FloatingPointError where the loss, its gradient or the new parameters are not finite; then the
    parameters are as before.
    """
    parameters = list(adapter.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate_gradient(model, adapter, examples, max_tokens, recompute)
    finite = math.isfinite(loss) and all(parameter.grad.isfinite().all() for parameter in parameters)
    if finite:
        optimizer.step()
        finite = all(parameter.isfinite().all() for parameter in parameters)
    optimizer.zero_grad()
    if not finite:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
        records = sorted(example.record for example in examples)
        raise FloatingPointError(f"a loss of {loss} led to values that are not finite, in a batch of records {records}")
    return loss


class Interrupted(Exception):
    """Ctrl-C, at the end of a step."""


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
    model: LLaMA, adapter: Adapter, training: list[Tokens], validation: list[Tokens], out: Path, options: dict
) -> dict[str, float]:
    """Tune the adapter in place. Returns how many steps and tokens that took, and how many seconds.

    `options` are the command's. The order of the data and the learning rate follow from the step alone, so
    that a resumed run goes on as if it had never stopped. Writes a line to out/metrics.jsonl for every step
    and evaluation. Raises Interrupted at Ctrl-C, FloatingPointError where values are not finite, both with
    the last good state saved, and what `load_checkpoint` raises.
    """
    lengths = [len(example.ids) for example in training]
    steps_per_epoch = math.ceil(len(training) / options["batch_size"])
    total = options["epochs"] * steps_per_epoch
    warmup = round(options["warmup_epochs"] * steps_per_epoch)
    optimizer = make_optimizer(adapter, options["weight_decay"])
    done = {"step": 0, "tokens": 0, "seconds": 0.0}
    if options["resume"]:
        done = load_checkpoint(out / "checkpoint.pt", adapter, optimizer, options)
    metrics = open_metrics(out / "metrics.jsonl", done["step"])
    bar = tqdm(total=total, initial=done["step"], unit="step", file=sys.stderr, dynamic_ncols=True)

    def validate() -> None:
        if validation:
            val_loss = mean_loss(model, adapter, validation, options["micro_batch_tokens"])
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"the validation loss is {val_loss}")
            write_metrics(metrics, {"step": done["step"], "val_loss": val_loss})
            bar.write(f"step {done['step']}: validation loss {val_loss:.4f}", file=sys.stderr)

    try:
        with bar, metrics, interrupt() as asked:
            for epoch in range(done["step"] // steps_per_epoch, options["epochs"]):
                if done["step"] == epoch * steps_per_epoch:
                    validate()
                batches = epoch_batches(lengths, options["batch_size"], options["seed"], epoch)
                for batch in batches[done["step"] - epoch * steps_per_epoch :]:
                    start = time.perf_counter()
                    lr = learning_rate(done["step"], peak=options["lr"], warmup=warmup, total=total)
                    examples = [training[i] for i in batch]
                    how = options["micro_batch_tokens"], options["checkpoint_activations"]
                    loss = update(model, adapter, optimizer, examples, lr, *how)

                    tokens, seconds = sum(lengths[i] for i in batch), time.perf_counter() - start
                    done["step"] += 1
                    done["tokens"] += tokens
                    done["seconds"] += seconds
                    speed, gate = tokens / seconds, adapter.opening().abs().mean().item()
                    line = {"step": done["step"], "epoch": epoch, "loss": loss, "lr": lr}
                    write_metrics(metrics, line | {"tokens_per_second": speed, "gate_mean_abs": gate})
                    bar.update()
                    if done["step"] % options["log_every"] == 0:
                        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
                    if done["step"] % options["save_every"] == 0:
                        save_checkpoint(out, adapter, optimizer, done, options)
                    if asked.is_set():
                        raise Interrupted
            validate()
    except (FloatingPointError, Interrupted):
        save_checkpoint(out, adapter, optimizer, done, options)
        raise
    save_checkpoint(out, adapter, optimizer, done, options)
    return done


# ---------------------------------------------------------------------------------------------------
# The command


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(), help="Alpaca-format JSON or JSONL, also .gz or .xz.  [default: toy.py's]")
@click.option("--base", type=click.Path(), help="The LLaMA to adapt.  [default: toy.py's, made at the first use]")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Folder for all that this writes.")
@click.option("--layers", type=click.IntRange(1), help="L, how many of the topmost layers.  [default: all but two]")
@click.option("--length", type=click.IntRange(1, 4096), default=10, help="K, prompt vectors per layer.")
@click.option("--epochs", type=click.IntRange(1), default=5)
@click.option("--warmup-epochs", type=Real(0), default=2, help="The learning rate rises over these.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Examples per optimizer step.")
@click.option("--micro-batch-tokens", type=click.IntRange(1), default=8192, help="Positions per forward pass.")
@click.option("--checkpoint-activations", is_flag=True, help="Less memory: run each layer again, backwards.")
@click.option("--int8", is_flag=True, help="Hold the layers' weights in 8 bits; checkpoints activations as well.")
@click.option("--compile", is_flag=True, help="torch.compile the layers: slow to start, then faster.")
@click.option("--blr", type=Real(0, 1e3), default=9e-3, help="Base rate: lr = blr * batch size / 256.")
@click.option("--lr", type=Real(0, 1e3), help="Peak learning rate.  [default: from --blr]")
@click.option("--weight-decay", type=Real(0, 1e3), default=0.02, help="On prompts; gates have none.")
@click.option("--max-seq-len", type=click.IntRange(2), default=512, help="Longer responses are cut.")
@click.option("--val-size", type=Real(0), default=0.02, help="Held out: a share if below 1, else a number.")
@click.option("--limit", type=click.IntRange(1), help="Use only the first so many examples.")
@click.option("--seed", type=SEED, default=0, help="Of prompts, split and order.")
@device_options
@click.option("--log-every", type=click.IntRange(1), default=1, help="Steps between readings on the progress bar.")
@click.option("--save-every", type=click.IntRange(1), default=100, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with the same options.")
@click.pass_context
def main(context, **options):
    """Tune a LLaMA-Adapter: the base stays frozen, a few prompts and gates learn to follow instructions.

    Without --data and --base this makes a tiny LLaMA that knows an almanac by heart, tunes it with options
    of its own (toy.TUNING), and shows what the adapter brought out of it.
    """
    start = time.perf_counter()
    if options["data"] is None and options["base"] is None:
        given = {name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT}
        given |= {"lr"} if "blr" in given else set()
        options |= {name: value for name, value in toy.TUNING.items() if name not in given}
    if options["lr"] is None:
        options["lr"] = options["blr"] * options["batch_size"] / 256

    with one_line_errors():
        device, dtype = choose(options.pop("device"), options["dtype"])
        options["dtype"] = str(dtype)
        if options["compile"]:
            prepare_to_compile(device, options["int8"])
        model, tokenizer, adapter, training, validation, counts = prepare(options, dtype, device)
        if options["int8"]:
            hold_in_8_bits(model)
            options["checkpoint_activations"] = True
        if options["compile"]:
            compile_layers(model)
        out = options["out"]
        out.mkdir(parents=True, exist_ok=True)
        for stale in ("summary.json", "curves.png"):  # of an earlier run
            (out / stale).unlink(missing_ok=True)
    trainable, frozen = (sum(p.numel() for p in module.parameters()) for module in (adapter, model))
    click.echo(
        f"{trainable:,} parameters to train, {frozen:,} frozen, on {device} in {options['dtype']}\n"
        f"{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, {counts['dropped']:,} dropped "
        f"(the prompt alone fills {options['max_seq_len']} tokens), {counts['cut']:,} cut to fit",
        err=True,
    )
    with one_line_errors(OSError, ValueError, torch.OutOfMemoryError):
        try:
            done = train(model, adapter, training, validation, out, options)
        except Interrupted:
            click.echo(f"interrupted after step {adapter.metadata['steps']}: to go on, add --resume", err=True)
            sys.exit(130)
        except torch.OutOfMemoryError as error:
            less = f"--checkpoint-activations or fewer than --micro-batch-tokens {options['micro_batch_tokens']}"
            raise ValueError(f"{error}; {less} may help") from None
        except FloatingPointError as error:
            kept = f"{out}/adapter.safetensors is as of step {adapter.metadata['steps']}"
            raise ValueError(f"{error}; {kept}; a lower --lr may help, with another --out") from None
        summary = {"trainable_parameters": trainable} | counts | report(adapter, out)
        summary |= {"tokens": done["tokens"], "tokens_per_second": done["tokens"] / done["seconds"]}
        if options["data"] is None:
            summary |= examine(model, tokenizer, adapter)
        summary |= {"wall_seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(device)}
        with replacing(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "checkpoint.pt").unlink()
    click.echo(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {out}", err=True)


def prepare(options: dict, dtype: torch.dtype, device: torch.device):
    """All that training needs, checked: model, tokenizer, adapter, examples to train on and held out, their numbers.

    Fills in the options that depend on the base. Raises OSError or ValueError.
    """
    checkpoint = options["out"] / "checkpoint.pt"
    if checkpoint.exists() and not options["resume"]:
        raise ValueError(f"{checkpoint} is of an unfinished run: go on with --resume, or use another --out")
    if options["resume"] and not checkpoint.exists():
        raise ValueError(f"{checkpoint}: nothing to resume")
    if options["warmup_epochs"] >= options["epochs"]:
        warmup = f"--warmup-epochs {options['warmup_epochs']:g} of --epochs {options['epochs']}"
        raise ValueError(f"{warmup}: the learning rate would never get to fall")
    if options["data"] is None:
        examples = [question.example for question in toy.instructions()["tuning"]]
    else:
        examples = read_examples(options["data"])
    examples = examples[: options["limit"]]
    base = toy.make_base() if options["base"] is None else Path(options["base"])
    model, tokenizer = load_llama(base, dtype, device)
    config = model.config
    if options["layers"] is None:
        options["layers"] = max(1, config.n_layers - 2)
    for name, limit in (("layers", config.n_layers), ("max_seq_len", config.max_seq_len or math.inf)):
        if options[name] > limit:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: {base} has only {limit}")
    options["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    options["base_fingerprint"] = fingerprint(model)

    tokens, cut = tokenize(tokenizer, examples, options["max_seq_len"])
    training, validation = split(tokens, options["val_size"], options["seed"])
    counts = {
        "examples": len(training),
        "held_out": len(validation),
        "dropped": len(examples) - len(tokens),
        "cut": cut,
    }
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
        "data": "toy.py" if options["data"] is None else Path(options["data"]).name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    return model, tokenizer, adapter, training, validation, counts


def split(examples: list[Tokens], val_size: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """To train on, and held out. Raises ValueError where nothing is left to train on."""
    held_out = round(val_size * len(examples)) if val_size < 1 else round(val_size)
    if held_out >= len(examples):
        raise ValueError(f"--val-size holds out {held_out} of the {len(examples)} examples that fit: none is left")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]


def report(adapter: Adapter, out: Path) -> dict:
    """Write the adapter with its final losses, and the curves; returns what the summary says of them."""
    metrics = read_metrics(out / "metrics.jsonl")
    losses = [line["val_loss"] for line in metrics if "val_loss" in line] or [None]
    adapter.save(out / "adapter.safetensors", val_loss_before=losses[0], val_loss_after=losses[-1])
    draw_curves(metrics, adapter, out / "curves.png")
    return {
        "adapter_bytes": (out / "adapter.safetensors").stat().st_size,
        "val_loss_before": losses[0],
        "val_loss_after": losses[-1],
    }


if __name__ == "__main__":
    main()
