"""Tune an adapter: python train.py --data alpaca.json --base LLaMA-7B --out out."""

import hashlib
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import nn
from tqdm import tqdm

from toy import digits
from encoder_tuning import heads
from toy import almanac as toy
from adapter import Adapter
from runtime.files import atomic_write
from runtime.cli import SEED, Real, device_options, one_line_errors
from data import Tokens, epoch_batches
from evaluate import examine, examine_pictures
from model import (
    select_device,
)
from training.distributed import (
    AllRanksError,
    RankLostError,
    detect_lost_ranks,
    exit_rank,
    broadcast_from_rank0,
    all_reduce_max,
    init_distributed,
    destroy_distributed,
    local_rank,
    rank_device,
    rank,
    sync_errors,
    world_size,
)
from training.prepare import check_ranks, check_source, examples_for, prepare, prepare_encoder
from training.runs import (
    fixed_options,
    draw_curves,
    load_checkpoint,
    peak_memory,
    read_metrics,
    resolved,
    save_checkpoint,
    run_state,
    trim_metrics,
    write_metrics,
)
from training.step import RESPONSES, Responses, learning_rate, make_optimizer, mean_loss, update
from tasks import TASKS

# Why to stop, and the exit status. Where ranks differ, the highest of these counts.
TIME, SIGTERM, CTRL_C = 1, 2, 3
REASONS = {TIME: ("stopped by --max-minutes", 0), SIGTERM: ("stopped by SIGTERM", 0), CTRL_C: ("interrupted", 130)}


class Stopped(Exception):
    """By the user, a scheduler or the clock."""

    def __init__(self, reason: int, step: int | None = None):
        text, self.code = REASONS[reason]
        super().__init__(text if step is None else f"{text} after step {step}")


@contextmanager
def signals(between_steps: bool):
    """SIGTERM, which schedulers send, and Ctrl-C raise Stopped; or between steps can be asked for, and raise nothing.

    There a second Ctrl-C raises KeyboardInterrupt; but under torchrun it may be the first one, sent on by torchrun.
    """
    asked = [0]

    def handle(number, _):
        reason = CTRL_C if number == signal.SIGINT else SIGTERM
        if not between_steps:
            raise Stopped(reason)
        if reason == CTRL_C and CTRL_C in asked and world_size() == 1:
            raise KeyboardInterrupt
        asked.append(reason)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: max(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def batches_from(step: int, lengths: Sequence[int], options: dict) -> Iterator[tuple[int, list[int]]]:
    """The epoch and the indices of the examples of every step from `step` to the last."""
    how = lengths, options["batch_size"], options["seed"]
    steps = ((epoch, batch) for epoch in range(options["epochs"]) for batch in epoch_batches(*how, epoch))
    return islice(steps, step, None)


def train(
    model: nn.Module,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    training: list[Tokens],
    validation: list[Tokens],
    out: Path,
    options: dict,
    done: dict[str, float],
    deadline: float = math.inf,
    objective: Responses = RESPONSES,
) -> None:
    """Tune the adapter in place, from where `done` says; keeps that up to date: steps, tokens and seconds so far.

    `options` are the command's, `deadline` is a time of `time.perf_counter`. The order of the data and the learning
    rate follow from the step alone, and nothing on the way is random: a resumed run goes on as if it had never stopped,
    on whatever number of ranks. The first rank writes a line to out/metrics.jsonl for every step and evaluation.
    Raises Stopped, FloatingPointError where values are not finite, torch.OutOfMemoryError, RankLostError where another rank is
    gone, all of them with the last good state saved, and OSError where it cannot be.
    """
    lengths = [example.size for example in training]
    steps_per_epoch = math.ceil(len(training) / options["batch_size"])
    total = options["epochs"] * steps_per_epoch
    warmup = round(options["warmup_epochs"] * steps_per_epoch)
    first = rank() == 0
    bar = tqdm(total=total, initial=done["step"], unit="step", file=sys.stderr, dynamic_ncols=True, disable=not first)

    def record(line: dict) -> None:
        if first:
            write_metrics(out / "metrics.jsonl", line)

    def validate() -> None:
        if validation:
            with detect_lost_ranks():
                val_loss = mean_loss(model, adapter, validation, options["micro_batch_tokens"], objective)
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"the validation loss is {val_loss}")
            record({"step": done["step"], "val_loss": val_loss})
            if first:
                bar.write(f"step {done['step']}: validation loss {val_loss:.4f}", file=sys.stderr)

    def save() -> None:
        if first:
            save_checkpoint(out, adapter, optimizer, done, options)

    with bar, signals(between_steps=True) as asked:
        try:
            for epoch, batch in batches_from(done["step"], lengths, options):
                if done["step"] % steps_per_epoch == 0:
                    validate()
                start = time.perf_counter()
                lr = learning_rate(done["step"], peak=options["lr"], warmup=warmup, total=total)
                examples = [training[i] for i in batch]
                how = options["micro_batch_tokens"], options["checkpoint_activations"]
                with detect_lost_ranks():
                    loss = update(model, adapter, optimizer, examples, lr, *how, objective)

                tokens, seconds = sum(lengths[i] for i in batch), time.perf_counter() - start
                done["step"] += 1
                done["tokens"] += tokens
                done["seconds"] += seconds
                speed, gate = tokens / seconds, adapter.gate_values().abs().mean().item()
                line = {"step": done["step"], "epoch": epoch, "loss": loss, "lr": lr}
                record(line | {"tokens_per_second": speed, "gate_mean_abs": gate})
                bar.update()
                if done["step"] % options["log_every"] == 0:
                    bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
                over = TIME if time.perf_counter() > deadline else 0
                with detect_lost_ranks():
                    reason = all_reduce_max(max(over, asked()))
                if reason:
                    raise Stopped(reason, done["step"])
                if done["step"] % options["save_every"] == 0:
                    save()
            validate()
            save()
        except (Stopped, FloatingPointError, torch.OutOfMemoryError, RankLostError):
            save()
            raise


