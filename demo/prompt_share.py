"""The share of the prompts in the attention output of each adapted layer, at every token.

The output of gated attention is a sum, g A vp + W v: the term of the prompts, scaled by the gates, and the term of the
tokens, as in the frozen layer. Before Wo mixes the heads, each term is a vector of H*D numbers per token. The share of
the prompts is the norm of their term relative to the sum of both norms:

    share = |g A vp| / (|g A vp| + |W v|)

It is 0 if the gates are zero, and 1/2 if both terms have the same norm. It measures size, not effect: a short vector
may change the response, a long one may change nothing, and the two terms may point in opposite directions. To see the
effect, compare the response of the adapter with that of the base.

The notation is that of adapter.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapter import AdaptionPrompt, attend, prompt_attention
from model import LLaMA


def measuring_attention(shares: list[Tensor]) -> Callable[..., Tensor]:
    """Return an equivalent of `adapter.gated_attention` that also records the prompts' share of its output.

    Each call, one per adapted layer, appends this share (B, T) to `shares`.
    """

    def attention(q, k, v, prompt_k, prompt_v, gate, *mask_and_causal) -> Tensor:
        token_term = attend(q, k, v, *mask_and_causal)  # W v (B, H, T, D)
        prompt_term = prompt_attention(q, prompt_k, prompt_v, gate)  # g A vp (B, H, T, D)
        token_norm, prompt_norm = (x.float().norm(dim=(1, 3)) for x in (token_term, prompt_term))  # (B, T)
        shares.append(prompt_norm / (prompt_norm + token_norm))
        return token_term + prompt_term

    return attention


@torch.no_grad()
def prompt_shares(model: LLaMA, tokens: Tensor, adaption_prompts: Sequence[AdaptionPrompt]) -> Tensor:
    """Return the share of the prompts in the attention output, for token ids (B, T).

    The shares are (L, B, T) in float32, from 0 to 1, lowest adapted layer first. One forward pass measures a whole
    response, because a token attends to the same tokens as when it was generated. The attention function is an argument
    of the model's constructor. Therefore, a second model is created on the meta device, and the modules of the first
    one, quantized or not, are assigned to it.
    """
    shares: list[Tensor] = []
    with torch.device("meta"):
        measuring_model = LLaMA(model.config, measuring_attention(shares))
    measuring_model.tok_embeddings, measuring_model.norm = model.tok_embeddings, model.norm
    for block, original in zip(measuring_model.layers, model.layers):
        for name, module in original.attention.named_children():
            setattr(block.attention, name, module)
        for name in ("attention_norm", "ffn_norm", "feed_forward"):
            setattr(block, name, getattr(original, name))
    measuring_model.hidden_states(tokens, adaption_prompts)
    return torch.stack(shares)
