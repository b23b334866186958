"""The pretraining loop of the toy's two models and of the small RoBERTa in the experiments."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the learning rate of a step from 0 to total - 1: the smaller one of a linear warm-up and a cosine decay.

    The warm-up rises from 0 to `peak` in `warmup` steps. The cosine falls from `peak` to `floor * peak` over all steps.
    """
    return peak * min(step / warmup, floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, so that the order of summation and the resulting model do not depend on the number of cores.

    On an idle machine, a second thread would make training of such small models a quarter faster. On a busy machine,
    two threads wait for each other and are slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pretrain(
    parameters: Iterable[nn.Parameter],
    loss_fn: Callable[[int], Tensor],
    learning_rate: Callable[[int], float],
    *,
    steps: int,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float | None = None,
    desc: str,
) -> list[float]:
    """Take `steps` steps of AdamW, and return their losses.

    `loss_fn` and `learning_rate` are called with the number of the step, which starts at 0. `clip` is the maximum norm
    of the gradient; `desc` is the label of the progress bar.
    """
    parameters = list(parameters)
    losses = []
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    bar = tqdm(range(steps), desc=desc, unit="step", file=sys.stderr)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = loss_fn(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses
