"""Chat templates: the built-in llama-2, llama-3 and chatml, and the base's own chat_template.

All of them are Jinja templates, as in Hugging Face's tokenizers. The template itself may write special tokens. The
content of messages is encoded as plain text, even if it spells a special token.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import AlpacaTemplate, Example, Exchange, Template, Tokenizer, Turn
from formats.conversations import user_text
from formats.tensors import prefix_errors
from runtime.cli import warn
from runtime.files import first_line

TEMPLATES = {
    "llama-2": (
        "{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% for message in messages[1 if system else 0:] %}{% if message.role == 'user' %}"
        "{{ bos_token + '[INST] ' }}"
        "{{ '<<SYS>>\\n' + system | trim + '\\n<</SYS>>\\n\\n' if system and loop.first }}"
        "{{ message.content | trim + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"
    ),
    "chatml": (
        "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    ),
}
NEEDED = {  # special tokens that the tokenizer must have
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
NAMES = ("alpaca", *TEMPLATES, "auto")
# Internal markers, which are Unicode noncharacters. BEGIN and END enclose a response; OPEN and CLOSE enclose the index
# of an escaped string.
BEGIN, END = "\ufdd0", "\ufdd1"
OPEN, CLOSE = "\ufdd2", "\ufdd3"


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """Load the template `name`, one of NAMES; "auto" is the base's own chat_template.

    The name may also be "auto:" followed by a hash of the template, as an adapter file stores it. A warning is printed
    if the base's template has a different hash. Raises ValueError if the name is unknown, if the tokenizer has no
    chat_template or lacks a special token that the template needs, or if the template is invalid.
    """
    name, _, trained_with = name.partition(":")
    if name == "alpaca":
        return AlpacaTemplate(tokenizer)
    if name == "auto":
        if tokenizer.chat_template is None:
            if trained_with:
                raise ValueError("the adapter was trained with the chat_template of its base, but this base has none")
            places = "tokenizer_config.json, chat_template.jinja or a GGUF file"
            advice = "use --template llama-2, llama-3 or chatml"
            raise ValueError(f"the template auto needs a chat_template in {places}, but the base has none; {advice}")
        source, variables = tokenizer.chat_template, tokenizer.named_tokens
        name = f"auto:{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        if trained_with not in ("", name.removeprefix("auto:")):
            warn("the base's chat_template differs from the one that the adapter was trained with")
        with prefix_errors("the base's chat_template"):
            return ChatTemplate(name, source, tokenizer, variables)
    if name not in TEMPLATES:
        raise ValueError(f"unknown prompt template {name!r}; expected one of {', '.join(NAMES)}")
    missing = [token for token in NEEDED.get(name, ()) if token not in tokenizer.special_ids]
    if missing:
        found = f"its tokenizer has no special token {missing[0]!r}"
        raise ValueError(f"the template {name} does not fit this base: {found}; use --template alpaca or llama-2")
    spelling = {id: text for text, id in tokenizer.special_ids.items()}
    # The start tokens, not the token named "bos_token": some tokenizers name one, but do not begin text with it.
    start = "".join(spelling[id] for id in tokenizer.start_ids)
    return ChatTemplate(name, TEMPLATES[name], tokenizer, {"bos_token": start, "eos_token": spelling[tokenizer.eos_id]})


class Generation(Extension):
    """Jinja extension for {% generation %} ... {% endgeneration %}, which enclose the text that the loss covers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller) -> str:
        return BEGIN + caller() + END


def raise_exception(message: str) -> None:
    """Raise TemplateError. Templates call this function if they do not support a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options) -> str:
    """Implement the filter `tojson` as Hugging Face does, without HTML escapes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str) -> jinja2.Template:
    """Compile a template in Jinja's sandbox, as transformers does. Raises jinja2.TemplateError.

    The sandbox denies access to files and to unsafe attributes of objects, but does not limit time or memory.
    """
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


class RewrittenTurn(ValueError):
    """Error of a template that changes a turn when later turns follow, or begins one differently in generation."""


