"""Sparse convolution in two Triton kernels: a gather-GEMM and the weight gradient.

    y[o]  = sum over offsets k of x[idx[k, o]] @ w[k]            gather_gemm
    dx[i] = the same with w[k] transposed on the map backwards   gather_gemm
    dw[k] = sum over the pairs (i, o) of k of x[i]^T dy[o]       weight_gradient

Storage is fp32, fp16 or bf16; sums are fp32. One program writes each output, in one order of
addition, so results repeat to the bit. fp32 products use tf32 where `kernels.products` says so.
Weights stay fp32 outside: they are rounded for the products alone, and their gradient is never half
a number, which overflows at 65,504.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftdpp import kernels
from ftdpp.kernels.hash import ANY_PLACE, FUSION, SlotMap

ANY_SIZE = ["count", "columns", "flip", "splits"]
# An index is fetched, then the row it names, then both are multiplied. With 5 stages two rows are
# on their way at a time, with 3 or 4 one.
STAGES = 5


@triton.jit
def _count_bits(v):
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=ANY_SIZE, do_not_specialize_on_alignment=ANY_PLACE)
def gather_gemm(
    x, w, y, idx, row, mask, cin, cout, wk, wi, wo, count, columns, flip,
    BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[row[p]] = sum over k of x[idx[k, p]] @ w[|flip - k|]` for the slots p < count.

    x (N_in, cin), y (N_out, cout), one dtype; w by its strides wk, wi, wo, so that a transposed
    view serves the input gradient; flip = K - 1 runs the offsets backwards; idx (K, columns) int32;
    row and mask (count,) int32.
    Grid: (count / BM, cout / BO). FLOP: 2 cin cout a pair. Bytes: a row of x and of y is cin or
    cout numbers; w stays in the cache.

    A block walks the offsets that any of its slots has, in one counted loop. A branch around the
    loads would keep the compiler from fetching the next rows while it multiplies these.
    """
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = p < count
    left = tl.reduce(tl.load(mask + p, mask=live, other=0), 0, _either)  # offsets still to come
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    in_o = o < cout
    chunks = tl.cdiv(cin, BK)
    acc = tl.zeros((BM, BO), tl.float32)
    chunk = 0
    for _ in range(_count_bits(left) * chunks):
        # The number of the lowest bit, from the exponent of a float.
        k = ((left & -left).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        c = chunk * BK + tl.arange(0, BK)
        in_c = c < cin
        i = tl.load(idx + k.to(tl.int64) * columns + p, mask=live, other=-1).to(tl.int64)
        a = tl.load(
            x + i[:, None] * cin + c[None, :], mask=(i >= 0)[:, None] & in_c[None, :], other=0.0
        )
        matrix = w + tl.abs(flip - k) * wk + c[:, None] * wi + o[None, :] * wo
        b = tl.load(matrix, mask=in_c[:, None] & in_o[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        chunk += 1
        left = tl.where(chunk == chunks, left & (left - 1), left)
        chunk = tl.where(chunk == chunks, 0, chunk)
    out = tl.load(row + p, mask=live, other=0).to(tl.int64)
    cells = y + out[:, None] * cout + o[None, :]
    tl.store(cells, acc.to(y.dtype.element_ty), mask=live[:, None] & in_o[None, :])


@triton.jit(do_not_specialize=ANY_SIZE, do_not_specialize_on_alignment=ANY_PLACE)
def weight_gradient(
    x, dy, part, pair_in, pair_out, first, last, cin, cout, splits,
    BP: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`part[s, k] = sum of x[pair_in[j]]^T dy[pair_out[j]]` over share s of the pairs of k.

    The pairs of offset k are first[k] <= j < last[k].

    x (N_in, cin), dy (N_out, cout), one dtype; part (splits, K, cin, cout) fp32; pair_in, pair_out
    int32; first, last (K,) int64.
    Grid: (K, splits, cin / BI * cout / BO). FLOP: 2 cin cout a pair. Bytes: a row of x and of dy a
    pair.
    """
    k, s = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(cout, BO)
    ci = tl.program_id(2) // across * BI + tl.arange(0, BI)
    co = tl.program_id(2) % across * BO + tl.arange(0, BO)
    in_i, in_o = ci < cin, co < cout
    begin, end = tl.load(first + k), tl.load(last + k)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BP) * BP
    begin += s * share
    end = tl.minimum(begin + share, end)
    acc = tl.zeros((BI, BO), tl.float32)
    for at in range(begin, end, BP):
        j = at + tl.arange(0, BP)
        live = j < end
        i = tl.load(pair_in + j, mask=live, other=0).to(tl.int64)
        q = tl.load(pair_out + j, mask=live, other=0).to(tl.int64)
        rows_in = x + i[None, :] * cin + ci[:, None]
        a = tl.load(rows_in, mask=live[None, :] & in_i[:, None], other=0.0)
        rows_out = dy + q[:, None] * cout + co[None, :]
        b = tl.load(rows_out, mask=live[:, None] & in_o[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    to = part + ((s * tl.num_programs(0) + k).to(tl.int64) * cin + ci[:, None]) * cout + co[None, :]
    tl.store(to, acc, mask=in_i[:, None] & in_o[None, :])


def _side(channels: int) -> int:
    """Side of a tile across a number of channels.

    A table of the shape, never of the number of voxels, which changes with every batch.
    """
    return 16 if channels <= 16 else 32 if channels <= 32 or channels % 64 == 32 else 64


def gemm_blocks(cin: int, cout: int) -> dict[str, int]:
    """Tile sizes and pipeline of `gather_gemm`."""
    tile = {"BM": 64, "BK": min(_side(cin), 32), "BO": _side(cout)}
    return {**tile, "num_warps": 4, "num_stages": STAGES, **FUSION}


def gradient_blocks(cin: int, cout: int) -> dict[str, int]:
    """Tile sizes and pipeline of `weight_gradient`."""
    tile = {"BP": 32, "BI": _side(cin), "BO": _side(cout)}
    return {**tile, "num_warps": 4, "num_stages": STAGES, **FUSION}


def _convolve(x: Tensor, weight: Tensor, m: SlotMap, flip: int) -> Tensor:
    y = x.new_empty(m.n_out, weight.shape[2])
    if m.n_out:
        blocks = gemm_blocks(*weight.shape[1:])
        grid = (triton.cdiv(m.n_out, blocks["BM"]), triton.cdiv(weight.shape[2], blocks["BO"]))
        sizes = *weight.shape[1:], *weight.stride(), m.n_out, m.idx.stride(0), flip
        gather_gemm[grid](
            x, weight, y, m.idx, m.row, m.mask, *sizes, PRECISION=kernels.products(), **blocks
        )
    return y


def _gradient(x: Tensor, grad: Tensor, m: SlotMap, offsets: int) -> Tensor:
    cin, cout = x.shape[1], grad.shape[1]
    blocks = gradient_blocks(cin, cout)
    # A function of the sizes alone, so that the order of addition is fixed. Wide layers get fewer
    # shares: their partial sums are large, and padded maps make them no smaller.
    splits = min(max(m.n_out // 1024, 1), 32, max(65536 // (cin * cout), 1))
    part = torch.empty(splits, offsets, cin, cout, device=x.device)
    tiles = triton.cdiv(cin, blocks["BI"]) * triton.cdiv(cout, blocks["BO"])
    pairs = m.pair_in, m.pair_out, m.first, m.last
    weight_gradient[(offsets, splits, tiles)](
        x, grad, part, *pairs, cin, cout, splits, PRECISION=kernels.products(), **blocks
    )
    return part[0] if splits == 1 else part.sum(0)


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, m: SlotMap) -> Tensor:
        x, ctx.map, ctx.kept = x.contiguous(), m, weight.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, m, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        m: SlotMap = ctx.map
        grad, grad_x, grad_w = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            back, flip = (m, len(weight) - 1) if m.back is None else (m.back, 0)
            grad_x = _convolve(grad, weight.transpose(1, 2), back, flip)
        if ctx.needs_input_grad[1]:
            grad_w = _gradient(x, grad, m, len(weight)).to(ctx.kept)
        return grad_x, grad_w, None


def sparse_conv(x: Tensor, weight: Tensor, m: SlotMap) -> Tensor:
    """`kernels.sparse_conv` by Triton; under autocast in its dtype.

    Raises:
        ValueError: the dtypes differ or are not fp32, fp16 or bf16.
    """
    known: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        known = ()
    if x.dtype not in known:
        raise ValueError(
            f"sparse_conv: input {x.dtype} and weight {weight.dtype}; "
            "expected fp32, fp16 or bf16, both the same"
        )
    return _SparseConv.apply(x, weight, m)
