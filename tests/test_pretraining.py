"""The one loop that pretrains, beside the same steps written out."""

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


def test_each_loss_is_followed_by_an_adamw_step_of_the_rate_of_its_number():
    layer, again = make_layer(), make_layer()
    learning_rate = [0.0, 0.1, 0.05, 0.02, 0.01].__getitem__
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    loss_of = lambda step: 100 * layer(BATCHES[step]).square().mean()  # noqa: E731
    pretrain(layer.parameters(), loss_of, learning_rate, steps=5, clip=1.0, desc="a layer", **options)
    optimizer = torch.optim.AdamW(again.parameters(), **options)
    for step, batch in enumerate(BATCHES):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        (100 * again(batch).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(again.parameters(), 1.0)
        assert norm > 1  # or nothing would be clipped
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.weight, again.weight)
    assert not torch.equal(layer.weight, make_layer().weight)


def test_without_clip_gradients_stay_as_they_are():
    seen = []
    for clip in (None, 1e-3):
        layer = make_layer()
        layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
        options = {"steps": 1, "betas": (0.9, 0.99), "weight_decay": 0, "clip": clip, "desc": ""}
        pretrain(layer.parameters(), lambda step: layer(BATCHES[step]).square().mean(), lambda step: 0.1, **options)
    assert seen[0].norm() > 0.1 and seen[1].norm() <= 1e-3


def test_the_toys_models_are_the_same_on_any_number_of_threads(tiny_base):
    """To the last bit; and the number of threads stays what it was."""
    tokenizer, models = load_tokenizer(tiny_base), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models.append(language_model.pretrain_base(tokenizer, stop_after=10)[0].state_dict())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_warmup_and_cosine():
    rates = [warmup_cosine(step, peak=2.0, warmup=4, total=100, floor=0.1) for step in range(101)]
    assert rates[:4] == [0, 0.5, 1.0, 1.5]
    assert rates[50] == pytest.approx(2 * 0.55) and rates[100] == pytest.approx(0.2)
    assert rates[25] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert warmup_cosine(100, peak=2.0, warmup=4, total=100) == 0
