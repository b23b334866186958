"""What the commands share: number types, options, and how they speak of bad input."""

import math
import sys
from collections.abc import Callable
from contextlib import contextmanager

import click
import torch.distributed as dist

from parallel import rank, started, world


class Real(click.FloatRange):
    """A finite number in a range; click's own range lets NaN and infinity through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SEED = click.IntRange(0, 2**63 - 1)


def device_options(command):
    """--device and --dtype, which `model.choose` makes sense of."""
    dtypes = click.Choice(["auto", "float32", "bfloat16"])
    command = click.option("--dtype", type=dtypes, default="auto", help="Of the base.")(command)
    return click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")(command)


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Turns errors of these kinds, by default ValueError and OSError, into one line and exit code 2."""
    try:
        yield
    except kinds or (ValueError, OSError) as error:
        number, processes = started()
        if not isinstance(error, Everywhere):
            who = f"rank {number}: " if processes > 1 else ""
            click.echo(f"error: {who}{line_of(error)}", err=True)
        elif number == 0:
            click.echo(f"error: {error}", err=True)
        sys.exit(2)


def line_of(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    return " ".join(message.split())


class Everywhere(ValueError):
    """An error that all ranks raise together: the first of them says it."""


@contextmanager
def together():
    """Where any rank meets an OSError or a ValueError in this block, all of them raise it, at its end."""
    error = None
    try:
        yield
    except (OSError, ValueError) as caught:
        error = caught
    if world() == 1:
        if error is not None:
            raise error
        return
    lines: list[str | None] = [None] * world()
    dist.all_gather_object(lines, None if error is None else line_of(error))
    for number, line in enumerate(lines):
        if line is not None:
            raise Everywhere(line if lines.count(line) == world() else f"rank {number}: {line}")


def from_first(read: Callable):
    """What `read` returns on the first rank, on every rank; it may raise OSError or ValueError."""
    with together():
        value = [read() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(value)
    return value[0]
