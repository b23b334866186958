"""Adapters with a head, for frozen encoders (section 3.4 of the paper). Notation as in adapter.py."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapter import Adapter
from encoders.models import MLP_ACTIVATIONS, Roberta, ViT, make_mlp
from runtime.files import parse_json
from runtime.schema import whole_number


class HeadAdapter(Adapter):
    """An Adapter with a head for an encoder. The head is an MLP of these `widths`, from C to the number of outputs."""

    def __init__(
        self, *, widths: Sequence[int], head_activation="tanh", generator: torch.Generator | None = None, **dimensions
    ):
        super().__init__(generator=generator, **dimensions)
        self.head = make_mlp(widths, head_activation, generator)
        self.metadata["head_activation"] = head_activation

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "HeadAdapter":
        weights = [tensors[name] for name in ("head.0.weight", "head.2.weight") if name in tensors]
        if not weights:
            raise ValueError("has no head, so it is not an adapter for an encoder")
        if any(weight.dim() != 2 or 0 in weight.shape for weight in weights):
            shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
            raise ValueError(f"the weights of its head have the shapes {shapes}; expected non-empty matrices")
        for name, default, least in (("max_seq_len", 512, 1), ("stride", 0, 0), ("unanswerable", 0, 0)):
            whole_number(name, metadata.get(name, str(default)), least, 2**31 - 1)
        classes = parse_json(metadata.get("classes", "[]"), "its classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not a list of names")
        if classes and len(classes) != len(weights[-1]):
            raise ValueError(f"names {len(classes)} classes, but its head has {len(weights[-1])} outputs")
        widths, activation = [weights[0].shape[1], *map(len, weights)], metadata.get("head_activation", "tanh")
        if widths[0] != tensors["prompts"].shape[2]:
            raise ValueError(
                f"its head has width {widths[0]}, but its prompts have width {tensors['prompts'].shape[2]}"
            )
        if activation not in MLP_ACTIVATIONS:
            raise ValueError(f"head_activation is {activation!r}; expected one of {list(MLP_ACTIVATIONS)}")
        return super().from_tensors(tensors, metadata, widths=widths, head_activation=activation)


def head_adapter(
    model: ViT | Roberta,
    own_head: nn.Sequential | None,
    outputs: int,
    *,
    layers: int,
    length: int,
    generator: torch.Generator | None = None,
) -> HeadAdapter:
    """Create an adapter for an encoder, with zero gates.

    The head is `own_head`, the encoder's own head, if it has `outputs` outputs; otherwise it is a new linear layer.
    `own_head` is not copied: training the adapter changes it.
    """
    C, heads = model.config.dim, model.config.n_heads
    dimensions = {"layers": layers, "length": length, "dim": C, "heads": heads, "widths": [C, outputs]}
    adapter = HeadAdapter(generator=generator, **dimensions).to(next(model.parameters()).device)
    if own_head is not None and own_head[-1].out_features == outputs:
        adapter.head = own_head
        if any(isinstance(module, nn.GELU) for module in own_head):
            adapter.metadata["head_activation"] = "gelu"
    return adapter
