"""The evaluation on the toy's held-out questions: accuracy of base, baselines and adapter, and the printed tables."""

import torch
from click.testing import CliRunner
from helpers import make_adapter

import evaluate
from adapter import Adapter
from formats.bases import load_llama
from data import Request
from generate import Responder
from multimodal import ImageAdapter
from toy import almanac, digits, exam


def limited_sets(count):
    """Return a dict from names to the almanac's question sets. Held-out sets have only the first `count` questions."""
    return {
        name: questions if name == "training" else questions[:count]
        for name, questions in almanac.instructions().items()
    }


def test_almanac_scores_count_exact_answers_and_answers_that_contain_the_word(monkeypatch, tiny_base, capsys):
    """An exact answer is the expected sentence alone. "has it" counts every answer that contains the word.

    The output says whether the logits at strength 0 equal the base's bit for bit.
    """
    model, tokenizer = load_llama(tiny_base)
    adapter = make_adapter(model)
    sets = limited_sets(4)
    monkeypatch.setattr(almanac, "instructions", lambda: sets)
    expected = {(q.example.instruction, q.example.input): q.example.output for name in sets for q in sets[name]}

    def answers(model, tokenizer, adapter, requests):
        if requests[0].adapter == "base":
            return [""] * len(requests)
        outputs = [expected[request.instruction, request.input] for request in requests]
        forms = ["{}", "{} The", "{} Yes.", "No."]  # exact, exact with text after it (twice), wrong
        return [forms[i % 4].format(output) for i, output in enumerate(outputs)]

    monkeypatch.setattr(exam, "greedy_answers", answers)
    accuracy = exam.evaluate_almanac(model, tokenizer, adapter)
    assert list(accuracy) == [
        f"heldout_accuracy_{name}" for name in ("majority", "base", "base_has_it", "adapter", "adapter_has_it")
    ]
    assert accuracy["heldout_accuracy_adapter"] == 0.25 and accuracy["heldout_accuracy_adapter_has_it"] == 0.75
    assert accuracy["heldout_accuracy_base"] == accuracy["heldout_accuracy_base_has_it"] == 0
    assert accuracy["heldout_accuracy_majority"] == 0  # the questions ask for capitals, which all differ
    printed = capsys.readouterr().out
    assert "bit for bit: yes" in printed
    line = f"{'all':34}{12:>8}{'0.0%':>10}{'0.0%':>10}{'0.0%':>10}{'25.0%':>10}{'75.0%':>10}\n"
    assert line in printed and line.replace(f"{'all':34}{12:>8}", f"{'new entities':34}{4:>8}") in printed
    monkeypatch.setattr(adapter, "forward", lambda **_: make_adapter(model, seed=7)(dtype=torch.float32))
    exam.evaluate_almanac(model, tokenizer, adapter)
    assert "bit for bit: NO" in capsys.readouterr().out


def test_majority_baseline_answers_with_the_most_common_word(monkeypatch, tiny_base):
    model, tokenizer = load_llama(tiny_base)
    sets = almanac.instructions()
    continents = [q for q in sets["entities"] if q.kind == "continent"]
    monkeypatch.setattr(almanac, "instructions", lambda: sets | dict.fromkeys(almanac.HELD_OUT, continents))
    monkeypatch.setattr(exam, "greedy_answers", lambda model, tokenizer, adapter, requests: [""] * len(requests))
    accuracy = exam.evaluate_almanac(model, tokenizer, make_adapter(model))
    training_answers = [q.answer for q in sets["training"] if q.kind == "continent"]
    most_common = max(training_answers, key=training_answers.count)
    assert (
        accuracy["heldout_accuracy_majority"]
        == sum(q.answer == most_common for q in continents) / len(continents)
        > 0.1
    )


def test_batched_answers_equal_single_requests(tiny_base):
    """The requests alternate between base and adapter, and are answered in batches of 128. Five of 130 are compared."""
    model, tokenizer = load_llama(tiny_base)
    adapter = make_adapter(model)
    examples = [question.example for question in almanac.instructions()["training"][:130]]
    requests = [Request(e.instruction, e.input, ("base", "adapter")[i % 2]) for i, e in enumerate(examples)]
    texts = exam.greedy_answers(model, tokenizer, adapter, requests)
    responder = Responder(model, tokenizer, {"adapter": adapter}, max_new_tokens=40)
    chosen = [0, 1, 127, 128, 129]
    assert len(texts) == 130 and [texts[i] for i in chosen] == [
        next(responder.respond_all([requests[i]], 1, "request")) for i in chosen
    ]
    assert len({texts[i] for i in chosen}) > 2


def test_toy_command_prints_the_scores(tiny_base, tmp_path, monkeypatch):
    sets = limited_sets(2)
    monkeypatch.setattr(almanac, "instructions", lambda: sets)
    Adapter(layers=1, length=2, dim=16, heads=2).save(tmp_path / "a.safetensors", base=tiny_base)
    result = CliRunner().invoke(evaluate.main, ["toy", "--adapter", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0, result.output
    assert "new entities in new wordings" in result.stdout
    result = CliRunner().invoke(evaluate.main, ["toy", "--adapter", str(tmp_path / "absent")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_digits_are_scored_with_the_image_without_it_and_with_a_random_one(
    small_digits, tiny_base, monkeypatch, capsys
):
    """The stub's answer is right for the image in the request, or "?" if the request has no image."""
    model, tokenizer = load_llama(tiny_base)
    adapter = ImageAdapter(layers=3, length=2, dim=16, heads=2, features=64, bottleneck=5)
    adapter.metadata = {"vision_encoder_depths": "4"}
    _, held_out = digits.pictures(small_digits)
    rows = list(torch.eye(30, 64))

    class Encoder:
        def encode(self, paths):
            assert [path.name for path in paths] == [path.name for path in held_out]
            return rows

    vision_encoders = []
    monkeypatch.setattr(
        exam, "load_image_encoder", lambda vision_encoder, *more: vision_encoders.append(vision_encoder) or Encoder()
    )

    def stub_answers(model, tokenizer, adapter, requests):
        answers = []
        for request in requests:
            if request.features is None:
                answers.append("?")
                continue
            shown = held_out[int(request.features.argmax())]
            answers += [q.example.output for q in digits.questions([shown]) if q.kind == request.instruction]
        return answers

    monkeypatch.setattr(exam, "greedy_answers", stub_answers)
    scores = exam.evaluate_digits(model, tokenizer, adapter)
    assert list(scores) == [f"picture_accuracy_{name}" for name in ("chance", "no_image", "image", "another_image")]
    assert scores["picture_accuracy_image"] == 1 and scores["picture_accuracy_no_image"] == 0
    assert 0 < scores["picture_accuracy_another_image"] < 0.4
    assert vision_encoders == [str(digits.ENCODER)]
    shown = capsys.readouterr().out
    assert "Questions about 30 held-out pictures" in shown and "Is it even?" in shown
    blind = exam.evaluate_digits(model, tokenizer, make_adapter(model))
    assert list(blind) == ["picture_accuracy_chance", "picture_accuracy_no_image"]


def test_tables_fit_in_100_columns(capsys):
    columns = ("majority", "base", "base has it", "adapter", "adapter has it")
    exam.print_scores(dict.fromkeys(columns, [True]), {f"{'new entities, in the input field':34}{1020:>8}": [0]})
    exam.print_scores(dict.fromkeys(("chance", "no image", "image", "another image"), [True]), {"all": [0]})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
