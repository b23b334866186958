"""Conversation records: every layout, mixed in one file, and every error."""

import json
import shutil

import pytest
from helpers import run
from safetensors import safe_open

from data import AlpacaTemplate, Example, Turn, tokenize
from formats.bases import load_llama
from formats.chat_templates import load_template
from formats.conversations import read_conversation
from tasks import load_task
from training.run_files import read_metrics

TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Why?"), ("assistant", "Because.")]
MESSAGES = {"messages": [{"role": role, "content": text} for role, text in TURNS], "id": 7}
SHARE = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = {"conversations": [{"from": SHARE[role], "value": text} for role, text in TURNS]}


def with_turn(role="assistant", **fields):
    """Return a record with the first three of TURNS, in which the turns of one role have additional fields."""
    return {"messages": [turn | fields if turn["role"] == role else turn for turn in MESSAGES["messages"][:3]]}


def test_record_layouts_are_recognized_by_their_fields(tmp_path):
    records = [
        MESSAGES,
        SHAREGPT,
        {"prompt": "Say a.", "completion": "a"},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": MESSAGES["messages"][1:3], "image": "a.png"},
        {"prompt": "Hi", "messages": MESSAGES["messages"]},  # as in UltraChat, which repeats the first user turn
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    turns = tuple(Turn(*turn) for turn in TURNS)
    assert load_task("instructions").read(tmp_path / "mixed.jsonl") == [
        Example(turns=turns, name="record 0"),
        Example(turns=turns, name="record 1"),
        Example("Say a.", "", "a", name="record 2"),
        Example("Add.", "1 2", "3", name="record 3"),
        Example("Hi", "", "Ho", "a.png", "record 4", turns[1:3]),
        Example(turns=turns, name="record 5"),
    ]


def make_record(*roles, content="a"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": "Hi"}, "field 'messages' is \"Hi\", not a list"),
        ({"messages": ["Hi"]}, 'turn 0: is "Hi", not an object'),
        ({"messages": [{"role": "user"}]}, r"turn 0: has no field 'content' \(it has: 'role'\)"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "turn 0: has no field 'from'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "turn 0: field 'content' is null, not a string",
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "turn 0: field 'role' is 3, not a string"),
        (make_record("user", "tool"), "turn 1: role 'tool' is not one of system, user, human, assistant, gpt"),
        (make_record("user", "assistant", content=" \n"), "turn 0: field 'content' is empty"),
        (make_record("assistant"), "turn 0: 'assistant' comes first; the order is system"),
        (make_record("system", "assistant"), "turn 1: 'assistant' follows 'system'"),
        (make_record("user", "user"), "turn 1: 'user' follows 'user'"),
        (make_record("user", "assistant", "assistant"), "turn 2: 'assistant' follows 'assistant'"),
        (make_record("user", "assistant", "system"), "turn 2: 'system' follows 'assistant'"),
        (make_record("system", "user"), "has no turn of the assistant, so there is nothing to learn"),
        ({"messages": []}, "has no turn of the assistant"),
        ({"prompt": "a", "completion": ["b"]}, "field 'completion' is \\[\"b\"\\], not a string"),
        ({"prompt": "a"}, "has no field 'instruction'"),
        ([], r"is \[\], not an object"),
    ],
)
def test_bad_conversations_are_named(record, message):
    with pytest.raises(ValueError, match=f"^chats.json: record 3: {message}"):
        read_conversation(record, "chats.json", "record 3")


def test_conversation_may_end_with_the_user():
    record = {"messages": [*MESSAGES["messages"], {"role": "user", "content": "And?"}]}
    assert read_conversation(record, "a.json", "r").turns[-1] == Turn("user", "And?")


HISTORY = {"instruction": "Why?", "input": "", "output": "Because.", "system": "Be brief.", "history": [["Hi", "Ho"]]}


