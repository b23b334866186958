"""Small models with open gates, and where the real data is, if it is anywhere."""

import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapter import Adapter  # noqa: E402
from model import Config, LLaMA  # noqa: E402
from training.runs import read_metrics  # noqa: E402

DATA = Path(os.environ.get("LLAMA_ADAPTER_DATA", ROOT.parent / "shared" / "data"))

# Multi-head, grouped queries, one key/value head, and heads whose widths don't add up to C.
CONFIGS = {
    "mha": Config(32, 3, 4, 4, 8, 48, 50),
    "gqa": Config(32, 3, 4, 2, 8, 48, 50),
    "mqa": Config(32, 3, 4, 1, 8, 48, 50),
    "wide": Config(32, 3, 4, 2, 12, 48, 50),
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture
def data():
    if not DATA.is_dir():
        pytest.skip(f"needs the real data at {DATA} (or LLAMA_ADAPTER_DATA)")
    return DATA


def make_model(config="gqa", seed=0, **options):
    """A frozen random LLaMA whose layers all matter: untrained weights of order one."""
    torch.manual_seed(seed)
    model = LLaMA(CONFIGS.get(config, config), **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # norms: all ones would hide a missing weight
    return model.requires_grad_(False)


def make_adapter(model, layers=2, length=5, seed=1, gates=True):
    """An adapter with its gates open, half of them the wrong way: gate zero hides every bug."""
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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder in Meta's layout: toy.py's tokenizer and a random model of 2 layers."""
    from toy import almanac as toy

    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = toy.train_tokenizer(folder / "tokenizer.model", seed=0)
    params = dict(dim=16, n_layers=3, n_heads=2, multiple_of=8, norm_eps=1e-5, vocab_size=-1)
    (folder / "params.json").write_text(json.dumps(params))
    torch.manual_seed(0)
    model = LLaMA(Config(16, 3, 2, 2, 8, 48, tokenizer.vocab_size))
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    return folder


def copy_base(source, target, **changes):
    """The same base in another folder, params.json changed; None takes a field away."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    params = json.loads((target / "params.json").read_text()) | changes
    (target / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    return target


@pytest.fixture(scope="session")
def forks():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")  # for the server, which starts with the first
        context.Process(target=time.time).start()
    return context


def run(*args):
    """train.py, in this process."""
    import train

    return CliRunner().invoke(train.main, [str(arg) for arg in args])


def command(args, spoil=None):
    """train.py, where `spoil` has been given the rank: exit code, standard output, standard error."""
    torch.set_num_threads(1)
    if spoil is not None:
        spoil(int(os.environ.get("RANK", 0)))
    result = run(*args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def before_step(n, act):
    """train.update, which calls act() before the n-th step from now."""
    import train

    update, calls = train.update, []

    def acting(*arguments):
        calls.append(1)
        if len(calls) == n:
            act()
        return update(*arguments)

    return acting


def tensors_and_metrics(out):
    """What a run left, all but the clock."""
    lines = [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    tensors = {name: tensor.tolist() for name, tensor in load_file(out / "adapter.safetensors").items()}
    return tensors, lines


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Forty instructions of two kinds and unequal length."""
    records = [
        {
            "instruction": f"Name the number {i}.",
            "input": "of animals" * (i % 3),
            "output": "cat " * (1 + i % 7) + str(i),
        }
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "forty.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def args(tiny_base, instructions, tmp_path):
    """5 steps an epoch, the last of 4 examples; 3 epochs."""
    return [
        "--base", tiny_base, "--data", instructions, "--out", tmp_path / "run", "--epochs", 3, "--batch-size", 8,
        "--val-size", 4, "--length", 3, "--lr", 0.05, "--warmup-epochs", 0.5, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A small byte-level BPE in Hugging Face's layout: all bytes, and a few merges."""
    folder = tmp_path_factory.mktemp("bpe")
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["Ġ t", "h e", "Ġt he", "k m", "Ġ km"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(m.replace(" ", "") for m in merges), *letters, "<mask>"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


def split_for_parallel(weights, n, vocabulary_first):
    """Weights of n GPUs: wq, wk, wv, w1, w3 and output by rows, wo and w2 by columns, norms whole on each."""
    shards = [{} for _ in range(n)]
    for name, tensor in weights.items():
        by_columns = any(part in name for part in ("wo.", "w2.")) or ("tok_embeddings" in name and not vocabulary_first)
        whole = tensor.dim() == 1
        for i, shard in enumerate(shards):
            shard[name] = tensor if whole else tensor.chunk(n, dim=1 if by_columns else 0)[i].clone()
    return shards


@pytest.fixture(scope="session")
def large_base(tiny_base, tmp_path_factory):
    """260 MB in bfloat16, in two of Meta's files: 10 layers of width 1024."""
    folder = copy_base(
        tiny_base, tmp_path_factory.mktemp("large") / "base", dim=1024, n_layers=10, n_heads=8, multiple_of=256
    )
    weights = LLaMA(Config(1024, 10, 8, 8, 128, 2816, 1024)).bfloat16().state_dict()
    for i, shard in enumerate(split_for_parallel(weights, 2, False)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def peak_anonymous(act):
    """What act() returns, and by how many bytes the process grew meanwhile, at most: without pages of mapped files."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads /proc")

    def anonymous():
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    before, seen, done = anonymous(), [], threading.Event()

    def watch():
        while not done.wait(0.0005):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    result = act()
    done.set()
    thread.join()
    return result, max(seen) - before
