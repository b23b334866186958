"""convert.py: show, import and export adapters."""

import torch
from click.testing import CliRunner
from helpers import make_adapter, make_model

from adapter import Adapter
from convert import adapter_summary, main
from formats.adapters import load_adapter


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_show_prints_shapes_metadata_and_gates(tmp_path):
    adapter = Adapter(layers=2, length=3, dim=8, heads=3)
    with torch.no_grad():
        adapter.gates.copy_(torch.tensor([[0.0, 0.5, 1.0], [-1.0, 0.0, 0.0]]))
    adapter.save(
        tmp_path / "a.safetensors", base_layers=7, data="alpaca.json", steps=12, vision_encoder_fingerprint="abc"
    )
    result = run("show", tmp_path / "a.safetensors", "--png", tmp_path / "gates.png")
    assert result.exit_code == 0
    for part in (
        "2 x 3 x 8, 3 heads",
        "54",
        "alpaca.json",
        "steps:",
        "12",
        "vision_encoder_fingerprint: abc\n",
        "    6 |@  |",
        "    5 | +@|",
    ):
        assert part in result.stdout
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert "|   |" in adapter_summary(Adapter(layers=1, length=1, dim=2, heads=3))  # all gates are zero
    result = run("show", tmp_path / "absent")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_import_writes_our_format_and_reports_what_it_read(tmp_path):
    tensors = {"adapter_query.weight": torch.ones(10, 32)}
    tensors |= {f"layers.{i}.attention.gate": torch.full((1, 4, 1, 1), i / 4) for i in range(3)}
    torch.save(tensors, tmp_path / "theirs.pth")
    result = run("import", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", "--gate", "identity", "--length", 5)
    assert result.exit_code == 0
    assert "theirs.pth: read as 2 layers of 5 prompts of width 32, gate activation identity" in result.stderr
    adapter = Adapter.load(tmp_path / "ours.safetensors")
    assert adapter.gate_activation == adapter.metadata["gate_activation"] == "identity"
    assert adapter.gate_values()[:, 0].tolist() == [0.25, 0.5]


def test_export_writes_a_peft_folder(tmp_path):
    adapter = make_adapter(make_model())
    with torch.no_grad():
        adapter.gates.copy_(torch.tensor([[0.5], [-1.0]]).expand(2, 4))
    adapter.save(tmp_path / "ours.safetensors", base_layers=3)
    assert run("export", tmp_path / "ours.safetensors", tmp_path / "theirs").exit_code == 0
    loaded = load_adapter(tmp_path / "theirs", heads=4)
    assert torch.equal(loaded.prompts, adapter.prompts) and torch.equal(loaded.gate_values(), adapter.gate_values())


def test_export_of_unequal_gates_is_a_one_line_error(tmp_path):
    make_adapter(make_model()).save(tmp_path / "ours.safetensors", base_layers=3)
    result = run("export", tmp_path / "ours.safetensors", tmp_path / "theirs")
    assert result.exit_code == 2 and "PEFT has one gate for all heads" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "theirs").exists()
