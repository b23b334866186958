"""Training on several ranks gives the results of a single process, and all ranks end together."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, Ranks, before_step, make_adapter, make_example, make_model, make_tokens
from helpers import peak_anonymous, run, error_lines, train_command
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import train
import training.run
from adapter import Adapter
from data import group_by_length, split_over_ranks
from formats.bases import load_llama
from runtime.device import select_device
from runtime.distributed import init_distributed, local_rank0_first, process_group, rank
from tasks import Task, instructions
from toy import toys
from training.run_files import read_metrics
from training.sharding import choose_strategy, fsdp_sharder

CPU = torch.device("cpu")


@pytest.fixture
def args(args):
    """Options with L = 2 and a high learning rate, so that small errors in the gradients become visible."""
    return [*args, "--layers", 2, "--lr", 0.5]


def outcome(out):
    """Return lists of (step, loss) and of (step, validation loss), and a dict of the adapter's tensors."""
    lines = read_metrics(out / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    return losses, validation, load_file(out / "adapter.safetensors")


def assert_same_run(one, other):
    (losses, validation, adapter), (other_losses, other_validation, other_adapter) = outcome(one), outcome(other)
    assert [step for step, _ in losses] == [step for step, _ in other_losses]
    assert dict(losses) == pytest.approx(dict(other_losses), rel=1e-5)
    assert [step for step, _ in validation] == [step for step, _ in other_validation]
    assert dict(validation) == pytest.approx(dict(other_validation), rel=1e-5)
    for name in adapter:
        torch.testing.assert_close(adapter[name], other_adapter[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "world, how",
    [
        (2, ["--strategy", "ddp"]),
        (3, ["--strategy", "ddp", "--micro-batch-tokens", 200, "--batch-size", 2]),
        (2, ["--strategy", "fsdp", "--micro-batch-tokens", 200, "--checkpoint-activations"]),
        (3, ["--strategy", "fsdp"]),
        (3, ["--strategy", "fsdp", "--batch-size", 2]),
    ],
    ids=lambda how: " ".join(map(str, how)) if isinstance(how, list) else str(how),
)
def test_ranks_equal_a_single_process(forks, args, tmp_path, world, how):
    """The ranks have unequal shares of a batch, in one or more micro-batches.

    With batches of 2 examples on 3 ranks, one rank has no data.
    """
    results = Ranks(forks, world, train_command, [*args, *how]).results()
    assert [code for code, _, _ in results] == [0] * world, results
    assert f"over {world} ranks" in results[0][2] and "validation loss" in results[0][2]
    assert all(stdout == stderr == "" for _, stdout, stderr in results[1:])
    assert run(*args, *how[2:], "--out", tmp_path / "alone").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    losses, _, adapter = outcome(tmp_path / "run")
    assert adapter["gates"].abs().min() > 0.1 and losses[-1][1] < losses[0][1]  # training had an effect


def make_examples(number=23):
    lengths = torch.randint(4, 60, (number,), generator=torch.Generator().manual_seed(0)).tolist()
    return [make_example(list(range(length)), 2, i) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("number", [1, 2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_example_goes_to_one_rank(number, world):
    examples = make_examples(number)
    parts = split_over_ranks(examples, world)
    assert sorted(e.name for mine in parts for e in mine) == list(range(number))
    tokens = [sum(len(e.ids) for e in mine) for mine in parts]
    longest = max(len(e.ids) for e in examples)
    assert max(tokens) <= sum(tokens) / world + longest  # as even as whole examples allow
    assert sum(len(group_by_length(mine, 10_000)) for mine in parts) == sum(map(bool, parts))


def validation_loss(lengths):
    torch.set_num_threads(1)
    init_distributed()
    model = make_model("gqa")
    examples = [make_example(make_tokens(model, n, seed=n).tolist(), 2, n) for n in lengths]
    return train.mean_loss(model, make_adapter(model), examples, train.TrainConfig(micro_batch_tokens=30))


def test_validation_loss_is_bit_identical_for_any_world_size(forks):
    lengths = list(range(5, 22))
    losses = {loss for world in (2, 3) for loss in Ranks(forks, world, validation_loss, lengths).results()}
    model = make_model("gqa")
    examples = [make_example(make_tokens(model, n, seed=n).tolist(), 2, n) for n in lengths]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses.add(train.mean_loss(model, make_adapter(model), examples, train.TrainConfig(micro_batch_tokens=30)))
    torch.set_num_threads(threads)
    assert len(losses) == 1


def one_step(strategy):
    """Run one training step. Return a dict that describes what this rank communicates and stores.

    "numbers" maps each collective operation to the number of elements that it transfers. "adapter" and "layer" are the
    numbers of parameters of the adapter and of one layer. "here" is the number of elements of sharded layers on this
    rank. "gradients" lists the weights of the base that have a gradient. "state" is 0 if the adapter's parameters, and
    no others, have an optimizer state.
    """
    from torch.profiler import profile

    torch.set_num_threads(1)
    init_distributed()
    model, numbers = make_model("wide"), {}
    layer = sum(weight.numel() for weight in model.layers[0].parameters())
    if strategy == "fsdp":
        shard = fsdp_sharder(CPU)
        for block in model.layers:
            shard(block)
        shard(model)
    adapter = make_adapter(model)
    optimizer = train.make_optimizer(adapter, 0.0)
    examples = [make_example(make_tokens(model, n, seed=n).tolist(), 2, n) for n in (9, 11, 14, 20)]
    with profile(record_shapes=True) as profiler:
        train.train_step(model, adapter, optimizer, examples, 0.1, train.TrainConfig())
    for event in profiler.events():
        if event.name in ("gloo:all_reduce", "gloo:all_gather", "gloo:reduce_scatter", "gloo:broadcast"):
            number = sum(torch.Size(shape).numel() for shape in event.input_shapes)
            numbers[event.name] = numbers.get(event.name, 0) + number
    return {
        "numbers": numbers,
        "adapter": sum(p.numel() for p in adapter.parameters()),
        "layer": layer,
        "here": sum(w.to_local().numel() for w in model.layers.parameters() if isinstance(w, DTensor)),
        "gradients": [name for name, weight in model.named_parameters() if weight.grad is not None],
        "state": sum(len(optimizer.state[p]) > 0 for p in adapter.parameters()) - len(optimizer.state),
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_step_communicates_and_stores_no_more_than_it_needs(forks, strategy):
    """A step all-reduces the adapter's gradient, the loss, and a flag for lost ranks. FSDP also gathers layers."""
    for result in Ranks(forks, 2, one_step, strategy).results():
        assert result["gradients"] == [] and result["state"] == 0
        expected = {"gloo:all_reduce": result["adapter"] + 2}
        if strategy == "fsdp":
            assert result["here"] == 3 * result["layer"] / 2
            # 3 layers forward, the 2 adapted ones backward, and 1 that FSDP prefetches without need
            expected["gloo:all_gather"] = 6 * result["layer"] / 2
        assert result["numbers"] == expected


def no_data(rank):
    if rank == 1:

        def fail(path, images):
            raise FileNotFoundError(2, "No such file or directory", str(path))

        instructions.TASK = Task(fail)


def no_compiler(rank):
    def fail(device):
        raise ValueError("--compile needs a C++ compiler")

    train.prepare_to_compile = fail


def no_memory_for_the_base(rank):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    if rank == 1:
        train.load_model = fail


def no_room_for_the_folder(rank):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "run")

    if rank == 0:
        Path.mkdir = fail


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "spoil, more, message",
    [
        (no_data, [], "rank 1: {data}: No such file or directory"),
        (no_compiler, ["--compile"], "rank 0: --compile needs a C++ compiler"),
        (no_memory_for_the_base, [], "rank 1: out of memory: DefaultCPUAllocator: can't allocate memory"),
        (no_room_for_the_folder, [], "rank 0: run: No space left on device"),
        (None, ["--base", "nowhere"], "rank 0: nowhere: no such base model"),
        (None, ["--device", "cpu:0"], "rank 0: --device cpu:0: with several processes, each has its own device"),
        (None, ["--int8", "--strategy", "fsdp"], "rank 0: --bits and --compile need the whole base"),
    ],
)
def test_startup_error_of_one_rank_is_reported_once(forks, args, spoil, more, message, strategy):
    """The other ranks end without a message of their own, and no file is left behind."""
    results = Ranks(forks, 2, train_command, [*args, "--strategy", strategy, *more], spoil).results()
    (line,) = error_lines(results)
    assert line.startswith(f"error: {message.format(data=args[3])}")
    assert all(code in (2, 0, -signal.SIGTERM) for code, _, _ in results) and any(code == 2 for code, _, _ in results)
    assert "Traceback" not in results[0][2] + results[1][2]
    assert not args[5].exists() or [file.name for file in args[5].iterdir()] == []


def no_memory():
    raise torch.OutOfMemoryError("out of memory")


def out_of_memory_on_0(rank):
    spoil_step(rank, 0, no_memory)


def out_of_memory_on_1(rank):
    spoil_step(rank, 1, no_memory)


def killed_0(rank):
    spoil_step(rank, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_1(rank):
    spoil_step(rank, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminated(rank):
    spoil_step(rank, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupted(rank):
    spoil_step(rank, rank, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])


def full_disk(rank):
    """Make the first rank fail to write metrics from step 8 on."""

    def fill_up():
        def fail(path, line):
            raise OSError(28, "No space left on device", str(path))

        training.run.write_metrics = fail

    spoil_step(rank, 0, fill_up)


def not_a_number(rank):
    """Multiply the loss of one micro-batch on rank 1 by NaN."""
    cross_entropy, calls = train.chunked_cross_entropy, []

    def nan_once(*arguments):
        calls.append(1)
        return cross_entropy(*arguments) * (float("nan") if rank == 1 and len(calls) == 9 else 1)

    train.chunked_cross_entropy = nan_once


def spoil_step(rank, failing_rank, act, step=8):
    if rank == failing_rank:
        train.train_step = before_step(step, act)


@pytest.mark.parametrize(
    "strategy, spoil, cause, further",
    [
        ("ddp", out_of_memory_on_0, "rank 0: out of memory", "rank 1: another rank has ended"),
        ("ddp", out_of_memory_on_1, "rank 1: out of memory", "rank 0: another rank has ended"),
        ("fsdp", out_of_memory_on_1, "rank 1: out of memory", "rank 0: another rank has ended"),
        ("ddp", full_disk, "rank 0: {out}/metrics.jsonl: No space left", "rank 1: another rank has ended"),
        ("fsdp", killed_1, None, "rank 0: another rank has ended"),
        ("ddp", killed_0, None, "rank 1: another rank has ended"),
        ("fsdp", killed_0, None, "rank 1: another rank has ended"),
    ],
)
def test_failing_rank_ends_training_on_all_ranks(forks, args, tmp_path, strategy, spoil, cause, further):
    """The lowest remaining rank prints one line. The failing rank prints one with the cause, unless it was killed.

    The run can be resumed.
    """
    start = time.time()
    args = [*args, "--save-every", 5]
    results = Ranks(forks, 3, train_command, [*args, "--strategy", strategy], spoil).results()
    assert time.time() - start < 30
    lines = error_lines(results)
    if cause is not None:
        (reported,) = [line for line in lines if line.startswith(f"error: {cause.format(out=args[5])}")]
        lines.remove(reported)
    (line,) = lines
    assert line.startswith(f"error: {further} (") and "; to continue, add --resume" in line
    if "rank 1" in further:  # rank 1 does not know whether rank 0 has saved a checkpoint
        assert line.endswith(" auto")
    assert "Traceback" not in "".join(stderr for _, _, stderr in results)
    saved = 5 if spoil in (killed_0, full_disk) else 7
    assert torch.load(args[5] / "checkpoint.pt", weights_only=True)["progress"]["step"] == saved
    assert run(*args, "--resume").exit_code == 0
    assert run(*args, "--out", tmp_path / "alone").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def first_rank_finished(path):
    """Return whether the first rank had finished its block when this rank entered the block."""
    with process_group():
        with local_rank0_first():
            there = path.exists()
            if rank() == 0:
                time.sleep(0.5)
                path.touch()
        return there


def test_local_rank_0_goes_first(forks, tmp_path):
    assert Ranks(forks, 2, first_rank_finished, tmp_path / "made").results() == [False, True]


def slow_base(path, rank):
    """Delay the first rank's search for the base, as a download would. The second rank fails if it does not wait."""
    find_base = train.find_base

    def slow_find(base):
        if rank == 0:
            time.sleep(0.5)
            path.touch()
        elif not path.exists():
            raise ValueError("the base is not there yet")
        return find_base(base)

    train.find_base = slow_find


def test_base_is_downloaded_by_one_rank(forks, args, tmp_path):
    results = Ranks(forks, 2, train_command, args, partial(slow_base, tmp_path / "downloaded")).results()
    assert [code for code, _, _ in results] == [0, 0], results


def slow_to_finish(path, rank):
    """Delay the first rank's summary; the second rank fails if it exits before the summary is written."""
    if rank == 0:
        finish = training.run.Run.finish

        def slow_finish(run, scores):
            time.sleep(0.5)
            finish(run, scores)
            path.touch()

        training.run.Run.finish = slow_finish
    else:
        exit_run = train.Run.__exit__

        def checked_exit(*args):
            assert path.exists(), "a rank exited before the first rank had finished"
            return exit_run(*args)

        train.Run.__exit__ = checked_exit


def test_no_rank_exits_before_the_first_has_finished(forks, args, tmp_path):
    results = Ranks(forks, 2, train_command, args, partial(slow_to_finish, tmp_path / "finished")).results()
    assert [code for code, _, _ in results] == [0, 0], results


def killed_while_loading(rank):
    if rank == 1:
        train.load_model = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def test_rank_killed_before_the_first_step_ends_all_ranks(forks, args):
    """torchrun reports the kill; the other rank ends without a message."""
    results = Ranks(forks, 2, train_command, args, killed_while_loading).results()
    assert results[1][0] == -signal.SIGKILL and error_lines(results) == [] and "Traceback" not in results[0][2]


def other_data(rank):
    read = instructions.read
    if rank == 1:
        instructions.TASK = Task(lambda *a: read(*a)[:-1])


def other_micro_batches(rank):
    for_base = train.TrainConfig.for_base
    if rank == 1:
        train.TrainConfig.for_base = lambda self, *more: replace(for_base(self, *more), micro_batch_tokens=77)


@pytest.mark.parametrize("spoil, name", [(other_data, "data_hash"), (other_micro_batches, "micro_batch_tokens")])
def test_ranks_with_different_data_or_options_are_refused(forks, args, spoil, name):
    """The micro-batch size must be equal, because the micro-batches of the validation data are split over the ranks."""
    (line,) = error_lines(Ranks(forks, 2, train_command, args, spoil).results())
    assert line.startswith(f"error: rank 1: {name} is ") and "start all ranks with the same options" in line


def fake_evaluation(rank):
    def evaluate(model, tokenizer, adapter):
        print("examined")
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), adapter())
        return {"examined": rank}

    toys.TOYS["text"] = toys.TOYS["text"]._replace(evaluate=evaluate)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_toy_is_evaluated_after_training_on_ranks(forks, tiny_base, tmp_path, strategy):
    """All ranks evaluate with FSDP, and only the first one with DDP. Only the first one prints the result."""
    args = ["--base", tiny_base, "--toy", "text", "--layers", 2, "--out", tmp_path, "--epochs", 3, "--limit", 40]
    results = Ranks(
        forks, 2, train_command, [*args, "--device", "cpu", "--strategy", strategy], fake_evaluation
    ).results()
    assert [(code, stdout) for code, stdout, _ in results] == [(0, "examined\n"), (0, "")]
    assert json.loads((tmp_path / "summary.json").read_text())["examined"] == 0


def test_strategy_and_device_are_selected_per_rank(monkeypatch):
    """The strategy depends on the memory of a GPU, and each rank uses its own device."""
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    assert choose_strategy("auto", 71, gpu) == "ddp"  # a single rank
    monkeypatch.setattr("training.sharding.world_size", lambda: 2)
    monkeypatch.setattr("training.sharding.all_reduce_max", lambda number: number)
    assert [choose_strategy("auto", size, gpu) for size in (70, 71)] == ["ddp", "fsdp"]
    assert choose_strategy("auto", 71, CPU) == "ddp" and choose_strategy("fsdp", 1, CPU) == "fsdp"
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.6.0+cu124")
        with pytest.raises(ValueError, match="needs PyTorch 2.7 or later, but this is 2.6.0"):
            choose_strategy("auto", 71, gpu)

    monkeypatch.setattr("runtime.device.world_size", lambda: 2)
    monkeypatch.setattr("runtime.device.local_rank", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda name: None)
    monkeypatch.setattr("torch.empty", lambda size, device: torch.zeros(size))
    assert select_device("cpu")[0] == CPU and select_device("cuda")[0] == torch.device("cuda:3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert select_device("auto")[0] == CPU  # gloo cannot exchange tensors of Apple's GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert select_device("auto")[0] == torch.device("cuda:3")


def test_non_finite_loss_is_reported_by_one_rank(forks, args):
    results = Ranks(forks, 2, train_command, args, not_a_number).results()
    (line,) = error_lines(results)
    assert line.startswith("error: rank 0: after step 6: the loss (nan) or its gradient is not finite, for record ")
    assert "saved after step 6;" in line and results[0][0] == 2


@pytest.mark.parametrize(
    "spoil, code, message", [(terminated, 0, "stopped by SIGTERM"), (interrupted, 130, "interrupted")]
)
def test_signal_stops_all_ranks_and_a_different_world_size_can_resume(forks, args, tmp_path, spoil, code, message):
    """One rank gets SIGTERM, or each rank gets SIGINT twice: from Ctrl-C, and from torchrun, which forwards it."""
    results = Ranks(forks, 2, train_command, args, spoil).results()
    assert [result[0] for result in results] == [code, code]
    assert results[0][2].splitlines()[-1] == f"{message} after step 8: to continue, add --resume"
    assert results[1][2] == ""
    results = Ranks(forks, 3, train_command, [*args, "--resume", "--strategy", "fsdp"]).results()
    assert [result[0] for result in results] == [0, 0, 0]
    assert run(*args, "--out", tmp_path / "alone").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_changed_options_on_resume_are_reported_once(forks, args):
    assert Ranks(forks, 2, train_command, args, terminated).results()[0][0] == 0
    results = Ranks(forks, 2, train_command, [*args, "--resume", "--length", 4]).results()
    (line,) = error_lines(results)
    assert line.startswith("error: rank 0: ") and "length = 3, not 4" in line


def load_sharded(base):
    torch.set_num_threads(1)
    init_distributed()
    shard = fsdp_sharder(CPU)
    model, _ = load_llama(base, prepare_layer=shard)
    shard(model)
    unsharded, _ = load_llama(base)
    rows = make_tokens(unsharded, 2, 9)
    adapter = make_adapter(unsharded)
    with torch.no_grad():
        return torch.equal(model(rows, adapter()), unsharded(rows, adapter()))


def test_sharded_base_gives_the_same_logits(forks, tiny_base):
    assert Ranks(forks, 2, load_sharded, tiny_base).results() == [True, True]


def measure_loading(tiny_base, base):
    init_distributed()
    load_llama(tiny_base, prepare_layer=fsdp_sharder(CPU))  # allocates the libraries' own memory, which must not count
    (model, _), peak = peak_anonymous(lambda: load_llama(base, prepare_layer=fsdp_sharder(CPU)))
    return sum(weight.numel() * weight.element_size() for weight in model.parameters()), peak


def test_loading_a_sharded_base_holds_one_whole_layer_at_a_time(forks, tiny_base, large_base):
    """A rank (of two) holds half of the 10 layers, the layer that is being read, and memory that malloc keeps."""
    for size, peak in Ranks(forks, 2, measure_loading, tiny_base, large_base).results():
        assert 0.5 * size < peak < 0.85 * size


@pytest.mark.parametrize("ranks, printed", [("1", "done, cleared up"), ("2", "done, ")])
def test_rank_exits_without_cleanup(ranks, printed):
    """A rank flushes its output and keeps its exit code; a single process exits normally."""
    code = "import atexit, sys; from runtime.distributed import run_command; "
    code += "atexit.register(print, 'cleared up', end=''); print('done, ', end=''); run_command(lambda: sys.exit(3))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": ranks},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (3, printed), result.stderr


def test_torchrun_equals_a_single_process(args, tmp_path):
    """This test runs torchrun, which the other tests imitate. Without torchrun, --strategy fsdp is refused."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py", *map(str, args)]
    result = subprocess.run([*torchrun, "--strategy", "fsdp"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("wrote adapter.safetensors") == 1 and "fsdp over 2 ranks" in result.stderr
    assert run(*args, "--out", tmp_path / "alone").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    result = run(*args, "--out", tmp_path / "other", "--strategy", "fsdp")
    assert result.exit_code == 2 and "torchrun" in result.stderr
    Adapter.load(tmp_path / "run" / "adapter.safetensors")
