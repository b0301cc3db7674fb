"""Losses restated as slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ftdpp import losses
from ftdpp.data import IGNORE


def probs(row: Tensor) -> list[float]:
    e = [math.exp(v) for v in row.tolist()]
    return [v / sum(e) for v in e]


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(13, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy(logits: Tensor, weighted: bool) -> None:
    label = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, IGNORE, IGNORE, 2, 2, 5])
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64) if weighted else None
    total = norm = 0.0
    for row, y in zip(logits, label.tolist(), strict=True):
        if y != IGNORE:
            w = float(weight[y]) if weight is not None else 1.0
            total -= w * math.log(probs(row)[y])
            norm += w
    assert losses.cross_entropy(logits, label, weight).item() == pytest.approx(
        total / norm, rel=1e-12
    )


def test_cross_entropy_without_labels(logits: Tensor) -> None:
    out = losses.cross_entropy(logits, torch.full((13,), IGNORE))
    assert out.item() == 0
    (grad,) = torch.autograd.grad(out, logits)
    assert not grad.any()


def test_log_smoothed_weights() -> None:
    counts = [10, 1000, 0]
    w = losses.log_smoothed_weights(counts)
    raw = [math.log(5 * 1010 / n) for n in (10, 1000, 1)]
    assert w == pytest.approx([r / raw[1] for r in raw])


def test_kl_divergence(logits: Tensor) -> None:
    target = torch.randn(13, 6, dtype=torch.float64).softmax(1).requires_grad_()
    found = losses.kl_divergence(target, logits)
    total = 0.0
    for t, row in zip(target.tolist(), logits, strict=True):
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(t, probs(row), strict=True))
    assert found.item() == pytest.approx(total / 13, rel=1e-12)
    ours, theirs = torch.autograd.grad(found, (logits, target), allow_unused=True)
    assert torch.allclose(ours, (logits.softmax(1) - target) / 13)
    assert theirs is None, "the target takes no gradient"
    assert losses.kl_divergence(target[:0], logits[:0]).item() == 0


LABEL = torch.tensor([0, 1, 2, 3, 3, 0, 0, 1, IGNORE, IGNORE, 2, 2, 3])  # of six classes, four


def test_lovasz_softmax(logits: Tensor) -> None:
    """Class by class, the points by their errors, with the IoU of sets."""
    known = [n for n, y in enumerate(LABEL.tolist()) if y != IGNORE]
    total = 0.0
    for c in range(4):
        own = {n for n in known if LABEL[n] == c}
        errors = {n: abs((n in own) - probs(logits[n])[c]) for n in known}
        wrong: set[int] = set()
        last = 0.0
        for n in sorted(known, key=lambda n: -errors[n]):
            wrong.add(n)
            jaccard = 1 - len(own - wrong) / len(own | wrong)
            total += errors[n] * (jaccard - last)
            last = jaccard
    found = losses.lovasz_softmax(logits, LABEL)
    assert found.item() == pytest.approx(total / 4, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: losses.lovasz_softmax(x, LABEL), logits)


def test_lovasz_softmax_of_certain_points_is_the_jaccard_loss() -> None:
    said = torch.tensor([0, 0, 2, 3, 3, 0, 1, 1, 4, 5, 2, 3, 0])
    known, total = LABEL != IGNORE, 0.0
    for c in range(4):
        a, b = (said == c) & known, c == LABEL
        total += 1 - ((a & b).sum() / (a | b).sum()).item()
    sure = 1e3 * torch.nn.functional.one_hot(said, 6).double()
    assert losses.lovasz_softmax(sure, LABEL).item() == pytest.approx(total / 4)


def test_lovasz_softmax_without_labels(logits: Tensor) -> None:
    out = losses.lovasz_softmax(logits, torch.full((13,), IGNORE))
    assert out.item() == 0
    (grad,) = torch.autograd.grad(out, logits)
    assert not grad.any()
