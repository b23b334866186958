"""Multiple choice: how fast continuations of contexts are scored, as a harness asks for it."""

import torch
from cloup import command, option

from benchmarks.measuring import compare_seconds, interleave, measured_on, publish, ratio_text
from benchmarks.peers import as_transformers
from benchmarks.workload import Workload, prepare_workload, workload_options
from generate import Responder
from runtime.cli import Count, one_line_errors

SCORING_COLUMNS = {"questions/s": lambda row: f"{row['questions_per_second']:.1f}", "times ours": ratio_text}
CHOICE = 24  # tokens of an option, at most


def questions_of(workload: Workload, number: int, choices: int) -> list[tuple[None, list[int], list[int]]]:
    """Prompts of the data, each with the beginnings of its own response and of those of the examples that follow."""
    examples = workload.examples(number)
    prompts = [[id for id, learnt in zip(each.ids, each.loss_mask) if not learnt] for each in examples]
    responses = [[id for id, learnt in zip(each.ids, each.loss_mask) if learnt][:CHOICE] for each in examples]
    rows = range(len(examples))
    return [(None, prompts[i], responses[(i + j) % len(responses)]) for i in rows for j in range(choices)]


@command("score", context_settings={"show_default": True})
@workload_options(
    option("--questions", type=Count(), default=32, help="Contexts."),
    option("--choices", type=Count(), default=4, help="Continuations of each."),
    option("--batch-size", type=Count(), default=16, help="Continuations at once."),
)
@one_line_errors()
def time_scoring(json_path, questions, choices, batch_size, **options):
    """Count questions of multiple choice per second.

    Of `evaluate.py harness`; with --peers, of lm_eval's own model `hf` as well.
    """
    from tasks.harness import HarnessModel

    workload = prepare_workload(**options)
    model, rows = workload.new_model(), questions_of(workload, questions, choices)
    contestants = {"ours": HarnessModel(Responder(model, workload.read(1)[1], {}), "base", batch_size)}
    if workload.peers:
        import tokenizers
        import transformers
        from lm_eval.models.huggingface import HFLM

        nothing = tokenizers.Tokenizer(tokenizers.models.BPE())  # all are ids already
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, eos_token="</s>")
        theirs = as_transformers(model)
        contestants["lm_eval's hf"] = HFLM(
            theirs, tokenizer=tokenizer, batch_size=batch_size, device=str(workload.device)
        )
    found = {
        name: torch.tensor(each._loglikelihood_tokens(rows, disable_tqdm=True)) for name, each in contestants.items()
    }
    for name, scores in found.items():
        if workload.dtype == torch.float32 and not torch.allclose(scores, found["ours"], rtol=1e-4):
            raise ValueError(f"{name} scores otherwise than ours: not the same work")
    runs = {
        name: lambda its=each: its._loglikelihood_tokens(rows, disable_tqdm=True) for name, each in contestants.items()
    }
    table = compare_seconds(interleave(runs, workload.repeat, workload.device), "ours")
    for row in table.values():
        row["questions_per_second"] = questions / row["median"]
    about = measured_on(workload.size, workload.device, workload.dtype)
    about |= {"questions": questions, "choices": choices, "batch_size": batch_size}
    about |= {"context": round(sum(len(context) for _, context, _ in rows) / len(rows))}
    publish("score", table, SCORING_COLUMNS, about, json_path)
