"""Shapes, parameter counts and the properties that the method rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn as nn

from ftdpp import models
from ftdpp.kernels import Pyramid
from ftdpp.models import (
    CBAM,
    CrossModal,
    ExternalAttention,
    SparseBatchNorm,
    UNet2D,
    UNet3D,
    _Attend,
    imagenet_weights,
    keep_mask,
    update_teacher,
)


def count(module: nn.Module | None) -> int:
    assert module is not None
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("classes", "fusion", "two", "three"), [
    (6, True, 23_628_364, 2_688_860), (10, True, 23_628_884, 2_688_996),
    (6, False, 23_614_924, 2_688_860), (10, False, 23_615_444, 2_688_996),
])  # fmt: skip
def test_parameter_counts(classes: int, fusion: bool, two: int, three: int) -> None:
    net = CrossModal(classes, fusion=fusion)
    assert (count(net.net_2d), count(net.net_3d)) == (two, three)
    if fusion:
        assert count(net.fusion) == 104_775


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (30, 47), (1, 1)])
def test_unet2d_pads_and_crops(size: tuple[int, int]) -> None:
    net = UNet2D(16).eval()
    image = torch.rand(2, 3, *size)
    out = net(image)
    assert out.shape == (2, 16, *size)
    padded = torch.zeros(2, 3, *(-(-s // 16) * 16 for s in size))
    padded[..., : size[0], : size[1]] = image
    assert torch.allclose(out, net(padded)[..., : size[0], : size[1]], atol=1e-6)


def test_imagenet_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder carries torchvision's names; a file of another network is refused."""
    net = UNet2D(16)
    names = set(net.state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.1.bias",
        "layer4.2.bn2.weight",
    } <= names
    state = {
        k: torch.rand_like(v) if v.is_floating_point() else v
        for k, v in net.state_dict().items()
        if not k.startswith(("up", "merge"))
    }
    state["fc.weight"] = torch.zeros(1000, 512)
    torch.save(state, tmp_path / "resnet34.pth")
    before = net.up[0][0].weight.clone()  # type: ignore[index]
    net.load_state_dict(imagenet_weights(16, tmp_path / "resnet34.pth"), strict=False)
    assert torch.equal(net.state_dict()["layer3.5.conv2.weight"], state["layer3.5.conv2.weight"])
    assert torch.equal(net.up[0][0].weight, before)  # type: ignore[index]
    with pytest.raises(ValueError, match="width 32"):
        imagenet_weights(32, tmp_path / "resnet34.pth")
    for content in ([1, 2], {"conv1.weight": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="not torchvision's"):
            imagenet_weights(16, tmp_path / "other.pth")

    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"no network.*--pretrained FILE"):
        imagenet_weights(64)


