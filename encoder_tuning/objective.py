"""Loss and predictions of an encoder with a head, for each task.

The head maps final hidden states to logits:
    image classification    the class token, to classes
    text classification     <s>, to classes
    token classification    the first token of each word, to tags
    question answering      each token, to the start and the end of the answer

Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import IGNORE, group_by_length
from encoder_tuning.labeled import Labeled
from encoder_tuning.squad import NO_ANSWER, ContextWindow
from encoders.heads import HeadAdapter
from encoders.models import Roberta, ViT
from formats.roberta_tokenizer import RobertaTokenizer


def collate_labeled(examples: Sequence[Labeled]) -> tuple[Tensor, Tensor]:
    """Stack the examples into inputs and labels, padded on the right.

    Inputs are int64 ids (B, T), or float32 pixels (B, c, S, S). Labels are int64: (B, 1) classes, (B, 2) first and
    last positions of answers, or (B, T) tags, padded with IGNORE.
    """
    inputs = pad_sequence([example.inputs for example in examples], True, RobertaTokenizer.pad_id)
    labels = pad_sequence([torch.tensor(example.labels) for example in examples], True, IGNORE)
    return inputs, labels


def encoder_states(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Return the final hidden states (B, T, C) in float32, which are the input of the head."""
    weight = next(model.parameters())
    inputs = inputs.to(weight.device) if inputs.dtype == torch.long else inputs.to(weight.device, weight.dtype)
    return model.encode(inputs, adapter(dtype=weight.dtype)).float()


def class_scores(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Return the logits of the classes, (B, classes, 1)."""
    return adapter.head(encoder_states(model, adapter, inputs)[:, 0])[:, :, None]


def tag_scores(model: Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Return the logits of the tags at every token, (B, classes, T)."""
    return adapter.head(encoder_states(model, adapter, inputs)).transpose(1, 2)


def span_scores(model: Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Return the logits of the start and the end of the answer at every token, (B, T, 2); -inf at padding."""
    scores = adapter.head(encoder_states(model, adapter, inputs))
    return scores.masked_fill((inputs == model.config.pad_id).to(scores.device)[:, :, None], -torch.inf)


def label_loss(
    score: Callable[..., Tensor],
    model: ViT | Roberta,
    adapter: HeadAdapter,
    examples: Sequence[Labeled],
    checkpoint_activations: bool = False,
) -> Tensor:
    """Return the cross entropy, summed over the labels of the examples.

    `score` is class_scores, tag_scores or span_scores. Without examples, the loss is a zero that depends on all
    parameters of the adapter, so that their gradients are zero. `checkpoint_activations` is not used.
    """
    if not examples:
        return sum(parameter.sum() * 0 for parameter in adapter.parameters())
    inputs, labels = collate_labeled(examples)
    scores = score(model, adapter, inputs)  # (B, classes, labels); the classes of a span are the T positions
    return F.cross_entropy(scores, labels.to(scores.device), ignore_index=IGNORE, reduction="sum")


# Loss functions with the signature of train.response_loss.
class_loss = partial(label_loss, class_scores)
tag_loss = partial(label_loss, tag_scores)
span_loss = partial(label_loss, span_scores)
LOSSES = {  # keyed by task
    "image-classification": class_loss,
    "text-classification": class_loss,
    "token-classification": tag_loss,
    "question-answering": span_loss,
}


@torch.no_grad()
def classify(model: ViT | Roberta, adapter: HeadAdapter, examples: Sequence[Labeled], max_tokens: int) -> list[int]:
    """Return the index of the most likely class of each example, in the order of the examples.

    A batch has at most `max_tokens` positions, unless it is a single example.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    batches = [collate_labeled(group) for group in group_by_length(examples, max_tokens)]
    predictions = torch.cat([class_scores(model, adapter, inputs).argmax(dim=1) for inputs, _ in batches])[:, 0]
    return [best for _, best in sorted(zip(order, predictions.tolist()))]


@torch.no_grad()
def predict_tags(model: Roberta, adapter: HeadAdapter, examples: Sequence[Labeled], max_tokens: int) -> list[list[int]]:
    """Return the index of the most likely tag of each word that was not truncated, one list per example, in order.

    A batch has at most `max_tokens` positions, unless it is a single example.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    predictions = []
    for group in group_by_length(examples, max_tokens):
        inputs, labels = collate_labeled(group)
        best = tag_scores(model, adapter, inputs).argmax(dim=1).cpu()  # (B, T)
        predictions += [row[words].tolist() for row, words in zip(best, labels != IGNORE)]
    return [tags for _, tags in sorted(zip(order, predictions))]


@torch.no_grad()
def answer_squad(
    model: Roberta,
    adapter: HeadAdapter,
    windows: Sequence[ContextWindow],
    context: str,
    no_answer_threshold: float | None = None,
    max_answer_length: int = 30,
) -> str:
    """Return the text of the most likely span of at most `max_answer_length` tokens, over all windows of the context.

    Return "" if <s> outscores that span by more than `no_answer_threshold` in every window. If the threshold is None,
    every question gets an answer.
    """
    best, text, no_answer = -torch.inf, "", torch.inf
    for window in windows:
        begin, end = span_scores(model, adapter, torch.tensor([window.ids]))[0].unbind(dim=1)  # (T,) each
        # Windows without the answer give <s> a high score. The lowest score is that of the window with the answer.
        no_answer = min(no_answer, (begin[NO_ANSWER[0]] + end[NO_ANSWER[1]]).item())
        part = slice(window.first, window.first + len(window.offsets))
        pairs = begin[part, None] + end[None, part]  # (n, n), by first and last token of the span
        allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(max_answer_length - 1)
        pairs = pairs.masked_fill(~allowed, -torch.inf)
        if window.offsets and (score := pairs.max().item()) > best:
            first, last = divmod(pairs.argmax().item(), len(window.offsets))
            best, text = score, window.text(context, window.first + first, window.first + last)
    if no_answer_threshold is not None and no_answer - best > no_answer_threshold:
        return ""
    return text


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    return sum(map(int.__eq__, predicted, labels)) / len(labels)
