"""The pre-training loop of the project: of the toy's two models here, and of experiments' small RoBERTa."""

import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Of step 0 .. total-1: a line up from zero to `peak` over `warmup` steps, or, where that is less, half a cosine.

    The cosine goes down over all the steps, from `peak` to `floor` times as much.
    """
    return peak * min(step / warmup, floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2)


def pretrain(
    parameters: Iterable[nn.Parameter],
    losses: Iterable[Tensor],
    learning_rate: Callable[[int], float],
    *,
    steps: int,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float | None = None,
    desc: str,
) -> None:
    """An AdamW step for each of the losses, of which there are `steps`.

    They are a generator: each is computed when its turn comes, with the parameters as they are then. `learning_rate` is
    asked with the step, from 0; `clip` is the highest norm of a gradient; `desc` stands before the progress bar.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    bar = tqdm(losses, desc=desc, total=steps, unit="step", file=sys.stderr)
    for step, loss in enumerate(bar):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
