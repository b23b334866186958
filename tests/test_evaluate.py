"""The commands of evaluate.py: what they print, write and refuse, with a model or with saved responses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers import (
    FOUR_LAYER_VIT,
    make_vit,
    openai_state_dict,
    run,
    save_coco,
    save_problem_images,
    save_problems,
    subcommands,
)
from PIL import Image

import evaluate
import generate
from adapter import Adapter
from model import LLaMA
from multimodal import ImageAdapter
from runtime.compilation import compile_decoding
from tasks.captions import coco_scorers
from toy import exam


def run_evaluate(*args):
    return CliRunner().invoke(evaluate.main, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path):
    """Folder with a small problems.json in ScienceQA's format, and the images of its problems."""
    save_problems(tmp_path)
    save_problem_images(tmp_path)
    return tmp_path


@pytest.fixture
def image_adapter(tiny_base, tmp_path):
    """Path of an image adapter with nonzero gates. Its vision encoder is in the same folder."""
    torch.save(openai_state_dict(make_vit(FOUR_LAYER_VIT)), tmp_path / "ViT.pt")
    adapter = ImageAdapter(layers=3, length=2, dim=16, heads=2, features=512, bottleneck=5)
    torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "a.safetensors", base=str(tiny_base), vision_encoder=str(tmp_path / "ViT.pt"))
    return tmp_path / "a.safetensors"


@pytest.fixture
def text_only(tiny_base, tmp_path):
    """Path of an adapter file without a projection for images."""
    Adapter(layers=1, length=2, dim=16, heads=2).save(tmp_path / "t.safetensors", base=str(tiny_base))
    return tmp_path / "t.safetensors"


@pytest.mark.parametrize("how", [[], ["--choose"]])
def test_scienceqa_command_writes_its_results(folder, image_adapter, how):
    args = ["--data", folder / "problems.json", "--device", "cpu", "--out", folder / "out"]
    result = run_evaluate("scienceqa", *args, "--adapter", image_adapter, *how)
    assert result.exit_code == 0, result.output
    values = json.loads((folder / "out" / "results.json").read_text())
    assert values["count"] == 3 and set(values["results"]) == {"12", "30", "31"}
    assert values["acc"] == pytest.approx(100 * values["correct"] / 3)
    last = [line for line in result.stdout.splitlines() if line.startswith("a ")][0].split()
    assert last[1] == "2,763" and last[-1] == f"{values['acc']:.2f}"
    wrong = (folder / "out" / "wrong.txt").read_text()
    assert wrong.count("problem ") == 3 - values["correct"]
    if how:
        assert set(values["results"].values()) <= {0, 1, 2} and not values["unclear"] and "outputs" not in values
    else:
        assert len(values["outputs"]) == 3 and values["unclear"] == ["12", "30", "31"]  # a random model names no option
        assert "answers that name none of the choices, and count as wrong: 3" in result.stdout

    twice = run_evaluate("scienceqa", *args, "--results", folder / "out" / "results.json", "--adapter", image_adapter)
    assert twice.exit_code == 2 and "--results already contains the responses" in twice.stderr
    again = run_evaluate("scienceqa", *args, "--results", folder / "out" / "results.json", "--out", folder / "again")
    assert again.exit_code == 0, again.output
    assert json.loads((folder / "again" / "results.json").read_text())["columns"] == values["columns"]


