"""ScienceQA: its files, prompts, the choice that a response names, and the nine columns of scores."""

import json

import pytest
from helpers import save_problems

from tasks.scienceqa import COLUMNS, PUBLISHED, read, read_responses, score


@pytest.fixture
def path(tmp_path):
    return save_problems(tmp_path)


def test_problems_of_a_split_are_read(path, tmp_path):
    first, second, third = read(path, tmp_path, "test")
    assert (first.id, first.image, first.grade, first.name) == ("12", "12/image.png", 7, "problem 12")
    assert first.instruction == "Which is north?\nLook at the map.\n(A) A (B) B (C) C"
    assert (first.input, first.output, first.features) == ("", "The answer is (C)", None)
    assert second.instruction == "Which is a verb?\n(A) run (B) red" and second.image == ""
    assert first.answers() == ["The answer is (A)", "The answer is (B)", "The answer is (C)"]
    (tmp_path / "test").mkdir()
    assert read(path, tmp_path, "test")[0].image == "test/12/image.png"
    assert [problem.id for problem in read(path)] == ["7"]  # the training split


def test_pid_splits_file_overrides_the_splits(path, tmp_path):
    (tmp_path / "pid_splits.json").write_text(json.dumps({"mini": ["30", "7"], "test": ["99"]}))
    assert [problem.id for problem in read(path, tmp_path, "mini")] == ["30", "7"]
    with pytest.raises(ValueError, match="pid_splits.json: has no list of ids for the split 'val'.*'mini', 'test'"):
        read(path, tmp_path, "val")
    with pytest.raises(ValueError, match="problems.json: has no problem 99"):
        read(path, tmp_path, "test")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": 3}, "problem 12: answer 3 is not the index of one of its 3 choices"),
        ({"answer": True}, "problem 12: answer True is not the index"),
        ({"answer": ...}, "problem 12: has no field 'answer'"),
        ({"choices": ["one"]}, "problem 12: has 1 choices, not 2 to 10"),
        ({"choices": "ab"}, "problem 12: field 'choices' is not a list of strings"),
        ({"hint": 0}, "problem 12: field 'hint' is 0"),
        ({"choices": ["a", "b", "\ud800"]}, "problem 12: field 'choices' has an unpaired surrogate"),
        ({"subject": "science"}, "problem 12: subject 'science' is not one of natural science, social"),
        ({"grade": "grade13"}, "problem 12: grade 'grade13' is not"),
        ({"grade": "first"}, "problem 12: grade 'first' is not"),
    ],
)
def test_invalid_problems_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(save_problems(tmp_path, **change), tmp_path, "test")


def test_files_without_problems_are_refused(tmp_path):
    path = tmp_path / "problems.json"
    for text, message in (("[1]", "is not an object"), ("{\n", "line 2, column 1: not JSON"), ("{}", "no problems in")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path, tmp_path, "test")


@pytest.mark.parametrize(
    "text, index",
    [
        ("The answer is (B)", 1),
        ("So the answer is C. Really.", 2),
        ("The answer is (D)", None),  # there are only three choices
        ("(B)", None),
        ("The answer is Berlin", None),
        ("", None),
        (None, None),  # the prompt did not fit into the context
    ],
)
def test_answers_are_parsed(path, text, index):
    assert read(path, split="test")[0].chosen(text) == index


def test_scores_have_nine_columns(path):
    problems = read(path, split="test")
    assert score(problems, ["The answer is (C)", None, "The answer is (A)"]) == {
        "NAT": 0, "SOC": 100, "LAN": 0, "TXT": 100, "IMG": 50, "NO": 0, "G1-6": 0, "G7-12": 50, "Avg": 100 / 3,
    }  # fmt: skip
    assert score(problems[:1], ["The answer is (C)"])["NAT"] is None


def test_published_scores_are_whole_numbers_of_correct_answers(data):
    """COLUMNS must be the official subsets of the problems: with other subsets, the numbers would not be whole."""
    problems = read(data / "scienceqa" / "problems.json", split="test")
    sizes = [sum(map(counts, problems)) for counts in COLUMNS.values()]
    assert sizes == [2252, 889, 1100, 2046, 2017, 1435, 2724, 1517, 4241]
    for name, (_, row) in PUBLISHED.items():
        if name in ("random choice", "human"):  # these rows are not counts of correct answers
            continue
        correct = [round(value * size / 100) for value, size in zip(row, sizes)]
        fits = [abs(100 * count / size - value) < 0.0051 for count, size, value in zip(correct, sizes, row)]
        if name in ("ChatGPT (CoT)", "GPT-4 (CoT)"):  # the published numbers of G1-6 do not fit
            assert [column for column, fit in zip(COLUMNS, fits) if not fit] == ["G1-6"]
            continue
        assert all(fits), name
        assert correct[0] + correct[1] + correct[2] == correct[6] + correct[7] == correct[8], name


def test_official_results_are_read(path, tmp_path):
    problems = read(path, split="test")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"acc": 1, "results": {"12": 2, "30": -1, "31": 5, "7": 0}, "outputs": {}}))
    texts = read_responses(results, problems)
    assert [problem.chosen(text) for problem, text in zip(problems, texts)] == [2, None, None]
    assert None not in texts  # None would mean a prompt that was too long
    for values, message in (
        ({"results": {"12": 2}}, "has no response to 2 of 3 problems, for example 30"),
        ({"results": {"12": "B", "30": 0, "31": 0}}, "problem 12: 'B' is not the index"),
        ({"12": 2}, "has no object 'results'"),
    ):
        results.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            read_responses(results, problems)
