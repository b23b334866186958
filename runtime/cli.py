"""What the commands share: number types, options, and how they speak of bad input."""

import math
import sys
from contextlib import contextmanager

import click
import torch

from runtime.errors import AllRanksError, error_line, launched_rank, printable

SEED = click.IntRange(0, 2**63 - 1)


class Real(click.FloatRange):
    """A finite number in a range; click's own range lets NaN and infinity through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def device_options(command):
    """--device and --dtype, which `select_device` makes sense of."""
    dtypes = click.Choice(["auto", "float32", "bfloat16"])
    command = click.option("--dtype", type=dtypes, default="auto", help="Of the base.")(command)
    return click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")(command)


def warn(text: str) -> None:
    """Say in a line what the user may not have meant."""
    click.echo(f"warning: {printable(text)}", err=True)


@contextmanager
def one_line_errors():
    """Turns errors of input, files and memory into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank, processes = launched_rank()
        if not isinstance(error, AllRanksError):
            who = f"\nerror: rank {rank}" if processes > 1 else "error"  # apart from the first rank's progress bar
            click.echo(f"{who}: {error_line(error)}", err=True)
        elif rank == 0:
            click.echo(f"error: {error_line(error)}", err=True)
        sys.exit(2)
