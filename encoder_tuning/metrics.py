"""How right answers are: accuracy of classes; exact match and F1 of SQuAD's answers, by torchmetrics."""

from collections.abc import Callable, Sequence

from encoder_tuning.data import SquadQuestion


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