def test_compiled_responses_equal_the_eager_ones(folder, text_only, monkeypatch):
    """`--compile` compiles the decoding step of generate.py. It is refused with `--choose`, which generates nothing."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    compiled = []
    monkeypatch.setattr(
        generate, "compile_decoding", lambda *args: compiled.append(compile_decoding(*args)) or compiled[0]
    )
    outputs = []
    for how in ([], ["--compile"]):
        args = ["--data", folder / "problems.json", "--device", "cpu", "--out", folder / "out", "--max-new-tokens", 5]
        result = run_evaluate("scienceqa", *args, "--adapter", text_only, *how)
        assert result.exit_code == 0, result.output
        outputs.append(json.loads((folder / "out" / "results.json").read_text())["outputs"])
    assert outputs[0] == outputs[1] and len(compiled) == 1
    result = run_evaluate("scienceqa", *args, "--adapter", text_only, "--compile", "--choose")
    assert result.exit_code == 2 and "--compile applies only to generated responses" in result.stderr


def test_missing_images_are_an_error_or_skipped(folder, image_adapter, monkeypatch):
    args = ["scienceqa", "--data", folder / "problems.json", "--device", "cpu", "--out", folder / "out"]
    (folder / "12" / "image.png").unlink()
    result = run_evaluate(*args, "--adapter", image_adapter)
    assert result.exit_code == 2 and "problem 12: " in result.stderr and "no such file" in result.stderr
    result = run_evaluate(*args, "--adapter", image_adapter, "--skip-missing")
    assert result.exit_code == 0 and "1 of 3 examples skipped: image not found" in result.stderr
    assert json.loads((folder / "out" / "results.json").read_text())["count"] == 2
    result = run_evaluate(*args, "--adapter", image_adapter, "--skip-missing", "--limit", 1)
    assert result.exit_code == 2 and "none of the images of its 1 examples is in" in result.stderr


def test_every_response_uses_its_own_image(folder, image_adapter, monkeypatch):
    """Each request has the features of its problem's image, or None if the problem has no image."""
    features_by_instruction = {}

    def record(responder, requests, *_):
        features_by_instruction.update({request.instruction: request.features for request in requests})
        return ["" for _ in requests]

    monkeypatch.setattr(evaluate, "generate_responses", record)
    args = ["scienceqa", "--data", folder / "problems.json", "--device", "cpu", "--out", folder / "out"]
    assert run_evaluate(*args, "--adapter", image_adapter).exit_code == 0
    problems = {problem.instruction: problem for problem in evaluate.load_task("scienceqa").read(args[2], split="test")}
    adapter = ImageAdapter.load(image_adapter)
    encoder = evaluate.load_image_encoder(None, None, torch.float32, torch.device("cpu"), adapter)
    for instruction, features in features_by_instruction.items():
        image = problems[instruction].image
        assert (features is None) == (image == "")
        if image:
            torch.testing.assert_close(features, encoder.encode([folder / image])[0])
    assert len(features_by_instruction) == 3


def test_text_only_adapter_needs_no_images(folder, text_only):
    (folder / "12" / "image.png").unlink()
    args = ["scienceqa", "--data", folder / "problems.json", "--adapter", text_only, "--device", "cpu"]
    assert run_evaluate(*args, "--out", folder / "out").exit_code == 0
    result = run_evaluate(*args, "--out", folder / "out", "--clip", folder / "ViT.pt")
    assert result.exit_code == 2 and "--clip and --encoder need an adapter that was trained on images" in result.stderr


@pytest.mark.parametrize("how", [[], ["--choose"]])
def test_problems_that_do_not_fit_are_reported(folder, tiny_base, monkeypatch, how):
    load = evaluate.load_with_adapters

    def load_short(*args, **options):
        model, *more = load(*args, **options)
        model.config = replace(model.config, max_seq_len=150)
        return model, *more

    monkeypatch.setattr(evaluate, "load_with_adapters", load_short)
    args = ["scienceqa", "--data", folder / "problems.json", "--base", tiny_base, "--out", folder / "out", *how]
    assert run_evaluate(*args, "--device", "cpu").exit_code == 0
    assert json.loads((folder / "out" / "results.json").read_text())["too_long"] == []
    save_problems(folder, hint="very " * 60)
    result = run_evaluate(*args, "--device", "cpu")
    assert (
        result.exit_code == 0 and "problems that are too long for the base, and count as wrong: 1" in result.stdout
    ), result.output
    values = json.loads((folder / "out" / "results.json").read_text())
    assert values["too_long"] == ["12"] and values["results"]["12"] == -1 and "12" not in values["unclear"]


