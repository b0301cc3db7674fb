"""Every sparse operation in plain PyTorch: the CPU path, and what the GPU kernels are tested against.

A convolution is `gather -> one matrix product per offset -> sum of runs`: rows of the input are gathered in pair order, the
pairs of an offset share one weight matrix, and each output sums its run of products. The gradients are the same three
moves on the transposed map. Sums go through `segment_sum`, in a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp.kernels.maps import KernelMap, Pyramid

try:  # optional: a compiled extension
    from torch_scatter import segment_csr
except (ImportError, OSError):  # OSError: built for another torch
    segment_csr = None


def segment_sum(x: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """`y[i] = sum of x[rows[j]] for j in start[i]:start[i+1]`; x (P, C), rows (R,), start (N+1,), y (N, C)."""
    if x.shape[0] == 0 or len(start) == 1:
        return x.new_zeros(len(start) - 1, x.shape[1])
    return F.embedding_bag(rows, x, start, mode="sum", include_last_offset=True)


def _products(x: Tensor, rows: Tensor, weight: Tensor, seg: list[int]) -> tuple[Tensor, Tensor]:
    """Gathered rows (P, Cin) and their products (P, Cout) with the weight of their offset, (K, Cin, Cout)."""
    gathered = x.index_select(0, rows)
    out = x.new_empty(len(rows), weight.shape[2])
    for k in range(len(seg) - 1):
        if seg[k] < seg[k + 1]:
            torch.mm(gathered[seg[k] : seg[k + 1]], weight[k], out=out[seg[k] : seg[k + 1]])
    return gathered, out


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
        gathered, products = _products(x, kmap.pair_in, weight, kmap.seg)
        ctx.kmap = kmap
        ctx.save_for_backward(gathered, weight)
        return segment_sum(products, kmap.by_out, kmap.start_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gathered, weight = ctx.saved_tensors
        kmap: KernelMap = ctx.kmap
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_pairs, products = _products(grad, kmap.pair_out, weight.transpose(1, 2), kmap.seg)
            grad_x = segment_sum(products, kmap.by_in, kmap.start_in)
        else:
            grad_pairs = grad.index_select(0, kmap.pair_out)
        if ctx.needs_input_grad[1]:
            grad_w = torch.zeros_like(weight)
            for k in range(weight.shape[0]):
                pairs = slice(kmap.seg[k], kmap.seg[k + 1])
                torch.mm(gathered[pairs].t(), grad_pairs[pairs], out=grad_w[k])
        return grad_x, grad_w, None


def sparse_conv(x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
    """Sparse convolution `y[o] = sum over pairs (i, o) of offset k: x[i] @ weight[k]`.

    Args:
        x: (N_in, Cin). weight: (K, Cin, Cout). kmap: the pairs, see `kernels.maps`.
    Returns:
        (N_out, Cout).
    Raises:
        ValueError: when the shapes do not fit the map.
    """
    n_in, offsets = len(kmap.start_in) - 1, len(kmap.seg) - 1
    if x.shape != (n_in, weight.shape[1]) or weight.shape[0] != offsets:
        raise ValueError(
            f"sparse_conv: input {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit a map of "
            f"{n_in} input voxels and {offsets} offsets"
        )
    return _SparseConv.apply(x, weight, kmap)


def _sum_points(x: Tensor, pyramid: Pyramid) -> Tensor:
    """Sum of the rows of the points in each voxel: (N, C) -> (V, C)."""
    if segment_csr is not None and not x.is_cuda:
        return segment_csr(x.index_select(0, pyramid.order), pyramid.start, reduce="sum")
    return segment_sum(x, pyramid.order, pyramid.start)


class _VoxelMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pyramid: Pyramid) -> Tensor:
        ctx.pyramid, ctx.count = pyramid, pyramid.start.diff().unsqueeze(1).to(x.dtype)
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
    """`x[index]`, with a gradient that adds up in a fixed order on a GPU too, where PyTorch's own would use atomics."""

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
        count = index.new_zeros(ctx.rows).scatter_add_(0, index, torch.ones_like(index))
        start = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return segment_sum(grad, torch.argsort(index, stable=True), start), None


def pixel_to_point(x: Tensor, frame: Tensor, pixel: Tensor) -> Tensor:
    """Features of the pixel that each point projects to (nearest pixel, no interpolation).

    Args:
        x: (B, C, H, W). frame: (N,) int64 image of each point. pixel: (N, 2) int64 row, col.
    Returns:
        (N, C).
    """
    b, c, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(b * h * w, c)  # free when x is channels-last
    return _SelectRows.apply(flat, (frame * h + pixel[:, 0]) * w + pixel[:, 1])
