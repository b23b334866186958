"""Runs that are killed, stopped or interrupted and then resumed give the result of an uninterrupted run."""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import before_step, run_spoiled, run, tensors_and_metrics

import train
from adapter import Adapter
from runtime.files import locked
from training import curves
from training import run as run_module
from training.options import RunOptions
from training.run_files import WRITTEN, check_options


class Child:
    """train.py in a separate process. The event `at_step` is set when the n-th step of the process begins."""

    def __init__(self, forks, args, spoil=None, n=1):
        self.at_step = forks.Event()
        self.process = forks.Process(target=self.run, args=(args, spoil, n, self.at_step))
        self.process.start()

    @staticmethod
    def run(args, spoil, n, at_step):
        train.train_step = before_step(n, at_step.set)
        raise SystemExit(run_spoiled(args, spoil)[0])

    def exit_code(self):
        self.process.join(60)
        return self.process.exitcode


class KillAtWrite:
    """Callable that makes the process kill itself at the first atomic write whose fsync is its n-th or later.

    `how` states how far this write gets: "half" (half of the temporary file is written), "written" (all of it, but it
    is not renamed yet) or "renamed".
    """

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


def test_run_survives_twenty_kills(forks, args, tmp_path):
    """The process gets SIGKILL ten times at random moments and ten times during a write.

    Adapter and checkpoint stay readable, and the resumed run equals an uninterrupted one.
    """
    args += ["--epochs", 40, "--save-every", 1]
    assert Child(forks, [*args, "--out", tmp_path / "whole"]).exit_code() == 0

    rng, num_unfinished, last = random.Random(0), 0, 0
    for number in range(20):
        moments = ["half", "written", "renamed"]
        spoil = KillAtWrite(rng.randint(1, 15), moments[number // 2 % 3]) if number % 2 else None
        child = Child(forks, [*args, "--resume", "auto"], spoil, n=rng.randint(1, 6))
        if spoil is None:
            assert child.at_step.wait(60)
            time.sleep(rng.uniform(0, 0.02))
            child.process.kill()
        assert child.exit_code() == -signal.SIGKILL
        out = tmp_path / "run"
        num_unfinished += any(path.suffix == ".unfinished" for path in out.iterdir())
        for path in out.iterdir():
            if path.name == "adapter.safetensors":
                Adapter.load(path)
            if path.name == "checkpoint.pt":
                step = torch.load(path, weights_only=True)["progress"]["step"]
                assert step >= last
                last = step
    assert num_unfinished >= 3 and 20 < last < 200  # some kills hit a write, and all hit the run before its end

    assert Child(forks, [*args, "--resume", "auto"]).exit_code() == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_sigterm_saves_and_exits_with_0(args, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        result = run(*args)
    assert result.exit_code == 0 and "stopped by SIGTERM after step 7: to continue, add --resume" in result.stderr
    assert run(*args, "--resume").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_run_in_pieces_by_max_minutes_equals_one_run(args, tmp_path):
    """Each piece has one step. A finished run is not changed by any resumption."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    for step in range(1, 16):
        result = run(*args, "--resume", "auto", "--max-minutes", 1e-9)
        assert result.exit_code == 0
        assert f"stopped by --max-minutes after step {step}: to continue, add --resume" in result.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    assert run(*args, "--resume", "auto").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")

    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    result = run(*args, "--resume", "auto")
    assert result.exit_code == 0 and "this run is finished" in result.stderr
    result = run(*args, "--resume", "auto", "--epochs", 4)
    assert result.exit_code == 2 and "summary.json: was made with epochs = 3, not 4" in result.stderr
    init = f"--init {tmp_path / 'run' / 'adapter.safetensors'}"
    assert f"to train its adapter further, use {init} and a different --out" in result.stderr
    assert run(*args, *init.split(), "--epochs", 4, "--out", tmp_path / "further").exit_code == 0
    result = run(*args, "--resume", "auto", "--limit", 30)
    assert result.exit_code == 2 and "limit = None, not 30" in result.stderr
    (tmp_path / "other.json").write_text(args[3].read_text().replace("animals", "minerals"))
    result = run(*args, "--resume", "auto", "--data", tmp_path / "other.json")
    assert result.exit_code == 2 and "was made with data_hash = " in result.stderr
    result = run(*args, "--resume", "auto", "--base", tmp_path)
    assert result.exit_code == 2 and f"{tmp_path}: contains neither" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    assert run(*args, "--max-minutes", 60).exit_code == 0  # without --resume, the same command starts a new run


def test_signals_outside_of_training_steps_are_handled(args, monkeypatch):
    """The signal arrives while the base is loaded, or after the last checkpoint, while the curves are drawn."""

    def send_sigterm(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    for function, message in (
        ("train.load_model", "nothing was saved yet"),
        ("training.curves.draw_curves", "to continue, add --resume"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(function, send_sigterm)
            result = run(*args)
        assert result.exit_code == 0 and result.stderr.splitlines()[-1] == f"stopped by SIGTERM: {message}"
    assert run(*args, "--resume").exit_code == 0


# ---------------------------------------------------------------------------------------------------
# Crash points

OPERATIONS = ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir"))


def tiny_run(out, resume, seed):
    """Run or resume four steps with the file operations of a real run, but without a base and data."""
    adapter = Adapter(layers=1, length=2, dim=4, heads=2, generator=torch.Generator().manual_seed(seed))
    optimizer = train.make_optimizer(adapter, 0.0)
    with run_module.Run(RunOptions(out, resume, save_every=2)) as run:
        fixed = {"seed": seed, "base": None, "keep": "best", "eval_every": 2, "epochs": 1}
        if run.is_finished(fixed):
            return
        run.begin(adapter, optimizer, fixed, {"examples": 1, "held_out": 1}, num_steps=4)
        with run.saving_on_errors():
            val_losses = {0: 9.0, 2: 5.0, 4: 7.0}
            if run.evaluation_due(run.step):
                run.log_validation(val_losses[run.step])
            for number in range(run.step + 1, 5):
                for parameter in adapter.parameters():
                    parameter.grad = torch.full_like(parameter, float(number + seed))
                for group in optimizer.param_groups:
                    group["lr"] = 0.1
                optimizer.step()
                run.log_step(train.Step(number, 0, 10.0 - number, 0.1, 7, 0.5))
                if run.evaluation_due(number):
                    run.log_validation(val_losses[number])
                if number == 2:
                    run.save_checkpoint()
            run.save_checkpoint()
        run.finish({})


def crashing_run(out, seed, kill_at, after):
    """Run `tiny_run`, and kill the process before or after file operation number `kill_at`, if there are that many."""
    calls = []

    def counted(operation):
        def act(*args, **options):
            calls.append(1)
            if len(calls) == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return operation(*args, **options)
            finally:
                if len(calls) == kill_at and after:
                    os.kill(os.getpid(), signal.SIGKILL)

        return act

    torch.set_num_threads(1)
    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    curves.draw_curves = lambda metrics, adapter, path: path.write_bytes(b"a picture")
    tiny_run(out, None, seed)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("occupied", [False, True], ids=["new folder", "finished run there"])
def test_run_survives_every_crash_point(forks, tmp_path, monkeypatch, occupied, after):
    """After SIGKILL at any file operation, --resume auto or a new run gives the result of an uninterrupted run.

    No file of a finished run, of a different process or of the user is lost, and no temporary file of the run remains.
    """
    monkeypatch.setattr(curves, "draw_curves", lambda metrics, adapter, path: path.write_bytes(b"a picture"))
    tiny_run(tmp_path / "whole", None, seed=2)
    clean = contents(tmp_path / "whole")
    unrelated = {"answers.jsonl.123-0123abcd.unfinished": b"another process", "mine.unfinished": b"the user's"}
    for kill_at in range(1, 200):
        out = tmp_path / str(kill_at)
        before = {}
        if occupied:
            tiny_run(out, None, seed=1)
            before = contents(out)
        out.mkdir(exist_ok=True)
        for name, content in unrelated.items():
            (out / name).write_bytes(content)
        process = forks.Process(target=crashing_run, args=(out, 2, kill_at, after))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        try:
            tiny_run(out, "auto", seed=2)
        except ValueError as error:  # the process was killed before it moved the finished run
            assert occupied and "was made with seed = 1" in str(error)
            tiny_run(out, None, seed=2)
        now = contents(out)
        assert now.pop("answers.jsonl.123-0123abcd.unfinished") == b"another process"
        assert now.pop("mine.unfinished") == b"the user's"
        assert now.keys() == clean.keys(), kill_at
        assert all(now[name] == clean[name] for name in ("adapter.safetensors", "metrics.jsonl", "curves.png")), kill_at
        folders = sorted(path.name for path in out.iterdir() if path.is_dir())
        if occupied:
            assert folders[0] == "run-1" and contents(out / "run-1") == before, kill_at
        for folder in folders[occupied:]:  # an adapter that was saved before the first checkpoint
            assert set(contents(out / folder)) == {"adapter.safetensors", "metrics.jsonl"}, (kill_at, folder)
    assert kill_at > 20 and process.exitcode == 0


def test_files_show_the_state_of_a_run(args, tmp_path, monkeypatch):
    """A folder with only an adapter file is not a finished run. An interrupted move of a run is completed."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "adapter.safetensors").write_bytes(b"of a run that was killed before its first checkpoint")
    result = run(*args, "--resume")
    assert result.exit_code == 2 and "no such checkpoint to resume from" in result.stderr
    result = run(*args, "--resume", "auto")
    assert result.exit_code == 0 and f"an unfinished adapter was moved to {out / 'run-1'}" in result.stderr
    before = contents(out)
    (out / "run-2.moving").mkdir()
    (out / "adapter.safetensors").rename(out / "run-2.moving" / "adapter.safetensors")
    assert run(*args).exit_code == 0
    assert contents(out / "run-2") == before and contents(out).keys() == before.keys()


def test_resuming_at_the_last_step_writes_the_same_file(args, tmp_path, monkeypatch):
    """The adapter files are equal byte for byte, including their metadata."""
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(15, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert "after step 15" in run(*args).stderr
    assert run(*args, "--resume").exit_code == 0
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]


@pytest.mark.parametrize("options", ["tensor", "nested"])
def test_malformed_options_in_a_checkpoint_are_a_one_line_error(args, tmp_path, options):
    assert run(*args, "--max-minutes", 1e-9).exit_code == 0
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint, nested = torch.load(path, weights_only=True), []
    for _ in range(5000):
        nested = [nested]
    value = {"tensor": torch.zeros(2), "nested": nested}[options]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    torch.save(checkpoint | {"options": checkpoint["options"] | {"seed": value}}, path)
    sys.setrecursionlimit(limit)
    result = run(*args, "--resume")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(f"error: {path}: "), result.stderr


def run_out_of_memory(machine):
    """Raise torch.OutOfMemoryError, as a GPU does, or the RuntimeError of a failed allocation on a CPU."""
    if machine == "gpu":
        raise torch.OutOfMemoryError("out of memory")
    torch.empty(2**50)


@pytest.mark.parametrize("machine", ["gpu", "cpu"])
@pytest.mark.parametrize("where, kept", [("train.chunked_cross_entropy", 6), ("torch.optim.AdamW.step", 4)])
def test_running_out_of_memory_keeps_a_checkpoint(args, tmp_path, monkeypatch, where, kept, machine):
    """An error in the forward pass loses no step. After one in the optimizer's step, the last checkpoint is kept."""
    args += ["--val-size", 0]
    assert run(*args, "--out", tmp_path / "whole").exit_code == 0
    function, calls = train.chunked_cross_entropy if kept == 6 else torch.optim.AdamW.step, []

    def failing(*more):
        calls.append(1)
        result = function(*more)
        if len(calls) == 7:
            run_out_of_memory(machine)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        result = run(*args, "--save-every", 4)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert (
        last.startswith("error: out of memory") and f"saved after step {kept}; a smaller --micro-batch-tokens" in last
    )
    assert last.endswith("; to continue, add --resume")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == kept
    assert run(*args, "--resume").exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "whole")


def test_running_out_of_memory_in_the_first_step_is_reported(args, monkeypatch):
    """Without a checkpoint, the message does not advise to resume."""
    monkeypatch.setattr(train, "chunked_cross_entropy", lambda *more: run_out_of_memory("gpu"))
    result = run(*args, "--val-size", 0)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and "; nothing was saved yet; a smaller --micro" in last and "--resume" not in last


def test_base_weights_are_released_before_the_loop(args, monkeypatch):
    """Old .pth files cannot be memory-mapped: a reference to their tensors would keep a second copy in memory."""
    read_base, references = train.read_base, []

    def tracked_read(path):
        shape, weights = read_base(path)
        return shape, TrackedWeights(weights)

    class TrackedWeights(dict):
        def __init__(self, weights):
            super().__init__(weights)
            references.append(weakref.ref(self))

    def step(*more):
        gc.collect()
        assert [each() for each in references] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "read_base", tracked_read)
    monkeypatch.setattr(train, "train_step", step)
    assert run(*args).exit_code == 130


def test_metrics_with_a_gap_are_refused(args, tmp_path):
    assert run(*args, "--max-minutes", 1e-9).exit_code == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    result = run(*args, "--resume")
    assert result.exit_code == 2 and "metrics.jsonl: does not have every step up to 1" in result.stderr


@pytest.mark.parametrize("full", ["checkpoint.pt", "metrics.jsonl"])
def test_full_disk_leaves_the_last_checkpoint(args, tmp_path, monkeypatch, full):
    """RLIMIT_FSIZE imitates a full disk: from step 8 on, checkpoint.pt or metrics.jsonl cannot be written."""
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


def test_files_are_synced_before_they_are_renamed(args, tmp_path, monkeypatch):
    """Checkpoint, adapter and metrics are synced to disk before the checkpoint replaces the previous one."""
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("synced", Path(file.name).suffix)) or fsync(file))
    monkeypatch.setattr(
        Path, "replace", lambda path, target: events.append(("renamed", target.name)) or replace(path, target)
    )
    assert run(*args, "--save-every", 15).exit_code == 0
    place = events.index(("renamed", "checkpoint.pt"))
    assert events[place - 4 : place] == [
        ("synced", ".unfinished"),
        ("renamed", "adapter.safetensors"),
        ("synced", ".jsonl"),
        ("synced", ".unfinished"),
    ]


