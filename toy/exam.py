"""What examines a trained adapter: held-out questions about the almanac, and about held-out pictures of digits."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from adapter import Adapter
from data import AlpacaTemplate, Request, Tokenizer
from formats.image_encoders import load_image_encoder
from generate import Responder
from model import LLaMA
from multimodal import ImageAdapter
from tasks.responses import generate_responses
from toy import almanac, digits
from toy.almanac import HELD_OUT, ExamQuestion


def commonest(questions: Sequence[ExamQuestion]) -> str:
    """The word that most of their answers have."""
    return Counter(question.answer for question in questions).most_common(1)[0][0]


def greedy_answers(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter, requests: Sequence[Request]) -> list[str]:
    """Respond greedily by "base" or "adapter", as the requests say, 128 at once, with up to 40 tokens each."""
    responder = Responder(model, tokenizer, {"adapter": adapter}, max_new_tokens=40)
    return generate_responses(responder, requests, batch_size=128, unit="question")


def exact_match(texts: Sequence[str], questions: Sequence[ExamQuestion]) -> list[bool]:
    """Which are the expected sentence, and nothing else."""
    return [text == question.example.output for text, question in zip(texts, questions)]


def print_scores(scores: dict[str, list[bool]], rows: dict[str, list[int]], corner: str = " " * 34) -> None:
    """A table of shares: a column for each of the scores, a row for each choice of questions, by their indices."""
    shown = ["has it" if column.endswith(" has it") else column for column in scores]  # of whom stands before it
    width = 2 + max(map(len, shown))
    print(corner + "".join(f"{column:>{width}}" for column in shown))
    for label, chosen in rows.items():
        shares = [sum(score[i] for i in chosen) / len(chosen) for score in scores.values()]
        print(f"{label:34}" + "".join(f"{share:>{width}.1%}" for share in shares))


def mean_scores(prefix: str, scores: dict[str, list[bool]]) -> dict[str, float]:
    """As summary.json has them."""
    return {f"{prefix}_{name.replace(' ', '_')}": sum(score) / len(score) for name, score in scores.items()}


@torch.no_grad()
def evaluate_almanac(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Put the almanac's held-out questions to the base, and to the base with the adapter; print a table.

    To be fair to the base, the table also says how often the word asked for occurs anywhere in what it wrote. The
    majority baseline knows the form of every answer, and always fills in the word that is commonest in training.
    """
    sets = almanac.instructions()
    questions = [question for name in HELD_OUT for question in sets[name]]
    trained = {kind: [q for q in sets["training"] if q.kind == kind] for kind in {q.kind for q in questions}}
    common = {kind: commonest(of_kind) for kind, of_kind in trained.items()}
    scores = {"majority": [question.answer == common[question.kind] for question in questions]}
    for name in ("base", "adapter"):
        requests = [Request(q.example.instruction, q.example.input, name) for q in questions]
        texts = greedy_answers(model, tokenizer, adapter, requests)
        scores[name] = exact_match(texts, questions)
        scores[f"{name} has it"] = [bool(re.search(rf"\b{q.answer}\b", text)) for text, q in zip(texts, questions)]

    of_set = [name for name in HELD_OUT for _ in sets[name]]
    rows = {title: [i for i, where in enumerate(of_set) if where == name] for name, title in HELD_OUT.items()}
    rows["all"] = list(range(len(questions)))
    print("\nHeld-out questions, answered exactly (has it: the word occurs in the answer)\n")
    numbered = {f"{title:34}{len(chosen):>8}": chosen for title, chosen in rows.items()}
    print_scores(scores, numbered, corner=f"{'':34}{'number':>8}")

    example = questions[0].example
    tokens = torch.tensor(
        [AlpacaTemplate(tokenizer).encode_prompt(example.instruction, example.input)], device=model.device
    )
    same = torch.equal(model(tokens), model(tokens, adapter(gate_scale=0.0, dtype=model.dtype)))
    print(
        f"\nWith the adapter taken away (strength 0) the logits are the base's, bit for bit: {'yes' if same else 'NO'}"
    )
    return mean_scores("heldout_accuracy", scores)


def evaluate_digits(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Put questions about held-out pictures of digits to the adapter; print a table.

    An adapter for images answers with the picture, with none, and with one that belongs to another question; any other
    answers without. Chance is to always name the digit that is commonest in training.
    """
    with TemporaryDirectory() as folder:
        digits.write_pictures(Path(folder))
        trained, held_out = digits.pictures(Path(folder))
        features = None
        if isinstance(adapter, ImageAdapter):
            encoder = load_image_encoder(str(digits.ENCODER), None, model.dtype, model.device, adapter)
            features = encoder.encode(held_out)
    questions = digits.questions(held_out)
    common = commonest(digits.questions(trained[: digits.TRAINED_ON]))
    withheld = [Request(question.example.instruction, adapter="adapter") for question in questions]
    asked = {"no image": withheld}
    if features is not None:
        others = [features[i] for i in np.random.default_rng(0).permutation(len(features))]
        for name, images in (("image", features), ("another image", others)):
            each = [image for image in images for _ in digits.ANSWERS]
            asked[name] = [request._replace(features=image) for request, image in zip(withheld, each)]
    scores = {"chance": [question.answer == common for question in questions]}
    for name, requests in asked.items():
        scores[name] = exact_match(greedy_answers(model, tokenizer, adapter, requests), questions)

    rows = {kind: [i for i, question in enumerate(questions) if question.kind == kind] for kind in digits.ANSWERS}
    print(f"\nQuestions about {len(held_out)} held-out pictures, answered exactly\n")
    print_scores(scores, rows | {"all": list(range(len(questions)))})
    return mean_scores("picture_accuracy", scores)
