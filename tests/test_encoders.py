"""ViT and RoBERTa with adaption prompts, compared with the reference."""

import pytest
import reference
import torch
from helpers import make_adapter, make_images, make_roberta, make_vit

from adapter import gated_attention, gated_attention_paper
from encoders.models import ViT, ViTConfig


def test_every_token_attends_to_the_prompts_in_both_forms():
    images, outputs = make_images(), []
    for form in (gated_attention, gated_attention_paper):
        model = make_vit(attention=form)
        with torch.no_grad():
            outputs.append(model(images, make_adapter(model)()))
    plain = make_vit()(images)
    for fused, paper in zip(*outputs):
        torch.testing.assert_close(fused, paper, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs[0][0], plain[0])  # the lowest layer is not adapted
    assert (outputs[0][1] - plain[1]).abs().amin(dim=(0, 2)).min() > 0  # every token is affected
    zero_gates = make_vit()(images, make_adapter(make_vit(), gates=False)())
    assert all(torch.equal(a, b) for a, b in zip(zero_gates, plain))


def test_vision_encoders_have_their_published_sizes():
    """Parameters are counted without CLIP's projection to the space shared with text, 768 x 512 or 1024 x 768."""
    vision_encoders = {
        87.5: ViTConfig(),  # ViT-B/32
        85.8: ViTConfig(patch_size=16),  # ViT-B/16
        303.2: ViTConfig(224, 14, 1024, 24, 16, 4096),  # ViT-L/14
        303.5: ViTConfig(336, 14, 1024, 24, 16, 4096),  # ViT-L/14@336
    }
    for millions, config in vision_encoders.items():
        with torch.device("meta"):
            assert round(sum(p.numel() for p in ViT(config).parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("attention", [gated_attention, gated_attention_paper])
def test_roberta_attends_to_prompts_and_ignores_padding(attention):
    """A gate scale of zero gives the plain encoder, bit for bit in the fused form. Padding has no effect."""
    model = make_roberta(attention=attention)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = 1
    scaled_adapter, adapter = make_adapter(model), make_adapter(model, gates=True)
    is_token = ids != 1
    with torch.no_grad():
        base, scaled_to_zero = model.encode(ids), model.encode(ids, scaled_adapter(gate_scale=0.0))
        assert (
            torch.equal(base, scaled_to_zero)
            if attention is gated_attention
            else torch.allclose(base, scaled_to_zero, atol=1e-5)
        )
        adapted = model.encode(ids, adapter())
        assert ((adapted - base).abs().amax(dim=2) > 0.01)[is_token].all()  # all tokens attend to the prompts
        alone = model.encode(ids[1:, :6], adapter())
        torch.testing.assert_close(adapted[1:, :6], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [gated_attention, gated_attention_paper])
def test_encoders_with_nonzero_gates_equal_the_reference(attention):
    """Compare the last layer's output for one sample. RoBERTa's sample is padded, in a batch with a longer one."""
    vit = make_vit(ViTConfig(16, 8, 32, 3, 4, 40), attention=attention)
    adapter, image = make_adapter(vit), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    patches = vit.patch_embedding(image).flatten(2).transpose(1, 2)[0]
    embedded = vit.embedding_norm(torch.cat([vit.class_embedding[None], patches]) + vit.positions)
    expected = reference.encoder(vit.state_dict(), vit.config, embedded, True, adapter.prompts, adapter.gates)
    with torch.no_grad():
        torch.testing.assert_close(vit(image, adapter())[-1][0].double(), expected.detach(), rtol=1e-4, atol=1e-4)

    model = make_roberta(attention=attention)
    adapter = make_adapter(model)
    ids = torch.tensor([[0, 7, 8, 9, 10, 2], [0, 5, 6, 2, 1, 1]])
    embedded = model.tok_embeddings.weight[ids[1, :4]] + model.positions.weight[2:6] + model.types.weight[0]
    embedded = model.embedding_norm(embedded)
    expected = reference.encoder(model.state_dict(), model.config, embedded, False, adapter.prompts, adapter.gates)
    with torch.no_grad():
        ours = model.encode(ids, adapter())[1, :4].double()
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-4)
