"""Dropout by fewer random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dropout import FastDropout, quicken_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = FastDropout(p)(x)
    y.sum().backward()
    assert y.dtype == dtype and y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=0.005)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16)
    assert torch.equal(x.grad, y.detach())


def test_dropout_of_elements_is_independent() -> None:
    torch.manual_seed(0)
    dropped = (FastDropout(0.5)(torch.ones(1 << 20)) == 0).float() - 0.5
    for distance in (*range(1, 9), 1024):
        assert abs((dropped[distance:] * dropped[:-distance]).mean().item()) < 4 * 0.25 / (1 << 10)


def test_dropout_follows_the_seed() -> None:
    drop, x = FastDropout(0.3), torch.ones(1000)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(drop(x))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p: float) -> None:
    x = torch.randn(7, 3)
    assert torch.equal(FastDropout(p)(x), x * (1 - p))
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert FastDropout(0.5)(x[:0]).shape == (0, 3)


def test_only_plain_dropout_is_replaced() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.3)), nn.Dropout1d(0.4))
    quicken_dropout(model)
    assert [type(m) for m in model.modules()][1:] == [FastDropout, nn.Sequential, FastDropout, nn.Dropout1d]
    assert model[0].p == 0.2
