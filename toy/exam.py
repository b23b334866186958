"""Evaluation of a trained adapter on held-out questions about the almanac and about pictures of digits."""

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


def most_common_answer(questions: Sequence[ExamQuestion]) -> str:
    """Return the most common answer to the questions."""
    return Counter(question.answer for question in questions).most_common(1)[0][0]


def greedy_answers(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter, requests: Sequence[Request]) -> list[str]:
    """Generate greedy responses of up to 40 tokens, in batches of 128. `Request.adapter` is "base" or "adapter"."""
    responder = Responder(model, tokenizer, {"adapter": adapter}, max_new_tokens=40)
    return generate_responses(responder, requests, batch_size=128, unit="question")


def exact_match(texts: Sequence[str], questions: Sequence[ExamQuestion]) -> list[bool]:
    """Return, for each text, True if it is exactly the expected sentence."""
    return [text == question.example.output for text, question in zip(texts, questions)]


def print_scores(scores: dict[str, list[bool]], rows: dict[str, list[int]], corner: str = " " * 34) -> None:
    """Print a table of mean scores, with one column per score.

    Each row is a group of questions; `rows` maps the label of a group to the indices of its questions. `corner` is the
    heading of the labels.
    """
    # The column "base has it" follows the column "base", so its heading can be short.
    headings = ["has it" if name.endswith(" has it") else name for name in scores]
    width = 2 + max(map(len, headings))
    print(corner + "".join(f"{heading:>{width}}" for heading in headings))
    for label, indices in rows.items():
        means = [sum(score[i] for i in indices) / len(indices) for score in scores.values()]
        print(f"{label:34}" + "".join(f"{mean:>{width}.1%}" for mean in means))


def mean_scores(prefix: str, scores: dict[str, list[bool]]) -> dict[str, float]:
    """Return the mean of each score, keyed by `prefix` and the name of the score, as in summary.json."""
    return {f"{prefix}_{name.replace(' ', '_')}": sum(score) / len(score) for name, score in scores.items()}


@torch.no_grad()
def evaluate_almanac(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Score the base and the adapter on the almanac's held-out questions, print a table, and return the mean scores.

    To be fair to the base, the table also shows the share of responses that contain the expected word ("has it"). The
    majority baseline answers in the expected form, with the word that is most common in training for that kind of fact.
    A last line tells whether, for the first question, the adapter at strength 0 computes the logits of the base.
    """
    sets = almanac.instructions()
    questions = [question for name in HELD_OUT for question in sets[name]]
    training = {kind: [q for q in sets["training"] if q.kind == kind] for kind in {q.kind for q in questions}}
    majority = {kind: most_common_answer(of_kind) for kind, of_kind in training.items()}
    scores = {"majority": [question.answer == majority[question.kind] for question in questions]}
    for name in ("base", "adapter"):
        requests = [Request(q.example.instruction, q.example.input, name) for q in questions]
        texts = greedy_answers(model, tokenizer, adapter, requests)
        scores[name] = exact_match(texts, questions)
        scores[f"{name} has it"] = [bool(re.search(rf"\b{q.answer}\b", text)) for text, q in zip(texts, questions)]

    set_names = [name for name in HELD_OUT for _ in sets[name]]  # one per question
    rows = {title: [i for i, held_out in enumerate(set_names) if held_out == name] for name, title in HELD_OUT.items()}
    rows["all"] = list(range(len(questions)))
    print("\nHeld-out questions: exact match (has it: the response contains the expected word)\n")
    rows_with_counts = {f"{title:34}{len(indices):>8}": indices for title, indices in rows.items()}
    print_scores(scores, rows_with_counts, corner=f"{'':34}{'number':>8}")

    example = questions[0].example
    tokens = torch.tensor(
        [AlpacaTemplate(tokenizer).encode_prompt(example.instruction, example.input)], device=model.device
    )
    same = torch.equal(model(tokens), model(tokens, adapter(gate_scale=0.0, dtype=model.dtype)))
    print(f"\nAt strength 0 the logits are equal to those of the base, bit for bit: {'yes' if same else 'NO'}")
    return mean_scores("heldout_accuracy", scores)


def evaluate_digits(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Score the adapter on questions about held-out pictures of digits, print a table, and return the mean scores.

    An adapter for images gets each question with its picture, without a picture, and with a random picture. Any other
    adapter gets no pictures. The column "chance" is the accuracy of always naming the most common digit in training.
    """
    with TemporaryDirectory() as folder:
        digits.write_pictures(Path(folder))
        training, held_out = digits.pictures(Path(folder))
        features = None
        if isinstance(adapter, ImageAdapter):
            encoder = load_image_encoder(str(digits.ENCODER), None, model.dtype, model.device, adapter)
            features = encoder.encode(held_out)
    questions = digits.questions(held_out)
    majority = most_common_answer(digits.questions(training[: digits.TRAINED_ON]))
    no_image = [Request(question.example.instruction, adapter="adapter") for question in questions]
    requests = {"no image": no_image}
    if features is not None:
        shuffled = [features[i] for i in np.random.default_rng(0).permutation(len(features))]
        for name, images in (("image", features), ("another image", shuffled)):
            repeated = [image for image in images for _ in digits.ANSWERS]  # one per question
            requests[name] = [request._replace(features=image) for request, image in zip(no_image, repeated)]
    scores = {"chance": [question.answer == majority for question in questions]}
    for name, batch in requests.items():
        scores[name] = exact_match(greedy_answers(model, tokenizer, adapter, batch), questions)

    rows = {kind: [i for i, question in enumerate(questions) if question.kind == kind] for kind in digits.ANSWERS}
    print(f"\nQuestions about {len(held_out)} held-out pictures: exact match\n")
    print_scores(scores, rows | {"all": list(range(len(questions)))})
    return mean_scores("picture_accuracy", scores)
