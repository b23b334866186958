"""Renders a chat template in a process of its own: `python -I render_templates.py`, a line of JSON for each request.

A template is a program of a stranger. Jinja's sandbox keeps it from files and from what Python objects have inside; but
a loop in it may never end, and a text may fill the memory. So a process renders that has little memory, and whoever
asked ends it when it takes too long.
"""

import json
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


def render_all(compiled: Callable[[str], jinja2.Template], request: dict) -> dict:
    """The text of each rendering, or the error and the number of the one that raised it."""
    number = None
    try:
        template = compiled(request["template"])
        texts = []
        for number, (messages, add_generation_prompt) in enumerate(request["renderings"]):
            values = request["variables"] | {"messages": messages, "add_generation_prompt": add_generation_prompt}
            texts.append(template.render(values))
        return {"texts": texts}
    except MemoryError:
        return {"error": f"needs more than {MAX_BYTES:,} bytes of memory", "number": number}
    except Exception as error:  # of a stranger's program: there is none that it may not raise
        return {"error": f"{type(error).__name__}: {error}", "number": number}


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


def main() -> None:
    limit_memory()
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    compiled = cache(environment.from_string)
    for line in sys.stdin:
        print(json.dumps(render_all(compiled, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
