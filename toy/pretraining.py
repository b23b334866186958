"""The pre-training loop of the project: of the toy's two models here, and of experiments' small RoBERTa."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from formats.tensors import load_pth, named
from runtime.files import atomic_write

SAVE_EVERY = 200  # steps


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Of step 0 .. total-1: a line up from zero to `peak` over `warmup` steps, or, where that is less, half a cosine.

    The cosine goes down over all the steps, from `peak` to `floor` times as much.
    """
    return peak * min(step / warmup, floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """So that sums are added up in the same order, and the same model comes out, on any number of cores.

    Models this small gain a quarter from a second thread; beside other work the two wait for each other, and are slower
    than one alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pretrain(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    learning_rate: Callable[[int], float],
    *,
    steps: int,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float | None = None,
    desc: str,
    kept: Path | None = None,
) -> None:
    """As many AdamW steps.

    `loss_of` and `learning_rate` are asked with the step, from 0, when its turn comes. `clip` is the highest norm of a
    gradient; `desc` stands before the progress bar. `kept` is a file that a run which was stopped goes on from.
    """
    parameters, first = list(parameters), 0
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    if kept is not None and kept.exists():
        first = load_progress(kept, parameters, optimizer)
    bar = tqdm(range(first, steps), desc=desc, initial=first, total=steps, unit="step", file=sys.stderr)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = loss_of(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if kept is not None and (step + 1) % SAVE_EVERY == 0:
            save_progress(kept, parameters, optimizer, step + 1)


def save_progress(kept: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """All that `load_progress` needs."""
    with atomic_write(kept) as temporary:
        torch.save({"parameters": parameters, "optimizer": optimizer.state_dict(), "steps": steps}, temporary)


def load_progress(kept: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Fill both; returns the number of steps taken. Raises ValueError where the file is no such thing."""
    known = load_pth(kept)
    with torch.no_grad(), named(kept):
        for parameter, value in zip(parameters, known["parameters"], strict=True):
            parameter.copy_(value)
        optimizer.load_state_dict(known["optimizer"])
    return known["steps"]