def test_system_and_history_fields_become_turns():
    """Read LLaMA-Factory's `system` and `history`, and ShareGPT's `system` outside its turns."""
    expected = tuple(Turn(*turn) for turn in TURNS)
    sharegpt_system = {"system": "Be brief.", "conversations": SHAREGPT["conversations"][1:]}
    for record in (
        HISTORY,
        sharegpt_system,
        {"prompt": "Why?", "completion": "Because."} | {k: HISTORY[k] for k in ("system", "history")},
    ):
        assert read_conversation(record, "a.json", "r") == Example(turns=expected, name="r")
    with_input = read_conversation(HISTORY | {"input": "1 2"}, "a.json", "r")
    assert with_input.turns[-2] == Turn("user", "Why?\n\n1 2")
    nothing = {"instruction": "Add.", "input": None, "output": "3", "system": "", "history": []}
    assert read_conversation(nothing, "a.json", "r") == Example("Add.", "", "3", name="r")
    with pytest.raises(ValueError, match="turn 0: 'system' follows 'system'"):
        read_conversation(SHAREGPT | {"system": "Be kind."}, "a.json", "r")


@pytest.mark.parametrize(
    "record, message",
    [
        (
            HISTORY | {"history": ["Hi", "Ho"]},
            "field 'history' is not a list of pairs; each must be a prompt and its response",
        ),
        (HISTORY | {"history": [["Hi", 3]]}, "field 'history' is 3, not a string"),
        (HISTORY | {"system": ["a"]}, r"field 'system' is \[.a.\], not a string"),
        (SHAREGPT | {"tools": "[{}]"}, "field 'tools' is not supported"),
        ({"instruction": "a", "context": "b", "output": "c"}, "field 'context' is not supported; rename it to 'input'"),
        ({"prompt": "a", "completion": "b", "label": False}, "field 'label' is false, which marks an undesirable"),
        (
            HISTORY | {"images": ["a.png"]},
            "field 'images' is not supported; put a single file in the record's field 'image'",
        ),
        (with_turn(tool_calls=[{"name": "f"}]), "turn 2: field 'tool_calls' is not supported"),
        (with_turn(reasoning_content="Hm."), "turn 2: field 'reasoning_content' is not supported"),
        (with_turn(weight=0.5), "turn 2: field 'weight' is 0.5; expected 0 or 1"),
        (with_turn(train="no"), "turn 2: field 'train' is 'no'; expected true or false"),
        (
            with_turn(role="user", weight=1),
            "turn 1: field 'weight' selects a user turn for training; select only assistant turns",
        ),
    ],
)
def test_unsupported_fields_are_named(record, message):
    with pytest.raises(ValueError, match=f"^chats.json: record 3: {message}"):
        read_conversation(record, "chats.json", "record 3")


def test_empty_and_default_fields_are_ignored():
    record = with_turn(tool_calls=[], reasoning_content=None, weight=1, train=True) | {"tools": ""}
    assert read_conversation(record, "a.json", "r").turns == tuple(Turn(*turn) for turn in TURNS[:3])


@pytest.mark.parametrize("text", ["<image>\nHi", "Hi <image>", "\n<video>Hi"])
def test_image_placeholder_is_removed(text):
    first = {"from": "human", "value": text}
    record = {"image": "a.jpg", "conversations": [first, *SHAREGPT["conversations"][2:]]}
    assert read_conversation(record, "a.json", "r").turns == tuple(Turn(*turn) for turn in TURNS[1:])
    record = {"image": "a.jpg", "instruction": text, "input": "x", "output": "Ho"}
    assert read_conversation(record, "a.json", "r").instruction == "Hi"
    assert read_conversation(record | {"image": ""}, "a.json", "r").instruction == text
    assert read_conversation(record | {"instruction": "a", "input": text}, "a.json", "r").input == "Hi"


