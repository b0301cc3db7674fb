"""Kernel maps and sparse operations of the CPU path against kernels/naive.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ftdpp import kernels
from ftdpp.kernels import (
    Pyramid,
    check,
    naive,
    pixel_to_point,
    reference,
    sparse_conv,
    voxel_mean,
    voxel_to_point,
)
from ftdpp.kernels.maps import KernelMap, pack, unpack
from ftdpp.models import UNet3D

SIZES = [1, 2, 63, 97, 257]


def cloud(n: int, size: int = 8, batch: int = 2, low: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(n)
    xyz = torch.randint(low, low + size, (n, 3), generator=g)
    return torch.cat([torch.randint(0, batch, (n, 1), generator=g), xyz], 1).int()


@pytest.mark.parametrize("low", [-40000 // 2, -7, 0, 4000])
def test_pack_is_invertible_and_ordered(low: int) -> None:
    coords = cloud(200, 50, 3, low)
    keys = pack(coords)
    assert torch.equal(unpack(keys), coords)
    parents = unpack(keys >> 3, 1)
    assert torch.equal(parents[:, 1:], coords[:, 1:] // 2)
    assert torch.equal(parents[:, 0], coords[:, 0])
    order = keys.argsort()
    assert (coords[order, 0].diff() >= 0).all()


def test_pack_refuses_what_does_not_fit() -> None:
    for bad in ([0, 40000, 0, 0], [0, 0, -32768, 0], [0, 0, 0, 32767]):
        with pytest.raises(ValueError, match="must lie inside"):
            pack(torch.tensor([bad]))
    with pytest.raises(ValueError, match="batch indices"):
        pack(torch.tensor([[-1, 0, 0, 0]]))
    with pytest.raises(ValueError, match="integers b, x, y, z"):
        Pyramid(torch.zeros(3, 4))


def voxels(pyramid: Pyramid, level: int) -> list[naive.Voxel]:
    return [(b, x, y, z) for b, x, y, z in pyramid.coords(level).tolist()]


def triples(kernel_map: list[naive.Pairs]) -> set[tuple[int, int, int]]:
    """(offset, input row, output row) of every pair of a map of naive.py."""
    return {(k, i, o) for k, pairs in enumerate(kernel_map) for i, o in pairs}


@pytest.mark.parametrize("n", SIZES)
def test_maps_are_the_naive_ones(n: int) -> None:
    """Pair by pair, on three levels; and the voxels of a level are the parents of those below."""
    p = Pyramid(cloud(n, low=-3), 3)
    assert len(set(voxels(p, 0))) == len(voxels(p, 0))
    for level in range(3):
        coarse = voxels(p, level)
        assert pairs(p.same[level]) == triples(naive.submanifold_map(coarse))
        if level > 0:
            fine = voxels(p, level - 1)
            down = p.down[level - 1]
            assert sorted(coarse) == naive.coarser(fine)
            assert pairs(down) == triples(naive.strided_map(fine, coarse))
            assert pairs(down.transposed) == triples(naive.inverse_map(fine, coarse))


def pairs(kmap: KernelMap) -> set[tuple[int, int, int]]:
    """(offset, input row, output row) of every pair."""
    k = [k for k, size in enumerate(kmap.sizes) for _ in range(size)]
    found = list(zip(k, kmap.pair_in.tolist(), kmap.pair_out.tolist(), strict=True))
    if kmap.centre is not None:
        found += [(kmap.centre, i, i) for i in range(kmap.n_out)]
    assert len(set(found)) == len(found) == kmap.pairs
    for rows, order, start in (
        (kmap.pair_out, kmap.by_out, kmap.start_out),
        (kmap.pair_in, kmap.by_in, kmap.start_in),
    ):
        runs = torch.repeat_interleave(torch.arange(len(start) - 1), start.diff())
        assert torch.equal(rows[order], runs)
        assert torch.equal(order.sort().values, torch.arange(len(rows)))
    return set(found)


@pytest.mark.parametrize(("cin", "cout"), [(1, 16), (16, 1), (24, 48)])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["submanifold", "strided", "inverse"])
def test_convolution_is_the_naive_one(kind: str, n: int, cin: int, cout: int) -> None:
    """Output and all gradients in float64, with an upstream gradient that is not 1."""
    torch.manual_seed(n)
    p = Pyramid(cloud(n), 2)
    fine, coarse = voxels(p, 0), voxels(p, 1)
    kmap, kernel_map = {
        "submanifold": (p.same[0], naive.submanifold_map(fine)),
        "strided": (p.down[0], naive.strided_map(fine, coarse)),
        "inverse": (p.down[0].transposed, naive.inverse_map(fine, coarse)),
    }[kind]
    x = torch.randn(kmap.n_in, cin, dtype=torch.float64, requires_grad=True)
    w = torch.randn(kmap.offsets, cin, cout, dtype=torch.float64, requires_grad=True)
    found, wanted = sparse_conv(x, w, kmap), naive.convolution(x, w, kernel_map, kmap.n_out)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, (x, w), upstream) for y in (found, wanted))
    for ours, true in ((found, wanted), *zip(*gradients, strict=True)):
        assert torch.allclose(ours, true, rtol=1e-10, atol=1e-10)


def test_convolution_gradcheck_and_refusal() -> None:
    p = Pyramid(cloud(9, 3), 1)
    v = len(p.keys[0])
    x = torch.randn(v, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(27, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: sparse_conv(x, w, p.same[0]), (x, w))
    with pytest.raises(ValueError, match="do not fit a map"):
        sparse_conv(x[:-1], w, p.same[0])
    with pytest.raises(ValueError, match="do not fit a map"):
        sparse_conv(x, w[:8], p.same[0])


@pytest.mark.parametrize("compiled", [True, False])
def test_voxel_mean_and_back(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates are averaged; points get their voxel's row; with torch-scatter and without it."""
    if not compiled:
        monkeypatch.setattr(reference, "segment_csr", None)
    elif reference.segment_csr is None:
        pytest.skip("torch-scatter is not installed here")
    coords = cloud(300, 4)
    p = Pyramid(coords, 1)
    assert len(p.keys[0]) < 130
    x = torch.randn(300, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(p.coords()[p.voxel], coords)
    mean = voxel_mean(x, p)
    assert torch.allclose(mean, naive.voxel_mean(x, p.voxel.tolist(), len(p.keys[0])))
    back = voxel_to_point(mean, p)
    assert torch.equal(back, mean[p.voxel])
    assert torch.autograd.gradcheck(lambda x: voxel_to_point(voxel_mean(x, p), p) ** 2, (x,))


def test_pixel_to_point() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    image, pixel = torch.tensor([0, 1, 1, 1]), torch.tensor([[0, 0], [3, 4], [2, 1], [2, 1]])
    wanted = torch.stack([x[b, :, r, c] for b, (r, c) in zip(image, pixel, strict=True)])
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(pixel_to_point(x.contiguous(memory_format=layout), image, pixel), wanted)
    assert torch.autograd.gradcheck(lambda x: pixel_to_point(x, image, pixel), (x,))


def test_no_points() -> None:
    p = Pyramid(torch.zeros(0, 4, dtype=torch.int32), 3)
    assert [len(k) for k in p.keys] == [0, 0, 0]
    x = torch.zeros(0, 2, requires_grad=True)
    for offsets, kmap in ((27, p.same[1]), (8, p.down[0]), (8, p.down[0].transposed)):
        w = torch.randn(offsets, 2, 3, requires_grad=True)
        out = sparse_conv(voxel_mean(x, p), w, kmap)
        assert out.shape == (0, 3)
        out.sum().backward()
        assert w.grad is not None
        assert not w.grad.any()


def test_order_of_points_does_not_matter() -> None:
    coords = cloud(150)
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    a, b = Pyramid(coords, 2), Pyramid(coords[shuffled], 2)
    assert torch.equal(a.keys[0], b.keys[0])
    assert torch.equal(a.voxel[shuffled], b.voxel)
    assert torch.equal(a.same[0].pair_in, b.same[0].pair_in)


def test_neighbours_do_not_wrap_around_the_grid() -> None:
    """Voxels at opposite edges of the key's range are no neighbours, on any level."""
    far = 2**15 - 2
    ends = (-far, far)
    coords = torch.tensor([[0, x, y, z] for x in ends for y in ends for z in ends])
    for level, same in enumerate(Pyramid(coords, 7).same):
        assert same.pairs == 8, level


def test_check_is_green_here_and_red_where_an_operation_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FTD_KERNELS", raising=False)
    cpu = torch.device("cpu")
    assert all(c.ok for c in check.run(cpu))
    right = kernels.sparse_conv

    def broken(change: Callable[[Tensor], Tensor]) -> None:
        monkeypatch.setattr(kernels, "sparse_conv", lambda x, w, kmap: change(right(x, w, kmap)))

    broken(lambda y: y * 1.001)
    assert [c.ok for c in check.run(cpu)] == [False] * 3 + [True] * 2
    broken(lambda y: y * float("nan"))
    assert not check.run(cpu)[0].ok
    broken(lambda y: y + (0 * y).sqrt())
    assert not check.run(cpu)[0].ok, "only the gradients are no numbers"
    broken(lambda y: y + 1e-6 * torch.rand(()))
    assert not check.run(cpu)[0].ok, "two runs differ"


def test_the_check_has_the_channels_that_training_runs() -> None:
    """On a GPU alone: their dense truth takes a CPU seconds."""
    cpu, g = torch.device("cpu"), torch.Generator().manual_seed(0)
    points = torch.randint(0, check.GRID, (300, 4), generator=g)
    points[:, 0] %= 2
    p = kernels.pyramid(points, 2)
    layers = {tuple(w.shape) for w in UNet3D(16).parameters() if w.ndim == 3}
    for kind, kmap in (("submanifold", p.same[0]), ("strided", p.down[0])):
        pairs = [pair for name, pair in check.TRAINED if name == kind]
        assert pairs and {(kmap.offsets, *pair) for pair in pairs} <= layers
        found = check._convolution(kind, kmap, "fp32", pairs[0], p, cpu, g)
        assert found.ok and "{} -> {}".format(*pairs[0]) in found.what


# PyTorch's compiler looks at .grad itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_network_is_the_same() -> None:
    """torch.compile compiles what lies between the sparse operations, and leaves those alone.

    Sizes may change from call to call.
    """
    torch.manual_seed(0)
    net = UNet3D(4, 2).train()
    compiled = torch.compile(net, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in (50, 70):
        p, feat = Pyramid(cloud(n), 2), torch.randn(n, 1)
        found = []
        for run in (net, compiled):
            net.zero_grad()
            out = run(feat, p)
            out.square().sum().backward()
            found.append([out, *(w.grad for w in net.parameters())])
        for a, b in zip(*found, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FTD_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    assert kernels.backend("cpu")[0] == "torch"
    assert "torch-scatter" in kernels.backend("cpu")[1]
    monkeypatch.setenv("CC", "cc")
    assert kernels.backend("cuda")[0] == "triton"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert kernels.backend("cuda")[0] == "torch"
    assert "C compiler" in kernels.backend("cuda")[1]
    monkeypatch.setenv("FTD_KERNELS", "torch")
    assert kernels.backend("cuda") == ("torch", "FTD_KERNELS=torch")
    monkeypatch.setenv("FTD_KERNELS", "triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.backend("cpu")
    monkeypatch.setenv("FTD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected torch or triton"):
        kernels.backend("cpu")
