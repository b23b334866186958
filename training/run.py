"""A training run: its folder and lock, metrics, checkpoints, progress bar, and the reasons to stop."""

import math
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from tqdm import tqdm

from adapter import Adapter
from runtime.cli import report_lost_rank, warn
from runtime.device import peak_memory
from runtime.distributed import (
    all_reduce_max,
    barrier,
    broadcast_from_rank0,
    is_lost_rank,
    print_rank0,
    rank,
    world_size,
)
from runtime.errors import error_line, is_out_of_memory
from runtime.files import locked, read_json_object, require_writable, write_json
from training.options import RunOptions
from training.run_files import CHECKPOINT, SUMMARY, Progress, begin_in_folder, check_options, finish_moving
from training.run_files import load_checkpoint, read_metrics, run_state, save_checkpoint, write_metrics

# Why a run stops between two steps, and its exit code. If ranks differ, the highest number counts.
TIME, SIGTERM, CTRL_C = 1, 2, 3
REASONS = {TIME: ("stopped by --max-minutes", 0), SIGTERM: ("stopped by SIGTERM", 0), CTRL_C: ("interrupted", 130)}


class Run:
    """The folder --out of a training run. All ranks call its methods, and the first one writes.

    As a context it makes and locks the folder, and exits with one line if the run is interrupted. Raises OSError, or
    ValueError if the folder cannot be written to, another process uses it, or --resume does not suit what is there.
    """

    def __init__(self, options: RunOptions):
        self.options = options
        self.out = options.out
        self.metrics = self.out / "metrics.jsonl"
        self.step = 0  # optimizer steps taken; the adapter and the optimizer are as of this step
        self.tokens = 0
        self.seconds = 0.0  # spent in the steps
        self.saved_step = 0  # of checkpoint.pt
        self.val_losses: list[float] = []
        self.in_loop = False
        self.asked = 0  # the highest of the reasons that a signal has given between two steps
        self.stopped = 0  # the reason for which the run has stopped

    @property
    def exit_code(self) -> int:
        return REASONS[self.stopped][1] if self.stopped else 0

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            if rank() == 0:
                is_new = not require_writable(self.out, folder=True).exists()
                self.out.mkdir(parents=True, exist_ok=True)
                stack.callback(remove_if_empty, self.out, is_new)
                stack.enter_context(locked(self.out))
                finish_moving(self.out)
            self.state = broadcast_from_rank0(lambda: run_state(self.out, self.options.resume))
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self.on_signal))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        has_checkpoint = (self.out / CHECKPOINT).exists()
        self.stack.close()
        advice = "to continue, add --resume" if has_checkpoint else "nothing was saved yet"
        if isinstance(error, KeyboardInterrupt):
            text, code = REASONS[error.args[0] if error.args else CTRL_C]
            if world_size() == 1:  # with several ranks, the signal may come from torchrun because another has failed
                print_rank0(f"{text}: {advice}")
            raise SystemExit(code) from None
        if self.stopped and error is None:
            print_rank0(f"{REASONS[self.stopped][0]} after step {self.step}: {advice}")

    def on_signal(self, number: int, frame) -> None:
        """Note the signal if a step may be running; interrupt otherwise, and at a second Ctrl-C.

        Under torchrun the second Ctrl-C may be the first one, forwarded.
        """
        reason = CTRL_C if number == signal.SIGINT else SIGTERM
        is_second = reason == CTRL_C and self.asked == CTRL_C and world_size() == 1
        if not self.in_loop or is_second:
            raise KeyboardInterrupt(reason)
        self.asked = max(self.asked, reason)

    def is_finished(self, fixed: dict) -> bool:
        """Whether --resume finds nothing left to do. Raises ValueError if the finished run had other options."""
        if self.state == "finished" and rank() == 0:
            check_options(read_json_object(self.out / SUMMARY).get("options"), fixed, self.out / SUMMARY)
        return self.state == "finished"

    def begin(self, adapter: Adapter, optimizer: torch.optim.Optimizer, fixed: dict, counts: dict, num_steps: int):
        """Prepare the folder, and on --resume fill adapter and optimizer from checkpoint.pt.

        `counts` are numbers of examples for the summary. Raises OSError, or ValueError if the files do not fit.
        """
        self.adapter = adapter
        self.optimizer = optimizer
        self.fixed = fixed
        self.counts = counts
        self.num_steps = num_steps
        barrier()  # every rank has loaded its base before files change
        if self.state == "begun":
            progress = load_checkpoint(self.out / CHECKPOINT, adapter, optimizer, fixed)
            self.step, self.tokens, self.seconds = progress
            self.saved_step = self.step
        if rank() == 0:
            moved = begin_in_folder(self.out, self.step)
            if moved is not None:
                finished = "the run that finished there" if (moved / SUMMARY).exists() else "an unfinished adapter"
                print_rank0(f"{self.out}: {finished} is now in {moved}")
            if self.step:
                self.val_losses = [line["val_loss"] for line in read_metrics(self.metrics) if "val_loss" in line]

    # -----------------------------------------------------------------------------------------------
    # During the loop

    @contextmanager
    def saving_on_errors(self):
        """Show the progress bar; if a step fails, save the last whole step and say how to continue.

        Steps fail for lack of memory, values that are not finite, or because another rank has ended.
        """
        self.in_loop = True
        options = {"total": self.num_steps, "initial": self.step, "unit": "step", "disable": rank() > 0}
        with tqdm(**options, file=sys.stderr) as self.bar:
            try:
                yield
            except (FloatingPointError, RuntimeError, MemoryError) as error:
                self.save_after_error()
                self.explain(error)
                raise
            finally:
                self.in_loop = False

    def save_after_error(self) -> None:
        """Save the state before the failed step, unless the optimizer has already changed a part of it."""
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        if rank() == 0 and steps == {self.step} and self.saved_step < self.step:
            self.save_checkpoint()

    def explain(self, error: Exception) -> None:
        """Raise ValueError, or exit, with the cause, what is saved, and advice; return if the error is unexpected."""
        saved = "nothing was saved yet"
        if self.saved_step:
            saved = f"{self.out}/{CHECKPOINT} and adapter.safetensors are as of step {self.saved_step}"
        if is_lost_rank(error):
            report_lost_rank(error, f"; {saved}; to continue, add --resume")
            sys.exit(2)
        if isinstance(error, FloatingPointError):
            advice = "a lower --lr may help, with another --out"
            raise ValueError(f"in step {self.step + 1}: {error}; {saved}; {advice}") from None
        if is_out_of_memory(error):
            advice = "to continue, add --resume and a smaller --micro-batch-tokens, or --checkpoint-activations"
            raise ValueError(f"{error_line(error)}; {saved}; {advice}") from None

    def asked_to_stop(self) -> bool:
        """Whether any rank has received Ctrl-C or SIGTERM, or --max-minutes have passed."""
        minutes = (time.perf_counter() - self.options.started) / 60
        is_late = minutes > (self.options.max_minutes or math.inf)
        self.stopped = all_reduce_max(max(self.asked, TIME if is_late else 0))
        return self.stopped > 0

    def log_step(self, step) -> None:
        """Write a line of metrics for a train.Step."""
        self.step = step.number
        self.tokens += step.tokens
        self.seconds += step.seconds
        if rank() > 0:
            return
        speed = step.tokens / step.seconds
        line = {"step": step.number, "epoch": step.epoch, "loss": step.loss, "lr": step.lr, "tokens_per_second": speed}
        line["gate_mean_abs"] = self.adapter.gate_values().abs().mean().item()
        write_metrics(self.metrics, line)
        self.bar.update()
        if step.number % self.options.log_every == 0:
            self.bar.set_postfix_str(f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed:,.0f} tokens/s")

    def log_validation(self, loss: float) -> None:
        """Write a line of metrics. Raises FloatingPointError if the loss is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        self.val_losses.append(loss)
        if rank() == 0:
            write_metrics(self.metrics, {"step": self.step, "val_loss": loss})
            self.bar.write(f"step {self.step}: validation loss {loss:.4f}", file=sys.stderr)

    def save_checkpoint(self) -> None:
        """Write the adapter, for use, and then checkpoint.pt."""
        if rank() == 0:
            adapter = self.adapter
            if parametrize.is_parametrized(adapter):
                from training.mlp_prompts import with_plain_prompts

                adapter = with_plain_prompts(adapter)
            adapter.save(self.out / "adapter.safetensors", steps=self.step, **self.change())
            progress = Progress(self.step, self.tokens, self.seconds)
            save_checkpoint(self.out / CHECKPOINT, self.adapter, self.optimizer, progress, self.fixed)
        self.saved_step = self.step

    def change(self) -> dict[str, float | None]:
        """The first and the newest validation loss."""
        before, after = (self.val_losses[0], self.val_losses[-1]) if self.val_losses else (None, None)
        return {"val_loss_before": before, "val_loss_after": after}

    # -----------------------------------------------------------------------------------------------
    # At the end

    def finish(self, scores: dict[str, float]) -> None:
        """Write curves.png and summary.json, with the scores of an evaluation, and remove checkpoint.pt."""
        if rank() == 0:
            from training.curves import draw_curves  # loads matplotlib

            change = self.change()
            before, after = change.values()
            if before is not None and after > before:
                than = f"{after:.4f}, before training it was {before:.4f}: the adapter does harm"
                warn(f"the validation loss is {than}; a lower --lr may help")
            draw_curves(read_metrics(self.metrics), self.adapter, self.out / "curves.png")
            summary = {"trainable_parameters": sum(p.numel() for p in self.adapter.parameters())} | self.counts
            summary |= {"adapter_bytes": (self.out / "adapter.safetensors").stat().st_size} | change
            summary |= {"tokens": self.tokens, "tokens_per_second": self.tokens / self.seconds} | scores
            summary |= {"wall_seconds": time.perf_counter() - self.options.started}
            summary |= {"peak_memory_bytes": peak_memory(self.adapter.gates.device), "options": self.fixed}
            write_json(self.out / SUMMARY, summary, indent=2)
            (self.out / CHECKPOINT).unlink()
        print_rank0(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {self.out}")


def remove_if_empty(folder: Path, is_new: bool) -> None:
    """Remove a folder that this run has made and nothing was written to."""
    if is_new and not any(folder.iterdir()):
        folder.rmdir()
