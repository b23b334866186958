"""Make instructions from children's stories, and check whether a response is a story that follows its instruction."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Example, Tokenizer
from runtime.files import read_text

END = re.compile(r'[.!?]"?(?=\s|$)')  # end of a sentence
# A text that begins like this is direct speech, or the continuation of a story.
CONTINUATION = re.compile(r'"|(?:He|She|They|His|Her|You|We|I|Yes|No|Then|But|And|So)\b|It (?!was)')
# The kind of the hero, such as "girl" in "there was a little girl named", the hero's name, and a noun after an article.
KIND = re.compile(
    r"\b(?:there was|there lived|lived|day,?) an? (?:[a-z]+,? ){0,3}?([a-z]{3,})(?= named| called| who|[.,])"
)
NAME = re.compile(r"\b(?:named|called) (?!Mrs|Mr)([A-Z][a-z]+)\b")
THING = re.compile(r"\b(?:an?|the) ([a-z]{3,})(?=[.,!?]| (?:and|was|in|on|to|with|that)\b)")


class StoryInstruction(NamedTuple):
    """An instruction to tell a story, and what the story must contain."""

    kind: str  # a key of KINDS
    required: tuple[str, ...]  # words that must occur, or the sentence with which the story must begin
    story: str = ""  # a story that follows the instruction; the response in training

    def example(self) -> Example:
        instruction, input = KINDS[self.kind]
        first, *others = self.required
        listed = f"{', '.join(others)} and {first}" if others else first
        name = f"the story of {' '.join(self.required)}"
        return Example(instruction.format(listed), input.format(listed), self.story, name=name)


# Instruction and input of each kind. `spread_over_kinds` chooses training stories for the kinds in this order.
KINDS = {
    "hero's kind": ("Write a story about a {}.", ""),
    "hero's name": ("Write a story about {}.", ""),
    "first sentence": ("Write a story that begins with this sentence.", "{}"),
    "a thing": ("Write a story with the word {}.", ""),
    "three things": ("Write a story with the words {}.", ""),
}

HEROES = {"hero's kind": KIND, "hero's name": NAME}
THINGS = {"a thing": 1, "three things": 3}  # number of words that must occur


class StorySets(NamedTuple):
    training: list[StoryInstruction]
    validation: list[StoryInstruction]  # used to choose learning rates
    testing: list[StoryInstruction]
    others: list[str]  # unused stories, without the names and words that held-out instructions require


def sentence_ends(text: str) -> list[int]:
    """Return the index at which each sentence of the text ends."""
    return [match.end() for match in END.finditer(text)]


def sentences(text: str) -> list[str]:
    """Split the text into sentences, including their final punctuation. An unfinished sentence is dropped."""
    ends = sentence_ends(text)
    return [text[start:end].strip() for start, end in zip([0, *ends], ends)]


def whole_sentences(text: str) -> str:
    """Return the text up to and including its last complete sentence."""
    return text[: max(sentence_ends(text), default=0)]


def truncate_at_sentence(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Truncate the text after the last sentence that ends within `max_tokens` tokens; return "" if there is none."""
    ends = reversed(sentence_ends(text))
    return next((text[:end] for end in ends if len(tokenizer.encode(text[:end])) <= max_tokens), "")


