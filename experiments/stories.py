"""Instructions made of real stories for children, and whether an answer is a story that does as told."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Example, Tokenizer
from runtime.files import read_text

END = re.compile(r'[.!?]"?(?=\s|$)')  # of a sentence
GOES_ON = re.compile(r'"|(?:He|She|They|His|Her|You|We|I|Yes|No|Then|But|And|So)\b|It (?!was)')
KIND = re.compile(
    r"\b(?:there was|there lived|lived|day,?) an? (?:[a-z]+,? ){0,3}?([a-z]{3,})(?= named| called| who|[.,])"
)
NAME = re.compile(r"\b(?:named|called) (?!Mrs|Mr)([A-Z][a-z]+)\b")
THING = re.compile(r"\b(?:an?|the) ([a-z]{3,})(?=[.,!?]| (?:and|was|in|on|to|with|that)\b)")


class Told(NamedTuple):
    """An instruction, and what tells whether a story follows it."""

    kind: str  # a key of KINDS
    asked: tuple[str, ...]  # what must occur, or how it must begin
    story: str = ""  # that tells what is asked, to learn from

    def example(self) -> Example:
        instruction, input = KINDS[self.kind]
        first, *others = self.asked
        asked = f"{', '.join(others)} and {first}" if others else first
        name = f"the story of {' '.join(self.asked)}"
        return Example(instruction.format(asked), input.format(asked), self.story, name=name)


# Instruction and input of each, from easy to hard.
KINDS = {
    "hero's kind": ("Write a story about a {}.", ""),
    "hero's name": ("Write a story about {}.", ""),
    "first sentence": ("Write a story that begins with this sentence.", "{}"),
    "a thing": ("Write a story with the word {}.", ""),
    "three things": ("Write a story with the words {}.", ""),
}

HEROES = {"hero's kind": KIND, "hero's name": NAME}
THINGS = {"a thing": 1, "three things": 3}  # as many of them must occur


class StorySets(NamedTuple):
    training: list[Told]
    validation: list[Told]  # to choose learning rates by
    testing: list[Told]
    others: list[str]  # whole stories that nothing was made of


def sentence_ends(text: str) -> list[int]:
    """Where each sentence of a text ends."""
    return [match.end() for match in END.finditer(text)]


def sentences(text: str) -> list[str]:
    """Of a text, each with its end; what has no end is left out."""
    ends = sentence_ends(text)
    return [text[start:end].strip() for start, end in zip([0, *ends], ends)]


def whole_sentences(text: str) -> str:
    """A text without what follows its last sentence."""
    return text[: max(sentence_ends(text), default=0)]


def cut_at_sentence(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """As many whole sentences as fit into so many tokens."""
    ends = reversed(sentence_ends(text))
    return next((text[:end] for end in ends if len(tokenizer.encode(text[:end])) <= max_tokens), "")


def read_stories(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Every story, cut. Raises OSError, or ValueError where there are too few."""
    texts = [text.strip() for text in read_text(path).split("<|endoftext|>")][:-1]  # the last may be a part
    stories = [story for text in texts if is_prose(story := cut_at_sentence(text, tokenizer, max_tokens))]
    if len(stories) < 100:
        raise ValueError(f"{path}: has {len(stories)} stories, divided by <|endoftext|>; this needs hundreds")
    return stories


def is_story(text: str) -> bool:
    """Whether it is prose, and begins as a story does, with somebody or some time: not with speech, not with "He".

    Of 2,232 real ones five begin so.
    """
    return is_prose(text) and not GOES_ON.match(text)


def is_prose(text: str) -> bool:
    """Whether it is of some length, and of whole sentences, of which none of some length is said twice."""
    said = [sentence for sentence in sentences(text) if len(sentence.split()) > 3]
    prose = re.fullmatch(r"[\w\s.,;:!?'\"()-]*", text) is not None
    return prose and len(text.split()) >= 30 and len(said) == len(set(said)) and len(said) >= 3


