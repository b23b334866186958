"""The experiment on a real LLaMA, run here on a tiny one: its parts, skipping finished parts, and resuming."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import save_problems

from experiments import measures, methods, real_tasks, reviews
from experiments.__main__ import main
from experiments.capitals import capital_examples, is_json
from experiments.methods import FULL, LORA, ONE_SOFTMAX, ZERO_INIT, set_up
from experiments.reviews import ReviewRun, Sources, best_rate, review_testbed, schedule
from toy import digits

pytest.importorskip("peft")


@pytest.fixture
def sources(tiny_base, tmp_path, monkeypatch):
    """Sources with small data files. The sizes of the experiment are patched to match."""
    sentences = [f"a {word} film number {i}\t{i % 2}" for i, word in enumerate(["good", "bad", "long", "new"] * 4)]
    for name, rows in (("train", sentences), ("dev", sentences[:3])):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(row + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    monkeypatch.setattr(reviews, "SENTENCES", 8)
    monkeypatch.setattr(reviews, "SEARCH", 4)
    monkeypatch.setattr(reviews, "BATCH_SIZE", 4)
    monkeypatch.setattr(reviews, "MIN_STEPS", 3)
    monkeypatch.setattr(reviews, "TRIED", {method: rates[:1] for method, rates in reviews.TRIED.items()})
    monkeypatch.setattr(reviews, "TIMED_STEPS", 3)
    monkeypatch.setattr(reviews, "CACHE", tmp_path / "cache")
    return Sources(tiny_base, tmp_path, tmp_path / "text.txt", None, None, "cpu", "bfloat16", at_a_time=1)


@pytest.mark.filterwarnings("ignore")
def test_later_parts_use_the_rates_of_the_first(sources, tmp_path, monkeypatch):
    """Every part writes its file, and a part whose file exists is skipped."""
    monkeypatch.setattr(reviews, "in_new_process", lambda function, *args: function(*args))
    out = tmp_path / "results"
    args = ["real", "--base", sources.base, "--reviews", tmp_path, "--text", sources.text, "--device", "cpu"]
    args += ["--at-a-time", 1, "--out", out]
    args = list(map(str, args))
    result = CliRunner().invoke(main, [*args, "--part", "methods"])
    assert result.exit_code == 2 and "rates.json: does not exist; search for the learning rates first" in result.stderr
    parts = ["rates", "methods", "layers", "price"]
    result = CliRunner().invoke(main, args + [word for part in parts for word in ("--part", part)])
    assert result.exit_code == 0, result.output
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in parts}
    assert set(found["rates"]["best"]) == set(reviews.TRIED)
    # A single rate is at the edge of its grid, so the search tries a second one.
    assert len(found["rates"]["rows"]) == 2 * len(reviews.TRIED)
    assert found["methods"]["rows"][LORA]["setting"]["lr"] == found["rates"]["best"][LORA]
    assert len(found["methods"]["rows"][ZERO_INIT]["accuracy"]) == 2
    assert found["methods"]["rows"][ZERO_INIT]["recovered"] == [True, True]
    assert found["methods"]["rows"][FULL]["recovered"] == [False, False]
    assert set(found["price"]["rows"]) == {ZERO_INIT, ONE_SOFTMAX, LORA, FULL}
    result = CliRunner().invoke(main, [*args, "--part", "rates"])
    assert result.exit_code == 0 and result.stdout == f"{out} already contains rates.json; this part is skipped\n"


def test_best_rate_is_by_accuracy_and_then_by_loss():
    rows = {}
    for lr, accuracy, loss in ((0.1, 0.5, 0.3), (0.2, 0.6, 0.4), (0.3, 0.6, 0.2), (0.4, 0.5, 0.1)):
        rows[lr] = {"setting": {"method": LORA, "lr": lr}, "accuracy": [accuracy], "val_loss": [loss]}
    assert best_rate(rows, LORA) == 0.3


def test_small_training_sets_have_more_epochs():
    assert schedule(800) == {"epochs": 3, "warmup_epochs": 2}
    assert schedule(50) == {"epochs": 19, "warmup_epochs": pytest.approx(19 * 2 / 3)}


def test_training_sets_are_nested_and_exclude_held_out_data(sources):
    small, large = (review_testbed(sources, number, True) for number in (4, 12))
    assert [row.ids for row in small.training] == [row.ids for row in large.training[:4]]
    trained = {tuple(row.ids) for row in large.training}
    assert len(trained) == 12 and trained.isdisjoint(tuple(row.ids) for row in large.held_out)
    assert len(review_testbed(sources, 4, False).held_out) == 3


@pytest.mark.parametrize("method", [ZERO_INIT, LORA, FULL])
def test_resuming_equals_an_uninterrupted_run(sources, method, monkeypatch):
    """One run fails after its last step was saved. A second run is interrupted after three steps and then resumed."""
    testbed = review_testbed(sources, 8, False)
    run = ReviewRun(testbed.default._replace(method=method, lr=0.01), 8)
    uninterrupted = reviews.run_review(sources, run, seed=0)
    monkeypatch.setattr(measures, "SAVE_EVERY", -1)
    with monkeypatch.context() as patch:
        patch.setattr(measures, "mean_loss", None)  # called after the last step was saved
        with pytest.raises(TypeError):
            reviews.run_review(sources, run, seed=0)
    (checkpoint,) = reviews.CACHE.iterdir()
    state = torch.load(checkpoint, weights_only=True)
    assert state["losses"] == uninterrupted["losses"]

    steps = methods.training_steps

    def first_three(*args):
        for step, _ in zip(steps(*args), range(3)):
            yield step
        raise KeyboardInterrupt

    checkpoint.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(methods, "training_steps", first_three)
        with pytest.raises(KeyboardInterrupt):
            reviews.run_review(sources, run, seed=0)
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == 3
    resumed = reviews.run_review(sources, run, seed=0)
    assert {key: resumed[key] for key in resumed if key != "seconds"} == {
        key: uninterrupted[key] for key in uninterrupted if key != "seconds"
    }
    assert not list(reviews.CACHE.iterdir())


def test_full_tuning_in_mixed_precision_trains_float32_weights(sources):
    """The gradient in mixed precision is within 5% of the one in float32, but not equal to it."""
    testbed = review_testbed(sources, 8, False)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        setting = testbed.default._replace(method=FULL)
        model, adapter, _, loss_fn = set_up(setting, 0, testbed.base, dtype, testbed.device)
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        loss_fn(model, adapter, testbed.training).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 1e-5 < difference < 0.05


@pytest.mark.filterwarnings("ignore")
def test_parts_on_other_tasks_write_their_files(sources, chat_base, tmp_path, monkeypatch):
    """The parts `scienceqa`, `experts` and `alpaca` keep their adapters in the cache; the first two share one."""
    problems = save_problems(tmp_path)
    splits = {"train": ["12", "30"], "val": ["31"], "test": ["12", "30", "31"]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    records = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}, as told"} for i in range(12)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    out = tmp_path / "results"
    out.mkdir()
    best = dict.fromkeys(reviews.TRIED, 0.02)
    (out / "rates.json").write_text(json.dumps({"best": best}))
    monkeypatch.setattr(real_tasks, "ALPACA", 8)
    monkeypatch.setattr(real_tasks, "ALPACA_HELD_OUT", 4)
    monkeypatch.setattr(real_tasks, "DIGIT_EPOCHS", 2)
    monkeypatch.setattr(real_tasks, "ASKED", 5)
    monkeypatch.setattr(digits, "TRAINED_ON", 3)
    monkeypatch.setattr(digits, "HELD_OUT", 4)
    args = ["real", "--base", chat_base, "--reviews", tmp_path, "--text", sources.text, "--device", "cpu"]
    args += ["--problems", problems, "--alpaca", tmp_path / "alpaca.json", "--at-a-time", 1, "--out", out]
    parts = ("scienceqa", "experts", "alpaca", "digits")
    result = CliRunner().invoke(main, list(map(str, args)) + [word for part in parts for word in ("--part", part)])
    assert result.exit_code == 0, result.output
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in parts}
    assert set(found["scienceqa"]["rows"]) == {"base", ZERO_INIT, LORA}
    assert found["scienceqa"]["rows"]["base"]["too_long"] == [0]
    assert found["experts"]["base"]["unchanged"] is True and found["experts"]["base"]["same"] == 1
    assert [row["same"] for row in found["experts"]["rows"].values()] == [1, 1, 1]
    ours = found["alpaca"]["rows"]
    assert ours["base"]["own_template"] != ours["base"]["val_loss"] and len(found["alpaca"]["asked"]) == 4
    assert len({row["val_loss"][0] for row in ours.values()}) == 3
    assert all(set(row) >= {"image", "no_image", "another_image"} for row in found["digits"]["rows"].values())
    kept = list(reviews.CACHE.glob("*.safetensors"))
    assert len(kept) == 5 and not list(reviews.CACHE.glob("*.pt"))  # three of experts, two of alpaca


def test_missing_option_of_a_part_is_named(sources, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({"best": dict.fromkeys(reviews.TRIED, 0.02)}))
    args = ["real", "--base", sources.base, "--reviews", tmp_path, "--text", sources.text, "--out", tmp_path]
    for part, option in (("scienceqa", "--problems"), ("alpaca", "--alpaca")):
        result = CliRunner().invoke(main, [*map(str, args), "--part", part])
        assert result.exit_code == 2 and f"{option} is missing" in result.stderr


def test_capitals_are_evaluated_on_held_out_countries():
    training, evaluated = capital_examples()
    assert len(training) > 50 and len(evaluated) > 50
    assert not {example.name for example in training} & {example.name for example in evaluated}
    assert all(map(is_json, (example.output for example in training + evaluated)))
    assert not any(map(is_json, ("Paris", '["Paris"]', '{"capital": "Paris"}', None)))
