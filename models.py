"""The networks: 2D U-Net, sparse 3D U-Net, fusion module, and the cross-modal model that joins them.

    image  -> UNet2D -> feat_2d (B, C2, H, W) -> the pixel of each point -> (N, C2)
    coords -> UNet3D -> feat_3d (N, C3)
    both, detached -> Fusion -> fused (N, C2 + C3), which the main 2D head reads beside feat_2d

Each modality has two heads: `main` predicts, `mimic` learns to imitate the other modality's main head and so carries
information across. Parameter names of the 2D encoder are torchvision's, so its ImageNet weights load; `convert_released`
translates the names of the released FtD++ checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels
from ftdpp.kernels import KernelMap, Pyramid, pixel_to_point, sparse_conv, voxel_mean, voxel_to_point

RESNET34_URL = "https://download.pytorch.org/models/resnet34-b627a593.pth"


# ---- 2D ------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Residual block of ResNet-18/34: two 3x3 convolutions (He et al., 2016, figure 5 left)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + identity, inplace=True)


def _stage(cin: int, cout: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(cin if i == 0 else cout, cout, stride if i == 0 else 1) for i in range(blocks)))


def _conv_bn_relu(conv: nn.Module, cout: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class UNet2D(nn.Module):
    """ResNet-34 U-Net at input resolution: (B, 3, H, W) in [0, 1] -> (B, width, H, W).

    The encoder is torchvision's ResNet-34 but for the stride of `conv1`, which is 1; `width` 64 is the paper's. Images are
    zero-padded at the right and bottom to multiples of 16 and the features cropped back. There is no mean/std normalisation.
    """

    def __init__(self, width: int = 64, dropout: float = 0.4) -> None:
        super().__init__()
        w = width
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
        # The decoder, created after the loop, keeps PyTorch's default initialisation as in the released code.
        wide = [w, w, 2 * w, 4 * w, 8 * w]  # channels of the skips at 1/1, 1/2, 1/4, 1/8, and of the deepest stage
        self.up = nn.ModuleList(_conv_bn_relu(nn.ConvTranspose2d(wide[i + 1], wide[i], 2, 2), wide[i]) for i in range(4))
        self.merge = nn.ModuleList(
            nn.Conv2d(2 * w, w, 3, padding=1) if i == 0 else _conv_bn_relu(nn.Conv2d(2 * wide[i], wide[i], 3, padding=1), wide[i])
            for i in range(4)
        )

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        x = F.pad(image, (0, -w % 16, 0, -h % 16))
        skips = [F.relu(self.bn1(self.conv1(x)), inplace=True)]  # 1/1
        skips.append(self.layer1(F.max_pool2d(skips[0], 3, 2, 1)))  # 1/2
        skips.append(self.layer2(skips[1]))  # 1/4
        skips.append(self.dropout(self.layer3(skips[2])))  # 1/8
        x = self.dropout(self.layer4(skips[3]))  # 1/16
        for i in (3, 2, 1, 0):
            x = self.merge[i](torch.cat([skips[i], self.up[i](x)], 1))
        return x[..., :h, :w]


def read_pth(file: str | Path) -> Any:
    """What a .pth file holds, without running the code that may be in it. Raises ValueError where that is not possible."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"{file}: cannot be read without running code that is in it ({error})") from None