def follows(told: Told, text: str) -> bool:
    """Word for word; a thing may be many things."""
    if told.kind == "first sentence":
        return text.startswith(told.asked)
    return all(re.search(rf"\b{word}s?\b", text, re.IGNORECASE) for word in told.asked)


def asked_of(story: str) -> dict[str, tuple[str, ...]]:
    """What an instruction may ask that this story fulfils, by kind: those it has."""
    begin = story[:250]
    things = list(dict.fromkeys(THING.findall(story)))
    found = {"first sentence": (sentences(story)[0],)}
    found |= {kind: (match[1],) for kind, pattern in HEROES.items() if (match := pattern.search(begin))}
    found |= {kind: tuple(things[-number:]) for kind, number in THINGS.items() if len(things) >= number}
    return found


def make_instructions(stories: Sequence[str], per_kind: int, tested: int, seed: int = 0) -> StorySets:
    """So many of each kind to train on, and to be tested; half as many to choose learning rates by.

    No name and no word of a held-out instruction occurs in any story that is trained on. Raises ValueError where the
    stories do not suffice.
    """
    random = np.random.default_rng(seed)
    stories = [stories[i] for i in random.permutation(len(stories))]
    frequency = Counter(word for story in stories for word in {*re.findall(r"\w+", story)})
    begins, number = [story[:250] for story in stories], tested + tested // 2

    def rare(candidates: Iterable[str], at_most: int) -> list[str]:
        """So that few stories have them, which are then left out of training."""
        found = sorted({word for word in candidates if frequency[word] <= at_most})
        if len(found) < number:
            raise ValueError(f"the stories have {len(found)} rare names or words, {number} are needed")
        return [found[i] for i in random.permutation(len(found))[:number]]

    things = {word for story in stories for word in THING.findall(story)}
    kinds = rare({match[1] for begin in begins if (match := KIND.search(begin))} & things, 15)
    names = rare((match[1] for begin in begins if (match := NAME.search(begin))), 8)
    nouns = rare((word for word in things - {*kinds} if frequency[word] >= 3), 8)
    begun = Counter(sentences(story)[0] for story in stories)
    stories.sort(key=lambda story: begun[sentences(story)[0]] > 1)  # none to be asked that begins as another does
    unseen, held_out = {*kinds, *names, *nouns}, []
    for i in range(number):
        asked = {"hero's kind": (kinds[i],), "hero's name": (names[i],), "first sentence": (sentences(stories[i])[0],)}
        asked |= {"a thing": (nouns[i],), "three things": tuple(nouns[(i + step) % number] for step in (0, 7, 19))}
        held_out.append([Told(kind, asked[kind]) for kind in KINDS])
    rest = [story for story in stories[number:] if not unseen & {*re.findall(r"\w+", story)}]
    training, others = spread_over_kinds(rest, per_kind)
    return StorySets(training, sum(held_out[tested:], []), sum(held_out[:tested], []), others)


def spread_over_kinds(stories: Sequence[str], per_kind: int) -> tuple[list[Told], list[str]]:
    """As many instructions of each kind, a story for each, and the stories left; of what is asked the rarest first."""
    asked = [asked_of(story) for story in stories]
    training, used = [], set()
    for kind in KINDS:  # that fewest stories can fulfil first
        times: Counter = Counter()
        order = []
        for i, found in enumerate(asked):
            if kind in found and i not in used:
                times[found[kind]] += 1
                order.append((times[found[kind]], i))
        if len(order) < per_kind:
            raise ValueError(f"{len(order)} stories are left for {kind!r}, {per_kind} are needed: fewer --per-kind")
        chosen = [i for _, i in sorted(order)[:per_kind]]
        training += [Told(kind, asked[i][kind], stories[i]) for i in chosen]
        used |= {*chosen}
    return training, [story for i, story in enumerate(stories) if i not in used]
