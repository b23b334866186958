"""The embedded default: what is held out is held out, and the base never sees an instruction."""

import itertools
import re

import torch
from click.testing import CliRunner
from helpers import make_adapter

import evaluate
from adapter import Adapter
from formats.bases import load_llama
from toy import almanac as toy


def words(*texts):
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def test_facts_are_complete():
    kinds = toy.kinds()
    assert {name: len(kind.facts) for name, kind in kinds.items()} == {
        "capital": 80, "continent": 80, "opposite": 80, "young": 40, "symbol": 40, "French": 45, "Spanish": 45,
        "after": 10, "parity": 11,
    }  # fmt: skip
    assert kinds["capital"].facts["Bulgaria"] == "Sofia" and kinds["continent"].facts["Peru"] == "South America"
    assert kinds["opposite"].facts["cold"] == "hot" and kinds["opposite"].facts["hot"] == "cold"
    assert kinds["French"].facts["dog"] == "chien" and kinds["Spanish"].facts["dog"] == "perro"


def test_held_out_entities_never_occur_in_tuning():
    """Not in the instruction, the input or the answer, and not as the other word of a pair of opposites."""
    sets = toy.instructions()
    tuned = words(*(text for question in sets["tuning"] for text in question.example))
    held_out = {question.entity.lower() for name in toy.HELD_OUT for question in sets[name]}
    assert len(held_out) > 120
    assert not held_out & tuned


def test_held_out_wordings_never_occur_in_tuning():
    sets = toy.instructions()
    assert not any(q.example.instruction.startswith("Give") for q in sets["tuning"] + sets["entities"] + sets["inputs"])
    assert all(q.example.instruction.startswith("Give") for q in sets["wordings"])
    instructions = [q.example for name in sets for q in sets[name]]
    assert len(set(instructions)) == len(instructions)


def test_the_base_reads_every_fact_and_no_instruction():
    text = " ".join(itertools.islice(toy.documents(0), 20_000))
    for kind in toy.kinds().values():
        for entity, answer in kind.facts.items():
            assert toy.capitalised(kind.statements[0].format(e=entity, a=answer)) in text
        openings = {wording.split("{e}")[0].strip() for wording in (*kind.instructions, kind.with_input)}
        assert not any(opening in text for opening in openings if len(opening) > 4)
    assert not words("Name Tell State Give Translate Below instruction response") & words(text)


def test_pretraining_learns(tmp_path):
    """A few steps of the real thing: from about ln(1024) = 6.9 to well below the entropy of single words."""
    tokenizer = toy.train_tokenizer(tmp_path / "tokenizer.model", seed=0)
    model = toy.pretrain(tokenizer, seed=0, tokens=60 * toy.ROWS * toy.ROW)
    text = next(toy.documents(1))
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert loss < 4


def test_make_base_writes_a_folder_that_load_llama_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    monkeypatch.setattr(toy, "TOKENS", 4 * toy.ROWS * toy.ROW)
    (tmp_path / "toy.py").write_text("recipe")
    folder = toy.make_base()
    model, tokenizer = load_llama(folder)
    assert sum(p.numel() for p in model.parameters()) == 1_053_824
    before = (folder / "consolidated.00.pth").stat().st_mtime_ns
    assert toy.make_base() == folder and (folder / "consolidated.00.pth").stat().st_mtime_ns == before
    (tmp_path / "toy.py").write_text("another recipe")
    assert toy.make_base() != folder


def few(count):
    """All to tune on, and so many of every held-out set."""
    return {
        name: questions if name == "tuning" else questions[:count] for name, questions in toy.instructions().items()
    }


def test_marks(monkeypatch, tiny_base, capsys):
    """Exact means the sentence and then the end; anything else is at most 'has it'."""
    model, tokenizer = load_llama(tiny_base)
    adapter = make_adapter(model)
    sets = few(4)
    monkeypatch.setattr(toy, "instructions", lambda: sets)

    def ask(model, tokenizer, prompts, examples):
        if prompts:  # right, right but rambling on, wrong in form, wrong
            a, b, c, d = examples
            return [(a.output, True), (b.output, False), (c.output + " Yes.", True), ("No.", True)]
        return [("", True)] * len(examples)

    monkeypatch.setattr(evaluate, "ask", ask)
    accuracy = evaluate.examine(model, tokenizer, adapter)
    assert accuracy["heldout_accuracy_adapter"] == 0.25 and accuracy["heldout_accuracy_adapter_has_it"] == 0.75
    assert accuracy["heldout_accuracy_base"] == accuracy["heldout_accuracy_base_has_it"] == 0
    assert accuracy["heldout_accuracy_majority"] == 0  # all capitals, of which none is commoner than the others
    assert "bit for bit: yes" in capsys.readouterr().out
    monkeypatch.setattr(adapter, "forward", lambda **_: make_adapter(model, seed=7)(dtype=torch.float32))
    evaluate.examine(model, tokenizer, adapter)
    assert "bit for bit: NO" in capsys.readouterr().out


def test_the_majority_baseline_fills_in_the_commonest_word(monkeypatch, tiny_base):
    model, tokenizer = load_llama(tiny_base)
    sets = toy.instructions()
    continents = [q for q in sets["entities"] if q.kind == "continent"]
    monkeypatch.setattr(toy, "instructions", lambda: sets | {name: continents for name in toy.HELD_OUT})
    monkeypatch.setattr(evaluate, "ask", lambda model, tokenizer, prompts, examples: [("", True)] * len(examples))
    accuracy = evaluate.examine(model, tokenizer, make_adapter(model))
    tuned = [q.answer for q in sets["tuning"] if q.kind == "continent"]
    commonest = max(tuned, key=tuned.count)
    assert (
        accuracy["heldout_accuracy_majority"] == sum(q.answer == commonest for q in continents) / len(continents) > 0.1
    )


def test_ask_knows_whether_an_answer_has_ended(tiny_base, monkeypatch):
    model, tokenizer = load_llama(tiny_base)
    rows = iter([[[tokenizer.encode("Lima")[0]] * 40, tokenizer.encode("Lima")]])
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: next(rows))
    (_, first), (text, second) = evaluate.ask(
        model, tokenizer, (), [q.example for q in toy.instructions()["tuning"][:2]]
    )
    assert (first, text, second) == (False, "Lima", True)


def test_evaluate_command(tiny_base, tmp_path, monkeypatch):
    sets = few(2)
    monkeypatch.setattr(toy, "instructions", lambda: sets)
    Adapter(layers=1, length=2, dim=16, heads=2).save(tmp_path / "a.safetensors", base=tiny_base)
    result = CliRunner().invoke(evaluate.main, ["toy", "--adapter", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0, result.output
    assert "new entities in new wordings" in result.stdout
    result = CliRunner().invoke(evaluate.main, ["toy", "--adapter", str(tmp_path / "absent")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