def read_stories(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Read stories, each truncated after a sentence to at most `max_tokens` tokens.

    Truncated texts for which `is_prose` is False are dropped. Raises OSError if the file cannot be read, or ValueError
    if fewer than 100 stories remain.
    """
    texts = [text.strip() for text in read_text(path).split("<|endoftext|>")][:-1]  # the last one may be incomplete
    stories = [story for text in texts if is_prose(story := truncate_at_sentence(text, tokenizer, max_tokens))]
    if len(stories) < 100:
        raise ValueError(
            f"{path}: {len(stories)} of {len(texts)} texts separated by <|endoftext|> are prose of 30 words or more "
            f"when truncated to {max_tokens} tokens; at least 100 are needed; give more text or a larger --max-tokens"
        )
    return stories


def is_story(text: str) -> bool:
    """Return True if the text is prose, and begins neither with direct speech nor with a word like "He" or "Then".

    Such a word continues an earlier text. Only five of 2,232 real stories begin in one of these ways.
    """
    return is_prose(text) and not CONTINUATION.match(text)


def is_prose(text: str) -> bool:
    """Return True if the text has at least 30 words, no unusual characters and no repeated long sentence.

    A sentence is long if it has four or more words. The text must contain at least three long sentences.
    """
    long_sentences = [sentence for sentence in sentences(text) if len(sentence.split()) > 3]
    prose = re.fullmatch(r"[\w\s.,;:!?'\"()-]*", text) is not None
    return prose and len(text.split()) >= 30 and len(long_sentences) == len(set(long_sentences)) >= 3


def follows(instruction: StoryInstruction, text: str) -> bool:
    """Return True if the text satisfies the instruction.

    It must begin with the required sentence, or contain the required words; a plural ending in s is accepted.
    """
    if instruction.kind == "first sentence":
        return text.startswith(instruction.required)
    return all(re.search(rf"\b{word}s?\b", text, re.IGNORECASE) for word in instruction.required)


def requirements_met(story: str) -> dict[str, tuple[str, ...]]:
    """Return the requirements that the story meets, by kind of instruction. Some kinds may be missing."""
    opening = story[:250]
    things = list(dict.fromkeys(THING.findall(story)))
    found = {"first sentence": (sentences(story)[0],)}
    found |= {kind: (match[1],) for kind, pattern in HEROES.items() if (match := pattern.search(opening))}
    found |= {kind: tuple(things[-number:]) for kind, number in THINGS.items() if len(things) >= number}
    return found


def make_instructions(stories: Sequence[str], per_kind: int, tested: int, seed: int = 0) -> StorySets:
    """Make `per_kind` training, `tested // 2` validation and `tested` test instructions of each kind.

    No training story contains a name or a word that a validation or test instruction requires. Raises ValueError if
    there are too few stories.
    """
    random = np.random.default_rng(seed)
    stories = [stories[i] for i in random.permutation(len(stories))]
    frequency = Counter(word for story in stories for word in {*re.findall(r"\w+", story)})
    openings, number = [story[:250] for story in stories], tested + tested // 2

    def rare(candidates: Iterable[str], at_most: int) -> list[str]:
        """Draw `number` words that occur in at most `at_most` stories, so that few training stories are lost."""
        found = sorted({word for word in candidates if frequency[word] <= at_most})
        if len(found) < number:
            raise ValueError(
                f"the stories have only {len(found)} rare names or words, but {number} are needed; give more text"
            )
        return [found[i] for i in random.permutation(len(found))[:number]]

    things = {word for story in stories for word in THING.findall(story)}
    kinds = rare({match[1] for opening in openings if (match := KIND.search(opening))} & things, 15)
    names = rare((match[1] for opening in openings if (match := NAME.search(opening))), 8)
    nouns = rare((word for word in things - {*kinds} if frequency[word] >= 3), 8)
    beginnings = Counter(sentences(story)[0] for story in stories)
    stories.sort(key=lambda story: beginnings[sentences(story)[0]] > 1)  # held-out first sentences must be unique
    unseen, held_out = {*kinds, *names, *nouns}, []
    for i in range(number):
        required = {"hero's kind": (kinds[i],), "hero's name": (names[i],)}
        required["first sentence"] = (sentences(stories[i])[0],)
        required |= {"a thing": (nouns[i],), "three things": tuple(nouns[(i + step) % number] for step in (0, 7, 19))}
        held_out.append([StoryInstruction(kind, required[kind]) for kind in KINDS])
    rest = [story for story in stories[number:] if not unseen & {*re.findall(r"\w+", story)}]
    training, others = spread_over_kinds(rest, per_kind)
    return StorySets(training, sum(held_out[tested:], []), sum(held_out[:tested], []), others)


def spread_over_kinds(stories: Sequence[str], per_kind: int) -> tuple[list[StoryInstruction], list[str]]:
    """Make `per_kind` training instructions of each kind. Return the instructions and the unused stories.

    Every instruction has a different story. Within a kind, requirements are repeated only if there are too few
    different ones. Raises ValueError if too few stories are left for a kind.
    """
    requirements = [requirements_met(story) for story in stories]
    training, used = [], set()
    for kind in KINDS:  # first the kinds for which the fewest stories are suitable
        times: Counter = Counter()
        order = []
        for i, found in enumerate(requirements):
            if kind in found and i not in used:
                times[found[kind]] += 1
                order.append((times[found[kind]], i))
        if len(order) < per_kind:
            raise ValueError(
                f"only {len(order)} stories are left for {kind!r}, but {per_kind} are needed; lower --per-kind, "
                f"or give more text"
            )
        chosen = [i for _, i in sorted(order)[:per_kind]]
        training += [StoryInstruction(kind, requirements[i][kind], stories[i]) for i in chosen]
        used |= {*chosen}
    return training, [story for i, story in enumerate(stories) if i not in used]
