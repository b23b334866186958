"""Several processes (ranks) that work together, started by torchrun. With one process, collectives do nothing.

In training, every rank has the whole adapter and its optimizer, and processes its shard of every batch. The gradients
of the adapter are summed over the ranks, and all ranks take the same step. In generation, every rank has a shard of
each layer (runtime/tensor_parallel.py). All ranks compute the same response, and the first one prints it.

A rank that fails prints its error and exits with code 2; torchrun then ends the others. There is no barrier while an
exception propagates, because the other ranks may never reach it.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import NoReturn

import click
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import printable


def rank() -> int:
    """Return the index of this process, which is 0 for a single process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Return the index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched_world_size() -> int:
    """Return the number of processes that torchrun started. It is known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(timeout: timedelta | None = None) -> None:
    """Connect to the other ranks. GPU tensors travel over NCCL, all others over gloo.

    `timeout` limits how long a rank waits for another one that is alive; a rank that has ended is detected at once.
    Raises ValueError if the ranks cannot be reached.
    """
    try:
        nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timeout)
    except dist.DistError as error:
        raise ValueError(f"cannot connect to the other ranks: {error}") from None


@contextmanager
def process_group(timeout: timedelta | None = None):
    """Connect to the other ranks, if torchrun started several, for the duration of the block."""
    if launched_world_size() == 1:
        yield
        return
    init_distributed(timeout)
    yield
    dist.destroy_process_group()  # not after an error: on a GPU it would wait for ranks that are still computing


def run_command(command: click.Command, **options) -> NoReturn:
    """Run a click command, then end the process. With several ranks, the process skips PyTorch's cleanup.

    During that cleanup, threads of the process group could outlive the group, and abort a process that has finished.
    """
    try:
        command(**options)
    except SystemExit as end:
        if launched_world_size() == 1:
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code or 0)


def print_rank0(text: str) -> None:
    """Print lines to standard error, on the first rank only."""
    if rank() == 0:
        click.echo("\n".join(map(printable, text.split("\n"))), err=True)


# ---------------------------------------------------------------------------------------------------
# Collective operations: all ranks must call them in the same order


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_reduce_max(0)


@contextmanager
def local_rank0_first():
    """Run the block on the first rank of each machine, and then on the others, which reuse the files of the first."""
    if world_size() == 1:
        yield
        return
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def broadcast_from_rank0(read: Callable):
    """Call `read` on the first rank, and return its result on every rank."""
    value = [read() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def check_same_on_all_ranks(values: dict) -> None:
    """Raise ValueError on a rank whose values differ from those of the first rank."""
    expected = broadcast_from_rank0(lambda: values)
    for name, value in expected.items():
        if values[name] != value:
            where = f"{values[name]} here, but {value} on the first rank"
            raise ValueError(f"{name} is {where}; start all ranks with the same options and files")


def all_reduce_max(number: int) -> int:
    """Return the maximum over all ranks. It is computed over gloo, which detects a rank that has ended."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place."""
    if world_size() > 1:
        barrier()  # this detects a rank that has ended; NCCL would wait for it
        for tensor in tensors:
            dist.all_reduce(tensor)


# ---------------------------------------------------------------------------------------------------
# Lost ranks, and the output of ranks


def is_lost_rank(error: BaseException) -> bool:
    """Return True if PyTorch raised this error because another rank has ended."""
    if not isinstance(error, RuntimeError) or world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)


def is_first_to_report() -> bool:
    """Count a report of a lost rank in torchrun's store. Return True if it is the first, or the store is gone."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"lost rank reported {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # the store has ended with its host: torchrun or, if started without it, the first rank
        return True


@contextmanager
def first_rank_speaks():
    """Suppress the output of all ranks but the first."""
    with ExitStack() as stack:
        if rank() > 0:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


@contextmanager
def inference_ranks():
    """Connect the ranks for generation or scoring. Only the first rank prints, but any rank may print an error."""
    if launched_world_size() == 1:
        yield
        return
    with process_group(timeout=timedelta(days=1)), first_rank_speaks():  # the first rank may wait for a user
        yield
        barrier()  # no rank leaves while another still works
