"""Data of the paper's image experiments: ScienceQA's problems and COCO's captions, and how answers to them are marked.

Both are read from their official files, and become Examples to train on.
"""

import io
import re
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple, TypeVar

from data import Example, check_record, check_text, read_examples, read_value
from multimodal import require_file

# ---------------------------------------------------------------------------------------------------
# ScienceQA (Lu et al., 2022)

LETTERS = "ABCDEFGHIJ"
SUBJECTS = ("natural science", "social science", "language science")


class Problem(NamedTuple):
    """A question with choices, one of which is right."""

    id: str
    question: str
    choices: list[str]
    answer: int  # an index of choices
    hint: str  # textual context, or ""
    image: str  # a file in the folder of images, or ""
    grade: int
    subject: str

    @property
    def name(self) -> str:
        return f"problem {self.id}"

    def text(self) -> str:
        """Question, textual context and options, in the paper's order."""
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices))
        return "\n".join(filter(None, (self.question, self.hint, options)))

    def answers(self) -> list[str]:
        """What a model says that chooses the first, the second ..."""
        return [f"The answer is ({letter})" for letter in LETTERS[: len(self.choices)]]

    def chosen(self, text: str) -> int | None:
        """Which of the choices a text is for; None where it names none of them."""
        found = re.search(r"[Tt]he answer is \(?([A-Z])\b", text)
        index = LETTERS.find(found[1]) if found else -1
        return index if 0 <= index < len(self.choices) else None


# What is counted in each column of the results, as the official scorer defines it.
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

# Table 2 of the paper: parameters tuned, and accuracy on the test split in %, column by column.
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


def read_problems(path: str | Path, split: str, images: str | Path) -> list[Problem]:
    """The problems of one split of problems.json: as pid_splits.json beside it says, or else each problem itself.

    In the folder of images, the files are at SPLIT/ID/image.png, or, if it has no such folder, at ID/image.png. Raises
    OSError, or ValueError that names the problem.
    """
    path, images = Path(path), Path(images)
    records = read_value(path)
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise ValueError(f"{path}: is not an object of problems by their ids, as ScienceQA's problems.json")
    splits = path.with_name("pid_splits.json")
    if splits.exists():
        by_split = read_value(splits)
        if not isinstance(by_split, dict) or not isinstance(by_split.get(split), list):
            names = ", ".join(by_split) if isinstance(by_split, dict) else "none"
            raise ValueError(f"{splits}: has no list of ids for the split {split!r} (it has: {names})")
        ids = list(map(str, by_split[split]))
        absent = [id for id in ids if id not in records]
        if absent:
            raise ValueError(f"{path}: has no problem {absent[0]}, which {splits} names ({len(absent)} of {len(ids)})")
    else:
        ids = [id for id, record in records.items() if record.get("split") == split]
    if not ids:
        raise ValueError(f"{path}: has no problems in the split {split!r}")
    return [check_problem(id, records[id], path, images) for id in ids]


def check_problem(id: str, record: dict, path: Path, images: Path) -> Problem:
    where = f"{path}: problem {id}"
    for field in ("question", "choices", "answer", "hint", "image", "grade", "subject", "split"):
        if field not in record:
            raise ValueError(f"{where}: has no field '{field}' (it has: {', '.join(record) or 'nothing'})")
    choices, answer = record["choices"], record["answer"]
    hint, image = ("" if record[field] is None else record[field] for field in ("hint", "image"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: field 'choices' is not a list of strings")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: has {len(choices)} choices, not 2 to {len(LETTERS)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer {answer!r} is not the index of one of its {len(choices)} choices")
    for field, value in (("question", record["question"]), ("hint", hint), ("image", image)):
        check_text(value, where, field)
    for choice in choices:
        check_text(choice, where, "choices")
    grade = re.fullmatch(r"grade([1-9]|1[0-2])", str(record["grade"]))
    if grade is None:
        raise ValueError(f"{where}: grade {record['grade']!r} is not 'grade1' to 'grade12'")
    if record["subject"] not in SUBJECTS:
        raise ValueError(f"{where}: subject {record['subject']!r} is none of {', '.join(SUBJECTS)}")
    if image:
        split = str(record["split"])
        image = f"{split}/{id}/{image}" if (images / split).is_dir() else f"{id}/{image}"
    return Problem(id, record["question"], choices, answer, hint, image, int(grade[1]), record["subject"])


def read_chosen(path: str | Path, problems: Sequence[Problem]) -> list[int | None]:
    """What a results file in the official format, {"results": {id: index}}, chose for each of the problems.

    None where its index is none of the problem's choices. Raises OSError, or ValueError where one has no answer.
    """
    results = read_value(path)
    results = results.get("results") if isinstance(results, dict) else None
    if not isinstance(results, dict):
        raise ValueError(f"{path}: has no object 'results' of an index for each problem's id")
    absent = [problem.id for problem in problems if problem.id not in results]
    if absent:
        raise ValueError(f"{path}: answers {len(problems) - len(absent)} of {len(problems)} problems, not {absent[0]}")
    chosen = []
    for problem in problems:
        index = results[problem.id]
        if type(index) is not int:
            raise ValueError(f"{path}: problem {problem.id}: {index!r} is not the index of a choice")
        chosen.append(index if 0 <= index < len(problem.choices) else None)
    return chosen


def accuracies(problems: Sequence[Problem], chosen: Sequence[int | None]) -> dict[str, float | None]:
    """Accuracy in % in each of the nine columns; None where no problem belongs there. Not to choose is wrong."""
    right = [index == problem.answer for problem, index in zip(problems, chosen)]
    marks = {}
    for column, counts in COLUMNS.items():
        inside = [mark for mark, problem in zip(right, problems) if counts(problem)]
        marks[column] = 100 * sum(inside) / len(inside) if inside else None
    return marks


# ---------------------------------------------------------------------------------------------------
# COCO captions (Chen et al., 2015)

DESCRIBE = "Generate caption for this image"


class Picture(NamedTuple):
    """An image, and what people wrote about it."""

    id: int
    image: str  # a file in the folder of images
    captions: list[str]

    @property
    def name(self) -> str:
        return f"image {self.id}"


def read_pictures(path: str | Path) -> list[Picture]:
    """Of an annotation file such as captions_val2017.json: the images that have captions.

    Raises OSError, or ValueError that names the annotation.
    """
    values = read_value(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), list) for key in ("images", "annotations")):
        raise ValueError(f"{path}: has no lists 'images' and 'annotations', as COCO's captions_*.json")
    pictures = {}
    for index, record in enumerate(values["images"]):
        if not isinstance(record, dict) or type(record.get("id")) is not int or not is_text(record.get("file_name")):
            raise ValueError(f"{path}: images[{index}]: has no number 'id' or no name 'file_name'")
        pictures[record["id"]] = Picture(record["id"], record["file_name"], [])
    for index, record in enumerate(values["annotations"]):
        if not isinstance(record, dict) or not is_text(record.get("caption")):
            raise ValueError(f"{path}: annotations[{index}]: has no text 'caption'")
        if type(record.get("image_id")) is not int or record["image_id"] not in pictures:
            raise ValueError(f"{path}: annotations[{index}]: image_id {record.get('image_id')} is none of its images")
        pictures[record["image_id"]].captions.append(record["caption"].strip())
    described = [picture for picture in pictures.values() if picture.captions]
    if not described:
        raise ValueError(f"{path}: holds no captions")
    return described


