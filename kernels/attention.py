"""External attention in two Triton kernels each way, which write no array of slots times points.

For each head, with x (d, N) over the N points of the whole batch, key (S, d) and value (d, S):

    l = key x                                                        (S, N)
    a = exp(l - m) / z      m: maximum of l over the points, z: sum of exp(l - m) over the points
    b = a / t               t = 1e-9 + sum of a over the slots
    y = value (f b)         f: dropout's factor, 0 or 1 / keep

and backward, from dy:

    e = f (value^T dy)      the gradient of b
    u = sum of b e over the slots
    h = b (e - u)           a times its own gradient, which is (e - u) / t: b = a / t depends on a
                            in the numerator and, through t, in all slots of the point
    r = sum of h over the points
    dl = h - a r            the softmax over the points: a (da - sum of a da), with a da = h
    dx = key^T dl
    dkey = sum of dl x^T, dvalue = sum of dy (f b)^T, over the points and heads

m, z and r are sums over all points that each point needs, so each way takes two kernels: the first
sums shares of the points, and every program of the second adds the shares up for itself, in one
order (as in `norm.py`). Both compute l, a, b and e anew from x and dy. dkey and dvalue are partial
sums by share and head, which PyTorch adds up. Nothing is added atomically, so results repeat to the
bit. All is in fp32, products too, since a is about 1/N.

A head has few channels (2, 8 and 10 in the paper's network), which `tl.dot` would fill up to 16. So
products over channels, and products that have them as rows, go channel by channel.

f comes from Philox, whose counter is (point, head, 16 slots): one draw gives 16 bytes, and a byte
decides, so p is rounded to 1/256, as on a CPU. Backward draws the same bytes again.

Estimated from the sizes, at S = 64 and fp32, a head and point, with dropout:

                             plain PyTorch                          here
    kept for the backward    4 S + S + 8 d + 4 = 324 + 8 d bytes    4 d bytes (x)
    moved forward            about 9.5 passes over S = 2.4 KB       12 d bytes (x twice, y)
    moved backward           about 16 passes over S = 4.2 KB        20 d bytes (x, dy twice, dx)
    FLOP in products         12 S d                                 20 S d

At d = 8, 32 heads and 24,000 points: 298 against 25 MB kept, 5.1 GB against 0.2 GB moved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftdpp.kernels.hash import FUSION

SHARES = 32  # of the points, at most
WIDEST = 64  # channels of a head: its gradients of key and value are one tile
PRECISION = "ieee"  # of the products by tl.dot
# Of more points a block, or with fewer warps, the gradients spill registers.
BLOCK = {"BN": 32, "num_warps": 8, **FUSION}
ANY_SIZE = ["d", "points", "share", "shares"]


@triton.jit
def _product(w, x, wd, ws, n, there, d, points, S: tl.constexpr, BN: tl.constexpr):
    """`sum over c of w[c, s] x[c, n]`, (S, BN): one channel after the other; w by its strides."""
    slot = tl.arange(0, S)
    out = tl.zeros((S, BN), tl.float32)
    for c in range(d):
        row = tl.load(x + c * points + n, mask=there, other=0.0)
        out += tl.load(w + c * wd + slot * ws)[:, None] * row[None, :]
    return out


@triton.jit
def _store_product(y, w, x, wd, ws, n, there, d, points, S: tl.constexpr):
    """`y[c, n] = sum over s of w[c, s] x[s, n]`, where x (S, BN) is at hand."""
    slot = tl.arange(0, S)
    for c in range(d):
        row = tl.sum(tl.load(w + c * wd + slot * ws)[:, None] * x, 0)
        tl.store(y + c * points + n, row, mask=there)


@triton.jit
def _tile(x, n, c, d, points, there):
    """Channels c of the points n of a head (d, points), 0 where there is none: (BN, D)."""
    cells = x + c[None, :] * points + n[:, None]
    return tl.load(cells, mask=there[:, None] & (c < d)[None, :], other=0.0)


@triton.jit
def _attention(logit, highest, scale, there):
    """a and b from the logits, (S, BN) each, 0 where there is no point."""
    apart = tl.where(there[None, :], logit - highest[:, None], float("-inf"))
    a = tl.exp(apart) * scale[:, None]
    return a, a / (1e-9 + tl.sum(a, 0))[None, :]


@triton.jit
def _dropout(seed, head, n, S: tl.constexpr, BN: tl.constexpr, DROP: tl.constexpr):
    """f of the points n, (S, BN): a byte below DROP drops, the others are scaled."""
    zero = tl.zeros((S // 16, BN), tl.int32)
    group = zero + tl.arange(0, S // 16)[:, None]
    point = zero + n.to(tl.int32)[None, :]
    w0, w1, w2, w3 = tl.philox(tl.load(seed), point, zero + head, group, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (S / 16, BN, 2, 2), w0 to w3 in order
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (S // 4, 1, BN))
    byte = words >> (8 * tl.arange(0, 4))[None, :, None] & 255
    return tl.where(tl.reshape(byte, (S, BN)) >= DROP, 256.0 / (256 - DROP), 0.0)


@triton.jit(do_not_specialize=ANY_SIZE)
def sum_logits(x, key, part, d, points, share, S: tl.constexpr, BN: tl.constexpr):
    """m and z of each `share` of the points: part (2, heads, shares, S).

    x (heads, d, points), key (S, d).
    Grid: (shares, heads). FLOP: 2 S d a point and head. Bytes: x once.
    """
    s, head = tl.program_id(0), tl.program_id(1)
    slot = tl.arange(0, S)
    x += head.to(tl.int64) * d * points
    begin = s.to(tl.int64) * share
    end = tl.minimum(begin + share, points)
    highest = tl.full((S,), float("-inf"), tl.float32)
    total = tl.zeros((S,), tl.float32)
    for at in range(begin, end, BN):  # every block has a point, so that `higher` is a number
        n = at + tl.arange(0, BN)
        there = n < end
        logit = _product(key, x, 1, d, n, there, d, points, S, BN)
        logit = tl.where(there[None, :], logit, float("-inf"))
        higher = tl.maximum(highest, tl.max(logit, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
        highest = higher
    to = part + (head * tl.num_programs(0) + s) * S + slot
    tl.store(to, highest)
    tl.store(to + tl.num_programs(0) * tl.num_programs(1) * S, total)


@triton.jit(do_not_specialize=ANY_SIZE)
def attend_points(
    x, key, value, part, seed, stat, y, d, points, share, shares,
    S: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """y (heads, d, points) from the sums of `sum_logits`; stat (2, heads, S): m and 1 / z.

    value (d, S); seed () int64, None where DROP is 0; DROP: dropout's p in 256ths.
    Grid: (shares, heads). FLOP: 4 S d a point and head. Bytes: x and y once.
    """
    s, head = tl.program_id(0), tl.program_id(1)
    slot = tl.arange(0, S)
    own = tl.arange(0, SHARES)[:, None]
    cells = part + (head * shares + own) * S + slot[None, :]
    maxima = tl.load(cells, mask=own < shares, other=float("-inf"))
    totals = tl.load(cells + tl.num_programs(1) * shares * S, mask=own < shares, other=0.0)
    highest = tl.max(maxima, 0)
    scale = 1 / tl.sum(totals * tl.exp(maxima - highest[None, :]), 0)
    to = stat + head * S + slot
    tl.store(to, highest, mask=(slot < S) & (s == 0))
    tl.store(to + tl.num_programs(1) * S, scale, mask=(slot < S) & (s == 0))
    x += head.to(tl.int64) * d * points
    y += head.to(tl.int64) * d * points
    begin = s.to(tl.int64) * share
    end = tl.minimum(begin + share, points)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        logit = _product(key, x, 1, d, n, there, d, points, S, BN)
        _, b = _attention(logit, highest, scale, there)
        if DROP:
            b *= _dropout(seed, head, n, S, BN, DROP)
        _store_product(y, value, b, S, 1, n, there, d, points, S)


@triton.jit(do_not_specialize=ANY_SIZE)
def sum_gradients(
    x, dy, key, value, stat, seed, part, dvalue, d, points, share,
    S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r and dvalue of each `share` of the points.

    part (heads, shares, S), dvalue (heads, shares, S, d); stat of `attend_points`.
    Grid: (shares, heads). FLOP: 6 S d a point and head. Bytes: x and dy once.
    """
    s, head = tl.program_id(0), tl.program_id(1)
    slot, c = tl.arange(0, S), tl.arange(0, D)
    highest = tl.load(stat + head * S + slot)
    scale = tl.load(stat + (tl.num_programs(1) + head) * S + slot)
    x += head.to(tl.int64) * d * points
    dy += head.to(tl.int64) * d * points
    begin = s.to(tl.int64) * share
    end = tl.minimum(begin + share, points)
    r = tl.zeros((S,), tl.float32)
    dw = tl.zeros((S, D), tl.float32)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        logit = _product(key, x, 1, d, n, there, d, points, S, BN)
        _, b = _attention(logit, highest, scale, there)
        e = _product(value, dy, S, 1, n, there, d, points, S, BN)
        kept = b
        if DROP:
            f = _dropout(seed, head, n, S, BN, DROP)
            e, kept = e * f, b * f
        r += tl.sum(b * (e - tl.sum(b * e, 0)[None, :]), 1)
        dw = tl.dot(kept, _tile(dy, n, c, d, points, there), dw, input_precision=PRECISION)
    row = head * tl.num_programs(0) + s
    tl.store(part + row * S + slot, r)
    cells = dvalue + (row.to(tl.int64) * S + slot[:, None]) * d + c[None, :]
    tl.store(cells, dw, mask=(c < d)[None, :])


