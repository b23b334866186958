"""python -m experiments stories: instructions made from stories, and whether they are followed."""

import itertools
import json
import re

import pytest
from click.testing import CliRunner

from experiments import instructions, stories
from experiments.__main__ import main
from experiments.methods import FULL, ONE_SOFTMAX, ZERO_INIT
from experiments.stories import KINDS, StoryInstruction, follows, is_prose, is_story, make_instructions, sentences
from experiments.runs import RESULTS

LETTERS = ["".join(letters) for letters in itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst")]


def make_stories(number):
    """Return `number` stories. In every fourth story, the kind of hero and the name occur in no other story.

    In the other stories, the hero is a girl with one of three names. In the first third of the stories, each group of
    four consecutive stories shares three rare things; in the rest, each thing is a ball.
    """
    texts = []
    for i in range(number):
        own = i % 4 == 0
        kind, name = (f"{LETTERS[i]}a", f"{LETTERS[i].title()}o") if own else ("girl", f"Lily{'abc'[i % 3]}".title())
        things = [f"{LETTERS[i - i % 4]}{ending}" for ending in ("us", "is", "os")] if i < number // 3 else ["ball"] * 3
        texts.append(
            f"Once upon a time, there was a little {kind} named {name}. {name} was number {i} and had a {things[0]}. "
            f"People knew that the {kind} was good. "
            f"One day in the morning {name} went out of the house to find a {things[1]}. "
            f"It was under the {things[2]}. So {name} was very happy and lived so ever after."
        )
    return texts


def test_text_is_split_into_sentences():
    text = 'Tom ran. "Stop!" she said. It was 3.5 miles? And th'
    assert sentences(text) == ["Tom ran.", '"Stop!"', "she said.", "It was 3.5 miles?"]
    assert stories.whole_sentences(text) == text[:-7]
    assert stories.whole_sentences("no end") == ""


def test_stories_are_recognized():
    story = make_stories(1)[0]
    assert is_story(story) and is_prose(story)
    assert not is_story("Tom ran. He saw a dog. It was big.")  # too short
    last = sentences(story)[-1]
    assert not is_story(f"{story} {last}")  # a sentence is repeated
    assert not is_story(story.replace("a little", "### a little"))
    for beginning in ("He had a cat. ", '"Hello!" said Tom. ', "It is so. "):
        assert is_prose(beginning + story) and not is_story(beginning + story)
    assert is_story("It was a hot day. " + story) and is_story("Helen had a cat. " + story)


def test_followed_instructions_are_recognized():
    """Whole words must match. A plural in -s counts as its singular."""
    thing = StoryInstruction("a thing", ("cat",))
    assert follows(thing, "A Cat ran.") and follows(thing, "Two cats ran.")
    assert not follows(thing, "A caterpillar ran.")
    three = StoryInstruction("three things", ("cat", "dog", "tree"))
    assert follows(three, "The dog and the cat sat in a tree.") and not follows(three, "The dog and the cat sat.")
    assert three.example().instruction == "Write a story with the words dog, tree and cat."
    begin = StoryInstruction("first sentence", ("Tom ran.",), "Tom ran. He fell.")
    assert follows(begin, "Tom ran. Then he sat.") and not follows(begin, "So Tom ran.")
    assert (begin.example().input, begin.example().output) == ("Tom ran.", "Tom ran. He fell.")


def test_held_out_words_never_occur_in_training():
    sets = make_instructions(make_stories(400), per_kind=8, tested=4)
    assert [len(part) for part in sets[:3]] == [40, 10, 20]
    for part, number in ((sets.training, 8), (sets.validation, 2), (sets.testing, 4)):
        assert all(sum(item.kind == kind for item in part) == number for kind in KINDS)
    assert all(follows(item, item.story) for item in sets.training)
    used = [item.story for item in sets.training]
    assert len(set(used)) == 40 and not set(used) & set(sets.others)
    known = {word for story in used for word in re.findall(r"\w+", story)}
    for item in sets.testing + sets.validation:
        if item.kind == "first sentence":
            assert not any(story.startswith(item.required[0]) for story in used)
        else:
            assert not known & set(item.required)
    assert not {item.required for item in sets.testing} & {item.required for item in sets.validation}
    assert make_instructions(make_stories(400), per_kind=8, tested=4) == sets
    with pytest.raises(ValueError, match="rare names or words, but 600 are needed"):
        make_instructions(make_stories(400), per_kind=8, tested=400)
    with pytest.raises(ValueError, match="only .* stories are left for .*, but 300 are needed; lower --per-kind"):
        make_instructions(make_stories(400), per_kind=300, tested=4)


@pytest.fixture
def command(tiny_base, tmp_path, monkeypatch):
    """Return a function that runs the command on 200 generated stories, with further arguments."""
    monkeypatch.setattr(instructions, "TESTED", 2)
    monkeypatch.setattr(instructions, "BEST", {ZERO_INIT: 0.1, FULL: 0.001})
    monkeypatch.setattr(instructions, "TRIED", {ONE_SOFTMAX: (0.1, 0.2)})
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(make_stories(200) + ["cut o"]))

    def run(*more):
        args = ["stories", "--base", tiny_base, "--data", tmp_path / "stories.txt", "--per-kind", 3, "--epochs", 3]
        args += ["--max-tokens", 300, "--at-a-time", 1, "--device", "cpu", "--out", tmp_path / "out", *more]
        return CliRunner().invoke(main, list(map(str, args)))

    return run


