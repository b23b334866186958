"""The contestants of the benchmarks: this implementation, and others that do the same work with the same weights.

A contestant has `loss(examples)`, the mean loss over response tokens, and `continuations(rows, n)`, which greedily
decodes n new tokens for each prompt; all prompts have the same length. The other implementations are packages from
PyPI, which run in a simple loop, and `Plain`, which is written here and works like the authors' script.
"""

import importlib.util
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import Adapter, gated_attention
from data import IGNORE, MICRO_BATCH_TOKENS, TokenizedExample, collate
from formats.hugging_face import config_values, to_hugging_face
from generate import decode_step, generate
from model import LLaMA, apply_rope, rope_cos_sin
from runtime.compilation import compile_decoding, compile_layers, prepare_to_compile
from runtime.decoding import prepare_to_decode
from runtime.quantization import quantizer
from train import TrainConfig, make_optimizer, response_loss, train_step


LR = 1e-3  # learning rate of all contestants


class Contestant:
    """Base class of the contestants. By default, all trainable parameters of `model` are trained with AdamW."""

    model: nn.Module
    groups_by_length = False  # True: the examples of a batch have similar lengths; False: batches are random

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.02)

    def step(self, optimizer: torch.optim.Optimizer, examples: list[TokenizedExample]) -> None:
        optimizer.zero_grad()
        self.loss(examples).backward()
        optimizer.step()


class Variant(NamedTuple):
    """A configuration of this implementation."""

    bits: str | None = None  # number of bits of the layers' weights, a value of --bits; None: not quantized
    dtype: torch.dtype | None = None  # None: the dtype of the model
    decoding: bool = False  # prepare the model for decoding instead of training
    compiled: bool = False
    checkpoint_activations: bool = False
    attention: Callable[..., Tensor] = gated_attention
    adapted: bool = True  # False: the base without an adapter


class Adapted(Contestant):
    """A LLaMA of this project with an adapter, or without one if `adapter` is None."""

    def __init__(self, model: LLaMA, adapter: Adapter | None):
        self.model, self.adapter = model, adapter

    def parameters(self) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.adapter, 0.02)
        for group in optimizer.param_groups:
            group["lr"] = LR
        return optimizer


class Ours(Adapted):
    """This implementation: trains as train.py does, with similar lengths in a batch, and decodes as generate.py does.

    The weights share memory with those of `model`, except for those in a different dtype, quantized ones, and layers
    that `prepare_to_decode` packs or makes contiguous.
    """

    groups_by_length = True

    def __init__(
        self,
        model: LLaMA,
        adapter: Adapter | None,
        variant: Variant = Variant(),
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    ):
        with torch.device("meta"):
            copy = LLaMA(model.config, variant.attention)
        copy.load_state_dict(model.state_dict(), assign=True)
        copy = copy.to(variant.dtype or model.dtype).requires_grad_(False)
        super().__init__(copy, adapter if variant.adapted else None)
        if variant.bits is not None:
            quantizer(variant.bits)(copy.layers)
        self.decode_step = decode_step
        if variant.compiled:
            prepare_to_compile(model.device)
        if variant.decoding:
            prepare_to_decode(copy, variant.compiled)
            if variant.compiled:
                self.decode_step = compile_decoding(decode_step, copy)
        elif variant.compiled:
            compile_layers(copy.layers)
        checkpoint = variant.checkpoint_activations
        self.config = TrainConfig(micro_batch_tokens=micro_batch_tokens, checkpoint_activations=checkpoint)

    def step(self, optimizer: torch.optim.Optimizer, examples: list[TokenizedExample]) -> None:
        train_step(self.model, self.adapter, optimizer, examples, LR, self.config)

    def loss(self, examples: list[TokenizedExample]) -> Tensor:
        return response_loss(self.model, self.adapter, examples) / sum(example.num_targets for example in examples)

    @torch.no_grad()
    def continuations(self, rows: list[list[int]], n: int) -> list[list[int]]:
        adaption_prompts = self.adapter(dtype=self.model.dtype) if self.adapter else ()
        return generate(self.model, rows, adaption_prompts, max_new_tokens=n, decode_step=self.decode_step)


