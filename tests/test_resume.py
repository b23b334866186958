"""A run that is stopped, by whatever it is, goes on as if it had not been."""

import json
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import before_step, command, run, tensors_and_metrics

import train
from adapter import Adapter
from runtime.files import locked
from training.run_files import WRITTEN


class Child:
    """train.py in a process of its own; `there` is set when it begins its n-th step."""

    def __init__(self, forks, args, spoil=None, n=1):
        self.there = forks.Event()
        self.process = forks.Process(target=self.run, args=(args, spoil, n, self.there))
        self.process.start()

    @staticmethod
    def run(args, spoil, n, there):
        train.train_step = before_step(n, there.set)
        raise SystemExit(command(args, spoil)[0])

    def exit_code(self):
        self.process.join(60)
        return self.process.exitcode


class AtAWrite:
    """Kills the process at the n-th file it makes sure of: written by half, not yet renamed, or just renamed."""

    def __init__(self, n, how):
        self.n, self.how = n, how

    def __call__(self, rank):
        fsync, replace, calls = os.fsync, Path.replace, []

        def fatal_fsync(file):
            fsync(file)
            calls.append(1)
            if len(calls) >= self.n and str(file.name).endswith(".unfinished"):
                if self.how == "half":
                    os.truncate(file.name, os.path.getsize(file.name) // 2)
                if self.how != "renamed":
                    os.kill(os.getpid(), signal.SIGKILL)

        def fatal_replace(path, target):
            replace(path, target)
            if len(calls) >= self.n:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync, Path.replace = fatal_fsync, fatal_replace


def test_twenty_kills(forks, args, tmp_path):
    """kill -9, ten times at random and ten times at a write; each time the files left behind are whole."""
    args += ["--epochs", 40, "--save-every", 1]
    assert Child(forks, [*args, "--out", tmp_path / "whole"]).exit_code() == 0

    chance, left_over, last = random.Random(0), 0, 0
    for number in range(20):
        hows = ["half", "written", "renamed"]
        spoil = AtAWrite(chance.randint(1, 15), hows[number // 2 % 3]) if number % 2 else None
        child = Child(forks, [*args, "--resume", "auto"], spoil, n=chance.randint(1, 6))
        if spoil is None:
            assert child.there.wait(60)
            time.sleep(chance.uniform(0, 0.02))
            child.process.kill()
        assert child.exit_code() == -signal.SIGKILL
        out = tmp_path / "run"
        left_over += any(path.suffix == ".unfinished" for path in out.iterdir())
        for path in out.iterdir():
            if path.name == "adapter.safetensors":
                Adapter.load(path)
            if path.name == "checkpoint.pt":
                step = torch.load(path, weights_only=True)["progress"]["step"]
                assert step >= last
                last = step
    assert left_over >= 3 and 20 < last < 200  # there were kills amid writing, and all of them amid the run

    assert Child(forks, [*args, "--resume", "auto"]).exit_code() == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_sigterm_saves_and_is_no_failure(args, tmp_path, monkeypatch):
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        result = run(*args)
    assert result.exit_code == 0 and "stopped by SIGTERM after step 7: to go on, add --resume" in result.stderr
    assert run(*args, "--resume").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_max_minutes_and_the_same_command_again(args, tmp_path):
    """A run of as many pieces as steps is that of one piece; then there is nothing left to do."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    for step in range(1, 16):
        result = run(*args, "--resume", "auto", "--max-minutes", 1e-9)
        assert result.exit_code == 0
        assert f"stopped by --max-minutes after step {step}: to go on, add --resume" in result.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    assert run(*args, "--resume", "auto").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")

    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    result = run(*args, "--resume", "auto")
    assert result.exit_code == 0 and "this run is finished" in result.stderr
    result = run(*args, "--resume", "auto", "--epochs", 4)
    assert result.exit_code == 2 and "summary.json: was made with epochs = 3, not 4" in result.stderr
    result = run(*args, "--resume", "auto", "--limit", 30)
    assert result.exit_code == 2 and "limit = None, not 30" in result.stderr
    (tmp_path / "other.json").write_text(args[3].read_text().replace("animals", "minerals"))
    result = run(*args, "--resume", "auto", "--data", tmp_path / "other.json")
    assert result.exit_code == 2 and "was made with data_hash = " in result.stderr
    result = run(*args, "--resume", "auto", "--base", tmp_path)
    assert result.exit_code == 2 and f"not {tmp_path}" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    assert run(*args, "--max-minutes", 60).exit_code == 0  # without --resume the same command begins anew


def test_signals_outside_of_the_steps(args, monkeypatch):
    """While the base is read there is nothing to save; while the curves are drawn, all is there."""

    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    for where, said in (
        ("train.prepare", "there is nothing yet to go on from"),
        ("training.run.draw_curves", "to go on, add --resume"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, signalled)
            result = run(*args)
        assert result.exit_code == 0 and result.stderr.splitlines()[-1] == f"stopped by SIGTERM: {said}"
    assert run(*args, "--resume").exit_code == 0


def run_out(machine):
    """A GPU says it with an error of its own, a CPU with RuntimeError."""
    if machine == "gpu":
        raise torch.OutOfMemoryError("no memory left")
    torch.empty(2**50)


@pytest.mark.parametrize("machine", ["gpu", "cpu"])
@pytest.mark.parametrize("where, kept", [("train.chunked_cross_entropy", 6), ("torch.optim.AdamW.step", 4)])
def test_memory_that_runs_out(args, tmp_path, monkeypatch, where, kept, machine):
    """In a forward pass nothing is lost; amid the optimizer's step, which may be half done, the last checkpoint is."""
    args += ["--val-size", 0]
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    function, calls = train.chunked_cross_entropy if kept == 6 else torch.optim.AdamW.step, []

    def halfway(*more):
        calls.append(1)
        result = function(*more)
        if len(calls) == 7:
            run_out(machine)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, halfway)
        result = run(*args, "--save-every", 4)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    if kept == 6:
        assert last.startswith("error: no memory left") and "as of step 6; to go on, add --resume and" in last
    else:
        assert last.startswith("error: no memory for the optimizer's step: no memory left")
        assert last.endswith("; what was saved last stands")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == kept
    assert run(*args, "--resume").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")


def test_metrics_with_a_gap_are_refused(args, tmp_path):
    assert run(*args, "--max-minutes", 1e-9).exit_code == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    result = run(*args, "--resume")
    assert result.exit_code == 2 and "metrics.jsonl: does not have every step up to 1" in result.stderr


@pytest.mark.parametrize("full", ["checkpoint.pt", "metrics.jsonl"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(args, tmp_path, monkeypatch, full):
    """RLIMIT_FSIZE stands for the full disk: from step 8 on no file grows beyond what it has."""
    resource = pytest.importorskip("resource")
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up():
        room = (out / full).stat().st_size - (full == "checkpoint.pt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(8, fill_up))
        result = run(*args, "--save-every", 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2 and "Traceback" not in result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {out / full}") and "File too large" in last
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 6
    assert not list(out.glob("*.unfinished"))
    assert run(*args, "--resume").exit_code == 0
    assert tensors_and_metrics(out) == tensors_and_metrics(tmp_path / "whole")


def test_what_is_renamed_is_on_the_disk(args, tmp_path, monkeypatch):
    """A checkpoint takes the place of the one before when it, the adapter and the metrics are there for good."""
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("sure", Path(file.name).suffix)) or fsync(file))
    monkeypatch.setattr(
        Path, "replace", lambda path, target: events.append(("in place", target.name)) or replace(path, target)
    )
    assert run(*args, "--save-every", 15).exit_code == 0
    place = events.index(("in place", "checkpoint.pt"))
    assert events[place - 4 : place] == [
        ("sure", ".jsonl"),
        ("sure", ".unfinished"),
        ("in place", "adapter.safetensors"),
        ("sure", ".unfinished"),
    ]


def test_the_summary_tells_the_options(args, tmp_path):
    assert run(*args).exit_code == 0
    options = json.loads((tmp_path / "run" / "summary.json").read_text())["options"]
    assert options["epochs"] == 3 and options["layers"] == 1 and "base_fingerprint" in options


def test_two_runs_in_one_folder(forks, args, tmp_path):
    """The second says whose the folder is, and leaves the first alone."""
    assert run(*args, "--out", tmp_path / "alone").exit_code == 0
    with locked_by_another(forks, tmp_path / "run") as process:
        result = run(*args)
        assert result.exit_code == 2 and f"process {process.pid} on " in result.stderr, result.stderr
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock-holder"}
    assert run(*args).exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "alone")


@contextmanager
def locked_by_another(forks, folder):
    folder.mkdir()
    at_work = forks.Event()
    process = forks.Process(target=hold_lock, args=(folder, at_work))
    process.start()
    assert at_work.wait(60)
    yield process
    process.kill()
    process.join()


def hold_lock(folder, at_work):
    with locked(folder):
        at_work.set()
        time.sleep(60)


def test_a_finished_run_is_moved_aside_not_overwritten(args, tmp_path):
    out = tmp_path / "run"
    for number in range(3):
        result = run(*args, "--seed", number)
        assert result.exit_code == 0 and (f"now in {out / f'run-{number}'}" in result.stderr) == (number > 0)
    seeds = [Adapter.load(out / place / "adapter.safetensors").metadata["seed"] for place in ("run-1", "run-2", "")]
    assert seeds == ["0", "1", "2"]
    assert {path.name for path in (out / "run-1").iterdir()} == set(WRITTEN)


def test_a_run_that_fails_early_leaves_no_folder(args, tmp_path):
    assert run(*args, "--base", tmp_path / "absent").exit_code == 2
    assert not (tmp_path / "run").exists()
