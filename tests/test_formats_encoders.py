"""Encoder files of every layout: outputs compared with the original model, preprocessing, and invalid files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SMALL_VIT, make_images, make_vit, openai_state_dict, make_picture, timm_state_dict, randomize
from PIL import Image

from encoder_tuning.data import read_labeled
from encoders.media import preprocess
from encoders.models import make_mlp
from encoders.models import ViTConfig
from formats.encoders import NOT_CLIP, load_encoder, load_vit


def make_hugging_face_clip(vision_only):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        image_size=24, patch_size=8, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96
    )
    if vision_only:
        model = CLIPVisionModel(vision)
    else:
        text = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
        model = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("vision_only", [True, False])
def test_every_clip_layer_equals_transformers(tmp_path, vision_only):
    theirs = make_hugging_face_clip(vision_only)
    theirs.save_pretrained(tmp_path)
    ours, images = load_vit(tmp_path), make_images()
    vision = theirs if vision_only else theirs.vision_model
    with torch.no_grad():
        output = vision(images, output_hidden_states=True)
    for state, expected in zip(ours(images), output.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.norm(ours(images)[-1][:, 0]), output.pooler_output, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_openai_files_are_read(tmp_path, whole):
    model = make_vit()
    state = openai_state_dict(model)
    if not whole:
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items() if "visual" in name}
    torch.save(state, tmp_path / "ViT.pt")
    loaded = load_vit(tmp_path / "ViT.pt")
    assert loaded.config == SMALL_VIT
    assert all(torch.equal(a, b) for a, b in zip(model(make_images()), loaded(make_images()), strict=True))


def save_open_clip(folder, hidden_act="gelu", model=None, pixels=None, **vision):
    """Save a CLIP with four heads of width 20 in open_clip's layout; return the same model in transformers.

    `model`, `pixels` and `vision` are further fields of model_cfg, preprocess_cfg and vision_cfg.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"image_size": 24, "patch_size": 8, "hidden_size": 80, "num_hidden_layers": 3, "intermediate_size": 96}
    theirs = randomize(CLIPVisionModel(CLIPVisionConfig(**shape, num_attention_heads=4, hidden_act=hidden_act)))
    theirs.save_pretrained(folder / "transformers")
    state = openai_state_dict(load_vit(folder / "transformers"))
    state = {name: t for name, t in state.items() if name not in ("input_resolution", "context_length")}
    torch.save(state | {"logit_scale": torch.tensor(1.0)}, folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"vision_cfg": {"width": 80, "head_width": 20, **vision}, **(model or {})}}
    config["preprocess_cfg"] = pixels or {}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_files_equal_transformers(tmp_path, capsys, quick):
    """The heads are not 64 wide, and the default activation is GELU. The weights determine neither of the two."""
    theirs = save_open_clip(tmp_path, "quick_gelu" if quick else "gelu", {"quick_gelu": True} if quick else None)
    ours, images = load_vit(tmp_path / "open_clip_pytorch_model.bin"), make_images()
    with torch.no_grad():
        output = theirs(images, output_hidden_states=True)
    for state, expected in zip(ours(images), output.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    assert ours.config.n_heads == 4 and ours.config.mean == ViTConfig.mean and "warning" not in capsys.readouterr().err


def test_open_clip_preprocessing_is_read(tmp_path):
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
    save_open_clip(tmp_path, pixels=pixels)
    config = load_vit(tmp_path / "open_clip_pytorch_model.bin").config
    image = make_picture(60, 40)
    squeezed = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    expected = (squeezed - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(preprocess(image, config).permute(1, 2, 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pixels": {"interpolation": "random"}}, "interpolation is 'random'; only 'bilinear' and 'bicubic'"),
        ({"pixels": {"resize_mode": "longest"}}, "resize_mode is 'longest'; only 'shortest' and 'squash'"),
        ({"pixels": {"mean": 0.5}}, "the mean of the pixels is 0.5; expected a list"),
        ({"pixels": [1]}, "preprocess_cfg is missing or not an object"),
        ({"head_width": 24}, "width is 80 and head_width is 24, but the weights have width 80"),
        ({"head_width": "20"}, "head_width is '20', not an integer"),
        ({"width": 768}, "width is 768 and head_width is 20, but the weights have width 80"),
        ({"act_kwargs": {"approximate": "tanh"}}, "vision_cfg has act_kwargs, which is not supported"),
    ],
)
def test_unsupported_open_clip_settings_are_refused(tmp_path, changes, message):
    save_open_clip(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"open_clip_pytorch_model.bin: .*{message}"):
        load_vit(tmp_path / "open_clip_pytorch_model.bin")


def test_openai_state_dict_is_recognized_by_its_entries(tmp_path, capsys):
    """If input_resolution or context_length is missing, and open_clip_config.json too, loading prints a warning.

    If the width is one that only open_clip's models have, such a file is refused.
    """
    state = openai_state_dict(make_vit())
    torch.save(state, tmp_path / "ViT.pt")
    load_vit(tmp_path / "ViT.pt")
    assert "warning" not in capsys.readouterr().err
    del state["context_length"]
    torch.save(state, tmp_path / "ViT.pt")
    assert load_vit(tmp_path / "ViT.pt").config == SMALL_VIT
    assert "assumed to be OpenAI's, with QuickGELU and heads 64 wide" in capsys.readouterr().err
    for width in (1280, 1408, 1664):
        torch.save(state | {"visual.conv1.weight": torch.ones(width, 3, 8, 8)}, tmp_path / "ViT.pt")
        with pytest.raises(ValueError, match=f"ViT.pt: has width {width}, .* needs its open_clip_config.json"):
            load_vit(tmp_path / "ViT.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_error_shows_how_to_extract_the_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(
        ValueError, match=r"ViT.pt: is a TorchScript program.*torch.jit.load\('ViT.pt', 'cpu'\).state_dict"
    ):
        load_vit(tmp_path / "ViT.pt")


def save_broken_clip(tmp_path, change):
    state = openai_state_dict(make_vit())
    change(state)
    torch.save(state, tmp_path / "ViT.pt")
    return tmp_path / "ViT.pt"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("visual.ln_pre.bias"), "ViT.pt: has no weight 'ln_pre.bias'"),
        (lambda s: s.pop("visual.positional_embedding"), "ViT.pt: has no weight 'positional_embedding'"),
        (
            lambda s: s.update({"visual.ln_1": torch.ones(1), "visual.ln_post.bias": torch.ones(7)}),
            r"norm.bias has shape \(7,\)",
        ),
        (lambda s: s.update({"visual.conv1.weight": torch.ones(100, 3, 8, 8)}), "do not share|has shape|is "),
        (
            lambda s: s.update({"visual.transformer.resblocks.1.attn.in_proj_weight": "text"}),
            "layers.1.attention.wq.weight is not a dense tensor",
        ),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(4)}), "ViT.pt: the patch embedding, positions"),
    ],
)
def test_broken_vision_encoders_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_vit(save_broken_clip(tmp_path, change))