class Plain(Adapted):
    """The paper's method without optimizations, as in the authors' script.

    Every example is padded to `max_seq_len`, the attention weights are stored, and logits are computed at all
    positions. During decoding, the keys and values of the adaption prompts are recomputed for every token.
    """

    def __init__(self, model: LLaMA, adapter: Adapter, max_seq_len: int = 512):
        super().__init__(model, adapter)
        self.head = model.output.weight.contiguous()  # in the memory layout of a checkpoint
        self.max_seq_len = max_seq_len

    def loss(self, examples: list[TokenizedExample]) -> Tensor:
        inputs, targets = padded(examples, self.max_seq_len)
        device = self.model.device
        logits = self.logits(inputs.to(device), start=0, cache=None)  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORE)

    def logits(self, tokens: Tensor, start: int, cache: list | None) -> Tensor:
        model, adaption_prompts = self.model, self.adapter(dtype=self.model.dtype)
        (B, T), group = tokens.shape, model.config.n_heads // model.config.n_kv_heads
        cos, sin = rope_cos_sin(torch.arange(start, start + T, device=tokens.device)[None], model.config)
        mask = torch.full((T, start + T), -math.inf, device=tokens.device).triu(start + 1)
        x = model.tok_embeddings(tokens)  # (B, T, C)
        for i, block in enumerate(model.layers):
            attention, normed = block.attention, block.attention_norm(x)
            q, k, v = (attention.split_heads(w(normed)) for w in (attention.wq, attention.wk, attention.wv))
            q, k, v = (y.transpose(1, 2) for y in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
            if cache is not None:
                cache[i][0][:, :, start : start + T], cache[i][1][:, :, start : start + T] = k, v
                k, v = (kept[:, :, : start + T] for kept in cache[i])
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + mask.to(q.dtype)
            output = scores.float().softmax(dim=3).to(q.dtype) @ v
            if i >= len(model.layers) - len(adaption_prompts):
                adaption_prompt = adaption_prompts[i - len(model.layers)]
                pk, pv = (
                    attention.split_heads(w(adaption_prompt.embeddings)).transpose(1, 2)
                    for w in (attention.wk, attention.wv)
                )
                pk, pv = (y.repeat_interleave(group, dim=1).repeat(B, 1, 1, 1) for y in (pk, pv))  # (B, H, K, D)
                scores = q @ pk.transpose(2, 3) / math.sqrt(q.shape[3])
                output = output + adaption_prompt.gate * scores.float().softmax(dim=3).to(q.dtype) @ pv
            x = x + attention.wo(output.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
        return F.linear(model.norm(x), self.head)

    @torch.no_grad()
    def continuations(self, rows: list[list[int]], n: int) -> list[list[int]]:
        model, config, length = self.model, self.model.config, len(rows[0])
        shape = (len(rows), config.n_kv_heads, length + n, config.head_dim)
        cache = [[model.tok_embeddings.weight.new_zeros(shape) for _ in "kv"] for _ in model.layers]
        new, ids = torch.tensor(rows, device=model.device), []
        for step in range(n):
            new = self.logits(new, length + step - 1 if step else 0, cache)[:, -1].argmax(dim=1)[:, None]  # (B, 1)
            ids.append(new)
        return torch.cat(ids, dim=1).tolist()


class HuggingFace(Contestant):
    """LLaMA from transformers. `kind` is "adaption prompt" or "lora" (trained with PEFT), or "full tuning".

    Examples are padded to the longest one in the batch. `layers` and `length` are L and K of the adaption prompts.
    """

    def __init__(self, model: LLaMA, kind: str, layers: int, length: int):
        import peft

        self.model = as_transformers(model)
        if kind == "adaption prompt":
            config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers)
            self.model = peft.get_peft_model(self.model, config)
        elif kind == "lora":  # the settings of Alpaca-LoRA
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            self.model = peft.get_peft_model(self.model, config)

    def loss(self, examples: list[TokenizedExample]) -> Tensor:
        longest = max(len(example.ids) for example in examples)
        ids = torch.tensor([example.ids + [0] * (longest - len(example.ids)) for example in examples])
        labels, mask = ids.clone(), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            mask[row, : len(example.ids)] = 1
            labels[row, : len(example.ids)][~torch.tensor(example.loss_mask)] = IGNORE
        labels[mask == 0] = IGNORE
        device = self.model.device
        return self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False
        ).loss

    @torch.no_grad()
    def continuations(self, rows: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(rows, device=self.model.device)
        options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
        self.model.generation_config.eos_token_id = None  # do not stop before n tokens are decoded
        new = self.model.generate(input_ids=ids, max_new_tokens=n, **options)
        return new[:, len(rows[0]) :].tolist()


class LitGPT(Contestant):
    """litgpt's adapter. Examples are padded to the longest one in the batch, and all logits of a batch are in memory.

    Since v0.5.5, litgpt projects the adaption prompts with other rows of the weights than before (docs/adapters.md).
    The amount of work is the same, but the outputs differ from this implementation's if the gates are nonzero.
    """

    def __init__(self, model: LLaMA, layers: int, length: int):
        from litgpt.adapter import GPT, Config, mark_only_adapter_as_trainable
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

        c, weight = model.config, model.tok_embeddings.weight
        config = Config.from_name(
            "Llama-2-7b-hf",
            block_size=1024,
            n_layer=c.n_layers,
            n_embd=c.dim,
            n_head=c.n_heads,
            n_query_groups=c.n_kv_heads,
            head_size=c.head_dim,
            intermediate_size=c.hidden_dim,
            padded_vocab_size=c.vocab_size,
            vocab_size=c.vocab_size,
            norm_eps=c.norm_eps,
            rope_base=int(c.rope_theta),
            adapter_prompt_length=length,
            adapter_start_layer=c.n_layers - layers,
        )
        weights: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, weights, to_hugging_face(model.state_dict(), c))
        self.model = GPT(config).to(weight.device, weight.dtype)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or any("adapter" not in name and "gating" not in name for name in missing):
            raise ValueError(
                f"litgpt: the base's weights do not match litgpt's model: missing {missing}, unexpected {unexpected}"
            )
        mark_only_adapter_as_trainable(self.model)

    def clear_prompt_cache(self) -> None:
        """Clear the cached keys and values of the adaption prompts; litgpt would reuse those of the first step."""
        for module in self.model.modules():
            if hasattr(module, "adapter_kv_cache"):
                module.adapter_kv_cache = None

    def loss(self, examples: list[TokenizedExample]) -> Tensor:
        self.clear_prompt_cache()
        inputs, targets, *_ = collate(examples)
        device = self.model.lm_head.weight.device
        logits = self.model(inputs.to(device)).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.to(device).flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def continuations(self, rows: list[list[int]], n: int) -> list[list[int]]:
        from litgpt.generate.base import generate as litgpt_generate

        (tokens,) = rows

        device = self.model.lm_head.weight.device
        self.clear_prompt_cache()
        self.model.max_seq_length = len(tokens) + n
        self.model.set_kv_cache(batch_size=1, device=device, dtype=self.model.lm_head.weight.dtype)
        ids = litgpt_generate(self.model, torch.tensor(tokens, device=device), len(tokens) + n, temperature=0.0)
        self.model.clear_kv_cache()
        self.model.max_seq_length = self.model.config.block_size
        return [ids[len(tokens) :].tolist()]


