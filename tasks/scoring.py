"""Log-likelihoods of continuations. Each context is processed once for all of its continuations."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from adapter import AdaptionPrompt
from generate import concat_adaption_prompts, prefill
from model import KVCache, LLaMA

Scored = tuple[float, bool]  # log p(continuation | context), in nats, and whether greedy decoding would generate it


@torch.inference_mode()
def score_continuations(
    model: LLaMA,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    adaption_prompts: Sequence[Sequence[AdaptionPrompt]],
    batch_size: int,
    bar: tqdm,
) -> list[Scored]:
    """Score each continuation after its context, with its own adaption prompts.

    All three lists, and the result, have one entry per continuation, in the same order. No context or continuation may
    be empty. Contexts are batched by length, and the continuations after the contexts of one batch again by length.
    Equal contexts whose adaption prompts are the same object are processed once. The bar advances by the number of
    continuations.
    """
    by_context = defaultdict(list)  # the indices of the continuations of each distinct context
    for i, (context, own) in enumerate(zip(contexts, adaption_prompts)):
        by_context[tuple(context), id(own)].append(i)
    scored: list[Scored | None] = [None] * len(continuations)
    for batch in in_batches(by_context, batch_size, length=lambda key: len(key[0])):
        rows = [list(ids) for ids, _ in batch]
        row_prompts = concat_adaption_prompts([adaption_prompts[by_context[key][0]] for key in batch])
        cache = KVCache(model, batch=len(rows), capacity=len(rows[0]))
        logits = prefill(model, rows, row_prompts, cache)  # (contexts, V)
        pairs = [(row, i) for row, key in enumerate(batch) for i in by_context[key]]
        for part in in_batches(pairs, batch_size, length=lambda pair: len(continuations[pair[1]])):
            index = torch.tensor([row for row, _ in part], device=model.device)  # (R,)
            ids = [continuations[i] for _, i in part]
            scores = score_rows(model, logits[index], select_rows(row_prompts, index), cache, index, ids)
            for (_, i), result in zip(part, scores):
                scored[i] = result
            bar.update(len(part))
    return scored


def in_batches(items: Iterable, size: int, length: Callable) -> Iterator[list]:
    """Yield batches of items, longest first, so that an out-of-memory error occurs at the start."""
    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def score_rows(
    model: LLaMA,
    logits: Tensor,
    adaption_prompts: Sequence[AdaptionPrompt],
    cache: KVCache,
    rows: Tensor,
    continuations: Sequence[Sequence[int]],
) -> list[Scored]:
    """Score R continuations, which are sorted longest first.

    `rows` (R,), in int64, are the rows of the cache that contain the contexts of the continuations. `logits` (R, V) are
    the logits after each context. The adaption prompts are those of the R continuations, or shared by all.
    """
    T, device = len(continuations[0]), model.device
    ids = torch.tensor([[*ids] + [0] * (T - len(ids)) for ids in continuations], device=device)  # (R, T)
    lengths = torch.tensor([len(ids) for ids in continuations], device=device)  # (R,)
    later = torch.arange(1, T, device=device) < lengths[:, None]  # (R, T - 1): neither the first token nor padding
    log_p = torch.zeros(ids.shape, device=device)  # (R, T)
    greedy = torch.ones_like(ids, dtype=torch.bool)  # (R, T)
    log_p[:, 0], greedy[:, 0] = token_scores(logits, ids[:, 0])
    if T > 1:
        longer = cache.longer_copy(cache.capacity + T - 1, rows)
        hidden = model.hidden_states(ids[:, :-1], adaption_prompts, longer)[later]  # (tokens, C)
        parts = zip(hidden.split(1024), ids[:, 1:][later].split(1024))  # all logits at once would need much memory
        scores = [token_scores(model.output(part), predicted) for part, predicted in parts]
        log_p[:, 1:][later], greedy[:, 1:][later] = map(torch.cat, zip(*scores))
    return list(zip(log_p.sum(1).tolist(), greedy.all(1).tolist()))


def token_scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p (R,) of ids (R,) under logits (R, V), in nats, and a mask (R,) of the ids that are the argmax."""
    log_p = logits.float().log_softmax(dim=1).gather(1, ids[:, None]).squeeze(1)
    return log_p, logits.argmax(dim=1) == ids


def select_rows(adaption_prompts: Sequence[AdaptionPrompt], rows: Tensor) -> Sequence[AdaptionPrompt]:
    """Return the adaption prompts of rows (R,) of a batch. If the batch shares them, they are returned unchanged."""
    if not adaption_prompts or len(adaption_prompts[0].gate) == 1:
        return adaption_prompts
    return [AdaptionPrompt(embeddings[rows], gate[rows]) for embeddings, gate in adaption_prompts]
