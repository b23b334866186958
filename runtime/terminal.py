"""Lines of a conversation, from a terminal or a pipe."""

from collections.abc import Iterator
from functools import partial
from typing import TextIO

import click

from runtime.distributed import broadcast_from_rank0

LINES = "Every line is an instruction of its own."
TURNS = "Every line is a turn of one conversation. /reset: forget it. /system TEXT: what its first turn says."
HELP = "/adapter NAME or /none: who answers. /quit: end. /help: this line."
QUIT = ("exit", "quit", "/exit", "/quit")


def read_line(stdin: TextIO) -> str:
    """Return the next line, "" at the end. Bytes that are not UTF-8 become unpaired surrogates, in that line alone."""
    if not hasattr(stdin, "buffer"):
        return stdin.readline()
    return stdin.buffer.readline().decode("utf-8", errors="surrogateescape")


def read_commands(stdin: TextIO, terminal: bool, has_turns: bool) -> Iterator[tuple[str, str]]:
    """Every line as ("", line), or, on a terminal, as a command and its text where it begins with a slash.

    A terminal is told first, and where it asks for it, how it is led: by lines of their own, or by turns. The first
    rank reads, for all. Raises ValueError where nothing comes out of a pipe.
    """
    number = 0
    help = f"{TURNS if has_turns else LINES} {HELP}"
    click.echo(f"{help}\n" if terminal else "", nl=False, err=True)
    while True:
        click.echo("> " if terminal else "", nl=False, err=True)
        line = broadcast_from_rank0(partial(read_line, stdin))
        number += 1
        if number == 1:
            line = line.removeprefix("\ufeff")  # the byte order mark that some editors write
        if not line and not terminal and number == 1:
            raise ValueError("no PROMPT, and nothing on standard input")
        if not line or (terminal and line.strip() in QUIT):
            return
        line = line.rstrip("\r\n")
        command, _, text = line.partition(" ")
        if not terminal:
            yield "", line
        elif command == "/help":
            click.echo(help, err=True)
        elif command in ("/adapter", "/none", "/reset", "/system"):
            yield command, text.strip()
        elif line:
            yield "", line