# ---------------------------------------------------------------------------------------------------
# The command


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(), help="JSON or JSONL, also .gz or .xz.  [default: toy.py's]")
@click.option(
    "--toy",
    type=click.Choice(["text", "images", "blind"]),
    default="text",
    help="Without --data: toy.py's instructions; with digits.py's questions about images; those, images withheld.",
)
@click.option(
    "--task",
    type=click.Choice(TASKS + heads.TASKS),
    default="instructions",
    help="What the data is: Alpaca-format records, ScienceQA's problems.json, COCO's annotations; the others are for "
    "ViT and RoBERTa, as --base.",
)
@click.option("--base", type=click.Path(), help="The model to adapt.  [default: toy.py's, made at the first use]")
@click.option("--out", type=click.Path(path_type=Path), default="out", help="Folder for all that this writes.")
@click.option("--clip", "tower", type=click.Path(), help="CLIP's vision tower; without it images are left out.")
@click.option("--encoder", help="A function of yours, FILE.py:NAME, instead: it makes (M, Cv) numbers of a file.")
@click.option("--images", type=click.Path(), help="Where the images are.  [default: beside the data]")
@click.option("--skip-missing", is_flag=True, help="Leave out examples whose image is not there.")
@click.option("--features", type=click.Path(path_type=Path), default="features", help="Keeps what the tower saw.")
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
@click.option(
    "--resume",
    is_flag=False,
    flag_value="yes",
    type=click.Choice(["yes", "auto"]),
    help="Go on from the checkpoint in --out, with the same options; auto: if there is one.",
)
@click.option("--max-minutes", type=Real(0, min_open=True), help="Save and stop when so many have gone by.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "ddp", "fsdp"]),
    default="auto",
    help="Under torchrun: the base whole on every rank, or split over them; auto splits one that does not fit.",
)
@click.pass_context
def main(context, **options):
    """Tune a LLaMA-Adapter: the base stays frozen, a few prompts and gates learn to follow instructions.

    Without --data and --base this makes a tiny LLaMA that knows an almanac by heart, tunes it with options
    of its own (toy.TUNING, digits.TUNING), and shows what the adapter brought out of it.
    """
    start = time.perf_counter()
    if options["data"] is None and options["base"] is None:
        given = {name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT}
        given |= {"lr"} if "blr" in given else set()
        tuning = toy.TUNING if options["toy"] == "text" else digits.TUNING
        options |= {name: value for name, value in tuning.items() if name not in given}
    if options["lr"] is None:
        options["lr"] = options["blr"] * options["batch_size"] / 256

    with one_line_errors(OSError, ValueError, torch.OutOfMemoryError):
        init_distributed()
        with detect_lost_ranks():
            code = run(options, start)
            with sync_errors():  # nobody leaves while others are still at work
                pass
        destroy_distributed()
    sys.exit(code)


