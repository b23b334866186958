"""ScienceQA and COCO captions: their files, the text that is asked, and the marks."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers import SEEING, make_adapter, make_vit, openai_names, run
from PIL import Image

import evaluate
import tasks
from adapter import Adapter
from formats.bases import load_llama
from generate import Question, Responder
from multimodal import ImageAdapter
from tasks import (
    COLUMNS,
    PUBLISHED,
    accuracies,
    caption_marks,
    read_chosen,
    read_pictures,
    read_problems,
    read_task,
    read_written,
    with_images,
)

PROBLEMS = {
    "7": ("Which is a solid?", ["water", "a stone"], 1, "", None, "grade2", "natural science", "train"),
    "12": ("Which is north?", ["A", "B", "C"], 2, "Look at the map.", "image.png", "grade7", "social science", "test"),
    "30": ("Which is a verb?", ["run", "red"], 0, "", None, "grade6", "language science", "test"),
    "31": ("Which is hot?", ["ice", "fire"], 1, "", "image.png", "grade12", "natural science", "test"),
}
FIELDS = ("question", "choices", "answer", "hint", "image", "grade", "subject", "split")


def records(**changes):
    """problems.json's content, with fields of problem 12 changed; None takes the field away."""
    values = {id: dict(zip(FIELDS, row)) for id, row in PROBLEMS.items()}
    values["12"] |= changes
    values["12"] = {name: value for name, value in values["12"].items() if value is not ...}
    return values


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps(records()))
    for id in ("12", "31"):
        (tmp_path / id).mkdir()
        Image.new("RGB", (20, 20), (int(id) * 8, 0, 0)).save(tmp_path / id / "image.png")
    return tmp_path


def test_problems_of_a_split(folder):
    first, second, third = read_problems(folder / "problems.json", "test", folder)
    assert (first.id, first.image, first.grade, first.name) == ("12", "12/image.png", 7, "problem 12")
    assert first.text() == "Which is north?\nLook at the map.\n(A) A (B) B (C) C"
    assert second.text() == "Which is a verb?\n(A) run (B) red" and second.image == ""
    assert first.answers() == ["The answer is (A)", "The answer is (B)", "The answer is (C)"]
    (folder / "test").mkdir()
    assert read_problems(folder / "problems.json", "test", folder)[0].image == "test/12/image.png"


