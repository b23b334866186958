"""Question answering on SQuAD: the answer is a span of the context, or there is none (version 2.0).

A context that is too long is split into windows, each with the question before it. "No answer" is the span from <s> to
<s>. It is the label of windows that do not contain the answer, and of all windows of an unanswerable question.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data import check_text
from encoder_tuning.labeled import Labeled, LabeledData
from formats.roberta_tokenizer import RobertaTokenizer
from runtime.files import read_json
from runtime.schema import brief


class SquadQuestion(NamedTuple):
    """A question about a paragraph, and its reference answers."""

    id: str
    question: str
    context: str
    answers: list[str]  # empty if the question is unanswerable
    starts: list[int]  # index of the first character of each answer in the context


def read_squad(path: Path) -> list[SquadQuestion]:
    """Read the questions of a file in SQuAD's format, version 1.1 (every question has an answer) or 2.0.

    Raises OSError, or ValueError if the file or a question is invalid.
    """
    values, questions = read_json(path), []
    try:
        for paragraph in [paragraph for article in values["data"] for paragraph in article["paragraphs"]]:
            for qa in paragraph["qas"]:
                texts = (qa["id"], qa["question"], paragraph["context"])
                answers = [answer["text"] for answer in qa["answers"]]
                starts = [answer["answer_start"] for answer in qa["answers"]]
                question = SquadQuestion(*texts, answers, starts)
                check_squad_question(question, qa.get("is_impossible", False), f"{path}: question {question.id}")
                questions.append(question)
    except KeyError as error:
        raise ValueError(f"{path}: is not in SQuAD's format: an object has no field {error}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}: is not in SQuAD's format: {type(error).__name__}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: contains no questions")
    return questions


def check_squad_question(question: SquadQuestion, is_impossible: object, where: str) -> None:
    """Raise ValueError if a field has the wrong type, or if an answer contradicts `is_impossible` or its position."""
    for field in ("id", "question", "context"):
        check_text(getattr(question, field), where, field)
    if not isinstance(is_impossible, bool):
        raise ValueError(f"{where}: field 'is_impossible' is {brief(is_impossible)}, not true or false")
    if not question.answers and not is_impossible:
        raise ValueError(f"{where}: has no answers, but is not marked 'is_impossible'")
    if question.answers and is_impossible:
        raise ValueError(f"{where}: is marked 'is_impossible', but has the answer {question.answers[0]!r}")
    for answer, start in zip(question.answers, question.starts):
        check_text(answer, where, "answers")
        found = question.context[start : start + len(answer)] if type(start) is int and start >= 0 else None
        if found != answer or not answer:
            raise ValueError(f"{where}: the answer {answer!r} is not at character {start!r} of the context")


# ---------------------------------------------------------------------------------------------------
# Windows


class ContextWindow(NamedTuple):
    """Input of RoBERTa: <s> question </s> </s> context </s>, with the whole context or a part of it."""

    ids: list[int]
    first: int  # position of the first context token
    offsets: list[tuple[int, int]]  # per context token: index of its first character, and of its last character + 1

    def positions(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the positions of the first and last token of context[start:end]; None if part of it is missing."""
        inside = [i for i, (begin, stop) in enumerate(self.offsets) if begin < end and stop > start]
        if not inside or self.offsets[0][0] > start or self.offsets[-1][1] < end:
            return None
        return self.first + inside[0], self.first + inside[-1]

    def text(self, context: str, first: int, last: int) -> str:
        """Return the part of the context at the positions `first` to `last`, both included."""
        return context[self.offsets[first - self.first][0] : self.offsets[last - self.first][1]].strip()


def context_windows(
    question: SquadQuestion, tokenizer: RobertaTokenizer, max_length: int, stride: int
) -> list[ContextWindow]:
    """Return windows of at most `max_length` tokens that cover the context. Neighbors share `stride` context tokens.

    Raises ValueError if several windows are needed, but the question leaves room for at most `stride` context tokens.
    """
    prefix = [tokenizer.bos_id, *tokenizer.encode(question.question.strip()), tokenizer.eos_id, tokenizer.eos_id]
    ids, offsets = tokenizer.encode_with_offsets(question.context)
    room = max_length - len(prefix) - 1
    if len(ids) > room and stride >= room:
        left = f"{max(0, room)} of {max_length} tokens are left for the context"
        advice = "train with a larger --max-seq-len"
        if room > 0:
            left, advice = f"{left}, but --stride is {stride}", f"decrease --stride, or {advice}"
        raise ValueError(f"question {question.id}: {left}; {advice}")
    windows = []
    for start in range(0, max(1, len(ids)), max(1, room - stride)):
        part = slice(start, start + room)
        windows.append(ContextWindow([*prefix, *ids[part], tokenizer.eos_id], len(prefix), offsets[part]))
        if start + room >= len(ids):
            break
    return windows


NO_ANSWER = (0, 0)  # the span from <s> to <s>


def labeled_questions(
    questions: Sequence[SquadQuestion], tokenizer: RobertaTokenizer, max_length: int, stride: int
) -> LabeledData:
    """Make one example per window. Its label is the first answer, or NO_ANSWER if the window does not contain it.

    A question with an answer is dropped if no window contains the answer. Raises ValueError as `context_windows` does.
    """
    examples, windowed, dropped = [], 0, 0
    for question in questions:
        windows = context_windows(question, tokenizer, max_length, stride)
        spans = [None] * len(windows)
        if question.answers:
            start, end = question.starts[0], question.starts[0] + len(question.answers[0])
            spans = [window.positions(start, end) for window in windows]
            if not any(spans):
                dropped += 1
                continue
        windowed += len(windows) > 1
        for window, span in zip(windows, spans):
            ids, name = torch.tensor(window.ids), f"question {question.id}"
            examples.append(Labeled(ids, span or NO_ANSWER, name, len(ids)))
    counts = {"questions": len(questions), "windowed": windowed}
    counts["unanswerable"] = sum(not question.answers for question in questions)
    return LabeledData(examples, [], dropped=dropped, **counts)


# ---------------------------------------------------------------------------------------------------
# Scores, computed as by the official script of version 2.0


def answer_words(text: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation or articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(predicted: list[str], expected: list[str]) -> float:
    """Return the F1 score of the words that two answers share.

    If an answer has no words, the score is 1 if the other answer has none either, and 0 otherwise.
    """
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def squad_scores(texts: Sequence[str], questions: Sequence[SquadQuestion]) -> dict[str, float]:
    """Return `exact_match` and `f1` of the predicted answers (Rajpurkar et al., 2016 and 2018), both in [0, 1].

    Each predicted answer gets its best score over the reference answers. For an unanswerable question, only an empty
    answer is correct.
    """
    exact_match = f1 = 0.0
    for text, question in zip(texts, questions, strict=True):
        predicted = answer_words(text)
        expected = [words for words in map(answer_words, question.answers) if words] or [[]]
        exact_match += predicted in expected
        f1 += max(word_f1(predicted, words) for words in expected)
    return {"exact_match": exact_match / len(texts), "f1": f1 / len(texts)}
