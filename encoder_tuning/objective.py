"""What encoders learn with their heads, what they answer, and how right that is.

image classification    the class token's state to classes
text classification     the state of <s> to classes
question answering      each token's state to how well the answer begins and ends there

Notation as in adapter.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import group_by_size
from encoder_tuning.data import Labelled, SquadQuestion, span_of
from encoders.heads import HeadAdapter
from encoders.models import Roberta, ViT
from formats.roberta_tokenizer import RobertaTokenizer
from train import Objective


def labelled_batches(examples: Sequence[Labelled], max_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of the examples, shortest first, of at most `max_tokens` positions (or one example) together.

    Inputs are ids (B, T), padded to the right, or pixels (B, c, S, S); labels (B, 1) or (B, 2).
    """
    batches = []
    for part in group_by_size(examples, max_tokens):
        inputs = pad_sequence([example.inputs for example in part], True, RobertaTokenizer.pad_id)
        batches.append((inputs, torch.tensor([example.labels for example in part])))
    return batches


def encoder_states(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """What the head reads, (B, T, C) in float32."""
    weight = next(model.parameters())
    inputs = inputs.to(weight.device) if inputs.dtype == torch.long else inputs.to(weight.device, weight.dtype)
    return model.encode(inputs, adapter(dtype=weight.dtype)).float()


def class_scores(model: ViT | Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """Of every class, (B, classes, 1)."""
    return adapter.head(encoder_states(model, adapter, inputs)[:, 0])[:, :, None]


def span_scores(model: Roberta, adapter: HeadAdapter, inputs: Tensor) -> Tensor:
    """How well the answer begins and ends at every token, (B, T, 2); -inf where there is padding."""
    scores = adapter.head(encoder_states(model, adapter, inputs))
    return scores.masked_fill((inputs == model.config.pad_id).to(scores.device)[:, :, None], -torch.inf)


def num_labels(examples: Sequence[Labelled]) -> int:
    return sum(len(example.labels) for example in examples)


def label_loss(
    score: Callable[..., Tensor],
    model: ViT | Roberta,
    adapter: HeadAdapter,
    batch: tuple[Tensor, Tensor] | None,
    checkpoint_activations: bool = False,
) -> Tensor:
    """Cross entropy, summed over the labels, a class or the ends of a span; for None a zero that has a gradient."""
    if batch is None:
        return sum(parameter.sum() * 0 for parameter in adapter.parameters())
    inputs, labels = batch
    scores = score(model, adapter, inputs)  # (B, classes or T, labels)
    return F.cross_entropy(scores, labels.to(scores.device), reduction="sum")


CLASSIFICATION = Objective(num_labels, labelled_batches, partial(label_loss, class_scores))
SPANS = Objective(num_labels, labelled_batches, partial(label_loss, span_scores))


@torch.no_grad()
def classify(model: ViT | Roberta, adapter: HeadAdapter, examples: Sequence[Labelled], max_tokens: int) -> list[int]:
    """The likeliest class of each."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].size)
    batches = labelled_batches(examples, max_tokens)
    likeliest = torch.cat([class_scores(model, adapter, inputs).argmax(dim=1) for inputs, _ in batches])[:, 0]
    return [best for _, best in sorted(zip(order, likeliest.tolist()))]


@torch.no_grad()
def answer_squad(
    model: Roberta,
    adapter: HeadAdapter,
    tokenizer: RobertaTokenizer,
    question: SquadQuestion,
    max_length: int,
    longest: int = 30,
) -> str:
    """The likeliest span of at most `longest` tokens of the context."""
    span = span_of(question, tokenizer, max_length)
    if not span.offsets:
        return ""
    begin, end = span_scores(model, adapter, torch.tensor([span.ids]))[0].unbind(dim=1)  # (T,) each
    context = slice(span.first, span.first + len(span.offsets))
    pairs = begin[context, None] + end[None, context]  # of every first and last token
    allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(longest - 1)
    first, last = divmod(pairs.masked_fill(~allowed, -torch.inf).argmax().item(), len(span.offsets))
    return span.text(question.context, span.first + first, span.first + last)


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    return sum(map(int.__eq__, predicted, labels)) / len(labels)


def squad_metric() -> Callable[..., dict]:
    """torchmetrics' own. Raises ValueError where it is not installed."""
    try:
        from torchmetrics.functional.text import squad
    except ImportError:
        raise ValueError("SQuAD's scores need a package that is not installed: pip install torchmetrics") from None
    return squad


def squad_scores(texts: Sequence[str], questions: Sequence[SquadQuestion]) -> dict[str, float]:
    """Of answers, `exact_match` and `f1` (Rajpurkar et al., 2016), both in [0, 1]. Raises as `squad_metric`."""
    predicted = [{"id": str(i), "prediction_text": text} for i, text in enumerate(texts)]
    expected = [{"id": str(i), "answers": {"text": question.answers}} for i, question in enumerate(questions)]
    return {name: score.item() / 100 for name, score in squad_metric()(predicted, expected).items()}
