"""A conversation of generate.py: what is remembered, what of it is read again, and that answers are a fresh run's."""

import json

import pytest
from click.testing import CliRunner
from helpers import chat_in_process, make_adapter

import generate
from data import Request, Turn
from formats.bases import load_llama
from generate import Conversation, Responder


def run(*args, input=None):
    """generate.py, in this process."""
    return CliRunner().invoke(generate.main, [str(arg) for arg in args], input=input)


QUESTIONS = ["Hi", "Why is the cat on the mat?", "naïve 🦙", "And then?"]


@pytest.fixture
def responder(chat_base, device):
    """A Responder on each device: a GPU computes eight tokens at a time, and its cache is ahead of the text."""
    model, tokenizer = load_llama(chat_base, device=device)
    adapters = {"a": make_adapter(model).to(device), "b": make_adapter(model, seed=7).to(device)}
    return Responder(model, tokenizer, adapters, template="auto", max_new_tokens=12)


def fresh(responder, question, **options):
    return next(responder.respond_all([Request(question, **options)], 1, "request"))


@pytest.mark.parametrize("adapter", ["a", "base"])
@pytest.mark.parametrize("template", ["auto", "chatml", "llama-2"])
def test_an_answer_is_that_of_a_fresh_run_over_the_whole_history(chat_base, monkeypatch, adapter, template):
    """Token for token in float32, nonzero gates; and only the new turn is read, not the whole once more."""
    model, tokenizer = load_llama(chat_base)
    responder = Responder(model, tokenizer, {"a": make_adapter(model)}, template=template, max_new_tokens=12)
    read, prefill = [], generate.prefill
    monkeypatch.setattr(
        generate, "prefill", lambda model, tokens, *rest: read.append(tokens) or prefill(model, tokens, *rest)
    )
    conversation, history, whole = Conversation(responder, adapter), [], []
    for question in QUESTIONS:
        answer = "".join(conversation.respond(question))
        whole.append(len(responder.prompt_ids(Request(question, adapter=adapter, history=history))))
        assert answer == fresh(responder, question, adapter=adapter, history=history)
        history += [Turn("user", question), Turn("assistant", answer)]
        assert conversation.turns == history
    new = [len(rows[0]) for rows in read[::2]]  # every other is the fresh run's
    assert new[0] == whole[0] and [len(rows[0]) for rows in read[1::2]] == whole
    # Of what was read before only that is read again which text of the answer makes other ids of.
    assert sum(new) < whole[-1] + 4 * 12 < sum(whole)
    without = fresh(responder, QUESTIONS[-1], adapter=adapter)
    assert without != answer


def test_the_system_turn_and_a_fresh_start(responder):
    conversation = Conversation(responder, "a")
    first = "".join(conversation.respond("Hi"))
    conversation.system = "Be brief."
    second = "".join(conversation.respond("Why?"))
    history = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", first)]
    assert second == fresh(responder, "Why?", adapter="a", history=history)
    conversation.turns = []
    assert "".join(conversation.respond("Hi")) == fresh(responder, "Hi", adapter="a", history=history[:1])
    conversation.system = ""
    conversation.turns = []
    assert "".join(conversation.respond("Hi")) == first


def test_an_answer_without_end_is_taken_as_it_stands(responder):
    """One that was cut by its length: its text is a turn like any other. A long question makes the cache grow."""
    responder.sampling = responder.sampling._replace(end_ids=())
    conversation = Conversation(responder, "a")
    first = "".join(conversation.respond("Hi"))
    capacity = conversation.cache.capacity
    second = "".join(conversation.respond("a" * 200))
    assert conversation.cache.capacity > capacity
    assert second == fresh(responder, "a" * 200, adapter="a", history=[Turn("user", "Hi"), Turn("assistant", first)])
    with pytest.raises(ValueError, match="the prompt has .* tokens, the base sees only 1024"):
        "".join(conversation.respond("b" * 900))
    assert len(conversation.turns) == 4


def test_a_turn_ends_before_a_stop_string_and_tokens_are_penalized_as_in_a_fresh_run(responder):
    """The turn is truncated, not the cache; the penalty concerns cached tokens as well."""
    responder.sampling = responder.sampling._replace(end_ids=(), repetition_penalty=1.4)
    whole = "".join(Conversation(responder, "a").respond("Hi"))
    responder.stop = [whole[3:6]]
    conversation = Conversation(responder, "a")
    history = []
    for question in QUESTIONS:
        answer = "".join(conversation.respond(question))
        assert answer == fresh(responder, question, adapter="a", history=history)
        assert responder.stop[0] not in answer and (history or answer == whole[: whole.index(responder.stop[0])])
        history += [Turn("user", question), Turn("assistant", answer)]
        assert conversation.turns == history


