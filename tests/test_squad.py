"""SQuAD: its files, windows of long contexts, predicted answers, unanswerable questions, and scores."""

import json
import random

import pytest
import torch
from helpers import evaluate, train
from safetensors import safe_open

from encoder_tuning import objective
from encoder_tuning.__main__ import hold_out_by_name
from encoder_tuning.labeled import Labeled
from encoder_tuning.objective import answer_squad
from encoder_tuning.squad import (
    SquadQuestion,
    answer_words,
    context_windows,
    labeled_questions,
    read_squad,
    squad_scores,
)
from formats.roberta_tokenizer import RobertaTokenizer

CONTEXT = "The river Añil runs to the sea. It is 12 km long."
QUESTIONS = [
    {"id": "a", "question": "How long?", "answers": [{"text": "12 km", "answer_start": 38}]},
    {"id": "b", "question": "Where to?", "answers": [{"text": "the sea", "answer_start": 23}]},
]
IMPOSSIBLE = {"id": "c", "question": "How deep?", "answers": [], "is_impossible": True}


def save_squad(folder, questions=QUESTIONS, context=CONTEXT, **first):
    """Save a file of questions with changes to the first one, and return its path."""
    questions = [questions[0] | first, *questions[1:]]
    values = {"data": [{"paragraphs": [{"context": context, "qas": questions}]}]}
    (folder / "squad.json").write_text(json.dumps(values))
    return folder / "squad.json"


def test_squad_files_are_read_and_checked(tmp_path):
    first, second = read_squad(save_squad(tmp_path))
    assert (first.id, first.answers, first.starts) == ("a", ["12 km"], [38]) and second.question == "Where to?"
    first, second = read_squad(save_squad(tmp_path, [QUESTIONS[0] | {"is_impossible": False}, IMPOSSIBLE]))
    assert first.answers == ["12 km"] and (second.id, second.answers, second.starts) == ("c", [], [])
    for changes, message in (
        ({"answers": [{"text": "12 km", "answer_start": 37}]}, "the answer '12 km' is not at character 37"),
        ({"answers": [{"text": "12 km", "answer_start": -11}]}, "the answer '12 km' is not at character -11"),
        ({"answers": []}, "has no answers, but is not marked 'is_impossible'"),
        ({"is_impossible": True}, "is marked 'is_impossible', but has the answer '12 km'"),
        ({"is_impossible": "no"}, "field 'is_impossible' is \"no\", not true or false"),
    ):
        with pytest.raises(ValueError, match=f"squad.json: question a: {message}"):
            read_squad(save_squad(tmp_path, **changes))
    for text, message in (
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "an object has no field 'id'"),
        ('{"data": [{"paragraphs": [{"context": "", "qas": [3]}]}]}', "TypeError"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=f"x.json: is not in SQuAD's format: {message}"):
            read_squad(tmp_path / "x.json")


# ---------------------------------------------------------------------------------------------------
# Windows


def test_windows_locate_whole_answers(bpe, tmp_path):
    """The positions of an answer give its text. A window with only a part of the answer has no positions for it."""
    tokenizer = RobertaTokenizer(bpe)
    for question in read_squad(save_squad(tmp_path)):
        (window,) = context_windows(question, tokenizer, 200, 128)
        start, answer = question.starts[0], question.answers[0]
        first, last = window.positions(start, start + len(answer))
        assert window.text(question.context, first, last) == answer
        assert window.ids[0] == 0 and window.ids[-1] == 2 and window.ids[window.first - 2 : window.first] == [2, 2]
    long, _ = read_squad(save_squad(tmp_path))
    whole = len(context_windows(long, tokenizer, 200, 128)[0].ids)
    first, second = context_windows(long, tokenizer, whole - 12, 5)
    assert len(first.ids) == whole - 12
    assert first.positions(38, 43) is None and first.positions(4, 9) is not None
    assert second.positions(38, 43) is not None and second.positions(4, 9) is None


