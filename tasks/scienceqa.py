"""ScienceQA (Lu et al., 2022): multiple-choice questions on school science, about half of them with an image.

This module reads the official files, problems.json and pid_splits.json. Scores are defined as in the official program.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from data import Example, check_text
from runtime.errors import printable
from runtime.files import read_json, write_json, write_text
from runtime.schema import brief, listed
from tasks import Task
from tasks.responses import Responses, require_responses

LETTERS = "ABCDEFGHIJ"
SUBJECTS = ("natural science", "social science", "language science")


@dataclass(frozen=True, kw_only=True)
class Problem(Example):
    """A question with several choices, one of which is right."""

    id: str
    choices: list[str]
    answer: int  # an index of choices
    hint: str  # textual context, or ""
    grade: int
    subject: str

    def answers(self) -> list[str]:
        """Return the response that corresponds to each choice."""
        return [f"The answer is ({letter})" for letter in LETTERS[: len(self.choices)]]

    def chosen(self, text: str | None) -> int | None:
        """Return the index of the choice that a response names, or None if the response names none of the choices."""
        found = re.search(r"[Tt]he answer is \(?([A-Z])\b", text or "")
        index = LETTERS.find(found[1]) if found else -1
        return index if 0 <= index < len(self.choices) else None


# The problems that each column of the results covers, as defined in the official program.
COLUMNS = {
    "NAT": lambda problem: problem.subject == "natural science",
    "SOC": lambda problem: problem.subject == "social science",
    "LAN": lambda problem: problem.subject == "language science",
    "TXT": lambda problem: problem.hint != "",
    "IMG": lambda problem: problem.image != "",
    "NO": lambda problem: problem.hint == problem.image == "",
    "G1-6": lambda problem: 1 <= problem.grade <= 6,
    "G7-12": lambda problem: 7 <= problem.grade <= 12,
    "Avg": lambda problem: True,
}

# Table 2 of the paper: trained parameters, and the accuracy on the test split in % for each column.
PUBLISHED = {
    "random choice": ("-", (40.28, 46.13, 29.25, 47.45, 40.08, 33.66, 39.35, 40.67, 39.83)),
    "human": ("-", (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40)),
    "MCAN": ("95M", (56.08, 46.23, 58.09, 59.43, 51.17, 55.40, 51.65, 59.72, 54.54)),
    "Top-Down": ("70M", (59.50, 54.33, 61.82, 62.90, 54.88, 59.79, 57.27, 62.16, 59.02)),
    "BAN": ("112M", (60.88, 46.57, 66.64, 62.61, 52.60, 65.51, 56.83, 63.94, 59.37)),
    "DFAF": ("74M", (64.03, 48.82, 63.55, 65.88, 54.49, 64.11, 57.12, 67.17, 60.72)),
    "ViLT": ("113M", (60.48, 63.89, 60.27, 63.20, 61.38, 57.00, 60.72, 61.90, 61.14)),
    "Patch-TRM": ("90M", (65.19, 46.79, 65.55, 66.96, 55.28, 64.95, 58.04, 67.50, 61.42)),
    "VisualBERT": ("111M", (59.33, 69.18, 61.18, 62.71, 62.17, 58.54, 62.96, 59.92, 61.87)),
    "UnifiedQA": ("223M", (68.16, 69.18, 74.91, 63.78, 61.38, 77.84, 72.98, 65.00, 70.12)),
    "UnifiedQA (CoT)": ("223M", (71.00, 76.04, 78.91, 66.42, 66.53, 81.81, 77.06, 68.82, 74.11)),
    "GPT-3": ("0", (75.04, 66.59, 78.00, 74.24, 65.74, 79.58, 76.36, 69.87, 74.04)),
    "GPT-3 (CoT)": ("0", (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17)),
    "ChatGPT (CoT)": ("0", (78.82, 70.98, 83.18, 77.37, 67.92, 86.13, 80.72, 74.03, 78.31)),
    "GPT-4 (CoT)": ("0", (85.48, 72.44, 90.27, 82.65, 71.49, 92.89, 86.66, 79.04, 83.99)),
    "MM-CoT, text only": ("223M", (71.09, 70.75, 69.18, 71.16, 65.84, 71.57, 71.00, 69.68, 70.53)),
    "MM-CoT": ("223M", (87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37, 84.91)),
    "LLaMA-Adapter, text only": ("1.2M", (79.00, 73.79, 80.55, 78.30, 70.35, 83.14, 79.77, 75.68, 78.31)),
    "LLaMA-Adapter": ("1.8M", (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19)),
}


def read(path: str | Path, images: str | Path | None = None, split: str | None = None) -> list[Problem]:
    """Read the problems of one split, by default "train".

    The split is defined by pid_splits.json in the same folder or, if there is no such file, by the field "split" of
    each problem. Images are at SPLIT/ID/image.png in the folder `images`, by default the folder of the problems. If
    `images` has no folder SPLIT, they are at ID/image.png. Raises OSError, or ValueError if the split or a problem
    is invalid.
    """
    path, split = Path(path), split or "train"
    folder = Path(images or path.parent)
    records = read_json(path)
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise ValueError(f"{path}: is not an object that maps ids to problems; expected ScienceQA's problems.json")
    splits = path.with_name("pid_splits.json")
    if splits.exists():
        by_split = read_json(splits)
        if not isinstance(by_split, dict) or not isinstance(by_split.get(split), list):
            names = listed(by_split) if isinstance(by_split, dict) else brief(by_split)
            raise ValueError(f"{splits}: has no list of ids for the split {split!r} (it has: {names})")
        ids = list(map(str, by_split[split]))
        missing = [id for id in ids if id not in records]
        if missing:
            raise ValueError(
                f"{path}: has no problem {missing[0]}, which {splits} lists (missing: {len(missing)} of {len(ids)})"
            )
    else:
        ids = [id for id, record in records.items() if record.get("split") == split]
    if not ids:
        raise ValueError(f"{path}: has no problems in the split {split!r}")
    return [check_problem(id, records[id], path, folder) for id in ids]


def check_problem(id: str, record: dict, path: Path, images: Path) -> Problem:
    """Check one value of the file and return a Problem. Raises a ValueError that names the problem and the field."""
    where = f"{path}: problem {id}"
    for field in ("question", "choices", "answer", "hint", "image", "grade", "subject", "split"):
        if field not in record:
            raise ValueError(f"{where}: has no field '{field}' (it has: {listed(record)})")
    choices, answer, question = record["choices"], record["answer"], record["question"]
    hint, image = ("" if record[field] is None else record[field] for field in ("hint", "image"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: field 'choices' is not a list of strings")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: has {len(choices)} choices, not 2 to {len(LETTERS)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer {answer!r} is not the index of one of its {len(choices)} choices")
    for field, value in (("question", question), ("hint", hint), ("image", image), *(("choices", c) for c in choices)):
        check_text(value, where, field)
    grade = re.fullmatch(r"grade([1-9]|1[0-2])", str(record["grade"]))
    if grade is None:
        raise ValueError(f"{where}: grade {record['grade']!r} is not one of 'grade1' to 'grade12'")
    if record["subject"] not in SUBJECTS:
        raise ValueError(f"{where}: subject {record['subject']!r} is not one of {', '.join(SUBJECTS)}")
    if image:
        split = str(record["split"])
        image = f"{split}/{id}/{image}" if (images / split).is_dir() else f"{id}/{image}"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return Problem(
        instruction="\n".join(filter(None, (question, hint, options))),  # the paper's order
        output=f"The answer is ({LETTERS[answer]})",
        image=image,
        name=f"problem {id}",
        id=id,
        choices=choices,
        answer=answer,
        hint=hint,
        grade=int(grade[1]),
        subject=record["subject"],
    )


def score(problems: Sequence[Problem], answers: Sequence[str | None]) -> dict[str, float | None]:
    """Measure the accuracy on ScienceQA in percent.

    The nine scores are those of the columns of the paper's Table 2. An answer that names none of the choices counts as
    wrong. A column without problems has no score.

    The command prints the paper's rows for comparison. It writes results.json, in the official format and with the
    accuracies, and wrong.txt, a readable list of wrong answers.
    """
    right = [problem.chosen(text) == problem.answer for problem, text in zip(problems, answers)]
    scores: dict[str, float | None] = {}
    for column, counts in COLUMNS.items():
        inside = [yes for yes, problem in zip(right, problems) if counts(problem)]
        scores[column] = 100 * sum(inside) / len(inside) if inside else None
    return scores


def read_responses(path: str | Path, problems: Sequence[Problem]) -> list[str]:
    """Return the text of the answer to each problem, from a file in the official format, {"results": {id: index}}.

    The text is "" if no choice has this index. Raises OSError, or ValueError if the file is invalid, if a problem has
    no answer, or if its index is not an integer.
    """
    results = read_json(path)
    results = results.get("results") if isinstance(results, dict) else None
    if not isinstance(results, dict):
        raise ValueError(f"{path}: has no object 'results' that maps problem ids to choice indices")
    require_responses(path, [problem.id for problem in problems], results, "problem")
    answers = []
    for problem in problems:
        index = results[problem.id]
        if type(index) is not int:
            raise ValueError(f"{path}: problem {problem.id}: {index!r} is not the index of a choice")
        answers.append(problem.answers()[index] if 0 <= index < len(problem.choices) else "")
    return answers


def write_results(answers: Responses, scores: dict[str, float | None], folder: Path) -> None:
    """Print the table, and write results.json and wrong.txt to `folder`. Raises OSError."""
    problems, texts = answers.examples, answers.texts
    chosen = [problem.chosen(text) for problem, text in zip(problems, texts)]
    too_long = [problem.id for problem, text in zip(problems, texts) if text is None]
    unclear = [p.id for p, text, index in zip(problems, texts, chosen) if text is not None and index is None]
    print_table(answers, scores)
    click.echo(f"\nanswers that name none of the choices, and count as wrong: {len(unclear):,}")
    if too_long:
        click.echo(f"problems that are too long for the base, and count as wrong: {len(too_long):,}")

    summary = {
        "acc": scores["Avg"],
        "correct": sum(problem.answer == index for problem, index in zip(problems, chosen)),
        "count": len(problems),
        "columns": scores,
        "answers": answers.method,
        "split": answers.split,
        "unclear": unclear,
        "too_long": too_long,
        "results": {problem.id: -1 if index is None else index for problem, index in zip(problems, chosen)},
    }
    if answers.generated:
        summary["outputs"] = {problem.id: text for problem, text in zip(problems, texts)}
    wrong = wrong_answers(answers)
    (folder / "wrong.txt").unlink(missing_ok=True)  # an earlier call's answers do not belong to the new results
    write_json(folder / "results.json", summary)
    write_text(folder / "wrong.txt", "\n\n".join(wrong) + "\n")
    click.echo(
        f"wrote results.json, and wrong.txt with {len(wrong):,} wrong answers, to {printable(str(folder))}", err=True
    )


def print_table(answers: Responses, scores: dict[str, float | None]) -> None:
    """Print the scores below the rows of the paper's Table 2."""
    what = f"ScienceQA, {answers.split} split, {len(answers.examples):,} problems; answers: {answers.method}"
    click.echo(f"{what}; accuracy in %, the paper's rows first\n")
    click.echo(f"{'':25}{'trained':>10}" + "".join(f"{column:>7}" for column in COLUMNS))
    trained = "" if answers.num_parameters is None else f"{answers.num_parameters:,}"
    for name, (parameters, row) in [*PUBLISHED.items(), (answers.model_name, (trained, scores.values()))]:
        shares = ("-" if share is None else f"{share:.2f}" for share in row)
        click.echo(f"{name:25}{parameters:>10}" + "".join(f"{share:>7}" for share in shares))


def wrong_answers(answers: Responses) -> list[str]:
    """Return one text per wrong answer: the problem, the right answer, and the answer that was given."""
    wrong = []
    for problem, text in zip(answers.examples, answers.texts):
        index = problem.chosen(text)
        if index != problem.answer:
            given = "too long" if text is None else "none of them" if index is None else problem.answers()[index]
            given += f", parsed from {text!r}" if answers.generated and text is not None else ""
            wrong.append(f"{problem.name} {problem.image}\n{problem.instruction}\n{problem.output}; {given}")
    return wrong


TASK = Task(
    read,
    score,
    choices=Problem.answers,
    read_responses=read_responses,
    write_results=write_results,
    split="test",
    max_new_tokens=32,
    data_help="ScienceQA's file problems.json.",
    unit="problem",
)