def misfits(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names that are missing from `found`, left over, or of another shape than in `wanted`, in order."""
    return sorted(
        k for k in found.keys() | wanted.keys() if getattr(found.get(k), "shape", None) != getattr(wanted.get(k), "shape", 0)
    )


def imagenet_weights(width: int, file: str | Path | None = None) -> dict[str, Tensor]:
    """torchvision's ResNet-34 weights for the encoder of a `UNet2D` of this width, from `file` or by download.

    Raises:
        ValueError: the file is not such a state dict, or the width is not the paper's. OSError: it cannot be fetched.
    """
    if file is None:
        try:
            state = torch.hub.load_state_dict_from_url(RESNET34_URL, progress=False, map_location="cpu", weights_only=True)
        except OSError as error:  # also how a failed download is reported
            raise OSError(f"{RESNET34_URL}: {error}; fetch it by hand and name the file with --pretrained FILE") from None
    else:
        state = read_pth(file)
    with torch.device("meta"):  # shapes alone
        encoder = {k: v for k, v in UNet2D(width).state_dict().items() if not k.startswith(("up.", "merge."))}
    weights = {k: v for k, v in state.items() if k in encoder} if isinstance(state, dict) else {}
    bad = misfits(weights, encoder)
    if bad:
        raise ValueError(
            f"{file or RESNET34_URL}: not torchvision's ResNet-34 state dict for a trunk of width {width}; {len(bad)} tensors "
            f"are missing or of another shape, first {bad[0]}"
        )
    return weights


# ---- 3D ------------------------------------------------------------------------------------------------------------


class SparseConv(nn.Module):
    """Weights (K, Cin, Cout) of a sparse convolution without bias; K = 27 submanifold, 8 strided or inverse."""

    def __init__(self, offsets: int, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(offsets, cin, cout) * (2.0 / (cin * offsets)) ** 0.5)

    def forward(self, x: Tensor, kmap: KernelMap) -> Tensor:
        return sparse_conv(x, self.weight, kmap)


class NormReLUConv(nn.Module):
    """BatchNorm, ReLU, sparse convolution: the only building block of the sparse U-Net."""

    def __init__(self, offsets: int, cin: int, cout: int) -> None:
        super().__init__()
        self.norm = SparseBatchNorm(cin)
        self.conv = SparseConv(offsets, cin, cout)

    def forward(self, x: Tensor, kmap: KernelMap) -> Tensor:
        return self.conv(self.norm(x, kmap.live), kmap)


class SparseBatchNorm(nn.BatchNorm1d):
    """BatchNorm over voxels, (V, C), followed by ReLU, with SparseConvNet's constants."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.01)

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """live: () int64, how many of the rows are voxels, in the maps of a GPU; they come first."""
        if self.training and live is not None:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            running = self.running_mean, self.running_var, self.num_batches_tracked
            return kernels.batch_norm_relu(x, self.weight, self.bias, live, running, self.momentum, self.eps)
        if self.training and len(x) < 2:  # one voxel has no variance: use what is known so far
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            x = super().forward(x)
        return F.relu(x, inplace=True)


class UNet3D(nn.Module):
    """Sparse U-Net of SparseConvNet: points -> (N, m).

    Level l has (l + 1) * m channels. Going down: block, strided convolution; the deepest level is one block; going up:
    inverse convolution, concatenation [identity, upsampled], block. A block is norm-ReLU-convolution, not residual.
    """

    def __init__(self, m: int = 16, levels: int = 7, cin: int = 1) -> None:
        super().__init__()
        c = [m * (level + 1) for level in range(levels)]
        self.levels = levels
        self.stem = SparseConv(27, cin, m)
        self.encode = nn.ModuleList(NormReLUConv(27, a, a) for a in c)
        self.down = nn.ModuleList(NormReLUConv(8, a, b) for a, b in pairwise(c))
        self.up = nn.ModuleList(NormReLUConv(8, b, a) for a, b in pairwise(c))
        self.decode = nn.ModuleList(NormReLUConv(27, 2 * a, a) for a in c[:-1])
        self.norm = SparseBatchNorm(m)

    def forward(self, feat: Tensor, pyramid: Pyramid) -> Tensor:
        """feat (N, cin) of points, averaged in their voxels; returns (N, m), equal for the points of a voxel."""

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


# ---- fusion --------------------------------------------------------------------------------------------------------


class CBAM(nn.Module):
    """Channel, then spatial attention on a feature map, with a residual around both (Woo et al., 2018)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(F.adaptive_max_pool2d(x, 1)) + self.channel(F.adaptive_avg_pool2d(x, 1))
        y = x * torch.sigmoid(gate)
        pooled = torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1)
        return x + y * torch.sigmoid(self.spatial(pooled))


def keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> tuple[Tensor, float]:
    """Dropout's choice: uint8, 1 where a value survives; and the share that survives, 1 - p.

    On a CPU p is rounded to 1/256, so that a byte decides: the attention drops tens of millions of values a step, and
    PyTorch's own dropout would take most of it. PyTorch's generator seeds the bytes and stays the only state of chance.
    """
    if device.type != "cpu":
        return (torch.rand(shape, device=device) >= p).view(torch.uint8), 1 - p
    seed, count, drop = int(torch.randint(2**62, ())), math.prod(shape), round(256 * p)
    draws = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-count // 8), np.uint64).view(np.uint8)[:count]
    return torch.from_numpy((draws >= drop).view(np.uint8)).view(shape), 1 - drop / 256


class _Attend(torch.autograd.Function):
    """Heads of external attention, feature-major: (..., d, N) -> (..., d, N).

        a = softmax over the N points of key @ x                               (..., S, N)
        y = value @ dropout(a / (1e-9 + sum of a over the S slots))

    The division moves behind the product, so each (S, N) array is passed over as rarely as can be: this is where the time
    of the fusion module goes. Written with its gradient because autograd would keep and revisit twice as many of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
        # Detached: torch would fold a product with a matrix that takes a gradient, and copy the large arrays for it.
        a = torch.softmax(key.detach() @ x, -1)
        total = a.sum(-2, keepdim=True).add_(1e-9)  # (..., 1, N)
        mask, keep = keep_mask(tuple(a.shape), p, a.device) if p else (None, 1.0)
        y = (value.detach() @ (a if mask is None else a * mask)).div_(total * keep)
        ctx.keep = keep
        ctx.save_for_backward(x, key, value, a, mask, total, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, key, value, a, mask, total, y = ctx.saved_tensors
        key, value = key.detach(), value.detach()
        scaled = grad / (total * ctx.keep)
        grad_a, kept = value.t() @ scaled, a
        if mask is not None:
            mask = mask.to(a.dtype)
            kept = a * mask
            grad_a.mul_(mask)
        grad_a.sub_((grad * y).sum(-2, keepdim=True).div_(total))  # through the sum over slots
        grad_logits = torch._softmax_backward_data(grad_a, a, -1, a.dtype)
        grad_key, grad_value = grad_logits @ x.mT, scaled @ kept.mT
        return key.t() @ grad_logits, grad_key.sum_to_size(key.shape), grad_value.sum_to_size(value.shape), None


class ExternalAttention(nn.Module):
    """Multi-head attention to 64 learned memory slots instead of to the other points (Guo et al., 2022).

    Softmax over the N points of the *whole batch*, then each point's slots divided by their sum: a point's output depends on
    what else is in the batch. It stays in fp32, since its values are about 1/N.

    `key.bias` is there for the released checkpoints only: it shifts all points of a slot alike, and the softmax over the points
    takes that away again.
    """

    SLOTS = 64

    def __init__(self, channels: int, heads: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        if 4 * channels % heads:
            raise ValueError(f"external attention: 4 x {channels} channels cannot be split into {heads} heads")
        self.heads, d = heads, 4 * channels // heads
        self.expand = nn.Linear(channels, 4 * channels)
        self.key = nn.Linear(d, self.SLOTS)
        self.value = nn.Linear(self.SLOTS, d)
        self.project = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels) -> (N, channels)."""
        p = self.dropout.p if self.training else 0.0
        wide = torch.addmm(self.expand.bias[:, None], self.expand.weight, x.t())  # (4 channels, N)
        exact = torch.promote_types(x.dtype, torch.float32)
        wide, key, value = (t.to(exact) for t in (wide, self.key.weight, self.value.weight))
        # A CPU goes head by head: a head's (64, N) stays in its cache where all heads' would not. A GPU takes all at once.
        if x.is_cuda:
            y = _Attend.apply(wide.unflatten(0, (self.heads, -1)), key, value, p) + self.value.bias[:, None]
            y = y.flatten(0, 1)
        else:
            y = torch.cat([_Attend.apply(h, key, value, p) + self.value.bias[:, None] for h in wide.chunk(self.heads)])
        return self.dropout(self.project(y.to(x.dtype).t()))


class Fusion(nn.Module):
    """Modality-fusion module: feature map (B, C2, H, W) and point features (N, C3) -> (N, C2 + C3).

    Both inputs are detached here: fusion learns from the 2D losses without pushing gradient into either trunk. The number of
    heads scales with C2 (32 at the paper's 64), so that a head keeps its width in a narrower network.
    """

    def __init__(self, c2: int, c3: int, dropout: float = 0.2) -> None:
        super().__init__()
        c, heads = c2 + c3, c2 // 2
        self.cbam = CBAM(c2)
        self.attend_2d = ExternalAttention(c2, heads, dropout)
        self.attend_3d = ExternalAttention(c3, heads, dropout)
        self.mix = nn.Linear(c, c)
        self.attend = ExternalAttention(c, heads, dropout)
        self.out = nn.Linear(c, c)
        self.norm = nn.BatchNorm1d(c)

    def forward(self, map_2d: Tensor, feat_3d: Tensor, frame: Tensor, pixel: Tensor) -> Tensor:
        x2, x3 = pixel_to_point(self.cbam(map_2d.detach()), frame, pixel), feat_3d.detach()
        x = torch.cat([self.attend_2d(x2) + x2, self.attend_3d(x3) + x3], 1)
        x = F.relu(self.mix(x))
        return F.relu(self.norm(self.out(self.attend(x) + x)))


# ---- the model -----------------------------------------------------------------------------------------------------


class Logits(NamedTuple):
    """Per point, (N, K) each."""

    main_2d: Tensor
    main_3d: Tensor
    mimic_2d: Tensor
    mimic_3d: Tensor


class Net2D(nn.Module):
    """Trunk and heads of the camera branch. With `fused` channels, the main head reads the fused features too."""

    def __init__(self, classes: int, width: int, fused: int, dropout: float) -> None:
        super().__init__()
        self.trunk = UNet2D(width, dropout)
        if fused:
            self.fused_in = nn.Linear(fused, width)
            self.fused_out = nn.Linear(2 * width, width)
        self.main = nn.Linear(width, classes)
        self.mimic = nn.Linear(width, classes)

    def heads(self, feat: Tensor, fused: Tensor | None) -> tuple[Tensor, Tensor]:
        """Main and mimicry logits (N, K) of lifted features (N, width)."""
        main = feat
        if fused is not None:
            main = self.fused_out(torch.cat([feat, F.relu(self.fused_in(fused))], 1))
        return self.main(main), self.mimic(feat)


class Net3D(nn.Module):
    """Trunk and heads of the LiDAR branch."""

    def __init__(self, classes: int, m: int) -> None:
        super().__init__()
        self.trunk = UNet3D(m)
        self.main = nn.Linear(m, classes)
        self.mimic = nn.Linear(m, classes)


class CrossModal(nn.Module):
    """The whole network of one student or teacher.

    Args:
        classes: K.
        width: channels of the 2D features, 64 in the paper.
        m: channels of the 3D features, 16 in the paper.
        fusion: False gives xMUDA's network, whose main 2D head sees the image alone.
        dropout: of the 2D encoder and of the attention; (0.4, 0.2) in the paper.
        precision: of the trunks, where the time goes: "fp32", or "bf16" by autocast, with the parameters kept in fp32. Fusion
            (its attention has values of 1/N), heads and losses compute in fp32 either way, on a CPU the sparse trunk too.
    """

    def __init__(
        self,
        classes: int,
        width: int = 64,
        m: int = 16,
        fusion: bool = True,
        dropout: tuple[float, float] = (0.4, 0.2),
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.bf16 = precision == "bf16"
        # Channels last: convolutions on a CPU and on tensor cores want it, and a point then reads the features of its
        # pixel in one piece.
        self.net_2d = Net2D(classes, width, width + m if fusion else 0, dropout[0])
        self.net_2d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
        self.net_3d = Net3D(classes, m)
        self.fusion = Fusion(width, m, dropout[1]) if fusion else None

    def _trunks_precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def features_2d(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, H, W)."""
        with self._trunks_precision(image.device):
            return self.net_2d.trunk(image.contiguous(memory_format=torch.channels_last)).to(self.net_2d.main.weight.dtype)

    def features_3d(self, coords: Tensor, pyramid: Pyramid) -> Tensor:
        """(N, 4) -> (N, m). A point's input is 1: that it is there."""
        exact = self.net_3d.main.weight
        with self._trunks_precision(coords.device):
            return self.net_3d.trunk(exact.new_ones(len(coords), 1), pyramid).to(exact.dtype)

    def forward(self, image: Tensor, pixel: Tensor, coords: Tensor, pyramid: Pyramid | None = None) -> Logits:
        """image (B, 3, H, W), pixel (N, 2) row, col, coords (N, 4) b, x, y, z -> four logits (N, K)."""
        frame = coords[:, 0].long()
        pyramid = pyramid or kernels.pyramid(coords, self.net_3d.trunk.levels)
        map_2d, feat_3d = self.features_2d(image), self.features_3d(coords, pyramid)
        fused = self.fusion(map_2d, feat_3d, frame, pixel) if self.fusion is not None else None
        main_2d, mimic_2d = self.net_2d.heads(pixel_to_point(map_2d, frame, pixel), fused)
        return Logits(main_2d, self.net_3d.main(feat_3d), mimic_2d, self.net_3d.mimic(feat_3d))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float = 0.999) -> None:
    """EMA of the parameters, `teacher = a * teacher + (1 - a) * student`, a = min(1 - 1/(step + 1), decay), step from 1.

    Until step 1 / (1 - decay) this is the plain mean of the teacher's own start and of the students so far. Buffers are left
    alone: the teacher runs in train mode and normalises with the statistics of its own batch.
    """
    weight = 1 - min(1 - 1 / (step + 1), decay)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight)


# ---- names of the released checkpoints -----------------------------------------------------------------------------

_RELEASED_2D = [
    (r"^net_2d\.dec_t_conv_stage([2-5])\.", lambda m: f"trunk.up.{int(m[1]) - 2}."),
    (r"^net_2d\.dec_conv_stage1\.", lambda m: "trunk.merge.0."),
    (r"^net_2d\.dec_conv_stage([2-4])\.", lambda m: f"trunk.merge.{int(m[1]) - 1}."),
    (r"^net_2d\.", lambda m: "trunk."),
    (r"^proj_head1\.", lambda m: "fused_in."),
    (r"^proj_head2\.", lambda m: "fused_out."),
]
_RELEASED_HEADS = [(r"^cls_head1\.", lambda m: "main."), (r"^cls_head2\.", lambda m: "mimic.")]
# SparseConvNet nests each level in the branch of the one above: `.1.1.2` once a level.
_RELEASED_LEVEL = {
    "0.0": "encode.{}.norm",
    "0.1": "encode.{}.conv",
    "1.1.0": "down.{}.norm",
    "1.1.1": "down.{}.conv",
    "1.1.3": "up.{}.norm",
    "1.1.4": "up.{}.conv",
    "3.0": "decode.{}.norm",
    "3.1": "decode.{}.conv",
}
_RELEASED_FUSION = [
    (r"^cbam\.ca\.se\.", lambda m: "cbam.channel."),
    (r"^cbam\.sa\.conv\.", lambda m: "cbam.spatial."),
    (r"^ea_2d\.", lambda m: "attend_2d."),
    (r"^ea_3d\.", lambda m: "attend_3d."),
    (r"^ea_fuse\.", lambda m: "attend."),
    (r"\.trans_dims\.", lambda m: ".expand."),
    (r"\.linear_0\.", lambda m: ".key."),
    (r"\.linear_1\.", lambda m: ".value."),
    (r"\.proj\.", lambda m: ".project."),
    (r"^mlp\.0\.", lambda m: "mix."),
    (r"^fusion\.0\.", lambda m: "out."),
    (r"^fusion\.1\.", lambda m: "norm."),
]


def _released_3d(name: str) -> str:
    name = name.removeprefix("net_3d.")
    if name.startswith("sparseModel.1."):
        return "trunk.stem." + name.removeprefix("sparseModel.1.")
    if name.startswith("sparseModel.3."):
        return "trunk.norm." + name.removeprefix("sparseModel.3.")
    found = re.fullmatch(r"sparseModel\.2((?:\.1\.1\.2)*)\.([0-9.]+)\.(\w+)", name)
    if found and found[2] in _RELEASED_LEVEL:
        return f"trunk.{_RELEASED_LEVEL[found[2]].format(found[1].count('.1.1.2'))}.{found[3]}"
    return name


def released_name(part: str, name: str) -> str:
    """Our name, inside `CrossModal`, of a tensor of a released state dict; part is "2d", "3d" or "fusion"."""
    if part == "3d":
        name = _released_3d(name)
    rules = {"2d": _RELEASED_2D + _RELEASED_HEADS, "3d": _RELEASED_HEADS, "fusion": _RELEASED_FUSION}[part]
    for pattern, to in rules:
        name = re.sub(pattern, to, name)
    return f"fusion.{name}" if part == "fusion" else f"net_{part}.{name}"


def convert_released(part: str, state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Rename a released state dict and reshape its sparse weights (K, 1, Cin, Cout) -> (K, Cin, Cout).

    Args:
        part: "2d", "3d" or "fusion": which of the three released files the items come from.
        state: (name, tensor) pairs.
    """
    out = {}
    for name, tensor in state:
        if part == "3d" and tensor.ndim == 4 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        out[released_name(part, name)] = tensor
    return out