class LlamaCpp(Contestant):
    """llama.cpp on a GGUF file, through llama-cpp-python. It can only decode, and only one prompt at a time."""

    def __init__(self, file: Path, capacity: int):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model = Llama(str(file), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False)

    def continuations(self, rows: list[list[int]], n: int) -> list[list[int]]:
        (tokens,) = rows
        self.model.reset()
        return [list(islice(self.model.generate(tokens, temp=0.0), n))]


def padded(examples: list[TokenizedExample], length: int) -> tuple[Tensor, Tensor]:
    """Collate the examples into inputs and targets, int64 (B, length), padded on the right."""
    inputs, targets, *_ = collate(examples)
    missing = length - inputs.shape[1]
    return F.pad(inputs, (0, missing)), F.pad(targets, (0, missing), value=IGNORE)


def installed_peers(model: LLaMA, adapter: Adapter, kinds: list[str]) -> dict[str, Contestant]:
    """Create the other implementations, by name: `Plain`, and those whose packages are installed.

    Their adaption prompts have the L and K of the adapter. `kinds` are the values of HuggingFace's `kind` to include.
    """
    layers, length, _ = adapter.prompts.shape
    peers: dict[str, Contestant] = {"plain, as the authors'": Plain(model, adapter)}
    if importlib.util.find_spec("peft"):
        for kind in kinds:
            peers[kind if kind == "full tuning" else f"PEFT {kind}"] = HuggingFace(model, kind, layers, length)
    if importlib.util.find_spec("litgpt"):
        peers["litgpt adapter"] = LitGPT(model, layers, length)
    return peers


def as_transformers(model: LLaMA) -> nn.Module:
    """Copy a LLaMA into the implementation of transformers. The rotary embedding must be unscaled."""
    import transformers

    c, default = model.config, torch.get_default_dtype()
    config = transformers.LlamaConfig(**config_values(c), rope_theta=c.rope_theta, tie_word_embeddings=False)
    torch.set_default_dtype(model.dtype)  # so that the model is not created in float32 first
    try:
        with model.device:
            copy = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    copy.load_state_dict(to_hugging_face(model.state_dict(), c))
    return copy.eval()
