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
from typing import NamedTuple

import click
import numpy as np
import torch
from click.core import ParameterSource
from torch import nn
from tqdm import tqdm

import digits
import heads
import toy
from adapter import Adapter, replacing
from checkpoints import load_llama, read_base
from cli import SEED, Real, device_options, one_line_errors
from data import Example, Tokenizer, Tokens, epoch_batches, tokenize
from encoder_files import load_encoder, load_vit
from evaluate import examine, examine_pictures
from model import (
    choose,
    compile_layers,
    fingerprint,
    hash_of,
    hold_in_8_bits,
    number_of_weights,
    prepare_to_compile,
)
from multimodal import DEPTHS, ImageAdapter, features_by, features_of, load_function, tower_fingerprint
from parallel import (
    Everywhere,
    Lost,
    all_ranks,
    choose_strategy,
    from_first,
    highest,
    join,
    leave,
    local_rank,
    own_device,
    rank,
    splitter,
    together,
    world,
)
from runs import (
    bound,
    draw_curves,
    load_checkpoint,
    peak_memory,
    read_metrics,
    resolved,
    save_checkpoint,
    standing,
    trim_metrics,
    write_metrics,
)
from step import RESPONSES, Responses, learning_rate, make_optimizer, mean_loss, update
from tasks import TASKS, read_task, with_images

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
        if reason == CTRL_C and CTRL_C in asked and world() == 1:
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
    Raises Stopped, FloatingPointError where values are not finite, torch.OutOfMemoryError, Lost where another rank is
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
            with all_ranks():
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
                with all_ranks():
                    loss = update(model, adapter, optimizer, examples, lr, *how, objective)

                tokens, seconds = sum(lengths[i] for i in batch), time.perf_counter() - start
                done["step"] += 1
                done["tokens"] += tokens
                done["seconds"] += seconds
                speed, gate = tokens / seconds, adapter.opening().abs().mean().item()
                line = {"step": done["step"], "epoch": epoch, "loss": loss, "lr": lr}
                record(line | {"tokens_per_second": speed, "gate_mean_abs": gate})
                bar.update()
                if done["step"] % options["log_every"] == 0:
                    bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
                over = TIME if time.perf_counter() > deadline else 0
                with all_ranks():
                    reason = highest(max(over, asked()))
                if reason:
                    raise Stopped(reason, done["step"])
                if done["step"] % options["save_every"] == 0:
                    save()
            validate()
            save()
        except (Stopped, FloatingPointError, torch.OutOfMemoryError, Lost):
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
        join()
        with all_ranks():
            code = run(options, start)
            with together():  # nobody leaves while others are still at work
                pass
        leave()
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
    with together():
        device, dtype = choose(own_device(options.pop("device")), options["dtype"])
        options["dtype"] = str(dtype)
        check_source(options)
        if options["toy"] != "text" and local_rank() == 0:
            digits.make()  # one of a machine's ranks for all of them
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for_encoder = options["task"] in heads.TASKS
    with together():
        if for_encoder:
            prepared = prepare_encoder(options, dtype, device)
        else:
            examples, pictures = examples_for(options)
            options["data_hash"] = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    if for_encoder:
        check_ranks(options)
    state = from_first(lambda: standing(out, options["resume"], options))
    if state == "finished":
        say(f"{out}: this run is finished, nothing is left to do")
        return
    if not for_encoder:
        prepared = prepare(options, examples, pictures, dtype, device)
    model, tokenizer, adapter, training, validation, counts, objective = prepared
    trainable, frozen = (sum(p.numel() for p in module.parameters()) for module in (adapter, model))
    say(
        f"{trainable:,} parameters to train, {frozen:,} frozen, on {device} in {options['dtype']}"
        + (f", {options['strategy']} over {world()} ranks" if world() > 1 else "")
        + f"\n{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, {counts['dropped']:,} "
        f"dropped ({'the answer is beyond' if for_encoder else 'the prompt alone fills'} "
        f"{options['max_seq_len']} tokens), {counts['cut']:,} cut to fit"
    )
    optimizer, done = make_optimizer(adapter, options["weight_decay"]), {"step": 0, "tokens": 0, "seconds": 0.0}
    if state == "begun":
        done = load_checkpoint(out / "checkpoint.pt", adapter, optimizer, options)
    with together():
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
        raise Everywhere(f"{where}: {error}; {files} {done['step']}; {advice}") from None
    except Lost as error:
        raise Lost(f"{error}; {files} {done['step']}; to go on, add --resume") from None
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
        summary |= {"options": bound(options) | {"base": resolved(options["base"])}}
        with replacing(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "checkpoint.pt").unlink()
    say(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {out}")


def check_source(options: dict) -> None:
    """Raise ValueError where options about the data contradict each other."""
    if options["tower"] is not None and options["encoder"] is not None:
        raise ValueError("--clip and --encoder: one of them makes the features of an image")
    if options["data"] is not None and options["toy"] != "text":
        raise ValueError(f"--toy {options['toy']} brings its own data: leave out --data {options['data']}")
    if options["data"] is None:
        given = [name for name in ("tower", "encoder", "images") if options[name] is not None]
        if given or options["task"] != "instructions":
            what = "--task" if not given else {"tower": "--clip"}.get(given[0], f"--{given[0]}")
            raise ValueError(f"{what} needs --data FILE: the toy brings all that it needs")


def examples_for(options: dict) -> tuple[list[Example], list[Path]]:
    """The examples to use, and the images of those that have one. Without --clip or --encoder none have.

    Raises OSError or ValueError, naming the record.
    """
    data = options["data"]
    if data is not None:
        folder = Path(options["images"] or Path(data).parent)
        examples = read_task(options["task"], data, folder)
    elif options["toy"] == "text":
        folder, examples = Path("."), [question.example for question in toy.instructions()["tuning"]]
    else:
        folder = digits.make()
        examples = digits.tuning(folder)
        options["tower"] = str(folder / "tower") if options["toy"] == "images" else None
    if data is None:
        examples = [example._replace(name=f"toy question {i}") for i, example in enumerate(examples)]
    examples = examples[: options["limit"]]
    if options["tower"] is None and options["encoder"] is None:
        return [example._replace(image="") for example in examples], []
    try:
        used, pictures = with_images(examples, folder, options["skip_missing"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{data}: {error}") from None
    if len(used) < len(examples) and rank() == 0:
        click.echo(f"{len(examples) - len(used):,} of {len(examples):,} left out: their image is not there", err=True)
    if not pictures:
        raise ValueError(f"{data}: none of its {len(examples)} examples has an image that is there")
    return used, pictures


def check_warmup(options: dict) -> None:
    """Raise ValueError where the warm-up takes the whole run."""
    if options["warmup_epochs"] >= options["epochs"]:
        warmup = f"--warmup-epochs {options['warmup_epochs']:g} of --epochs {options['epochs']}"
        raise ValueError(f"{warmup}: the learning rate would never get to fall")


def check_limits(options: dict, base: Path, layers: int, positions: float) -> None:
    """Fill in how many layers get prompts, where that is not said; raise ValueError at more than the base has."""
    if options["layers"] is None:
        options["layers"] = max(1, layers - 2)
    for name, limit in (("layers", layers), ("max_seq_len", positions)):
        if options[name] > limit:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: {base} has only {limit}")


def check_ranks(options: dict) -> None:
    """Raise ValueError, on all ranks, where they have different options."""
    paths = ("out", "data", "base", "tower", "encoder", "images", "features")  # which may be others on another machine
    theirs = from_first(lambda: {name: value for name, value in options.items() if name not in paths})
    with together():
        for name, value in theirs.items():
            if options[name] != value:
                raise ValueError(f"{name} is {options[name]} here, {value} on the first rank")


class Prepared(NamedTuple):
    """All that training needs."""

    model: nn.Module
    tokenizer: Tokenizer | None
    adapter: Adapter
    training: list
    validation: list  # held out
    counts: dict[str, int]  # of examples
    objective: Responses


def prepare_encoder(options: dict, dtype: torch.dtype, device: torch.device) -> Prepared:
    """All that training an encoder needs, checked. Fills in the options that depend on the base.

    Raises OSError or ValueError.
    """
    task = options["task"]
    for name in ("base", "data"):
        if options[name] is None:
            raise ValueError(f"--task {task} needs --{name}")
    others = {"int8": "--int8", "compile": "--compile", "checkpoint_activations": "--checkpoint-activations"}
    others |= {"tower": "--clip", "encoder": "--encoder", "images": "--images", "skip_missing": "--skip-missing"}
    for name, flag in others.items():
        if options[name]:
            raise ValueError(f"{flag} is for a LLaMA: --task {task} does without")
    if options["strategy"] == "fsdp":
        raise ValueError(f"--strategy fsdp is for a LLaMA: --task {task} has its base whole on every rank")
    options["strategy"] = "ddp"
    check_warmup(options)
    base = Path(options["base"])
    model, head = load_encoder(base, dtype, device)
    heads.check_task(task, model, base)
    config = model.config
    check_limits(options, base, config.n_layers, math.inf if task == "image-classification" else config.max_length)
    lesson = heads.read_lesson(task, model, base, Path(options["data"]), options["max_seq_len"], limit=options["limit"])
    options["base_fingerprint"] = heads.fingerprint(model)
    told = repr([lesson.classes, *((row.name, row.labels) for row in lesson.examples)])
    content = hashlib.sha256(told.encode(errors="backslashreplace"))
    for row in lesson.examples:
        content.update(row.inputs.numpy().tobytes())
    options["data_hash"] = content.hexdigest()[:16]
    training, validation = split(lesson.examples, options["val_size"], options["seed"])

    shape = {"layers": options["layers"], "length": options["length"]}
    generator = torch.Generator().manual_seed(options["seed"])
    if not heads.suits(head, task):
        head = None
    adapter = heads.head_adapter(model, head, len(lesson.classes) or 2, **shape, generator=generator)
    adapter.metadata |= {
        "task": task,
        "classes": json.dumps(lesson.classes),
        "base": str(base.resolve()),
        "base_layers": str(config.n_layers),
        "base_fingerprint": options["base_fingerprint"],
        "max_seq_len": str(options["max_seq_len"]),
        "data": Path(options["data"]).name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    counts = {"examples": len(training), "held_out": len(validation), "dropped": lesson.dropped, "cut": lesson.cut}
    objective = heads.Labels(spans=task == "question-answering")
    return Prepared(model, None, adapter, training, validation, counts, objective)


def prepare(
    options: dict, examples: list[Example], pictures: list[Path], dtype: torch.dtype, device: torch.device
) -> Prepared:
    """All that training a LLaMA needs, checked.

    Fills in the options that depend on the base. Raises OSError or ValueError.
    """
    with together():
        check_warmup(options)
        if options["compile"]:
            prepare_to_compile(device, options["int8"])
        if options["base"] is None and local_rank() == 0:
            toy.make_base()  # one of a machine's ranks for all of them
    with together():
        base = toy.make_base() if options["base"] is None else Path(options["base"])
        config, weights = read_base(base)
        check_limits(options, base, config.n_layers, config.max_seq_len or math.inf)
    size = number_of_weights(config) * dtype.itemsize
    options["strategy"] = choose_strategy(options["strategy"], size, device)
    if options["strategy"] == "fsdp" and (options["int8"] or options["compile"]):
        raise Everywhere("--int8 and --compile need the base whole on every rank: --strategy ddp")
    split_up = splitter(device) if options["strategy"] == "fsdp" else None
    with together():
        model, tokenizer = load_llama(base, dtype, device, split=split_up, opened=(config, weights))
        if options["int8"]:
            hold_in_8_bits(model)
            options["checkpoint_activations"] = True
        if options["compile"]:
            compile_layers(model)
    options["base_fingerprint"] = fingerprint(model)
    check_ranks(options)
    features: list[torch.Tensor] = []
    with together():
        if options["encoder"] is not None:
            features = features_by(pictures, load_function(options["encoder"]))
            options["features_hash"] = hash_of(features)
        elif pictures:
            tower = load_vit(options["tower"], dtype, device)
            options["tower_fingerprint"] = tower_fingerprint(tower)
            if local_rank() == 0:  # which keeps them for a machine's other ranks
                features = features_of(pictures, tower, cache=options["features"])
    with together():
        if pictures and options["encoder"] is None and local_rank() > 0:
            features = features_of(pictures, tower, cache=options["features"])
        tokens, cut = tokenize(tokenizer, examples, options["max_seq_len"], features)
        training, validation = split(tokens, options["val_size"], options["seed"])
    counts = {
        "examples": len(training),
        "held_out": len(validation),
        "dropped": len(examples) - len(tokens),
        "cut": cut,
    }
    shape = {"layers": options["layers"], "length": options["length"], "dim": config.dim, "heads": config.n_heads}
    generator = torch.Generator().manual_seed(options["seed"])
    if pictures:
        adapter = ImageAdapter(features=len(features[0]), generator=generator, **shape).to(device)
    else:
        adapter = Adapter(generator=generator, **shape).to(device)
    adapter.metadata = {
        "base": str(base.resolve()),
        "base_layers": str(config.n_layers),
        "base_fingerprint": options["base_fingerprint"],
        "prompt_template": "alpaca",
        "data": f"toy {options['toy']}" if options["data"] is None else Path(options["data"]).name,
        "examples": str(len(training)),
    } | {name: str(options[name]) for name in ("epochs", "batch_size", "lr", "seed")}
    if options["encoder"] is not None:
        adapter.metadata |= {"encoder": options["encoder"]}
    elif pictures:
        adapter.metadata |= {
            "tower": str(Path(options["tower"]).resolve()),
            "tower_fingerprint": options["tower_fingerprint"],
            "tower_depths": str(DEPTHS),
        }
    return Prepared(model, tokenizer, adapter, training, validation, counts, RESPONSES)


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