def test_stories_command_writes_its_results(command, tmp_path, monkeypatch):
    """The responses are stubs, because a base with random weights follows no instruction."""
    calls = []

    def generate_stories(testbed, model, requests, adapter=None, raw=False):
        calls.append((len(requests), 0 if adapter is None else len(adapter()), raw))
        story = make_stories(1)[0]
        return [f"{' '.join(each.required)} {story}" if each.kind == "a thing" else "He ran." for each in requests]

    with monkeypatch.context() as patch:
        patch.setattr(instructions, "generate_stories", generate_stories)
        result = command("--seeds", 2)
    assert result.exit_code == 0, result.output
    assert "15 training instructions, 10 held-out instructions" in result.output
    assert calls == [(10, 0, True), (10, 0, False), (10, 3, False), (10, 3, False), (10, 0, False), (10, 0, False)]
    found = json.loads((tmp_path / "out" / "stories.json").read_text())
    assert list(found["rows"]) == ["the base as it is", "the base in the template", ZERO_INIT, FULL]
    assert found["rows"][ZERO_INIT]["a thing"] == [1.0, 1.0] and found["rows"][ZERO_INIT]["accuracy"] == [0.2, 0.2]
    assert found["rows"][FULL]["perplexity"][0] != found["rows"]["the base as it is"]["perplexity"][0]
    assert (tmp_path / "out" / "stories.png").stat().st_size > 1000


def test_rate_search_and_learning_curve_have_the_right_examples_and_epochs(command, tmp_path, monkeypatch):
    """The numbers of examples and epochs of every run are checked. The stories are generated by the tiny base."""
    runs, steps = [], instructions.finite_steps
    monkeypatch.setattr(
        instructions, "finite_steps", lambda t, e, c: runs.append((len(e), c.epochs, c.lr)) or steps(t, e, c)
    )
    result = command("--search", "--length", 2, "--layers", 1, "--batch-size", 5)
    assert result.exit_code == 0, result.output
    assert runs == [(15, 10, 0.1), (15, 10, 0.2)] and "5 held-out instructions" in result.output
    assert not (tmp_path / "out" / "stories_rates.png").exists()
    found = json.loads((tmp_path / "out" / "stories_rates.json").read_text())
    assert all(row["lr"] and "responses" not in row for row in found["rows"].values())
    assert [example["kind"] for example in found["examples"]] == list(KINDS)  # one of each kind
    assert all(set(example["told"]) == set(found["rows"]) for example in found["examples"])
    runs.clear()
    monkeypatch.setattr(instructions, "SHARES", (0.2, 1.0))
    monkeypatch.setattr(instructions, "BEST", {ZERO_INIT: 0.1, ONE_SOFTMAX: 0.1, instructions.LORA: 0.01})
    monkeypatch.setattr(instructions, "MIN_STEPS", 4)
    assert command("--curve", "--seeds", 1).exit_code == 0
    assert [each[:2] for each in runs] == [(3, 4)] * 3 + [(15, 4)] * 3
    assert (tmp_path / "out" / "stories_curve.png").stat().st_size > 1000


def test_too_few_stories_are_a_one_line_error(command, tmp_path):
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(make_stories(5)))
    result = command()
    assert result.exit_code == 2 and "stories.txt: 4 of 4 texts" in result.stderr and result.stderr.count("\n") == 1


def test_best_rates_are_those_that_the_search_found():
    """Compare with experiments/results/stories_rates.json."""
    rows = json.loads((RESULTS / "stories_rates.json").read_text())["rows"]
    for method, lr in instructions.BEST.items():
        ours = {row["lr"][0]: row["accuracy"][0] for label, row in rows.items() if label.startswith(f"{method}, ")}
        assert set(ours) == set(instructions.TRIED[method]) and ours[lr] == max(ours.values())
