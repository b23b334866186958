"""The vision tower against transformers, with prompts, and how it is read."""

import pytest
import torch
from conftest import make_adapter

from adapter import gated_attention, gated_attention_paper
from encoders import TOWERS, ViT, ViTConfig, load_vit

SMALL = ViTConfig(image_size=24, patch_size=8, dim=128, n_layers=3, n_heads=2, hidden_dim=96)


def make_vit(config=SMALL, seed=0, **options):
    """Frozen, random, with norms and biases that matter."""
    torch.manual_seed(seed)
    model = ViT(config, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def make_images(number=2, size=24):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(7))


def hugging_face(vision_only):
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
def test_every_layer_is_that_of_transformers(tmp_path, vision_only):
    theirs = hugging_face(vision_only)
    theirs.save_pretrained(tmp_path)
    ours, images = load_vit(tmp_path), make_images()
    vision = theirs if vision_only else theirs.vision_model
    with torch.no_grad():
        output = vision(images, output_hidden_states=True)
    for state, expected in zip(ours(images), output.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.norm(ours(images)[-1][:, 0]), output.pooler_output, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def openai_names(model):
    """OpenAI's state dict of a tower of ours, and a tensor of the text tower."""
    weights = dict(model.named_parameters())
    named = {
        "class_embedding": weights["class_embedding"],
        "positional_embedding": weights["positions"],
        "conv1.weight": weights["patch_embedding.weight"],
        "proj": torch.zeros(model.config.dim, 5),
    }
    for kind in ("weight", "bias"):
        named |= {f"ln_pre.{kind}": weights[f"embedding_norm.{kind}"], f"ln_post.{kind}": weights[f"norm.{kind}"]}
        for i in range(model.config.n_layers):
            ours, theirs = f"layers.{i}", f"transformer.resblocks.{i}"
            three = [weights[f"{ours}.attention.{name}.{kind}"] for name in ("wq", "wk", "wv")]
            named[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(three)
            for a, b in (
                ("attention.wo", "attn.out_proj"), ("attention_norm", "ln_1"), ("ffn_norm", "ln_2"),
                ("w1", "mlp.c_fc"), ("w2", "mlp.c_proj"),
            ):  # fmt: skip
                named[f"{theirs}.{b}.{kind}"] = weights[f"{ours}.{a}.{kind}"]
    return {f"visual.{name}": tensor for name, tensor in named.items()} | {"ln_final.weight": torch.ones(4)}


@pytest.mark.parametrize("whole", [True, False])
def test_openais_files(tmp_path, whole):
    model = make_vit()
    state = openai_names(model)
    if not whole:
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items() if "visual" in name}
    torch.save(state, tmp_path / "ViT.pt")
    loaded = load_vit(tmp_path / "ViT.pt")
    assert loaded.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model(make_images()), loaded(make_images()), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_told_how_to_become_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(ValueError, match=r"ViT.pt: is a program.*torch.jit.load\('ViT.pt', 'cpu'\).state_dict"):
        load_vit(tmp_path / "ViT.pt")


def test_prompts_are_seen_by_every_token_in_both_forms():
    images, outputs = make_images(), []
    for form in (gated_attention, gated_attention_paper):
        model = make_vit(attention=form)
        with torch.no_grad():
            outputs.append(model(images, make_adapter(model)()))
    plain = make_vit()(images)
    for fused, paper in zip(*outputs):
        torch.testing.assert_close(fused, paper, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs[0][0], plain[0])  # below the adapted layers
    assert (outputs[0][1] - plain[1]).abs().amin(dim=(0, 2)).min() > 0  # every token
    closed = make_vit()(images, make_adapter(make_vit(), gates=False)())
    assert all(torch.equal(a, b) for a, b in zip(closed, plain))


def test_the_towers_have_their_published_sizes():
    millions = {}
    for name, config in TOWERS.items():
        with torch.device("meta"):
            millions[name] = sum(p.numel() for p in ViT(config).parameters()) / 1e6
    # Without the projection to the space shared with text: 768 x 512, 1024 x 768.
    assert {name: round(number, 1) for name, number in millions.items()} == {
        "ViT-B/32": 87.5,
        "ViT-B/16": 85.8,
        "ViT-L/14": 303.2,
        "ViT-L/14@336": 303.5,
    }


def broken(tmp_path, change):
    state = openai_names(make_vit())
    change(state)
    torch.save(state, tmp_path / "ViT.pt")
    return tmp_path / "ViT.pt"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("visual.ln_pre.bias"), "ViT.pt: has no weight 'ln_pre.bias'"),
        (lambda s: s.pop("visual.positional_embedding"), "ViT.pt: has no field 'positional_embedding'"),
        (
            lambda s: s.update({"visual.ln_1": torch.ones(1), "visual.ln_post.bias": torch.ones(7)}),
            r"norm.bias is \(7,\)",
        ),
        (lambda s: s.update({"visual.conv1.weight": torch.ones(100, 3, 8, 8)}), "do not share|is "),
    ],
)
def test_broken_towers_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_vit(broken(tmp_path, change))


def test_what_is_no_tower(tmp_path, tiny_base):
    with pytest.raises(FileNotFoundError, match="nowhere: no such vision tower"):
        load_vit("nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json: model_type is 'llama'; only CLIP's vision towers"):
        load_vit(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="x.pt: not a file of tensors"):
        load_vit(tmp_path / "x.pt")
