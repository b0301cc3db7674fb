"""Sparse convolution and external attention, written as simply as possible. Read this file first.

A LiDAR sweep touches few of the cells of a 3D grid. A *voxel* is a cell with at least one point in
it, written `(b, x, y, z)`: its index in the batch, then its position. A voxel's features are one
row of a matrix `x` (V, C). An empty cell has no row and counts as zero.

A 3D convolution has K offsets `d_k`, each with a weight matrix `W[k]` (Cin, Cout). Where the input
voxel of row i lies at offset `d_k` from the output voxel of row o, (i, o) is a *pair* of k, and

    y[o] += x[i] @ W[k]

Only pairs contribute. The list of pairs of each offset is the *kernel map*; it is all that a
convolution needs to know about where voxels are. Three kinds make a sparse U-Net:

- *Submanifold*, 3x3x3: outputs only where inputs are, so that the set of voxels does not grow. An
  ordinary convolution also writes into the empty cells around a voxel: one voxel becomes 27, then
  125, and after a few layers the grid is full. Here all layers of a level share one map.
- *Strided*, 2x2x2 with stride 2: a voxel of twice the side sums over its up to eight children.
- *Inverse*: the strided map backwards, from the coarse voxels to the fine ones they came from.

Four voxels, three of which touch:

    >>> voxels = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 5, 5, 5)]
    >>> for k, pairs in enumerate(submanifold_map(voxels)):
    ...     if pairs:
    ...         print(k, CUBE_3[k], pairs)
    9 (0, -1, -1) [(0, 2)]
    10 (0, -1, 0) [(1, 2)]
    12 (0, 0, -1) [(0, 1)]
    13 (0, 0, 0) [(0, 0), (1, 1), (2, 2), (3, 3)]
    14 (0, 0, 1) [(1, 0)]
    16 (0, 1, 0) [(2, 1)]
    17 (0, 1, 1) [(2, 0)]

Offset 13, the centre, pairs every voxel with itself. Offset 26 - k is the mirror image of offset k.
Where all features and all weights are 1, each output counts the voxel and its neighbours:

    >>> x, weight = torch.ones(4, 1), torch.ones(27, 1, 1)
    >>> convolution(x, weight, submanifold_map(voxels), len(voxels)).flatten().tolist()
    [3.0, 3.0, 3.0, 1.0]

One level up, the first three voxels share a parent:

    >>> coarse = coarser(voxels)
    >>> coarse
    [(0, 0, 0, 0), (0, 2, 2, 2)]
    >>> for k, pairs in enumerate(strided_map(voxels, coarse)):
    ...     if pairs:
    ...         print(k, CUBE_2[k], pairs)
    0 (0, 0, 0) [(0, 0)]
    1 (0, 0, 1) [(1, 0)]
    3 (0, 1, 1) [(2, 0)]
    7 (1, 1, 1) [(3, 1)]

Nothing here is fast. `maps.py` and `reference.py` compute the same on a CPU, `hash.py`, `gemm.py`
and `attention.py` on a GPU; the tests compare both with this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Voxel = tuple[int, int, int, int]  # index in the batch, x, y, z
Pairs = list[tuple[int, int]]  # of one offset: (input row, output row)

CUBE_3 = list(itertools.product((-1, 0, 1), repeat=3))  # k = (dx + 1) * 9 + (dy + 1) * 3 + (dz + 1)
CUBE_2 = list(itertools.product((0, 1), repeat=3))  # k = 4 * dx + 2 * dy + dz


def submanifold_map(voxels: Sequence[Voxel]) -> list[Pairs]:
    """Map of a 3x3x3 convolution whose outputs are its inputs: input = output + d_k."""
    row = {voxel: i for i, voxel in enumerate(voxels)}
    kernel_map = []
    for dx, dy, dz in CUBE_3:
        pairs = []
        for o, (b, x, y, z) in enumerate(voxels):
            neighbour = (b, x + dx, y + dy, z + dz)
            if neighbour in row:
                pairs.append((row[neighbour], o))
        kernel_map.append(pairs)
    return kernel_map


def coarser(voxels: Sequence[Voxel]) -> list[Voxel]:
    """The voxels of twice the side that contain these."""
    return sorted({(b, x // 2, y // 2, z // 2) for b, x, y, z in voxels})


def strided_map(fine: Sequence[Voxel], coarse: Sequence[Voxel]) -> list[Pairs]:
    """Map of a 2x2x2 convolution with stride 2: input = 2 * output + d_k."""
    row = {voxel: i for i, voxel in enumerate(fine)}
    kernel_map = []
    for dx, dy, dz in CUBE_2:
        pairs = []
        for o, (b, x, y, z) in enumerate(coarse):
            child = (b, 2 * x + dx, 2 * y + dy, 2 * z + dz)
            if child in row:
                pairs.append((row[child], o))
        kernel_map.append(pairs)
    return kernel_map


def inverse_map(fine: Sequence[Voxel], coarse: Sequence[Voxel]) -> list[Pairs]:
    """Map of the convolution that leads back: strided pairs with input and output exchanged."""
    return [[(o, i) for i, o in pairs] for pairs in strided_map(fine, coarse)]


def convolution(x: Tensor, weight: Tensor, kernel_map: list[Pairs], outputs: int) -> Tensor:
    """The sum over all pairs: x (V_in, Cin), weight (K, Cin, Cout) -> (outputs, Cout)."""
    y = x.new_zeros(outputs, weight.shape[2])
    for k, pairs in enumerate(kernel_map):
        for i, o in pairs:
            y[o] += x[i] @ weight[k]
    return y


def voxel_mean(x: Tensor, voxel: Sequence[int], voxels: int) -> Tensor:
    """Features of the voxels, (voxels, C): the mean over the points in each.

    Args:
        x: (N, C), features of the points. voxel: for each point the row of its voxel.

    The way back is `mean[voxel]`: every point receives the features of its voxel.
    """
    mean = x.new_zeros(voxels, x.shape[1])
    for point, v in enumerate(voxel):
        mean[v] += x[point] / voxel.count(v)
    return mean


def external_attention(
    x: Tensor,
    expand_w: Tensor,
    expand_b: Tensor,
    key_w: Tensor,
    key_b: Tensor,
    value_w: Tensor,
    value_b: Tensor,
    project_w: Tensor,
    project_b: Tensor,
    heads: int,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of N points to S learned slots instead of to each other (Guo et al., 2022).

    The softmax runs over the points, so a point's output depends on what else is in the batch. A
    head has d = 4C / heads channels; keys and values serve all heads. Weights as in `nn.Linear`.

    Args:
        x: (N, C), the points of the whole batch.
        expand_w, expand_b: (4C, C), (4C,).
        key_w, key_b: (S, d), (S,); S is 64 in FtD++.
        value_w, value_b: (d, S), (d,).
        project_w, project_b: (C, 4C), (C,).
        masks: what dropout multiplies with, 0 or 1 / (1 - p): the attention, (heads, N, S), and the
            output, (N, C). None: no dropout, as in evaluation.
    Returns:
        (N, C).
    """
    wide = x @ expand_w.T + expand_b  # (N, 4C)
    results = []
    for head, query in enumerate(wide.chunk(heads, dim=1)):  # (N, d)
        attention = torch.softmax(query @ key_w.T + key_b, dim=0)  # (N, S), over the points
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))  # over the slots
        if masks is not None:
            attention = attention * masks[0][head]
        results.append(attention @ value_w.T + value_b)  # (N, d)
    y = torch.cat(results, dim=1) @ project_w.T + project_b
    return y if masks is None else y * masks[1]
