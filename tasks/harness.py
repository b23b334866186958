"""EleutherAI's lm-evaluation-harness on a base and the adapters over it: pip install lm_eval.

The harness has the tasks, the few-shot examples and the metrics. Here is what it asks of a model: how likely a text
makes another, how likely it is by itself, and how it goes on. Likelihoods and greedy texts are those of its own model
"hf"; in Alpaca's template a continuation is tokenized as the responses that an adapter was trained on.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from tqdm import tqdm

from adapter import Adapter
from data import ALPACA, AlpacaTemplate, Tokenizer, format_prompt
from formats.chat_templates import ChatTemplate
from formats.tokenizers import library_errors
from generate import Responder, Sampling, collect, stream
from model import LLaMA
from runtime.distributed import rank
from runtime.errors import printable
from runtime.files import first_line, require_file, write_json, write_text
from tasks.scoring import Scored, in_batches, score_continuations

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ModuleNotFoundError as error:
    raise ValueError(f"the harness is a package of its own (no {error.name}): pip install lm_eval") from None

RESPONSE = ALPACA["without_input"].splitlines()[-1]  # what a response in Alpaca's template follows


class HarnessModel(TemplateLM):
    """What the harness asks: the base of a responder with one of its adapters, or "base" alone.

    Requests of like length share a batch, and a context is read once for all of its continuations.
    """

    CONTEXT, NEW_TOKENS = 2048, 256  # hf's defaults, where neither base nor task says anything

    def __init__(self, responder: Responder, adapter: str, batch_size: int, about: Mapping[str, object] = {}):
        super().__init__()
        self.model, self.batch_size, self.about = responder.model, batch_size, about
        self.text_tokenizer = responder.tokenizer  # as `tokenizer` the harness would take it for one of transformers'
        _, self.adaption_prompts, self.template = responder.loaded[adapter]
        self.stop, self.repetition_penalty = list(responder.stop), responder.sampling.repetition_penalty
        self.decode_step = responder.decode_step
        self._device = self.model.device
        self.max_length = self.model.config.max_seq_len or self.CONTEXT

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return (self.text_tokenizer.start_ids or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Behind <bos>, unless `add_special_tokens` is False, or a chat template has written one."""
        ids, start = self.encode(string), self.text_tokenizer.start_ids
        written = bool(start) and ids[: len(start)] == start
        return ids if add_special_tokens is False or written else [*start, *ids]

    def encode(self, string: str) -> list[int]:
        """Without <bos>. What spells a special token is one, where the base has a chat template."""
        if isinstance(self.template, ChatTemplate):
            return self.template.encode([string], hidden=[])[0]
        return self.text_tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenized together, and cut where the context ends; but apart behind Alpaca's prompt, as in training."""
        if context.endswith(RESPONSE) and isinstance(self.template, AlpacaTemplate):
            return self.tok_encode(context), self.encode(continuation.lstrip(" "))  # responses begin without a space
        return super()._encode_pair(context, continuation)

    # -- How likely

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[Scored]:
        """Score triples: the texts, which are not used, and the ids of context and continuation.

        A context is truncated on the left if both do not fit. Raises ValueError if a continuation alone does not.
        """
        contexts, continuations = [], []
        for _, context, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise ValueError(f"a continuation has {len(ids)} tokens, the base sees 1 to {self.max_length}")
            surplus = len(context) + len(ids) - 1 - self.max_length  # the last token is only predicted
            contexts.append(context[max(0, surplus) :])
            continuations.append(ids)
        adaption_prompts = [self.adaption_prompts] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or rank() > 0) as bar:
            return score_continuations(self.model, contexts, continuations, adaption_prompts, self.batch_size, bar)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once, in windows of the base's context that follow one another."""
        windows, of_window = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                of_window.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(of_window, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += log_p
        return totals

    # -- How it goes on

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate until a text that ends the response, greedily by default. Contexts are truncated on the left.

        Raises ValueError where a task asks for what there is not.
        """
        settings: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            settings[json.dumps(request.args[1], sort_keys=True)].append(i)
        tokens = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        responses = [""] * len(requests)
        generator = torch.Generator(self._device).manual_seed(torch.initial_seed())  # which the harness sets
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or rank() > 0) as bar:
            for setting, of_setting in settings.items():
                until, sampling = self.generation(json.loads(setting))
                sampling = sampling._replace(generator=generator)
                room = self.max_length - sampling.max_new_tokens
                for batch in in_batches(of_setting, self.batch_size, length=lambda i: len(tokens[i])):
                    rows = [tokens[i][-room:] for i in batch]
                    for i, text in zip(batch, self.continue_until(rows, until, sampling)):
                        responses[i] = text
                    bar.update(len(batch))
        return responses

    def generation(self, kwargs: dict) -> tuple[list[str], Sampling]:
        """The stop strings, and how to sample. Raises ValueError."""
        kwargs = normalize_gen_kwargs(kwargs, self.NEW_TOKENS)
        limit, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
        if limit >= self.max_length:
            raise ValueError(f"{limit} new tokens leave no room for a context: the base sees {self.max_length}")
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        if not kwargs.pop("do_sample"):
            kwargs = {key: kwargs[key] for key in kwargs.keys() - {"temperature", "top_p", "top_k", "min_p"}}
        elif not kwargs.get("temperature"):
            raise ValueError("generation_kwargs: do_sample without a temperature")
        sampling = {"repetition_penalty": self.repetition_penalty}
        known = ("temperature", "top_p", "repetition_penalty")
        sampling |= {key: float(kwargs.pop(key)) for key in known if key in kwargs}
        if kwargs:
            raise ValueError(
                f"generation_kwargs {kwargs}: there are do_sample, {', '.join(known)}, until, max_gen_toks"
            )
        return until + self.stop, Sampling(limit, end_ids=self.template.end_ids, **sampling)

    def continue_until(self, tokens: list[list[int]], until: list[str], sampling: Sampling) -> list[str]:
        """As `stream`, up to where each text has one of `until`, which is left off."""
        steps = stream(self.model, tokens, self.adaption_prompts, sampling, self.decode_step)
        limits = [sampling.max_new_tokens] * len(tokens)
        new = collect(steps, self.text_tokenizer, limits, [*filter(None, until)])
        return [postprocess_generated_text(self.text_tokenizer.decode(ids), until, None) for ids in new]

    # -- What is asked in a template, and what results.json says of the model

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the template writes them; the last may be the beginning of the response, which the task makes.

        Raises ValueError where the template does not take them.
        """
        begun = chat_history[-1]["content"] if chat_history[-1]["role"] == "assistant" else ""
        messages = chat_history[:-1] if begun else chat_history
        if isinstance(self.template, ChatTemplate):
            if begun.strip():  # as the template writes a response, up to where this one has got
                text = self.template.text(chat_history, begin_response=False)
                start = text.rindex(begun.strip())
                kept = begun.lstrip() if text.startswith(begun.lstrip(), start) else begun.strip()
                return text[: start + len(kept)]
            return self.template.text(messages, begin_response=True) + begun
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]):  # a description is put before the question
            raise ValueError(f"alpaca takes one prompt, not messages of {', '.join(roles)}")
        return format_prompt("\n\n".join(message["content"] for message in messages)) + begun

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template.name

    @property
    def tokenizer_name(self) -> str:
        return self.template.name

    def get_model_info(self) -> Mapping[str, object]:
        return self.about


