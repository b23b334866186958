"""python -m experiments bits: perplexity and memory by the number of bits per weight of the frozen layers."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import KINDS, save_hugging_face

from experiments.__main__ import main
from formats.bases import load_llama


def test_perplexity_and_bytes_differ_by_the_number_of_bits(tiny_base, tmp_path):
    save_hugging_face(tmp_path / "hf", tiny_base, **KINDS["gqa"])
    text = "The capital of Peru is Lima. " * 400
    (tmp_path / "a.txt").write_text(text)
    args = ["bits", "--base", tmp_path / "hf", "--text", tmp_path / "a.txt", "--rows", 3, "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, args), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "bits.json").read_text())["rows"]
    found = {name: rows[f"hf, {name}"] for name in ("float32", "bfloat16", "8 bits", "4 bits")}

    model, tokenizer = load_llama(tmp_path / "hf")
    ids = torch.tensor([*tokenizer.start_ids, *tokenizer.encode(text), tokenizer.eos_id][: 3 * 128]).view(3, 128)
    with torch.no_grad():
        log_p = model(ids).log_softmax(dim=2)
    losses = [-log_p[row, t, ids[row, t + 1]] for row in range(3) for t in range(127)]
    assert found["float32"]["perplexity"][0] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
    assert len({values["perplexity"][0] for values in found.values()}) == 4

    linear = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    norms = sum(p.numel() for p in model.layers.parameters()) - linear
    layer_bytes = {name: values["layer_bytes"][0] for name, values in found.items()}
    assert layer_bytes["float32"] == 2 * layer_bytes["bfloat16"] == 4 * (linear + norms)
    assert 9 / 8 * linear == layer_bytes["8 bits"] - 4 * norms
    assert 3 / 4 * linear == layer_bytes["4 bits"] - 4 * norms
    assert (tmp_path / "out" / "bits.png").stat().st_size > 1000