def test_files_without_a_vision_encoder_are_refused(tmp_path, tiny_base):
    with pytest.raises(FileNotFoundError, match="nowhere: no such vision encoder"):
        load_vit("nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json: model_type is 'llama'; expected 'clip', 'clip_vision_model'"):
        load_vit(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="x.pt: not a file of tensors"):
        load_vit(tmp_path / "x.pt")


# ---------------------------------------------------------------------------------------------------
# preprocessor_config.json


PROCESSORS = {
    "CLIP": [
        {"resample": 2},
        {"size": {"shortest_edge": 32}},
        {"size": 30, "crop_size": 24, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"size": {"height": 32, "width": 32}, "do_normalize": False},
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    ],
    "ViT": [{"resample": 3}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}],
    "DeiT": [{}, {"size": {"height": 27, "width": 27}, "resample": 2}],
}


def save_encoder_with_processor(folder, kind, **changes):
    """Save an encoder of 24 x 24 pixels in Hugging Face's layout; return a Pillow processor with options `changes`."""
    transformers = pytest.importorskip("transformers")
    if kind == "CLIP":
        make_hugging_face_clip(vision_only=True).save_pretrained(folder)
    else:
        config = transformers.ViTConfig(image_size=24, patch_size=8, **SHAPE)
        transformers.ViTModel(config).save_pretrained(folder)
    module = getattr(transformers.models, kind.lower())
    defaults = {"size": {"shortest_edge": 24} if kind == "CLIP" else {"height": 24, "width": 24}}
    if kind == "DeiT":
        defaults["size"] = {"height": 28, "width": 28}
    if kind != "ViT":
        defaults["crop_size"] = {"height": 24, "width": 24}
    pil = getattr(getattr(module, f"image_processing_pil_{kind.lower()}"), f"{kind}ImageProcessorPil")
    return pil(**defaults | changes)


