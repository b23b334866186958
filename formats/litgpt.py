"""litgpt from v0.5.5 on, which takes other rows of a layer's weights for the keys and values of prompts.

Its fused weight has the rows of q, then those of k, then those of v. Its adapter cuts the prompts' share as it did when
they lay group by group: for each key/value head the rows of its queries, one head's of k, one head's of v. So what is
called a key there is mostly a query or another head's. With one key/value head both orders are the same.
"""

import torch
from torch import Tensor

from adapter import Adapter
from formats.hugging_face import half_by_half
from model import Attention, Config, LLaMA


def key_and_value_rows(config: Config) -> tuple[Tensor, Tensor]:
    """Which rows of the fused weight, ((H + 2*Hkv) * D, C), are taken for a prompt's keys and values: Hkv*D each."""
    H, Hkv, D = config.n_heads, config.n_kv_heads, config.head_dim
    rows = torch.arange((H + 2 * Hkv) * D).view(Hkv, H // Hkv + 2, D)
    return rows[:, -2].flatten(), rows[:, -1].flatten()


def from_litgpt_rows(adapter: Adapter, model: LLaMA) -> Adapter:
    """The adapter with prompts whose keys and values are here what those in its file were in litgpt.

    For each there are 2*Hkv*D numbers to meet with C, so it takes grouped queries; ValueError where it cannot be.
    """
    config, layers = model.config, len(adapter.prompts)
    adapter.check_base(layers=config.n_layers, dim=config.dim, heads=config.n_heads)
    if config.qkv_bias or config.qk_norm:
        raise ValueError("--litgpt-rows is for LLaMA's attention, without biases and norms of q and k")
    if "lit-llama" not in adapter.metadata.get("imported_from", ""):
        raise ValueError("--litgpt-rows is for files of litgpt, and this is none")
    for i, (prompts, block) in enumerate(zip(adapter.prompts.data, model.layers[-layers:])):
        if config.n_kv_heads > 1:
            found, error = equivalent_prompts(prompts, block.attention, config)
            if error > 1e-3:
                raise ValueError(
                    f"layer {config.n_layers - layers + i}: the nearest prompts to what litgpt's rows make are off by "
                    f"{error:.0%}: {2 * config.n_kv_heads * config.head_dim} numbers to meet with {config.dim}; a file "
                    "of lit-llama, or of litgpt before v0.5.5, needs no --litgpt-rows"
                )
            prompts.copy_(found)
    adapter.metadata["imported_from"] = adapter.metadata["imported_from"].replace(
        "lit-llama, or litgpt before v0.5.5", "litgpt from v0.5.5 on"
    )
    return adapter


def equivalent_prompts(prompts: Tensor, attention: Attention, config: Config) -> tuple[Tensor, float]:
    """Prompts (K, C) that a layer's wk and wv make of what litgpt's rows make of these, and how far off they are,
    relatively."""
    wq, wk = (half_by_half(linear.weight, config.head_dim) for linear in (attention.wq, attention.wk))
    fused = torch.cat([wq, wk, attention.wv.weight]).double()  # ((H + 2*Hkv) * D, C)
    own = fused[-2 * config.n_kv_heads * config.head_dim :]  # of wk and wv, (2*Hkv*D, C)
    wanted = fused[torch.cat(key_and_value_rows(config))] @ prompts.double().T  # (2*Hkv*D, K)
    found = torch.linalg.lstsq(own, wanted).solution  # (C, K)
    return found.T.to(prompts.dtype), ((own @ found - wanted).norm() / wanted.norm()).item()