def transformers_labels(encoded, row, start, end):
    """Return the positions of the first and last token of an answer in a window, or (0, 0) if it is not whole there.

    The loop is that of transformers' question-answering example. One bug is fixed: if the answer begins at the last
    context token of the window, the example's loop runs into </s>.
    """
    offsets, sequences = encoded.offset_mapping[row], encoded.sequence_ids(row)
    first, last = sequences.index(1), len(sequences) - 1 - sequences[::-1].index(1)
    if not (offsets[first][0] <= start and offsets[last][1] >= end):
        return 0, 0
    end_of_context = last + 1
    while first < end_of_context and offsets[first][0] <= start:
        first += 1
    while offsets[last][1] >= end:
        last -= 1
    return first - 1, last + 1


@pytest.mark.parametrize("max_length, stride", [(24, 0), (24, 5), (30, 13), (24, 14), (400, 128)])
def test_windows_and_labels_equal_transformers(bpe, max_length, stride):
    """All spans of one to three words are tried as the answer, so that many of them cross the border of a window."""
    transformers = pytest.importorskip("transformers")
    tokenizer = RobertaTokenizer(bpe)
    theirs = transformers.RobertaTokenizer(*(str(bpe / name) for name in ("vocab.json", "merges.txt")))
    rng, words = random.Random(0), "the km river, of 12 sea (Anna) don't Añil".split()
    context = " ".join(rng.choices(words, k=40))
    encoded = theirs(
        "Where?", context, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    spans = []  # all spans of one to three words
    for i, character in enumerate(context):
        if character == " " or i == 0:
            ends = [j for j in range(i + 1, len(context) + 1) if j == len(context) or context[j] == " "]
            spans += [(i + bool(i), end) for end in ends[:3]]
    num_without, num_repeated = 0, 0
    for start, end in spans:
        question = SquadQuestion("a", "Where?", context, [context[start:end]], [start])
        expected = [transformers_labels(encoded, row, start, end) for row in range(len(encoded.input_ids))]
        windows = context_windows(question, tokenizer, max_length, stride)
        assert [window.ids for window in windows] == encoded.input_ids
        data = labeled_questions([question], tokenizer, max_length, stride)
        if set(expected) == {(0, 0)}:
            assert (data.examples, data.dropped) == ([], 1)
            continue
        assert [example.inputs.tolist() for example in data.examples] == encoded.input_ids
        assert [example.labels for example in data.examples] == expected
        assert (data.questions, data.windowed, data.dropped) == (1, int(len(expected) > 1), 0)
        num_without += (0, 0) in expected
        num_repeated += sum(labels != (0, 0) for labels in expected) > 1
    assert (num_without > 50) == (max_length < 400) and (num_repeated > 50) == (stride > 5 and max_length < 400)


def test_unanswerable_questions_are_labeled_at_the_start(bpe, tmp_path):
    """Every window of such a question has the label (0, 0). A stride that leaves no room for new tokens is an error."""
    tokenizer, questions = RobertaTokenizer(bpe), read_squad(save_squad(tmp_path, [*QUESTIONS, IMPOSSIBLE]))
    data = labeled_questions(questions, tokenizer, 200, 128)
    assert [example.labels == (0, 0) for example in data.examples] == [False, False, True]
    assert (data.questions, data.windowed, data.unanswerable, data.dropped) == (3, 0, 1, 0)
    data = labeled_questions(questions[2:], tokenizer, 30, 4)
    assert len(data.examples) > 2 and {example.labels for example in data.examples} == {(0, 0)}
    assert (data.questions, data.windowed, data.unanswerable, data.dropped) == (1, 1, 1, 0)
    question_length = len(tokenizer.encode("How deep?"))
    for max_length, room in ((30, 30 - question_length - 4), (10, 0)):
        message = f"question c: {room} of {max_length} tokens are left for the context"
        message += f", but --stride is {room}; decrease" if room else "; train with a larger --max-seq-len"
        with pytest.raises(ValueError, match=message):
            labeled_questions(questions[2:], tokenizer, max_length, room)
    labeled_questions(questions[2:], tokenizer, 30, 30 - question_length - 4 - 1)


def test_windows_of_a_question_are_held_out_together():
    examples = [Labeled(torch.zeros(3), (0, 0), f"question {i // 3}", i) for i in range(60)]
    training, validation = hold_out_by_name(examples, 0.25, seed=0)
    assert len(validation) == 15 and len(training) == 45
    assert not {example.name for example in training} & {example.name for example in validation}
    assert sorted(example.num_tokens for example in training + validation) == list(range(60))


# ---------------------------------------------------------------------------------------------------
# Answers and scores


def test_scores_follow_the_official_definition():
    """Case, articles and punctuation are ignored. F1 is over words; the best score over the expected answers counts."""
    for text, answers, exact, f1 in (
        ("The  Panthers!", ["panthers"], 1, 1),
        ("Panther", ["panthers"], 0, 0),
        ("a, b", ["x", "b"], 1, 1),
        ("", ["x"], 0, 0),
        ("the big red dog", ["red dog", "cat"], 0, 2 * 2 / (3 + 2)),
        ("dog dog", ["dog"], 0, 2 * 1 / (2 + 1)),
        ("red red dog", ["cat", "the red"], 0, 2 * 1 / (3 + 1)),
        ("in 1976, twice", ["twice in 1976"], 0, 1),
        ("", [], 1, 1),  # unanswerable: an empty prediction is correct
        ("The.", [], 1, 1),  # normalized to an empty prediction, as in the official script
        ("x", [], 0, 0),
    ):
        questions = [SquadQuestion("id", "?", "", answers, [0])]
        assert squad_scores([text], questions) == pytest.approx({"exact_match": exact, "f1": f1}), text
    three = [SquadQuestion("same id", "?", "", answers, [0]) for answers in (["yes"], ["no way"], [])]
    scores = squad_scores(["Yes.", "no", "no"], three)
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3})