def test_misfits() -> None:
    wanted = {name: torch.zeros(2, 3) for name in "abc"}
    assert models.misfits({"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "d": torch.zeros(1)}, wanted) == ["b", "c", "d"]
    assert models.misfits(wanted, wanted) == []


@pytest.mark.parametrize("n", [1, 2, 97])
def test_unet3d_any_number_of_points(n: int) -> None:
    """One voxel has no variance: the statistics known so far are used, nothing is nan, nothing is learned from it."""
    coords = torch.cat([torch.zeros(n, 1), torch.randint(0, 200, (n, 3))], 1).int()
    net = UNet3D(8, 7).train()
    out = net(torch.ones(n, 1), Pyramid(coords))
    out.sum().backward()
    assert out.shape == (n, 8)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in net.buffers())


def test_points_of_a_voxel_agree_and_frames_do_not_mix() -> None:
    coords = torch.randint(0, 30, (80, 4)).int()
    coords[:, 0] = torch.arange(80) % 2
    coords[1] = coords[3]
    net = UNet3D(8, 4).eval()
    feat = torch.ones(80, 1)
    out = net(feat, Pyramid(coords, 4))
    assert torch.equal(out[1], out[3])
    alone = coords[:, 0] == 1
    assert torch.allclose(net(feat[alone], Pyramid(coords[alone], 4)), out[alone], atol=1e-6)


def test_sparse_batch_norm_constants() -> None:
    norm = SparseBatchNorm(3)
    x = torch.randn(50, 3) * 3 + 1
    out = norm(x.clone())
    assert torch.allclose(out, torch.relu((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-4).sqrt()), atol=1e-5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, 0.01 * x.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, 0.99 + 0.01 * x.var(0), atol=1e-5)


def published_attention(ea: ExternalAttention, x: torch.Tensor) -> torch.Tensor:
    """External attention as its paper writes it, by autograd: softmax over points, then division by the sum over slots."""
    n, width = len(x), ea.expand.out_features
    attention = ea.key(ea.expand(x).view(n, ea.heads, -1).transpose(0, 1)).softmax(1)
    attention = attention / (1e-9 + attention.sum(2, keepdim=True))
    return ea.project(ea.value(attention).transpose(0, 1).reshape(n, width))


@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_external_attention_as_published(n: int) -> None:
    """Output and every gradient, under an upstream gradient that is not 1."""
    torch.manual_seed(0)
    ea = ExternalAttention(16, heads=8).double().eval()
    x = torch.randn(n, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(n, 16, dtype=torch.float64)
    named = {"x": x, **dict(ea.named_parameters())}
    del named["key.bias"]  # without effect: see ExternalAttention
    inputs = list(named.values())
    wanted, found = published_attention(ea, x), ea(x)
    assert torch.allclose(found, wanted, atol=1e-12)
    gradients = (torch.autograd.grad(y, inputs, grad) for y in (found, wanted))
    for name, a, b in zip(named, *gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
    if n == 37:
        assert not torch.allclose(ea(x[:20]), wanted[:20], atol=1e-4), "a point's output depends on the batch"


def test_external_attention_without_points() -> None:
    x = torch.zeros(0, 16, requires_grad=True)
    ea = ExternalAttention(16, heads=8)
    ea(x).sum().backward()
    assert ea(x).shape == (0, 16)


def test_attention_dropout_keeps_the_mean_and_its_gradient_is_that_of_what_was_kept() -> None:
    torch.manual_seed(0)
    x, key, value = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 50), (64, 8), (8, 64)))
    plain = _Attend.apply(x, key, value, 0.0)
    many = torch.stack([_Attend.apply(x, key, value, 0.5) for _ in range(400)])
    assert torch.allclose(many.mean(0), plain, atol=5 * many.std(0).max().item() / 20)
    assert many.std(0).min() > 0

    def seeded(*args: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return _Attend.apply(*args, 0.3)

    assert torch.autograd.gradcheck(seeded, (x, key, value))


def test_all_heads_at_once_equal_head_by_head() -> None:
    """The form that a GPU runs, against the one that a CPU runs."""
    torch.manual_seed(0)
    x, key, value = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 8, 50), (64, 8), (8, 64)))
    grad = torch.randn(3, 8, 50, dtype=torch.float64)
    together = _Attend.apply(x, key, value, 0.0)
    apart = torch.stack([_Attend.apply(h, key, value, 0.0) for h in x])
    assert torch.allclose(together, apart)
    for a, b in zip(*(torch.autograd.grad(y, (x, key, value), grad) for y in (together, apart)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
def test_keep_mask_rate(p: float) -> None:
    mask, keep = keep_mask((501, 203), p, torch.device("cpu"))
    assert mask.shape == (501, 203)
    assert set(mask.unique().tolist()) <= {0, 1}
    assert abs(keep - (1 - p)) <= 1 / 512
    assert abs(mask.float().mean().item() - keep) < 4 * (0.25 / mask.numel()) ** 0.5
    torch.manual_seed(5)
    again = [keep_mask((7, 9), 0.5, torch.device("cpu"))[0] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(again[0], keep_mask((7, 9), 0.5, torch.device("cpu"))[0]), "the seed decides"
    assert not torch.equal(*again), "and each call draws anew"


def test_cbam_residual() -> None:
    net = CBAM(8)
    nn.init.zeros_(net.channel[2].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net.spatial.weight)
    nn.init.zeros_(net.spatial.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 5, 6)
    assert torch.allclose(net(x), 1.25 * x)  # both gates sigmoid(0)


def test_fusion_stops_gradients() -> None:
    net = CrossModal(6, 16, 8)
    assert net.fusion is not None
    frame, pixel = torch.zeros(9, dtype=torch.int64), torch.randint(0, 5, (9, 2))
    map_2d, feat_3d = torch.randn(1, 16, 5, 5, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    out = net.fusion(map_2d, feat_3d, frame, pixel)
    assert out.shape == (9, 24)
    out.sum().backward()
    assert map_2d.grad is None
    assert feat_3d.grad is None


def test_teacher_is_the_mean_of_its_start_and_all_students() -> None:
    torch.manual_seed(0)
    student, teacher = nn.BatchNorm1d(4), nn.BatchNorm1d(4).requires_grad_(False)
    nn.init.normal_(teacher.weight)
    values = [teacher.weight.clone()]
    for step in range(1, 8):
        nn.init.normal_(student.weight)
        student.running_mean.fill_(step)  # type: ignore[union-attr]
        values.append(student.weight.detach().clone())
        update_teacher(teacher, student, step)
        assert torch.allclose(teacher.weight, torch.stack(values).mean(0), atol=1e-6)
    assert not teacher.running_mean.any(), "buffers are not averaged"  # type: ignore[union-attr]
    before = teacher.weight.clone()
    update_teacher(teacher, student, 10**6)
    assert torch.allclose(teacher.weight, 0.999 * before + 0.001 * student.weight, atol=1e-6)
    before = teacher.weight.clone()
    update_teacher(teacher, student, 100, 0.9)
    assert torch.allclose(teacher.weight, 0.9 * before + 0.1 * student.weight, atol=1e-6)


def test_bf16_trunks_and_fp32_islands() -> None:
    """Autocast reaches the trunks and nothing else: logits are fp32 and near, fusion, heads and weights are fp32."""
    torch.manual_seed(0)
    exact = CrossModal(6, 16, 8, dropout=(0.0, 0.0)).train()
    half = CrossModal(6, 16, 8, dropout=(0.0, 0.0), precision="bf16").train()
    half.load_state_dict(exact.state_dict())
    seen: dict[str, torch.dtype] = {}
    assert half.fusion is not None
    for name, module in half.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | ExternalAttention | CBAM):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    coords = torch.cat([torch.zeros(200, 1), torch.randint(0, 12, (200, 3))], 1).int()
    image, pixel = torch.rand(1, 3, 32, 32), torch.randint(0, 32, (200, 2))
    wanted, found = exact(image, pixel, coords), half(image, pixel, coords)
    trunk = {dtype for name, dtype in seen.items() if ".trunk." in name}
    rest = {dtype for name, dtype in seen.items() if ".trunk." not in name}
    assert (trunk, rest) == ({torch.bfloat16}, {torch.float32})
    assert "fusion.cbam" in seen and "fusion.attend_2d" in seen and "net_2d.main" in seen
    assert torch.equal(found.main_3d, wanted.main_3d), "on a CPU the sparse trunk stays exact"
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.1 * b.abs().max()
    assert not torch.equal(found.main_2d, wanted.main_2d)
    torch.stack([t.square().mean() for t in found]).sum().backward()
    for name, p in half.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