class ChatTemplate(Template):
    """A Jinja chat template with the base's tokenizer.

    The loss covers the text between {% generation %} and {% endgeneration %}. If the template does not have these tags,
    the loss covers the text that each assistant turn adds, up to and including its last special token, if it has one.
    Warns if a response does not end with a special token, or begins differently in generation than in training. Raises
    ValueError if the template is invalid, or fails to format a conversation of two turns.
    """

    has_turns = True
    MAX_CHARACTERS = 10_000_000  # maximum length of a rendered conversation

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, variables: dict[str, str]):
        self.name = name
        self.kind = name.partition(":")[0]
        self.tokenizer = tokenizer
        self.variables = {"tools": None, "documents": None} | variables  # as in transformers
        if "strftime_now" in source and "strftime_now is defined" not in source:
            # Fixed to the date in Llama 3.2's template: with today's date, prompts would differ from those in training.
            self.variables["strftime_now"] = date(2024, 7, 26).strftime
        self.marks_responses = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        longest_first = sorted(tokenizer.special_ids, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.to_escape = re.compile(f"{self.special.pattern}|[{BEGIN}{END}{OPEN}{CLOSE}]")
        example = Example(turns=(Turn("user", "Hi"), Turn("assistant", "Ho")), name="a test conversation")
        with self.errors(example.name):
            self.template = compile_template(source)
        try:
            ((prompt_ids, response_ids),) = next(self.encode_exchanges([example]))
        except RewrittenTurn:  # raised again in training; prompts can still be encoded
            self.end_ids = tokenizer.end_ids
            return
        ends = [id for id in response_ids[-1:] if id in tokenizer.special_ids.values()]
        if not ends:
            effect = "an adapter that is trained with it does not learn to stop"
            warn(f"the template {self.kind} does not end responses with a special token; {effect}")
        if prompt_ids != self.encode_prompt("Hi"):
            warn(f"the template {self.kind} begins a response differently in generation than in training")
        self.end_ids = list(dict.fromkeys([*ends, *tokenizer.end_ids]))

    def encode_prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        escaped: list[str] = []
        messages = self.messages([*history, Turn("user", user_text(instruction, input))], escaped)
        with self.errors("the prompt"):
            text = self.render(messages, begin_response=True)
            try:
                parts = self.parts(text, messages)
            except ValueError:  # the template rewrites earlier turns, which is a problem only in training
                parts = [text]
            return [id for ids in self.encode(parts, escaped) for id in ids]

    def encode_exchanges(self, examples: Sequence[Example]) -> Iterator[list[Exchange]]:
        for example in examples:
            escaped: list[str] = []
            turns = conversation(example)
            messages = self.messages(turns, escaped)
            with self.errors(example.name):
                parts = self.parts(self.render(messages, begin_response=False), messages)
                ids = self.encode(parts, escaped)
            pairs = list(zip(ids[::2], ids[1::2]))  # what follows the last response is omitted
            learned = [turns[index].learned for index in response_indices(messages)]
            if len(pairs) != len(learned) or not all(response_ids for _, response_ids in pairs):
                raise ValueError(f"{example.name}: the template {self.kind} omits a response")
            exchanges = []
            context: list[int] = []  # a response that the loss does not cover is a part of the next prompt
            for (prompt_ids, response_ids), is_learned in zip(pairs, learned):
                context += prompt_ids
                if is_learned:
                    exchanges.append(Exchange(context, response_ids))
                    context = []
                else:
                    context += response_ids
            yield exchanges

    @contextmanager
    def errors(self, name: str):
        """Convert any exception of a template to a ValueError whose message begins with `name`, such as "record 3".

        A RewrittenTurn stays a RewrittenTurn, with the same prefix.
        """
        try:
            yield
        except RewrittenTurn as error:
            raise RewrittenTurn(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except Exception as error:  # a template is a third-party program
            what = "it needs too much memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: the template {self.kind} failed: {first_line(ValueError(what))}") from None

    def messages(self, turns: Sequence[Turn], escaped: list[str]) -> list[dict[str, str]]:
        """Convert turns to the messages that templates expect.

        Each special token or internal marker that the content of a turn spells is appended to `escaped`. The message
        contains its index in `escaped` instead, between OPEN and CLOSE.
        """

        def escape(found: re.Match) -> str:
            escaped.append(found[0])
            return f"{OPEN}{len(escaped) - 1}{CLOSE}"

        return [{"role": turn.role, "content": self.to_escape.sub(escape, turn.content)} for turn in turns]

    def render(self, messages: list[dict[str, str]], begin_response: bool) -> str:
        """Render messages, followed by the beginning of a response if `begin_response`.

        Raises ValueError if the rendered text is too long, or any exception of the template.
        """
        pieces = []
        length = 0
        for piece in self.template.generate(self.variables, messages=messages, add_generation_prompt=begin_response):
            pieces.append(piece)
            length += len(piece)
            if length > self.MAX_CHARACTERS:
                raise ValueError(f"the template {self.kind} writes more than {self.MAX_CHARACTERS:,} characters")
        return "".join(pieces)

    def text(self, messages: list[dict[str, str]], begin_response: bool) -> str:
        """Render messages without the markers of responses. Raises ValueError if the template fails."""
        with self.errors("the conversation"):
            return re.sub(f"[{BEGIN}{END}]", "", self.render(messages, begin_response))

    def parts(self, text: str, messages: list[dict[str, str]]) -> list[str]:
        """Split a rendered conversation at the beginning and the end of each response.

        The parts at odd indices are the responses. Raises RewrittenTurn, or as `render` does.
        """
        if self.marks_responses:
            return re.split(f"[{BEGIN}{END}]", text)
        parts, position = [], 0
        for index in response_indices(messages):
            before = self.render(messages[:index], begin_response=True)
            after = self.render(messages[: index + 1], begin_response=False)
            if not (text.startswith(after) and after.startswith(before)) or len(before) < position:
                first, second = (text, after) if after.startswith(before) else (after, before)
                same = len(os.path.commonprefix([first, second]))
                how = f"the template {self.kind} writes a turn differently when later turns follow, or in generation"
                difference = f"{first[same : same + 30]!r} in place of {second[same : same + 30]!r}"
                raise RewrittenTurn(f"{how} ({difference}); use --template chatml, llama-2 or llama-3")
            response = after[len(before) :]
            ended = max((found.end() for found in self.special.finditer(response)), default=len(response))
            parts += [text[position : len(before)], response[:ended]]
            position = len(before) + ended
        return [*parts, text[position:]]

    def encode(self, parts: Sequence[str], escaped: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each part of a rendered conversation. They do not depend on later parts.

        `escaped` is the list that `messages` filled. Between two special tokens, a part is encoded together with the
        text before it. If this would change the ids of the earlier text, the part is encoded alone, and so are the
        following parts up to the next special token. Raises ValueError if the template itself writes OPEN and CLOSE,
        or a special token without an embedding.
        """

        def unescape(index: re.Match) -> str:
            if int(index[1]) >= len(escaped):
                raise ValueError(
                    f"the template {self.kind} writes the noncharacters U+FDD2 and U+FDD3, which are reserved"
                )
            return escaped[int(index[1])]

        found: list[list[int]] = []
        special, before, known = "", "", []  # the last special token, and the text and ids since then
        for part in parts:
            ids: list[int] = []
            for piece in filter(None, self.special.split(part)):
                if piece in self.tokenizer.special_ids:
                    id = self.tokenizer.special_ids[piece]
                    if id >= self.tokenizer.vocab_size:
                        raise ValueError(f"the template {self.kind} writes {piece}, but token {id} has no embedding")
                    ids.append(id)
                    special, before, known = piece, "", []
                    continue
                piece = re.sub(f"{OPEN}([0-9]{{1,9}}){CLOSE}", unescape, piece)
                together = self.tokenizer.encode(before + piece, preceding=special)
                is_prefix = together[: len(known)] == known
                new = together[len(known) :] if is_prefix else self.tokenizer.encode(piece)
                ids += new
                before, known = before + piece, known + new
            found.append(ids)
        return found


def conversation(example: Example) -> Sequence[Turn]:
    """Return the turns of an example. If it has none, return two: the instruction with the input, and the output."""
    prompt = Turn("user", user_text(example.instruction, example.input))
    return example.turns or (prompt, Turn("assistant", example.output))


def response_indices(messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]