@pytest.fixture
def trained(chat_base, tmp_path):
    model, _ = load_llama(chat_base)
    for name, seed in (("a", 1), ("b", 7)):
        make_adapter(model, seed=seed).save(tmp_path / f"{name}.safetensors", base=chat_base, prompt_template="chatml")
    return ["--adapter", tmp_path / "a.safetensors", "--adapter", tmp_path / "b.safetensors", "--device", "cpu"]


def test_on_a_terminal_a_conversation_goes_on(trained, tmp_path):
    """Who answers changes, and each has its own; /reset forgets. The same conversations as a file give the same."""
    lines = "Hi\nWhy?\n/adapter b\nWhy?\n/adapter a\nAnd?\n/reset\nWhy?\n/system Be brief.\nSo?\n"
    stdout, stderr = chat_in_process(lines, *trained)
    assert stderr.count("Every line is a turn of one conversation. /reset: forget it. /system TEXT") == 1
    turns, records = {"a": [], "b": []}, []
    answers = stdout.split("\n")
    assert len(answers) == 7 and answers.pop() == ""
    asked = [("a", "Hi"), ("a", "Why?"), ("b", "Why?"), ("a", "And?"), ("a", "Why?"), ("a", "So?")]
    for (name, question), answer in zip(asked, answers):
        if records and len(records) == 4:
            turns["a"] = []
        turns[name].append({"role": "user", "content": question})
        system = [{"role": "system", "content": "Be brief."}] if question == "So?" else []
        records.append({"messages": system + turns[name], "adapter": name})
        turns[name] = [*turns[name], {"role": "assistant", "content": answer}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    args = ("--greedy", "--max-new-tokens", 5, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert run(*trained, *args).exit_code == 0
    assert [json.loads(line)["output"] for line in (tmp_path / "out.jsonl").open()] == answers
    assert answers[1] != answers[4]


def test_piped_lines_stay_by_themselves(trained):
    args = ("--greedy", "--max-new-tokens", 5)
    alone = run(*trained, *args, "Why?").stdout
    assert run(*trained, *args, input="Hi\nWhy?\n/reset\n").stdout.splitlines()[1] == alone.rstrip("\n")


def test_templates_without_turns_say_so(tiny_adapter):
    stdout, stderr = chat_in_process("/system Be brief.\n/reset\n", "--adapter", tiny_adapter)
    for command in ("/system", "/reset"):
        assert f"error: {command} is for templates with turns; here every line is an instruction" in stderr


def test_another_template_than_the_adapter_s(trained, tmp_path):
    args = ("--greedy", "--max-new-tokens", 9, "Why is it so?")
    by_template = {name: run(*trained, "--template", name, *args).stdout for name in ("alpaca", "llama-2", "chatml")}
    assert len(set(by_template.values())) == 3 and by_template["chatml"] == run(*trained, *args).stdout
    result = run(*trained, "--template", "llama-3", *args)
    assert result.exit_code == 2 and "--template llama-3 does not fit this base" in result.stderr
    result = run(*trained, "--template", "chatml", "--raw", *args)
    assert result.exit_code == 2 and "--template chatml and --raw: with or without a template" in result.stderr


def test_the_base_has_the_template_of_the_first_adapter(trained):
    args = ("--greedy", "--max-new-tokens", 9, "Why is it so?")
    base, *_ = run(*trained, "--compare", *args).stdout.split("\na: ")
    assert base == "base: " + run(*trained, "--strength", 0, *args).stdout.rstrip("\n")


TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
ASKED = {"messages": [*TALK["messages"], {"role": "user", "content": "Why?"}]}


@pytest.mark.parametrize(
    "record, more, message",
    [
        (TALK, [], "its last turn is not the user's: there is nothing to respond to"),
        ({"messages": []}, [], "its last turn is not the user's: there is nothing to respond to"),
        ({"messages": [{"role": "cat", "content": "Hi"}]}, [], "turn 0: role 'cat' is not one of"),
        (
            ASKED,
            ["--template", "alpaca"],
            "the template alpaca has no turns: --template auto, llama-2, llama-3 or chatml",
        ),
        (ASKED, ["--raw"], "without a template has no turns"),
    ],
)
def test_what_cannot_be_answered_in_a_file(trained, tmp_path, record, more, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"instruction": "Hi"}) + "\n" + json.dumps(record))
    result = run(*trained, *more, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and f"in.jsonl: record 1: {message}" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
