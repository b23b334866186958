"""Helpers shared by the tests: small random models and adapters, sample files, and ways to run the commands."""

import io
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from adapter import Adapter
from benchmarks import measuring
from data import TokenizedExample
from encoders.heads import HeadAdapter
from encoders.models import Roberta, RobertaConfig, ViT, ViTConfig
from model import Config, LLaMA
from training.run_files import read_metrics

ROOT = Path(__file__).resolve().parent.parent

DATA = Path(os.environ.get("LLAMA_ADAPTER_DATA", ROOT.parent / "shared" / "data"))

CONFIGS = {
    "mha": Config(32, 3, 4, 4, 8, 48, 50),
    "gqa": Config(32, 3, 4, 2, 8, 48, 50),
    "mqa": Config(32, 3, 4, 1, 8, 48, 50),
    "wide": Config(32, 3, 4, 2, 12, 48, 50),
}
QWEN = {
    "qwen2": Config(32, 3, 4, 2, 8, 48, 50, qkv_bias=True),
    "qwen3": Config(32, 3, 4, 2, 12, 48, 50, qk_norm=True),
}


def make_model(config="gqa", seed=0, **options):
    """Return a frozen LLaMA with random weights. `config` is a Config, or its name in CONFIGS or QWEN."""
    torch.manual_seed(seed)
    model = LLaMA((CONFIGS | QWEN).get(config, config), **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # a norm whose weights are all 1 would hide that they are not used
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


SAMPLES = [
    "Hello  world,   it's 12345 o'clock.\n\n\tIndented\r\n  twice ",
    "def f(x: int) -> str:\n\treturn f'{x**2:>8}'  # naïve\n\n\nprint(f(3))",
    "Příliš žluťoučký kůň — “übergroß”, ça va ? ¿Mañana? Łódź",
    "Ελληνικά, русский язык, українська; العربية والعبرية עברית",
    "हिन्दी में लिखा, ไทย, 日本語のテキスト、简体中文。 한국어 문장",
    "🦙🦙 family: 👩‍👩‍👧 flag: 🇪🇺 skin: 👍🏽 rare: 𒀀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    " leading, trailing ",
    "<s> and </s> and <|begin_of_text|> are text here, <|eot_id|> too",
    "1 22 333 4444 55555 3.14159 1e-7 $9,999.99 50%",
    "I'LL we've THEY'RE don't 'tis",
]

CHATML = (  # adds a system turn if there is none, as the templates of Qwen2.5 and SmolLM2 do
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_chatml(folder, texts=("the cat sat on the mat", "naïve 漢字 🦙"), template=None, **generation):
    """Train a byte-level BPE on `texts`, and save it to `folder`.

    It has no <bos>, and two tokens that end a text. The files are tokenizer.json, tokenizer_config.json with `template`
    as the chat template, and generation_config.json with further fields from `generation`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    model.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": None, "eos_token": "<|im_end|>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]} | generation))


def convert_sentencepiece(path):
    """Convert a SentencePiece model to a BPE Tokenizer. The merges are derived from the pieces and their scores."""
    from tokenizers import Tokenizer, models, normalizers

    model = SentencePieceProcessor(model_file=str(path))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in vocabulary.items():
        for split in range(1, len(piece)):
            parts = piece[:split], piece[split:]
            if all(part in vocabulary for part in parts):
                merges.append((-model.get_score(i), *(vocabulary[part] for part in parts), parts))
    merges = [merge[-1] for merge in sorted(merges)]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe


def save_llama2_json(data, folder):
    """Convert LLaMA 2's tokenizer.model in the folder `data` to a tokenizer.json, and save it to `folder`.

    A tokenizer_config.json is saved as well.
    """
    from tokenizers import AddedToken, decoders, processors

    model = convert_sentencepiece(data / "tokenizers" / "llama2_tokenizer.model")
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')


def make_example(ids, prompt_length, name="", features=None):
    """Return an example whose first `prompt_length` ids are the prompt. The other ids are the response."""
    return TokenizedExample(ids, [i >= prompt_length for i in range(len(ids))], name, features)


def make_adapter(model, layers=2, length=5, seed=1, gates=True):
    """Return an adapter for `model` with random gates of both signs, or zero gates if `gates` is false.

    Zero gates would hide errors in the prompts.
    """
    config = model.config
    adapter = Adapter(
        layers=layers,
        length=length,
        dim=config.dim,
        heads=config.n_heads,
        generator=torch.Generator().manual_seed(seed),
    )
    if gates:
        torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(seed + 1))
    return adapter


def make_tokens(model, *shape, seed=2):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def copy_base(source, target, **changes):
    """Copy a base to the new folder `target`, and change the copy's params.json; return `target`.

    `changes` are fields and their new values. None removes a field.
    """
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    params = json.loads((target / "params.json").read_text()) | changes
    (target / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    return target


def run(*args):
    """Run train.py in this process, and return click's Result."""
    import train

    return CliRunner().invoke(train.main, [str(arg) for arg in args])


def subcommands(group):
    """Return a dict from names to the commands of a click group."""
    context = click.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


def run_spoiled(args, spoil=None):
    """Call `spoil(rank)`, if given, and run train.py; return its exit code, standard output and standard error.

    PyTorch is limited to one thread. Raises the exceptions that train.py does not turn into an exit code.
    """
    torch.set_num_threads(1)
    if spoil is not None:
        spoil(int(os.environ.get("RANK", 0)))
    result = run(*args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def before_step(n, act):
    """Return a replacement for train.train_step that calls act() at the beginning of its n-th call (n from 1)."""
    import train

    train_step, calls = train.train_step, []

    def counting_step(*arguments):
        calls.append(1)
        if len(calls) == n:
            act()
        return train_step(*arguments)

    return counting_step


def tensors_and_metrics(out):
    """Return the tensors of the adapter in the run's folder `out`, as nested lists by name, and the run's metrics.

    The metrics are the lines of metrics.jsonl without tokens_per_second, which differs between equal runs.
    """
    lines = [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    tensors = {name: tensor.tolist() for name, tensor in load_file(out / "adapter.safetensors").items()}
    return tensors, lines


def split_for_parallel(weights, n, vocabulary_first):
    """Split weights for n GPUs as Meta does; return n dicts.

    wq, wk, wv, w1, w3 and output are split by rows, wo and w2 by columns, and the embeddings by rows if
    `vocabulary_first`, otherwise by columns. Vectors are replicated.
    """
    shards = [{} for _ in range(n)]
    for name, tensor in weights.items():
        by_columns = any(part in name for part in ("wo.", "w2.")) or ("tok_embeddings" in name and not vocabulary_first)
        whole = tensor.dim() == 1
        for i, shard in enumerate(shards):
            shard[name] = tensor if whole else tensor.chunk(n, dim=1 if by_columns else 0)[i].clone()
    return shards


def peak_anonymous(act):
    """Return the result of act(), and by how many bytes this process's anonymous memory (RssAnon) grew at its peak.

    Pages of memory-mapped files are not counted. The test is skipped where there is no /proc.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")

    before = measuring.status_bytes("RssAnon")
    result, peak = measuring.peak_anonymous(act, interval=0.0005)
    return result, peak - before


SMALL_VIT = ViTConfig(image_size=24, patch_size=8, dim=128, n_layers=3, n_heads=2, hidden_dim=96)


def make_vit(config=SMALL_VIT, seed=0, **options):
    """Return a frozen ViT with random weights, including norms and biases."""
    torch.manual_seed(seed)
    model = ViT(config, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def make_images(number=2, size=24):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(7))


def openai_state_dict(model):
    """Return a state dict as in OpenAI's CLIP files, with the ViT `model` as the vision encoder.

    It also has the encoder's projection (zeros), one tensor of the text encoder, image size and context length.
    """
    weights = dict(model.named_parameters())
    tensors = {
        "class_embedding": weights["class_embedding"],
        "positional_embedding": weights["positions"],
        "conv1.weight": weights["patch_embedding.weight"],
        "proj": torch.zeros(model.config.dim, 5),
    }
    for kind in ("weight", "bias"):
        tensors |= {
            f"ln_pre.{kind}": weights[f"embedding_norm.{kind}"],
            f"ln_post.{kind}": weights[f"norm.{kind}"],
        }
        for i in range(model.config.n_layers):
            ours, theirs = f"layers.{i}", f"transformer.resblocks.{i}"
            qkv = [weights[f"{ours}.attention.{name}.{kind}"] for name in ("wq", "wk", "wv")]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for a, b in (
                ("attention.wo", "attn.out_proj"), ("attention_norm", "ln_1"), ("ffn_norm", "ln_2"),
                ("w1", "mlp.c_fc"), ("w2", "mlp.c_proj"),
            ):  # fmt: skip
                tensors[f"{theirs}.{b}.{kind}"] = weights[f"{ours}.{a}.{kind}"]
    tensors = {f"visual.{name}": tensor for name, tensor in tensors.items()} | {"ln_final.weight": torch.ones(4)}
    return tensors | {"input_resolution": torch.tensor(model.config.image_size), "context_length": torch.tensor(77)}


def randomize(model):
    """Set all parameters of a module to random values, including norms and biases; return it in eval mode."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.2)
    return model.eval()


def timm_state_dict(model, head):
    """Return the weights of a ViT and its linear head under timm's names.

    timm's files do not state the number of heads; our loader assumes heads that are 64 wide.
    """
    weights = dict(model.named_parameters())
    tensors = {
        "cls_token": weights["class_embedding"][None, None],
        "pos_embed": weights["positions"][None],
        "head.weight": head[0].weight, "head.bias": head[0].bias,
    }  # fmt: skip
    for kind in ("weight", "bias"):
        tensors |= {
            f"patch_embed.proj.{kind}": weights[f"patch_embedding.{kind}"],
            f"norm.{kind}": weights[f"norm.{kind}"],
        }
        for i in range(model.config.n_layers):
            ours, theirs = f"layers.{i}", f"blocks.{i}"
            tensors[f"{theirs}.attn.qkv.{kind}"] = torch.cat(
                [weights[f"{ours}.attention.{x}.{kind}"] for x in ("wq", "wk", "wv")]
            )
            for a, b in (("attention.wo", "attn.proj"), ("attention_norm", "norm1"), ("ffn_norm", "norm2"),
                         ("w1", "mlp.fc1"), ("w2", "mlp.fc2")):  # fmt: skip
                tensors[f"{theirs}.{b}.{kind}"] = weights[f"{ours}.{a}.{kind}"]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def make_roberta(seed=0, **options):
    torch.manual_seed(seed)
    model = Roberta(RobertaConfig(60, 20, 32, 3, 4, 48), **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.3)
    return model.requires_grad_(False)


def save_roberta(folder, bpe):
    """Save a random RoBERTa in Hugging Face's layout to `folder`, with the tokenizer in the folder `bpe`.

    Returns `folder`. The test is skipped without transformers.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=266, max_position_embeddings=130, type_vocab_size=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48,
    )  # fmt: skip
    randomize(transformers.RobertaModel(config)).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text((bpe / name).read_text())
    return folder


def make_head_adapter(model, classes, gates=True, **options):
    config = model.config
    adapter = HeadAdapter(
        layers=2, length=4, dim=config.dim, heads=config.n_heads, widths=[config.dim, classes],
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    if gates:
        torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(2))
    return adapter


FOUR_LAYER_VIT = ViTConfig(image_size=24, patch_size=8, dim=128, n_layers=4, n_heads=2, hidden_dim=96)


HALF = (0.5, 0.5, 0.5)


def launch(main, args, spoil=None, stdin=""):
    """Call `spoil(rank)`, if given, and run the click command `main`, which raises SystemExit.

    Rank 0 reads `stdin`; the standard input of every other rank is empty. PyTorch is limited to one thread.
    """
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    if spoil is not None:
        spoil(rank)
    sys.stdin = io.StringIO(stdin if rank == 0 else "")
    main([str(arg) for arg in args])


def train_command(args, spoil=None):
    """Run train.py as one of several ranks, with `launch`."""
    import train

    launch(train.main, args, spoil)


def run_rank(rank, world, port, folder, results, target, args):
    """Run target(*args) as one of several ranks, and exit the process.

    If the target returns, (rank, its result) is put into the queue `results`. The exit code is that of a SystemExit, or
    1 after any other exception. Standard output and standard error go to the files stdout-RANK and stderr-RANK in
    `folder`.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    code = 1
    try:
        results.put((rank, target(*args)))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    results.close()
    results.join_thread()
    os._exit(code)


class Ranks:
    """Run target(*args) in `world` processes, which are started with the multiprocessing context `forks`.

    As with torchrun, if one process fails, the others receive SIGTERM, but only while `results` waits for them.
    """

    def __init__(self, forks, world, target, *args):
        self.folder = Path(tempfile.mkdtemp())
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.queue = forks.Queue()
        shared = (self.store.port, self.folder, self.queue, target, args)
        self.processes = [forks.Process(target=run_rank, args=(rank, world, *shared)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def results(self, timeout=60):
        """Return a list with an entry for each rank.

        The entry is the target's return value. If it did not return, it is (exit code, stdout, stderr). The test
        fails if a rank is still running `timeout` seconds after the call, or 30 seconds after a rank has failed. The
        files with the outputs are deleted, so this can be called only once.
        """
        returned, failed, deadline = {}, False, time.monotonic() + timeout
        while any(process.exitcode is None for process in self.processes):
            assert time.monotonic() < deadline, f"a rank hangs; exit codes: {[p.exitcode for p in self.processes]}"
            with suppress(queue.Empty):
                returned |= [self.queue.get(timeout=0.1)]
            if not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, time.monotonic() + 30  # torchrun sends SIGKILL 30 seconds after SIGTERM
                for process in self.processes:
                    process.terminate()
        with suppress(queue.Empty):
            while True:
                returned |= [self.queue.get(timeout=0.01)]
        ended = [(p.exitcode, self.read("stdout", i), self.read("stderr", i)) for i, p in enumerate(self.processes)]
        shutil.rmtree(self.folder)
        return [returned.get(rank, each) for rank, each in enumerate(ended)]

    def read(self, name, rank):
        return (self.folder / f"{name}-{rank}").read_text()


def error_lines(results):
    """Return the lines of standard error that begin with "error: ", of all ranks."""
    return [line for _, _, stderr in results for line in stderr.splitlines() if line.startswith("error: ")]


class Malicious:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("a pickle ran code",))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "mha": dict(num_attention_heads=4, num_key_value_heads=4),
    "gqa": dict(num_attention_heads=4, num_key_value_heads=2),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "wide heads": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24),
    "mistral": dict(architecture="Mistral", num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "qwen2": dict(architecture="Qwen2", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(architecture="Qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=24),
    "linear rope": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
    ),
    "llama3 rope": dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
}


def save_hugging_face(folder, tiny_base, shard_size="1GB", architecture="Llama", **kind):
    """Save a random transformers model with logits of order 10, and the tokenizer of `tiny_base`; return the model.

    `architecture` and `kind`, further fields of the config, come from a value of KINDS. The test is skipped without
    transformers.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=1056,  # larger than the tokenizer's, as in many published models
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=256,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        **kind,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        model.lm_head.weight *= 5
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.model").write_bytes((tiny_base / "tokenizer.model").read_bytes())
    return model


def save_harness_task(folder):
    """Save an lm-evaluation-harness task with three copies of a multiple-choice question; return its YAML file."""
    question = {"question": "Name the capital of Peru.", "right": 1}
    question["options"] = [" Lima", " The capital of Peru is Lima.", " owl"]
    (folder / "questions.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    files = json.dumps({"test": str(folder / "questions.jsonl")})
    (folder / "capitals.yaml").write_text(
        "task: capitals\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {files}, cache_dir: {json.dumps(str(folder))}}}\n"
        "doc_to_text: question\ndoc_to_choice: options\ndoc_to_target: right\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder / "capitals.yaml"


def chat_on_terminal(lines, *args):
    """Type `lines` and Ctrl-D into generate.py on a pseudo-terminal; return its standard output and standard error.

    Responses are greedy and have at most 5 tokens. Asserts that the exit code is 0.
    """
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    command = [sys.executable, "generate.py", *map(str, args), "--greedy", "--max-new-tokens", "5"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(slave)
    os.write(master, lines.encode() + b"\x04")
    stdout, stderr = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0, stderr
    return stdout, stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chat_in_process(lines, *args):
    """Run generate.py in this process, with `lines` from a standard input that claims to be a terminal.

    Responses are greedy and have at most 5 tokens. Returns its standard output and standard error.
    """
    import generate

    args = [*map(str, args), "--greedy", "--max-new-tokens", "5"]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "stdin", Terminal(lines))
        generate.main(args, standalone_mode=False)
    return out.getvalue(), err.getvalue()


SCIENCEQA = {
    "7": ("Which is a solid?", ["water", "a stone"], 1, "", None, "grade2", "natural science", "train"),
    "12": ("Which is north?", ["A", "B", "C"], 2, "Look at the map.", "image.png", "grade7", "social science", "test"),
    "30": ("Which is a verb?", ["run", "red"], 0, "", None, "grade6", "language science", "test"),
    "31": ("Which is hot?", ["ice", "fire"], 1, "", "image.png", "grade12", "natural science", "test"),
}


def save_problems(folder, **changes):
    """Save SCIENCEQA as problems.json; return its path.

    `changes` replaces fields of problem 12, or removes a field if the value is `...`.
    """
    fields = ("question", "choices", "answer", "hint", "image", "grade", "subject", "split")
    values = {id: dict(zip(fields, row)) for id, row in SCIENCEQA.items()}
    values["12"] |= changes
    values["12"] = {name: value for name, value in values["12"].items() if value is not ...}
    path = folder / "problems.json"
    path.write_text(json.dumps(values))
    return path


def save_problem_images(folder):
    """Save the images of SCIENCEQA's problems 12 and 31, as in ScienceQA's folders: ID/image.png."""
    for id in ("12", "31"):
        (folder / id).mkdir()
        Image.new("RGB", (20, 20), (int(id) * 8, 0, 0)).save(folder / id / "image.png")


COCO = {
    "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "Two dogs run over the green grass.\n"},
        {"id": 2, "image_id": 5, "caption": "A man rides a horse."},
        {"id": 3, "image_id": 9, "caption": "Dogs are running in a field."},
    ],
}


def save_coco(folder, **changes):
    """Save COCO as captions.json, with its lists replaced by those in `changes`; return the path."""
    path = folder / "captions.json"
    path.write_text(json.dumps(COCO | changes))
    return path


def make_testbed(base, instructions):
    """Return a testbed of the experiments on `base`, with L = 2, K = 3 and three epochs.

    The first 30 instructions are for training, and the others are held out. The perplexity is measured on 100 identical
    lines.
    """
    from data import read_examples
    from experiments import testbed
    from experiments.methods import Setting

    examples = read_examples(instructions)
    default = Setting(layers=2, length=3, epochs=3, lr=0.05)
    lines = ["The capital of Peru is Lima, and Anna went home.\n" * 100]
    parts = testbed.TestbedParts(base, default, 8, examples[:30], examples[30:], lines)
    return testbed.make_testbed(parts, 512, torch.device("cpu"), torch.float32)


def make_picture(width=60, height=40, mode="RGB", seed=0):
    """Return an image with a smooth upper and a noisy lower half."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] = np.linspace(0, 255, width)[None, :, None].astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_video(path, colors, **options):
    """Save a video with one second of each color. The options are those of FFmpeg's muxer."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for color in colors:
            for _ in range(5):
                frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), color))
                file.mux(stream.encode(frame))
        file.mux(stream.encode())


def train(*args):
    """Run `python -m encoder_tuning train` in this process, and return click's Result."""
    from encoder_tuning.__main__ import main

    return CliRunner().invoke(main, ["train", *map(str, args)])


def evaluate(*args):
    """Run `python -m encoder_tuning evaluate` in this process, and return click's Result."""
    from encoder_tuning.__main__ import main

    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


def train_encoder_rank(args):
    """Run `python -m encoder_tuning train` as one of several ranks."""
    from encoder_tuning.__main__ import main

    launch(main, ["train", *args])
