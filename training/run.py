"""A training run with its files: what it is made of, and its steps followed with metrics, validation, checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from adapter import Adapter
from data import Tokenizer
from runtime.cli import warn
from runtime.device import peak_memory
from runtime.distributed import RankLostError, all_reduce_max, detect_lost_ranks, first_rank_speaks, rank
from runtime.distributed import sync_errors, world_size
from runtime.errors import AllRanksError, memory_errors
from runtime.files import resolved, write_json
from training.curves import draw_curves
from training.launch import TIME, Stopped, say, signals
from training.mlp_prompts import with_plain_prompts
from training.options import RunOptions
from training.run_files import Progress, begin_in_folder, load_checkpoint, read_metrics, save_checkpoint, write_metrics


class Prepared(NamedTuple):
    """All that training needs, found, loaded and checked."""

    model: nn.Module
    tokenizer: Tokenizer | None
    adapter: Adapter
    training: list  # examples
    validation: list  # held out
    counts: dict[str, int]  # of examples: examples, held_out, dropped, cut
    options: dict[str, object]  # the fixed ones: a resumed run must have the same
    base: str | None  # as the user says it; None is the toy's
    strategy: str = "ddp"
    why_dropped: str = "the prompt alone fills"


class Step(NamedTuple):
    """An optimizer step that was taken."""

    number: int  # from 1
    epoch: int  # from 0
    loss: float  # before it
    lr: float
    tokens: int
    seconds: float


class Recorder:
    """Follows the steps of a run: a line of metrics for each, validation at every epoch, checkpoints, reasons to stop.

    `progress` is always that of the adapter and the optimizer as they are. Only the first rank writes.
    """

    def __init__(self, prepared: Prepared, optimizer: torch.optim.Optimizer, run: RunOptions):
        self.prepared, self.optimizer, self.run, self.progress = prepared, optimizer, run, Progress()

    def begin(self, state: str) -> None:
        """Say what will be done, make the folder ready; to go on, fill adapter and optimizer from the checkpoint.

        `state` is of `run_state`. Raises OSError, or ValueError where the files of a run don't fit.
        """
        adapter, counts, options = self.prepared.adapter, self.prepared.counts, self.prepared.options
        trainable, frozen = (sum(p.numel() for p in part.parameters()) for part in (adapter, self.prepared.model))
        ranks = f", {self.prepared.strategy} over {world_size()} ranks" if world_size() > 1 else ""
        say(
            f"{trainable:,} parameters to train, {frozen:,} frozen, on {adapter.gates.device} in {options['dtype']}"
            f"{ranks}\n{counts['examples']:,} examples to train on, {counts['held_out']:,} held out, "
            f"{counts['dropped']:,} dropped ({self.prepared.why_dropped} {options['max_seq_len']} tokens), "
            f"{counts['cut']:,} cut to fit"
        )
        if state == "begun":
            self.progress = load_checkpoint(self.run.out / "checkpoint.pt", adapter, self.optimizer, options)
        with sync_errors():
            moved = begin_in_folder(self.run.out, self.progress.step) if rank() == 0 else None
        if moved is not None:
            say(f"{self.run.out}: the run that finished there is now in {moved}")

    def follow(
        self,
        steps: Iterator[Step],
        validation_loss: Callable[[], float],
        *,
        total: int,
        steps_per_epoch: int,
        less_memory: str,
    ) -> None:
        """Take all steps; `less_memory` is what would take less.

        Raises Stopped, FloatingPointError where values are not finite, torch.OutOfMemoryError, RankLostError where
        another rank is gone, all of them with the last good state saved, and OSError where it cannot be.
        """
        bar = tqdm(total=total, initial=self.progress.step, unit="step", file=sys.stderr, disable=rank() > 0)
        with self.advise(less_memory), bar, signals(between_steps=True) as asked:
            try:
                if self.progress.step % steps_per_epoch == 0:
                    self.validate(validation_loss, bar)
                for step in steps:
                    self.record_step(step, bar)
                    late = TIME if time.perf_counter() > self.run.deadline else 0
                    with detect_lost_ranks():
                        reason = all_reduce_max(max(late, asked()))
                    if reason:
                        raise Stopped(reason, step.number)
                    if step.number % steps_per_epoch == 0:
                        self.validate(validation_loss, bar)
                    if step.number % self.run.save_every == 0 or step.number == total:
                        self.save()
            except (Stopped, FloatingPointError, torch.OutOfMemoryError, RankLostError):
                self.save()
                raise

    def record_step(self, step: Step, bar: tqdm) -> None:
        tokens, seconds = self.progress.tokens + step.tokens, self.progress.seconds + step.seconds
        self.progress = Progress(step.number, tokens, seconds)
        speed, gates = step.tokens / step.seconds, self.prepared.adapter.gate_values()
        line = {"epoch": step.epoch, "loss": step.loss, "lr": step.lr, "tokens_per_second": speed}
        self.record(line | {"gate_mean_abs": gates.abs().mean().item()})
        bar.update()
        if step.number % self.run.log_every == 0:
            bar.set_postfix_str(f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed:,.0f} tokens/s")

    def validate(self, validation_loss: Callable[[], float], bar: tqdm) -> None:
        if not self.prepared.validation:
            return
        with detect_lost_ranks(), memory_errors():
            loss = validation_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        self.record({"val_loss": loss})
        if rank() == 0:
            bar.write(f"step {self.progress.step}: validation loss {loss:.4f}", file=sys.stderr)

    def record(self, line: dict) -> None:
        if rank() == 0:
            write_metrics(self.run.out / "metrics.jsonl", {"step": self.progress.step} | line)

    def save(self) -> None:
        if rank() == 0:
            save_checkpoint(self.run.out, self.prepared.adapter, self.optimizer, self.progress, self.prepared.options)

    @contextmanager
    def advise(self, less_memory: str):
        """Tells what ended the run with what is saved, and what may help."""
        files = f"{self.run.out}/checkpoint.pt and adapter.safetensors are as of step"
        try:
            yield
        except FloatingPointError as error:
            where, advice = f"in step {self.progress.step + 1}", "a lower --lr may help, with another --out"
            raise AllRanksError(f"{where}: {error}; {files} {self.progress.step}; {advice}") from None
        except RankLostError as error:
            raise RankLostError(f"{error}; {files} {self.progress.step}; to go on, add --resume") from None
        except torch.OutOfMemoryError as error:
            advice = f"to go on, add --resume and {less_memory}"
            raise ValueError(f"{error}; {files} {self.progress.step}; {advice}") from None

    def finish(self, evaluate: Callable | None) -> None:
        """Write the adapter with its losses, curves, and summary.json, with what `evaluate` says of the tuned adapter.

        `evaluate` is called with model, tokenizer and adapter.
        """
        prepared, out, scores = self.prepared, self.run.out, {}
        if evaluate is not None and (rank() == 0 or prepared.strategy == "fsdp"):  # a split model needs all ranks
            with first_rank_speaks():
                scores = evaluate(prepared.model, prepared.tokenizer, prepared.adapter)
        if rank() == 0:
            adapter, metrics = prepared.adapter, read_metrics(out / "metrics.jsonl")
            losses = [line["val_loss"] for line in metrics if "val_loss" in line] or [None]
            change = {"val_loss_before": losses[0], "val_loss_after": losses[-1]}
            if losses[0] is not None and losses[-1] > losses[0]:
                than = f"{losses[-1]:.4f}, before tuning it was {losses[0]:.4f}: it has done harm"
                warn(f"the validation loss is {than}; a lower --lr may help")
            with_plain_prompts(adapter).save(out / "adapter.safetensors", **change)
            draw_curves(metrics, adapter, out / "curves.png")
            summary = {"trainable_parameters": sum(p.numel() for p in adapter.parameters())} | prepared.counts
            summary |= {"adapter_bytes": (out / "adapter.safetensors").stat().st_size} | change
            speed = self.progress.tokens / self.progress.seconds
            summary |= {"tokens": self.progress.tokens, "tokens_per_second": speed} | scores
            summary |= {"wall_seconds": time.perf_counter() - self.run.started}
            summary |= {"peak_memory_bytes": peak_memory(adapter.gates.device)}
            summary |= {"options": prepared.options | {"base": resolved(prepared.base)}}
            write_json(out / "summary.json", summary, indent=2)
            (out / "checkpoint.pt").unlink()
        say(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {out}")
