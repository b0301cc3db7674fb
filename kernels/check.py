"""Every sparse operation on this machine against dense PyTorch in float64.

`ftd doctor` prints the result; `ftd bench` measures nothing where one is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels
from ftdpp.kernels import naive
from ftdpp.kernels.maps import Pyramid

GRID = 16  # voxels a side
ALLOWED = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 3e-3, "bf16": 2e-2}  # of the largest value
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


ODD = (24, 40)  # channels in and out
# What training runs on a GPU is other machine code: pipelined where channels divide by 16, and of a
# constant where there is one. Pairs of the paper's U-Net.
TRAINED = (
    *(("submanifold", pair) for pair in ((1, 16), (64, 64), (128, 64), (192, 96))),
    ("strided", (96, 112)),
    ("inverse", (112, 96)),
)


@dataclass(frozen=True)
class Check:
    """The result for one operation.

    deviation: the largest, as a share of the largest true value. repeats: a second run gave equal
    bytes.
    """

    what: str
    dtype: str
    deviation: float
    repeats: bool

    @property
    def ok(self) -> bool:
        return self.repeats and self.deviation <= ALLOWED[self.dtype]  # NaN is not


def _grid(x: Tensor, coords: Tensor, size: int) -> Tensor:
    """Rows (V, C) as a grid (B, C, size, size, size), empty cells 0."""
    b, i, j, k = coords.long().unbind(1)
    channel = torch.arange(x.shape[1])[:, None]
    batch = int(b.max()) + 1 if len(b) else 1
    empty = x.new_zeros(batch, x.shape[1], size, size, size)
    return empty.index_put((b, channel, i, j, k), x.t())


def dense_convolution(
    kind: str, x: Tensor, w: Tensor, fine: Tensor, coarse: Tensor, size: int
) -> Tensor:
    """A sparse convolution by PyTorch's dense one, read off at the voxels of the output.

    Args:
        kind: "submanifold", "strided" or "inverse". x: (N_in, Cin). w: (K, Cin, Cout).
        fine, coarse: (V, 4) voxels of two neighbouring levels, none negative. A submanifold
            convolution is on the fine one.
        size: side of the grid, even.
    Returns:
        (N_out, Cout).
    """
    side = (3, 3, 3) if kind == "submanifold" else (2, 2, 2)
    kernel = w.view(*side, *w.shape[1:])
    forward, backward = kernel.permute(4, 3, 0, 1, 2), kernel.permute(3, 4, 0, 1, 2)
    if kind == "submanifold":
        grid, out = F.conv3d(_grid(x, fine, size), forward, padding=1), fine
    elif kind == "strided":
        grid, out = F.conv3d(_grid(x, fine, size), forward, stride=2), coarse
    else:
        grid, out = F.conv_transpose3d(_grid(x, coarse, size // 2), backward, stride=2), fine
    b, i, j, k = out.long().unbind(1)
    return grid[b, :, i, j, k]


def _compare(what: str, dtype: str, runs: list[list[Tensor]], true: list[Tensor]) -> Check:
    """Two runs of an operation against its true results."""
    found, again = runs
    deviations = [
        (a.cpu().double() - t).abs().max() / t.abs().max() for a, t in zip(found, true, strict=True)
    ]
    repeats = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # Not Python's max, which lets a NaN pass behind a number.
    return Check(what, dtype, torch.stack(deviations).max().item(), repeats)


def run(device: torch.device) -> list[Check]:
    """Check outputs and gradients of the implementation that `kernels.backend(device)` chooses."""
    implementation = kernels.backend(device)[0]
    interpreted = device.type == "cpu" and implementation == "triton"
    if device.type == "cuda":
        dtypes = ["fp32", "tf32", "fp16", "bf16"]
    elif interpreted:  # Triton's interpreter computes bf16 products wrongly
        dtypes = ["fp32", "fp16"]
    else:
        dtypes = ["fp32"]
    g = torch.Generator().manual_seed(0)
    # Enough points that the weight gradient is summed in parts; the interpreter is too slow for it.
    n = 150 if interpreted else 6000
    index = torch.randint(0, 2, (n, 1), generator=g)
    points = torch.cat([index, torch.randint(0, GRID, (n, 3), generator=g)], 1)
    p = kernels.pyramid(points.to(device), 2)
    maps = {"submanifold": p.same[0], "strided": p.down[0], "inverse": p.down[0].transposed}
    checks = [
        _convolution(kind, kmap, dtype, ODD, p, device, g)
        for kind, kmap in maps.items()
        for dtype in dtypes
    ]
    if device.type == "cuda":
        checks += [
            _convolution(kind, maps[kind], dtype, channels, p, device, g)
            for kind, channels in TRAINED
            for dtype in dtypes
        ]
    if implementation == "triton":
        rows, live = len(p.keys[0]), p.same[0].live
        checks += [_norm(rows, dtype, live, device, g) for dtype in dtypes if dtype != "tf32"]
        checks += [_attention(n, dropout, device, g) for dropout in (0.0, 0.2)]
    checks.append(_points_and_voxels(points, p, device, g))
    checks.append(_pixels(points, device, g))
    return checks


def _convolution(
    kind: str,
    kmap: Any,
    dtype: str,
    channels: tuple[int, int],
    p: Pyramid,
    device: torch.device,
    g: torch.Generator,
) -> Check:
    """One kind of convolution between the two levels of a pyramid."""
    fine, coarse, (cin, cout) = p.coords(0).cpu(), p.coords(1).cpu(), channels
    x = torch.randn(kmap.n_in, cin, generator=g).to(DTYPES[dtype])
    w = torch.randn(kmap.offsets, cin, cout, generator=g).to(DTYPES[dtype])
    grad = torch.randn(kmap.n_out, cout, generator=g).to(DTYPES[dtype])
    exact = x.double().requires_grad_(), w.double().requires_grad_()
    y = dense_convolution(kind, *exact, fine, coarse, GRID)
    true = [y, *torch.autograd.grad(y, exact, grad.double())]
    runs = []
    products = kernels.products()
    try:
        kernels.products("tf32" if dtype == "tf32" else "ieee")
        for _ in range(2):
            mine = x.to(device).requires_grad_(), w.to(device).requires_grad_()
            y = kernels.sparse_conv(*mine, kmap)
            runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    finally:
        kernels.products(products)
    what = f"{kind} convolution {cin} -> {cout} and gradients"
    return _compare(what, dtype, runs, true)


def _norm(rows: int, dtype: str, live: Tensor, device: torch.device, g: torch.Generator) -> Check:
    """BatchNorm and ReLU."""
    x, grad = (torch.randn(rows, 40, generator=g).to(DTYPES[dtype]) for _ in range(2))
    w, b, mean, var = torch.rand(4, 40, generator=g) + 0.5
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    true_mean, true_var = mean.double(), var.double()
    z = F.batch_norm(exact[0], true_mean, true_var, exact[1], exact[2], True, 0.1, 1e-4)
    y = F.relu(z)
    true = [y, true_mean, true_var, *torch.autograd.grad(y, exact, grad.double())]
    runs = []
    for _ in range(2):
        mine = tuple(t.to(device).requires_grad_() for t in (x, w, b))
        batches = torch.tensor(0, device=device)
        kept = mean.to(device, copy=True), var.to(device, copy=True), batches
        y = kernels.batch_norm_relu(mine[0], mine[1], mine[2], live, kept, 0.1, 1e-4)
        runs.append([y, *kept[:2], *torch.autograd.grad(y, mine, grad.to(device))])
    return _compare("BatchNorm, ReLU and gradients", dtype, runs, true)


def attention_of_heads(x: Tensor, key: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
    """`naive.external_attention` of heads that are expanded already, as `kernels.attend`.

    Args:
        x: (heads, d, N). key: (S, d). value: (d, S).
        factor: (heads, S, N), what dropout multiplies with; None without.
    Returns:
        (heads, d, N).
    """
    heads, d, n = x.shape
    same, nothing = torch.eye(heads * d).to(x), x.new_zeros(heads * d)
    slots = key, x.new_zeros(len(key)), value, x.new_zeros(d)
    masks = None if factor is None else (factor.mT, x.new_ones(n, heads * d))
    rows = x.flatten(0, 1).t()
    y = naive.external_attention(rows, same, nothing, *slots, same, nothing, heads, masks)
    return y.t().unflatten(0, (heads, d))


def kept_slots(heads: int, slots: int, n: int, p: float, device: torch.device) -> Tensor:
    """Which of a point's slots `kernels.attend` keeps under PyTorch's present seed.

    Points that are all zero attend to every slot alike. With powers of two as the value, each
    channel then shows in its bits which of 16 slots were kept.

    Returns:
        (heads, slots, n) bool, on the CPU.
    """
    groups, bits = slots // 16, 2.0 ** torch.arange(16)
    value = torch.block_diag(*[bits[None]] * groups).to(device)
    x, keep = torch.zeros(heads, groups, n, device=device), 1 - round(256 * p) / 256
    y = kernels.attend(x, torch.zeros_like(value.t()), value, p)
    words = (y * slots * keep).round().long().cpu()[:, :, None]  # (heads, groups, 1, n)
    return (words >> torch.arange(16)[:, None] & 1).flatten(1, 2).bool()


def _attention(n: int, p: float, device: torch.device, g: torch.Generator) -> Check:
    """External attention of n points; with dropout, what backward keeps has to be what forward
    kept."""
    heads, d, slots = 4, 10, 64
    x, grad = (torch.randn(heads, d, n, generator=g) for _ in range(2))
    key, value = torch.randn(slots, d, generator=g), torch.randn(d, slots, generator=g)
    factor, runs = None, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if p:
            torch.manual_seed(0)
            factor = kept_slots(heads, slots, n, p, device) / (1 - round(256 * p) / 256)
            factor = factor.double()
        for _ in range(2):
            torch.manual_seed(0)
            mine = [t.to(device).requires_grad_() for t in (x, key, value)]
            y = kernels.attend(mine[0], mine[1], mine[2], p)
            runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    exact = [t.double().requires_grad_() for t in (x, key, value)]
    y = attention_of_heads(exact[0], exact[1], exact[2], factor)
    true = [y, *torch.autograd.grad(y, exact, grad.double())]
    what = "external attention and gradients" + (", dropout" if p else "")
    return _compare(what, "fp32", runs, true)


def _points_and_voxels(
    points: Tensor, p: Pyramid, device: torch.device, g: torch.Generator
) -> Check:
    """Each point receives the mean of its voxel; the gradient goes the same way back."""
    x, grad = (torch.randn(len(points), 5, generator=g) for _ in range(2))
    member = F.one_hot(p.voxel.cpu(), len(p.keys[0])).double()
    mean = member / member.sum(0)
    true = [member @ (mean.t() @ x.double()), mean @ (member.t() @ grad.double())]
    runs = []
    for _ in range(2):
        mine = x.to(device).requires_grad_()
        y = kernels.voxel_to_point(kernels.voxel_mean(mine, p), p)
        runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    return _compare("points to voxels and back", "fp32", runs, true)


def _pixels(points: Tensor, device: torch.device, g: torch.Generator) -> Check:
    """Each point receives the features of its pixel."""
    x, grad = torch.randn(2, 5, 6, 7, generator=g), torch.randn(len(points), 5, generator=g)
    image, pixel = points[:, 0], points[:, 1:3] % 6
    exact = x.double().requires_grad_()
    y = exact[image, :, pixel[:, 0], pixel[:, 1]]
    true = [y, *torch.autograd.grad(y, exact, grad.double())]
    runs = []
    for _ in range(2):
        mine = x.to(device).requires_grad_()
        y = kernels.pixel_to_point(mine, image.to(device), pixel.to(device))
        runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    return _compare("pixels to points", "fp32", runs, true)
