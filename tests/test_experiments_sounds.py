"""python -m experiments sounds, and the Keyword Transformer of docs/examples, which encodes the sounds."""

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT

from data import Example
from experiments import sounds
from experiments.__main__ import main
from multimodal import encode_with_function, load_function
from tasks import instructions

ENCODER = str(ROOT / "docs" / "examples" / "keyword_transformer.py")


def encoder(name):
    return load_function(f"{ENCODER}:{name}")


@pytest.fixture
def keyword_transformer(data, monkeypatch):
    """Folder with the model and ten real clips. KWT_MODEL is set to the path of the model."""
    pytest.importorskip("av")
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    folder = data / "models" / "kwt1"
    monkeypatch.setenv("KWT_MODEL", str(folder / "non_stream.tflite"))
    return folder


def save_tone(path, rate, seconds, pitch=440, before=0.0):
    """Save a WAV file (mono, 16 bits): `before` seconds of silence, then a tone of `seconds`. Return its path.

    `rate` is in samples per second, and `pitch` in Hz.
    """
    sound = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)
    sound = np.concatenate([np.zeros(round(rate * before)), sound])
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((32767 * sound).astype("<i2").tobytes())
    return path


# ---------------------------------------------------------------------------------------------------
# The encoder


def test_all_ten_real_clips_are_recognized(keyword_transformer, tmp_path):
    """The labels of the experiment are in the model's order. Four of its words have the label "unknown"."""
    files = sounds.write_clips(keyword_transformer / "speech_commands_10.npz", tmp_path)
    features = encode_with_function(files, encoder("label_scores"))
    examples = [Example("", "", "", str(file), file.name, features=one) for file, one in zip(files, features)]
    assert len(files) == 10 and sounds.label_matches(examples) == [True] * 10


def test_scores_are_computed_from_the_last_class_token(keyword_transformer, tmp_path):
    """If the runtime fused a layer with the next one, the tensor with its output would contain different values."""
    (file, *_) = sounds.write_clips(keyword_transformer / "speech_commands_10.npz", tmp_path)
    tokens, scores = encoder("class_tokens")(file), encoder("label_scores")(file)
    assert tokens.shape == (4, 64) and scores.shape == (1, 12)
    model = encoder("run_model")(file)
    index = {tensor["name"]: tensor["index"] for tensor in model.get_tensor_details()}
    weight, bias = (model.get_tensor(index[f"sequential_12/dense_73/{name}"]) for name in ("MatMul", "bias"))
    np.testing.assert_allclose(tokens[3] @ weight.T + bias, scores[0], atol=1e-5)
    assert np.abs(np.diff(tokens, axis=0)).max(axis=1).min() > 0.1  # four layers, not one


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_sounds_of_any_rate_are_resampled_to_16_khz(tmp_path, rate):
    pytest.importorskip("av")
    samples = encoder("read_sound")(save_tone(tmp_path / "x.wav", rate, 0.5, pitch=440))
    assert abs(len(samples) - 8000) <= 2  # the resampler was flushed
    assert np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("seconds, before", [(0.2, 0), (0.2, 0.7), (0.2, 3.0), (1.6, 0)])
def test_one_second_is_centered_on_the_sound(tmp_path, seconds, before):
    pytest.importorskip("av")
    path = save_tone(tmp_path / "x.wav", 16000, seconds, before=before)
    samples = encoder("one_second")(encoder("read_sound")(path))
    assert samples.shape == (16000,) and samples.dtype == np.float32
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    assert abs(loud[0] + loud[-1] - 16000) < 40 and abs(len(loud) - 16000 * min(seconds, 1)) < 800


def test_silence_gives_one_second_of_zeros():
    assert np.array_equal(encoder("one_second")(np.zeros(400, np.float32)), np.zeros(16000))


def test_missing_package_or_model_is_reported(tmp_path, monkeypatch):
    file = save_tone(tmp_path / "x.wav", 16000, 0.5)
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ValueError, match="x.wav: the encoder failed: .*: pip install ai-edge-litert"):
        encode_with_function([file], encoder("class_tokens"))
    monkeypatch.undo()
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    for variable in ("", str(tmp_path / "no.tflite")):
        monkeypatch.setenv("KWT_MODEL", variable)
        with pytest.raises(ValueError, match=f"KWT_MODEL={variable}: no such file; set it to the path"):
            encode_with_function([file], encoder("class_tokens"))
    (tmp_path / "broken.tflite").write_text("no model")
    monkeypatch.setenv("KWT_MODEL", str(tmp_path / "broken.tflite"))
    with pytest.raises(ValueError, match="broken.tflite: is not a TFLite model"):
        encode_with_function([file], encoder("class_tokens"))


# ---------------------------------------------------------------------------------------------------
# The experiment


def test_no_held_out_voice_is_trained_on():
    (accents, speakers), (new_accents, new_speakers) = sounds.VOICES["tuned"], sounds.VOICES["held-out"]
    assert not set(accents) & set(new_accents) and not set(speakers) & set(new_speakers)
    spoken = {(part, word) for part, word, *_ in sounds.utterances()}
    assert spoken == {(part, word) for part in sounds.VOICES for word in sounds.WORDS}


