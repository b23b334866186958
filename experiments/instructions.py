"""What a base that tells stories, and follows no instruction, can be brought to do; and with how many examples."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import cloup
import numpy as np
import torch
from cloup import option, option_group
from matplotlib.figure import Figure
from torch import Tensor, nn

from adapter import Prompt
from data import AlpacaTemplate, Tokenizer, Tokens, tokenize
from experiments.measures import text_perplexity
from experiments.methods import BY_MLP, FULL, GATES_AT_ONE, LORA, ONE_SOFTMAX, ZERO_INIT
from experiments.methods import WARMUP_EPOCHS, Setting, finite_steps, import_peft, set_up
from experiments.stories import KINDS, MAX_TOKENS, StorySets, Told, follows, is_story, make_instructions, read_stories
from experiments.stories import whole_sentences
from experiments.tables import RESULTS, draw_bars, draw_line, percent, save_results, spread
from experiments.testbed import text_rows
from formats.bases import load_llama, read_base
from formats.tokenizers import load_tokenizer
from generate import generate
from model import LLaMA
from runtime.cli import Count, one_line_errors
from runtime.device import select_device
from train import TrainConfig

# Each method's best of those that --search tries, by the instructions that are held out for that.
TRIED = {method: (0.01, 0.03, 0.1, 0.3) for method in (ZERO_INIT, BY_MLP, ONE_SOFTMAX, GATES_AT_ONE)}
TRIED |= {LORA: (0.001, 0.003, 0.01, 0.03), FULL: (0.0001, 0.0003, 0.001, 0.003)}
BEST = {ZERO_INIT: 0.1, BY_MLP: 0.1, ONE_SOFTMAX: 0.1, GATES_AT_ONE: 0.1, LORA: 0.01, FULL: 0.001}
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the examples
LEAST_STEPS = 30  # where examples are few there are more epochs


@dataclass(frozen=True)
class StoryBed:
    """What all methods have in common."""

    base: Path
    tokenizer: Tokenizer
    sets: StorySets
    text: Tensor  # (rows, T) ids of other stories
    setting: Setting
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def tokens(self, told: Sequence[Told]) -> list[Tokens]:
        return tokenize(AlpacaTemplate(self.tokenizer), [each.example() for each in told], self.text.shape[1])[0]

    @cached_property
    def shuffled(self) -> list[Tokens]:
        tokens = self.tokens(self.sets.tuning)
        return [tokens[i] for i in np.random.default_rng(0).permutation(len(tokens))]


@torch.no_grad()
def tell(
    bed: StoryBed, model: LLaMA, told: Sequence[Told], prompts: Sequence[Prompt] = (), raw: bool = False
) -> list[str]:
    """What the model tells, greedily, as far as whole sentences go; `raw` is without the template."""
    template, texts = AlpacaTemplate(bed.tokenizer), []
    for start in range(0, len(told), 100):
        examples = [each.example() for each in told[start : start + 100]]
        asked = [template.prompt(example.instruction, example.input) for example in examples]
        if raw:
            asked = [
                [*bed.tokenizer.start_ids, *bed.tokenizer.encode(f"{example.instruction}\n{example.input}".strip())]
                for example in examples
            ]
        answers = generate(model, asked, prompts, max_new_tokens=MAX_TOKENS, end_ids=bed.tokenizer.end_ids)
        texts += [whole_sentences(bed.tokenizer.decode(ids).strip()) for ids in answers]
    return texts


def scores(told: Sequence[Told], texts: Sequence[str]) -> dict[str, float]:
    """Shares: of answers that are stories, of those that are one and do as told, in all and by kind."""
    stories = [is_story(text) for text in texts]
    right = [story and follows(each, text) for story, each, text in zip(stories, told, texts)]
    by_kind = {kind: statistics.mean(ok for ok, each in zip(right, told) if each.kind == kind) for kind in KINDS}
    return {"stories": statistics.mean(stories), "accuracy": statistics.mean(right)} | by_kind


def tune_and_ask(bed: StoryBed, method: str, lr: float, seed: int, told: Sequence[Told], examples: int) -> dict:
    """Of a method tuned on so many examples: scores, perplexity of other stories, and the answers."""
    tokens = bed.shuffled[:examples]
    epochs = max(bed.setting.epochs, math.ceil(LEAST_STEPS / math.ceil(examples / bed.batch_size)))
    how = {"epochs": epochs, "warmup_epochs": WARMUP_EPOCHS * epochs / bed.setting.epochs, "lr": lr}
    setting, start = bed.setting._replace(method=method, lr=lr), time.perf_counter()
    model, adapter, *_ = tunable = set_up(setting, seed, bed.base, bed.dtype, bed.device)
    for _ in finite_steps(tunable, tokens, TrainConfig(batch_size=bed.batch_size, seed=seed, **how)):
        pass
    seconds, prompts = time.perf_counter() - start, adapter(dtype=bed.dtype)
    texts = tell(bed, model, told, prompts)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    found = {"seconds": seconds, "trained": trained, "perplexity": text_perplexity(model, bed.text, prompts)}
    return scores(told, texts) | found | {"answers": texts}


def ask_base(bed: StoryBed, raw: bool) -> dict:
    model, _ = load_llama(bed.base, bed.dtype, bed.device)
    texts = tell(bed, model, bed.sets.testing, raw=raw)
    return scores(bed.sets.testing, texts) | {"trained": 0, "perplexity": text_perplexity(model, bed.text), "answers": texts}


def compare_methods_on_stories(bed: StoryBed, seeds: int) -> dict[str, dict[str, list]]:
    """Every method at its best rate; the base in the template and without."""
    print_header()
    rows = {f"the base, {name}": [ask_base(bed, raw)] for name, raw in (("as it is", True), ("in the template", False))}
    for label, runs in rows.items():
        print_row(label, runs)
    for method, lr in BEST.items():
        rows[method] = [
            tune_and_ask(bed, method, lr, seed, bed.sets.testing, len(bed.shuffled)) for seed in range(seeds)
        ]
        print_row(f"{method}, {lr:g}", rows[method])
    return rows


def search_story_rates(bed: StoryBed) -> dict[str, dict[str, list]]:
    """Every method at each of four rates, once, asked other instructions than are held out."""
    print_header()
    rows = {}
    for method, rates in TRIED.items():
        for lr in rates:
            label = f"{method}, {lr:g}"
            rows[label] = [tune_and_ask(bed, method, lr, 0, bed.sets.validation, len(bed.shuffled))]
            print_row(label, rows[label])
    return rows


def tune_on_shares(bed: StoryBed, seeds: int) -> dict[str, dict[str, list]]:
    """The sample-efficiency curve: ever more of the examples."""
    print_header()
    rows = {}
    for share in SHARES:
        for method in (ZERO_INIT, ONE_SOFTMAX, LORA):
            label, examples = f"{method}, {share:.0%}", round(share * len(bed.shuffled))
            rows[label] = [
                tune_and_ask(bed, method, BEST[method], seed, bed.sets.testing, examples) for seed in range(seeds)
            ]
            print_row(label, rows[label])
    return rows


def print_header() -> None:
    click.echo(f"{'':40}{'trained':>10}{'stories':>9}{'as told':>9}{'±':>7}" + "".join(f"{k:>16}" for k in KINDS) + f"{'perplexity':>12}{'seconds':>9}")


def print_row(label: str, runs: Sequence[dict]) -> None:
    mean = {name: statistics.mean(run.get(name, 0) for run in runs) for name in runs[0] if name != "answers"}
    click.echo(
        f"{label:40}{mean['trained']:>10,}{mean['stories']:>9.1%}{mean['accuracy']:>9.1%}{spread([run['accuracy'] for run in runs]):>7.1%}"
        + "".join(f"{mean[kind]:>16.1%}" for kind in KINDS)
        + f"{mean['perplexity']:>12.2f}{mean.get('seconds', 0):>9.0f}"
    )


def make_story_bed(base, data, per_kind, epochs, layers, length, batch_size, device, max_tokens=130) -> StoryBed:
    device, dtype = select_device(device, "float32")
    config, _ = read_base(base)
    tokenizer = load_tokenizer(base)
    sets = make_instructions(read_stories(data, tokenizer, max_tokens), per_kind, tested=40)
    text = text_rows(tokenizer, sets.others, min(256, config.max_seq_len or 256))
    setting = Setting(layers or config.n_layers, 0.0, length=length, epochs=epochs)
    return StoryBed(base, tokenizer, sets, text.to(device), setting, batch_size, device, dtype)


@cloup.command("stories", context_settings={"show_default": True})
@option_group(
    "Options",
    option("--base", type=click.Path(path_type=Path), required=True, help="A LLaMA that tells stories."),
    option("--data", type=click.Path(path_type=Path), required=True, help="Stories, divided by <|endoftext|>."),
    option("--per-kind", type=Count(), default=200, help="Instructions of each of five kinds to tune on."),
    option("--epochs", type=Count(WARMUP_EPOCHS + 1), default=5, help="Of tuning."),
    option("--layers", type=Count(), help="L.  [default: all]"),
    option("--length", type=Count(), default=10, help="K."),
    option("--batch-size", type=Count(), default=32, help="Examples per step."),
    option("--seeds", type=Count(), default=3, help="Runs of everything."),
    option("--device", default="auto"),
    option("--search", is_flag=True, help="Four learning rates of each method, once, on other instructions."),
    option("--curve", is_flag=True, help="1 to 100 % of the examples."),
    option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default="experiments/results", help="Folder for results."),
)
@one_line_errors()
def tell_stories(base, data, seeds, search, curve, out, **options):
    """x"""
    bed = make_story_bed(base, data, **options)
    click.echo(f"{len(bed.sets.tuning)} {len(bed.sets.testing)} {tuple(bed.text.shape)}")
    if search:
        rows = search_story_rates(bed)
    elif curve:
        rows = tune_on_shares(bed, seeds)
    else:
        rows = compare_methods_on_stories(bed, seeds)
    import json
    (out / "x.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    tell_stories()
