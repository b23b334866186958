"""Measure an adapter: python evaluate.py scienceqa --data problems.json --adapter out/adapter.safetensors."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from toy import digits
from encoder_tuning import heads
from toy import almanac as toy
from adapter import Adapter, Prompt
from runtime.files import atomic_write
from runtime.cli import device_options, one_line_errors
from data import IGNORE, Example, Tokenizer, Tokens, collate, tokenize_prompt
from formats.encoders import load_encoder
from generate import Eyes, Question, Responder, generate, load, concat_prompts, encode_images
from model import LLaMA, select_device
from multimodal import ImageAdapter
from tasks import (
    COLUMNS,
    DESCRIBE,
    PUBLISHED,
    Item,
    Problem,
    accuracies,
    caption_marks,
    caption_scorers,
    read_chosen,
    read_pictures,
    read_problems,
    read_written,
    with_images,
)

# ---------------------------------------------------------------------------------------------------
# The embedded default


@torch.no_grad()
def examine(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Put toy.py's held-out questions to the base, and to the base with the adapter; print a table.

    An answer is exact if it is the expected sentence and then ends. To be fair to the base, the table
    also says how often the word asked for occurs anywhere in what it wrote. The majority baseline knows
    the form of every answer, and always fills in the word that is commonest in tuning.
    """
    sets = toy.instructions()
    common = {}
    for kind in {q.kind for q in sets["tuning"]}:
        common[kind] = Counter(q.answer for q in sets["tuning"] if q.kind == kind).most_common(1)[0][0]
    dtype = model.tok_embeddings.weight.dtype
    speakers = {"base": (), "adapter": adapter(dtype=dtype)}
    rows = []  # (what was asked, marks by column)
    for name, title in toy.HELD_OUT.items():
        questions = sets[name]
        marks = {"majority": [q.answer == common[q.kind] for q in questions]}
        for speaker, prompts in speakers.items():
            texts = ask(model, tokenizer, prompts, [q.example for q in questions])
            marks[speaker] = [ended and text == q.example.output for (text, ended), q in zip(texts, questions)]
            marks[speaker + " has it"] = [
                re.search(rf"\b{q.answer}\b", text) is not None for (text, _), q in zip(texts, questions)
            ]
        rows.append((title, marks))
    columns = list(rows[0][1])
    rows.append(("all", {column: [mark for _, marks in rows for mark in marks[column]] for column in columns}))

    click.echo("\nHeld-out questions, answered exactly (has it: the word occurs in the answer)\n")
    click.echo(f"{'':34}{'number':>8}" + "".join(f"{column:>16}" for column in columns))
    for title, marks in rows:
        shares = [sum(marks[column]) / len(marks[column]) for column in columns]
        click.echo(f"{title:34}{len(marks['base']):>8}" + "".join(f"{share:>16.1%}" for share in shares))

    tokens = torch.tensor([tokenize_prompt(tokenizer, *sets["entities"][0].example[:2])])
    tokens = tokens.to(model.tok_embeddings.weight.device)
    same = torch.equal(model(tokens), model(tokens, adapter(strength=0.0, dtype=dtype)))
    click.echo(
        f"\nWith the adapter taken away (strength 0) the logits are the base's, bit for bit: {'yes' if same else 'NO'}"
    )
    return {f"heldout_accuracy_{column.replace(' ', '_')}": sum(m) / len(m) for column, m in rows[-1][1].items()}


def ask(
    model: LLaMA, tokenizer: Tokenizer, prompts: Sequence[Prompt], examples: list[Example], limit: int = 40
) -> list[tuple[str, bool]]:
    """The greedy answer to every example, and whether it ended within `limit` tokens."""
    answers = []
    for start in range(0, len(examples), 128):
        batch = [tokenize_prompt(tokenizer, e.instruction, e.input) for e in examples[start : start + 128]]
        answers += generate(model, batch, prompts, max_new_tokens=limit, eos_id=tokenizer.eos_id)
    return [(tokenizer.decode(ids), len(ids) < limit) for ids in answers]


