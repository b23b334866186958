"""The experiments on the testbed, each run as a command."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from experiments import __main__ as commands
from experiments import ablations, measures
from experiments.ablations import RATES
from experiments.cached import cached_folder
from experiments.methods import ZERO_INIT
from experiments.runs import RESULTS, Column, Runs


def invoke(*args):
    return CliRunner().invoke(commands.main, [str(arg) for arg in args])


@pytest.fixture
def small_args(tiny_base, instructions, tmp_path):
    return [
        "--base", tiny_base, "--data", instructions, "--epochs", 3, "--batch-size", 16, "--length", 3, "--lr", 0.05,
        "--seeds", 2, "--limit", 16, "--held-out", 3, "--out", tmp_path / "out", "--device", "cpu",
    ]  # fmt: skip


ROWS = {"methods": 4, "zero_init": 12, "layers": 6 + 6, "epochs": 3, "design": 12}


def every_row(out):
    return [row for name in ROWS for row in json.loads((out / f"{name}.json").read_text())["rows"].values()]


def test_all_experiments_write_their_files(small_args, tmp_path, monkeypatch):
    """The command `all` runs six experiments. A setting that several of them share is trained only once per seed."""
    text = tmp_path / "text.txt"
    text.write_text("The capital of Peru is Lima. " * 100)
    started = []
    set_up = measures.set_up
    monkeypatch.setattr(measures, "set_up", lambda *args: started.append(args[:2]) or set_up(*args))
    monkeypatch.setattr(ablations, "EPOCHS", (3, 4))
    result = invoke("all", *small_args, "--text", text)
    assert result.exit_code == 0, result.output
    assert (
        len(started)
        == len(set(started))
        == 2 * len({json.dumps(row["setting"]) for row in every_row(tmp_path / "out")})
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{name}.{kind}" for name in [*ROWS, "gates"] for kind in ("json", "png")} | {"all.json"}
    values = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ROWS}
    assert all(value["machine"] and value["threads"] == torch.get_num_threads() for value in values.values())
    assert values["epochs"]["seeds"] == 2 and values["epochs"]["options"]["length"] == "3"
    assert values["epochs"]["command"].startswith("python -m experiments ")
    assert {name: len(value["rows"]) for name, value in values.items()} == ROWS | {"epochs": 2}
    for name, value in values.items():
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 5
        for label, row in value["rows"].items():
            assert label in result.output and len(row["accuracy"]) == len(row["val_loss"]) == 2
            assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 2, abs=1e-5)
            difference = abs(row["accuracy"][0] - row["accuracy"][1])
            assert row["standard_deviation"] == pytest.approx(difference / 2**0.5, abs=1e-5)
    assert values["zero_init"]["paper"]["ScienceQA, validation, %"]["random-init attention"] == 40.77
    assert (
        "random-init attention: 40.77" in result.output
        and "10: 55.95, 20: 73.36, 30: 83.85, 32: 81.03" in result.output
    )
    # The same setting has the same row in every experiment.
    default = values["methods"]["rows"][ZERO_INIT]
    assert values["design"]["rows"]["as it is"] == default == values["zero_init"]["rows"][f"{ZERO_INIT}, 0.05"]
    assert values["layers"]["rows"]["K = 3"] == default and default["setting"]["lr"] == 0.05
    means = values["zero_init"]["loss_by_epoch"][f"{ZERO_INIT}, 0.05"]
    assert len(means) == 2 and len(means[0]) == 3 and means[0][-1] == default["train_loss"][0]


def test_finished_runs_are_skipped(small_args, tmp_path, monkeypatch):
    """After an interruption, the same command does only the missing runs.

    It does all runs if its options differ, or if the experiment was finished.
    """
    out, started, set_up = tmp_path / "out", [], measures.set_up

    def interrupt_at(number):
        def interrupted(*args):
            started.append(args[:2])
            if len(started) == number:
                raise KeyboardInterrupt
            return set_up(*args)

        started.clear()
        monkeypatch.setattr(measures, "set_up", interrupted)

    interrupt_at(4)
    assert invoke("methods", *small_args).exit_code != 0 and [path.suffixes for path in out.iterdir()] == [
        [".unfinished", ".json"]
    ]
    interrupt_at(0)
    result = invoke("methods", *small_args)
    assert result.exit_code == 0 and "skipping 3 finished runs" in result.output
    assert len(started) == 2 * len(RATES) - 3 and {path.name for path in out.iterdir()} == {
        "methods.json",
        "methods.png",
    }
    resumed = json.loads((out / "methods.json").read_text())
    interrupt_at(0)
    assert invoke("methods", *small_args).exit_code == 0 and len(started) == 2 * len(RATES)
    uninterrupted = json.loads((out / "methods.json").read_text())
    for values in (resumed, uninterrupted):
        for row in values["rows"].values():
            del row["seconds"]
    assert resumed == uninterrupted
    interrupt_at(2)
    assert invoke("methods", *small_args).exit_code != 0
    interrupt_at(0)
    assert invoke("methods", *small_args, "--length", 2).exit_code == 0 and len(started) == 2 * len(RATES)
    assert any(path.name.endswith(".unfinished.json") for path in out.iterdir())


def squared(setting, seed):
    return {"value": setting**2 + seed, "threads": torch.get_num_threads()}


def test_runs_in_processes_equal_sequential_runs(tmp_path):
    settings = {"two": 2, "three": 3, "again two": 2}
    columns = [Column("value", "value", ".1f", spread=True)]
    one = Runs("x", tmp_path, 2, {}).table(columns, settings, squared, once=["three"])
    many = Runs("x", tmp_path, 2, {}).table(columns, settings, squared, once=["three"], in_rounds=True, at_a_time=2)
    assert one["two"]["value"] == one["again two"]["value"] == [4, 5] and one["three"]["value"] == [9]
    assert {label: row["value"] for label, row in many.items()} == {label: row["value"] for label, row in one.items()}
    assert many["two"]["threads"] == [1, 1]


def failing_for_two(folder, setting, seed):
    """Fail for 2. Other runs last until a second after that."""
    if setting == 2:
        (folder / "failing").touch()
        raise ValueError("two is not allowed")
    while not (folder / "failing").exists():
        time.sleep(0.01)
    time.sleep(1)
    return {"value": setting}


def test_runs_in_progress_are_kept_if_one_fails(tmp_path, capsys):
    """The run beside the failing one is finished and written. The one after it is not started."""
    runs = Runs("x", tmp_path, 1, {})
    with pytest.raises(ValueError, match="two is not allowed"):
        runs.table([], {"two": 2, "three": 3, "four": 4}, partial(failing_for_two, tmp_path), at_a_time=2)
    assert json.loads(runs.log.read_text()) == {"(3, 0)": {"value": 3}}
    assert "a run failed (two is not allowed); waiting for those in progress" in capsys.readouterr().err


def test_cached_folder_is_filled_once_by_two_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.cached.CACHE", tmp_path)
    calls = []

    def fill_slowly(folder):
        calls.append(folder)
        time.sleep(0.5)
        (folder / "file").write_text("full")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cached_folder("x", 1, fill_slowly), range(2))
    assert first == second and (first / "file").read_text() == "full" and len(calls) == 1


def test_repeated_experiment_has_the_same_numbers(small_args, tmp_path):
    """Only the measured seconds differ."""
    written = []
    for _ in range(2):
        assert invoke("methods", *small_args).exit_code == 0
        rows = json.loads((tmp_path / "out" / "methods.json").read_text())["rows"]
        written.append({label: {k: v for k, v in row.items() if k != "seconds"} for label, row in rows.items()})
    assert written[0] == written[1] and list(written[0]) == list(RATES)


def test_rate_search_tries_five_rates_per_method(small_args, tmp_path, monkeypatch):
    """Rates are scaled with --lr, and compared on examples that are held out from the training data for the search."""
    searching_flags = []
    read = commands.read_testbed
    monkeypatch.setattr(
        commands,
        "read_testbed",
        lambda options, searching: searching_flags.append(searching) or read(options, searching),
    )
    assert invoke("gates", *small_args).exit_code == 0
    (tmp_path / "text.txt").write_text("The capital of Peru is Lima. " * 100)
    assert invoke("rates", *small_args, "--seeds", 1, "--text", tmp_path / "text.txt").exit_code == 0
    rows = json.loads((tmp_path / "out" / "rates.json").read_text())["rows"]
    assert len(rows) == 5 * len(RATES) and (tmp_path / "out" / "rates.png").exists()
    assert searching_flags == [False, True]
    for method, rate in RATES.items():
        assert f"{method}, {rate / RATES[ZERO_INIT] * 0.05:.3g}" in rows


def test_gate_values_are_recorded(small_args, tmp_path):
    assert invoke("gates", *small_args, "--layers", 2).exit_code == 0
    values = json.loads((tmp_path / "out" / "gates.json").read_text())
    gate_values = torch.tensor(values["gate_values"])
    assert values["steps"][0] == 0 and values["steps"][-1] == 3 and gate_values.shape == (len(values["steps"]), 2, 2)
    assert gate_values[0].abs().max() == 0 and gate_values[-1].abs().min() > 0


@pytest.mark.parametrize("args, message", [
    (["zero-init", "--base", "x"], "give both --base and --data, or neither"),
    (["zero-init", "--text", "x"], "--task and --text require --base and --data"),
    (["vit", "--base", "x", "--train", "x", "--test", "x"], "x: no such encoder"),
    (["gates", "--layers", 9], "--layers 9: .* has only 3"),
    (["gates", "--max-seq-len", 2], "0 of 3 questions leave room for a response in 2 tokens"),
    (["gates", "--text", "SHORT"], "the text for the perplexity has .* tokens, but needs at least 128"),
    (["gates", "--data", "ONE"], "the number of examples is 1, but at least 2 are needed"),
    (["gates", "--toy-layers", 8], "--toy-layers applies only to the toy's base; it cannot be used with --base"),
])  # fmt: skip
def test_bad_options_are_one_line_errors(small_args, tmp_path, args, message):
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "one.json").write_text('[{"instruction": "Say a.", "output": "a"}]')
    files = {"SHORT": tmp_path / "short.txt", "ONE": tmp_path / "one.json"}
    args = args if args[0] != "gates" else ["gates", *small_args, *(files.get(arg, arg) for arg in args[1:])]
    result = invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.output
    assert re.search("error: .*" + message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_default_rates_are_those_that_the_search_found():
    """Compare with rates.json. Zero-init's accuracy may be up to one standard deviation below the best."""
    rows = json.loads((RESULTS / "rates.json").read_text())["rows"].values()
    for method, rate in RATES.items():
        ours = [row for row in rows if row["setting"]["method"] == method]
        best = max(ours, key=lambda row: row["mean"])
        (used,) = (row for row in ours if row["setting"]["lr"] == rate)
        tolerance = best["standard_deviation"] if method == ZERO_INIT else 0
        assert best["mean"] - used["mean"] <= tolerance
