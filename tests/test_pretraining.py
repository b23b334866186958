"""The pretraining loop of the toy."""

import math

import pytest
import torch

from formats.tokenizers import load_tokenizer
from toy import language_model
from toy.pretraining import pretrain, warmup_cosine


def make_layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]


def test_pretraining_equals_adamw_steps_written_out():
    layer, expected = make_layer(), make_layer()
    learning_rate = [0.0, 0.1, 0.05, 0.02, 0.01].__getitem__
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    loss_of = lambda step: 100 * layer(BATCHES[step]).square().mean()  # noqa: E731
    pretrain(layer.parameters(), loss_of, learning_rate, steps=5, clip=1.0, desc="a layer", **options)
    optimizer = torch.optim.AdamW(expected.parameters(), **options)
    for step, batch in enumerate(BATCHES):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        (100 * expected(batch).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        assert norm > 1  # so that clipping has an effect
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.weight, expected.weight)
    assert not torch.equal(layer.weight, make_layer().weight)


def test_gradients_are_clipped_only_if_clip_is_given():
    seen = []
    for clip in (None, 1e-3):
        layer = make_layer()
        layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
        options = {"steps": 1, "betas": (0.9, 0.99), "weight_decay": 0, "clip": clip, "desc": ""}
        pretrain(layer.parameters(), lambda step: layer(BATCHES[step]).square().mean(), lambda step: 0.1, **options)
    assert seen[0].norm() > 0.1 and seen[1].norm() <= 1e-3


def test_pretrained_base_is_the_same_on_any_number_of_threads(tiny_base):
    """The weights are equal bit for bit, and the number of threads is left unchanged."""
    tokenizer, models = load_tokenizer(tiny_base), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models.append(language_model.pretrain_base(tokenizer, stop_after=10)[0].state_dict())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_learning_rate_has_warmup_and_cosine_decay():
    rates = [warmup_cosine(step, peak=2.0, warmup=4, total=100, floor=0.1) for step in range(101)]
    assert rates[:4] == [0, 0.5, 1.0, 1.5]
    assert rates[50] == pytest.approx(2 * 0.55) and rates[100] == pytest.approx(0.2)
    assert rates[25] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert warmup_cosine(100, peak=2.0, warmup=4, total=100) == 0
