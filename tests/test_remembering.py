"""Conversations of generate.py: history, cache, and responses that equal those of a fresh run on the whole history."""

import json

import pytest
from click.testing import CliRunner
from helpers import chat_in_process, make_adapter

import generate
from data import Request, Turn
from formats.bases import load_llama
from generate import Conversation, Responder


def run(*args, input=None):
    """Run generate.py in this process, and return click's Result."""
    return CliRunner().invoke(generate.main, [str(arg) for arg in args], input=input)


QUESTIONS = ["Hi", "Why is the cat on the mat?", "naïve 🦙", "And then?"]


@pytest.fixture
def responder(chat_base, device):
    """A Responder on each device.

    On a GPU, eight steps are decoded together, so the cache may contain tokens after the end of a response.
    """
    model, tokenizer = load_llama(chat_base, device=device)
    adapters = {"a": make_adapter(model).to(device), "b": make_adapter(model, seed=7).to(device)}
    return Responder(model, tokenizer, adapters, template="auto", max_new_tokens=12)


def rerun(responder, question, **options):
    """Return the response of a fresh run, which processes the whole history."""
    return next(responder.respond_all([Request(question, **options)], 1, "request"))


@pytest.mark.parametrize("adapter", ["a", "base"])
@pytest.mark.parametrize("template", ["auto", "chatml", "llama-2"])
def test_response_equals_a_fresh_run_with_the_whole_history(chat_base, monkeypatch, adapter, template):
    """The gates are nonzero. Except for retokenized responses, only the tokens of the new turn are processed."""
    model, tokenizer = load_llama(chat_base)
    responder = Responder(model, tokenizer, {"a": make_adapter(model)}, template=template, max_new_tokens=12)
    processed, prefill = [], generate.prefill
    monkeypatch.setattr(
        generate, "prefill", lambda model, tokens, *rest: processed.append(tokens) or prefill(model, tokens, *rest)
    )
    conversation, history, prompt_lengths = Conversation(responder, adapter), [], []
    for question in QUESTIONS:
        response = "".join(conversation.respond(question))
        prompt_lengths.append(len(responder.prompt_ids(Request(question, adapter=adapter, history=history))))
        assert response == rerun(responder, question, adapter=adapter, history=history)
        history += [Turn("user", question), Turn("assistant", response)]
        assert conversation.turns == history
    new_lengths = [len(rows[0]) for rows in processed[::2]]  # processed[1::2] are the calls of the fresh runs
    assert new_lengths[0] == prompt_lengths[0] and [len(rows[0]) for rows in processed[1::2]] == prompt_lengths
    # Earlier tokens are processed again only if the text of the response is tokenized differently.
    assert sum(new_lengths) < prompt_lengths[-1] + 4 * 12 < sum(prompt_lengths)
    without_history = rerun(responder, QUESTIONS[-1], adapter=adapter)
    assert without_history != response


def test_system_turn_can_change_and_history_can_be_cleared(responder):
    conversation = Conversation(responder, "a")
    first = "".join(conversation.respond("Hi"))
    conversation.system = "Be brief."
    second = "".join(conversation.respond("Why?"))
    history = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", first)]
    assert second == rerun(responder, "Why?", adapter="a", history=history)
    conversation.turns = []
    assert "".join(conversation.respond("Hi")) == rerun(responder, "Hi", adapter="a", history=history[:1])
    conversation.system = ""
    conversation.turns = []
    assert "".join(conversation.respond("Hi")) == first


def test_truncated_response_stays_in_the_history(responder):
    """Later responses are conditioned on the truncated one.

    A long prompt enlarges the cache. A prompt that fills the context is refused, and not added to the history.
    """
    responder.sampling = responder.sampling._replace(end_ids=())
    conversation = Conversation(responder, "a")
    first = "".join(conversation.respond("Hi"))
    capacity = conversation.cache.capacity
    second = "".join(conversation.respond("a" * 200))
    assert conversation.cache.capacity > capacity
    assert second == rerun(responder, "a" * 200, adapter="a", history=[Turn("user", "Hi"), Turn("assistant", first)])
    with pytest.raises(ValueError, match="the prompt has .* tokens; expected fewer than 1024"):
        "".join(conversation.respond("b" * 900))
    assert len(conversation.turns) == 4


def test_stop_string_and_penalty_equal_a_fresh_run(responder):
    """The turn ends before the stop string, but the cache contains it. The penalty also applies to cached tokens."""
    responder.sampling = responder.sampling._replace(end_ids=(), repetition_penalty=1.4)
    full = "".join(Conversation(responder, "a").respond("Hi"))
    responder.stop = [full[3:6]]
    conversation = Conversation(responder, "a")
    history = []
    for question in QUESTIONS:
        response = "".join(conversation.respond(question))
        assert response == rerun(responder, question, adapter="a", history=history)
        assert responder.stop[0] not in response and (history or response == full[: full.index(responder.stop[0])])
        history += [Turn("user", question), Turn("assistant", response)]
        assert conversation.turns == history