def run(options: dict, start: float) -> int:
    """What the command does once the ranks have met; `start` is when it began. Returns the exit code.

    Raises OSError, ValueError or torch.OutOfMemoryError.
    """
    say = partial(click.echo, err=True) if rank() == 0 else lambda text: None
    try:
        with signals(between_steps=False):
            run_through(options, start, say)
        return 0
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(CTRL_C)
        begun = (options["out"] / "checkpoint.pt").exists()
        say(f"{stopped}: {'to go on, add --resume' if begun else 'there is nothing yet to go on from'}")
        return stopped.code


def run_through(options: dict, start: float, say: Callable[[str], None]) -> None:
    """From the options to the summary."""
    out, first = options["out"], rank() == 0
    with sync_errors():
        device, dtype = select_device(rank_device(options.pop("device")), options["dtype"])
        options["dtype"] = str(dtype)
        check_source(options)
        if options["toy"] != "text" and local_rank() == 0:
            digits.make()  # one of a machine's ranks for all of them
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for_encoder = options["task"] in heads.TASKS
    with sync_errors():
        if for_encoder:
            prepared = prepare_encoder(options, dtype, device)
        else:
            examples, pictures = examples_for(options)
            options["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    if for_encoder:
        check_ranks(options)
    state = broadcast_from_rank0(lambda: run_state(out, options["resume"], options))
    if state == "finished":
        say(f"{out}: this run is finished, nothing is left to do")
        return
    if not for_encoder:
        prepared = prepare(options, examples, pictures, dtype, device)
    model, tokenizer, adapter, training, validation, counts, objective = prepared
    trainable, frozen = (sum(p.numel() for p in module.parameters()) for module in (adapter, model))
    say(
        f"{trainable:,} parameters to train, {frozen:,} frozen, on {device} in {options['dtype']}"
        + (f", {options['strategy']} over {world_size()} ranks" if world_size() > 1 else "")
        + f"\n{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, {counts['dropped']:,} "
        f"dropped ({'the answer is beyond' if for_encoder else 'the prompt alone fills'} "
        f"{options['max_seq_len']} tokens), {counts['cut']:,} cut to fit"
    )
    optimizer, done = make_optimizer(adapter, options["weight_decay"]), {"step": 0, "tokens": 0, "seconds": 0.0}
    if state == "begun":
        done = load_checkpoint(out / "checkpoint.pt", adapter, optimizer, options)
    with sync_errors():
        if first:
            out.mkdir(parents=True, exist_ok=True)
            for stale in ("summary.json", "curves.png"):  # of an earlier run
                (out / stale).unlink(missing_ok=True)
            trim_metrics(out / "metrics.jsonl", done["step"])
    deadline = start + 60 * (options["max_minutes"] or math.inf)
    files = f"{out}/checkpoint.pt and adapter.safetensors are as of step"
    try:
        train(model, adapter, optimizer, training, validation, out, options, done, deadline, objective)
    except FloatingPointError as error:
        where, advice = f"in step {done['step'] + 1}", "a lower --lr may help, with another --out"
        raise AllRanksError(f"{where}: {error}; {files} {done['step']}; {advice}") from None
    except RankLostError as error:
        raise RankLostError(f"{error}; {files} {done['step']}; to go on, add --resume") from None
    except torch.OutOfMemoryError as error:
        less = f"fewer than --micro-batch-tokens {options['micro_batch_tokens']}"
        less = less if for_encoder else f"--checkpoint-activations or {less}"
        raise ValueError(f"{error}; {files} {done['step']}; to go on, add --resume and {less}") from None

    examination = {}
    if options["data"] is None and (first or options["strategy"] == "fsdp"):  # a split model needs all ranks
        with redirect_stdout(sys.stdout if first else io.StringIO()):
            if options["toy"] != "text":
                examination |= examine_pictures(model, tokenizer, adapter)
            examination |= examine(model, tokenizer, adapter)
    if first:
        summary = {"trainable_parameters": trainable} | counts | report(adapter, out)
        summary |= {"tokens": done["tokens"], "tokens_per_second": done["tokens"] / done["seconds"]} | examination
        summary |= {"wall_seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(device)}
        summary |= {"options": fixed_options(options) | {"base": resolved(options["base"])}}
        with atomic_write(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "checkpoint.pt").unlink()
    say(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {out}")


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
    try:
        main()
    except SystemExit as end:
        exit_rank(end.code)
