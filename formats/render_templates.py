"""Renders chat templates in a process of its own: `python -P render_templates.py`, a line of JSON for each request.

A template is a program of a stranger. Jinja's sandbox keeps it from files and from what Python objects have inside; but
a loop in it may never end, and a text may fill the memory. So a process renders that has little memory, and ends when a
request takes too long.
"""

import json
import signal
import sys
from collections.abc import Callable
from functools import cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 2**30  # of memory
BEGIN, END = "\ufdd0", "\ufdd1"  # around what the assistant says; no text has these (Unicode's noncharacters)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what stands between is what a model is to learn."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller) -> str:
        return BEGIN + caller() + END


def raise_exception(message: str) -> None:
    """What templates call where they do not take a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options) -> str:
    """As Hugging Face's templates mean `tojson`: without HTML's escapes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def render_talk(template: jinja2.Template, variables: dict, talk: dict) -> dict:
    """The text of a conversation's messages, with the beginning of an answer if that is asked for.

    And for each number of a message in `answers`, an assistant's, how far the text goes up to it, the beginning of an
    answer included, and with it; None where the text does not begin with those of the conversation so far.
    """

    def render(messages: list, begin_answer: bool) -> str:
        return template.render(variables | {"messages": messages, "add_generation_prompt": begin_answer})

    messages, spans = talk["messages"], []
    text = render(messages, talk["begin_answer"])
    for number in talk["answers"]:
        before, after = render(messages[:number], True), render(messages[: number + 1], False)
        fits = text.startswith(after) and after.startswith(before)
        spans.append([len(before), len(after)] if fits else None)
    return {"text": text, "spans": spans}


def reply(compiled: Callable[[str], jinja2.Template], line: str) -> str:
    """What was rendered of each conversation, or the error and the number of the conversation that raised it."""
    number = None
    try:
        request, rendered = json.loads(line), []
        template = compiled(request["template"])
        values = {"tools": None, "documents": None} | request["variables"]  # as transformers has them
        for number, talk in enumerate(request["talks"]):  # noqa: B007 (an error below names it)
            rendered.append(render_talk(template, values, talk))
        return json.dumps({"rendered": rendered}, ensure_ascii=False)
    except MemoryError:
        return json.dumps({"error": f"needs more than {MAX_BYTES:,} bytes of memory", "number": number})
    except Exception as error:  # of a stranger's program: there is none that it may not raise
        return json.dumps({"error": f"{type(error).__name__}: {error}", "number": number})


def limit_memory() -> None:
    """Where the system can: not on Windows, and not on every other."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    except (ImportError, ValueError, OSError):
        pass


def limit_seconds(seconds: float) -> None:
    """End this process then, whether or not the one that asked is still there; 0 takes that back. Not on Windows."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main(seconds: float) -> None:
    limit_memory()
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    compiled = cache(environment.from_string)
    for line in sys.stdin:
        limit_seconds(seconds)
        answer = reply(compiled, line)
        limit_seconds(0)
        print(answer, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
