"""The testbed of the experiments: data, default setting, and held-out questions."""

from itertools import islice

import toy
from experiments import testbed
from experiments.methods import Setting
from toy import almanac
from toy.language_model import ROW


def test_toy_is_the_default(tiny_base, monkeypatch):
    """The setting is that of train.py on the toy. The toy's base was not pretrained on the text for the perplexity."""
    monkeypatch.setattr(testbed, "toy_base", lambda: tiny_base)
    bed = testbed.read_testbed(testbed.TestbedOptions(layers=3, device="cpu"))
    assert bed.default == Setting(layers=3, lr=toy.TRAINING["lr"])
    sizes = {
        name: getattr(bed.train_config(bed.default, seed=0), name) for name in ("batch_size", "micro_batch_tokens")
    }
    assert sizes.items() <= toy.TRAINING.items()
    assert len(bed.training) == 824 and len(bed.held_out) == len(bed.questions) == 1020
    assert bed.questions[0].output == almanac.instructions()["entities"][0].example.output
    seen = [bed.tokenizer.encode(document) for document in islice(almanac.documents(seed=0), 3)]
    first = bed.text[0].tolist()
    assert bed.text.shape == (64, ROW) and first[0] == bed.tokenizer.start_ids[0]
    assert not any(first[1 : 1 + len(ids)] == ids for ids in seen)
    options = testbed.TestbedOptions(layers=1, limit=5, held_out=7, device="cpu")
    limited = testbed.read_testbed(options)
    assert (len(limited.training), len(limited.held_out), limited.default.layers) == (5, 7, 1)


def test_learning_rates_are_searched_without_held_out_questions():
    sets, (training, evaluated) = almanac.instructions(), testbed.toy_examples(searching=True)
    questions = {question.example: question.entity for question in sets["training"]}
    assert len(training) + len(evaluated) == len(questions) == len(testbed.toy_examples(searching=False)[0])
    assert set(training) | set(evaluated) == set(questions)
    assert not {questions[example] for example in training} & {questions[example] for example in evaluated}
    assert not {example.output for example in training} & {example.output for example in evaluated}
    opposites = almanac.KINDS["opposite"].facts
    answers = {opposites.get(questions[example]) for example in evaluated if "opposite" in example.output}
    assert answers and not answers & {questions[example] for example in training if "opposite" in example.output}
    held_out = {question.example for name in almanac.HELD_OUT for question in sets[name]}
    assert set(testbed.toy_examples(searching=False)[1]) == held_out and not held_out & set(questions)


def test_a_tenth_of_the_data_is_held_out(tiny_base, instructions):
    """A search for learning rates does not use this tenth; it holds out a tenth of the rest."""
    options = testbed.TestbedOptions(tiny_base, instructions, device="cpu")
    bed, searching = testbed.read_testbed(options), testbed.read_testbed(options, searching=True)
    assert (len(bed.training), len(bed.questions), bed.batch_size) == (36, 4, 64)
    assert bed.train_config(bed.default, seed=0).micro_batch_tokens == 1024  # as by default in train.py, on a CPU
    assert bed.default == Setting(layers=1, lr=9e-3 * 64 / 256) and len(bed.text) == 0
    assert (len(searching.training), len(searching.questions)) == (33, 3)
    names = [{tokens.name for tokens in (*one.training, *one.held_out)} for one in (bed, searching)]
    assert len(names[0]) == 40 and names[1] == {tokens.name for tokens in bed.training}