@pytest.mark.parametrize("text", ["<image> <image> Hi", "Of <image> here", "<image>a<image>"])
def test_several_placeholders_or_one_within_text_are_refused(text):
    record = {"image": "a.jpg", "instruction": text, "output": "Ho"}
    both = record | {"instruction": "<image> Look.", "input": "Look. <image>"}
    with pytest.raises(ValueError, match="a.json: r: has 2 placeholders"):
        read_conversation(both, "a.json", "r")
    with pytest.raises(
        ValueError,
        match="a.json: r: has (2|a) placeholders? such as <image>.*; expected only one, at the beginning or the end",
    ):
        read_conversation(record, "a.json", "r")


def test_turns_can_be_excluded_from_the_loss(chat_base, tmp_path, capsys):
    """OpenAI's `weight` and axolotl's `train` change the loss mask.

    The tokens up to the end of the last response that has a loss stay the same, and later tokens are dropped. Records
    in which no response has a loss are skipped. A file with only such records is refused.
    """
    _, tokenizer = load_llama(chat_base)
    template = load_template("auto", tokenizer)
    ids = {}
    for flags, expected in [
        (({}, {}), ["Ho", "Because."]),
        (({"weight": 0}, {"weight": 1}), ["Because."]),
        (({}, {"train": False}), ["Ho"]),
    ]:
        turns = [dict(turn) for turn in MESSAGES["messages"]]
        turns[2] |= flags[0]
        turns[4] |= flags[1]
        (tokens,), num_truncated = tokenize(template, [read_conversation({"messages": turns}, "a.json", "r")], 512)
        assert [text for text, _ in texts_with_loss(tokenizer, tokens)] == expected and num_truncated == 0
        ids[tuple(expected)] = tokens.ids
    assert ids["Ho", "Because."] == ids["Because.",]
    assert ids["Ho", "Because."][: len(ids["Ho",])] == ids["Ho",]
    without_loss = {
        "messages": [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in MESSAGES["messages"]]
    }
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [MESSAGES, without_loss])))
    assert len(load_task("instructions").read(tmp_path / "a.jsonl")) == 1
    assert "a.jsonl: 1 of 2 records skipped: no turn to train on" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps(without_loss))
    with pytest.raises(ValueError, match="a.jsonl: none of the 1 records has a turn to train on"):
        load_task("instructions").read(tmp_path / "a.jsonl")


def texts_with_loss(tokenizer, tokens):
    """Return (text, id of the special token that ends it) for each response that has a loss."""
    texts, ids = [], []
    for id, mask in zip(tokens.ids, [*tokens.loss_mask[1:], False]):  # shifted by one: the mask of the next token
        ids += [id] if ids else []
        if mask and not ids:
            ids = [None]
        elif not mask and ids:
            texts.append((tokenizer.decode(ids[1:]), ids[-1]))
            ids = []
    return texts


def test_loss_covers_every_response_and_nothing_else(chat_base):
    _, tokenizer = load_llama(chat_base)
    template = load_template("auto", tokenizer)
    example = Example(turns=tuple(Turn(*turn) for turn in TURNS) + (Turn("user", "And?"),), name="r")
    (tokens,), num_truncated = tokenize(template, [example], 512)
    assert texts_with_loss(tokenizer, tokens) == [("Ho", 2), ("Because.", 2)] and num_truncated == 0
    assert tokenizer.decode(tokens.ids) == "system\nBe brief.\nuser\nHi\nassistant\nHo\nuser\nWhy?\nassistant\nBecause."