def test_swapped_sounds_are_of_a_different_word():
    words = ["stop", "stop", "stop", "go"]
    examples = [
        Example("", "", "", word, f"{word}-{i}.wav", features=torch.tensor([float(i)])) for i, word in enumerate(words)
    ]
    assert [words[int(one)] for one in sounds.other_sounds(examples)] == ["go", "go", "go", "stop"]


def test_espeak_ng_makes_the_sounds_and_records(tmp_path, monkeypatch):
    """The records are a data file for train.py, and the sounds that they name exist."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    monkeypatch.setattr("experiments.cached.CACHE", tmp_path / "cache")
    monkeypatch.setattr(sounds, "WORDS", ["stop", "eight"])
    monkeypatch.setattr(sounds, "VOICES", {"tuned": (["en-us"], ["m1", "f1"]), "held-out": (["en-gb"], ["m7"])})
    folder = sounds.make_speech()
    assert [len(sounds.wav_files(folder / part)) for part in sounds.VOICES] == [4, 2]
    examples = instructions.read(folder / "sounds.json")
    assert all((folder / example.image).is_file() for example in examples)
    records = {(sounds.spoken_word(Path(e.image)), e.instruction, e.output) for e in examples}
    assert records == {
        ("eight", "Which word do you hear?", "I hear the word eight."),
        ("eight", "Is it a number?", "Eight is a number."),
        ("stop", "Which word do you hear?", "I hear the word stop."),
        ("stop", "Is it a number?", "Stop is no number."),
    }
    with wave.open(str(next((folder / "tuned").glob("stop-*")))) as file:
        assert file.getnframes() > 2000


def test_missing_espeak_ng_or_sounds_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.cached.CACHE", tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(main, ["sounds", "--model", "x.tflite"])
    assert result.exit_code == 2 and "espeak-ng is not installed; run apt install espeak-ng, or" in result.stderr
    result = CliRunner().invoke(main, ["sounds", "--model", "x.tflite", "--speech", str(tmp_path)])
    assert (
        result.exit_code == 2 and "tuned: contains no sounds; expected files named WORD-ANYTHING.wav" in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1


def test_sounds_command_writes_its_results(tiny_base, tmp_path, monkeypatch):
    """The sounds are generated tones, and stubbed answers determine the scores."""
    (tmp_path / "ear.py").write_text("import numpy as np\ndef rows(path): return np.arange(12.0)[None] ** 0.5\n")
    monkeypatch.setattr(sounds, "EXAMPLES", tmp_path)
    monkeypatch.setattr(sounds, "ENCODERS", {"an ear": "ear.py:rows", sounds.SCORES: "ear.py:rows"})
    for part in ("tuned", "held-out"):
        (tmp_path / part).mkdir()
        for word in ("go", "stop"):  # `go` is the last label, where the features are largest
            save_tone(tmp_path / part / f"{word}-a.wav", 16000, 0.1)
    np.savez(tmp_path / "clips.npz", waves=np.zeros((1, 16000), np.float32), words=["go"])
    monkeypatch.setattr(sounds, "other_sounds", lambda examples: [torch.zeros(12) for _ in examples])

    def stub_answers(model, tokenizer, adapter, requests):
        """Return an answer about "go" to each request with features that are not all zero, and "?" to the others."""
        heard = [request.features is not None and bool(request.features.any()) for request in requests]
        responses = {"Which word do you hear?": "I hear the word go.", "Is it a number?": "Go is no number."}
        return [responses[request.instruction] if has_sound else "?" for request, has_sound in zip(requests, heard)]

    monkeypatch.setattr(sounds, "greedy_answers", stub_answers)
    monkeypatch.setenv("KWT_MODEL", "")
    command = ["sounds", "--model", "x", "--speech", tmp_path, "--clips", tmp_path / "clips.npz", "--base", tiny_base]
    command += ["--epochs", 2, "--lr", 0.01, "--seeds", 2, "--device", "cpu", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "sounds: tuned 2, held-out 2, real clips 1; two questions about each" in result.stdout
    assert (
        "accuracy of the Keyword Transformer's own labels: tuned 50.0%, held-out 50.0%, real clips 100.0%"
        in result.stdout
    )
    found = json.loads((tmp_path / "out" / "sounds.json").read_text())
    row = found["rows"]["an ear"]
    assert [row[f"held-out: {name}"] for name in ("heard", "withheld", "another")] == [[0.5, 0.5], [0, 0], [0, 0]]
    assert row["held-out: words"] == [{"go": 1, "stop": 0}] * 2
    assert row["real clips: heard"] == [1, 1] and (tmp_path / "out" / "sounds.png").stat().st_size > 1000


def test_archive_of_other_arrays_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros(3))
    for content in (path.read_bytes(), path.read_bytes()[:100]):  # the second one is a truncated archive
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.npz: is not an .npz archive with arrays `waves` and `words`"):
            sounds.write_clips(path, tmp_path)