@triton.jit(do_not_specialize=ANY_SIZE)
def attend_backward(
    x, dy, key, value, stat, seed, part, dx, dkey, d, points, share, shares,
    S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (heads, d, points), and dkey (heads, shares, S, d) of each share, from `sum_gradients`.

    Grid: (shares, heads). FLOP: 8 S d a point and head. Bytes: x, dy and dx once.
    """
    s, head = tl.program_id(0), tl.program_id(1)
    slot, c = tl.arange(0, S), tl.arange(0, D)
    highest = tl.load(stat + head * S + slot)
    scale = tl.load(stat + (tl.num_programs(1) + head) * S + slot)
    own = tl.arange(0, SHARES)[:, None]
    cells = part + (head * shares + own) * S + slot[None, :]
    r = tl.sum(tl.load(cells, mask=own < shares, other=0.0), 0)
    x += head.to(tl.int64) * d * points
    dy += head.to(tl.int64) * d * points
    dx += head.to(tl.int64) * d * points
    begin = s.to(tl.int64) * share
    end = tl.minimum(begin + share, points)
    dk = tl.zeros((S, D), tl.float32)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        logit = _product(key, x, 1, d, n, there, d, points, S, BN)
        a, b = _attention(logit, highest, scale, there)
        e = _product(value, dy, S, 1, n, there, d, points, S, BN)
        if DROP:
            e *= _dropout(seed, head, n, S, BN, DROP)
        dl = b * (e - tl.sum(b * e, 0)[None, :]) - a * r[:, None]
        _store_product(dx, key, dl, 1, d, n, there, d, points, S)
        dk = tl.dot(dl, _tile(x, n, c, d, points, there), dk, input_precision=PRECISION)
    row = (head * tl.num_programs(0) + s).to(tl.int64)
    to = dkey + (row * S + slot[:, None]) * d + c[None, :]
    tl.store(to, dk, mask=(c < d)[None, :])


def columns(d: int) -> int:
    """Width of the tile that the d channels of a head take in `tl.dot`, which wants 16 or more."""
    return max(16, triton.next_power_of_2(d))


def cut(points: int) -> tuple[int, int]:
    """Points of a share, whole blocks of them, and how many shares there are.

    A function of the number of points alone, so that the order of addition is fixed.
    """
    block = BLOCK["BN"]
    share = triton.cdiv(triton.cdiv(points, SHARES), block) * block
    return share, triton.cdiv(points, share)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
        x, key, value = x.contiguous(), key.contiguous(), value.contiguous()
        (heads, d, points), slots = x.shape, len(key)
        ctx.drop = min(round(256 * p), 255)  # not 256: a point has to keep something
        # Drawn on the device by its generator, which `Chance.seed_dropout` seeds: no waiting.
        seed = torch.randint(2**62, (), device=x.device) if ctx.drop else None
        y, stat = torch.empty_like(x), torch.empty(2, heads, slots, device=x.device)
        ctx.save_for_backward(x, key, value, stat, seed)
        if points:
            share, shares = cut(points)
            part = torch.empty(2, heads, shares, slots, device=x.device)
            sum_logits[(shares, heads)](x, key, part, d, points, share, S=slots, **BLOCK)
            attend_points[(shares, heads)](
                x, key, value, part, seed, stat, y, d, points, share, shares,
                S=slots, SHARES=SHARES, DROP=ctx.drop, **BLOCK,
            )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, key, value, stat, seed = ctx.saved_tensors
        (heads, d, points), slots = x.shape, len(key)
        if not points:
            return dy, torch.zeros_like(key), torch.zeros_like(value), None
        dy, dx = dy.contiguous(), torch.empty_like(x)
        share, shares = cut(points)
        part = torch.empty(heads, shares, slots, device=x.device)
        dkey, dvalue = torch.empty(2, heads, shares, slots, d, device=x.device)
        inputs = x, dy, key, value, stat, seed, part
        constants = {"S": slots, "D": columns(d), "DROP": ctx.drop, "PRECISION": PRECISION, **BLOCK}
        sum_gradients[(shares, heads)](*inputs, dvalue, d, points, share, **constants)
        attend_backward[(shares, heads)](
            *inputs, dx, dkey, d, points, share, shares, SHARES=SHARES, **constants
        )
        return dx, dkey.sum((0, 1)), dvalue.sum((0, 1)).t(), None


def attend(x: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
    """Heads of external attention without the bias of the value, with dropout of the attention.

    Args:
        x: (heads, d, N). key: (S, d). value: (d, S). All fp32; S a power of two from 16 on.
        p: share of the attention that is dropped, 0 <= p < 1, rounded to 1/256.
    Returns:
        (heads, d, N).
    Raises:
        ValueError: shapes or dtypes are others, or d is above WIDEST.
    """
    d, slots = x.shape[1], len(key)
    if (
        any(t.dtype != torch.float32 for t in (x, key, value))
        or (key.shape, value.shape) != ((slots, d), (d, slots))
        or (slots < 16 or slots & (slots - 1))
        or d > WIDEST
    ):
        raise ValueError(
            f"attend: x {tuple(x.shape)} {x.dtype}, key {tuple(key.shape)} {key.dtype}, value "
            f"{tuple(value.shape)} {value.dtype}; expected fp32, (heads, d, N), (S, d) and (d, S) "
            f"with d up to {WIDEST} and S a power of two from 16 on"
        )
    return _Attend.apply(x, key, value, p)
