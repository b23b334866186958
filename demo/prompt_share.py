"""How much of a layer's attention output comes from the prompts, at every token.

Zero-init attention is a sum, g A vp + W v: what the prompts say, through the gates, and what the tokens say, as in the
frozen layer. Each term is a vector of H*D numbers at every token, all heads side by side, before Wo mixes them. The
share of the prompts is how long theirs is, of both lengths together:

    share = |g A vp| / (|g A vp| + |W v|)

0 is the frozen layer, 1/2 says that both are equally long. It is a measure of size, not of effect: a short vector may
turn a response, a long one may change nothing, and the two may point against each other. That a share is large says
where the adapter speaks loudly; whether it says what matters, the base's response beside the adapter's shows.

Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapter import AdaptionPrompt, attend, prompt_attention
from model import LLaMA


def measuring_attention(shares: list[Tensor]) -> Callable[..., Tensor]:
    """`adapter.gated_attention`, which also adds to `shares`, at every adapted layer, the prompts' share (B, T)."""

    def attention(q, k, v, prompt_k, prompt_v, gate, *mask_and_causal) -> Tensor:
        over_tokens = attend(q, k, v, *mask_and_causal)  # W v (B, H, T, D)
        over_prompts = prompt_attention(q, prompt_k, prompt_v, gate)  # g A vp (B, H, T, D)
        of_tokens, of_prompts = (x.float().norm(dim=(1, 3)) for x in (over_tokens, over_prompts))  # (B, T)
        shares.append(of_prompts / (of_prompts + of_tokens))
        return over_tokens + over_prompts

    return attention


@torch.no_grad()
def prompt_shares(model: LLaMA, tokens: Tensor, adaption_prompts: Sequence[AdaptionPrompt]) -> Tensor:
    """The share of the prompts in [0, 1], (L, B, T) in float32, lowest adapted layer first; one forward of (B, T) ids.

    A response that is there is read again, all of it at once: by causality every token sees what it saw when it was
    made. A model's attention is chosen when it is made, so a second one is made here, without memory, and gets the
    modules of the first one, whatever their weights are stored in.
    """
    shares: list[Tensor] = []
    with torch.device("meta"):
        twin = LLaMA(model.config, measuring_attention(shares))
    twin.tok_embeddings, twin.norm = model.tok_embeddings, model.norm
    for block, original in zip(twin.layers, model.layers):
        for name, module in original.attention.named_children():
            setattr(block.attention, name, module)
        for name in ("attention_norm", "ffn_norm", "feed_forward"):
            setattr(block, name, getattr(original, name))
    twin.hidden_states(tokens, adaption_prompts)
    return torch.stack(shares)