@pytest.mark.parametrize("kind, changes", [(kind, changes) for kind, all in PROCESSORS.items() for changes in all])
def test_preprocessing_follows_preprocessor_config_json(tmp_path, kind, changes):
    processor = save_encoder_with_processor(tmp_path, kind, **changes)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    config = load_encoder(tmp_path)[0].config
    for size in ((60, 40), (25, 90)):
        image = make_picture(*size)
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        grey_level = 1 / 255 / torch.tensor(config.std)[:, None, None]
        assert ((preprocess(image, config) - theirs).abs() <= 1.01 * grey_level).all()


def test_processor_config_json_takes_precedence(tmp_path):
    """transformers 5 writes processor_config.json, and reads it before preprocessor_config.json."""
    save_encoder_with_processor(tmp_path, "CLIP", resample=2).save_pretrained(tmp_path)
    assert load_vit(tmp_path).config.resample == "bilinear"
    nested = {"image_processor": {"resample": 3, "size": 31}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    config = load_vit(tmp_path).config
    assert config.resample == "bicubic" and config.resized == 31
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert load_vit(tmp_path).config.resample == "bilinear"


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("CLIP", {"do_resize": False}, "do_resize is false; only true is supported"),
        ("ViT", {"do_rescale": False}, "do_rescale is false; only true is supported"),
        ("ViT", {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784.*; only 1/255 is supported"),
        ("CLIP", {"rescale_factor": "1/255"}, "rescale_factor is '1/255'; only 1/255"),
        ("CLIP", {"resample": 1}, r"resample is 1; only 2 \(bilinear\) and 3 \(bicubic\)"),
        (
            "CLIP",
            {"do_center_crop": False},
            "'shortest_edge': 24} without do_center_crop; expected height and width 24",
        ),
        ("CLIP", {"crop_size": 22}, "crop_size is 22, but the encoder's image_size is 24"),
        (
            "CLIP",
            {"crop_size": {"height": 24, "width": 22}},
            "crop_size is .*; expected an integer, or an object with only height and width",
        ),
        ("CLIP", {"size": 22}, "the size before cropping is 22, not an integer from 24 to 96"),
        (
            "CLIP",
            {"size": {"longest_edge": 24}},
            "size is {'longest_edge': 24}; expected an integer, or an object with only shortest_edge",
        ),
        ("ViT", {"size": 32}, "size is 32 without do_center_crop; expected height and width 24"),
        (
            "ViT",
            {"size": {"height": 24, "width": 48}},
            "size is .*; expected an integer, or an object with only height and width",
        ),
        ("ViT", {"size": None}, "size is None without do_center_crop"),
        ("CLIP", {"size": [24]}, "the size before cropping is .*24.*, not an integer"),
        ("ViT", {"image_mean": [0.5]}, "3 channels, 1 means and 3 standard deviations"),
    ],
)
def test_unsupported_preprocessing_is_refused(tmp_path, kind, changes, message):
    save_encoder_with_processor(tmp_path, kind).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        load_encoder(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Other vision transformers, and RoBERTa


SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)


def test_vit_equals_transformers(tmp_path):
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    theirs = randomize(ViTForImageClassification(Config(image_size=24, patch_size=8, num_labels=5, **SHAPE)))
    theirs.save_pretrained(tmp_path)
    ours, head = load_encoder(tmp_path)
    images = make_images()
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True)
        for state, hidden in zip(ours(images), expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(state, hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head(ours.encode(images)[:, 0]), expected.logits, rtol=1e-4, atol=1e-4)
    assert ours.config.mean == (0.5, 0.5, 0.5)
    assert not any(p.requires_grad for p in ours.parameters()) and all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("folder", [True, False])
def test_timm_files_are_read(tmp_path, folder):
    half = (0.5, 0.5, 0.5)
    config = ViTConfig(24, 8, 128, 2, 2, 96, 1e-6, "gelu", mean=half, std=half, **NOT_CLIP)
    model, head = make_vit(config), make_mlp([128, 7], "tanh")
    if folder:
        from safetensors.torch import save_file

        save_file(timm_state_dict(model, head), tmp_path / "model.safetensors")
        values = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": half}}
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_args": {"num_heads": 4, "norm_eps": 1e-5}}))
        other, _ = load_encoder(tmp_path)
        assert (other.config.n_heads, other.config.norm_eps) == (4, 1e-5)
        for name, value in (("num_heads", 2.5), ("num_heads", 0), ("norm_eps", "1e-5"), ("norm_eps", 1)):
            (tmp_path / "config.json").write_text(json.dumps(values | {"model_args": {name: value}}))
            with pytest.raises(ValueError, match=f"config.json: model_args' {name} is {value!r}, not a"):
                load_encoder(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = replace(config, mean=(0.1, 0.2, 0.3))
        loaded, loaded_head = load_encoder(tmp_path)
    else:
        torch.save(timm_state_dict(model, head), tmp_path / "vit.pth")
        loaded, loaded_head = load_encoder(tmp_path / "vit.pth")
    extra = timm_state_dict(model, head) | {"blocks.0.ls1.gamma": torch.ones(128)}  # LayerScale, as in DINOv2
    torch.save(extra, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="more.pth: has unknown weights in its layers, such as blocks.0.ls1"):
        load_encoder(tmp_path / "more.pth")
    images = make_images()
    assert loaded.config == config and torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(loaded_head(torch.ones(128)), head(torch.ones(128)))


@pytest.mark.parametrize("kind", ["sequence", "token", "question"])
def test_roberta_equals_transformers(tmp_path, kind):
    """Rows have different lengths and are padded on the right."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=60, max_position_embeddings=20, type_vocab_size=1, num_labels=3, layer_norm_eps=1e-5, **SHAPE
    )
    name = {"sequence": "SequenceClassification", "token": "TokenClassification", "question": "QuestionAnswering"}[kind]
    if kind == "question":
        config.num_labels = 2
    theirs = randomize(getattr(transformers, f"RobertaFor{name}")(config))
    theirs.save_pretrained(tmp_path)
    ours, head = load_encoder(tmp_path)
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[1, 7:], ids[2, 4:] = 0, 1, 1
    is_token = ids != 1
    with torch.no_grad():
        expected = theirs(ids, attention_mask=is_token.long(), output_hidden_states=True)
        for state, hidden in zip(ours(ids), expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(state[is_token], hidden[is_token], rtol=1e-4, atol=1e-4)
        states = ours.encode(ids)
        if kind == "sequence":
            torch.testing.assert_close(head(states[:, 0]), expected.logits, rtol=1e-4, atol=1e-4)
        elif kind == "token":
            torch.testing.assert_close(head(states)[is_token], expected.logits[is_token], rtol=1e-4, atol=1e-4)
        else:
            both = torch.stack([expected.start_logits, expected.end_logits], dim=-1)
            torch.testing.assert_close(head(states)[is_token], both[is_token], rtol=1e-4, atol=1e-4)


def test_real_mnist_vit_has_its_known_accuracy(data):
    """The accuracy on the MNIST test set is 97.94%, as with the code that trained the model."""
    import gzip

    model, head = load_encoder(data / "vision" / "vit_mnist_ckpt" / "vit_mnist.pth")
    raw = gzip.decompress((data / "vision" / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).copy()).view(-1, 1, 28, 28).float() / 255
    labels = gzip.decompress((data / "vision" / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).copy())
    images = (images - model.config.mean[0]) / model.config.std[0]
    with torch.no_grad():
        predictions = [head(model.encode(part)[:, 0]).argmax(1) for part in images.split(1000)]
    assert (torch.cat(predictions) == labels).float().mean().item() == pytest.approx(0.9794, abs=1e-6)
    parameters = [*model.named_parameters(), *head.named_parameters()]
    # The file has no biases of queries, keys and values; the loaded model has zeros.
    biases = sum(p.numel() for name, p in parameters if name.endswith(("wq.bias", "wk.bias", "wv.bias")))
    assert sum(p.numel() for _, p in parameters) - biases == 213_642


def test_real_cifar10_vit_has_its_known_accuracy(tmp_path, data):
    """17 of 25 images are classified correctly, as many as with the model's own code."""
    folder = data / "models" / "vit_cifar10"
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    values = {"architecture": "vit", "model_args": {"num_heads": 4, "norm_eps": 1e-5}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model, head = load_encoder(tmp_path)
    examples = read_labeled("image-classification", model, tmp_path, folder / "cifar10_test_25.npz", 512).examples
    most_likely = head(model.encode(torch.stack([example.inputs for example in examples]))[:, 0]).argmax(1)
    labels = [int(name) for name in np.load(folder / "cifar10_test_25.npz")["labels"]]
    assert sum(map(int.__eq__, most_likely.tolist(), labels)) == 17
