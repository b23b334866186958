"""Tasks: images of examples, training on ScienceQA, result files, and adding a task as docs/tasks.md describes."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, run, save_problem_images, save_problems

from adapter import Adapter
from data import Example, Request
from formats.bases import load_llama
from generate import Responder
from tasks import TASKS, load_task, scienceqa
from tasks.responses import Responses, choice_log_likelihoods, read_responses, write_scores
from tasks.images import attach_features, with_images


@pytest.fixture
def problems(tmp_path):
    save_problem_images(tmp_path)
    return scienceqa.read(save_problems(tmp_path), tmp_path, "test")


def test_missing_images_are_named_or_skipped(problems, tmp_path):
    assert with_images(problems, tmp_path, False, "problems.json") == problems
    (tmp_path / "31" / "image.png").unlink()
    with pytest.raises(FileNotFoundError, match="problems.json: problem 31: .*31/image.png: no such file"):
        with_images(problems, tmp_path, False, "problems.json")
    kept = with_images(problems, tmp_path, True, "problems.json")
    assert [problem.id for problem in kept] == ["12", "30"]
    with pytest.raises(ValueError, match="problems.json: none of the images of its 1 examples is in"):
        with_images(problems[2:], tmp_path, True, "problems.json")


class NameEncoder:
    """An encoder whose single feature is the number in the file name; it records its calls."""

    def __init__(self):
        self.calls = []

    def encode(self, paths, cache=None):
        self.calls.append((list(paths), cache))
        return [torch.tensor([float(path.stem)]) for path in paths]


def test_features_are_attached_to_their_examples():
    """Order and other fields of examples are kept. An image that several examples share is encoded once."""
    encoder = NameEncoder()
    examples = [Example(f"about {image}", image=image) for image in ("3.jpg", "", "1.jpg", "3.jpg", "2.jpg")]
    attached = attach_features(examples, "folder", encoder, cache=Path("kept"))
    assert [None if e.features is None else e.features.item() for e in attached] == [3, None, 1, 3, 2]
    assert [(e.instruction, e.image) for e in attached] == [(e.instruction, e.image) for e in examples]
    assert encoder.calls == [([Path("folder/3.jpg"), Path("folder/1.jpg"), Path("folder/2.jpg")], Path("kept"))]
    assert all(example.features is None for example in examples)


def test_features_are_attached_to_examples_of_a_task(problems, tmp_path):
    class Encoder:
        def encode(self, paths, cache=None):
            return [torch.tensor([float(path.parent.name)]) for path in paths]

    attached = attach_features(problems, tmp_path, Encoder())
    assert [None if problem.features is None else problem.features.item() for problem in attached] == [12, None, 31]
    assert [problem.choices for problem in attached] == [problem.choices for problem in problems]
    assert attach_features(problems[1:2], tmp_path, None) == problems[1:2]  # no image, no encoder


def test_training_on_scienceqa_increases_the_likelihood_of_the_answer(tiny_base, tmp_path):
    path = save_problems(tmp_path)
    args = [
        "--data", path, "--task", "scienceqa", "--base", tiny_base, "--out", tmp_path / "run",
        "--epochs", 30, "--warmup-epochs", 1, "--val-size", 0, "--lr", 0.1, "--layers", 3, "--device", "cpu",
    ]  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0 and "1 examples to train on" in result.stderr, result.output
    model, tokenizer = load_llama(tiny_base)
    (problem,) = scienceqa.read(path)
    adapters = {"a": Adapter.load(tmp_path / "run" / "adapter.safetensors")}
    responder = Responder(model, tokenizer, adapters, max_new_tokens=9)
    requests = [Request(problem.instruction, "", name) for name in ("base", "a")]
    before, after = choice_log_likelihoods(responder, requests, [problem.answers()] * 2)
    assert after[1] > before[1] + 1 and after[1] > after[0]


def test_scores_and_results_of_any_task_are_written(tmp_path, capsys):
    examples = [Example("a", name="record 0"), Example("b", name="record 1")]
    responses = Responses("quiz", None, examples, ["half \ud800", None], "generated", True, "base", 0)
    write_scores(responses, {"accuracy": 12.5, "of none": None}, tmp_path / "new")
    printed = capsys.readouterr().out
    assert "quiz, 2 examples" in printed and re.search(r"accuracy +12\.5000\nof none +-\n", printed)
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == {
        "accuracy": 12.5, "of none": None, "examples": 2,
    }  # fmt: skip
    results = tmp_path / "new" / "results.json"
    assert read_responses(results, examples) == ["half \ud800", None]
    with pytest.raises(ValueError, match="results.json: has no response to 1 of 3 examples, for example record 2"):
        read_responses(results, [*examples, Example("c", name="record 2")])
    for bad in ([], {"record 0": 1}):
        results.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="results.json: is not an object that maps the names"):
            read_responses(results, examples)


def test_task_is_added_by_one_file_and_one_line(tiny_base, tmp_path, monkeypatch):
    """train.py and evaluate.py accept the task of docs/tasks.md after its file and its line in TASKS are added."""
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    file, line = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "boolq.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "boolq", raising=False)
    for name, module in eval(f"{{{line}}}").items():
        monkeypatch.setitem(TASKS, name, module.removeprefix("tasks."))
    monkeypatch.delitem(sys.modules, "training.options")  # this module has read TASKS at import

    def program(*args):
        main = runpy.run_path(str(ROOT / args[0]), run_name="fresh")["main"]  # reads TASKS again
        return CliRunner().invoke(main, [str(arg) for arg in args[1:]])

    data, out = tmp_path / "train.jsonl", tmp_path / "out"
    records = [{"question": f"is {i} even", "passage": "Count.", "answer": i % 2 == 0} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, records)))
    training = [
        "--base",
        tiny_base,
        "--val-size",
        0,
        "--epochs",
        20,
        "--lr",
        0.3,
        "--warmup-epochs",
        1,
        "--batch-size",
        4,
    ]
    result = program("train.py", "--task", "boolq", "--data", data, "--out", out, *training, "--device", "cpu")
    assert result.exit_code == 0 and "4 examples to train on" in result.stderr, result.output

    evaluation = ["evaluate.py", "boolq", "--data", data, "--device", "cpu", "--out", tmp_path / "eval"]
    for how in ([], ["--choose"]):
        result = program(*evaluation, "--adapter", out / "adapter.safetensors", *how)
        assert result.exit_code == 0, result.output
        answers = json.loads((tmp_path / "eval" / "results.json").read_text())
        assert list(answers) == [f"record {i}" for i in range(4)]
        correct = [answers[f"record {i}"].strip().startswith("No" if i % 2 else "Yes") for i in range(4)]
        assert json.loads((tmp_path / "eval" / "scores.json").read_text()) == {
            "accuracy": 25 * sum(correct),
            "examples": 4,
        }
        again = program(*evaluation, "--results", tmp_path / "eval" / "results.json")
        assert again.exit_code == 0 and again.stdout.splitlines()[2:] == result.stdout.splitlines()[2:]
    assert set(answers.values()) <= {"Yes", "No"}  # with --choose
    assert "Accuracy on BoolQ" in program("evaluate.py", "boolq", "--help").stdout

    data.write_text('{"question": "is it", "passage": "It is.", "answer": "yes"}')
    for command in (["train.py", "--task", "boolq", "--data", data, "--base", tiny_base, "--out", out], evaluation):
        result = program(*command)
        assert result.exit_code == 2 and "train.jsonl: record 0: has no field 'answer'" in result.stderr


def test_only_instructions_have_no_score():
    assert [name for name in TASKS if load_task(name).score is None] == ["instructions"]
