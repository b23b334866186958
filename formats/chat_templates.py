"""How conversations are written for a model: llama-2's, llama-3's and chatml's way, or the base's own chat_template.

All are templates of Jinja, as Hugging Face's. What a template writes may spell special tokens; what people wrote into
the conversation is text, whatever it spells.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data import AlpacaTemplate, Example, Round, Template, Tokenizer, Turn
from formats.render_templates import BEGIN, END
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
OPEN, CLOSE = "\ufdd2", "\ufdd3"  # around the number of a text that the template must not see as it is


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """By one of NAMES. "auto" is the base's own, its hash behind it where an adapter's file says which that was.

    Raises ValueError where the base has not what it takes.
    """
    name, _, tuned_with = name.partition(":")
    if name == "alpaca":
        return AlpacaTemplate(tokenizer)
    if name == "auto":
        if tokenizer.chat_template is None:
            where = "neither a chat_template in tokenizer_config.json nor a chat_template.jinja"
            raise ValueError(f"--template auto: the base has {where}; --template llama-2, llama-3 or chatml")
        source, variables = tokenizer.chat_template, tokenizer.named_tokens
        name = f"auto:{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        if tuned_with not in ("", name.removeprefix("auto:")):
            warn("the base's chat_template is another than the one that the adapter was tuned with")
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


class Rendered(NamedTuple):
    """A conversation as its template writes it."""

    text: str
    spans: list  # without markers: of each answer where it begins and ends, or None where others write it otherwise


class ChatTemplate(Template):
    """A template of Jinja, over a tokenizer. Raises ValueError where it is none, or writes no conversation.

    What is learnt of an answer stands between {% generation %} and {% endgeneration %}, or, in a template without them,
    is what it adds for the assistant's turn, up to the special token that ends it.
    """

    has_turns = True
    CHARACTERS = 200_000  # so many of conversations, or more of one, are rendered at once

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, variables: dict[str, str]):
        self.name, self.kind, self.tokenizer = name, name.partition(":")[0], tokenizer
        self.renderer = Renderer(source, variables)
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        longest_first = sorted(tokenizer.special_ids, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.unseen = re.compile(f"{self.special.pattern}|[{BEGIN}{END}{OPEN}{CLOSE}]")
        example = Example(turns=(Turn("user", "Hi"), Turn("assistant", "Ho")), name="a question and its answer")
        ((prompt, answer),) = next(self.rounds([example]))
        ends = [id for id in answer[-1:] if id in tokenizer.special_ids.values()]
        if not ends:
            warn(f"the template {self.kind} ends no answer with a special token: it is not learnt to end")
        if prompt != self.prompt("Hi"):
            warn(f"the template {self.kind} begins an answer that is asked for otherwise than one that is learnt")
        self.end_ids = list(dict.fromkeys([*ends, *tokenizer.end_ids]))

    def prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        hidden: list[str] = []
        messages = self.messages([*history, Turn("user", question(instruction, input))], hidden)
        (rendered,) = self.render([messages], ["the prompt"], begin_answer=True)
        try:
            parts = self.parts(rendered, "the prompt")
        except ValueError:  # earlier turns are written otherwise: as the base is asked, whatever it was tuned on
            parts = [rendered.text]
        return [id for ids in self.encode(parts, hidden) for id in ids]

    def rounds(self, examples: Sequence[Example]) -> Iterator[list[Round]]:
        for chunk in self.chunks(examples):
            hidden: list[str] = []
            talks = [self.messages(conversation(example), hidden) for example in chunk]
            names = [example.name for example in chunk]
            for talk, rendered, name in zip(talks, self.render(talks, names), names):
                ids = self.encode(self.parts(rendered, name), hidden)
                rounds = [Round(*pair) for pair in zip(ids[::2], ids[1::2])]  # what follows the last answer is left off
                if len(rounds) != len(answers(talk)) or not all(round.answer for round in rounds):
                    raise ValueError(f"{name}: the template {self.kind} leaves an answer out")
                yield rounds

    def chunks(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        chunk, characters = [], 0
        for example in examples:
            chunk.append(example)
            characters += sum(len(turn.content) for turn in conversation(example))
            if characters > self.CHARACTERS or len(chunk) == 64:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def messages(self, turns: Sequence[Turn], hidden: list[str]) -> list[dict[str, str]]:
        """As templates take them. What would spell a special token is put by in `hidden`, and its number written."""

        def hide(found: re.Match) -> str:
            hidden.append(found[0])
            return f"{OPEN}{len(hidden) - 1}{CLOSE}"

        return [{"role": turn.role, "content": self.unseen.sub(hide, turn.content)} for turn in turns]

    def render(self, talks: Sequence[list], names: Sequence[str], begin_answer: bool = False) -> list[Rendered]:
        """Conversations, given as messages, with the beginning of an answer if there is to be one.

        Raises ValueError, with the name.
        """
        ends = [[] if self.marks_answers else answers(talk) for talk in talks]
        requests = [
            {"messages": talk, "begin_answer": begin_answer, "answers": numbers} for talk, numbers in zip(talks, ends)
        ]
        try:
            return [Rendered(**rendered) for rendered in self.renderer(requests)]
        except TemplateError as error:
            one = names[error.number or 0]
            name = f"{one} to {names[-1]}" if error.number is None and len(names) > 1 else one
            raise ValueError(f"{name}: the template {self.kind} does not take it: {error}") from None

    def text(self, messages: list[dict[str, str]], begin_answer: bool) -> str:
        """As it is written, special tokens spelled out. Raises ValueError."""
        (rendered,) = self.render([messages], ["the conversation"], begin_answer)
        return re.sub(f"[{BEGIN}{END}]", "", rendered.text)

    def parts(self, rendered: Rendered, name: str) -> list[str]:
        """What is not learnt and what is, in turns. Raises ValueError, with the name."""
        text, parts, position = rendered.text, [], 0
        if self.marks_answers:
            return re.split(f"[{BEGIN}{END}]", text)
        for span in rendered.spans:
            if span is None or span[0] < position:
                how = f"the template {self.kind} writes a turn otherwise when others follow"
                raise ValueError(f"{name}: {how}; --template chatml, llama-2 or llama-3 does not")
            answer = text[slice(*span)]
            ended = max((found.end() for found in self.special.finditer(answer)), default=len(answer))
            parts += [text[position : span[0]], answer[:ended]]
            position = span[0] + ended
        return [*parts, text[position:]]

    def encode(self, parts: Sequence[str], hidden: Sequence[str]) -> list[list[int]]:
        """Ids of the parts of a text. Those of the parts before do not depend on what follows.

        Between special tokens a part is encoded with what stands before it. Where that makes other ids of what has been
        encoded already, it is encoded alone, and so is what follows it up to the next special token.
        """
        found: list[list[int]] = []
        special, before, known = "", "", []  # the newest special token, and text and ids since
        for part in parts:
            ids: list[int] = []
            for piece in filter(None, self.special.split(part)):
                if piece in self.tokenizer.special_ids:
                    ids.append(self.tokenizer.special_ids[piece])
                    special, before, known = piece, "", []
                    continue
                piece = re.sub(f"{OPEN}(\\d+){CLOSE}", lambda number: hidden[int(number[1])], piece)
                together = self.tokenizer.encode(before + piece, after=special)
                fits = together[: len(known)] == known
                new = together[len(known) :] if fits else self.tokenizer.encode(piece)
                ids += new
                before, known = before + piece, known + new
            found.append(ids)
        return found


def question(instruction: str, input: str) -> str:
    """Alpaca's two fields as one turn."""
    return f"{instruction}\n\n{input}" if input else instruction


