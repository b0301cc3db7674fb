"""The Triton kernels against kernels/naive.py and plain PyTorch in float64.

They run on a GPU where there is one, else in Triton's interpreter. bf16 is left to a GPU: `tl.dot`
in bf16 is wrong in the interpreter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from ftdpp import kernels, machine  # noqa: E402
from ftdpp.bench import speed  # noqa: E402
from ftdpp.kernels import Pyramid, attention, check, gemm, hash, naive, norm, reference  # noqa: E402
from ftdpp.models import BatchNormReLU, UNet3D  # noqa: E402
from ftdpp.systems.ftdpp import ExternalAttention  # noqa: E402

SIZES = [1, 2, 63, 97, 150]
# Rows, and channels of input and output; the input gradient runs each the other way round, too.
# Every size once: how rows fall into blocks does not depend on how channels do.
SHAPES = [*((n, 24, 48) for n in SIZES), *((n, *c) for n in (1, 97) for c in ((1, 16), (112, 16)))]


def cloud(n: int, size: int = 7, batch: int = 2, low: int = -3) -> Tensor:
    g = torch.Generator().manual_seed(n)
    index = torch.randint(0, batch, (n, 1), generator=g)
    return torch.cat([index, torch.randint(low, low + size, (n, 3), generator=g)], 1)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that the kernels write into start as NaN, or as an index far outside.

    So a cell that is left unwritten shows.
    """

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max // 2)

    new_empty, empty, empty_like = Tensor.new_empty, torch.empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


KINDS = ["submanifold", "strided", "inverse"]
Voxels = list[naive.Voxel]


def voxels(p: Pyramid, level: int) -> Voxels:
    return [(b, x, y, z) for b, x, y, z in p.coords(level).tolist()]


def maps_of(p: Pyramid, kind: str) -> tuple[Any, list[naive.Pairs]]:
    """Triton's map of a convolution on levels 1 and 2, and the naive one."""
    fine, coarse = voxels(p, 1), voxels(p, 2)
    if kind == "submanifold":
        return p.same[1], naive.submanifold_map(fine)
    if kind == "strided":
        return p.down[1], naive.strided_map(fine, coarse)
    return p.down[1].transposed, naive.inverse_map(fine, coarse)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert found.shape == wanted.shape
    if wanted.numel():
        scale = wanted.abs().max().clamp(min=1e-9)
        assert ((found.cpu().double() - wanted).abs() / scale).max() <= tolerance


@pytest.mark.parametrize("n", SIZES)
def test_voxels_are_the_cpus(n: int) -> None:
    """The same voxels in the same order, on all levels, and the same points in them."""
    ours, theirs = hash.HashPyramid(cloud(n).to(DEVICE), 7), Pyramid(cloud(n), 7)
    mine, wanted = ((p.voxel, p.start, p.order, *p.keys) for p in (ours, theirs))
    for a, b in zip(mine, wanted, strict=True):
        assert torch.equal(a.cpu(), b)
    assert torch.equal(ours.coords(2).cpu(), theirs.coords(2))


@pytest.mark.parametrize("n", SIZES)
def test_maps_are_the_naive_ones(n: int) -> None:
    """Every pair of every map, as slots and as lists."""
    p = hash.HashPyramid(cloud(n).to(DEVICE), 4)
    for level in range(4):
        coarse = voxels(p, level)
        check_map(p.same[level], naive.submanifold_map(coarse))
        if level > 0:
            fine, down = voxels(p, level - 1), p.down[level - 1]
            check_map(down, naive.strided_map(fine, coarse))
            check_map(down.transposed, naive.inverse_map(fine, coarse))


def check_map(found: hash.SlotMap, kernel_map: list[naive.Pairs]) -> None:
    wanted = {(k, i, o) for k, pairs in enumerate(kernel_map) for i, o in pairs}
    idx, row, mask = found.idx.cpu(), found.row.cpu(), found.mask.cpu()
    assert sorted(row.tolist()) == list(range(found.n_out))
    k, slot = (idx >= 0).nonzero(as_tuple=True)
    slots = zip(k.tolist(), idx[k, slot].tolist(), row[slot].tolist(), strict=True)
    assert set(slots) == wanted
    bits = (idx >= 0).int() << torch.arange(len(idx))[:, None]
    assert torch.equal(mask, bits.sum(0).int())
    assert (mask.diff() >= 0).all(), "slots lie in the order of their masks"
    listed = [
        (k, found.pair_in[j].item(), found.pair_out[j].item())
        for k, (first, last) in enumerate(zip(found.first, found.last, strict=True))
        for j in range(first, last)
    ]
    assert len(listed) == len(wanted)
    assert set(listed) == wanted


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion ends the program")
@pytest.mark.parametrize(
    "bad",
    [[0, 2**15 - 1, 0, 0], [0, 0, 0, 1 - 2**15], [-1, 0, 0, 0], [4096, 0, 0, 0], [0, 2**40, 0, 0]],
)
def test_points_outside_the_grid_are_refused(bad: list[int]) -> None:
    with pytest.raises(RuntimeError, match="outside \\+-32766"):
        hash.HashPyramid(torch.tensor([[0, 1, 2, 3], bad]), 2)
    # A row behind the points is no point.
    hash.HashPyramid(torch.tensor([[0, 1, 2, 3], bad]), 2, torch.tensor(1))


