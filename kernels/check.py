"""Every sparse operation on this machine against dense PyTorch in float64: `ftd doctor` prints it, `ftd bench` demands it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels

GRID = 16  # voxels a side
ALLOWED = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 3e-3, "bf16": 2e-2}  # of the largest value
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Check:
    """One operation: its largest deviation as a share of the largest true value, and whether a second run gave equal bytes."""

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
    frames = int(b.max()) + 1 if len(b) else 1
    return x.new_zeros(frames, x.shape[1], size, size, size).index_put((b, torch.arange(x.shape[1])[:, None], i, j, k), x.t())


def dense_convolution(kind: str, x: Tensor, w: Tensor, fine: Tensor, coarse: Tensor, size: int) -> Tensor:
    """The convolution as PyTorch's dense one on a grid of an even size, read off at the voxels of the output.

    Args:
        kind: "submanifold", "strided" or "inverse". x: (N_in, Cin). w: (K, Cin, Cout).
        fine, coarse: (V, 4) voxels of two neighbouring levels, none negative; a submanifold convolution is on the fine one.
    """
    side = (3, 3, 3) if kind == "submanifold" else (2, 2, 2)
    kernel = w.view(*side, *w.shape[1:])
    if kind == "inverse":
        grid, out = F.conv_transpose3d(_grid(x, coarse, size // 2), kernel.permute(3, 4, 0, 1, 2), stride=2), fine
    elif kind == "strided":
        grid, out = F.conv3d(_grid(x, fine, size), kernel.permute(4, 3, 0, 1, 2), stride=2), coarse
    else:
        grid, out = F.conv3d(_grid(x, fine, size), kernel.permute(4, 3, 0, 1, 2), padding=1), fine
    b, i, j, k = out.long().unbind(1)
    return grid[b, :, i, j, k]


def _compare(what: str, dtype: str, runs: list[list[Tensor]], true: list[Tensor]) -> Check:
    found, again = runs
    worst = max(((a.cpu().double() - t).abs().max() / t.abs().max()).item() for a, t in zip(found, true, strict=True))
    return Check(what, dtype, worst, all(torch.equal(a, b) for a, b in zip(found, again, strict=True)))


def run(device: torch.device) -> list[Check]:
    """Check the implementation that `kernels.backend(device)` chooses: outputs and gradients, each dtype that it has."""
    implementation = kernels.backend(device)[0]
    if device.type == "cuda":
        dtypes = ["fp32", "tf32", "fp16", "bf16"]
    else:  # Triton's interpreter computes bf16 products wrongly
        dtypes = ["fp32"] if implementation == "torch" else ["fp32", "fp16"]
    g = torch.Generator().manual_seed(0)
    # Enough voxels that the weight gradient is summed in parts; Triton's interpreter is slow, though.
    n = 150 if device.type == "cpu" and implementation == "triton" else 6000
    points = torch.cat([torch.randint(0, 2, (n, 1), generator=g), torch.randint(0, GRID, (n, 3), generator=g)], 1)
    p = kernels.pyramid(points.to(device), 2)
    fine, coarse = p.coords(0).cpu(), p.coords(1).cpu()
    checks = []
    precision = torch.get_float32_matmul_precision()
    for kind, kmap in (("submanifold", p.same[0]), ("strided", p.down[0]), ("inverse", p.down[0].transposed)):
        for dtype in dtypes:
            x = torch.randn(len(coarse if kind == "inverse" else fine), 24, generator=g).to(DTYPES[dtype])
            w = torch.randn(27 if kind == "submanifold" else 8, 24, 40, generator=g).to(DTYPES[dtype])
            grad = torch.randn(len(coarse if kind == "strided" else fine), 40, generator=g).to(DTYPES[dtype])
            exact = x.double().requires_grad_(), w.double().requires_grad_()
            y = dense_convolution(kind, *exact, fine, coarse, GRID)
            true = [y, *torch.autograd.grad(y, exact, grad.double())]
            runs = []
            try:
                torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
                for _ in range(2):
                    mine = x.to(device).requires_grad_(), w.to(device).requires_grad_()
                    y = kernels.sparse_conv(*mine, kmap)
                    runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
            finally:
                torch.set_float32_matmul_precision(precision)
            checks.append(_compare(f"{kind} convolution and gradients", dtype, runs, true))
    if implementation == "triton":
        checks += [_norm(len(fine), dtype, p.same[0].live, device, g) for dtype in dtypes if dtype != "tf32"]
    return [*checks, *_points(points, p, device, g)]


def _norm(rows: int, dtype: str, live: Tensor, device: torch.device, g: torch.Generator) -> Check:
    """BatchNorm and ReLU."""
    x, grad = (torch.randn(rows, 40, generator=g).to(DTYPES[dtype]) for _ in range(2))
    w, b, mean, var = torch.rand(4, 40, generator=g) + 0.5
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    running = [mean.double(), var.double()]
    y = F.relu(F.batch_norm(exact[0], running[0], running[1], exact[1], exact[2], True, 0.1, 1e-4))
    true, runs = [y, *running, *torch.autograd.grad(y, exact, grad.double())], []
    for _ in range(2):
        mine = tuple(t.to(device).requires_grad_() for t in (x, w, b))
        kept = mean.to(device, copy=True), var.to(device, copy=True), torch.tensor(0, device=device)
        y = kernels.batch_norm_relu(mine[0], mine[1], mine[2], live, kept, 0.1, 1e-4)
        runs.append([y, *kept[:2], *torch.autograd.grad(y, mine, grad.to(device))])
    return _compare("BatchNorm, ReLU and gradients", dtype, runs, true)


def _points(points: Tensor, p: kernels.Pyramid, device: torch.device, g: torch.Generator) -> list[Check]:
    """Points to voxels and back, pixels to points."""
    n = len(points)
    x, grad = torch.randn(n, 5, generator=g), torch.randn(n, 5, generator=g)
    member = F.one_hot(p.voxel.cpu(), len(p.keys[0])).double()
    mean = member / member.sum(0)
    # Each point receives the mean of its voxel; the gradient goes the same way back.
    true = [member @ (mean.t() @ x.double()), mean @ (member.t() @ grad.double())]
    runs = []
    for _ in range(2):
        mine = x.to(device).requires_grad_()
        y = kernels.voxel_to_point(kernels.voxel_mean(mine, p), p)
        runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    checks = [_compare("points to voxels and back", "fp32", runs, true)]
    image, pixel, frame = torch.randn(2, 5, 6, 7, generator=g), points[:, 1:3] % 6, points[:, 0]
    exact = image.double().requires_grad_()
    y = exact[frame, :, pixel[:, 0], pixel[:, 1]]
    true, runs = [y, *torch.autograd.grad(y, exact, grad.double())], []
    for _ in range(2):
        mine = image.to(device).requires_grad_()
        y = kernels.pixel_to_point(mine, frame.to(device), pixel.to(device))
        runs.append([y, *torch.autograd.grad(y, mine, grad.to(device))])
    return [*checks, _compare("pixels to points", "fp32", runs, true)]