def test_pid_splits_decide_where_they_are(folder):
    (folder / "pid_splits.json").write_text(json.dumps({"mini": ["30", "7"], "test": ["99"]}))
    assert [p.id for p in read_problems(folder / "problems.json", "mini", folder)] == ["30", "7"]
    with pytest.raises(ValueError, match="pid_splits.json: has no list of ids for the split 'val'.*mini, test"):
        read_problems(folder / "problems.json", "val", folder)
    with pytest.raises(ValueError, match="problems.json: has no problem 99"):
        read_problems(folder / "problems.json", "test", folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": 3}, "problem 12: answer 3 is not the index of one of its 3 choices"),
        ({"answer": True}, "problem 12: answer True is not the index"),
        ({"answer": ...}, "problem 12: has no field 'answer'"),
        ({"choices": ["one"]}, "problem 12: has 1 choices, not 2 to 10"),
        ({"choices": "ab"}, "problem 12: field 'choices' is not a list of strings"),
        ({"hint": 0}, "problem 12: field 'hint' is a int"),
        ({"choices": ["a", "b", "\ud800"]}, "problem 12: field 'choices' has half a character"),
        ({"subject": "science"}, "problem 12: subject 'science' is none of natural science, social"),
        ({"grade": "grade13"}, "problem 12: grade 'grade13' is not"),
        ({"grade": "first"}, "problem 12: grade 'first' is not"),
    ],
)
def test_bad_problems_are_named(tmp_path, change, message):
    (tmp_path / "problems.json").write_text(json.dumps(records(**change)))
    with pytest.raises(ValueError, match=message):
        read_problems(tmp_path / "problems.json", "test", tmp_path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "problems.json"
    for text, message in (("[1]", "is not an object"), ("{\n", "line 2, column 1: not JSON"), ("{}", "no problems in")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_problems(path, "test", tmp_path)


@pytest.mark.parametrize(
    "text, index",
    [
        ("The answer is (B)", 1),
        ("So the answer is C. Really.", 2),
        ("The answer is (D)", None),  # there are three
        ("(B)", None),
        ("The answer is Berlin", None),
        ("", None),
    ],
)
def test_answers_are_parsed(folder, text, index):
    assert read_problems(folder / "problems.json", "test", folder)[0].chosen(text) == index


def test_the_nine_columns(folder):
    problems = read_problems(folder / "problems.json", "test", folder)
    marks = accuracies(problems, [2, None, 0])
    assert marks == {
        "NAT": 0, "SOC": 100, "LAN": 0, "TXT": 100, "IMG": 50, "NO": 0, "G1-6": 0, "G7-12": 50, "Avg": 100 / 3,
    }  # fmt: skip
    assert accuracies(problems[:1], [2])["NAT"] is None


@pytest.fixture
def scienceqa(data):
    return data / "scienceqa" / "problems.json"


def test_published_rows_are_whole_numbers_of_right_answers(scienceqa):
    """Of the official test split, in the columns as they are counted here: so these are the official columns."""
    problems = read_problems(scienceqa, "test", scienceqa.parent)
    sizes = [sum(map(counts, problems)) for counts in COLUMNS.values()]
    assert sizes == [2252, 889, 1100, 2046, 2017, 1435, 2724, 1517, 4241]
    for name, (_, row) in PUBLISHED.items():
        if name in ("random choice", "human"):  # expectations
            continue
        right = [round(share * size / 100) for share, size in zip(row, sizes)]
        whole = [abs(100 * n / size - share) < 0.0051 for n, size, share in zip(right, sizes, row)]
        if name in ("ChatGPT (CoT)", "GPT-4 (CoT)"):  # as published elsewhere
            assert [column for column, yes in zip(COLUMNS, whole) if not yes] == ["G1-6"]
            continue
        assert all(whole), name
        assert right[0] + right[1] + right[2] == right[6] + right[7] == right[8], name


def test_results_in_the_official_format(folder):
    problems = read_problems(folder / "problems.json", "test", folder)
    path = folder / "results.json"
    path.write_text(json.dumps({"acc": 1, "results": {"12": 2, "30": -1, "31": 5, "7": 0}, "outputs": {}}))
    assert read_chosen(path, problems) == [2, None, None]
    for values, message in (
        ({"results": {"12": 2}}, "answers 1 of 3 problems, not 30"),
        ({"results": {"12": "B", "30": 0, "31": 0}}, "problem 12: 'B' is not the index"),
        ({"12": 2}, "has no object 'results'"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            read_chosen(path, problems)


# ---------------------------------------------------------------------------------------------------
# Captions

COCO = {
    "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "Two dogs run over the green grass.\n"},
        {"id": 2, "image_id": 5, "caption": "A man rides a horse."},
        {"id": 3, "image_id": 9, "caption": "Dogs are running in a field."},
    ],
}


def test_pictures_and_their_captions(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO))
    five, nine = read_pictures(path)
    assert five.image == "5.jpg" and five.captions == ["A man rides a horse."]
    assert nine.captions == ["Two dogs run over the green grass.", "Dogs are running in a field."]
    examples = read_task("captions", path, tmp_path)
    assert [(e.instruction, e.output, e.image, e.name) for e in examples][1] == (
        "Generate caption for this image", "Two dogs run over the green grass.", "9.jpg", "image 9",
    )  # fmt: skip
    for change, message in (
        ({"annotations": [{"image_id": 4, "caption": "x"}]}, r"annotations\[0\]: image_id 4 is none of its images"),
        ({"annotations": [{"image_id": [5], "caption": "x"}]}, r"annotations\[0\]: image_id \[5\] is none of its"),
        ({"annotations": [{"image_id": 5}]}, r"annotations\[0\]: has no text 'caption'"),
        ({"annotations": []}, "holds no captions"),
        ({"images": [{"id": "5"}]}, r"images\[0\]: has no number 'id'"),
        ({"images": None}, "has no lists 'images' and 'annotations'"),
    ):
        path.write_text(json.dumps(COCO | change))
        with pytest.raises(ValueError, match=message):
            read_pictures(path)


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_caption_marks_by_their_definitions(tmp_path):
    """BLEU (Papineni et al., 2002) of a corpus, computed again; who says what people say gets the best of all marks."""
    try:
        tasks.caption_scorers()
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    pictures = read_pictures(tmp_path / "captions.json")
    written = ["A man rides a brown horse, quickly!", "Two dogs run in a field."]
    marks = caption_marks(pictures, written)

    cut = ["a man rides a brown horse quickly", "two dogs run in a field"]  # small letters, no punctuation
    references = [["a man rides a horse"], ["two dogs run over the green grass", "dogs are running in a field"]]
    logs, length = [], sum(len(text.split()) for text in cut)
    closest = 5 + 6  # of the references, in words
    for n in (1, 2):
        found = total = 0
        for text, theirs in zip(cut, references):
            for gram, count in grams(text, n).items():
                found += min(count, max(grams(reference, n)[gram] for reference in theirs))
                total += count
        logs.append(math.log(found / total))
        brevity = min(0, 1 - closest / length)
        assert marks[f"BLEU-{n}"] == pytest.approx(math.exp(brevity + sum(logs) / n), abs=1e-6)
    assert set(marks) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    perfect = caption_marks(pictures, [picture.captions[0] for picture in pictures])
    assert perfect["BLEU-4"] == pytest.approx(1, abs=1e-6) and perfect["ROUGE-L"] == pytest.approx(1)
    assert perfect["CIDEr"] > marks["CIDEr"]
    lines = ["A man\rrides a\u2028horse.", "Two dogs run\x0bover the green\ngrass."]  # one caption, whatever is in it
    assert caption_marks(pictures, lines) == perfect


def test_what_captions_need_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ValueError, match="pip install pycocoevalcap"):
        tasks.caption_scorers()
    monkeypatch.undo()
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install a Java runtime"):
        tasks.caption_scorers()


def test_written_captions(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    pictures, path = read_pictures(tmp_path / "captions.json"), tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 9, "caption": "b"}, {"image_id": 5, "caption": "a"}]))
    assert read_written(path, pictures) == ["a", "b"]
    path.write_text(json.dumps([{"image_id": 5, "caption": "a"}]))
    with pytest.raises(ValueError, match="describes 1 of 2 images, not 9"):
        read_written(path, pictures)
    for bad in ({"5": "a"}, [{"image_id": [5], "caption": "a"}]):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="is not a list of objects with a number 'image_id'"):
            read_written(path, pictures)
    path.write_text(json.dumps({"5": "a"}))
    with pytest.raises(ValueError, match="is not a list of objects"):
        read_written(path, pictures)


