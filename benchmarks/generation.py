"""Tokens per second at batch 1, greedy, prefill included."""

import torch
from cloup import command, option

from benchmarks.measuring import compare_seconds, interleave, measured_on, publish, ratio_text, read_speed
from benchmarks.peers import Contestant, Ours, Variant, installed_peers
from benchmarks.workload import compile_option, prepare_workload, workload_options
from runtime.cli import Count, one_line_errors

GENERATION_COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "times ours": ratio_text,
    "weights read, of the read speed": lambda row: f"{100 * row['bandwidth_share']:.0f} %",
}


def check_same_texts(contestants: dict[str, Contestant], prompt: list[int], number: int, dtype: torch.dtype) -> None:
    """Raise ValueError where one goes on otherwise than ours; in bfloat16, where rounding decides, let it."""
    texts = {name: contestant.continuation(prompt, number) for name, contestant in contestants.items()}
    for name, text in texts.items():
        if dtype == torch.float32 and text != texts["ours"]:
            raise ValueError(f"{name} goes on {text[:8]}, ours {texts['ours'][:8]}: not the same work")


@command("generate", context_settings={"show_default": True})
@workload_options(
    compile_option,
    option("--tokens", "number", type=Count(2), default=128, help="New ones, after a prompt of 60."),
)
@one_line_errors()
def time_generation(json_path, number, **options):
    """Count tokens per second.

    At batch 1, greedy, prefill included.
    """
    workload = prepare_workload(**options)
    prompt = (workload.examples(1000)[0].ids * 60)[:60]
    model, adapter = workload.new_model(), workload.new_adapter()
    variants = {"ours": Variant(decoding=True), "ours, base alone": Variant(decoding=True, adapted=False)}
    if workload.compiled:
        variants["ours, compiled"] = Variant(decoding=True, compiled=True)
    contestants: dict[str, Contestant] = {name: Ours(model, adapter, variant) for name, variant in variants.items()}
    if workload.peers:
        contestants |= installed_peers(model, adapter, ["adaption prompt"])
    check_same_texts(contestants, prompt, number, workload.dtype)

    runs = {name: lambda its=each: its.continuation(prompt, number) for name, each in contestants.items()}
    rows = compare_seconds(interleave(runs, workload.repeat, workload.device), "ours")
    weights = sum(weight.nbytes for weight in model.parameters()) - model.tok_embeddings.weight.nbytes
    speed = read_speed(workload.device)
    for row in rows.values():
        row["tokens_per_second"] = number / row["median"]
        row["bandwidth_share"] = weights * number / row["median"] / speed
    about = measured_on(workload.size, workload.device, workload.dtype)
    about |= {"new_tokens": number, "bytes_per_token": weights, "read_bytes_per_second": speed}
    publish("generate", rows, GENERATION_COLUMNS, about, json_path)