def make_columns(
    loaded: tuple[LLaMA, Tokenizer, dict[str, Adapter]],
    strengths: Sequence[float],
    compare: bool,
    template: str | None,
    batch_size: int,
    about: Mapping[str, object],
    **options,
) -> dict[str, HarnessModel]:
    """Every adapter at every strength, by name, and the base, if asked or where there is nothing else.

    `about` is what results.json says of all of them; `options` are those of Responder. Raises ValueError at a name
    that can be no folder's, or is taken.
    """
    columns: dict[str, HarnessModel] = {}
    for strength in dict.fromkeys(strengths):
        responder = Responder(*loaded, gate_scale=strength, template=template, **options)
        if compare or len(responder.loaded) == 1:
            columns.setdefault("base", HarnessModel(responder, "base", batch_size, about))
        for name in loaded[2]:
            column = name if strength == 1 else f"{name} x {strength:g}"
            if name in ("", ".", "..") or {"/", "\\"} & set(name) or column in columns:
                raise ValueError(f"{column!r} is taken, or no name of a folder for results: --adapter NAME=FILE")
            its = {"adapter": name, "strength": strength}
            columns[column] = HarnessModel(responder, name, batch_size, {**about, **its})
    return columns


def run_harness(
    columns: dict[str, HarnessModel],
    *,
    tasks: Sequence[str],
    include: Path | None,
    out: Path,
    samples: bool,
    template: str | None,
    **options,
) -> dict[str, dict]:
    """The harness's results of every column, by its name; none on ranks that don't write.

    Written as results.json into folders of those names, with each example's response if wanted. `tasks` are names, or
    files in YAML; `options` are those of the harness's simple_evaluate. Raises OSError or ValueError.
    """
    folder = include and str(include)
    for file in include.rglob("*.y*ml") if include else ():  # the harness would wait for a pipe
        require_file(file, "task")
    files = [require_file(task, "task") for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = {task for task in tasks if Path(task) not in files}
    with library_errors("--tasks"):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not names <= set(manager.all_tasks):  # the harness's own, which take seconds to list
            manager = TaskManager(include_path=folder)
        manager.load([*tasks])  # so that what has to be fetched is there
    options |= {"apply_chat_template": template is not None, "fewshot_as_multiturn": template not in (None, "alpaca")}
    found = {}
    for name, column in columns.items():  # the harness keeps a task's requests in it, so each column loads its own
        try:
            results = simple_evaluate(column, tasks=[*tasks], task_manager=manager, log_samples=samples, **options)
        except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:  # of a broken task
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"--tasks {','.join(tasks)}: the harness cannot evaluate it: {what}") from error
        if rank() == 0:
            found[name] = results
            write_results(results, out / name)
    return found