@torch.no_grad()
def examine_pictures(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Put digits.py's questions about held-out pictures to the adapter; print a table.

    An adapter for images answers with the picture, with none, and with one that belongs to another question; any other
    answers without. Chance is to always name the digit that is commonest in tuning.
    """
    folder = digits.make()
    tuned, held_out = digits.pictures(folder)
    questions = digits.questions(held_out)
    common = Counter(q.answer for q in digits.questions(tuned[: digits.TUNED_ON])).most_common(1)[0][0]
    responder = Responder(
        model, tokenizer, {"adapter": adapter}, strength=1.0, raw=False, max_new_tokens=40, eos_id=tokenizer.eos_id
    )
    withheld = [Question(q.example.instruction, "", "adapter") for q in questions]
    asked = {"no image": withheld}
    if isinstance(adapter, ImageAdapter):
        features = see(held_out, Eyes(tower=str(folder / "tower")), adapter, model.tok_embeddings.weight.dtype)
        others = [features[i] for i in np.random.default_rng(0).permutation(len(features))]
        for name, images in (("image", features), ("another image", others)):
            each = [image for image in images for _ in digits.ANSWERS]
            asked[name] = [question._replace(features=image) for question, image in zip(withheld, each)]
    marks = {"chance": [q.answer == common for q in questions]}
    for name, variant in asked.items():
        answers = written_answers(responder, variant, 128, "question")
        marks[name] = [text == q.example.output for text, q in zip(answers, questions)]

    click.echo(f"\nQuestions about {len(held_out)} held-out pictures, answered exactly\n")
    click.echo(f"{'':34}" + "".join(f"{name:>16}" for name in marks))
    for instruction in [*digits.ANSWERS, "all"]:
        inside = [i for i, q in enumerate(questions) if instruction in ("all", q.kind)]
        shares = [sum(column[i] for i in inside) / len(inside) for column in marks.values()]
        click.echo(f"{instruction:34}" + "".join(f"{share:>16.1%}" for share in shares))
    return {f"picture_accuracy_{name.replace(' ', '_')}": sum(m) / len(m) for name, m in marks.items()}


# ---------------------------------------------------------------------------------------------------
# Answers to many questions


def questions_about(
    items: Sequence[Item], texts: Sequence[str], responder: Responder, name: str, folder: Path, eyes: Eyes
) -> list[Question]:
    """What is asked about every item, and what its image looks like to an adapter for images; others see none.

    Raises OSError or ValueError where an image or the vision tower cannot be read.
    """
    adapter, features = responder.adapters.get(name), {}
    if not isinstance(adapter, ImageAdapter) and eyes != Eyes():
        raise ValueError("--clip or --encoder needs an adapter with a projection, one that was tuned on images")
    if isinstance(adapter, ImageAdapter):
        pictured, paths = [item for item in items if item.image], [folder / item.image for item in items if item.image]
        if paths:
            seen = encode_images(paths, eyes, adapter, responder.model.tok_embeddings.weight.dtype)
            features = {item.name: row for item, row in zip(pictured, seen)}
    return [Question(text, "", name, features.get(item.name)) for item, text in zip(items, texts)]


def in_batches(responder: Responder, questions: Sequence[Question], room: Sequence[int], size: int, unit: str):
    """Numbers of questions of like length, so many at once, and a progress bar.

    Those that leave less room in the base's context than they need are left out.
    """
    lengths = {i: len(responder.prompt(question)) for i, question in enumerate(questions)}
    limit = responder.model.config.max_seq_len or math.inf
    order = sorted((i for i, length in lengths.items() if length + room[i] <= limit), key=lengths.get)
    with tqdm(total=len(order), unit=unit, file=sys.stderr) as bar:
        for start in range(0, len(order), size):
            yield order[start : start + size], bar


def written_answers(responder: Responder, questions: Sequence[Question], size: int, unit: str) -> list[str | None]:
    """What is generated for each; None where the question leaves no room for an answer."""
    answers: list[str | None] = [None] * len(questions)
    for batch, bar in in_batches(responder, questions, [1] * len(questions), size, unit):
        for i, text in zip(batch, responder.answer_batch([questions[i] for i in batch], bar)):
            answers[i] = text
    return answers


def likeliest_answers(
    responder: Responder, questions: Sequence[Question], answers: Sequence[list[str]], size: int, unit: str
) -> list[int | None]:
    """Which of its answers, an index, is likeliest after each question; None where there is no room for them."""
    best: list[int | None] = [None] * len(questions)
    room = [max(len(responder.tokenizer.encode(answer)) for answer in ours) for ours in answers]
    for batch, bar in in_batches(responder, questions, room, size, unit):
        rows = [(questions[i], answer) for i in batch for answer in answers[i]]
        scores = iter(log_likelihoods(responder, rows))
        for i in batch:
            ours = [next(scores) for _ in answers[i]]
            best[i] = ours.index(max(ours))
        bar.update(len(batch))
    return best


@torch.no_grad()
def log_likelihoods(responder: Responder, rows: Sequence[tuple[Question, str]]) -> list[float]:
    """log p(answer and its end | question), of each row."""
    model, tokenizer = responder.model, responder.tokenizer
    tokens = []
    for question, answer in rows:
        prompt = responder.prompt(question)
        tokens.append(Tokens(prompt + tokenizer.encode(answer) + [tokenizer.eos_id], len(prompt), ""))
    batch, device = collate(tokens), model.tok_embeddings.weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    asked = targets != IGNORE  # (B, T), R of them
    prompts = concat_prompts([responder.prompts(question) for question, _ in rows])
    log_p = model.output(model.hidden_states(inputs, prompts, wanted=asked)).float().log_softmax(dim=1)  # (R, V)
    of_token = log_p.gather(1, targets[asked][:, None]).squeeze(1)  # (R,)
    of_row = torch.zeros(len(rows), device=device).index_add(0, asked.nonzero()[:, 0], of_token)  # (B,)
    return of_row.tolist()


# ---------------------------------------------------------------------------------------------------
# The commands


@click.group()
def main():
    """Measure an adapter, or a base without any."""


def options(*more):
    """The options that all commands share, after those of one of them."""
    shared = [
        click.option(
            "--adapter", "adapter_path", type=click.Path(), help="An adapter file.  [default: the base alone]"
        ),
        click.option("--base", type=click.Path(), help="The base model.  [default: the one that the adapter names]"),
        device_options,
    ]

    def decorate(command):
        for option in reversed([*more, *shared]):
            command = option(command)
        return command

    return decorate


ABOUT_IMAGES = [
    click.option("--images", type=click.Path(path_type=Path), help="Where the images are.  [default: beside the data]"),
    click.option("--clip", "tower", type=click.Path(), help="CLIP's vision tower.  [default: the adapter's]"),
    click.option("--encoder", help="A function of yours, FILE.py:NAME, instead."),
    click.option("--skip-missing", is_flag=True, help="Leave out what has an image that is not there."),
    click.option("--limit", type=click.IntRange(1), help="Ask only about the first so many."),
    click.option("--results", type=click.Path(), help="Mark the answers of this file; no model runs."),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Asked at once."),
]


def ready(adapter_path, base, device, dtype, max_new_tokens) -> tuple[Responder, str]:
    """Who answers, always with the likeliest token, and under what name. Raises OSError or ValueError."""
    device, dtype = select_device(device, dtype)
    model, tokenizer, adapters = load([adapter_path] if adapter_path else [], base, device, dtype)
    sampling = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id}
    return Responder(model, tokenizer, adapters, strength=1.0, raw=False, **sampling), next(iter(adapters), "base")


def present(items: Sequence[Item], folder: Path, skip_missing: bool, responder: Responder, name: str) -> list[Item]:
    """The items to ask about: where the adapter sees images, only those that are there may be skipped."""
    if not isinstance(responder.adapters.get(name), ImageAdapter):
        return list(items)
    kept, _ = with_images(items, folder, skip_missing)
    if len(kept) < len(items):
        click.echo(f"{len(items) - len(kept):,} of {len(items):,} left out: their image is not there", err=True)
    if not kept:
        raise ValueError(f"{folder}: none of the images is there")
    return kept


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_results(results, choosing, adapter_path, base, **_) -> None:
    """Raise ValueError where there is a file of answers, and someone to answer as well."""
    if results is not None and (adapter_path or base or choosing):
        raise ValueError("--results has the answers: no --adapter, --base or --choose beside it")


@main.command()
@options(
    click.option("--data", type=click.Path(path_type=Path), required=True, help="As train.py takes it for the task."),
    click.option("--task", type=click.Choice(heads.TASKS), help="[default: the adapter's]"),
    click.option("--out", type=click.Path(path_type=Path), help="Write the answers there, as JSON."),
    click.option("--limit", type=click.IntRange(1), help="Ask only about so many, drawn from all."),
    click.option("--micro-batch-tokens", type=click.IntRange(1), default=8192, show_default=True),
)
def encoder(data, task, out, limit, micro_batch_tokens, adapter_path, base, device, dtype):
    """Accuracy of a ViT or RoBERTa with an adapter, or with the head that it came with; of questions F1."""
    with one_line_errors():
        device, dtype = select_device(device, dtype)
        adapter = heads.HeadAdapter.load(adapter_path).to(device) if adapter_path else None
        metadata = adapter.metadata if adapter else {}
        task, base = task or metadata.get("task"), base or metadata.get("base")
        if task not in heads.TASKS or base is None:
            raise ValueError("--base and --task are missing, and no adapter says them")
        if task != metadata.get("task", task):
            raise ValueError(f"{adapter_path}: is for {metadata['task']}, not for {task}")
        model, own_head = load_encoder(base, dtype, device)
        heads.check_task(task, model, Path(base))
        if metadata.get("base_fingerprint", "") not in ("", heads.fingerprint(model)):
            click.echo(f"warning: {adapter_path} was tuned on other weights than those of {base}", err=True)
        if adapter is None and not heads.suits(own_head, task):
            raise ValueError(f"{base}: has no head of its own for {task}; give --adapter FILE")
        if adapter is None:
            adapter = heads.head_adapter(model, own_head, own_head[-1].out_features, layers=1, length=1)
        config, length = model.config, int(metadata.get("max_seq_len", 512))
        if task != "image-classification":
            length = min(length, config.max_length)
        adapter.check_base(layers=config.n_layers, dim=config.dim, heads=config.n_heads)
        if task == "question-answering":
            tokenizer, questions = heads.tokenizer_for(model, Path(base)), heads.some(heads.read_squad(data), limit)
            bar = tqdm(questions, unit="question", file=sys.stderr)
            texts = [heads.answer(model, adapter, tokenizer, question, length) for question in bar]
            exact = sum(heads.exact_match(text, q.answers) for text, q in zip(texts, questions)) / len(questions)
            shared = sum(heads.f1(text, q.answers) for text, q in zip(texts, questions)) / len(questions)
            click.echo(f"{len(questions):,} questions: exact match {exact:.2%}, F1 {shared:.2%}")
            answers = {question.id: text for question, text in zip(questions, texts)}
        else:
            outputs = adapter.head[-1].out_features
            classes = json.loads(metadata["classes"]) if "classes" in metadata else list(map(str, range(outputs)))
            if len(classes) != outputs:
                raise ValueError(f"{adapter_path}: names {len(classes)} classes, its head has {outputs} outputs")
            lesson = heads.read_lesson(task, model, Path(base), data, length, classes, limit)
            found = heads.classify(model, adapter, lesson.examples, micro_batch_tokens)
            labels = [example.labels[0] for example in lesson.examples]
            right = sum(map(int.__eq__, found, labels))
            most = Counter(labels).most_common(1)[0]
            click.echo(
                f"{len(labels):,} examples: accuracy {right / len(labels):.2%} ({right:,} right); "
                f"always {classes[most[0]]!r}: {most[1] / len(labels):.2%}"
            )
            answers = {example.name: classes[best] for example, best in zip(lesson.examples, found)}
        if out is not None:
            write(out, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")


@main.command("toy")
@options(click.option("--images", is_flag=True, help="Put digits.py's questions about held-out images, too."))
def examine_toy(adapter_path, images, base, device, dtype):
    """Put toy.py's held-out questions to a base alone and to the base with an adapter."""
    with one_line_errors():
        if adapter_path is None:
            raise ValueError("--adapter FILE is missing")
        device, dtype = select_device(device, dtype)
        model, tokenizer, adapters = load([adapter_path], base, device, dtype)
        (adapter,) = adapters.values()
        if images:
            examine_pictures(model, tokenizer, adapter)
        examine(model, tokenizer, adapter)


@main.command()
@options(
    click.option("--data", type=click.Path(path_type=Path), required=True, help="ScienceQA's problems.json."),
    click.option("--split", default="test", show_default=True, help="As pid_splits.json beside the data has them."),
    click.option("--choose", "choosing", is_flag=True, help="Take the likeliest option; otherwise generate and parse."),
    click.option("--out", type=click.Path(path_type=Path), default="out-scienceqa", show_default=True, help="Folder."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True),
    *ABOUT_IMAGES,
)
def scienceqa(
    data, split, choosing, out, max_new_tokens, images, tower, encoder, skip_missing, limit, results, batch_size, **whom
):
    """Accuracy on ScienceQA in the nine columns of the paper's Table 2, its rows beside.

    Writes results.json, in the official format and with the accuracies, and wrong.txt, to read.
    """
    with one_line_errors():
        folder = images or data.parent
        problems, texts = read_problems(data, split, folder)[:limit], None
        answered = [True] * len(problems)
        check_results(results, choosing, **whom)
        if results is not None:
            how, tuned, label = f"as in {results}", "", Path(results).stem
            chosen = read_chosen(results, problems)
        else:
            responder, label = ready(**whom, max_new_tokens=max_new_tokens)
            problems = present(problems, folder, skip_missing, responder, label)
            questions = questions_about(
                problems, [p.text() for p in problems], responder, label, folder, Eyes(tower, encoder)
            )
            adapter = responder.adapters.get(label)
            tuned = f"{sum(p.numel() for p in adapter.parameters()):,}" if adapter else "0"
            if choosing:
                how = "the option whose answer is likeliest"
                options = [problem.answers() for problem in problems]
                chosen = likeliest_answers(responder, questions, options, batch_size, "problem")
                answered = [index is not None for index in chosen]
            else:
                how = "generated, greedily, and parsed"
                texts = written_answers(responder, questions, batch_size, "problem")
                chosen = [None if text is None else problem.chosen(text) for problem, text in zip(problems, texts)]
                answered = [text is not None for text in texts]
        marks = accuracies(problems, chosen)
        report_scienceqa(problems, chosen, answered, texts, marks, how, split, out, tuned, label)


def report_scienceqa(
    problems: list[Problem],
    chosen: list[int | None],
    answered: list[bool],
    texts: list[str | None] | None,
    marks: dict[str, float | None],
    how: str,
    split: str,
    out: Path,
    tuned: str,
    label: str,
) -> None:
    """The table, and the files. Raises OSError."""
    unclear = [p.id for p, index, said in zip(problems, chosen, answered) if said and index is None]
    too_long = [p.id for p, said in zip(problems, answered) if not said]
    click.echo(f"ScienceQA, {split} split, {len(problems):,} problems; answers: {how}; in %, the paper's rows first\n")
    click.echo(f"{'':26}{'tuned':>10}" + "".join(f"{column:>8}" for column in COLUMNS))
    ours = ["-" if mark is None else f"{mark:.2f}" for mark in marks.values()]
    rows = [(name, parameters, [f"{mark:.2f}" for mark in row]) for name, (parameters, row) in PUBLISHED.items()]
    for name, parameters, row in [*rows, (label, tuned, ours)]:
        click.echo(f"{name:26}{parameters:>10}" + "".join(f"{mark:>8}" for mark in row))
    click.echo(f"\n{len(unclear):,} answers name none of the options, and count as wrong")
    if too_long:
        click.echo(f"{len(too_long):,} problems are too long for the base, and count as wrong")

    right = sum(problem.answer == index for problem, index in zip(problems, chosen))
    summary = {"acc": marks["Avg"], "correct": right, "count": len(problems), "columns": marks, "answers": how}
    summary |= {"split": split, "unclear": unclear, "too_long": too_long}
    summary["results"] = {p.id: -1 if index is None else index for p, index in zip(problems, chosen)}
    if texts is not None:
        summary["outputs"] = {problem.id: text for problem, text in zip(problems, texts)}
    wrong = []
    for i, (problem, index) in enumerate(zip(problems, chosen)):
        if index != problem.answer:
            said = "too long" if not answered[i] else "none of them" if index is None else problem.answers()[index]
            said += "" if texts is None or texts[i] is None else f", of: {texts[i]!r}"
            wrong.append(
                f"{problem.name} {problem.image}\n{problem.text()}\n{problem.answers()[problem.answer]}; {said}"
            )
    write(out / "results.json", json.dumps(summary, indent=1) + "\n")
    write(out / "wrong.txt", "\n\n".join(wrong) + "\n")
    click.echo(f"wrote results.json, and wrong.txt with {len(wrong):,} wrong answers, to {out}", err=True)


@main.command()
@options(
    click.option("--data", type=click.Path(path_type=Path), required=True, help="COCO's captions_*.json."),
    click.option("--out", type=click.Path(path_type=Path), default="out-captions", show_default=True, help="Folder."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True),
    *ABOUT_IMAGES,
)
def captions(data, out, max_new_tokens, images, tower, encoder, skip_missing, limit, results, batch_size, **whom):
    """BLEU, ROUGE-L and CIDEr of captions, as COCO defines them.

    Writes results.json, in COCO's format, and scores.json.
    """
    with one_line_errors():
        caption_scorers()  # or say at once that they are missing
        folder, pictures = images or data.parent, read_pictures(data)[:limit]
        check_results(results, False, **whom)
        if results is not None:
            written = read_written(results, pictures)
        else:
            responder, name = ready(**whom, max_new_tokens=max_new_tokens)
            if not isinstance(responder.adapters.get(name), ImageAdapter):
                raise ValueError("captions need an adapter with a projection, one that was tuned on images")
            pictures = present(pictures, folder, skip_missing, responder, name)
            questions = questions_about(
                pictures, [DESCRIBE] * len(pictures), responder, name, folder, Eyes(tower, encoder)
            )
            answers = written_answers(responder, questions, batch_size, "image")
            written = [" ".join((answer or "").split()) for answer in answers]
        marks = caption_marks(pictures, written)
        click.echo(f"captions of {len(pictures):,} images; 1 is the best, of CIDEr 10\n")
        click.echo("".join(f"{name:>9}" for name in marks))
        click.echo("".join(f"{mark:>9.4f}" for mark in marks.values()))
        rows = [{"image_id": picture.id, "caption": text} for picture, text in zip(pictures, written)]
        write(out / "results.json", json.dumps(rows, indent=1) + "\n")
        write(out / "scores.json", json.dumps(marks | {"images": len(pictures)}, indent=1) + "\n")
        click.echo(f"wrote results.json and scores.json to {out}", err=True)


if __name__ == "__main__":
    main()
