"""How conversations are written for a model: llama-2's, llama-3's and chatml's way, or the base's own chat_template.

All are templates of Jinja, as Hugging Face's. What a template writes may spell special tokens; what people wrote into
the conversation is text, whatever it spells.
"""

import hashlib
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

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
        has = "its tokenizer has no token"
        raise ValueError(f"--template {name} is not for this base: {has} {missing[0]!r}; alpaca and llama-2 need none")
    spelling = {id: text for text, id in tokenizer.special_ids.items()}
    start = "".join(spelling[id] for id in tokenizer.start_ids)  # some name a <bos> with which no text begins
    return ChatTemplate(name, TEMPLATES[name], tokenizer, {"bos_token": start, "eos_token": spelling[tokenizer.eos_id]})


class ChatTemplate(Template):
    """A template of Jinja, over a tokenizer. Raises ValueError where it is none, or writes no conversation.

    What is learnt of an answer stands between {% generation %} and {% endgeneration %}, or, in a template without them,
    is what it adds for the assistant's turn, up to the special token that ends it.
    """

    has_turns = True

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, variables: dict[str, str]):
        self.name, self.tokenizer = name, tokenizer
        self.renderer = Renderer(source, variables)
        self.marks_answers = re.search(r"\{%-?\s*generation\b", source) is not None
        longest_first = sorted(tokenizer.special_ids, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.unseen = re.compile(f"{self.special.pattern}|[{BEGIN}{END}{OPEN}{CLOSE}]")
        (rounds,) = self.rounds([Example(turns=(Turn("user", "Hi"), Turn("assistant", "Ho")), name="a conversation")])
        ends = [id for id in rounds[0].answer[-1:] if id in tokenizer.special_ids.values()]
        if not ends:
            warn(f"the template {name.partition(':')[0]} ends no answer with a special token: it is not learnt to end")
        self.end_ids = list(dict.fromkeys([*ends, *tokenizer.end_ids]))

    def prompt(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> list[int]:
        asked, hidden = Turn("user", question(instruction, input)), []
        (texts,) = self.render([self.messages([*history, asked], hidden)], ["the prompt"], to_answer=True)
        try:
            parts = self.parts(texts, "the prompt")
        except ValueError:  # earlier turns are written otherwise: as the base is asked, whatever it was tuned on
            parts = texts[:1]
        return [id for ids in self.encode(parts, hidden) for id in ids]

    def rounds(self, examples: Sequence[Example]) -> Iterator[list[Round]]:
        rest = iter(examples)
        while chunk := list(islice(rest, 64)):
            hidden: list[str] = []
            talks = [self.messages(conversation(example), hidden) for example in chunk]
            names = [example.name for example in chunk]
            for texts, name in zip(self.render(talks, names), names):
                ids = self.encode(self.parts(texts, name), hidden)
                rounds = [Round(*pair) for pair in zip(ids[::2], ids[1::2])]  # what follows the last answer is left off
                if not all(round.answer for round in rounds) or not rounds:
                    raise ValueError(f"{name}: the template {self.name.partition(':')[0]} leaves an answer out")
                yield rounds

    def messages(self, turns: Sequence[Turn], hidden: list[str]) -> list[dict[str, str]]:
        """As templates take them. What would spell a special token is put by in `hidden`, and its number written."""

        def hide(found: re.Match) -> str:
            hidden.append(found[0])
            return f"{OPEN}{len(hidden) - 1}{CLOSE}"

        return [{"role": turn.role, "content": self.unseen.sub(hide, turn.content)} for turn in turns]

    def render(self, talks: Sequence[list], names: Sequence[str], to_answer: bool = False) -> list[list[str]]:
        """The text of each, with the beginning of an answer if there is to be one; without markers, behind it those of
        what stands before and behind every answer. Raises ValueError, with the name."""
        cases = []
        for i, messages in enumerate(talks):
            cases.append((i, messages, to_answer))
            if not self.marks_answers:
                said = [j for j, message in enumerate(messages) if message["role"] == "assistant"]
                cases += [case for j in said for case in ((i, messages[:j], True), (i, messages[: j + 1], False))]
        try:
            texts = self.renderer([case[1:] for case in cases])
        except TemplateError as error:
            kind = self.name.partition(":")[0]
            raise ValueError(
                f"{names[cases[error.number][0]]}: the template {kind} does not take it: {error}"
            ) from None
        return [[text for text, case in zip(texts, cases) if case[0] == i] for i in range(len(talks))]

    def parts(self, texts: Sequence[str], name: str) -> list[str]:
        """Of such texts: what is not learnt and what is, in turns. Raises ValueError, with the name.

        Without markers an answer is what its turn adds to the conversation before it.
        """
        text, *ends = texts
        if self.marks_answers:
            return re.split(f"[{BEGIN}{END}]", text)
        parts, position = [], 0
        for before, after in zip(ends[::2], ends[1::2]):
            if not (text.startswith(after) and after.startswith(before) and len(before) >= position):
                how = "the base's chat_template writes a turn otherwise when others follow"
                raise ValueError(f"{name}: {how}; --template chatml, llama-2 or llama-3 does not")
            answer = after[len(before) :]
            ended = max((found.end() for found in self.special.finditer(answer)), default=len(answer))
            parts += [text[position : len(before)], answer[:ended]]
            position = len(before) + ended
        return [*parts, text[position:]]

    def encode(self, parts: Sequence[str], hidden: Sequence[str]) -> list[list[int]]:
        """Ids of the parts of a text. Those of the parts before do not depend on what follows.

        Between special tokens a part is encoded with what stands before it: where that makes other ids of what has been
        encoded already, alone.
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


class TemplateError(ValueError):
    """A rendering that failed, by its number."""

    def __init__(self, text: str, number: int | None):
        super().__init__(text)
        self.number = number or 0


class Renderer:
    """A process that renders one template: formats/render_templates.py."""

    SECONDS, SECONDS_EACH = 10, 0.05  # how long it may take, and more for each rendering

    def __init__(self, source: str, variables: dict[str, str]):
        self.source, self.variables = source, variables
        command = [sys.executable, "-I", str(Path(__file__).with_name("render_templates.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True
        )
        weakref.finalize(self, end_process, self.process)

    def __call__(self, renderings: list) -> list[str]:
        """The text of each (messages, add_generation_prompt). Raises TemplateError."""
        request = {"template": self.source, "variables": self.variables, "renderings": renderings}
        seconds = self.SECONDS + self.SECONDS_EACH * len(renderings)
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            raise TemplateError(f"took longer than {seconds:.0f} s, or did not run at all", None)
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(first_line(ValueError(answer["error"])), answer["number"])
        return answer["texts"]


def end_process(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
