"""One step of tuning: the loss of a batch, its gradient, and what the optimizer does with it.

Nothing here knows of files or commands. Notation as in adapter.py.
"""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from adapter import Adapter, Prompt
from data import IGNORE, Batch, Tokens, micro_batches, response_tokens, shares
from model import LLaMA
from training.distributed import all_reduce_sum, rank, world_size


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Of step 0 .. total-1: up in a line over `warmup` steps, then down to zero along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# AdamW moves a number by about the learning rate in each step, however large it is. What suits the prompts would throw
# over the projection of images, or a head, whose weights are far smaller.
LINEAR_SCALE = 0.1


def make_optimizer(adapter: Adapter, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the adapter alone; no decay for the gates, which it would pull shut.

    The `scale` of a group is what its learning rate is multiplied by.
    """
    groups = [
        {"params": [adapter.prompts], "weight_decay": weight_decay, "scale": 1.0},
        {"params": [adapter.gates], "weight_decay": 0.0, "scale": 1.0},
    ]
    linear = [p for p in adapter.parameters() if p is not adapter.prompts and p is not adapter.gates]
    if linear:
        groups.append({"params": linear, "weight_decay": weight_decay, "scale": LINEAR_SCALE})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


class HeadLoss(torch.autograd.Function):
    """Cross entropy, summed, of hidden states (R, C) through the frozen output head (V, C) with answers (R,).

    Few rows at a time: with 32,000 words and more, the logits of a whole batch in float32, and the gradient by
    them, would take gigabytes. So the gradient is taken while a row's logits are at hand: by the logits it is
    softmax - 1 at the answer, softmax elsewhere.
    """

    ROWS = 256

    @staticmethod
    def forward(context, hidden: Tensor, head: Tensor, answers: Tensor) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for rows, right in zip(hidden.split(HeadLoss.ROWS), answers[:, None].split(HeadLoss.ROWS)):
            log_p = (rows @ head.T).log_softmax(dim=1, dtype=torch.float32)  # (ROWS, V)
            total -= log_p.gather(1, right).sum()
            if context.needs_input_grad[0]:
                p = log_p.exp_()
                gradients.append(
                    p.scatter_add_(1, right, -torch.ones_like(p[:, :1])).to(head.dtype) @ head
                )  # (ROWS, C)
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(context, scale: Tensor):
        return scale * torch.cat(context.saved_tensors), None, None


def prompts_for(batch: Batch, adapter: Adapter, dtype: torch.dtype) -> list[Prompt]:
    """The adapter's, each row's shifted by its image if any row has one."""
    if batch.features is None:
        return adapter(dtype=dtype)
    device = adapter.gates.device
    return adapter(adapter.condition(batch.features.to(device), batch.seen.to(device)), dtype=dtype)


def states_and_answers(
    model: LLaMA, prompts: Sequence[Prompt], batch: Batch, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """What the output head reads at the response tokens, (R, C), and what should come of it, (R,)."""
    device = model.tok_embeddings.weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    learnt = targets != IGNORE  # (B, T), R of them
    hidden = model.hidden_states(inputs, prompts, wanted=learnt, shared=batch.shared, recompute=recompute)
    return hidden, targets[learnt]


def loss_sum(model: LLaMA, prompts: Sequence[Prompt], batch: Batch, recompute: bool = False) -> Tensor:
    """Cross entropy summed over the response tokens; the last layer and the output head see only these."""
    hidden, answers = states_and_answers(model, prompts, batch, recompute)
    return HeadLoss.apply(hidden, model.output.weight, answers)


# A rank out of work goes through the model with the others all the same, which may have to gather its layers.
IDLE = Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE), shared=0)


class Responses:
    """What a LLaMA learns: the tokens of responses. heads.Labels is what an encoder learns."""

    def learnt(self, examples: Sequence[Tokens]) -> int:
        """Over so many numbers of these examples the loss is a mean."""
        return response_tokens(examples)

    def batches(self, examples: Sequence[Tokens], max_tokens: int) -> list[Batch]:
        return list(micro_batches(examples, max_tokens))

    def loss_sum(self, model: LLaMA, adapter: Adapter, batch: Batch | None, recompute: bool = False) -> Tensor:
        """The loss, summed over what is learnt; None is for a rank out of work."""
        batch = IDLE if batch is None else batch
        return loss_sum(model, prompts_for(batch, adapter, model.tok_embeddings.weight.dtype), batch, recompute)


RESPONSES = Responses()


def accumulate_gradient(
    model: nn.Module,
    adapter: Adapter,
    examples: list[Tokens],
    max_tokens: int,
    recompute: bool = False,
    objective: Responses = RESPONSES,
) -> float:
    """Add the gradient of the mean loss over all response tokens (or labels) of a batch; return that loss.

    Dividing by the tokens of the whole batch, not of each part, makes the parts' gradients
    add up to the gradient of one big batch, however it is split, and over however many ranks.
    """
    learnt = objective.learnt(examples)
    loss = torch.zeros((), device=next(adapter.parameters()).device)
    parts = [objective.batches(share, max_tokens) for share in shares(examples, world_size())]
    rounds, mine = max(map(len, parts)), parts[rank()]
    for batch in mine + [None] * (rounds - len(mine)):
        part = objective.loss_sum(model, adapter, batch, recompute) / learnt
        part.backward()
        loss += part.detach()
    for parameter in adapter.parameters():
        if parameter.grad is None:  # the projection's, where there was no image
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum([loss, *(parameter.grad for parameter in adapter.parameters())])
    return loss.item()


@torch.no_grad()
def mean_loss(
    model: nn.Module, adapter: Adapter, examples: list[Tokens], max_tokens: int, objective: Responses = RESPONSES
) -> float:
    """Mean loss over all that is learnt of the examples, the same to the last bit on any number of ranks."""
    batches = objective.batches(examples, max_tokens)
    losses = torch.zeros(math.ceil(len(batches) / world_size()) * world_size(), device=next(adapter.parameters()).device)
    batches += [None] * (len(losses) - len(batches))
    for i in range(rank(), len(batches), world_size()):
        losses[i] = objective.loss_sum(model, adapter, batches[i])
    all_reduce_sum([losses])
    return sum(losses.tolist()) / objective.learnt(examples)


def update(
    model: nn.Module,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    examples: list[Tokens],
    lr: float,
    max_tokens: int,
    recompute: bool = False,
    objective: Responses = RESPONSES,
) -> float:
    """One optimizer step; returns the loss before it.

    Raises FloatingPointError where the loss, its gradient or the new parameters are not finite. After that, as after
    any error, parameters and optimizer are as before.
    """
    parameters = list(adapter.parameters())
    before = [parameter.detach().clone() for parameter in parameters], deepcopy(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    try:
        loss = accumulate_gradient(model, adapter, examples, max_tokens, recompute, objective)
        finite = math.isfinite(loss) and all(parameter.grad.isfinite().all() for parameter in parameters)
        if finite:
            optimizer.step()
            finite = all(parameter.isfinite().all() for parameter in parameters)
        if not finite:
            names = ", ".join(dict.fromkeys(example.name for example in examples))
            raise FloatingPointError(f"a loss of {loss} led to values that are not finite, from {names}")
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before[0]):
                parameter.copy_(value)
        optimizer.load_state_dict(before[1])
        raise
    finally:
        optimizer.zero_grad()
    return loss
