"""DeepLabV2 (Chen et al., 2018), with which the adaptation of images is often reported.

    image (B, 3, H, W) -> ResNet101 -> (B, 32 width, H/8, W/8) -> ASPP -> scores (B, K, H/8, W/8)

Parameter names of the trunk are torchvision's, so its ImageNet weights load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp.models import Trunk, plus, shortcut


class Bottleneck(nn.Module):
    """Residual block of ResNet-50 and deeper: 1x1, 3x3, 1x1 (He et al., 2016, figure 5 right).

    The stride lies in the 3x3 convolution, as in torchvision.
    """

    def __init__(self, cin: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        cout = 4 * width
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + identity, inplace=True)


def _stage(cin: int, width: int, blocks: int, stride: int, dilations: Sequence[int]) -> nn.Module:
    """dilations: of the first block and of the others."""
    first = Bottleneck(cin, width, stride, dilations[0])
    return nn.Sequential(
        first, *(Bottleneck(4 * width, width, 1, dilations[1]) for _ in range(blocks - 1))
    )


class ResNet101(Trunk):
    """ResNet-101 at output stride 8: images (B, 3, H, W) in [0, 1] -> (B, 32 width, H/8, W/8).

    Its last two stages are dilated by 2 and 4 instead of strided. Images are normalised with
    ImageNet's mean and standard deviation; `width` 64 is the paper's.
    """

    IMAGENET = ("ResNet-101", "https://download.pytorch.org/models/resnet101-63fe2227.pth")
    BESIDE = ("mean", "std")
    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, w, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = _stage(w, w, 3, 1, (1, 1))
        self.layer2 = _stage(4 * w, 2 * w, 4, 2, (1, 1))
        self.layer3 = _stage(8 * w, 4 * w, 23, 1, (1, 2))
        self.layer4 = _stage(16 * w, 8 * w, 3, 1, (2, 4))
        self.stages = (w, 4 * w, 8 * w)
        self.width = 32 * w
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor, added: Sequence[Tensor] = ()) -> Tensor:
        """added: (B, C, h, w) features of the sizes of `stages`, added to theirs."""
        x = (image - self.mean) / self.std
        x = plus(F.relu(self.bn1(self.conv1(x)), inplace=True), added, 0)
        x = plus(self.layer1(F.max_pool2d(x, 3, 2, 1)), added, 1)
        x = plus(self.layer2(x), added, 2)
        features: Tensor = self.layer4(self.layer3(x))
        return features


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the sum of four dilated convolutions to the classes."""

    def __init__(self, cin: int, classes: int) -> None:
        super().__init__()
        convs = [
            nn.Conv2d(cin, classes, 3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24)
        ]
        for conv in convs:
            nn.init.normal_(conv.weight, std=0.01)
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([conv(x) for conv in self.convs]).sum(0)
