"""Memory-efficient cross entropy for many positions and a large vocabulary."""

import torch
from torch import Tensor

ROWS = {"cpu": 256, "cuda": 1024}  # number of positions whose logits are in memory at a time


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy, computed for ROWS positions at a time, with its gradient in the forward pass.

    The gradient with respect to a row of logits is softmax - 1 at the target, and softmax elsewhere.
    """

    @staticmethod
    def forward(context, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        number = ROWS.get(hidden.device.type, ROWS["cpu"])
        for rows, target in zip(hidden.split(number), targets[:, None].split(number)):
            log_p = (rows @ head.T).log_softmax(dim=1, dtype=torch.float32)  # (number, V)
            total -= log_p.gather(1, target).sum()
            if context.needs_input_grad[0]:
                grad_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(log_p[:, :1]))  # (number, V)
                gradients.append(grad_logits.to(head.dtype) @ head)  # (number, C)
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(context, scale: Tensor):
        return scale * torch.cat(context.saved_tensors), None, None


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy, summed over R positions, as a float32 scalar.

    hidden (R, C) are the hidden states, head (V, C) is the weight of the output head, and targets (R,) are token ids.
    The result equals `F.cross_entropy(hidden @ head.T, targets, reduction="sum")` with the softmax in float32. With a
    vocabulary of 32,000 or more, F.cross_entropy would take gigabytes for the logits of a batch and their gradient. The
    head gets no gradient.
    """
    return ChunkedCrossEntropy.apply(hidden, head, targets)
