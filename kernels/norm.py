"""BatchNorm and ReLU over voxels in two Triton kernels each way, where PyTorch takes four or five.

    z = (x - mean) / sqrt(var + eps) * weight + bias
    y = max(z, 0)
    dz = dy where y > 0
    db = sum dz
    dw = sum dz x^
    dx = weight / sqrt(var + eps) * (dz - (db + x^ dw) / n)

with x^ = (x - mean) / sqrt(var + eps) and sums over the n rows that are voxels. n is read on the
GPU, so that padded maps need no word from the host. The first kernel of each pair sums shares of
the rows. Every program of the second adds the shares up for itself: cheaper than a third launch,
and in one order, so that results repeat to the bit.

Applying scale and shift inside the GEMM instead would save writing and reading y once (8 MB a layer
at 30,000 voxels and 32 channels, which the GPU's cache holds), but not a launch, since the
statistics have to be complete first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftdpp.kernels.hash import FUSION

SHARES = 64
ANY_SIZE = ["share", "shares"]
ANY_PLACE = ["live"]  # an element of a list: that of an odd level lies at 8 bytes


@triton.jit(do_not_specialize=ANY_SIZE, do_not_specialize_on_alignment=ANY_PLACE)
def sum_rows(
    x, y, dy, stat, part, live, channels, share,
    BACK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Two sums over each `share` of the rows that are voxels: part (2, shares, channels) fp32.

    Forward: the mean of x, and the squares of the deviations from it (y, dy, stat unused).
    BACK: dz, and dz x^, where stat (2, channels) holds mean and 1 / sqrt(var + eps).
    Grid: (shares, channels / BC). Bytes: x, in BACK y and dy too. Forward reads its share twice,
    the second time from the cache.
    """
    s, n = tl.program_id(0), tl.load(live)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    begin = s.to(tl.int64) * share
    end = tl.minimum(begin + share, n)
    first = tl.zeros((BR, BC), tl.float32)
    second = tl.zeros((BR, BC), tl.float32)
    if BACK:
        mean = tl.load(stat + c, mask=in_c, other=0.0)
        rstd = tl.load(stat + channels + c, mask=in_c, other=0.0)
        for at in range(begin, end, BR):
            r = at + tl.arange(0, BR)
            there = (r < end)[:, None] & in_c[None, :]
            cell = r[:, None] * channels + c[None, :]
            positive = tl.load(y + cell, mask=there, other=0.0) > 0
            dz = tl.where(positive, tl.load(dy + cell, mask=there, other=0.0).to(tl.float32), 0.0)
            first += dz
            d = tl.load(x + cell, mask=there, other=0.0).to(tl.float32) - mean[None, :]
            second += dz * (d * rstd[None, :])
        one = tl.sum(first, 0)
    else:
        for at in range(begin, end, BR):
            r = at + tl.arange(0, BR)
            there = (r < end)[:, None] & in_c[None, :]
            cell = r[:, None] * channels + c[None, :]
            first += tl.load(x + cell, mask=there, other=0.0).to(tl.float32)
        one = tl.sum(first, 0) / tl.maximum(end - begin, 1).to(tl.float32)
        for at in range(begin, end, BR):
            r = at + tl.arange(0, BR)
            there = (r < end)[:, None] & in_c[None, :]
            cell = r[:, None] * channels + c[None, :]
            d = tl.load(x + cell, mask=there, other=0.0).to(tl.float32) - one[None, :]
            second += tl.where(there, d * d, 0.0)
    to = part + s * channels + c
    tl.store(to, one, mask=in_c)
    tl.store(to + tl.num_programs(0) * channels, tl.sum(second, 0), mask=in_c)


@triton.jit
def _read_sums(part, c, in_c, channels, shares, SHARES: tl.constexpr):
    """The two sums of every share for the channels c: (SHARES, BC) each, 0 behind the last."""
    s = tl.arange(0, SHARES)[:, None]
    cell = part + s * channels + c[None, :]
    there = (s < shares) & in_c[None, :]
    one = tl.load(cell, mask=there, other=0.0)
    two = tl.load(cell + shares * channels, mask=there, other=0.0)
    return one, two