def test_missing_images_are_named_or_skipped(folder):
    (folder / "31" / "image.png").unlink()
    problems = read_problems(folder / "problems.json", "test", folder)
    with pytest.raises(FileNotFoundError, match="problem 31: .*31/image.png: no such image"):
        with_images(problems, folder, skip_missing=False)
    kept, paths = with_images(problems, folder, skip_missing=True)
    assert [p.id for p in kept] == ["12", "30"] and paths == [folder / "12" / "image.png"]


# ---------------------------------------------------------------------------------------------------
# The commands


def measure(*args):
    return CliRunner().invoke(evaluate.main, [str(arg) for arg in args])


@pytest.fixture
def seeing(tiny_base, tmp_path):
    """An adapter for images, with open gates, and its tower."""
    torch.save(openai_names(make_vit(SEEING)), tmp_path / "ViT.pt")
    adapter = ImageAdapter(layers=3, length=2, dim=16, heads=2, features=512, bottleneck=5)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "a.safetensors", base=str(tiny_base), tower=str(tmp_path / "ViT.pt"))
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("how", [[], ["--choose"]])
def test_scienceqa_command(folder, seeing, how):
    args = ["--data", folder / "problems.json", "--device", "cpu", "--out", folder / "out"]
    result = measure("scienceqa", *args, "--adapter", seeing, *how)
    assert result.exit_code == 0, result.output
    values = json.loads((folder / "out" / "results.json").read_text())
    assert values["count"] == 3 and set(values["results"]) == {"12", "30", "31"}
    assert values["acc"] == pytest.approx(100 * values["correct"] / 3)
    last = [line for line in result.stdout.splitlines() if line.startswith("a ")][0].split()
    assert last[1] == "2,763" and last[-1] == f"{values['acc']:.2f}"
    wrong = (folder / "out" / "wrong.txt").read_text()
    assert wrong.count("problem ") == 3 - values["correct"]
    if how:
        assert set(values["results"].values()) <= {0, 1, 2} and not values["unclear"]
    else:
        assert len(values["outputs"]) == 3 and values["unclear"] == ["12", "30", "31"]  # a random model says nothing
        assert "3 answers name none of the options" in result.stdout

    twice = measure("scienceqa", *args, "--results", folder / "out" / "results.json", "--adapter", seeing)
    assert twice.exit_code == 2 and "--results has the answers" in twice.stderr
    again = measure("scienceqa", *args, "--results", folder / "out" / "results.json", "--out", folder / "again")
    assert again.exit_code == 0, again.output
    assert json.loads((folder / "again" / "results.json").read_text())["columns"] == values["columns"]

    (folder / "12" / "image.png").unlink()
    result = measure("scienceqa", *args, "--adapter", seeing)
    assert result.exit_code == 2 and "problem 12: " in result.stderr and "no such image" in result.stderr
    result = measure("scienceqa", *args, "--adapter", seeing, "--skip-missing")
    assert result.exit_code == 0 and "1 of 3 left out: their image is not there" in result.stderr


def test_a_text_only_adapter_needs_no_images(folder, tiny_base):
    Adapter(layers=1, length=2, dim=16, heads=2).save(folder / "t.safetensors", base=str(tiny_base))
    (folder / "12" / "image.png").unlink()
    args = ["scienceqa", "--data", folder / "problems.json", "--adapter", folder / "t.safetensors", "--device", "cpu"]
    assert measure(*args, "--out", folder / "out").exit_code == 0


