"""Evaluate a base and its adapters with EleutherAI's lm-evaluation-harness (pip install lm_eval).

The harness provides the tasks, the few-shot examples and the metrics. This file implements the harness's model
interface: log-likelihoods of continuations and of whole texts, and generation. Log-likelihoods and greedy texts of a
base equal those of the harness's own model "hf", except with Alpaca's template, for which a continuation is tokenized
like the responses in training.
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
from runtime.schema import listed
from tasks.scoring import Scored, in_batches, score_continuations

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ModuleNotFoundError as error:
    raise ValueError(f"the harness needs one more package ({error.name} is missing): pip install lm_eval") from None

RESPONSE = ALPACA["without_input"].splitlines()[-1]  # the last line of a prompt in Alpaca's template


class HarnessModel(TemplateLM):
    """Model for the harness: the base of a responder with one of its adapters; the name "base" selects the base alone.

    Requests of similar length share a batch, and a context is processed once for all of its continuations. `about` is
    stored in results.json.
    """

    CONTEXT, NEW_TOKENS = 2048, 256  # the defaults of "hf", for numbers that the base or the task does not state

    def __init__(self, responder: Responder, adapter: str, batch_size: int, about: Mapping[str, object] = {}):
        super().__init__()
        self.model, self.batch_size, self.about = responder.model, batch_size, about
        self.text_tokenizer = responder.tokenizer  # not `tokenizer`: the harness expects that to be from transformers
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
        """Token that precedes text without a context."""
        return (self.text_tokenizer.start_ids or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Tokenize with <bos>, unless `add_special_tokens` is False or a chat template has already written <bos>."""
        ids, start = self.encode(string), self.text_tokenizer.start_ids
        has_bos = bool(start) and ids[: len(start)] == start
        return ids if add_special_tokens is False or has_bos else [*start, *ids]

    def encode(self, string: str) -> list[int]:
        """Tokenize without adding <bos>. With a chat template, text that spells a special token becomes that token."""
        if isinstance(self.template, ChatTemplate):
            return self.template.encode([string], escaped=[])[0]
        return self.text_tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize context and continuation together, but separately after Alpaca's prompt, as in training."""
        if context.endswith(RESPONSE) and isinstance(self.template, AlpacaTemplate):
            return self.tok_encode(context), self.encode(continuation.lstrip(" "))  # responses begin without a space
        return super()._encode_pair(context, continuation)

    # -- Log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[Scored]:
        """Score requests. Each one has its texts, which are not used, and the ids of the context and the continuation.

        If both, without the last token, are longer than the base's context length, the request's context is truncated
        on the left. Raises ValueError if the continuation alone is longer, or if it is empty.
        """
        contexts, continuations = [], []
        for _, context, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise ValueError(f"a continuation has {len(ids)} tokens; the base takes 1 to {self.max_length}")
            surplus = len(context) + len(ids) - 1 - self.max_length  # the last token is only predicted
            contexts.append(context[max(0, surplus) :])
            continuations.append(ids)
        adaption_prompts = [self.adaption_prompts] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or rank() > 0) as bar:
            return score_continuations(self.model, contexts, continuations, adaption_prompts, self.batch_size, bar)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats.

        A text is scored in consecutive windows as long as the base's context. Each token is scored once.
        """
        windows, text_indices = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                text_indices.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(text_indices, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += log_p
        return totals

    # -- Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a response to each request until one of its stop strings, greedily by default.

        A context that leaves no room for the new tokens is truncated on the left. Raises ValueError if a task uses a
        setting that is not supported.
        """
        settings: dict[str, list[int]] = defaultdict(list)  # request indices by generation settings
        for i, request in enumerate(requests):
            settings[json.dumps(request.args[1], sort_keys=True)].append(i)
        tokens = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        responses = [""] * len(requests)
        generator = torch.Generator(self._device).manual_seed(torch.initial_seed())  # the seed is set by the harness
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or rank() > 0) as bar:
            for setting, indices in settings.items():
                until, sampling = self.generation(json.loads(setting))
                sampling = sampling._replace(generator=generator)
                room = self.max_length - sampling.max_new_tokens
                for batch in in_batches(indices, self.batch_size, length=lambda i: len(tokens[i])):
                    rows = [tokens[i][-room:] for i in batch]
                    for i, text in zip(batch, self.continue_until(rows, until, sampling)):
                        responses[i] = text
                    bar.update(len(batch))
        return responses

    def generation(self, kwargs: dict) -> tuple[list[str], Sampling]:
        """Return the stop strings and the Sampling for a task's `generation_kwargs`.

        Decoding is greedy if do_sample is false, or if neither it nor a temperature above 0 is given. Then temperature,
        top_p, top_k and min_p are ignored. Raises ValueError if a setting is invalid or not supported.
        """
        kwargs = normalize_gen_kwargs(kwargs, self.NEW_TOKENS)
        limit, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
        if limit >= self.max_length:
            found = f"generation_kwargs: max_gen_toks is {limit}"
            raise ValueError(f"{found}, but the base's context has {self.max_length} tokens; use a smaller number")
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        if not kwargs.pop("do_sample"):
            unused = ("temperature", "top_p", "top_k", "min_p")
            kwargs = {key: value for key, value in kwargs.items() if key not in unused}
        elif not kwargs.get("temperature"):
            raise ValueError("generation_kwargs: do_sample needs a temperature above 0")
        sampling = {"repetition_penalty": self.repetition_penalty}
        known = ("temperature", "top_p", "repetition_penalty")
        sampling |= {key: float(kwargs.pop(key)) for key in known if key in kwargs}
        if kwargs:
            raise ValueError(
                f"generation_kwargs: unsupported {listed(kwargs)}; supported are do_sample, "
                f"{', '.join(known)}, until and max_gen_toks"
            )
        return until + self.stop, Sampling(limit, end_ids=self.template.end_ids, **sampling)

    def continue_until(self, tokens: list[list[int]], until: list[str], sampling: Sampling) -> list[str]:
        """Continue rows of token ids; return the texts, truncated before the first stop string in `until`."""
        steps = stream(self.model, tokens, self.adaption_prompts, sampling, self.decode_step)
        limits = [sampling.max_new_tokens] * len(tokens)
        new = collect(steps, self.text_tokenizer, limits, [*filter(None, until)])
        return [postprocess_generated_text(self.text_tokenizer.decode(ids), until, None) for ids in new]

    # -- Templates, and the description of the model in results.json

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format messages with the template. If the last one is the assistant's, it is the beginning of the response.

        Raises ValueError if the template does not support these messages.
        """
        begun = chat_history[-1]["content"] if chat_history[-1]["role"] == "assistant" else ""
        messages = chat_history[:-1] if begun else chat_history
        if isinstance(self.template, ChatTemplate):
            if begun.strip():  # format it as a whole response, and drop the text after it
                text = self.template.text(chat_history, begin_response=False)
                start = text.rindex(begun.strip())
                kept = begun.lstrip() if text.startswith(begun.lstrip(), start) else begun.strip()
                return text[: start + len(kept)]
            return self.template.text(messages, begin_response=True) + begun
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]):  # a task's description becomes part of the instruction
            found = f"messages with the roles {', '.join(roles)}"
            raise ValueError(
                f"the template alpaca takes one prompt, not {found}; use --template auto, llama-2, llama-3 or chatml"
            )
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
    """Return models keyed by column name: one for each adapter at each strength, and one for the base alone.

    The base is omitted if there are adapters and `compare` is False. `about` is stored in the results.json of each
    model; `options` are those of Responder. Raises ValueError if a name is taken, or cannot be the name of a folder.
    """
    columns: dict[str, HarnessModel] = {}
    for strength in dict.fromkeys(strengths):
        responder = Responder(*loaded, gate_scale=strength, template=template, **options)
        if compare or len(responder.loaded) == 1:
            columns.setdefault("base", HarnessModel(responder, "base", batch_size, about))
        for name in loaded[2]:
            column = name if strength == 1 else f"{name} x {strength:g}"
            if name in ("", ".", "..") or {"/", "\\"} & set(name) or column in columns:
                raise ValueError(f"the name {column!r} is taken, or cannot name a folder; use --adapter NAME=FILE")
            own = {"adapter": name, "strength": strength}
            columns[column] = HarnessModel(responder, name, batch_size, {**about, **own})
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
    """Run the harness for every column. Return the results keyed by column on the first rank, and {} on all others.

    The harness downloads the data of the tasks if necessary. The first rank writes a folder in `out` for each column,
    with results.json and, with `samples`, one file per task of all prompts and responses. `tasks` are names or YAML
    files; `include` is a folder with further tasks; `template` is the value of --template, or None; `options` are those
    of the harness's simple_evaluate. Raises OSError or ValueError.
    """
    folder = include and str(include)
    for file in include.rglob("*.y*ml") if include else ():  # the harness would wait for a pipe forever
        require_file(file, "task")
    files = [require_file(task, "task") for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = {task for task in tasks if Path(task) not in files}
    with library_errors("--tasks"):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not names <= set(manager.all_tasks):  # listing the harness's own tasks takes seconds
            manager = TaskManager(include_path=folder)
        manager.load([*tasks])  # downloads their data if necessary
    options |= {"apply_chat_template": template is not None, "fewshot_as_multiturn": template not in (None, "alpaca")}
    all_results = {}
    for name, column in columns.items():  # the harness stores requests in a task, so each column loads the tasks again
        try:
            results = simple_evaluate(column, tasks=[*tasks], task_manager=manager, log_samples=samples, **options)
        except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:  # a faulty task
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"--tasks {','.join(tasks)}: the harness cannot evaluate the tasks: {what}") from error
        if rank() == 0:
            all_results[name] = results
            write_results(results, out / name)
    return all_results


def write_results(results: dict, folder: Path) -> None:
    """Write results.json, and the samples to one file per task. Removes the samples from `results`."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    write_json(folder / "results.json", results, default=handle_non_serializable)
    for task, responses in samples.items():
        lines = [json.dumps(response, default=handle_non_serializable, ensure_ascii=False) for response in responses]
        write_text(folder / f"samples_{task.replace('/', '_')}.jsonl", "".join(line + "\n" for line in lines))


def print_columns(all_results: dict[str, dict]) -> None:
    """Print a table with a row for every task and metric, and a column for every model. Without results, do nothing."""
    lines = {"": list(all_results)}
    for task, metrics in next(iter(all_results.values()), {"results": {}})["results"].items():
        for key in metrics:
            metric, comma, filter_name = key.partition(",")  # "acc,none" if responses are not filtered
            if comma and not metric.endswith("_stderr"):
                line = f"{task}, {metric}" + (f" ({filter_name})" if filter_name != "none" else "")
                lines[line] = [
                    score_text(results["results"][task], metric, filter_name) for results in all_results.values()
                ]
    left, width = max(map(len, lines)), 2 + max([len(cell) for cells in lines.values() for cell in cells], default=0)
    for line, cells in lines.items() if all_results else ():
        click.echo(printable(f"{line:{left}}" + "".join(f"{cell:>{width}}" for cell in cells)))


def score_text(metrics: dict[str, object], metric: str, filter_name: str) -> str:
    """Format a score, with its standard error if the harness computed one."""
    value, error = (metrics.get(f"{name},{filter_name}") for name in (metric, f"{metric}_stderr"))
    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
    return f"{value:.4f}{spread}" if isinstance(value, float) else str(value)