def test_captions_command_writes_its_scores(tmp_path, image_adapter, text_only):
    try:
        coco_scorers()
    except ValueError as error:
        pytest.skip(str(error))
    for i in (5, 9):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"{i}.jpg")
    args = ["captions", "--data", save_coco(tmp_path), "--device", "cpu", "--out", tmp_path / "out"]
    result = run_evaluate(*args, "--adapter", image_adapter, "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["image_id"] for row in rows] == [5, 9] and scores["images"] == 2
    again = run_evaluate(*args, "--results", tmp_path / "out" / "results.json")
    assert again.exit_code == 0 and again.stdout == result.stdout
    refused = run_evaluate(*args, "--adapter", text_only)
    assert refused.exit_code == 2 and "the task captions needs an adapter that was trained on images" in refused.stderr


def test_every_caption_is_trained_on_and_every_image_is_evaluated_once(tmp_path, image_adapter, tiny_base):
    """Every caption is a training example. Evaluation generates one caption per image."""
    try:
        coco_scorers()
    except ValueError as error:
        pytest.skip(str(error))
    for i in (5, 9):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"{i}.jpg")
    path = save_coco(tmp_path)
    training = [
        "--epochs",
        2,
        "--warmup-epochs",
        1,
        "--val-size",
        0,
        "--features",
        tmp_path / "kept",
        "--device",
        "cpu",
    ]
    result = run(
        "--data", path, "--task", "captions", "--base", tiny_base, "--clip", tmp_path / "ViT.pt", "--out",
        tmp_path / "run", *training,
    )  # fmt: skip
    assert result.exit_code == 0 and "3 examples to train on" in result.stderr, result.output
    assert len(list((tmp_path / "kept").rglob("*.npy"))) == 2
    adapter = ["--adapter", tmp_path / "run" / "adapter.safetensors", "--max-new-tokens", 5, "--device", "cpu"]
    result = run_evaluate("captions", "--data", path, "--out", tmp_path / "out", *adapter)
    assert result.exit_code == 0 and "captions of 2 images" in result.stdout, result.output


def test_every_task_with_scores_has_a_command():
    scored = {name for name in evaluate.TASKS if evaluate.load_task(name).score}
    assert set(subcommands(evaluate.main)) == {"toy", "harness"} | scored
    assert {"toy", "scienceqa", "captions"} <= set(subcommands(evaluate.main))
    offered = {name: {option.name for option in command.params} for name, command in subcommands(evaluate.main).items()}
    assert offered["scienceqa"] - offered["captions"] == {"split", "choose"}
    refused = run_evaluate("captions", "--data", "x", "--choose")
    assert refused.exit_code == 2 and "No such option" in refused.stderr


def test_toy_command_needs_an_adapter():
    result = run_evaluate("toy")
    assert result.exit_code == 2 and "Missing option '--adapter'" in result.stderr


@pytest.mark.parametrize("images", [[], ["--images"]])
def test_toy_command_evaluates_the_adapter(text_only, monkeypatch, images):
    calls = []
    for name in ("evaluate_almanac", "evaluate_digits"):
        monkeypatch.setattr(exam, name, lambda *args, name=name: calls.append((name, *map(type, args[::2]))))
    result = run_evaluate("toy", "--adapter", text_only, *images, "--device", "cpu")
    assert result.exit_code == 0, result.output
    expected = ["evaluate_digits", "evaluate_almanac"] if images else ["evaluate_almanac"]
    assert calls == [(name, LLaMA, Adapter) for name in expected]
    result = run_evaluate("toy", "--adapter", text_only.with_name("absent"))
    assert result.exit_code == 2 and "absent" in result.stderr