def test_training_on_scienceqa(folder, tiny_base, tmp_path):
    """The right answer's likelihood rises, by the same road as any instruction's."""
    args = [
        "--data", folder / "problems.json", "--task", "scienceqa", "--base", tiny_base, "--out", tmp_path / "run",
        "--epochs", 30, "--warmup-epochs", 1, "--val-size", 0, "--lr", 0.1, "--layers", 3, "--device", "cpu",
    ]  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0 and "1 examples to train on" in result.stderr, result.output
    model, tokenizer = load_llama(tiny_base)
    problem = read_problems(folder / "problems.json", "train", folder)[0]
    adapters = {"a": Adapter.load(tmp_path / "run" / "adapter.safetensors")}
    responder = Responder(model, tokenizer, adapters, strength=1, raw=False, max_new_tokens=9, eos_id=tokenizer.eos_id)
    rows = [(Question(problem.text(), "", name), answer) for name in ("base", "a") for answer in problem.answers()]
    scores = evaluate.log_likelihoods(responder, rows)
    assert scores[3] > scores[1] + 1 and scores[3] > scores[2]


def test_likelihoods_are_those_of_the_tokens_one_by_one(tiny_base):
    """Of rows with adapters of their own and none, by the softmax of the whole model's logits."""
    model, tokenizer = load_llama(tiny_base)
    adapter = make_adapter(model)
    responder = Responder(
        model, tokenizer, {"a": adapter}, strength=1, raw=False, max_new_tokens=9, eos_id=tokenizer.eos_id
    )
    rows = [
        (Question("Hi", "", "a"), "Yes, no."),
        (Question("Hello you", "", "base"), "No"),
        (Question("A", "", "a"), ""),
    ]
    for (question, answer), score in zip(rows, evaluate.log_likelihoods(responder, rows)):
        prompt, _ = responder.tokens(question)
        ids = prompt + tokenizer.encode(answer) + [tokenizer.eos_id]
        with torch.no_grad():
            log_p = model(torch.tensor([ids]), responder.prompts(question))[0].double().log_softmax(-1)
        expected = sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("how", [[], ["--choose"]])
def test_a_problem_that_does_not_fit_is_said(folder, tiny_base, monkeypatch, how):
    load = evaluate.load

    def load_short(*args):
        model, *more = load(*args)
        model.config = replace(model.config, max_seq_len=150)
        return model, *more

    monkeypatch.setattr(evaluate, "load", load_short)
    args = ["scienceqa", "--data", folder / "problems.json", "--base", tiny_base, "--out", folder / "out", *how]
    assert measure(*args, "--device", "cpu").exit_code == 0
    assert json.loads((folder / "out" / "results.json").read_text())["too_long"] == []
    (folder / "problems.json").write_text(json.dumps(records(hint="very " * 60)))
    result = measure(*args, "--device", "cpu")
    assert result.exit_code == 0 and "1 problems are too long for the base" in result.stdout, result.output
    values = json.loads((folder / "out" / "results.json").read_text())
    assert values["too_long"] == ["12"] and values["results"]["12"] == -1 and "12" not in values["unclear"]


def test_answers_must_fit_too(tiny_base, tmp_path):
    """At the last of the base's positions an answer's last word is read, and its end foretold."""
    model, tokenizer = load_llama(tiny_base)
    question = Question("Hi", "", "base")
    for spare, best in ((0, [None]), (1, [0])):
        responder = Responder(model, tokenizer, {}, strength=1, raw=False, max_new_tokens=9, eos_id=tokenizer.eos_id)
        length = len(responder.prompt(question)) + len(tokenizer.encode("Yes, yes.")) - 1 + spare
        model.config = replace(model.config, max_seq_len=length)
        found = evaluate.likeliest_answers(responder, [question], [["Yes, yes."]], 4, "question")
        assert found == best


def test_captions_command(tmp_path, seeing, tiny_base):
    try:
        tasks.caption_scorers()
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    for i in (5, 9):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"{i}.jpg")
    args = ["captions", "--data", tmp_path / "captions.json", "--device", "cpu", "--out", tmp_path / "out"]
    result = measure(*args, "--adapter", seeing, "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["image_id"] for row in rows] == [5, 9] and json.loads((tmp_path / "out" / "scores.json").read_text())
    again = measure(*args, "--results", tmp_path / "out" / "results.json")
    assert again.exit_code == 0 and again.stdout == result.stdout
    Adapter(layers=1, length=2, dim=16, heads=2).save(tmp_path / "t.safetensors", base=str(tiny_base))
    text_only = measure(*args, "--adapter", tmp_path / "t.safetensors")
    assert text_only.exit_code == 2 and "captions need an adapter with a projection" in text_only.stderr
