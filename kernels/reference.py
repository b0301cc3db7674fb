"""Every sparse operation in plain PyTorch: what a CPU runs, and where Triton is missing a GPU too.

A convolution is `gather -> one matrix product per offset -> sum of runs`. The rows of the input are
gathered in the order of the pairs; the pairs of an offset share one weight matrix; each output sums
its run of products. The centre, where every row meets itself, needs the product alone. Gradients
are the same steps on the transposed map. Every sum has a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp.kernels.maps import KernelMap, Pyramid, group_starts

try:  # optional: a compiled extension
    from torch_scatter import segment_csr
except (ImportError, OSError):  # OSError: built for another torch
    segment_csr = None


# ---- convolution ---------------------------------------------------------------------------------


def segment_sum(x: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """`y[i] = sum of x[rows[j]] for j in start[i]:start[i + 1]`.

    x (P, C), rows (R,), start (N + 1,), y (N, C).
    """
    if x.shape[0] == 0 or len(start) == 1:
        return x.new_zeros(len(start) - 1, x.shape[1])
    return F.embedding_bag(rows, x, start, mode="sum", include_last_offset=True)


def _products(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Rows (P, Cin), ordered by offset, times their offset's weight (K, Cin, Cout) -> (P, Cout)."""
    out = rows.new_empty(len(rows), weight.shape[2])
    for group, w, y in zip(rows.split(sizes), weight.unbind(0), out.split(sizes), strict=True):
        torch.mm(group, w, out=y)
    return out


def _convolve(rows: Tensor, x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
    """Output of a convolution; rows (P, Cin) are the rows of x that the pairs name."""
    y = segment_sum(_products(rows, weight, kmap.sizes), kmap.by_out, kmap.start_out)
    return y if kmap.centre is None else y.addmm_(x, weight[kmap.centre])


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
        rows = x.index_select(0, kmap.pair_in)
        ctx.kmap = kmap
        ctx.save_for_backward(rows, x, weight)
        return _convolve(rows, x, weight, kmap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, x, weight = ctx.saved_tensors
        kmap: KernelMap = ctx.kmap
        grad_rows = grad.index_select(0, kmap.pair_out)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad_rows, grad, weight.transpose(1, 2), kmap.transposed)
        if ctx.needs_input_grad[1]:
            grad_w = torch.empty_like(weight)
            groups = rows.split(kmap.sizes), grad_rows.split(kmap.sizes), grad_w.unbind(0)
            for group, g, w in zip(*groups, strict=True):
                torch.mm(group.t(), g, out=w)
            if kmap.centre is not None:
                torch.mm(x.t(), grad, out=grad_w[kmap.centre])
        return grad_x, grad_w, None


def sparse_conv(x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
    """`kernels.sparse_conv` in plain PyTorch."""
    return _SparseConv.apply(x, weight, kmap)


# ---- points, voxels, pixels ----------------------------------------------------------------------


def _sum_points(x: Tensor, pyramid: Pyramid) -> Tensor:
    """Sum over the points in each voxel: (N, C) -> (V, C)."""
    if segment_csr is not None and not x.is_cuda:
        return segment_csr(x.index_select(0, pyramid.order), pyramid.start, reduce="sum")
    return segment_sum(x, pyramid.order, pyramid.start)


class _VoxelMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pyramid: Pyramid) -> Tensor:
        ctx.pyramid = pyramid
        ctx.count = pyramid.start.diff().clamp_(min=1).unsqueeze(1).to(x.dtype)
        return _sum_points(x, pyramid) / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / ctx.count).index_select(0, ctx.pyramid.voxel), None


class _VoxelToPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pyramid: Pyramid) -> Tensor:
        ctx.pyramid = pyramid
        return x.index_select(0, pyramid.voxel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_points(grad, ctx.pyramid), None


def voxel_mean(x: Tensor, pyramid: Pyramid) -> Tensor:
    """Mean of the features of the points in each voxel: (N, C) -> (V, C)."""
    return _VoxelMean.apply(x, pyramid)


def voxel_to_point(x: Tensor, pyramid: Pyramid) -> Tensor:
    """Every point receives the features of its voxel: (V, C) -> (N, C)."""
    return _VoxelToPoint.apply(x, pyramid)


class _SelectRows(torch.autograd.Function):
    """`x[index]`, with a gradient that adds up in a fixed order on a GPU too.

    PyTorch's own gradient adds with atomics there, in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        if not grad.is_cuda:
            return grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, index, grad), None
        by_index = torch.argsort(index, stable=True)
        return segment_sum(grad, by_index, group_starts(index, ctx.rows)), None


def pixel_to_point(x: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """Features of the pixel that each point projects to (nearest pixel, no interpolation).

    Args:
        x: (B, C, H, W). image: (N,) int64, which of the B images a point belongs to.
        pixel: (N, 2) int64 row, col.
    Returns:
        (N, C).
    """
    b, c, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(b * h * w, c)  # free when x is channels-last
    return _SelectRows.apply(flat, (image * h + pixel[:, 0]) * w + pixel[:, 1])
