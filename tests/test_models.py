"""Shapes, parameter counts and the properties that the method rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn as nn

from ftdpp.kernels import Pyramid
from ftdpp.models import BatchNormReLU, UNet2D, UNet3D, update_teacher
from ftdpp.pretrained import imagenet_weights, misfits


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
    before = net.up[0][0].weight.clone()
    net.load_state_dict(imagenet_weights(UNet2D(16), tmp_path / "resnet34.pth"), strict=False)
    assert torch.equal(net.state_dict()["layer3.5.conv2.weight"], state["layer3.5.conv2.weight"])
    assert torch.equal(net.up[0][0].weight, before)
    with pytest.raises(ValueError, match="this width"):
        imagenet_weights(UNet2D(32), tmp_path / "resnet34.pth")
    for content in ([1, 2], {"conv1.weight": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="not torchvision's"):
            imagenet_weights(UNet2D(16), tmp_path / "other.pth")

    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"no network.*--pretrained FILE"):
        imagenet_weights(UNet2D(64))


def test_misfits() -> None:
    wanted = {name: torch.zeros(2, 3) for name in "abc"}
    assert misfits(
        {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "d": torch.zeros(1)}, wanted
    ) == ["b", "c", "d"]
    assert misfits(wanted, wanted) == []


@pytest.mark.parametrize("n", [1, 2, 97])
def test_unet3d_any_number_of_points(n: int) -> None:
    """One voxel has no variance: the statistics known so far are used, nothing is nan, nothing is
    learned from it."""
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
    norm = BatchNormReLU(3)
    x = torch.randn(50, 3) * 3 + 1
    out = norm(x.clone())
    assert torch.allclose(
        out, torch.relu((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-4).sqrt()), atol=1e-5
    )
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, 0.01 * x.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, 0.99 + 0.01 * x.var(0), atol=1e-5)


def test_teacher_is_the_mean_of_its_start_and_all_students() -> None:
    torch.manual_seed(0)
    student, teacher = nn.BatchNorm1d(4), nn.BatchNorm1d(4).requires_grad_(False)
    nn.init.normal_(teacher.weight)
    values = [teacher.weight.clone()]
    for step in range(1, 8):
        nn.init.normal_(student.weight)
        student.running_mean.fill_(step)
        values.append(student.weight.detach().clone())
        update_teacher(teacher, student, step)
        assert torch.allclose(teacher.weight, torch.stack(values).mean(0), atol=1e-6)
    assert not teacher.running_mean.any(), "buffers are not averaged"
    before = teacher.weight.clone()
    update_teacher(teacher, student, 10**6)
    assert torch.allclose(teacher.weight, 0.999 * before + 0.001 * student.weight, atol=1e-6)
    before = teacher.weight.clone()
    update_teacher(teacher, student, 100, 0.9)
    assert torch.allclose(teacher.weight, 0.9 * before + 0.1 * student.weight, atol=1e-6)