def test_scores_equal_torchmetrics():
    text_metrics = pytest.importorskip("torchmetrics.functional.text")
    rng, words = random.Random(0), ["the", "The", "red", "Dog!", "a", "dog", "(12)", "km,", "don't", "An"]
    questions, texts = [], []
    for i in range(300):
        answers = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        answers = [answer for answer in answers if answer_words(answer)] or ["red"]
        questions.append(SquadQuestion(str(i), "?", "", answers, [0]))
        texts.append(" ".join(rng.choices(words, k=rng.randint(0, 4))))
    expected = text_metrics.squad(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(texts)],
        [{"id": question.id, "answers": {"text": question.answers}} for question in questions],
    )
    scores = squad_scores(texts, questions)
    assert 0.05 < scores["exact_match"] < scores["f1"] < 0.9
    assert scores == pytest.approx({name: value.item() / 100 for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("max_length, stride", [(200, 0), (30, 7)])
def test_best_span_equals_exhaustive_search(bpe, tmp_path, monkeypatch, max_length, stride):
    """Spans that are in the question, end before their start, or are too long are excluded.

    The answer is empty if the lowest score of <s> over all windows exceeds that of the span by more than the threshold.
    """
    generator, context = torch.Generator().manual_seed(0), CONTEXT
    first, _ = read_squad(save_squad(tmp_path))
    windows = context_windows(first, RobertaTokenizer(bpe), max_length, stride)
    assert len(windows) == (1 if max_length == 200 else 4)
    chosen_windows = set()
    for _ in range(20):
        found = {tuple(window.ids): torch.randn(len(window.ids), 2, generator=generator) for window in windows}
        for scores in found.values():
            scores[1] = 50  # a token of the question
        monkeypatch.setattr(objective, "span_scores", lambda model, adapter, ids: found[tuple(ids[0].tolist())][None])
        best = (-1e9, None)
        for number, window in enumerate(windows):
            scores = found[tuple(window.ids)]
            for a, (begin, _) in enumerate(window.offsets):
                for b in range(a, min(a + 6, len(window.offsets))):
                    score = (scores[window.first + a, 0] + scores[window.first + b, 1]).item()
                    best = max(best, (score, (number, context[begin : window.offsets[b][1]].strip())))
        score, (number, text) = best
        chosen_windows.add(number)
        assert answer_squad(None, None, windows, context, max_answer_length=6) == text != ""
        margin = min(scores[0].sum().item() for scores in found.values()) - score
        assert answer_squad(None, None, windows, context, margin + 1e-4, max_answer_length=6) == text
        assert answer_squad(None, None, windows, context, margin - 1e-4, max_answer_length=6) == ""
    assert chosen_windows == set(range(len(windows)))


# ---------------------------------------------------------------------------------------------------
# The commands

OPTIONS = ["--task", "question-answering", "--warmup-epochs", 1, "--val-size", 0, "--lr", 0.1, "--layers", 2]


def test_answers_to_questions_are_learned_and_scored(roberta, tmp_path):
    args = ["--data", save_squad(tmp_path), "--device", "cpu"]
    result = train(*OPTIONS, *args, "--base", roberta, "--out", tmp_path / "run", "--epochs", 60, "--max-seq-len", 100)
    assert result.exit_code == 0, result.output
    trained = ["--adapter", tmp_path / "run" / "adapter.safetensors"]
    scores = evaluate(*trained, *args)
    assert scores.exit_code == 0 and "2 questions: exact match 100.00%, F1 100.00%" in scores.stdout, scores.output
    assert "answerable" not in scores.stdout
    never = evaluate(*trained, *args, "--no-answer-threshold", -1e6)
    assert "2 questions: exact match 0.00%, F1 0.00%" in never.stdout, never.output
    more = ["--data", save_squad(tmp_path, [*QUESTIONS, IMPOSSIBLE]), "--device", "cpu"]
    scores = evaluate(*trained, *more)
    # An adapter that was trained only on answerable questions always answers.
    assert "1 unanswerable: exact match 0.00%" in scores.stdout


def test_windows_and_unanswerable_questions_are_learned_and_scored(roberta, tmp_path):
    """The adapter file contains the stride and the number of unanswerable questions."""
    args = ["--data", save_squad(tmp_path, [*QUESTIONS, IMPOSSIBLE]), "--device", "cpu"]
    options = [*OPTIONS, *args, "--base", roberta, "--epochs", 150, "--max-seq-len", 45, "--stride", 12]
    result = train(*options, "--out", tmp_path / "run")
    line = "3 questions, 1 of them unanswerable; the contexts of 3 are split into windows; each window is an example"
    assert result.exit_code == 0 and line in result.stderr and "6 examples to train on" in result.stderr, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [summary[name] for name in ("questions", "windowed", "unanswerable", "dropped")] == [3, 3, 1, 0]
    file = tmp_path / "run" / "adapter.safetensors"
    with safe_open(file, "pt") as tensors:
        assert (tensors.metadata()["stride"], tensors.metadata()["unanswerable"]) == ("12", "1")
    scores = evaluate("--adapter", file, *args, "--out", tmp_path / "answers.json")
    assert scores.exit_code == 0, scores.output
    assert json.loads((tmp_path / "answers.json").read_text()) == {"a": "12 km", "b": "the sea", "c": ""}
    for kind in ("3 questions", "2 answerable", "1 unanswerable"):
        assert f"{kind}: exact match 100.00%, F1 100.00%" in scores.stdout, scores.output
    always = evaluate("--adapter", file, *args, "--no-answer-threshold", 1e6)
    assert "1 unanswerable: exact match 0.00%" in always.stdout and "2 answerable: exact match 100.00%" in always.stdout
    wide = evaluate("--adapter", file, *args, "--stride", 40)
    assert wide.exit_code == 2 and "squad.json: question a: 32 of 45 tokens are left for the context" in wide.stderr
    assert (
        "context, but --stride is 40; decrease --stride" in wide.stderr and len(wide.stderr.strip().splitlines()) == 1
    )
    short = train(*options, "--out", tmp_path / "cut", "--max-seq-len", 17, "--stride", 0, "--epochs", 3)
    assert short.exit_code == 0, short.output
    assert "2 dropped (questions whose answer is in no window of 17 tokens)" in short.stderr, short.output
