"""Memory that a process keeps, and dropout by fewer random numbers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn

from cpu import FastDropout, quicken_dropout

FAULTS = """
import resource, sys
import torch
from cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):  # small pieces come to lie between the large ones at first
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to keep memory")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("no") / 2


# ----------------------------------------------------------------------------------------------------------- dropout


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
