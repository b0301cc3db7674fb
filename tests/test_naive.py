"""kernels/naive.py, the truth for the fast paths, against definitions of another kind."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from ftdpp.kernels import check, naive


def test_the_example_of_four_voxels() -> None:
    result = doctest.testmod(naive)
    assert result.attempted >= 6
    assert not result.failed


def voxels_in_a_box(n: int, size: int, batch: int) -> list[naive.Voxel]:
    """Up to n distinct voxels in an order of their own."""
    g = torch.Generator().manual_seed(n)
    position = torch.randint(0, size, (n, 3), generator=g)
    index = torch.randint(0, batch, (n, 1), generator=g)
    rows = torch.cat([index, position], 1).tolist()
    return list(dict.fromkeys((b, x, y, z) for b, x, y, z in rows))


@pytest.mark.parametrize("n", [1, 2, 63, 97])
@pytest.mark.parametrize("kind", ["submanifold", "strided", "inverse"])
def test_convolution_is_the_dense_one(kind: str, n: int) -> None:
    """Output and gradients equal conv3d's, or conv_transpose3d's, at the output's voxels."""
    torch.manual_seed(n)
    fine = voxels_in_a_box(n, size=6, batch=2)
    coarse = naive.coarser(fine)
    kernel_map, inputs, outputs = {
        "submanifold": (naive.submanifold_map(fine), fine, fine),
        "strided": (naive.strided_map(fine, coarse), fine, coarse),
        "inverse": (naive.inverse_map(fine, coarse), coarse, fine),
    }[kind]
    x = torch.randn(len(inputs), 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(kernel_map), 3, 5, dtype=torch.float64, requires_grad=True)
    found = naive.convolution(x, w, kernel_map, len(outputs))
    wanted = check.dense_convolution(kind, x, w, torch.tensor(fine), torch.tensor(coarse), 6)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, (x, w), upstream) for y in (found, wanted))
    for a, b in ((found, wanted), *zip(*gradients, strict=True)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_negative_positions_have_parents_below_them() -> None:
    """-1 lies in the parent -1, not 0, and is its second half."""
    fine = [(0, -1, -2, 0)]
    coarse = naive.coarser(fine)
    assert coarse == [(0, -1, -1, 0)]
    pairs = naive.strided_map(fine, coarse)
    assert [(naive.CUBE_2[k], p) for k, p in enumerate(pairs) if p] == [((1, 0, 0), [(0, 0)])]


def test_elements_of_a_batch_do_not_meet() -> None:
    """Voxels that touch, but belong to two elements of the batch, are no neighbours."""
    pairs = naive.submanifold_map([(0, 0, 0, 0), (1, 0, 0, 1)])
    assert [(k, p) for k, p in enumerate(pairs) if p] == [(13, [(0, 0), (1, 1)])]


def test_voxel_mean() -> None:
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 0.0]])
    mean = naive.voxel_mean(x, [1, 0, 1], 2)
    assert mean.tolist() == [[2.0, 20.0], [3.5, 5.0]]


def attention_weights(channels: int, heads: int, slots: int) -> list[Tensor]:
    """Random weights and biases in the order of `naive.external_attention`."""
    d = 4 * channels // heads
    shapes = [(4 * channels, channels), (slots, d), (d, slots), (channels, 4 * channels)]
    made = []
    for out, into in shapes:
        made += [torch.randn(out, into), torch.randn(out)]
    return [t.double() for t in made]


def attention(
    x: Tensor, weights: list[Tensor], heads: int, masks: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    expand_w, expand_b, key_w, key_b, value_w, value_b, project_w, project_b = weights
    return naive.external_attention(
        x, expand_w, expand_b, key_w, key_b, value_w, value_b, project_w, project_b, heads, masks
    )


def test_external_attention_is_two_normalisations() -> None:
    """Against numbers computed entry by entry, for a head and a slot at a time."""
    torch.manual_seed(0)
    n, channels, heads, slots = 5, 4, 2, 3
    d = 4 * channels // heads
    x = torch.randn(n, channels).double()
    weights = attention_weights(channels, heads, slots)
    expand_w, expand_b, key_w, key_b, value_w, value_b, project_w, project_b = weights
    mask, output_mask = torch.rand(heads, n, slots).double(), torch.rand(n, channels).double()
    wide = torch.zeros(n, 4 * channels).double()
    for head in range(heads):
        share = torch.zeros(n, slots).double()
        for slot in range(slots):
            logit = []
            for point in range(n):
                query = (expand_w @ x[point] + expand_b)[head * d : (head + 1) * d]
                logit.append(torch.dot(query, key_w[slot]) + key_b[slot])
            largest = max(logit)
            weight = [torch.exp(v - largest) for v in logit]
            for point in range(n):
                share[point, slot] = weight[point] / sum(weight)
        for point in range(n):
            slots_of = share[point] / (1e-9 + sum(share[point])) * mask[head, point]
            wide[point, head * d : (head + 1) * d] = value_w @ slots_of + value_b
    wanted = (wide @ project_w.T + project_b) * output_mask
    found = attention(x, weights, heads, (mask, output_mask))
    assert torch.allclose(found, wanted, atol=1e-12)
    ones = torch.ones(heads, n, slots).double(), torch.ones(n, channels).double()
    plain = attention(x, weights, heads)
    assert torch.equal(plain, attention(x, weights, heads, ones))


def test_external_attention_depends_on_the_batch() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(20, 8).double(), attention_weights(8, 4, 6)
    together = attention(x, weights, 4)
    alone = attention(x[:10], weights, 4)
    assert not torch.allclose(together[:10], alone, atol=1e-4)
