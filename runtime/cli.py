"""What the commands share: number types, options, and how they speak of bad input."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from cloup import option

from runtime.errors import AllRanksError, error_line, launched_rank, memory_errors, printable

SEED = click.IntRange(0, 2**63 - 1)


class Real(click.FloatRange):
    """A finite number in a range; click's own range lets NaN and infinity through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Count(click.types.IntParamType):
    """A whole number from `least` to 2**31 - 1."""

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not self.least <= number < 2**31:
            self.fail(f"{str(value)[:40]} is not in the range {self.least} to 2**31 - 1.", param, ctx)
        return number


PATH = click.Path(path_type=Path)  # an option's type: what is given is made a Path

device_options = [  # which `select_device` makes sense of
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ..."),
    option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="Of the base."),
]


# Either fills `bits`, with None, "8" or "4", which `runtime.quantization.quantizer` makes sense of.
bits_options = [
    option("--bits", type=click.Choice(["8", "4"]), help="Hold the layers' weights in so many.  [default: --dtype's]"),
    option("--int8", "bits", flag_value="8", help="The same as --bits 8."),
]


def warn(text: str) -> None:
    """Say in a line what the user may not have meant."""
    click.echo(f"warning: {printable(text)}", err=True)


@contextmanager
def one_line_errors():
    """Turns errors of input, files and memory into one line and exit code 2."""
    try:
        with memory_errors():
            yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank, processes = launched_rank()
        if not isinstance(error, AllRanksError):
            who = f"\nerror: rank {rank}" if processes > 1 else "error"  # apart from the first rank's progress bar
            click.echo(f"{who}: {error_line(error)}", err=True)
        elif rank == 0:
            click.echo(f"error: {error_line(error)}", err=True)
        sys.exit(2)
