"""Film reviews as instructions: SST-2's sentences, each with a response of one word.

    python docs/examples/reviews.py write SST-2/train.tsv SST-2/dev.tsv
    python docs/examples/reviews.py score answers.jsonl

The first command writes reviews.json for training, and unseen.jsonl for `generate.py --prompts`, to the current folder.
The second one counts the responses that are exactly right. After the first line, which is a heading, each line of
SST-2's files contains a sentence and its label, 0 or 1, separated by a tab.
"""

import json
from pathlib import Path

import click

QUESTION = "Is this review of a film positive or negative? Answer with one word."
ANSWERS = {"0": "Negative", "1": "Positive"}


@click.group()
def main():
    """Write SST-2's sentences as instructions, or score the responses to them."""


def read_sentences(path: str, number: int) -> list[dict[str, str]]:
    """Return the first `number` sentences of a file as records, with the expected response in the field `expected`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.split("\t") for line in lines[:number]]
    return [{"instruction": QUESTION, "input": text, "expected": ANSWERS[label]} for text, label in pairs]


@main.command()
@click.argument("train")
@click.argument("unseen")
@click.option("--train-number", default=800, show_default=True, help="Number of sentences to take from TRAIN.")
@click.option("--unseen-number", default=400, show_default=True, help="Number of sentences to take from UNSEEN.")
def write(train, unseen, train_number, unseen_number):
    """Write sentences of TRAIN to reviews.json, and of UNSEEN to unseen.jsonl, in the current folder."""
    examples = [record | {"output": record.pop("expected")} for record in read_sentences(train, train_number)]
    Path("reviews.json").write_text(json.dumps(examples, indent=1), encoding="utf-8")
    records = read_sentences(unseen, unseen_number)
    Path("unseen.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


@main.command()
@click.argument("answers")
def score(answers):
    """Print the number and the percentage of responses in ANSWERS, a JSONL file, that are exactly right."""
    records = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    right = sum(record["output"].strip() == record["expected"] for record in records)
    print(f"{right} of {len(records)} are exactly right: {right / len(records):.1%}")


if __name__ == "__main__":
    main()
