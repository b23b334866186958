"""How a training command begins and ends: on all ranks, stopped by a signal or the clock, with one exit code."""

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import click

from runtime.cli import one_line_errors
from runtime.distributed import (
    barrier,
    destroy_distributed,
    detect_lost_ranks,
    init_distributed,
    rank,
    sync_errors,
    world_size,
)
from runtime.files import locked, require_writable

# Why to stop, and the exit status. Where ranks differ, the highest of these counts.
TIME, SIGTERM, CTRL_C = 1, 2, 3
REASONS = {TIME: ("stopped by --max-minutes", 0), SIGTERM: ("stopped by SIGTERM", 0), CTRL_C: ("interrupted", 130)}


class Stopped(BaseException):
    """By the user, a scheduler or the clock. No Exception: whoever handles all of those would swallow it."""

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


def say(text: str) -> None:
    """To standard error, by the first rank."""
    if rank() == 0:
        click.echo(text, err=True)


@contextmanager
def run_folder(out: Path):
    """The folder of a run, made, and locked by the first rank; where nothing came into it, it goes again.

    Raises OSError, or ValueError where it cannot be written to, or another process is at work there.
    """
    with ExitStack() as stack:
        with sync_errors():
            if rank() == 0:
                new = not require_writable(out, folder=True).exists()
                out.mkdir(parents=True, exist_ok=True)
                stack.callback(remove_if_empty, out, new)
                stack.enter_context(locked(out))
        yield


def remove_if_empty(out: Path, new: bool) -> None:
    if new and not any(out.iterdir()):
        out.rmdir()


def launch(work: Callable[[], None], out: Path) -> NoReturn:
    """Meet the other ranks, work, and exit, as scripts do: errors of input are one line and exit code 2."""
    with one_line_errors():
        init_distributed()
        with run_folder(out), detect_lost_ranks():
            code = exit_code(work, out)
            barrier()  # nobody leaves while others are still at work
        destroy_distributed()
    sys.exit(code)


def exit_code(work: Callable[[], None], out: Path) -> int:
    """0, or what stopped the work; `out` is the run's folder."""
    try:
        with signals(between_steps=False):
            work()
        return 0
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(CTRL_C)
        begun = (out / "checkpoint.pt").exists()
        say(f"{stopped}: {'to go on, add --resume' if begun else 'there is nothing yet to go on from'}")
        return stopped.code
