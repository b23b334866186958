"""The almanac: held-out questions stay out of training, and the base's text contains no instructions."""

import itertools
import re

from toy.almanac import HELD_OUT, KINDS, capitalized, documents, instructions


def words(*texts):
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def test_facts_are_complete():
    assert {name: len(kind.facts) for name, kind in KINDS.items()} == {
        "capital": 80, "continent": 80, "opposite": 80, "young": 40, "symbol": 40, "French": 45, "Spanish": 45,
        "after": 10, "parity": 11,
    }  # fmt: skip
    assert KINDS["capital"].facts["Bulgaria"] == "Sofia" and KINDS["continent"].facts["Peru"] == "South America"
    assert KINDS["opposite"].facts["cold"] == "hot" and KINDS["opposite"].facts["hot"] == "cold"
    assert KINDS["French"].facts["dog"] == "chien" and KINDS["Spanish"].facts["dog"] == "perro"


def test_held_out_entities_never_occur_in_training():
    """No training example contains a held-out entity, not even as the answer to a question about its opposite."""
    sets = instructions()
    examples = [question.example for question in sets["training"]]
    trained_words = words(
        *(text for example in examples for text in (example.instruction, example.input, example.output))
    )
    held_out = {question.entity.lower() for name in HELD_OUT for question in sets[name]}
    assert len(held_out) > 120
    assert not held_out & trained_words


def test_held_out_wordings_never_occur_in_training():
    sets = instructions()
    assert not any(
        q.example.instruction.startswith("Give") for q in sets["training"] + sets["entities"] + sets["inputs"]
    )
    assert all(q.example.instruction.startswith("Give") for q in sets["wordings"])
    examples = [q.example for name in sets for q in sets[name]]
    assert len(set(examples)) == len(examples)


def test_base_text_has_every_fact_and_no_instruction():
    text = " ".join(itertools.islice(documents(0), 20_000))
    for kind in KINDS.values():
        for entity, answer in kind.facts.items():
            assert capitalized(kind.statements[0].format(e=entity, a=answer)) in text
        openings = {wording.split("{e}")[0].strip() for wording in (*kind.instructions, kind.with_input)}
        assert not any(opening in text for opening in openings if len(opening) > 4)
    assert not words("Name Tell State Give Translate Below instruction response") & words(text)


def test_facts_about_numbers_are_in_no_instruction():
    """Only the questions about images of digits use these facts."""
    instruction_kinds = {question.kind for questions in instructions().values() for question in questions}
    assert {"after", "parity"} <= set(KINDS) and not {"after", "parity"} & instruction_kinds
