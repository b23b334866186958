"""Measure an adapter: python evaluate.py --adapter out/adapter.safetensors."""

import re
from collections import Counter
from collections.abc import Sequence

import click
import torch

import toy
from adapter import Adapter, Prompt
from cli import device_options, one_line_errors
from data import Example, Tokenizer, tokenize_prompt
from generate import generate, load
from model import LLaMA, choose


@torch.no_grad()
def examine(model: LLaMA, tokenizer: Tokenizer, adapter: Adapter) -> dict[str, float]:
    """Put toy.py's held-out questions to the base, and to the base with the adapter; print a table.

    An answer is exact if it is the expected sentence and then ends. To be fair to the base, the table
    also says how often the word asked for occurs anywhere in what it wrote. The majority baseline knows
    the form of every answer, and always fills in the word that is commonest in tuning.
    """
    sets = toy.instructions()
    common = {}
    for kind in toy.kinds():
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


@click.command(context_settings={"show_default": True})
@click.option("--adapter", "adapter_path", type=click.Path(), required=True, help="An adapter file.")
@click.option("--base", type=click.Path(), help="The base model.  [default: the one that the adapter's file names]")
@device_options
def main(adapter_path, base, device, dtype):
    """Put toy.py's held-out questions to a base alone and to the base with an adapter."""
    with one_line_errors():
        device, dtype = choose(device, dtype)
        model, tokenizer, adapters = load([adapter_path], base, device, dtype)
    examine(model, tokenizer, *adapters.values())


if __name__ == "__main__":
    main()