def test_option_names_of_earlier_versions_are_accepted(tmp_path):
    check_options({"tower_fingerprint": "a"}, {"vision_encoder_fingerprint": "a"}, tmp_path)
    with pytest.raises(ValueError, match="was made with vision_encoder_fingerprint = a, not b"):
        check_options({"tower_fingerprint": "a"}, {"vision_encoder_fingerprint": "b"}, tmp_path)


def test_summary_contains_the_options(args, tmp_path):
    assert run(*args).exit_code == 0
    options = json.loads((tmp_path / "run" / "summary.json").read_text())["options"]
    assert options["epochs"] == 3 and options["layers"] == 1 and "base_fingerprint" in options


def test_resuming_with_a_different_tokenizer_is_refused(args, chat_base, tmp_path, monkeypatch):
    """The remaining steps would train a different token as the end of a response."""
    base = tmp_path / "base"
    shutil.copytree(args[1], base)
    args[1] = base
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", before_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert run(*args).exit_code == 0
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    result = run(*args, "--resume")
    assert result.exit_code == 2 and "checkpoint.pt: was made with tokenizer_fingerprint = " in result.stderr
    (base / "generation_config.json").unlink()
    assert run(*args, "--resume").exit_code == 0


def test_second_run_in_a_locked_folder_is_refused(forks, args, tmp_path):
    """The error names the process that holds the lock. The refused run writes nothing, and can start afterward."""
    assert run(*args, "--out", tmp_path / "alone").exit_code == 0
    with locked_by_another_process(forks, tmp_path / "run") as process:
        result = run(*args)
        assert result.exit_code == 2 and f"process {process.pid} on " in result.stderr, result.stderr
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock-holder"}
    assert run(*args).exit_code == 0
    assert tensors_and_metrics(tmp_path / "run") == tensors_and_metrics(tmp_path / "alone")


@contextmanager
def locked_by_another_process(forks, folder):
    """Create the folder, and yield a process that holds its lock. The process is killed at the end of the block."""
    folder.mkdir()
    is_locked = forks.Event()
    process = forks.Process(target=hold_lock, args=(folder, is_locked))
    process.start()
    assert is_locked.wait(60)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hold_lock(folder, is_locked):
    with locked(folder):
        is_locked.set()
        time.sleep(60)


def test_finished_run_is_moved_not_overwritten(args, tmp_path):
    out = tmp_path / "run"
    for number in range(3):
        result = run(*args, "--seed", number)
        assert result.exit_code == 0 and (f"moved to {out / f'run-{number}'}" in result.stderr) == (number > 0)
    seeds = [Adapter.load(out / place / "adapter.safetensors").metadata["seed"] for place in ("run-1", "run-2", "")]
    assert seeds == ["0", "1", "2"]
    assert {path.name for path in (out / "run-1").iterdir()} == set(WRITTEN) - {"tensorboard"}


def test_early_failure_leaves_no_folder(args, tmp_path):
    assert run(*args, "--base", tmp_path / "absent").exit_code == 2
    assert not (tmp_path / "run").exists()
