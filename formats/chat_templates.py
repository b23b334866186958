"""How conversations are written for a model: llama-2's, llama-3's and chatml's way, or the base's own chat_template.

All are templates of Jinja, as Hugging Face's. What a template writes may spell special tokens; what people wrote into
the conversation is text, whatever it spells.
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
NEEDED = {  # tokens that the base must have
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
NAMES = ("alpaca", *TEMPLATES, "auto")
# Private markers, noncharacters of Unicode: around a response, and around the number of a hidden text.
BEGIN, END = "\ufdd0", "\ufdd1"
OPEN, CLOSE = "\ufdd2", "\ufdd3"


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """By one of NAMES. "auto" is the base's own, its hash behind it where an adapter's file says which that was.

    Raises ValueError where the base has not what it takes.
    """
    name, _, trained_with = name.partition(":")
    if name == "alpaca":
        return AlpacaTemplate(tokenizer)
    if name == "auto":
        if tokenizer.chat_template is None:
            where = "neither a chat_template in tokenizer_config.json nor a chat_template.jinja"
            raise ValueError(f"--template auto: the base has {where}; --template llama-2, llama-3 or chatml")
        source, variables = tokenizer.chat_template, tokenizer.named_tokens
        name = f"auto:{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        if trained_with not in ("", name.removeprefix("auto:")):
            warn("the base's chat_template is another than the one that the adapter was trained with")
        with prefix_errors("the base's chat_template"):
            return ChatTemplate(name, source, tokenizer, variables)
    if name not in TEMPLATES:
        raise ValueError(f"unknown prompt template {name!r}; there are {', '.join(NAMES)}")
    missing = [token for token in NEEDED.get(name, ()) if token not in tokenizer.special_ids]
    if missing:
        has = "its tokenizer has no special token"
        raise ValueError(f"--template {name} is not for this base: {has} {missing[0]!r}; alpaca and llama-2 need none")
    spelling = {id: text for text, id in tokenizer.special_ids.items()}
    start = "".join(spelling[id] for id in tokenizer.start_ids)  # some name a <bos> with which no text begins
    return ChatTemplate(name, TEMPLATES[name], tokenizer, {"bos_token": start, "eos_token": spelling[tokenizer.eos_id]})


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: the text between them is covered by the loss."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller) -> str:
        return BEGIN + caller() + END


def raise_exception(message: str) -> None:
    """Called by templates that do not take a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options) -> str:
    """The filter `tojson` of Hugging Face's templates, without HTML escapes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str) -> jinja2.Template:
    """Compile a template in Jinja's sandbox, as transformers does. Raises jinja2.TemplateError.

    The sandbox keeps a template from files and from the attributes of objects, but not from looping or allocating.
    """
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


class RewrittenTurn(ValueError):
    """A template writes a turn otherwise when others follow, or what precedes a response otherwise in generation."""


class ChatTemplate(Template):
    """A Jinja template over a tokenizer. Raises ValueError if it is invalid, or writes no conversation.

    The loss covers what is between {% generation %} and {% endgeneration %}. In a template without them, it covers what
    the assistant's turn adds, up to the special token that ends it.
    """

    has_turns = True
    MAX_CHARACTERS = 10_000_000  # of a rendered conversation

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, variables: dict[str, str]):
        self.name = name
        self.kind = name.partition(":")[0]
        self.tokenizer = tokenizer
        self.variables = {"tools": None, "documents": None} | variables  # as transformers has them
        if "strftime_now" in source and "strftime_now is defined" not in source:
            # Today's date would make prompts other ones than those of training. It is the date of Llama 3.2's template.
            self.variables["strftime_now"] = date(2024, 7, 26).strftime
        self.marks_responses = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        longest_first = sorted(tokenizer.special_ids, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.unseen = re.compile(f"{self.special.pattern}|[{BEGIN}{END}{OPEN}{CLOSE}]")
        example = Example(turns=(Turn("user", "Hi"), Turn("assistant", "Ho")), name="a prompt and its response")
        with self.errors(example.name):
            self.template = compile_template(source)
        try:
            ((prompt_ids, response_ids),) = next(self.encode_exchanges([example]))
        except RewrittenTurn:  # training will refuse it; prompts can be written all the same
            self.end_ids = tokenizer.end_ids
            return
        ends = [id for id in response_ids[-1:] if id in tokenizer.special_ids.values()]
        if not ends:
            warn(f"the template {self.kind} ends no response with a special token: the model will not learn to end")
        if prompt_ids != self.encode_prompt("Hi"):
            warn(f"the template {self.kind} begins a response in generation otherwise than in training")
        self.end_ids = list(dict.fromkeys([*ends, *tokenizer.end_ids]))

    def encode_prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        hidden: list[str] = []
        messages = self.messages([*history, Turn("user", user_text(instruction, input))], hidden)
        with self.errors("the prompt"):
            text = self.render(messages, begin_response=True)
            try:
                parts = self.parts(text, messages)
            except ValueError:  # earlier turns are written otherwise: prompt as the base expects it
                parts = [text]
            return [id for ids in self.encode(parts, hidden) for id in ids]

    def encode_exchanges(self, examples: Sequence[Example]) -> Iterator[list[Exchange]]:
        for example in examples:
            hidden: list[str] = []
            turns = conversation(example)
            messages = self.messages(turns, hidden)
            with self.errors(example.name):
                parts = self.parts(self.render(messages, begin_response=False), messages)
                ids = self.encode(parts, hidden)
            pairs = list(zip(ids[::2], ids[1::2]))  # what follows the last response is omitted
            learned = [turns[number].learned for number in responses(messages)]
            if len(pairs) != len(learned) or not all(response_ids for _, response_ids in pairs):
                raise ValueError(f"{example.name}: the template {self.kind} omits a response")
            exchanges = []
            context: list[int] = []  # responses that are not learned belong to the next prompt
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
        """Turn whatever a template raises into a ValueError that begins with the name of the example."""
        try:
            yield
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None
        except Exception as error:  # a template is a third-party program
            what = "needs too much memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{name}: the template {self.kind} does not take it: {first_line(ValueError(what))}"
            ) from None

    def messages(self, turns: Sequence[Turn], hidden: list[str]) -> list[dict[str, str]]:
        """Messages as templates take them. Text that spells a special token goes to `hidden`, its number is written."""

        def hide(found: re.Match) -> str:
            hidden.append(found[0])
            return f"{OPEN}{len(hidden) - 1}{CLOSE}"

        return [{"role": turn.role, "content": self.unseen.sub(hide, turn.content)} for turn in turns]

    def render(self, messages: list[dict[str, str]], begin_response: bool) -> str:
        """Render messages, with the beginning of a response if asked. Raises ValueError if that is too long."""
        pieces = []
        length = 0
        for piece in self.template.generate(self.variables, messages=messages, add_generation_prompt=begin_response):
            pieces.append(piece)
            length += len(piece)
            if length > self.MAX_CHARACTERS:
                raise ValueError(f"the template {self.kind} writes more than {self.MAX_CHARACTERS:,} characters")
        return "".join(pieces)

    def text(self, messages: list[dict[str, str]], begin_response: bool) -> str:
        """Render messages, special tokens spelled out. Raises ValueError."""
        with self.errors("the conversation"):
            return re.sub(f"[{BEGIN}{END}]", "", self.render(messages, begin_response))

    def parts(self, text: str, messages: list[dict[str, str]]) -> list[str]:
        """Split a rendered conversation into parts that the loss alternately omits and covers. Raises ValueError."""
        if self.marks_responses:
            return re.split(f"[{BEGIN}{END}]", text)
        parts, position = [], 0
        for number in responses(messages):
            before = self.render(messages[:number], begin_response=True)
            after = self.render(messages[: number + 1], begin_response=False)
            if not (text.startswith(after) and after.startswith(before)) or len(before) < position:
                first, second = (text, after) if after.startswith(before) else (after, before)
                same = len(os.path.commonprefix([first, second]))
                how = f"the template {self.kind} writes a turn otherwise when others follow, or in generation"
                texts = f"{first[same : same + 30]!r} in place of {second[same : same + 30]!r}"
                raise RewrittenTurn(f"{how} ({texts}); --template chatml, llama-2 or llama-3 does not")
            response = after[len(before) :]
            ended = max((found.end() for found in self.special.finditer(response)), default=len(response))
            parts += [text[position : len(before)], response[:ended]]
            position = len(before) + ended
        return [*parts, text[position:]]

    def encode(self, parts: Sequence[str], hidden: Sequence[str]) -> list[list[int]]:
        """Return the ids of the parts of a text. Those of earlier parts do not depend on what follows.

        Between special tokens a part is encoded with the text before it. If that changes the ids of earlier text, it is
        encoded alone, and so is what follows it up to the next special token. Raises ValueError if the template itself
        writes one of the private markers.
        """

        def reveal(number: re.Match) -> str:
            if int(number[1]) >= len(hidden):
                raise ValueError(f"the template {self.kind} writes the noncharacters U+FDD2 and U+FDD3")
            return hidden[int(number[1])]

        found: list[list[int]] = []
        special, before, known = "", "", []  # the newest special token, and text and ids since then
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
                piece = re.sub(f"{OPEN}([0-9]{{1,9}}){CLOSE}", reveal, piece)
                together = self.tokenizer.encode(before + piece, preceding=special)
                fits = together[: len(known)] == known
                new = together[len(known) :] if fits else self.tokenizer.encode(piece)
                ids += new
                before, known = before + piece, known + new
            found.append(ids)
        return found


def conversation(example: Example) -> Sequence[Turn]:
    """The example's turns; those of an instruction are two."""
    prompt = Turn("user", user_text(example.instruction, example.input))
    return example.turns or (prompt, Turn("assistant", example.output))


def responses(messages: Sequence[dict[str, str]]) -> list[int]:
    """Which of the messages are the assistant's."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]