@triton.jit(do_not_specialize=[*ANY_SIZE, "rows"], do_not_specialize_on_alignment=ANY_PLACE)
def normalise(
    x, y, part, stat, live, weight, bias, running_mean, running_var, batches,
    rows, channels, share, shares, momentum, eps,
    SHARES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y from the sums of `sum_rows`, 0 in the rows that are no voxels.

    Grid: (rows / BR, channels / BC). Bytes: x and y once.

    The first programs store mean and 1 / sqrt(var + eps) in stat (2, channels) and move the running
    statistics, with the unbiased variance. Fewer than two voxels have none: they are normalised by
    the running statistics and leave them alone.
    """
    n = tl.load(live)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    means, squares = _read_sums(part, c, in_c, channels, shares, SHARES)
    count = tl.minimum(tl.maximum(n - tl.arange(0, SHARES) * share, 0), share)
    count = count.to(tl.float32)[:, None]
    total = tl.maximum(n, 1).to(tl.float32)
    mean = tl.sum(means * count, 0) / total
    apart = means - mean[None, :]
    var = tl.sum(squares + count * apart * apart, 0) / total
    old_mean = tl.load(running_mean + c, mask=in_c, other=0.0)
    old_var = tl.load(running_var + c, mask=in_c, other=1.0)
    enough = n > 1
    first = tl.program_id(0) == 0
    unbiased = var * (total / tl.maximum(total - 1, 1))
    tl.store(running_mean + c, old_mean + momentum * (mean - old_mean), mask=in_c & first & enough)
    tl.store(running_var + c, old_var + momentum * (unbiased - old_var), mask=in_c & first & enough)
    once = first & (tl.program_id(1) == 0) & enough
    tl.store(batches, tl.load(batches) + 1, mask=once)
    mean = tl.where(enough, mean, old_mean)
    rstd = 1 / tl.sqrt(tl.where(enough, var, old_var) + eps)
    tl.store(stat + c, mean, mask=in_c & first)
    tl.store(stat + channels + c, rstd, mask=in_c & first)
    scale = rstd * tl.load(weight + c, mask=in_c, other=0.0)
    shift = tl.load(bias + c, mask=in_c, other=0.0)
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cell = r[:, None] * channels + c[None, :]
    there = (r < n)[:, None] & in_c[None, :]
    z = tl.load(x + cell, mask=there, other=0.0).to(tl.float32) - mean[None, :]
    z = z * scale[None, :] + shift[None, :]
    z = tl.where((z < 0) | (r >= n)[:, None], 0.0, z)  # not the maximum: NaN has to stay
    tl.store(y + cell, z.to(y.dtype.element_ty), mask=(r < rows)[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=[*ANY_SIZE, "rows"], do_not_specialize_on_alignment=ANY_PLACE)
def normalise_backward(
    x, y, dy, dx, part, stat, live, weight, dweight, dbias,
    rows, channels, shares, SHARES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx, dw and db from the sums of `sum_rows`.

    Grid: (rows / BR, channels / BC). Bytes: x, y, dy and dx once.
    """
    n = tl.load(live)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    first_sums, second_sums = _read_sums(part, c, in_c, channels, shares, SHARES)
    db, dw = tl.sum(first_sums, 0), tl.sum(second_sums, 0)
    first = tl.program_id(0) == 0
    tl.store(dbias + c, db, mask=in_c & first)
    tl.store(dweight + c, dw, mask=in_c & first)
    mean = tl.load(stat + c, mask=in_c, other=0.0)
    rstd = tl.load(stat + channels + c, mask=in_c, other=0.0)
    scale = rstd * tl.load(weight + c, mask=in_c, other=0.0)
    # Running statistics do not depend on x.
    depends = tl.where(n > 1, 1 / tl.maximum(n, 1).to(tl.float32), 0.0)
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cell = r[:, None] * channels + c[None, :]
    there = (r < n)[:, None] & in_c[None, :]
    positive = tl.load(y + cell, mask=there, other=0.0) > 0
    dz = tl.where(positive, tl.load(dy + cell, mask=there, other=0.0).to(tl.float32), 0.0)
    xhat = (tl.load(x + cell, mask=there, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    d = tl.where(there, scale[None, :] * (dz - (db[None, :] + xhat * dw[None, :]) * depends), 0.0)
    tl.store(dx + cell, d.to(dx.dtype.element_ty), mask=(r < rows)[:, None] & in_c[None, :])


def blocks(channels: int) -> dict[str, int]:
    """Tile of all the kernels: as many channels as there are, up to 64, and 2048 numbers in all."""
    side = 16 if channels <= 16 else 32 if channels <= 32 else 64
    return {"BR": 2048 // side, "BC": side, "num_warps": 4, **FUSION}


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        live: Tensor,
        running: tuple[Tensor, ...],
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous()
        (rows, channels), tile = x.shape, blocks(x.shape[1])
        y, stat = torch.empty_like(x), torch.empty(2, channels, device=x.device)
        across = triton.cdiv(channels, tile["BC"])
        ctx.share = triton.cdiv(triton.cdiv(rows, SHARES), tile["BR"]) * tile["BR"]
        if rows:
            shares = triton.cdiv(rows, ctx.share)
            part = torch.empty(2, shares, channels, device=x.device)
            arguments = x, x, x, stat, part, live, channels, ctx.share
            sum_rows[(shares, across)](*arguments, BACK=False, **tile)
            normalise[(triton.cdiv(rows, tile["BR"]), across)](
                x, y, part, stat, live, weight, bias, *running,
                rows, channels, ctx.share, shares, momentum, eps, SHARES=SHARES, **tile,
            )  # fmt: skip
        ctx.save_for_backward(x, y, stat, live, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, stat, live, weight = ctx.saved_tensors
        (rows, channels), tile = x.shape, blocks(x.shape[1])
        if not rows:
            return dy, torch.zeros_like(weight), torch.zeros_like(weight), None, None, None, None
        dy = dy.contiguous()
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        across, shares = triton.cdiv(channels, tile["BC"]), triton.cdiv(rows, ctx.share)
        part = torch.empty(2, shares, channels, device=x.device)
        arguments = x, y, dy, stat, part, live, channels, ctx.share
        sum_rows[(shares, across)](*arguments, BACK=True, **tile)
        normalise_backward[(triton.cdiv(rows, tile["BR"]), across)](
            x, y, dy, dx, part, stat, live, weight, dweight, dbias,
            rows, channels, shares, SHARES=SHARES, **tile,
        )  # fmt: skip
        return dx, dweight, dbias, None, None, None, None


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    live: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    momentum: float,
    eps: float,
) -> Tensor:
    """`relu(batch_norm(x))` in training, over the first `live` rows of x.

    The rows behind them give 0 and take no gradient.

    Args:
        x: (V, C) fp32, fp16 or bf16. weight, bias: (C,) fp32. live: () int64 on the device.
        running: running mean (C,), running variance (C,) and number of batches () int64; all three
            are updated.
    Returns:
        (V, C) in x's dtype.
    """
    return _BatchNormReLU.apply(x, weight, bias, live, running, momentum, eps)
