"""Whether weights are those that were seen before."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    """Of their values, rounded to bfloat16, so that it is the same in whatever dtype they are held."""
    rounded = torch.cat([tensor.detach().flatten().to("cpu", torch.bfloat16) for tensor in tensors])
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]
