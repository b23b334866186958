"""What the commands share: number types, options, and how they speak of bad input."""

import math
import sys
from contextlib import contextmanager

import click

from training.distributed import AllRanksError, line_of, launched_rank


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
        number, processes = launched_rank()
        if not isinstance(error, AllRanksError):
            who = f"\nerror: rank {number}" if processes > 1 else "error"  # apart from the first rank's progress bar
            click.echo(f"{who}: {line_of(error)}", err=True)
        elif number == 0:
            click.echo(f"error: {line_of(error)}", err=True)
        sys.exit(2)
