"""Benchmark of scoring: the speed at which `evaluate.py harness` computes log-likelihoods of continuations."""

from collections.abc import Sequence

import torch
from cloup import command, option

from benchmarks.measuring import compare_seconds, interleave, measured_on, publish, ratio_text
from benchmarks.peers import as_transformers
from benchmarks.workload import prepare_workload, workload_options
from data import AlpacaTemplate, Example, Tokenizer
from generate import Responder
from runtime.cli import Count, one_line_errors

SCORING_COLUMNS = {"questions/s": lambda row: f"{row['questions_per_second']:.1f}", "times ours": ratio_text}
CHOICE = 24  # maximum number of tokens per choice


def questions_of(
    examples: Sequence[Example], tokenizer: Tokenizer, choices: int
) -> list[tuple[None, list[int], list[int]]]:
    """Return one request (None, prompt ids, choice ids) for each choice of each prompt.

    The choices of a prompt are the first tokens of its own response and of the responses to the next prompts.
    """
    exchanges = [exchange for (exchange,) in AlpacaTemplate(tokenizer).encode_exchanges(examples)]
    rows = range(len(exchanges))
    return [
        (None, exchanges[i].prompt_ids, exchanges[(i + j) % len(rows)].response_ids[:CHOICE])
        for i in rows
        for j in range(choices)
    ]


@command("score", context_settings={"show_default": True})
@workload_options(
    option("--questions", type=Count(), default=32, help="Number of questions."),
    option("--choices", type=Count(), default=4, help="Number of choices per question."),
    option("--batch-size", type=Count(), default=16, help="Number of choices per batch."),
)
@one_line_errors()
def time_scoring(json_path, questions, choices, batch_size, **options):
    """Time the scoring of multiple-choice questions.

    Reports the questions per second of `evaluate.py harness`, and with --peers also those of lm_eval's model `hf`.
    """
    from tasks.harness import HarnessModel

    workload = prepare_workload(**options)
    model, (examples, tokenizer) = workload.new_model(), workload.read(questions)
    rows = questions_of(examples, tokenizer, choices)
    contestants = {"ours": HarnessModel(Responder(model, tokenizer, {}), "base", batch_size)}
    if workload.peers:
        import tokenizers
        import transformers
        from lm_eval.models.huggingface import HFLM

        empty = tokenizers.Tokenizer(tokenizers.models.BPE())  # not used, because the questions are token ids
        unused = transformers.PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="</s>")
        hf = HFLM(as_transformers(model), tokenizer=unused, batch_size=batch_size, device=str(workload.device))
        contestants["lm_eval's hf"] = hf
    runs = {
        name: lambda one=each: one._loglikelihood_tokens(rows, disable_tqdm=True) for name, each in contestants.items()
    }
    found = {name: torch.tensor(run()) for name, run in runs.items()}
    for name, scores in found.items():
        if workload.dtype == torch.float32 and not torch.allclose(scores, found["ours"], rtol=1e-4):
            raise ValueError(
                f"the scores of {name} differ from those of this implementation; their times are not comparable"
            )
    table = compare_seconds(interleave(runs, workload.repeat, workload.device), "ours")
    for row in table.values():
        row["questions_per_second"] = len(rows) / choices / row["median"]
    about = measured_on(workload.name, workload.device, workload.dtype)
    about |= {"questions": questions, "choices": choices, "batch_size": batch_size}
    about |= {"context": round(sum(len(context) for _, context, _ in rows) / len(rows))}
    publish("score", table, SCORING_COLUMNS, about, json_path)