@pytest.fixture
def adapters(chat_base, tmp_path):
    model, _ = load_llama(chat_base)
    for name, seed in (("a", 1), ("b", 7)):
        make_adapter(model, seed=seed).save(tmp_path / f"{name}.safetensors", base=chat_base, prompt_template="chatml")
    return ["--adapter", tmp_path / "a.safetensors", "--adapter", tmp_path / "b.safetensors", "--device", "cpu"]


def test_terminal_conversation_equals_the_same_prompts_file(adapters, tmp_path):
    """Each adapter has its own history. /reset deletes it (tested for adapter a). The file has equal conversations."""
    lines = "Hi\nWhy?\n/adapter b\nWhy?\n/adapter a\nAnd?\n/reset\nWhy?\n/system Be brief.\nSo?\n"
    stdout, stderr = chat_in_process(lines, *adapters)
    assert stderr.count("Every line is a turn of one conversation. /reset: start a new one. /system TEXT") == 1
    turns, records = {"a": [], "b": []}, []
    responses = stdout.split("\n")
    assert len(responses) == 7 and responses.pop() == ""
    prompts = [("a", "Hi"), ("a", "Why?"), ("b", "Why?"), ("a", "And?"), ("a", "Why?"), ("a", "So?")]
    for (name, question), response in zip(prompts, responses):
        if records and len(records) == 4:
            turns["a"] = []
        turns[name].append({"role": "user", "content": question})
        system = [{"role": "system", "content": "Be brief."}] if question == "So?" else []
        records.append({"messages": system + turns[name], "adapter": name})
        turns[name] = [*turns[name], {"role": "assistant", "content": response}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    args = ("--greedy", "--max-new-tokens", 5, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert run(*adapters, *args).exit_code == 0
    assert [json.loads(line)["output"] for line in (tmp_path / "out.jsonl").open()] == responses
    assert responses[1] != responses[4]


def test_piped_lines_have_no_history(adapters):
    args = ("--greedy", "--max-new-tokens", 5)
    alone = run(*adapters, *args, "Why?").stdout
    assert run(*adapters, *args, input="Hi\nWhy?\n/reset\n").stdout.splitlines()[1] == alone.rstrip("\n")


def test_turn_commands_need_a_template_with_turns(tiny_adapter):
    stdout, stderr = chat_in_process("/system Be brief.\n/reset\n", "--adapter", tiny_adapter)
    for command in ("/system", "/reset"):
        assert f"error: {command} needs a template for conversations; use --template auto" in stderr


def test_template_option_overrides_the_adapters_template(adapters, tmp_path):
    args = ("--greedy", "--max-new-tokens", 9, "Why is it so?")
    by_template = {name: run(*adapters, "--template", name, *args).stdout for name in ("alpaca", "llama-2", "chatml")}
    assert len(set(by_template.values())) == 3 and by_template["chatml"] == run(*adapters, *args).stdout
    result = run(*adapters, "--template", "llama-3", *args)
    assert result.exit_code == 2 and "the template llama-3 does not fit this base" in result.stderr
    result = run(*adapters, "--template", "chatml", "--raw", *args)
    assert result.exit_code == 2 and "use only one of --template chatml and --raw" in result.stderr


def test_base_uses_the_template_of_the_first_adapter(adapters):
    args = ("--greedy", "--max-new-tokens", 9, "Why is it so?")
    base, *_ = run(*adapters, "--compare", *args).stdout.split("\na: ")
    assert base == "base: " + run(*adapters, "--strength", 0, *args).stdout.rstrip("\n")


ANSWERED = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
UNANSWERED = {"messages": [*ANSWERED["messages"], {"role": "user", "content": "Why?"}]}


@pytest.mark.parametrize(
    "record, more, message",
    [
        (ANSWERED, [], "does not end with a user turn, so there is nothing to respond to"),
        ({"messages": []}, [], "does not end with a user turn, so there is nothing to respond to"),
        ({"messages": [{"role": "cat", "content": "Hi"}]}, [], "turn 0: role 'cat' is not one of"),
        (
            UNANSWERED,
            ["--template", "alpaca"],
            "the template alpaca cannot contain earlier turns; use --template auto, llama-2, llama-3 or chatml",
        ),
        (UNANSWERED, ["--raw"], "a prompt of --raw cannot contain earlier turns"),
    ],
)
def test_invalid_conversations_in_a_file_are_reported(adapters, tmp_path, record, more, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"instruction": "Hi"}) + "\n" + json.dumps(record))
    result = run(*adapters, *more, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and f"in.jsonl: record 1: {message}" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
