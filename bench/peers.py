"""The sparse U-Net by other libraries, with the same weights on the same voxels, for comparison.

Neither library is a dependency; a class here wants its own installed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ftdpp import kernels
from ftdpp.models import UNet3D
from ftdpp.released import released_name


def installed(net: UNet3D, coords: Tensor, half: bool) -> list[Any]:
    """The network on points (N, 4) by every library that is there: modules with a `name`."""
    found: list[Any] = []
    if importlib.util.find_spec("spconv") is not None:
        found.append(SpconvUNet(net, kernels.pyramid(coords)))
    # SparseConvNet has no half precision.
    if importlib.util.find_spec("sparseconvnet") is not None and not half:
        found.append(SparseConvNetUNet(net, coords))
    return found


def deviation(found: Tensor, wanted: Tensor) -> str:
    """How far another output is from ours, as a share of the largest value, in words."""
    share = (found - wanted).abs().max() / wanted.abs().max()
    return f"output differs by {share.item():.0e}"


class SpconvUNet(nn.Module):
    """By spconv. It gets the voxels ready-made: no points to average, no rows to copy back."""

    norms: Any  # our network, for its BatchNorms
    stem: Any
    encode: Any
    down: Any
    up: Any
    decode: Any

    def __init__(self, net: UNet3D, pyramid: kernels.Pyramid) -> None:
        super().__init__()
        import spconv.constants
        import spconv.pytorch as spconv

        if not torch.cuda.is_available():
            # Its CPU backward pass asks for a CUDA stream and does not use it. This changes the
            # whole process.
            torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
        tf32 = kernels.products() == "tf32"
        spconv.constants.SPCONV_ALLOW_TF32 = tf32
        self.norms, self.levels = copy.deepcopy(net), net.levels

        def same(cin: int, cout: int, key: str) -> Any:
            return spconv.SubMConv3d(cin, cout, 3, bias=False, indice_key=key)

        def down(cin: int, cout: int, key: str) -> Any:
            return spconv.SparseConv3d(cin, cout, 2, 2, bias=False, indice_key=key)

        def up(cin: int, cout: int, key: str) -> Any:
            return spconv.SparseInverseConv3d(cin, cout, 2, bias=False, indice_key=key)

        def conv(kind: Callable[[int, int, str], Any], key: str, weight: Tensor) -> Any:
            cin, cout = weight.shape[1:]
            made = kind(cin, cout, key)
            # Ours is (K, Cin, Cout), the offsets in the order x, y, z.
            with torch.no_grad():
                made.weight.copy_(weight.permute(2, 0, 1).reshape(made.weight.shape))
            return made.to(weight.device)

        w = dict(net.named_parameters())
        steps = range(net.levels - 1)
        self.stem = conv(same, "same0", w["stem.weight"])
        self.encode = nn.ModuleList(
            conv(same, f"same{i}", w[f"encode.{i}.conv.weight"]) for i in range(net.levels)
        )
        self.down = nn.ModuleList(conv(down, f"down{i}", w[f"down.{i}.conv.weight"]) for i in steps)
        self.up = nn.ModuleList(conv(up, f"down{i}", w[f"up.{i}.conv.weight"]) for i in steps)
        self.decode = nn.ModuleList(
            conv(same, f"same{i}", w[f"decode.{i}.conv.weight"]) for i in steps
        )

        voxels = pyramid.coords()
        # A multiple of every stride, so that both have the same coarse voxels.
        low = voxels[:, 1:].amin(0) >> 6 << 6
        at = torch.cat([voxels[:, :1], voxels[:, 1:] - low], 1).contiguous()
        size = [(int(n) + 64) // 64 * 64 for n in at[:, 1:].amax(0)]
        batch = int(at[:, 0].max()) + 1
        feat = torch.ones(len(at), 1, device=at.device)
        self.input = lambda: spconv.SparseConvTensor(feat, at, size, batch)
        with torch.no_grad():
            wanted = net(torch.ones(len(pyramid.voxel), 1, device=at.device), pyramid)
            off = deviation(self()[pyramid.voxel], wanted)
        self.name = f"spconv {importlib.metadata.version('spconv')} ({off})"

    def forward(self) -> Tensor:
        """(V, width). Each call builds the maps anew; spconv does not reuse strided ones."""
        x = self.stem(self.input())
        skips = []
        for level in range(self.levels - 1):
            x = self.encode[level](x.replace_feature(self.norms.encode[level].norm(x.features)))
            skips.append(x.features)
            x = self.down[level](x.replace_feature(self.norms.down[level].norm(x.features)))
        x = self.encode[-1](x.replace_feature(self.norms.encode[-1].norm(x.features)))
        for level in reversed(range(self.levels - 1)):
            x = self.up[level](x.replace_feature(self.norms.up[level].norm(x.features)))
            joined = torch.cat([skips[level], x.features], 1)
            x = self.decode[level](x.replace_feature(self.norms.decode[level].norm(joined)))
        return self.norms.norm(x.features)


class SparseConvNetUNet(nn.Module):
    """By SparseConvNet, as xMUDA and FtD++ build it, from the same points (N, 4)."""

    def __init__(self, net: UNet3D, coords: Tensor) -> None:
        super().__init__()
        import sparseconvnet as scn

        width = net.norm.num_features
        at = coords[:, [1, 2, 3, 0]].long().cpu()  # it reads the coordinates on the host
        # A multiple of every stride, so that both have the same coarse voxels.
        at[:, :3] -= at[:, :3].amin(0) >> 6 << 6
        size = 1 << int(at[:, :3].max()).bit_length()
        self.net = scn.Sequential(
            scn.InputLayer(3, size, mode=4),  # 4: the mean of a voxel's points
            scn.SubmanifoldConvolution(3, 1, width, 3, False),
            scn.UNet(3, 1, [width * (level + 1) for level in range(net.levels)], False),
            scn.BatchNormReLU(width),
            scn.OutputLayer(3),
        ).to(coords.device)
        ours = net.state_dict()
        with torch.no_grad():
            for name, tensor in self.net.state_dict().items():
                our_name = released_name("3d", f"sparseModel.{name}")
                tensor.copy_(ours[our_name.removeprefix("net_3d.trunk.")].view_as(tensor))
            feat = torch.ones(len(coords), 1, device=coords.device)
            self.input = lambda: [at, feat]
            off = deviation(self(), net(feat, kernels.pyramid(coords)))
        self.name = f"SparseConvNet ({off})"

    def forward(self) -> Tensor:
        """(N, width). Each call builds the maps anew."""
        return self.net(self.input())