def is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def read_written(path: str | Path, pictures: Sequence[Picture]) -> list[str]:
    """A caption for each of the pictures, of a results file in COCO's format, [{"image_id": ..., "caption": ...}].

    Raises OSError, or ValueError where one has none.
    """
    values = read_value(path)
    right = isinstance(values, list) and all(isinstance(v, dict) and {"image_id", "caption"} <= set(v) for v in values)
    if not right or not all(isinstance(v["caption"], str) and type(v["image_id"]) is int for v in values):
        raise ValueError(f"{path}: is not a list of objects with a number 'image_id' and a text 'caption'")
    written = {value["image_id"]: value["caption"] for value in values}
    absent = [picture.id for picture in pictures if picture.id not in written]
    if absent:
        raise ValueError(f"{path}: describes {len(pictures) - len(absent)} of {len(pictures)} images, not {absent[0]}")
    return [written[picture.id] for picture in pictures]


def caption_scorers() -> list[tuple[list[str], object]]:
    """BLEU, ROUGE-L and CIDEr as COCO defines them. Raises ValueError where they cannot run."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise ValueError("COCO's metrics are in a package of their own: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise ValueError("COCO's metrics cut captions into words by a Java program: install a Java runtime")
    return [([f"BLEU-{n}" for n in range(1, 5)], Bleu(4)), (["ROUGE-L"], Rouge()), (["CIDEr"], Cider())]


def caption_marks(pictures: Sequence[Picture], written: Sequence[str]) -> dict[str, float]:
    """COCO's metrics of one caption for each picture; each is 1 at best but CIDEr, which is 10. Raises ValueError."""
    scorers = caption_scorers()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def cut(captions: dict[int, list[str]]) -> dict[int, list[str]]:
        """Into words; the program takes one line for one caption, whatever ends a line."""
        lines = {id: [{"caption": " ".join(text.split())} for text in texts] for id, texts in captions.items()}
        return PTBTokenizer().tokenize(lines)

    with redirect_stdout(io.StringIO()):  # they talk
        references = cut({picture.id: picture.captions for picture in pictures})
        candidates = cut({picture.id: [text] for picture, text in zip(pictures, written)})
        marks = {}
        for names, scorer in scorers:
            score, _ = scorer.compute_score(references, candidates)
            marks |= zip(names, map(float, score if isinstance(score, list) else [score]))
    return marks


# ---------------------------------------------------------------------------------------------------
# To train on

Item = TypeVar("Item", Example, Problem, Picture)
TASKS = ("instructions", "scienceqa", "captions")


def read_task(task: str, path: str | Path, images: str | Path) -> list[Example]:
    """The examples of a data file in the format of a task; of ScienceQA the training split.

    Raises OSError, or ValueError that names the record.
    """
    if task == "instructions":
        return read_examples(path)
    records: list[tuple[str, str, str, str]] = []
    if task == "scienceqa":
        for problem in read_problems(path, "train", images):
            records.append((problem.text(), problem.answers()[problem.answer], problem.image, problem.name))
    else:
        for picture in read_pictures(path):
            records += [(DESCRIBE, caption, picture.image, picture.name) for caption in picture.captions]
    return [
        check_record({"instruction": text, "output": output, "image": image}, f"{path}: {name}")._replace(name=name)
        for text, output, image, name in records
    ]


def with_images(items: Sequence[Item], folder: str | Path, skip_missing: bool) -> tuple[list[Item], list[Path]]:
    """Those whose image is in the folder or that have none, and the images of those that have one.

    Raises FileNotFoundError that names the item, unless those whose image is missing are to be skipped.
    """
    kept, paths = [], []
    for item in items:
        try:
            paths += [require_file(Path(folder) / item.image)] if item.image else []
        except FileNotFoundError as error:
            if not skip_missing:
                raise FileNotFoundError(f"{item.name}: {error}") from None
            continue
        kept.append(item)
    return kept, paths
