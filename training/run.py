"""A training run: output folder, metrics, checkpoints, progress bar, and signals."""

import math
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path

import torch
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
from training.run_files import CHECKPOINT, SUMMARY, TENSORBOARD, Kept, Progress
from training.run_files import begin_in_folder, check_options, finish_moving
from training.run_files import load_checkpoint, read_metrics, run_state, save_checkpoint, write_metrics

# Reasons to stop between two steps, with message and exit code. With several ranks, the highest number wins.
TIME, SIGTERM, CTRL_C = 1, 2, 3
REASONS = {TIME: ("stopped by --max-minutes", 0), SIGTERM: ("stopped by SIGTERM", 0), CTRL_C: ("interrupted", 130)}

LESS_MEMORY = "a smaller --micro-batch-tokens, or --checkpoint-activations, needs less memory"


class Run:
    """The folder --out of a training run. All ranks call its methods, and the first rank writes.

    The context manager creates and locks the folder, and handles Ctrl-C and SIGTERM. It raises OSError if the
    folder is not writable, or ValueError if it is not a folder, another process uses it, --resume contradicts its
    content, or --tensorboard is given but the package is missing.
    """

    def __init__(self, options: RunOptions, less_memory: str = LESS_MEMORY):
        self.options = options
        self.less_memory = less_memory  # what the error message advises if memory runs out
        self.out = options.out
        self.metrics = self.out / "metrics.jsonl"
        self.step = 0  # completed steps; adapter and optimizer are in this state
        self.tokens = 0
        self.seconds = 0.0  # time spent in the steps
        self.micro_batch_tokens: int | None = None  # a resumed run keeps it, unless --micro-batch-tokens is given
        self.saved_step = 0  # the step of the last checkpoint
        self.val_losses: list[float] = []
        self.best: Kept | None = None  # with --keep best
        self.tensorboard = None
        self.in_loop = False
        self.requested = 0  # the highest of REASONS that was signaled so far
        self.stopped = 0  # the one of REASONS for which the run has stopped, or 0

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
            if self.options.tensorboard:
                require_tensorboard()
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
            if world_size() == 1:  # torchrun sends a signal to all ranks if one has failed
                print_rank0(f"{text}: {advice}")
            raise SystemExit(code) from None
        if self.stopped and error is None:
            print_rank0(f"{REASONS[self.stopped][0]} after step {self.step}: {advice}")

    def on_signal(self, number: int, frame) -> None:
        """During training, record the signal, so that the run stops after the step. At other times, interrupt at once.

        Interrupting raises KeyboardInterrupt. A second Ctrl-C also interrupts, but not with several ranks: torchrun
        forwards the first one, so that each rank receives it twice.
        """
        reason = CTRL_C if number == signal.SIGINT else SIGTERM
        is_second = reason == CTRL_C and self.requested == CTRL_C and world_size() == 1
        if not self.in_loop or is_second:
            raise KeyboardInterrupt(reason)
        self.requested = max(self.requested, reason)

    def is_finished(self, fixed: dict) -> bool:
        """Return True if the run to resume is finished. Raises ValueError if its options differ from `fixed`."""
        if self.state == "finished" and rank() == 0:
            try:
                check_options(read_json_object(self.out / SUMMARY).get("options"), fixed, self.out / SUMMARY)
            except ValueError as error:
                init = f"--init {self.out / 'adapter.safetensors'}"
                how = f"to train its adapter further, use {init} and a different --out"
                raise ValueError(f"{error}; {how}") from None
        return self.state == "finished"

    def begin(self, adapter: Adapter, optimizer: torch.optim.Optimizer, fixed: dict, counts: dict, num_steps: int):
        """Prepare the folder; with --resume, load the state of adapter and optimizer from checkpoint.pt.

        A new run moves the files of a previous run to a new folder run-N. `counts` are the numbers of examples, for the
        summary. Raises OSError, or ValueError if the checkpoint or the metrics are invalid, if options have changed, or
        if there are no validation examples for --keep best.
        """
        self.adapter = adapter
        self.optimizer = optimizer
        self.fixed = fixed
        self.counts = counts
        self.num_steps = num_steps
        if fixed["keep"] == "best" and not counts["held_out"]:
            raise ValueError("--keep best needs validation examples, but --val-size holds out none; increase it")
        barrier()  # files change only when every rank has loaded its base
        if self.state == "begun":
            progress, self.best = load_checkpoint(self.out / CHECKPOINT, adapter, optimizer, fixed)
            self.step, self.tokens, self.seconds, self.micro_batch_tokens = progress
            self.saved_step = self.step
        if rank() == 0:
            moved = begin_in_folder(self.out, self.step)
            if moved is not None:
                previous = "the finished run" if (moved / SUMMARY).exists() else "an unfinished adapter"
                print_rank0(f"{self.out}: {previous} was moved to {moved}")
            if self.step:
                self.val_losses = [line["val_loss"] for line in read_metrics(self.metrics) if "val_loss" in line]
            if self.options.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                purge_step = self.step + 1 if self.step else None  # hides what a killed run wrote after its checkpoint
                self.tensorboard = SummaryWriter(str(self.out / TENSORBOARD), purge_step=purge_step)
                self.stack.callback(self.tensorboard.close)

    # -----------------------------------------------------------------------------------------------
    # During the loop

    @contextmanager
    def saving_on_errors(self):
        """Show the progress bar. If a step or a validation fails, save the last completed step, and raise the error.

        For non-finite values and lack of memory, `explain` raises a ValueError with advice instead. If another rank has
        ended, it prints a message and exits with code 2.
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
        """Save the last completed step, unless it is already saved, or the failed step has updated some parameters."""
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        if steps == {self.step} and self.saved_step < self.step:
            self.save_checkpoint()

    def explain(self, error: Exception) -> None:
        """Raise a ValueError with the cause of a failed step, the saved step, and advice.

        If another rank has ended, print this message instead, and exit with code 2. Return if the error is unexpected.
        """
        saved = "nothing was saved yet"
        to_continue = ""
        if self.saved_step:
            saved = f"{self.out}/{CHECKPOINT} and adapter.safetensors were saved after step {self.saved_step}"
            to_continue = "; to continue, add --resume"
        if isinstance(error, FloatingPointError):
            advice = "try a lower --lr and a different --out"
            if self.step == 0:  # the gates are zero, or those of --init
                advice = "check the weights of the base, or try --dtype float32"
            raise ValueError(f"after step {self.step}: {error}; {saved}; {advice}") from None
        if rank() > 0:  # the first rank may be saving at this moment, or may have ended before it could
            saved = f"the last saved step is in {self.out}"
            to_continue = "; to continue, add --resume auto"
        if is_lost_rank(error):
            report_lost_rank(error, f"; {saved}{to_continue}")
            sys.exit(2)
        if is_out_of_memory(error):
            raise ValueError(f"{error_line(error)}; {saved}; {self.less_memory}{to_continue}") from None

    def asked_to_stop(self) -> bool:
        """Return True, on all ranks, if any rank has received Ctrl-C or SIGTERM, or --max-minutes have passed.

        Stores the reason in `stopped`.
        """
        minutes = (time.perf_counter() - self.options.started) / 60
        is_late = minutes > (self.options.max_minutes or math.inf)
        self.stopped = all_reduce_max(max(self.requested, TIME if is_late else 0))
        return self.stopped > 0

    def evaluation_due(self, step: int) -> bool:
        """Return True if the validation loss is due: at step 0, every --eval-every steps, and at the end.

        --eval-every is one epoch by default. Without validation examples, no validation is due.
        """
        every = self.fixed["eval_every"] or self.num_steps // self.fixed["epochs"]
        return self.counts["held_out"] > 0 and (step % every == 0 or step == self.num_steps)

    def log(self, line: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, and its numbers to the TensorBoard file if there is one."""
        write_metrics(self.metrics, line)
        if self.tensorboard is not None:
            for name in line.keys() - {"step"}:
                self.tensorboard.add_scalar(name, line[name], line["step"])

    def log_step(self, step) -> None:
        """Append a train.Step to metrics.jsonl, and update the progress of the run."""
        self.step = step.number
        self.tokens += step.num_tokens
        self.seconds += step.seconds
        if rank() > 0:
            return
        speed = step.num_tokens / step.seconds
        line = {"step": step.number, "epoch": step.epoch, "loss": step.loss, "lr": step.lr, "tokens_per_second": speed}
        line["gate_mean_abs"] = self.adapter.gate_values().abs().mean().item()
        self.log(line)
        self.bar.update()
        if step.number % self.options.log_every == 0:
            self.bar.set_postfix_str(f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed:,.0f} tokens/s")

    def log_validation(self, loss: float) -> None:
        """Append a validation loss to metrics.jsonl. With --keep best, copy the adapter if this is the lowest loss.

        Raises FloatingPointError if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        self.val_losses.append(loss)
        if self.fixed["keep"] == "best" and (self.best is None or loss < self.best.loss):
            tensors = {name: tensor.clone() for name, tensor in self.adapter.state_dict().items()}
            self.best = Kept(loss, self.step, tensors)
        if rank() == 0:
            self.log({"step": self.step, "val_loss": loss})
            self.bar.write(f"step {self.step}: validation loss {loss:.4f}", file=sys.stderr)

    def save_checkpoint(self) -> None:
        """Write adapter.safetensors, then checkpoint.pt."""
        if rank() == 0:
            losses = {name: loss for name, loss in self.change().items() if loss is not None}
            self.kept_adapter().save(self.out / "adapter.safetensors", steps=self.kept_step, **losses)
            progress = Progress(self.step, self.tokens, self.seconds, self.micro_batch_tokens)
            save_checkpoint(self.out / CHECKPOINT, self.adapter, self.optimizer, progress, self.fixed, self.best)
        self.saved_step = self.step

    @property
    def kept_step(self) -> int:
        return self.step if self.best is None else self.best.step

    def kept_adapter(self) -> Adapter:
        """Return the adapter as it is now; with --keep best, a copy of the best one so far."""
        if self.best is None:
            return self.adapter
        kept = deepcopy(self.adapter)
        kept.load_state_dict(self.best.tensors)
        return kept

    def change(self) -> dict[str, float | None]:
        """Return the first and the last (with --keep best, the lowest) validation loss, or two Nones without any."""
        before, after = (self.val_losses[0], self.val_losses[-1]) if self.val_losses else (None, None)
        return {"val_loss_before": before, "val_loss_after": after if self.best is None else self.best.loss}

    # -----------------------------------------------------------------------------------------------
    # At the end

    def finish(self, scores: dict[str, float]) -> None:
        """Write curves.png and summary.json, which includes the scores, and remove checkpoint.pt.

        Warns if the validation loss is higher than before training, or if --keep best kept the initial adapter.
        """
        if rank() == 0:
            from training.curves import draw_curves  # loads matplotlib

            change = self.change()
            before, after = change.values()
            if before is not None and after > before:
                comparison = f"{after:.4f}, but was {before:.4f} before training"
                warn(f"the validation loss is {comparison}; a lower --lr may help")
            if self.best is not None and self.best.step == 0:
                warn("no step reached a lower validation loss than the initial adapter, which was kept")
            draw_curves(read_metrics(self.metrics), self.kept_adapter(), self.out / "curves.png")
            summary = {
                "trainable_parameters": sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)
            } | self.counts
            summary |= {"adapter_bytes": (self.out / "adapter.safetensors").stat().st_size} | change
            summary |= {
                "kept_step": self.kept_step,
                "tokens": self.tokens,
                "tokens_per_second": self.tokens / self.seconds,
            } | scores
            summary |= {"wall_seconds": time.perf_counter() - self.options.started}
            summary |= {"peak_memory_bytes": peak_memory(self.adapter.gates.device), "options": self.fixed}
            write_json(self.out / SUMMARY, summary, indent=2)
            (self.out / CHECKPOINT).unlink()
        print_rank0(f"wrote adapter.safetensors, summary.json, metrics.jsonl and curves.png to {self.out}")


def require_tensorboard() -> None:
    """Raise ValueError if the package tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ValueError("--tensorboard needs one more package: pip install tensorboard") from None


def remove_if_empty(folder: Path, is_new: bool) -> None:
    """Remove the folder if this run has created it and it is empty."""
    if is_new and not any(folder.iterdir()):
        folder.rmdir()
