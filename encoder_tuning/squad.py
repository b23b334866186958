"""SQuAD's questions: the answer is a part of the context, or there is none (version 2.0).

A context that is too long is read in windows, each of which has the question before it. "No answer" is the span from
<s> to <s>, in a window that does not hold the answer as in one of an unanswerable question.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data import check_text
from encoder_tuning.labelled import Labelled, LabelledData
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import read_json


class SquadQuestion(NamedTuple):
    """What is asked about a paragraph, and what people answered."""

    id: str
    question: str
    context: str
    answers: list[str]  # none where the context does not have it
    starts: list[int]  # the character of the context at which each begins


def read_squad(path: Path) -> list[SquadQuestion]:
    """The questions of a file in SQuAD's format, version 1.1, where all have an answer, or 2.0, with `is_impossible`.

    Raises OSError, or ValueError that names the question.
    """
    values, questions = read_json(path), []
    try:
        for paragraph in [paragraph for article in values["data"] for paragraph in article["paragraphs"]]:
            for qa in paragraph["qas"]:
                asked = (qa["id"], qa["question"], paragraph["context"])
                texts = [answer["text"] for answer in qa["answers"]]
                starts = [answer["answer_start"] for answer in qa["answers"]]
                question = SquadQuestion(*asked, texts, starts)
                check_squad_question(question, qa.get("is_impossible", False), f"{path}: question {question.id}")
                questions.append(question)
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not in SQuAD's format: {type(error).__name__}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def check_squad_question(question: SquadQuestion, is_impossible: object, where: str) -> None:
    """Raise ValueError where a field is of another type, an answer does not stand where it should, or is none."""
    for field in ("id", "question", "context"):
        check_text(getattr(question, field), where, field)
    if not isinstance(is_impossible, bool):
        raise ValueError(f"{where}: field 'is_impossible' is a {type(is_impossible).__name__}, not true or false")
    if not question.answers and not is_impossible:
        raise ValueError(f"{where}: has no answers, and is not marked 'is_impossible'")
    if question.answers and is_impossible:
        raise ValueError(f"{where}: is marked 'is_impossible', and has the answer {question.answers[0]!r}")
    for answer, start in zip(question.answers, question.starts):
        check_text(answer, where, "answers")
        found = question.context[start : start + len(answer)] if type(start) is int and start >= 0 else None
        if found != answer or not answer:
            raise ValueError(f"{where}: the answer {answer!r} does not stand at character {start!r} of its context")


# ---------------------------------------------------------------------------------------------------
# Windows


class ContextWindow(NamedTuple):
    """A question as RoBERTa reads it, <s> question </s> </s> context </s>, with as much of the context as fits."""

    ids: list[int]
    first: int  # the position of its first token of the context
    offsets: list[tuple[int, int]]  # from which character of the context to which each of these tokens goes

    def positions(self, start: int, end: int) -> tuple[int, int] | None:
        """Of the first and the last token of those characters; None where the window does not hold them all."""
        inside = [i for i, (begin, stop) in enumerate(self.offsets) if begin < end and stop > start]
        if not inside or self.offsets[0][0] > start or self.offsets[-1][1] < end:
            return None
        return self.first + inside[0], self.first + inside[-1]

    def text(self, context: str, first: int, last: int) -> str:
        """What stands at the tokens from one position to another."""
        return context[self.offsets[first - self.first][0] : self.offsets[last - self.first][1]].strip()


def context_windows(
    question: SquadQuestion, tokenizer: RobertaTokenizer, max_length: int, stride: int
) -> list[ContextWindow]:
    """The question with each part of its context, all of at most `max_length` tokens; neighbours share `stride` tokens.

    Raises ValueError where the context does not fit in one, and such windows would not get on.
    """
    asked = [tokenizer.bos_id, *tokenizer.encode(question.question.strip()), tokenizer.eos_id, tokenizer.eos_id]
    ids, offsets = tokenizer.encode_with_offsets(question.context)
    room = max_length - len(asked) - 1
    if len(ids) > room and stride >= room:
        left = f"of {max_length} tokens its question leaves {max(0, room)} to the context"
        raise ValueError(f"question {question.id}: {left}, no more than --stride {stride}")
    windows = []
    for start in range(0, max(1, len(ids)), max(1, room - stride)):
        part = slice(start, start + room)
        windows.append(ContextWindow([*asked, *ids[part], tokenizer.eos_id], len(asked), offsets[part]))
        if start + room >= len(ids):
            break
    return windows


NO_ANSWER = (0, 0)  # the position of <s>


def labelled_questions(
    questions: Sequence[SquadQuestion], tokenizer: RobertaTokenizer, max_length: int, stride: int
) -> LabelledData:
    """An example for each window of a question, with the first answer where the window holds it, else NO_ANSWER.

    A question is dropped where no window holds the answer that it has. Raises as `context_windows`.
    """
    examples, windowed, dropped = [], 0, 0
    for question in questions:
        windows = context_windows(question, tokenizer, max_length, stride)
        found = [None] * len(windows)
        if question.answers:
            start, end = question.starts[0], question.starts[0] + len(question.answers[0])
            found = [window.positions(start, end) for window in windows]
            if not any(found):
                dropped += 1
                continue
        windowed += len(windows) > 1
        for window, positions in zip(windows, found):
            ids, name = torch.tensor(window.ids), f"question {question.id}"
            examples.append(Labelled(ids, positions or NO_ANSWER, name, len(ids)))
    counts = {"questions": len(questions), "windowed": windowed}
    counts["unanswerable"] = sum(not question.answers for question in questions)
    return LabelledData(examples, [], dropped=dropped, **counts)


# ---------------------------------------------------------------------------------------------------
# Scores, as the official script of version 2.0 has them


def answer_words(text: str) -> list[str]:
    """Of an answer; case, punctuation and articles are of no account."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(predicted: list[str], expected: list[str]) -> float:
    """Of the words that two answers share; where one has none, whether the other has none either."""
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def squad_scores(texts: Sequence[str], questions: Sequence[SquadQuestion]) -> dict[str, float]:
    """Of answers, `exact_match` and `f1` (Rajpurkar et al., 2016 and 2018), both in [0, 1].

    Each is held against the likest of those that people gave; that of an unanswerable question is right if it is empty.
    """
    exact_match = f1 = 0.0
    for text, question in zip(texts, questions, strict=True):
        predicted = answer_words(text)
        expected = [words for words in map(answer_words, question.answers) if words] or [[]]
        exact_match += predicted in expected
        f1 += max(word_f1(predicted, words) for words in expected)
    return {"exact_match": exact_match / len(texts), "f1": f1 / len(texts)}
