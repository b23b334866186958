"""Cross entropy of many positions and a large vocabulary in little memory."""

import torch
from torch import Tensor

ROWS = {"cpu": 256, "cuda": 1024}  # positions whose logits are in memory at a time


class ChunkedCrossEntropy(torch.autograd.Function):
    """Few rows of logits at a time, and the gradient taken while they are at hand.

    By a row's logits it is softmax - 1 at the target, softmax elsewhere.
    """

    @staticmethod
    def forward(context, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        number = ROWS.get(hidden.device.type, ROWS["cpu"])
        for rows, right in zip(hidden.split(number), targets[:, None].split(number)):
            log_p = (rows @ head.T).log_softmax(dim=1, dtype=torch.float32)  # (number, V)
            total -= log_p.gather(1, right).sum()
            if context.needs_input_grad[0]:
                by_logits = log_p.exp_().scatter_add_(1, right, -torch.ones_like(log_p[:, :1]))  # (number, V)
                gradients.append(by_logits.to(head.dtype) @ head)  # (number, C)
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(context, scale: Tensor):
        return scale * torch.cat(context.saved_tensors), None, None


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, summed over R positions, of hidden states (R, C) through an output head (V, C); targets (R,).

    The same as `F.cross_entropy(hidden @ head.T, targets, reduction="sum")`, the softmax in float32; but with 32,000
    tokens and more the logits of a whole batch, and the gradient by them, would take gigabytes. The head gets no
    gradient.
    """
    return ChunkedCrossEntropy.apply(hidden, head, targets)
