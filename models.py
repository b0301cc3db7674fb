"""Trunks that several systems share: a ResNet-34 U-Net for images, a sparse U-Net for points.

    image  -> UNet2D -> (B, C2, H, W)
    coords -> UNet3D -> (N, C3)

Parameter names of the 2D encoder are torchvision's, so its ImageNet weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels
from ftdpp.kernels import KernelMap, Pyramid, sparse_conv, voxel_mean, voxel_to_point

# ---- 2D -----------------------------------------------------------------------------------------


def shortcut(cin: int, cout: int, stride: int) -> nn.Module | None:
    """What a residual block puts its input through, where shapes differ: a 1x1 convolution."""
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class BasicBlock(nn.Module):
    """Residual block of ResNet-18/34: two 3x3 convolutions (He et al., 2016, figure 5 left)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + identity, inplace=True)


def _stage(cin: int, cout: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(cin, cout, stride)
    return nn.Sequential(first, *(BasicBlock(cout, cout, 1) for _ in range(blocks - 1)))


def _conv_bn_relu(conv: nn.Module, cout: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def plus(x: Tensor, added: Sequence[Tensor], stage: int) -> Tensor:
    """A stage's features with what another network adds to it, if it does."""
    if not added:
        return x
    more = added[stage][..., : x.shape[-2], : x.shape[-1]]
    return x + more.contiguous(memory_format=torch.channels_last)  # the trunks' own layout


class Trunk(nn.Module):
    """A network of images that can start from ImageNet weights."""

    IMAGENET: ClassVar[tuple[str, str]]  # name and address of these weights
    BESIDE: ClassVar[tuple[str, ...]]  # how the names of what is not in them begin
    stages: tuple[int, int, int]  # channels of the encoder at 1/2, 1/4, 1/8 of the image


class UNet2D(Trunk):
    """ResNet-34 U-Net at input resolution: (B, 3, H, W) in [0, 1] -> (B, width, H, W).

    The encoder is torchvision's ResNet-34 but for the stride of `conv1`, which is 1; `width` 64 is
    the paper's. Images are zero-padded at the right and bottom to multiples of 16 and the features
    cropped back. There is no mean/std normalisation.
    """

    IMAGENET = ("ResNet-34", "https://download.pytorch.org/models/resnet34-b627a593.pth")
    BESIDE = ("up.", "merge.")  # the decoder

    def __init__(self, width: int = 64, dropout: float = 0.4) -> None:
        super().__init__()
        w = width
        self.stages = (w, 2 * w, 4 * w)
        self.conv1 = nn.Conv2d(3, w, 7, 1, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = _stage(w, w, 3, 1)
        self.layer2 = _stage(w, 2 * w, 4, 2)
        self.layer3 = _stage(2 * w, 4 * w, 6, 2)
        self.layer4 = _stage(4 * w, 8 * w, 3, 2)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The decoder, created after the loop, keeps PyTorch's default initialisation as released.
        # Channels of the skips at 1/1, 1/2, 1/4, 1/8, and of the deepest stage:
        wide = [w, w, 2 * w, 4 * w, 8 * w]
        self.up = nn.ModuleList(
            _conv_bn_relu(nn.ConvTranspose2d(wide[i + 1], wide[i], 2, 2), wide[i]) for i in range(4)
        )
        self.merge = nn.ModuleList(
            nn.Conv2d(2 * w, w, 3, padding=1)
            if i == 0
            else _conv_bn_relu(nn.Conv2d(2 * wide[i], wide[i], 3, padding=1), wide[i])
            for i in range(4)
        )

    def forward(self, image: Tensor, added: Sequence[Tensor] = ()) -> Tensor:
        """added: (B, C, h, w) features of the sizes of `stages`, added to the encoder's."""
        h, w = image.shape[-2:]
        return self.pyramid(image, added)[0][..., :h, :w]

    def pyramid(self, image: Tensor, added: Sequence[Tensor], finest: int = 0) -> list[Tensor]:
        """The decoder's maps at 1/2^finest ... 1/8 of the padded image, the encoder's at 1/16."""
        h, w = image.shape[-2:]
        x = F.pad(image, (0, -w % 16, 0, -h % 16))
        skips = [F.relu(self.bn1(self.conv1(x)), inplace=True)]  # 1/1
        skips.append(plus(self.layer1(F.max_pool2d(skips[0], 3, 2, 1)), added, 0))  # 1/2
        skips.append(plus(self.layer2(skips[1]), added, 1))  # 1/4
        skips.append(self.dropout(plus(self.layer3(skips[2]), added, 2)))  # 1/8
        maps = [self.dropout(self.layer4(skips[3]))]  # 1/16
        for i in reversed(range(finest, 4)):
            maps.append(self.merge[i](torch.cat([skips[i], self.up[i](maps[-1])], 1)))
        return maps[::-1]


# ---- 3D -----------------------------------------------------------------------------------------


class SparseConv(nn.Module):
    """Weights (K, Cin, Cout) of a sparse convolution without bias.

    K = 27 offsets for a submanifold convolution, 8 for a strided or an inverse one.
    """

    def __init__(self, offsets: int, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(offsets, cin, cout) * (2.0 / (cin * offsets)) ** 0.5)

    def forward(self, x: Tensor, kmap: KernelMap) -> Tensor:
        return sparse_conv(x, self.weight, kmap)


class NormReLUConv(nn.Module):
    """BatchNorm, ReLU, sparse convolution: the only building block of the sparse U-Net."""

    def __init__(self, offsets: int, cin: int, cout: int) -> None:
        super().__init__()
        self.norm = BatchNormReLU(cin)
        self.conv = SparseConv(offsets, cin, cout)

    def forward(self, x: Tensor, kmap: KernelMap) -> Tensor:
        return self.conv(self.norm(x, kmap.live), kmap)


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over rows (N, C). One row has no variance: it takes what is known so far."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) > 1:
            return super().forward(x)
        known = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *known, False, 0.0, self.eps)


class BatchNormReLU(RowNorm):
    """BatchNorm over voxels, (V, C), followed by ReLU, with SparseConvNet's constants."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.01)

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """live: () int64, in the maps of a GPU: how many rows, the first ones, are voxels."""
        if self.training and live is not None:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            running = self.running_mean, self.running_var, self.num_batches_tracked
            return kernels.batch_norm_relu(
                x, self.weight, self.bias, live, running, self.momentum, self.eps
            )
        return F.relu(super().forward(x), inplace=True)


class UNet3D(nn.Module):
    """Sparse U-Net of SparseConvNet: points -> (N, width).

    Level l has (l + 1) * width channels. Going down: block, strided convolution; the deepest level
    is one block; going up: inverse convolution, concatenation [identity, upsampled], block. A block
    is norm-ReLU-convolution, not residual.
    """

    def __init__(self, width: int = 16, levels: int = 7, cin: int = 1) -> None:
        super().__init__()
        c = [width * (level + 1) for level in range(levels)]
        self.levels = levels
        self.stem = SparseConv(27, cin, width)
        self.encode = nn.ModuleList(NormReLUConv(27, a, a) for a in c)
        self.down = nn.ModuleList(NormReLUConv(8, a, b) for a, b in pairwise(c))
        self.up = nn.ModuleList(NormReLUConv(8, b, a) for a, b in pairwise(c))
        self.decode = nn.ModuleList(NormReLUConv(27, 2 * a, a) for a in c[:-1])
        self.norm = BatchNormReLU(width)

    def forward(self, feat: Tensor, pyramid: Pyramid) -> Tensor:
        """feat (N, cin) of points, averaged in their voxels -> (N, width), equal within a voxel."""
        x = self.stem(voxel_mean(feat, pyramid), pyramid.same[0])
        skips = []
        for level in range(self.levels - 1):
            x = self.encode[level](x, pyramid.same[level])
            skips.append(x)
            x = self.down[level](x, pyramid.down[level])
        x = self.encode[-1](x, pyramid.same[-1])
        for level in reversed(range(self.levels - 1)):
            x = self.up[level](x, pyramid.down[level].transposed)
            x = self.decode[level](torch.cat([skips[level], x], 1), pyramid.same[level])
        return voxel_to_point(self.norm(x, pyramid.same[0].live), pyramid)


# ---- teacher ------------------------------------------------------------------------------------


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float = 0.999) -> None:
    """EMA of the parameters: teacher = a * teacher + (1 - a) * student.

        a = min(1 - 1 / (step + 1), decay),  step = 1, 2, ...

    Until step 1 / (1 - decay) this is the plain mean of the teacher's own start and of the students
    so far. Buffers are left alone: the teacher runs in train mode and normalises with the
    statistics of its own batch.
    """
    weight = 1 - min(1 - 1 / (step + 1), decay)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight)