def write_results(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    write_json(folder / "results.json", results, default=handle_non_serializable)
    for task, responses in samples.items():
        lines = [json.dumps(response, default=handle_non_serializable, ensure_ascii=False) for response in responses]
        write_text(folder / f"samples_{task.replace('/', '_')}.jsonl", "".join(line + "\n" for line in lines))


def print_columns(found: dict[str, dict]) -> None:
    """A line for every task and metric, a column for every model; nothing on ranks that have no results."""
    lines = {"": list(found)}
    for task, metrics in next(iter(found.values()), {"results": {}})["results"].items():
        for key in metrics:
            metric, comma, how = key.partition(",")  # "acc,none": of responses as they are; or of what a filter leaves
            if comma and not metric.endswith("_stderr"):
                line = f"{task}, {metric}" + (f" ({how})" if how != "none" else "")
                lines[line] = [score_text(results["results"][task], metric, how) for results in found.values()]
    left, width = max(map(len, lines)), 2 + max([len(cell) for cells in lines.values() for cell in cells], default=0)
    for line, cells in lines.items() if found else ():
        click.echo(printable(f"{line:{left}}" + "".join(f"{cell:>{width}}" for cell in cells)))


def score_text(metrics: dict[str, object], metric: str, how: str) -> str:
    """With its standard error, where the harness has one."""
    value, error = (metrics.get(f"{name},{how}") for name in (metric, f"{metric}_stderr"))
    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
    return f"{value:.4f}{spread}" if isinstance(value, float) else str(value)
