"""Several processes at one piece of work, as torchrun starts them. In a process alone all of this does nothing.

At a training run every rank holds the whole adapter and its optimizer, takes its share of every batch, and adds its
part of the gradient to that of the others; then all take the same step. That is data parallelism with nothing but the
adapter travelling. At answering every rank has a part of each layer (runtime/tensor_parallel.py), and all make the same
answer, which the first says.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import AllRanksError, error_line, launched_rank, memory_errors


def rank() -> int:
    """Which of the ranks this process is; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def init_distributed(timeout: timedelta | None = None) -> None:
    """Meet the other processes, if there are any. What lies on a GPU will go over NCCL, all else over gloo.

    So long a rank waits for another that lives; one that is gone is found out in any case.
    """
    if launched_rank()[1] > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


def destroy_distributed() -> None:
    """At an end that all ranks come to. After an error of one alone this would wait for the others, on a GPU."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_rank(code: int | None) -> NoReturn:
    """End the process; under torchrun at once, without PyTorch's own clearing up.

    There threads of a group that was split over may outlive it, and now and then abort a process whose work is done.
    """
    if launched_rank()[1] == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def rank_device(name: str) -> str:
    """The device of this rank, where "auto" and "cuda" mean one for each. Raises ValueError at one for all."""
    if world_size() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise ValueError(f"--device {name}: of several processes each has its own; say cuda, cpu or auto")
    return f"cuda:{local_rank()}"


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


class RankLostError(AllRanksError):
    """Another rank is gone."""


@contextmanager
def detect_lost_ranks():
    """Raises RankLostError where PyTorch says that a rank is gone, in whatever words it has for it."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise RankLostError(f"another rank has ended ({error_line(error)[:100]} ...)") from error
        raise


@contextmanager
def sync_errors():
    """Where any rank meets an error of input or memory in this block, all of them raise it, at its end."""
    if world_size() == 1:
        yield
        return
    line = None
    try:
        with memory_errors():
            yield
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        line = error_line(error)
    lines: list[str | None] = [None] * world_size()
    dist.all_gather_object(lines, line)
    for number, line in enumerate(lines):
        if line is not None:
            raise AllRanksError(line if lines.count(line) == world_size() else f"rank {number}: {line}")


def barrier() -> None:
    """Wait for all ranks."""
    with sync_errors():
        pass


def check_same_on_all_ranks(values: dict) -> None:
    """Raise ValueError, on all ranks, where one has another value than the first."""
    theirs = broadcast_from_rank0(lambda: values)
    with sync_errors():
        for name, value in theirs.items():
            if values[name] != value:
                raise ValueError(f"{name} is {values[name]} here, {value} on the first rank")


def broadcast_from_rank0(read: Callable):
    """What `read` returns on the first rank, on every rank; it may raise OSError or ValueError."""
    with sync_errors():
        value = [read() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def all_reduce_max(number: int) -> int:
    """The highest that any rank has."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place."""
    if world_size() > 1:
        all_reduce_max(0)  # if a rank is gone, this says so, over gloo; NCCL would wait for it
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextmanager
def first_rank_speaks():
    """The others print nothing."""
    with ExitStack() as stack:
        if rank() > 0:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


@contextmanager
def answering_ranks():
    """Meet the other processes, if there are any, and answer with them as one: the first alone speaks.

    What one of them is told, all are told, so errors of input are taken to be the same on all, and the first says them;
    where ranks may differ, as in what lies on their disks, `sync_errors` says whose it is.
    """
    if launched_rank()[1] == 1:
        yield
        return
    init_distributed(timeout=timedelta(days=1))  # they wait while somebody thinks at a terminal
    try:
        with detect_lost_ranks(), first_rank_speaks():
            yield
            barrier()  # nobody leaves while others are still at work
    except (ValueError, OSError) as error:
        raise error if isinstance(error, AllRanksError) else AllRanksError(error_line(error)) from None
    destroy_distributed()
