"""Solutions to the exercises of docs/lesson.md; tests/test_lesson.py checks them against the code.

Each is written with as little of the package as its exercise allows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftdpp.data import IGNORE, Batch
from ftdpp.kernels.naive import Voxel

# ---- 1: a submanifold convolution with a dictionary ----------------------------------------------


def submanifold_convolution(voxels: Sequence[Voxel], x: Tensor, weight: Tensor) -> Tensor:
    """voxels (V), x (V, Cin), weight (27, Cin, Cout) -> (V, Cout)."""
    row = {voxel: i for i, voxel in enumerate(voxels)}
    y = x.new_zeros(len(voxels), weight.shape[2])
    for o, (b, vx, vy, vz) in enumerate(voxels):
        for k, (dx, dy, dz) in enumerate(itertools.product((-1, 0, 1), repeat=3)):
            i = row.get((b, vx + dx, vy + dy, vz + dz))
            if i is not None:
                y[o] += x[i] @ weight[k]
    return y


# ---- 2: a kernel map by hand ---------------------------------------------------------------------

VOXELS: list[Voxel] = [(0, 2, 2, 2), (0, 2, 2, 4), (0, 3, 2, 3), (1, 2, 2, 3)]
# Row 2 is one step in x and one in z away from rows 0 and 1, which are two steps apart. Row 3 lies
# between them but in another element of the batch: it meets nobody but itself.
PAIRS: dict[int, list[tuple[int, int]]] = {
    3: [(0, 2)],  # (-1, 0, -1): row 0 seen from row 2
    5: [(1, 2)],  # (-1, 0, 1): row 1 seen from row 2
    13: [(0, 0), (1, 1), (2, 2), (3, 3)],
    21: [(2, 1)],  # (1, 0, -1): the mirror image of 5
    23: [(2, 0)],  # (1, 0, 1): the mirror image of 3
}


# ---- 3: a parent is a shift ----------------------------------------------------------------------


def morton(x: int, y: int, z: int, bits: int = 16) -> int:
    """The bits of three non-negative numbers interleaved: ... x1 y1 z1 x0 y0 z0.

    Halving x, y and z drops the lowest bit of each, which are the lowest three bits of the code:
    morton(x // 2, y // 2, z // 2) == morton(x, y, z) >> 3.
    """
    code = 0
    for bit in reversed(range(bits)):
        for v in (x, y, z):
            code = code << 1 | v >> bit & 1
    return code


# ---- 4: the debiased pseudo-label loss as a loop -------------------------------------------------


def debiased_loss(main: Tensor, label: Tensor, other: Tensor, mimic: Tensor) -> float:
    """exp(-KL(softmax other || softmax mimic)) * cross-entropy of main, over rows with a label.

    Args:
        main, mimic: (N, K) logits of both heads of a modality. label: (N,), -100 = none.
        other: (N, K) logits of the other modality's main head.
    """
    kl = ce = 0.0
    labelled = 0
    for n in range(len(label)):
        p, q = torch.softmax(other[n], 0).tolist(), torch.softmax(mimic[n], 0).tolist()
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(label)
        if label[n] != IGNORE:
            ce -= math.log(torch.softmax(main[n], 0)[label[n]].item())
            labelled += 1
    return math.exp(-kl) * ce / max(labelled, 1)


# ---- 5: the zero gate ----------------------------------------------------------------------------


@torch.no_grad()
def streams_differ(system: Any, batch: Batch) -> float:
    """Largest difference between the scores of CrossMatch's two streams, in eval mode.

    0 with closed gates: image + 0 * depth is the image, and the weights are copies.
    """
    main = system.main(batch.image)
    return float((system.auxiliary(batch.image, batch.depth) - main).abs().max())


# ---- 6: attention over the batch -----------------------------------------------------------------


@torch.no_grad()
def moved_by_neighbours(layer: Any, x: Tensor, others: Tensor) -> float:
    """How far the output of the points x (N, C) moves when others (M, C) join the batch.

    0 for a layer that works point by point. External attention divides by a sum over all points.
    """
    return float((layer(torch.cat([x, others]))[: len(x)] - layer(x)).abs().max())


# ---- 7: the flip ---------------------------------------------------------------------------------


def released_flip(matrix: Tensor, axis: int) -> Tensor:
    """One element negated. The noise beside it keeps its sign."""
    flipped = matrix.clone()
    flipped[axis, axis] *= -1
    return flipped


def reflection(matrix: Tensor, axis: int) -> Tensor:
    """The true mirror image: points (row vectors) are reflected, then go through the matrix.

    All of row `axis` changes its sign, with it the noise. Without noise the row has one element
    that is not zero, and both are equal.
    """
    mirror = torch.eye(3, dtype=matrix.dtype)
    mirror[axis, axis] = -1
    return mirror @ matrix


# ---- 8: the largest value of the fused target ----------------------------------------------------


def largest_target(classes: int) -> float:
    """Of softmax(p2 + p3): both are sure of one class, so the sum is 2 there and 0 elsewhere."""
    return math.e**2 / (math.e**2 + classes - 1)
