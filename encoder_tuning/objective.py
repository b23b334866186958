"""What encoders learn with their heads, what they answer, and how right that is.

image classification    the class token's state to classes
text classification     the state of <s> to classes
token classification    each word's first token's state to tags
question answering      each token's state to how well the answer begins and ends there

Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import IGNORE, group_by_length
from encoder_tuning.labelled import Labelled
from encoder_tuning.squad import NO_ANSWER, ContextWindow
from encoders.heads import HeadAdapter
from encoders.models import Roberta, ViT
from formats.roberta_tokenizer import RobertaTokenizer


def collate_labelled(examples: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
    """Pad the examples to inputs and labels.

    Inputs are ids (B, T), padded on the right, or pixels (B, c, S, S). Labels are (B, 1), (B, 2), or (B, T),
    padded with IGNORE.
    """
    inputs = pad_sequence([example.inputs for example in examples], True, RobertaTokenizer.pad_id)
    labels = pad_sequence([torch.tensor(example.labels) for example in examples], True, IGNORE)
    return inputs, labels


def encoder_states(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """What the head reads, (B, T, C) in float32."""
    weight = next(model.parameters())
    inputs = inputs.to(weight.device) if inputs.dtype == torch.long else inputs.to(weight.device, weight.dtype)
    return model.encode(inputs, adapter(dtype=weight.dtype)).float()


def class_scores(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Of every class, (B, classes, 1)."""
    return adapter.head(encoder_states(model, adapter, inputs)[:, 0])[:, :, None]


def tag_scores(model: Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Of every tag at every token, (B, classes, T)."""
    return adapter.head(encoder_states(model, adapter, inputs)).transpose(1, 2)


def span_scores(model: Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """How well the answer begins and ends at every token, (B, T, 2); -inf where there is padding."""
    scores = adapter.head(encoder_states(model, adapter, inputs))
    return scores.masked_fill((inputs == model.config.pad_id).to(scores.device)[:, :, None], -torch.inf)


def label_loss(
    score: Callable[..., Tensor],
    model: ViT | Roberta,
    adapter: HeadAdapter,
    examples: Sequence[Labelled],
    checkpoint_activations: bool = False,
) -> Tensor:
    """Cross entropy, summed over the labels: a class, the ends of a span, or tags. No examples: a zero with a graph."""
    if not examples:
        return sum(parameter.sum() * 0 for parameter in adapter.parameters())
    inputs, labels = collate_labelled(examples)
    scores = score(model, adapter, inputs)  # (B, classes or T, labels)
    return F.cross_entropy(scores, labels.to(scores.device), ignore_index=IGNORE, reduction="sum")


# As train.response_loss.
class_loss = partial(label_loss, class_scores)
tag_loss = partial(label_loss, tag_scores)
span_loss = partial(label_loss, span_scores)
LOSSES = {  # by task
    "image-classification": class_loss,
    "text-classification": class_loss,
    "token-classification": tag_loss,
    "question-answering": span_loss,
}


@torch.no_grad()
def classify(model: ViT | Roberta, adapter: HeadAdapter, examples: Sequence[Labelled], max_tokens: int) -> list[int]:
    """The most likely class of each."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    batches = [collate_labelled(group) for group in group_by_length(examples, max_tokens)]
    predictions = torch.cat([class_scores(model, adapter, inputs).argmax(dim=1) for inputs, _ in batches])[:, 0]
    return [best for _, best in sorted(zip(order, predictions.tolist()))]


@torch.no_grad()
def predict_tags(
    model: Roberta, adapter: HeadAdapter, examples: Sequence[Labelled], max_tokens: int
) -> list[list[int]]:
    """The most likely tag of each word of each example."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    predictions = []
    for group in group_by_length(examples, max_tokens):
        inputs, labels = collate_labelled(group)
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
    longest: int = 30,
) -> str:
    """The most likely span of at most `longest` tokens of the context, over all of its windows.

    Nothing, where <s> outscores it by more than the threshold, in every window; None is for questions that all have an
    answer.
    """
    best, text, no_answer = -torch.inf, "", torch.inf
    for window in windows:
        begin, end = span_scores(model, adapter, torch.tensor([window.ids]))[0].unbind(dim=1)  # (T,) each
        # Most windows do not hold the answer, and say so; the one that does is the least sure that there is none.
        no_answer = min(no_answer, (begin[NO_ANSWER[0]] + end[NO_ANSWER[1]]).item())
        part = slice(window.first, window.first + len(window.offsets))
        pairs = begin[part, None] + end[None, part]  # of every first and last token
        allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(longest - 1)
        pairs = pairs.masked_fill(~allowed, -torch.inf)
        if window.offsets and (score := pairs.max().item()) > best:
            first, last = divmod(pairs.argmax().item(), len(window.offsets))
            best, text = score, window.text(context, window.first + first, window.first + last)
    if no_answer_threshold is not None and no_answer - best > no_answer_threshold:
        return ""
    return text


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    return sum(map(int.__eq__, predicted, labels)) / len(labels)
