"""The pretraining loop of the project, for the toy's two models and the small RoBERTa of the experiments."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm


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
) -> list[float]:
    """Take AdamW steps, and return the losses.

    `loss_of` and `learning_rate` are called with the step, from 0. `clip` is the maximum norm of a gradient; `desc` is
    the label of the progress bar.
    """
    parameters = list(parameters)
    losses = []
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    bar = tqdm(range(steps), desc=desc, unit="step", file=sys.stderr)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = loss_of(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses
