"""A trained encoder: its predictions for each task, and their scores."""

import json
import sys
from collections import Counter
from pathlib import Path

import click
import torch
from torch import nn
from tqdm import tqdm

from encoder_tuning.conll import OUTSIDE, check_tag, entity_metric, entity_scores, labeled_sentences, read_conll
from encoder_tuning.data import HEAD_TASKS, STRIDE, check_classes, check_head_task, read_labeled
from encoder_tuning.labeled import roberta_tokenizer, subset
from encoder_tuning.objective import accuracy, answer_squad, classify, predict_tags
from encoder_tuning.squad import context_windows, read_squad, squad_scores
from encoders.heads import HeadAdapter, head_adapter
from encoders.models import Roberta, ViT
from formats.adapters import load_adapter
from formats.encoders import head_labels, load_encoder
from formats.tensors import prefix_errors
from runtime.cli import warn
from runtime.files import hash_tensors


def encoder_fingerprint(model: ViT | Roberta) -> str:
    """Return a hash of some weights of the first and the last layer."""
    return hash_tensors([model.layers[0].attention.wq.weight[:4], model.layers[-1].w2.weight[:4]])


def head_fits_task(head: nn.Sequential | None, task: str) -> bool:
    """Return True if the base's own head is suitable for the task.

    RoBERTa's head for text classification has two linear layers. Its other heads have one layer, with two outputs for
    question answering and any other number for token classification.
    """
    if head is None or task == "image-classification":
        return head is not None
    if len(head) > 1 or task == "text-classification":
        return len(head) > 1 and task == "text-classification"
    return (head[0].out_features == 2) == (task == "question-answering")