def test_neighbours_do_not_wrap_around_the_grid() -> None:
    far = 2**15 - 2
    ends = (-far, far)
    coords = torch.tensor([[0, x, y, z] for x in ends for y in ends for z in ends])
    for same in hash.HashPyramid(coords.to(DEVICE), 7).same:
        assert (same.idx >= 0).sum() == 8


def test_hash_table_holds_colliding_keys() -> None:
    """Keys that all begin at the same place."""
    keys = torch.arange(100000)
    size = 1 << (200).bit_length()
    h = keys * 0x9E3779B97F4A7C1
    same_place = keys[((h ^ (h >> 31)) & (size - 1)) == 7][:100]
    assert len(same_place) == 100
    table_key, table_row, found_size = hash.hash_table(same_place.to(DEVICE))
    assert found_size == size
    rows = dict(zip(table_key[:size].tolist(), table_row.tolist(), strict=True))
    assert {k: rows[k] for k in same_place.tolist()} == {
        k: i for i, k in enumerate(same_place.tolist())
    }


@pytest.mark.parametrize(("n", "cin", "cout"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_convolution_and_gradients(kind: str, n: int, cin: int, cout: int) -> None:
    torch.manual_seed(n)
    ours, kernel_map = maps_of(hash.HashPyramid(cloud(n).to(DEVICE), 3), kind)
    x, w = torch.randn(ours.n_in, cin), torch.randn(ours.offsets, cin, cout)
    tolerance = 1e-6 if DEVICE == "cpu" else 3e-6  # a GPU adds one product at a time
    check_convolution(x, w, ours, kernel_map, torch.float32, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cin", "cout"), [(24, 48), *([(1, 16), (64, 64), (192, 96)] if DEVICE == "cuda" else [])]
)
def test_convolution_in_half_precision(kind: str, dtype: torch.dtype, cin: int, cout: int) -> None:
    """On a GPU also at channels that divide by 16, which are other machine code."""
    torch.manual_seed(0)
    ours, kernel_map = maps_of(hash.HashPyramid(cloud(97).to(DEVICE), 3), kind)
    x = torch.randn(ours.n_in, cin).to(dtype).float()
    w = torch.randn(ours.offsets, cin, cout).to(dtype).float()
    check_convolution(x, w, ours, kernel_map, dtype, 2e-3 if dtype == torch.float16 else 1e-2)


def test_weight_gradients_stay_fp32_under_autocast() -> None:
    """In half precision the sum of a hundred products of 100 and 100 would be infinite."""
    ours, kernel_map = maps_of(hash.HashPyramid(cloud(97).to(DEVICE), 3), "submanifold")
    x = torch.full((ours.n_in, 16), 100.0, device=DEVICE)
    w = torch.zeros(ours.offsets, 16, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        y = kernels.sparse_conv(x, w, ours)
    assert y.dtype == torch.float16
    [grad] = torch.autograd.grad(y, w, torch.full_like(y, 100))
    wanted = torch.tensor([1e4 * len(pairs) for pairs in kernel_map])
    assert grad.dtype == torch.float32 and wanted.max() > 65_504
    assert torch.equal(grad.cpu(), wanted[:, None, None].expand(-1, 16, 16))


def test_the_precision_of_products_is_a_switch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = maps_of(hash.HashPyramid(cloud(97).to(DEVICE), 3), "submanifold")
    x, w = torch.randn(ours.n_in, 16), torch.randn(ours.offsets, 16, 16)
    seen = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: seen.append(options["PRECISION"])

    monkeypatch.setattr(gemm, "gather_gemm", Kernel())
    monkeypatch.setattr(kernels, "_products", "ieee")
    kernels.sparse_conv(x.to(DEVICE), w.to(DEVICE), ours)
    machine.use(torch.device("cuda"))
    kernels.sparse_conv(x.to(DEVICE), w.to(DEVICE), ours)
    assert seen == ["ieee", "tf32"]
    assert torch.get_float32_matmul_precision() == "highest", "the others stay exact"


def check_convolution(
    x: Tensor,
    w: Tensor,
    ours: Any,
    kernel_map: list[naive.Pairs],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Output and gradients against the naive ones in float64, and a second run."""
    exact = tuple(t.double().requires_grad_() for t in (x, w))
    mine = tuple(t.to(DEVICE, dtype).requires_grad_() for t in (x, w))
    wanted = naive.convolution(exact[0], exact[1], kernel_map, ours.n_out)
    found = kernels.sparse_conv(mine[0], mine[1], ours)
    upstream = torch.randn(wanted.shape).to(dtype)
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    gradients = torch.autograd.grad(found, mine, upstream.to(DEVICE))
    for a, b in zip((found, *gradients), (wanted, *expected), strict=True):
        assert a.dtype == dtype
        assert_close(a, b, tolerance)
    assert torch.equal(found, kernels.sparse_conv(mine[0], mine[1], ours)), "bitwise repeatable"


def test_nothing_is_written_outside() -> None:
    """Guard cells beside the output and the partial weight gradients keep their value."""
    p = hash.HashPyramid(cloud(97).to(DEVICE), 2)
    m, cin, cout = p.same[0], 24, 40
    x, w = torch.randn(m.n_in, cin, device=DEVICE), torch.randn(27, cin, cout, device=DEVICE)
    guarded = torch.full((m.n_out + 128, cout), 7.0, device=DEVICE)
    y = guarded[64 : 64 + m.n_out]
    blocks = gemm.gemm_blocks(cin, cout)
    grid = (-(-m.n_out // blocks["BM"]), -(-cout // blocks["BO"]))
    sizes = (cin, cout, *w.stride(), m.n_out, m.idx.stride(0), 0)
    gemm.gather_gemm[grid](x, w, y, m.idx, m.row, m.mask, *sizes, PRECISION="ieee", **blocks)
    assert (guarded[:64] == 7).all()
    assert (guarded[-64:] == 7).all()
    assert torch.equal(y, kernels.sparse_conv(x, w, m))
    part = torch.full((2 + 2, 27, cin, cout), 7.0, device=DEVICE)
    blocks = gemm.gradient_blocks(cin, cout)
    tiles = -(-cin // blocks["BI"]) * -(-cout // blocks["BO"])
    gemm.weight_gradient[(27, 2, tiles)](
        x,
        y,
        part[1:3],
        m.pair_in,
        m.pair_out,
        m.first,
        m.last,
        cin,
        cout,
        2,
        PRECISION="ieee",
        **blocks,
    )
    assert (part[0] == 7).all()
    assert (part[3] == 7).all()
    true = torch.autograd.grad(kernels.sparse_conv(x, w.requires_grad_(), m), w, y)[0]
    assert_close(part[1:3].sum(0), true.cpu().double(), 1e-5)


NORMS = [(1, 16, 1), (9, 16, 1), (63, 24, 63), (150, 112, 97), (150, 192, 150), (7, 16, 0)]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("rows", "channels", "live", "dtype"),
    [
        *((*shape, dtype) for shape in NORMS for dtype in TYPES),
        (9000, 16, 4321, torch.float32),  # more than one block of rows a share
    ],
)
def test_batch_norm_and_relu(rows: int, channels: int, live: int, dtype: torch.dtype) -> None:
    """Output, gradients and statistics as by PyTorch in float64; rows that do not count are NaN."""
    torch.manual_seed(rows)
    exact, ours = (
        BatchNormReLU(channels).double().train(),
        BatchNormReLU(channels).to(DEVICE).train(),
    )
    for n in (exact, ours):
        with torch.no_grad():
            n.weight.copy_(torch.linspace(-0.5, 1.5, channels))
            n.bias.copy_(torch.linspace(-1, 1, channels))
            for buffer in n.buffers():
                buffer.fill_(2)
    x, upstream = (
        (torch.randn(rows, channels) * 3 + 10).to(dtype),
        torch.randn(rows, channels).to(dtype),
    )
    x[live:], upstream[live:] = float("nan"), float("nan")
    a, b = x[:live].double().requires_grad_(), x.to(DEVICE).requires_grad_()
    wanted, found = exact(a), ours(b, torch.tensor(live, device=DEVICE))
    assert found.dtype == dtype
    expected = torch.autograd.grad(wanted, (a, exact.weight, exact.bias), upstream[:live].double())
    grads = torch.autograd.grad(found, (b, ours.weight, ours.bias), upstream.to(DEVICE))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for mine, true in zip((found, *grads), (wanted, *expected), strict=True):
        assert_close(mine[: len(true)], true, tolerance)
        assert not mine[len(true) :].any()
    for mine, true in zip(ours.buffers(), exact.buffers(), strict=True):
        assert_close(mine, true.double(), 1e-6)
    again = ours(b, torch.tensor(live, device=DEVICE))
    assert torch.equal(found, again), "bitwise repeatable"
    # A gradient that is not contiguous, as that of a sum.
    whole = torch.autograd.grad(
        again, (b, ours.weight), torch.ones(rows, channels, dtype=dtype, device=DEVICE)
    )
    b.grad = None
    ours(b, torch.tensor(live, device=DEVICE)).sum().backward()
    assert b.grad is not None and ours.weight.grad is not None
    assert torch.equal(b.grad, whole[0])
    assert torch.equal(ours.weight.grad, whole[1])


def test_batch_norm_of_nothing() -> None:
    norms, x = (
        BatchNormReLU(16).to(DEVICE).train(),
        torch.zeros(0, 16, device=DEVICE, requires_grad=True),
    )
    norms(x, torch.tensor(0, device=DEVICE)).sum().backward()
    assert norms.weight.grad is not None
    assert not norms.weight.grad.any()
    assert not norms.running_mean.any()


def test_points_in_any_memory_layout() -> None:
    coords = cloud(63).to(DEVICE)
    assert torch.equal(
        hash.HashPyramid(coords.t().contiguous().t(), 2).keys[0],
        hash.HashPyramid(coords, 2).keys[0],
    )


def test_batch_norm_writes_nothing_outside() -> None:
    """Guard cells on both sides of everything that its kernels write keep their value."""
    rows, channels, live, tile = 97, 24, torch.tensor(90, device=DEVICE), norm.blocks(24)
    whole: list[Tensor] = []

    def guarded(*shape: int) -> Tensor:
        whole.append(torch.full((4096 + math.prod(shape),), 7.0, device=DEVICE))
        return whole[-1][2048:-2048].view(shape)

    (x, dy), (w, b) = (
        torch.randn(2, rows, channels, device=DEVICE),
        torch.rand(2, channels, device=DEVICE),
    )
    y, dx, part, stat = (
        guarded(rows, channels),
        guarded(rows, channels),
        guarded(2, 1, channels),
        guarded(2, channels),
    )
    dw, db, mean, var = (guarded(channels) for _ in range(4))
    batches, sizes, grid = (
        torch.tensor(0, device=DEVICE),
        (channels, 128),
        (-(-rows // tile["BR"]), 1),
    )
    norm.sum_rows[(1, 1)](x, y, dy, stat, part, live, *sizes, BACK=False, **tile)
    inputs = x, y, part, stat, live, w, b, mean, var, batches, rows, *sizes, 1, 0.1, 1e-4
    norm.normalise[grid](*inputs, SHARES=norm.SHARES, **tile)
    norm.sum_rows[(1, 1)](x, y, dy, stat, part, live, *sizes, BACK=True, **tile)
    outputs = x, y, dy, dx, part, stat, live, w, dw, db, rows, channels, 1
    norm.normalise_backward[grid](*outputs, SHARES=norm.SHARES, **tile)
    for memory in whole:
        assert (memory[:2048] == 7).all()
        assert (memory[-2048:] == 7).all()
        assert (memory[2048:-2048] != 7).all()


def test_batch_norm_lets_nothing_invalid_pass() -> None:
    """A NaN among the voxels has to come out again, so that a diverged network is noticed.

    In the interpreter a maximum would keep it, too; on a GPU it would not.
    """
    x = torch.ones(5, 16, device=DEVICE)
    x[3, 2] = float("nan")
    out = BatchNormReLU(16).to(DEVICE).train()(x, torch.tensor(5, device=DEVICE))
    assert out[:, 2].isnan().all()
    assert out[:, 3].isfinite().all()


def test_no_points() -> None:
    p = hash.HashPyramid(torch.zeros(0, 4, dtype=torch.int32, device=DEVICE), 3)
    assert [len(k) for k in p.keys] == [0, 0, 0]
    for offsets, m in ((27, p.same[1]), (8, p.down[0]), (8, p.down[0].transposed)):
        x = torch.zeros(0, 2, device=DEVICE, requires_grad=True)
        w = torch.randn(offsets, 2, 3, device=DEVICE, requires_grad=True)
        out = kernels.sparse_conv(x, w, m)
        assert out.shape == (0, 3)
        out.sum().backward()
        assert w.grad is not None
        assert not w.grad.any()


def test_refusals() -> None:
    p = hash.HashPyramid(cloud(9).to(DEVICE), 1)
    x, w = torch.randn(p.same[0].n_in, 2, device=DEVICE), torch.randn(27, 2, 3, device=DEVICE)
    for bad_x, bad_w in ((x[:-1], w), (x, w[:8])):
        with pytest.raises(ValueError, match="do not fit a map"):
            kernels.sparse_conv(bad_x, bad_w, p.same[0])
    with pytest.raises(ValueError, match="expected fp32, fp16 or bf16"):
        kernels.sparse_conv(x.double(), w.double(), p.same[0])
    with pytest.raises(ValueError, match="both the same"):
        kernels.sparse_conv(x.half(), w, p.same[0])
    with pytest.raises(ValueError, match="1 to 8 levels"):
        hash.HashPyramid(cloud(9).to(DEVICE), 9)


def test_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse U-Net by Triton is that by PyTorch: features and the gradient of every weight."""
    torch.manual_seed(0)
    coords, net = cloud(60, 5), UNet3D(16, 3).train()
    feat = torch.randn(60, 1)
    found = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("FTD_KERNELS", choice)
        net = net.to(DEVICE if choice == "triton" else "cpu").float()
        where = net.norm.weight.device
        p = kernels.pyramid(coords.to(where), 3)
        assert type(p) is (hash.HashPyramid if choice == "triton" else Pyramid)
        net.zero_grad()
        out = net(feat.to(where), p)
        (out * torch.linspace(-1, 1, 16, device=where)).sum().backward()
        found.append(
            {
                "out": out.detach(),
                **{n: w.grad.clone() for n, w in net.named_parameters() if w.grad is not None},
            }
        )
    assert len(found[0]) == len(list(net.parameters())) + 1
    for name, wanted in found[0].items():
        assert_close(found[1][name], wanted.double(), 1e-3)


@pytest.mark.parametrize(("n", "levels"), [(0, 3), (1, 3), (17, 3), (40, 2)])
def test_padded_maps_change_nothing(n: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, gradients and running statistics, with room for 40 points and rubbish behind n.

    The host never learns n, not even where it is 0 or 1: that is what a CUDA graph needs.
    """
    monkeypatch.setattr(reference, "segment_csr", None)  # a GPU sums points without it
    torch.manual_seed(0)
    coords, room = cloud(max(n, 1), 5)[:n], 40
    padded = torch.cat([coords, torch.randint(-9, 9, (room - n, 4))]).to(DEVICE)
    count = torch.tensor(n, device=DEVICE)
    net, other = (UNet3D(4, levels).to(DEVICE).train() for _ in range(2))
    plain = hash.HashPyramid(coords.to(DEVICE), levels)
    roomy = hash.HashPyramid(padded, levels, count)
    other.load_state_dict(net.state_dict())
    for a, b in zip(plain.keys, roomy.keys, strict=True):
        assert torch.equal(a, b[: len(a)])
        assert (b[len(a) :] < 0).all()
        assert len(b) == room
    assert torch.equal(plain.voxel, roomy.voxel[:n])
    feat, upstream = torch.randn(room, 1, device=DEVICE), torch.linspace(-1, 1, 4, device=DEVICE)
    out, found = net(feat[:n], plain), other(feat, roomy)
    for y in (
        out,
        found,
    ):  # what lies behind the points sends a gradient, too, and it must not count
        (y * upstream).sum().backward()
    assert_close(found[:n], out.cpu().double(), 1e-4)
    if n:  # without points BatchNorm's statistics are not a number
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.allclose(
                p.grad, q.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-6
            ), name
    for (name, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7), name
    other.eval()
    assert_close(other(feat, roomy)[:n], net.eval()(feat[:n], plain).cpu().double(), 1e-4)


def test_what_the_benchmark_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its padded copy gives the network's output and gradients; on a GPU its graph does."""
    monkeypatch.setenv("FTD_KERNELS", "triton")
    coords, net = cloud(20).to(DEVICE), UNet3D(4, 3).to(DEVICE).train()
    padded = speed.PaddedUNet(net, coords)
    assert len(padded.coords) == 25
    whole, padded_whole = (
        speed.passes(model, call, half=False)
        for model, call in (
            (net, lambda: net(torch.ones(20, 1, device=DEVICE), kernels.pyramid(coords, 3))),
            (padded, padded),
        )
    )
    forward, learn = padded_whole["forward"], padded_whole["forward+backward"]
    found = speed.replayed(forward) if DEVICE == "cuda" else forward()
    assert_close(found, whole["forward"]().cpu().double(), 1e-4)
    whole["forward+backward"]()
    (speed.captured(learn) if DEVICE == "cuda" else learn)()
    for ours, theirs in zip(padded.parameters(), net.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * float(theirs.grad.abs().max()) + 1e-6
        )


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: operations that tell the host a value or a size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "unique_consecutive",
            "bincount",
        ), name
        assert name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None, (
            "repeat_interleave without output_size"
        )
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not boolean, "an index of booleans"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_look_at_a_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, whatever asks a tensor for its value fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor is read by the host")

    if DEVICE == "cpu":
        for name in ("tolist", "item", "numpy", "cpu", "__int__"):
            monkeypatch.setattr(Tensor, name, refuse)
    try:
        if DEVICE == "cuda":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "a prototype feature"
                torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_padded_maps_do_not_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded maps, network and gradients run without one look at a number; plain maps do not."""
    coords, net = cloud(20).to(DEVICE), UNet3D(4, 3).to(DEVICE).train()
    feat, count = torch.ones(20, 1, device=DEVICE), torch.tensor(15, device=DEVICE)
    net(
        feat, hash.HashPyramid(coords, 3, count)
    ).sum().backward()  # compiles, and fills what is kept
    with no_look_at_a_number(monkeypatch):
        with NoWaiting():
            net(feat, hash.HashPyramid(coords, 3, count)).sum().backward()
        with pytest.raises((AssertionError, RuntimeError)), NoWaiting():
            hash.HashPyramid(coords, 3)


def test_padded_maps_are_tritons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTD_KERNELS", "torch")
    with pytest.raises(kernels.KernelError, match="pass the points alone"):
        kernels.pyramid(cloud(5), 3, torch.tensor(5))


@pytest.mark.parametrize("n", [0, 1, 50])
def test_row_gradient_repeats(n: int) -> None:
    """The gradient of reading pixels sums in a fixed order.

    A GPU sums runs; that has to equal the scatter of a CPU.
    """
    index = torch.randint(0, 20, (n,))
    x, grad = (
        torch.randn(20, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(n, 3, dtype=torch.float64),
    )
    (wanted,) = torch.autograd.grad(x.index_select(0, index), x, grad)
    count = torch.bincount(index, minlength=20)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    runs = (
        reference.segment_sum(grad, torch.argsort(index, stable=True), start)
        if n
        else torch.zeros(20, 3).double()
    )
    assert torch.allclose(runs, wanted)
    (ours,) = torch.autograd.grad(reference._SelectRows.apply(x, index), x, grad)
    assert torch.allclose(ours, wanted)


# ---- external attention --------------------------------------------------------------------------

SLOTS = 64
# Heads, their channels, points, dropout.
HEADS = [
    *((1, 8, 1, 0.0), (4, 2, 2, 0.0), (1, 10, 63, 0.0), (1, 14, 97, 0.0), (2, 12, 150, 0.0)),
    *((1, 8, 1, 0.3), (32, 2, 2, 0.3), (1, 40, 63, 0.3), (4, 10, 97, 0.3), (1, 28, 150, 0.3)),
]


def attention_inputs(heads: int, d: int, n: int) -> tuple[list[Tensor], Tensor]:
    """x, key and value, and a gradient of the output."""
    torch.manual_seed(n)
    shapes = (heads, d, n), (SLOTS, d), (d, SLOTS), (heads, d, n)
    *inputs, upstream = (torch.randn(shape) for shape in shapes)
    return inputs, upstream


def attended(inputs: list[Tensor], upstream: Tensor, p: float, seed: int = 0) -> list[Tensor]:
    """Output and gradients by Triton under a seed."""
    torch.manual_seed(seed)
    mine = [t.to(DEVICE).requires_grad_() for t in inputs]
    y = kernels.attend(mine[0], mine[1], mine[2], p)
    return [y.detach(), *torch.autograd.grad(y, mine, upstream.to(DEVICE))]


def kept(heads: int, n: int, p: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return check.kept_slots(heads, SLOTS, n, p, torch.device(DEVICE))


@pytest.mark.parametrize(("heads", "d", "n", "p"), HEADS)
def test_external_attention_and_gradients(
    heads: int, d: int, n: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under dropout, by the naive one with what forward kept: backward has to keep the same.

    Two blocks of points in each of two shares, where there are as many, the last one not full.
    """
    monkeypatch.setattr(attention, "SHARES", 2)
    inputs, upstream = attention_inputs(heads, d, n)
    factor = kept(heads, n, p).double() / (1 - round(256 * p) / 256) if p else None
    exact = [t.double().requires_grad_() for t in inputs]
    y = check.attention_of_heads(exact[0], exact[1], exact[2], factor)
    wanted = [y, *torch.autograd.grad(y, exact, upstream.double())]
    found = attended(inputs, upstream, p)
    for name, a, b in zip(("y", "x", "key", "value"), found, wanted, strict=True):
        assert a.dtype == torch.float32
        if n == 1 and name in ("x", "key"):  # a softmax over one point is 1 whatever they are
            assert a.abs().max() < 1e-5
        else:
            assert_close(a, b, 1e-5)


def test_attention_repeats() -> None:
    """Equal bytes, and other ones under another seed."""
    inputs, upstream = attention_inputs(2, 10, 97)
    found = attended(inputs, upstream, 0.2)
    for a, b in zip(found, attended(inputs, upstream, 0.2), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found, attended(inputs, upstream, 0.2, seed=1), strict=True):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 97])
def test_attention_keeps_its_range(n: int) -> None:
    """Logits whose exponentials would overflow, or vanish; all of a slot's may be far below 0."""
    (x, key, value), upstream = attention_inputs(1, 8, n)
    inputs = [x * 30, key * 3, value]
    exact = [t.double().requires_grad_() for t in inputs]
    y = check.attention_of_heads(exact[0], exact[1], exact[2], None)
    logits = inputs[1] @ inputs[0][0]
    assert logits.max() > 88
    assert n > 1 or logits.max(1).values.min() < -88
    wanted = [y, *torch.autograd.grad(y, exact, upstream.double())]
    for a, b in zip(attended(inputs, upstream, 0.0), wanted, strict=True):
        if b.abs().max() > 1e-12:  # a softmax over one point is 1
            assert_close(a, b, 3e-4)  # a logit of 1,000 is known to 6e-5
        else:
            assert a.abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_attention_lets_nothing_invalid_pass() -> None:
    """A NaN at one point is a NaN at all points of its head, and in every gradient of it."""
    inputs, upstream = attention_inputs(2, 8, 97)
    inputs[0][1, 3, 96] = float("nan")
    y, dx, dkey, dvalue = attended(inputs, upstream, 0.0)
    for t in (y, dx):
        assert t[0].isfinite().all()
        assert t[1].isnan().all()
    assert dkey.isnan().all()
    assert dvalue.isnan().all()


def philox(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    """Four words of Philox 4x32-10 (Salmon et al., 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("drop", [1, 90, 255])
def test_dropout_of_the_attention_is_philox(drop: int) -> None:
    """Every choice, by the definition; a byte equal to p is kept."""
    heads, n = 2, 40
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (), device=DEVICE))
    mask = kept(heads, n, drop / 256, seed=5)
    for head in range(heads):
        for point in range(n):
            words = [w for group in range(4) for w in philox((point, head, group, 0), seed)]
            wanted = [w >> shift & 255 >= drop for w in words for shift in (0, 8, 16, 24)]
            assert mask[head, :, point].tolist() == wanted


def test_dropout_of_the_attention_keeps_its_share() -> None:
    """Of all, of each slot, head and point; and neighbours are independent."""
    heads, n, p = 4, 130, 0.1
    mask, keep = kept(heads, n, p).double(), 1 - round(256 * p) / 256

    def near(found: Tensor, wanted: float, draws: int) -> bool:
        return bool(((found - wanted).abs() < 5 * (wanted * (1 - wanted) / draws) ** 0.5).all())

    assert near(mask.mean(), keep, mask.numel())
    assert near(mask.mean((0, 2)), keep, heads * n), "slots"
    assert near(mask.mean((1, 2)), keep, SLOTS * n), "heads"
    assert near(mask.mean((0, 1)), keep, heads * SLOTS), "points"
    others = [mask.roll(shift, axis) for axis in range(3) for shift in (1, 2)]
    for other in (*others, kept(heads, n, p, seed=1)):
        assert near((mask * other).mean(), keep * keep, mask.numel())


def test_without_dropout_nothing_is_drawn() -> None:
    inputs, upstream = attention_inputs(2, 8, 63)
    found = attended(inputs, upstream, 0.0, seed=0)
    drawn = torch.get_rng_state()
    for a, b in zip(found, attended(inputs, upstream, 1e-3, seed=1), strict=True):
        assert torch.equal(a, b)  # 1e-3 is 0 of 256
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(found[0], attended(inputs, upstream, 0.2)[0])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_attention_writes_nothing_outside(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard cells on both sides of everything that its kernels write keep their value."""
    whole: list[Tensor] = []

    def guarded(*shape: int, **_: Any) -> Tensor:
        whole.append(torch.full((4096 + math.prod(shape),), 7.0, device=DEVICE))
        return whole[-1][2048:-2048].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded(*t.shape))
    attended(*attention_inputs(3, 10, 97), p)
    assert len(whole) == 3 + 3
    for memory in whole:
        assert (memory[:2048] == 7).all()
        assert (memory[-2048:] == 7).all()
        assert (memory[2048:-2048] != 7).all()


def test_attention_in_any_memory_layout() -> None:
    inputs, upstream = attention_inputs(2, 10, 31)
    turned = [t.mT.contiguous().mT for t in inputs]
    assert not turned[0].is_contiguous()
    found = attended(turned, upstream.mT.contiguous().mT, 0.2)
    for a, b in zip(found, attended(inputs, upstream, 0.2), strict=True):
        assert torch.equal(a, b)


def test_attention_of_no_points() -> None:
    y, *gradients = attended(*attention_inputs(4, 8, 0), 0.2)
    assert y.shape == (4, 8, 0)
    assert not any(g.any() for g in gradients)


def test_attention_refuses() -> None:
    x, key, value = (torch.zeros(s, device=DEVICE) for s in ((2, 8, 5), (64, 8), (8, 64)))
    wide = [torch.zeros(s, device=DEVICE) for s in ((2, 65, 5), (64, 65), (65, 64))]
    for bad in (
        *(
            (x.double(), key, value),
            (x, key.t(), value),
            (x, key, value.t()),
            (x, key[:, 1:], value),
        ),
        *((x, key[:48], value[:, :48]), (x, key[:8], value[:, :8]), wide),
    ):
        with pytest.raises(ValueError, match="expected fp32"):
            kernels.attend(bad[0], bad[1], bad[2], 0.0)


def test_attention_does_not_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seed stays on the device."""
    inputs, upstream = attention_inputs(2, 8, 63)
    attended(inputs, upstream, 0.2)  # compiles
    mine = [t.to(DEVICE).requires_grad_() for t in inputs]
    upstream = upstream.to(DEVICE)
    with no_look_at_a_number(monkeypatch), NoWaiting():
        kernels.attend(mine[0], mine[1], mine[2], 0.2).backward(upstream)
    assert all(t.grad is not None for t in mine)


def test_the_module_attends_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient of the module are those by PyTorch; where Triton cannot, it is
    PyTorch."""
    calls, attend = [], attention.attend

    def spy(*args: Any) -> Tensor:
        calls.append(args[3])
        return attend(*args)

    monkeypatch.setattr(attention, "attend", spy)
    torch.manual_seed(0)
    module, (x, grad) = ExternalAttention(16, heads=8, dropout=0.2), torch.randn(2, 63, 16)
    found = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("FTD_KERNELS", choice)
        where = DEVICE if choice == "triton" else "cpu"
        module = module.to(where).eval()
        module.zero_grad()
        mine = x.to(where).requires_grad_()
        y = module(mine)
        y.backward(grad.to(where))
        assert mine.grad is not None
        named = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": mine.grad, **named})
    assert calls == [0.0]
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        if name == "expand.bias":  # like key.bias, it shifts all points of a slot alike
            assert found[1][name].abs().max() < 1e-6
        else:
            assert_close(found[1][name], wanted.double(), 1e-5)
    module.train()(x.to(DEVICE))
    assert calls == [0.0, 0.2]
    ExternalAttention(65, heads=4).to(DEVICE)(torch.randn(3, 65, device=DEVICE))
    module.double()(x.double().to(DEVICE))
    assert len(calls) == 2


def test_check_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Green here; red where other slots are dropped than forward shows."""
    g, device = torch.Generator().manual_seed(0), torch.device(DEVICE)
    before = torch.get_rng_state()
    assert check._attention(20, 0.2, device, g).ok
    assert torch.equal(torch.get_rng_state(), before), "the caller's chance is left alone"
    kept_of = check.kept_slots
    monkeypatch.setattr(check, "kept_slots", lambda *args: kept_of(*args).roll(1, 1))
    assert not check._attention(20, 0.2, device, g).ok
