"""Data files, tokenized examples with loss masks, and batches."""

import gzip
import json
import lzma

import pytest
import torch
from helpers import make_example

from data import (
    IGNORE,
    AlpacaTemplate,
    Example,
    check_record,
    collate,
    epoch_batches,
    format_prompt,
    hold_out,
    group_by_length,
    read_examples,
    read_records,
    split_over_ranks,
    tokenize,
)
from formats.tokenizers import SentencePieceTokenizer, load_tokenizer
from toy.language_model import BASE

RECORDS = [
    {"instruction": "Añade 1.", "input": "2", "output": "3"},
    {"instruction": "Hi", "output": "Hello 🦙"},
]
EXAMPLES = [Example("Añade 1.", "2", "3", name="record 0"), Example("Hi", "", "Hello 🦙", name="record 1")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.mark.parametrize("opener", [open, gzip.open, lzma.open])
@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize("bom", [False, True])
def test_json_and_jsonl_are_read_plain_and_compressed(tmp_path, opener, jsonl, bom):
    path = tmp_path / {open: "a.json", gzip.open: "a.json.gz", lzma.open: "a.json.xz"}[opener]
    text = "\n".join(map(json.dumps, RECORDS)) + "\n\n" if jsonl else "\n" + json.dumps(RECORDS, indent=2)
    with opener(path, "wt", encoding="utf-8-sig" if bom else "utf-8") as file:
        file.write(text)
    assert read_examples(path) == EXAMPLES


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "contains no records"),
        ("[]", "contains no records"),
        ('[{"instruction": "a", "output": "b"},\n {"instruction"]', "line 2, column 16: not JSON"),
        ('{"instruction": "a", "output": "b"}\n{"instr', "line 2, column 2: not JSON"),
        (
            '[{"instruction": "a", "output": "b"}, {"output": "b"}]',
            r"record 1: has no field 'instruction' \(it has: 'output'\)",
        ),
        ('{"instruction": "a", "input": "b"}', "record 0: has no field 'output'"),
        ('[{"instruction": "a", "output": 7}]', "record 0: field 'output' is 7, not a string"),
        ('[{"instruction": "a", "input": 1, "output": ""}]', "record 0: field 'input' is 1"),
        ('["a"]', 'record 0: is "a", not an object'),
        ("7", "record 0: is 7, not an object"),
        ('[{"instruction": "a\\ud800", "output": ""}]', "record 0: field 'instruction' has an unpaired surrogate"),
        ("[" * 100_000, "line 1: cannot be read"),
        ('[{"instruction": ' + "1" * 5000 + "}]", "line 1: cannot be read"),
    ],
)
def test_bad_records_are_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b"\xff\xfe{}"),
        ("a.json.gz", b"plain"),
        ("a.json.xz", b"plain"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9]),
        (
            "a.json.gz",
            gzip.compress(bytes(range(256)), mtime=0)[:20]
            + b"\xff" * 9
            + gzip.compress(bytes(range(256)), mtime=0)[29:],
        ),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_examples(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent.json: no such file"):
        read_examples(tmp_path / "absent.json")


def test_prompts_have_the_papers_format():
    assert format_prompt("Add.", "1 2").endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert format_prompt("Hi {input}").endswith("request.\n\n### Instruction:\nHi {input}\n\n### Response:")


def test_example_is_bos_prompt_response_eos(tokenizer):
    (tokens, *_), num_truncated = tokenize(AlpacaTemplate(tokenizer), EXAMPLES, 512)
    assert tokens.ids[0] == tokenizer.start_ids[0] and tokens.ids[-1] == tokenizer.eos_id
    length = tokens.loss_mask.index(True)
    assert tokens.loss_mask == [False] * length + [True] * (len(tokens.ids) - length)
    assert tokenizer.decode(tokens.ids[1:length]) == format_prompt("Añade 1.", "2")
    assert tokenizer.decode(tokens.ids[length:-1]) == "3"
    assert num_truncated == 0


def test_example_whose_prompt_fills_the_context_is_dropped(tokenizer):
    """The mean loss over no targets would be NaN (llama-cookbook issues 69 and 133)."""
    length = tokenize(AlpacaTemplate(tokenizer), EXAMPLES[:1], 512)[0][0].loss_mask.index(True)
    assert tokenize(AlpacaTemplate(tokenizer), EXAMPLES[:1], length) == ([], 0)
    kept, num_truncated = tokenize(AlpacaTemplate(tokenizer), [Example("", "", "x"), EXAMPLES[0]], length + 1)
    tokens = kept[-1]
    assert num_truncated == 1
    assert len(tokens.ids) == length + 1 and tokens.name == "record 0"
    assert tokens.ids[-1] != tokenizer.eos_id  # truncated: the response does not end here


def test_targets_are_the_next_tokens_of_the_response_only():
    """Every position is compared, to detect unshifted labels (litgpt issue 407) and targets in the padding."""
    inputs, targets, *_ = collate([make_example([1, 10, 11, 20, 21, 2], 3, 0), make_example([1, 12, 2], 2, 1)])
    assert inputs.tolist() == [[1, 10, 11, 20, 21], [1, 12, 0, 0, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE, 20, 21, 2], [IGNORE, 2, IGNORE, IGNORE, IGNORE]]


def test_token_id_zero_is_a_target():
    """Inputs are padded with 0, but only targets of IGNORE are excluded from the loss, so id 0 in a response counts."""
    _, targets, *_ = collate([make_example([1, 5, 0, 2], 2, 0)])
    assert targets.tolist() == [[IGNORE, 0, 2]]


@pytest.mark.parametrize("count, batch_size", [(1000, 8), (5, 8), (64 * 4 + 3, 4)])
def test_every_example_occurs_once_per_epoch(count, batch_size):
    lengths = torch.randint(1, 500, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    for epoch in (0, 1):
        batches = epoch_batches(lengths, batch_size, 0, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == -(-count // batch_size)


def test_order_depends_on_seed_and_epoch_only():
    """Different epochs or seeds have no batch in common, and the batches of an epoch are not sorted by length."""
    lengths = torch.randint(1, 50, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    first = epoch_batches(lengths, 32, 0, 0)
    assert first == epoch_batches(lengths, 32, 0, 0)  # resuming depends on it
    for other in (epoch_batches(lengths, 32, 0, 1), epoch_batches(lengths, 32, 1, 0)):
        assert not {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in other}
    # Without the shuffle of the batches, their lengths would increase within a pool of 64 batches.
    longest = [lengths[batch[-1]] for batch in first[:60]]
    assert sum(a > b for a, b in zip(longest, longest[1:])) > 10


def test_batches_have_little_padding():
    lengths = torch.randint(40, 500, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = epoch_batches(lengths, 64, 0, 0)
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert positions / sum(lengths) < 1.05


@pytest.mark.parametrize("budget", [1, 100, 1000, 10**6])
def test_micro_batches_stay_within_the_token_budget(budget):
    lengths = torch.randint(3, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [make_example([record] * length, 2, record) for record, length in enumerate(lengths)]
    parts = [collate(group) for group in group_by_length(examples, budget)]
    assert sorted(i for inputs, *_ in parts for i in inputs[:, 0].tolist()) == list(range(64))
    assert all(len(inputs) == 1 or inputs.numel() <= budget for inputs, *_ in parts)
    assert sum((targets != IGNORE).sum() for _, targets, *_ in parts) == sum(
        example.num_targets for example in examples
    )
    if budget == 10**6:
        assert len(parts) == 1


def test_rows_with_and_without_an_image_share_a_batch():
    features = [torch.tensor([1.0, 2.0]), None, torch.tensor([3.0, 4.0])]
    batch = collate([make_example([1, 5, 6 + i], 2, i, seen) for i, seen in enumerate(features)])
    assert batch.features.tolist() == [[1, 2], [0, 0], [3, 4]] and batch.has_image.tolist() == [True, False, True]
    batch = collate([make_example([1, 5, 6], 2, 0)])
    assert batch.features is batch.has_image is None


def test_features_stay_with_their_example(tokenizer):
    """Dropping an example must not assign its features to the next one."""
    length = tokenize(AlpacaTemplate(tokenizer), EXAMPLES[:1], 512)[0][0].loss_mask.index(True)
    examples = [
        Example("a " * 100, "", "dropped", features=torch.tensor([0.0])),
        Example("Hi", "", "first", features=torch.tensor([1.0])),
        Example("Hi", "", "none"),
        Example("Hi", "", "second", features=torch.tensor([2.0])),
    ]
    kept, _ = tokenize(AlpacaTemplate(tokenizer), examples, length + 40)
    assert [None if tokens.features is None else tokens.features.item() for tokens in kept] == [1, None, 2]


def test_real_alpaca_round_trips_with_the_real_tokenizer(data):
    tokenizer = SentencePieceTokenizer(data / "tokenizers" / "llama2_tokenizer.model")
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")
    assert len(examples) == 52_002
    sample = examples[::100]
    tokens, _ = tokenize(AlpacaTemplate(tokenizer), sample, 4096)
    assert len(tokens) == len(sample)
    for example, (ids, loss_mask, *_) in zip(sample, tokens):
        prompt_length = loss_mask.index(True)
        assert tokenizer.decode(ids[1:prompt_length]) == format_prompt(example.instruction, example.input)
        assert tokenizer.decode(ids[prompt_length:-1]) == example.output
    merged = sum(
        tokenizer.encode(format_prompt(e.instruction, e.input) + e.output)[: t.loss_mask.index(True) - 1]
        != t.ids[1 : t.loss_mask.index(True)]
        for e, t in zip(sample, tokens)
    )
    assert merged > 0  # some prompts have different ids if they are tokenized together with the response


def test_real_lengths_need_little_padding(data):
    """Batches have fewer than 1.05 positions per token. Padding every example to 512 tokens would give 4.03."""
    tokenizer = SentencePieceTokenizer(data / "tokenizers" / "llama2_tokenizer.model")
    examples = read_examples(data / "instructions" / "alpaca_data.json.xz")[::4]
    lengths = [len(t.ids) for t in tokenize(AlpacaTemplate(tokenizer), examples, 512)[0]]
    batches = epoch_batches(lengths, 64, 0, 0)
    assert sum(len(b) * max(lengths[i] for i in b) for b in batches) / sum(lengths) < 1.05


def test_check_record_ignores_other_fields():
    assert check_record({"instruction": "a", "output": "b", "id": 3}, "f", "r") == Example("a", "", "b", name="r")


def test_held_out_examples_are_not_trained_on():
    training, validation = hold_out(list(range(100)), 0.2, seed=0)
    assert len(validation) == 20 and sorted(training + validation) == list(range(100))
    assert hold_out(list(range(100)), 20, seed=0) == (training, validation) != hold_out(list(range(100)), 20, seed=1)
    with pytest.raises(ValueError, match="holds out 3 examples, but there are only 3"):
        hold_out([1, 2, 3], 3, seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_example_goes_to_one_rank(ranks):
    examples = [make_example([i] * length, 1, i) for i, length in enumerate([3, 50, 7, 7, 20, 9, 30])]
    parts = split_over_ranks(examples, ranks)
    assert len(parts) == ranks and sorted(e.name for part in parts for e in part) == list(range(7))
    assert max(sum(e.num_tokens for e in part) for part in parts) <= sum(e.num_tokens for e in examples) / ranks + 50


THREE = [{"instruction": f"Say {i}.", "input": None, "output": str(i)} for i in range(3)]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            json.dumps({"data": THREE}),
            "is one object, whose key 'data' contains 3 records; the file must contain only this list",
        ),
        (json.dumps({"version": 1, "data": THREE}, indent=1), "whose key 'data' contains 3 records"),
        (
            ",\n".join(json.dumps(each, indent=1) for each in THREE),
            "contains 3 records that are not in a list; enclose them in",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n', "line 2, column 20: not JSON"),
        ('[{" instruction": "a", "output": "b"}]', "has no field 'instruction' .it has: ' instruction', 'output'"),
    ],
)
def test_unsupported_record_layouts_are_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        read_examples(tmp_path / "a.json")


def test_file_of_one_conversation_is_read(tmp_path):
    """Records in a list under a key are refused. Turns with three fields must not be mistaken for them."""
    turns = [{"role": role, "content": "Hi.", "weight": 1} for role in ("user", "assistant")]
    (tmp_path / "a.json").write_text(json.dumps({"messages": turns}, indent=1))
    assert read_records(tmp_path / "a.json") == [{"messages": turns}]


def test_null_input_is_an_empty_input(tmp_path):
    """The file has one record, a single object that spans several lines."""
    (tmp_path / "a.json").write_text(json.dumps(THREE[1], indent=1))
    (example,) = read_examples(tmp_path / "a.json")
    assert (example.instruction, example.input, example.output) == ("Say 1.", "", "1")


def test_data_of_which_no_example_fits_is_refused():
    with pytest.raises(ValueError, match="every example was dropped, because it is too long for --max-seq-len"):
        hold_out([], 0, seed=0)