def conversation(example: Example) -> Sequence[Turn]:
    """The example's turns; those of an instruction are two."""
    asked = Turn("user", question(example.instruction, example.input))
    return example.turns or (asked, Turn("assistant", example.output))


def answers(messages: Sequence[dict[str, str]]) -> list[int]:
    """Which of the messages are the assistant's."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


class TemplateError(ValueError):
    """A conversation that could not be rendered, by its number; None where that is not known."""

    def __init__(self, text: str, number: int | None):
        super().__init__(text)
        self.number = number


class Renderer:
    """A process that renders one template, formats/render_templates.py; started when it is needed."""

    SECONDS = 20  # that a request may take

    def __init__(self, source: str, variables: dict[str, str]):
        self.source, self.variables = source, variables
        self.process: subprocess.Popen | None = None

    def __call__(self, talks: list[dict]) -> list[dict]:
        """What render_templates.render_talk makes of each. Raises TemplateError."""
        request = {"template": self.source, "variables": self.variables, "talks": talks}
        line = json.dumps(request, ensure_ascii=False)
        process = self.started()
        timer = threading.Timer(self.SECONDS + 1, process.kill)  # its own is not on every system
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            raise TemplateError(self.why_ended(), None)
        reply = json.loads(answer)
        if "error" in reply:
            raise TemplateError(first_line(ValueError(reply["error"])), reply["number"])
        return reply["rendered"]

    def started(self) -> subprocess.Popen:
        """-P: Python looks for packages where it does for this program, but not beside the file."""
        if self.process is None:
            command = [sys.executable, "-P", str(Path(__file__).with_name("render_templates.py")), str(self.SECONDS)]
            self.errors, pipe = tempfile.TemporaryFile(), subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self.errors, encoding="utf-8", start_new_session=True
            )
            weakref.finalize(self, end_process, self.process)
        return self.process

    def why_ended(self) -> str:
        """Of a process that did not answer; the next request starts another."""
        code, self.process = self.process.wait(), None
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"took longer than {self.SECONDS} s" if code < 0 or not said else f"cannot be rendered: {said[-1]}"


def end_process(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()