class TrainedEncoder:
    """An encoder with a trained adapter, or with the base's own head.

    Warns if the adapter was trained with different base weights. Raises OSError, or ValueError if the adapter, the task
    and the base do not fit each other.
    """

    def __init__(
        self, adapter_path: str | None, task: str | None, base: str | None, dtype: torch.dtype, device: torch.device
    ):
        adapter = load_adapter(adapter_path).to(device) if adapter_path else None
        if adapter is not None and not isinstance(adapter, HeadAdapter):
            raise ValueError(f"{adapter_path}: has no head, so it is not an adapter for an encoder")
        metadata = adapter.metadata if adapter else {}
        task, base = task or metadata.get("task"), base or metadata.get("base")
        if task not in HEAD_TASKS or base is None:
            raise ValueError(
                "the task or the base is unknown; give --task and --base, or an adapter file that names both"
            )
        if task != metadata.get("task", task):
            raise ValueError(f"{adapter_path}: was trained for {metadata['task']}, not for {task}; omit --task")
        if base == metadata.get("base") and not Path(base).exists():
            raise FileNotFoundError(f"{base}: no such encoder; {adapter_path} names it as its base; give --base PATH")
        model, own_head = load_encoder(base, dtype, device)
        check_head_task(task, model, Path(base))
        if metadata.get("base_fingerprint", "") not in ("", encoder_fingerprint(model)):
            warn(f"{adapter_path}: was trained with other weights than those of {base}")
        if adapter is None:
            if not head_fits_task(own_head, task):
                raise ValueError(f"{base}: has no head of its own for {task}; give --adapter FILE")
            adapter = head_adapter(model, own_head, own_head[-1].out_features, layers=1, length=1)
        with prefix_errors(f"{adapter_path}: does not fit the base {base}"):
            adapter.check_base(layers=model.config.n_layers, dim=model.config.dim, heads=model.config.n_heads)
        self.model, self.adapter, self.task, self.base = model, adapter, task, Path(base)
        self.name = adapter_path or base
        self.max_length = min(int(metadata.get("max_seq_len", 512)), getattr(model.config, "max_length", 2**20))

    def evaluate_squad(
        self, data: Path, limit: int | None, stride: int | None, no_answer_threshold: float | None
    ) -> dict[str, str]:
        """Print exact match and F1; return the answers keyed by question id. Raises OSError or ValueError.

        If `no_answer_threshold` is None, it is 0 if the adapter was trained on unanswerable questions; otherwise every
        question gets an answer.
        """
        metadata = self.adapter.metadata
        stride = int(metadata.get("stride", STRIDE)) if stride is None else stride
        if no_answer_threshold is None and int(metadata.get("unanswerable", 0)):
            no_answer_threshold = 0.0
        tokenizer, questions = roberta_tokenizer(self.model, self.base), subset(read_squad(data), limit)
        with prefix_errors(data):
            windows = [context_windows(question, tokenizer, self.max_length, stride) for question in questions]
        bar = tqdm(zip(windows, questions), total=len(questions), unit="question", file=sys.stderr)
        texts = [
            answer_squad(self.model, self.adapter, question_windows, question.context, no_answer_threshold)
            for question_windows, question in bar
        ]
        answered = list(zip(texts, questions))
        kinds = {"questions": answered}
        if not all(question.answers for question in questions):
            kinds["answerable"] = [pair for pair in answered if pair[1].answers]
            kinds["unanswerable"] = [pair for pair in answered if not pair[1].answers]
        for kind, pairs in kinds.items():
            if pairs:
                scores = squad_scores(*zip(*pairs))
                click.echo(f"{len(pairs):,} {kind}: exact match {scores['exact_match']:.2%}, F1 {scores['f1']:.2%}")
        return {question.id: text for text, question in answered}

    def evaluate_tags(self, data: Path, limit: int | None, max_tokens: int) -> dict[str, list[str]]:
        """Print F1, precision and recall of entities; return the predicted tags, keyed by sentence name.

        Raises OSError or ValueError.
        """
        entity_metric()  # fail before the predictions if seqeval is missing
        outputs = self.adapter.head[-1].out_features
        classes = json.loads(self.adapter.metadata.get("classes", "null")) or head_labels(self.base)
        if len(classes) != outputs:
            found = f"names {len(classes)} classes, but its head has {outputs} outputs"
            raise ValueError(f"{self.name}: {found}; an encoder names its classes in id2label of config.json")
        for name in classes:
            check_tag(name, f"{self.name}: its classes")
        check_classes(classes, self.name)
        sentences, tokenizer = subset(read_conll(data), limit), roberta_tokenizer(self.model, self.base)
        with prefix_errors(data):
            labeled = labeled_sentences(sentences, tokenizer, self.max_length, classes)
        predicted = predict_tags(self.model, self.adapter, labeled.examples, max_tokens)
        by_name = {example.name: tags for example, tags in zip(labeled.examples, predicted)}
        answers = {}
        for sentence in sentences:
            tags = [classes[best] for best in by_name.get(sentence.name, [])]
            answers[sentence.name] = tags + [OUTSIDE] * (len(sentence.words) - len(tags))  # truncated words get O
        scores = entity_scores([*answers.values()], [sentence.tags for sentence in sentences])
        click.echo(
            f"{len(sentences):,} sentences ({labeled.num_truncated:,} truncated), {scores['entities']:,.0f} entities: "
            f"F1 {scores['f1']:.2%}, precision {scores['precision']:.2%}, recall {scores['recall']:.2%}"
        )
        return answers

    def evaluate_classes(self, data: Path, limit: int | None, max_tokens: int) -> dict[str, str]:
        """Print the accuracy and the majority baseline; return the predicted classes, keyed by example name.

        Raises OSError or ValueError.
        """
        outputs = self.adapter.head[-1].out_features
        classes = json.loads(self.adapter.metadata.get("classes", "null")) or list(map(str, range(outputs)))
        examples = read_labeled(self.task, self.model, self.base, data, self.max_length, classes, limit).examples
        predicted = classify(self.model, self.adapter, examples, max_tokens)
        labels = [example.labels[0] for example in examples]
        share, [(majority, number)] = accuracy(predicted, labels), Counter(labels).most_common(1)
        click.echo(
            f"{len(labels):,} examples: accuracy {share:.2%} ({round(share * len(labels)):,} correct); "
            f"majority class {classes[majority]!r}: {number / len(labels):.2%}"
        )
        return {example.name: classes[best] for example, best in zip(examples, predicted)}