def test_truncation_drops_whole_rounds_from_the_end(chat_base):
    """Only the first response is truncated within its text, as with Alpaca. Later rounds are kept or dropped whole."""
    _, tokenizer = load_llama(chat_base)
    template = load_template("auto", tokenizer)
    turns = (*TURNS, ("user", "a" * 80), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    example = Example(turns=tuple(Turn(*turn) for turn in turns), name="r")
    (whole,), _ = tokenize(template, [example], 4096)
    ends = [i + 1 for i, id in enumerate(whole.ids) if id == 2 and whole.loss_mask[i]]
    assert len(ends) == 4
    for length in range(len(whole.ids) + 2):
        kept, truncated = tokenize(template, [example], length)
        fitting = [end for end in ends if end <= length]
        if length > whole.loss_mask.index(True):
            end = max(fitting, default=length)
            assert kept[0][:2] == (whole.ids[:end], whole.loss_mask[:end]) and truncated == (length < len(whole.ids))
        else:
            assert (kept, truncated) == ([], 0)


def test_alpaca_template_takes_a_single_round(tiny_base):
    _, tokenizer = load_llama(tiny_base)
    one_round = Example("Hi", "", "Ho", "", "record 0", (Turn("user", "Hi"), Turn("assistant", "Ho")))
    template = AlpacaTemplate(tokenizer)
    assert list(template.encode_exchanges([one_round])) == list(template.encode_exchanges([Example("Hi", "", "Ho")]))
    with pytest.raises(
        ValueError, match="^record 1: is a conversation of 5 turns, but the template alpaca takes one instruction"
    ):
        list(template.encode_exchanges([read_conversation(HISTORY, "a.json", "record 1")]))


@pytest.fixture
def chats(tmp_path):
    """Path of a file with thirty records in three layouts."""
    kinds = (MESSAGES, SHAREGPT, {"instruction": "Add.", "input": "1 2", "output": "3"})
    (tmp_path / "chats.json").write_text(json.dumps([kinds[i % 3] for i in range(30)]))
    return tmp_path / "chats.json"


def train(base, chats, out, *args):
    args = ("--base", base, "--data", chats, "--out", out, *args, "--val-size", 4, "--lr", 0.05, "--device", "cpu")
    return run(*args, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1)


@pytest.mark.parametrize("template", [None, "auto", "chatml", "llama-2"])
def test_training_on_conversations_lowers_the_validation_loss(chat_base, chats, tmp_path, template):
    """train.py writes the template's name to the adapter file. The default is the base's own template."""
    result = train(chat_base, chats, tmp_path / "run", *(("--template", template) if template else ()))
    assert result.exit_code == 0, result.stderr
    assert "26 examples to train on, 4 held out, 0 dropped" in result.stderr
    with safe_open(tmp_path / "run" / "adapter.safetensors", "pt") as file:
        assert file.metadata()["prompt_template"].partition(":")[0] == (template or "auto")
    losses = [line["val_loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1


def test_resuming_with_a_different_template_is_refused(chat_base, chats, tmp_path):
    args = (chat_base, chats, tmp_path / "run", "--template")
    assert train(*args, "chatml", "--max-minutes", 1e-6).exit_code == 0
    result = train(*args, "auto", "--resume")
    assert result.exit_code == 2 and "was made with template = chatml, not auto; a resumed run" in result.stderr
    assert train(*args, "chatml", "--resume").exit_code == 0


def test_resuming_with_a_changed_template_of_the_base_is_refused(chat_base, chats, tmp_path):
    shutil.copytree(chat_base, tmp_path / "base")
    args = (tmp_path / "base", chats, tmp_path / "run")
    assert train(*args, "--max-minutes", 1e-6).exit_code == 0
    config = (tmp_path / "base" / "tokenizer_config.json").read_text()
    (tmp_path / "base" / "tokenizer_config.json").write_text(config.replace("Be kind.", "Be rude."))
    result = train(*args, "--resume")
    assert result.exit_code == 2 and "was made with prompt_template = auto:" in result.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (),
            "the template auto needs a chat_template in tokenizer_config.json, chat_template.jinja or a GGUF file",
        ),
        (
            ("--template", "alpaca"),
            "chats.json: record 0: is a conversation of 5 turns, but the template alpaca takes one instruction",
        ),
        (
            ("--template", "chatml"),
            "the template chatml does not fit this base: its tokenizer has no special token '<|im_start|>'",
        ),
        (
            ("--template", "llama-3"),
            "its tokenizer has no special token '<|start_header_id|>'; use --template alpaca or llama-2",
        ),
    ],
)
def test_template_that_does_not_fit_the_base_is_refused(tiny_base, chats, tmp_path, args, message):
    result = train(tiny_base, chats, tmp_path / "run", *args)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
