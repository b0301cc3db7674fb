"""FtD++: fusion, then distillation (TCSVT 2025, arXiv 2410.19446).

Authority: the released code, Barcaaaa/FtD-PlusPlus at 0bcb512.

A camera network and a LiDAR network label the same points. They learn from a labelled source and an
unlabelled target:

    MFFM   modality fusion: the main 2D head reads fused 2D and 3D features         class Fusion
    MMST   stylised transfer: the source batch in the target's style, for a teacher  stylise()
    MPD    modality-preserving distillation: each modality imitates the other        mimicry()
    DPD    domain-preserving distillation: the student imitates the teacher          distillation()
    xDPL   debiased pseudo-labels: a second stage on the target              debiased_pseudo_loss()

Notation: l2, l3 are the logits of the main 2D and 3D heads, l2', l3' those of the mimicry heads,
p = softmax(l), sg stops the gradient. The teacher is a moving average of the student.
`models.py` has the two trunks, `losses.py` cross-entropy and KL. The step is `System.forward`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels, recipe
from ftdpp.data import CLASS_SETS, GRID, IGNORE, Batch, DataError, join
from ftdpp.kernels import Pyramid, pixel_to_point
from ftdpp.losses import cross_entropy, kl_divergence
from ftdpp.models import RowNorm, UNet2D, UNet3D, update_teacher
from ftdpp.systems import INIT, Chance, Stream, seed_torch
from ftdpp.systems import System as Contract

# ---- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The shared settings, and those of FtD++ and its family."""

    fusion: bool = True  # MFFM: fused features in the main 2D head
    supervised: str = "source"  # domain of the labelled batch: source, target (oracle), both
    dropout: tuple[float, float] = (0.4, 0.2)  # of the 2D encoder and of the attention
    class_weights_tgt: tuple[float, ...] = ()  # of labelled target frames (semi-supervised)
    # weights of the loss terms
    ce_3d: float = 1.0  # 3D cross-entropy
    mimic_src: float = 1.0  # MPD on the labelled batch
    mimic_tgt: float = 0.1  # MPD on the unlabelled batch
    distill_single: float = 0.1  # DPD, each head from the same head of the teacher
    distill_fused: float = 0.01  # DPD, both heads from the teacher's ensemble
    pseudo: float = 0.0  # cross-entropy of pseudo-labels; 1.0 in the second stage
    pseudo_debias: bool = True  # xDPL: scale it by exp(-KL) of the mimicry head
    pseudo_detach: bool = False  # stop the gradient through that factor (released: no)
    # MMST
    teacher_image: str = "coin"  # coin: mixup or FDA by a coin flip an iteration; fda; none
    teacher_density: bool = True  # density transfer of its points
    teacher_mix: float = 0.95  # share of the source in the teacher's mixup
    fda_beta: float = 0.1  # side of the exchanged block of the spectrum, a share of min(H, W)
    student_mix: float = 1.0  # share of the source in the student's source image; 1: unmixed
    ema: float = 0.999  # decay of the teacher

    @property
    def uses_teacher(self) -> bool:
        return bool(self.distill_single or self.distill_fused)

    @property
    def sees_target(self) -> bool:
        """Whether the student predicts the unlabelled target frames."""
        return bool(self.mimic_tgt or self.pseudo)

    @property
    def uses_target(self) -> bool:
        """Whether an iteration needs unlabelled target frames."""
        return self.sees_target or self.uses_teacher or self.student_mix < 1

    def rules(self) -> dict[str, bool]:
        weights = (
            *(self.ce_3d, self.mimic_src, self.mimic_tgt),
            *(self.pseudo, self.distill_single, self.distill_fused),
        )
        shares = (self.student_mix, self.teacher_mix, self.fda_beta, self.ema)
        dropout, classes = self.dropout, len(CLASS_SETS.get(self.classes, ()))
        return super().rules() | {
            "loss weights must not be negative": min(weights) >= 0,
            "student_mix, teacher_mix, fda_beta and ema must lie in 0..1": all(
                0 <= share <= 1 for share in shares
            ),
            "supervised must be source, target or both": (
                self.supervised in ("source", "target", "both")
            ),
            "teacher_image must be coin, fda or none": self.teacher_image
            in ("coin", "fda", "none"),
            "dropout wants two numbers in 0..1 (2D encoder, attention)": (
                len(dropout) == 2 and all(0 <= p < 1 for p in dropout)
            ),
            "a semi-supervised batch holds source and labelled target frames: batch must be at "
            "least 2": self.supervised != "both" or self.batch >= 2,
            f"class_weights_tgt wants {classes} numbers, not negative, one above 0": (
                recipe.usable_weights(self.class_weights_tgt, classes)
            ),
            "the width_2d/2 heads of the attention have to share 4 width_3d channels evenly: "
            "width_3d must be a multiple of width_2d/8": (
                not self.fusion or 8 * self.width_3d % max(self.width_2d, 1) == 0
            ),
        }

    def lacking(self) -> dict[str, str]:
        reasons = {"the method and --ssda decide it": ["supervised"]}
        if not self.uses_teacher:
            distillation = ["distill_single", "distill_fused", "ema"]
            styles = ["teacher_image", "teacher_density", "teacher_mix", "fda_beta"]
            reasons["it has no teacher"] = distillation + styles
        if not self.mimic_src and not self.mimic_tgt:
            reasons["it has no mimicry"] = ["mimic_src", "mimic_tgt"]
        if not self.fusion:
            reasons["it has no fusion module"] = ["fusion"]
        if not self.pseudo:
            names = ["pseudo", "pseudo_debias", "pseudo_detach"]
            reasons["it uses no pseudo-labels; name their file with --pseudo FILE"] = names
        if self.supervised != "both":
            reasons["it has no labelled target frames beside the source"] = ["class_weights_tgt"]
        return {name: why for why, names in reasons.items() for name in names}

    def idle(self) -> dict[str, str]:
        reasons = {}
        if self.teacher_image != "coin":
            reasons["teacher_mix"] = f"teacher_image is {self.teacher_image}"
        if self.teacher_image == "none":
            reasons["fda_beta"] = "teacher_image is none"
        if not self.pseudo_debias:
            reasons["pseudo_detach"] = "the pseudo-labels are not debiased"
        return super().idle() | reasons

    @property
    def second_stage(self) -> bool:
        return bool(self.pseudo)


_NUSCENES: dict[str, Any] = {"classes": "street6", "batch": 8, "eval_batch": 8, "image": (225, 400)}
_KITTI: dict[str, Any] = {"batch": 4, "eval_batch": 1, "image": (0, 0), "crop": (302, 480)}
_KITTI_WEIGHTS: dict[str, Any] = {
    "mimic_src": 0.1,
    "mimic_tgt": 0.02,
    "distill_single": 0.01,
    "distill_fused": 0.001,
}

# The six released scripts and their configurations. They differ in more than a path.
SCENARIOS: dict[str, dict[str, Any]] = {
    "usa-singapore": {
        **_NUSCENES,
        "lr_2d": 1e-4,
        "steps": 60_000,
        "milestones": (40_000, 50_000),
        "gamma": 1.0,
        "class_weights": (1.9241476, 1.0, 2.16763851, 2.78254323, 1.54875664, 1.85686537),
    },
    "day-night": {
        **_NUSCENES,
        "lr_2d": 1e-3,
        "steps": 100_000,
        "milestones": (80_000, 90_000),
        "teacher_image": "fda",
        "student_mix": 0.8,
        "class_weights": (1.97516268, 1.0, 2.10103946, 2.05838738, 1.53985452, 1.54031246),
    },
    "vkitti-skitti": {
        **_KITTI,
        **_KITTI_WEIGHTS,
        "classes": "vkitti6",
        "steps": 60_000,
        "milestones": (48_000, 56_000),
        "val_every": 4_000,
        "ce_3d": 0.1,
        "pseudo_debias": False,
        "class_weights": (1.0, 2.03402089, 1.20641905, 2.21588055, 2.59745666, 1.82057006),
    },
    "a2d2-skitti": {
        **_KITTI,
        **_KITTI_WEIGHTS,
        "classes": "a2d2_10",
        "steps": 200_000,
        "milestones": (160_000, 180_000),
        "val_every": 10_000,
        "teacher_image": "fda",
        "student_mix": 0.95,
        "class_weights": (
            *(1.89090012, 2.0585112, 3.1970535, 3.1111633, 1.0),
            *(2.93751704, 1.92053733, 1.47886874, 1.04654198, 1.78266561),
        ),
    },
}
SCENARIOS["usa-singapore-ssda"] = {
    **SCENARIOS["usa-singapore"],
    "supervised": "both",
    "steps": 100_000,
    "milestones": (80_000, 90_000),
    "class_weights_tgt": (2.21852335, 1.0, 1.92354397, 1.69109745, 1.50338242, 1.23778486),
}
SCENARIOS["a2d2-skitti-ssda"] = {
    **SCENARIOS["a2d2-skitti"],
    "supervised": "both",
    "class_weights_tgt": (
        *(1.44266267, 3.28192912, 2.89684809, 3.40990009, 1.0),
        *(2.22021218, 1.44144653, 1.26582799, 1.03503295, 1.59859966),
    ),
}

# ---- MFFM, the fusion module -------------------------------------------------------------------


class CBAM(nn.Module):
    """Channel, then spatial attention on a feature map, with a residual (Woo et al., 2018).

    y = x * sigmoid(mlp(max over pixels of x) + mlp(mean over pixels of x))
    x + y * sigmoid(conv[max over channels of y, mean over channels of y])

    The sum is taken at the points alone, where it is read. No gradient reaches x.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor, batch_index: Tensor, pixel: Tensor) -> Tensor:
        """(B, C, H, W), (N,), (N, 2) row, col -> (N, C)."""
        x = x.detach()
        # Equal; the pool has one CUDA thread an output, amax takes twenty times as long on a CPU.
        most = x.amax((2, 3), keepdim=True) if x.is_cuda else F.adaptive_max_pool2d(x, 1)
        mean = F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.channel(most) + self.channel(mean))
        y = x * gate
        pooled = torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1)
        spatial = pixel_to_point(torch.sigmoid(self.spatial(pooled)), batch_index, pixel)
        at_points = pixel_to_point(x, batch_index, pixel)
        return at_points + at_points * gate.flatten(1)[batch_index] * spatial


def keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> tuple[Tensor, float]:
    """Dropout's choice: uint8, 1 where a value survives; and the share that survives, 1 - p.

    On a CPU p is rounded to 1/256, so that a byte decides: the attention drops tens of millions of
    values a step, and PyTorch's own dropout would take most of it. PyTorch's generator seeds the
    bytes and stays the only state of chance.
    """
    if device.type != "cpu":
        return (torch.rand(shape, device=device) >= p).view(torch.uint8), 1 - p
    seed, count, drop = int(torch.randint(2**62, ())), math.prod(shape), round(256 * p)
    numbers = np.random.Generator(np.random.SFC64(seed))
    words = numbers.integers(0, 2**64, -(-count // 8), np.uint64)
    kept = (words.view(np.uint8)[:count] >= drop).view(np.uint8)
    return torch.from_numpy(kept).view(shape), 1 - drop / 256


class _Attend(torch.autograd.Function):
    """Heads of external attention, feature-major: (..., d, N) -> (..., d, N).

        a = softmax over the N points of key @ x                               (..., S, N)
        y = value @ dropout(a / (1e-9 + sum of a over the S slots))

    The division moves behind the product, so each (S, N) array is passed over as rarely as can be:
    this is where the time of the fusion module goes. Written with its gradient because autograd
    would keep and revisit twice as many of them. `kernels.naive` says it plainly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
        # Detached: torch would fold a product with a matrix that takes a gradient, and copy the
        # large arrays for it.
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
        grad_key = (grad_logits @ x.mT).sum_to_size(key.shape)
        grad_value = (scaled @ kept.mT).sum_to_size(value.shape)
        return key.t() @ grad_logits, grad_key, grad_value, None


class ExternalAttention(nn.Module):
    """Attention to 64 learned memory slots instead of to the other points (Guo et al., 2022).

    Softmax over the N points of the *whole batch*, then each point's slots divided by their sum: a
    point's output depends on what else is in the batch. It stays in fp32, since its values are
    about 1/N.

    `key.bias` is there for the released checkpoints only: it shifts all points of a slot alike, and
    the softmax over the points takes that away again.
    """

    SLOTS = 64

    def __init__(self, channels: int, heads: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        if 4 * channels % heads:
            raise ValueError(
                f"external attention: 4 x {channels} channels cannot be split into {heads} heads"
            )
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
        # A CPU goes head by head: a head's (64, N) stays in its cache where all heads' would not.
        # A GPU takes all at once; Triton never writes such an array.
        split = wide.unflatten(0, (self.heads, -1))
        fused = kernels.fuses_attention(split)
        if fused or x.is_cuda:
            attend = kernels.attend if fused else _Attend.apply
            y = (attend(split, key, value, p) + self.value.bias[:, None]).flatten(0, 1)
        else:
            heads = [_Attend.apply(head, key, value, p) for head in wide.chunk(self.heads)]
            y = torch.cat([head + self.value.bias[:, None] for head in heads])
        return self.dropout(self.project(y.to(x.dtype).t()))


class Fusion(nn.Module):
    """MFFM: feature map (B, C2, H, W) and point features (N, C3) -> fused (N, C2 + C3).

    Both inputs are detached here: fusion learns from the 2D losses without pushing gradient into
    either trunk. The number of heads scales with C2 (32 at the paper's 64), so that a head keeps
    its width in a narrower network.
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
        self.norm = RowNorm(c)

    def forward(
        self, map_2d: Tensor, feat_3d: Tensor, batch_index: Tensor, pixel: Tensor
    ) -> Tensor:
        x2 = self.cbam(map_2d, batch_index, pixel)
        x3 = feat_3d.detach()
        x = torch.cat([self.attend_2d(x2) + x2, self.attend_3d(x3) + x3], 1)
        x = F.relu(self.mix(x))
        return F.relu(self.norm(self.out(self.attend(x) + x)))


# ---- the network -------------------------------------------------------------------------------


class Logits(NamedTuple):
    """Per point, (N, K) each."""

    main_2d: Tensor
    main_3d: Tensor
    mimic_2d: Tensor
    mimic_3d: Tensor


class Net2D(nn.Module):
    """Camera branch: trunk and heads. With `fused` channels, the main head reads them too."""

    def __init__(self, classes: int, width: int, fused: int, dropout: float) -> None:
        super().__init__()
        self.trunk = UNet2D(width, dropout)
        if fused:
            self.fused_in = nn.Linear(fused, width)
            self.fused_out = nn.Linear(2 * width, width)
        self.main = nn.Linear(width, classes)
        self.mimic = nn.Linear(width, classes)

    def heads(self, feat: Tensor, fused: Tensor | None) -> tuple[Tensor, Tensor]:
        """Main and mimicry logits (N, K) of the features (N, width) at the points' pixels."""
        main = feat
        if fused is not None:
            main = self.fused_out(torch.cat([feat, F.relu(self.fused_in(fused))], 1))
        return self.main(main), self.mimic(feat)


class Net3D(nn.Module):
    """LiDAR branch: trunk and heads."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.trunk = UNet3D(width)
        self.main = nn.Linear(width, classes)
        self.mimic = nn.Linear(width, classes)


class CrossModal(nn.Module):
    """The whole network of one student or teacher.

        image  -> UNet2D -> map_2d (B, C2, H, W) -> at the pixel of each point (N, C2)
        coords -> UNet3D -> feat_3d (N, C3)
        both, detached -> Fusion -> (N, C2 + C3), which the main 2D head reads as well

    Each modality has two heads: `main` predicts, `mimic` learns to imitate the other modality's
    main head and so carries information across.

    Args:
        classes: K.
        width_2d, width_3d: channels of the features, 64 and 16 in the paper.
        fusion: False gives xMUDA's network, whose main 2D head sees the image alone.
        dropout: of the 2D encoder and of the attention; (0.4, 0.2) in the paper.
        precision: of the trunks, where the time goes: "fp32", or "bf16" by autocast, with the
            parameters kept in fp32. Fusion (its attention has values of 1/N), heads and losses
            compute in fp32 either way, on a CPU the sparse trunk too.
    """

    def __init__(
        self,
        classes: int,
        width_2d: int = 64,
        width_3d: int = 16,
        fusion: bool = True,
        dropout: tuple[float, float] = (0.4, 0.2),
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.bf16 = precision == "bf16"
        # Channels last: convolutions on a CPU and on tensor cores want it, and a point then reads
        # the features of its pixel in one piece.
        self.net_2d = Net2D(classes, width_2d, width_2d + width_3d if fusion else 0, dropout[0])
        self.net_2d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        self.net_3d = Net3D(classes, width_3d)
        self.fusion = Fusion(width_2d, width_3d, dropout[1]) if fusion else None

    def _trunks_precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def features_2d(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width_2d, H, W)."""
        with self._trunks_precision(image.device):
            feat = self.net_2d.trunk(image.contiguous(memory_format=torch.channels_last))
            return feat.to(self.net_2d.main.weight.dtype)

    def features_3d(self, coords: Tensor, pyramid: Pyramid) -> Tensor:
        """(N, 4) -> (N, width_3d). A point's input is 1: that it is there."""
        exact = self.net_3d.main.weight
        with self._trunks_precision(coords.device):
            return self.net_3d.trunk(exact.new_ones(len(coords), 1), pyramid).to(exact.dtype)

    def forward(self, image: Tensor, pixel: Tensor, coords: Tensor) -> Logits:
        """image (B, 3, H, W), pixel (N, 2) row, col, coords (N, 4) b, x, y, z -> (N, K) logits."""
        batch_index = coords[:, 0].long()
        pyramid = kernels.pyramid(coords, self.net_3d.trunk.levels)
        map_2d, feat_3d = self.features_2d(image), self.features_3d(coords, pyramid)
        fused = None
        if self.fusion is not None:
            fused = self.fusion(map_2d, feat_3d, batch_index, pixel)
        feat_2d = pixel_to_point(map_2d, batch_index, pixel)
        main_2d, mimic_2d = self.net_2d.heads(feat_2d, fused)
        return Logits(main_2d, self.net_3d.main(feat_3d), mimic_2d, self.net_3d.mimic(feat_3d))


# ---- MMST: the labelled batch in the target's style ----------------------------------------------


def fda(source: Tensor, target: Tensor, beta: float = 0.1) -> Tensor:
    """Images (B, 3, H, W): the target's low-frequency amplitudes under the source's phase.

    In the un-shifted spectrum the low frequencies are the four corners; their side is
    floor(beta * min(H, W)). Not clamped to [0, 1], as released. (Yang and Soatto, 2020.)

    Raises:
        DataError: the shapes differ.
    """
    if source.shape != target.shape:
        raise DataError(
            f"fda pairs images one to one: source {tuple(source.shape)}, target "
            f"{tuple(target.shape)}; crop or resize both alike (--set crop=H,W, --set image=H,W)"
        )
    side = math.floor(beta * min(source.shape[-2:]))
    spectrum = torch.fft.fft2(source)
    amplitude, style = spectrum.abs(), torch.fft.fft2(target).abs()
    low = torch.zeros(source.shape[-2:], dtype=torch.bool, device=source.device)
    for rows in (slice(0, side), slice(low.shape[0] - side, None)):
        for cols in (slice(0, side), slice(low.shape[1] - side, None)):
            low[rows, cols] = True
    mixed = torch.polar(torch.where(low, style, amplitude), spectrum.angle())
    stylised: Tensor = torch.fft.ifft2(mixed).real
    return stylised


def mixup(source: Tensor, target: Tensor, share: float) -> Tensor:
    """share * source + (1 - share) * target, pixel by pixel; labels stay the source's."""
    return source * share + target * (1 - share)


def density_transfer(coords_src: Tensor, coords_tgt: Tensor, batch_size: int) -> Tensor:
    """Source voxels, scaled so that frame i has the target frame i's volume a point.

    v = volume of the bounding box / number of points, factor (v_src / v_tgt)^(-1/3), then
    truncation toward zero, as released. Beyond the released code: an extent of 0 counts as 1 voxel,
    so nothing divides by zero, and what would leave the grid stays on its border.

    Args:
        coords_src, coords_tgt: (N, 4) int32 b, x, y, z.
    """

    def volume_per_point(coords: Tensor) -> Tensor:  # (B,) f64
        # A mask per frame and no loop: nothing here waits for the GPU, and the result does not
        # depend on an order.
        own = (coords[:, :1] == torch.arange(batch_size, device=coords.device))[..., None]
        xyz = coords[:, None, 1:]  # (N, 1, 3), beside own (N, B, 1)
        extent = torch.where(own, xyz, 0).amax(0) - torch.where(own, xyz, GRID).amin(0)  # (B, 3)
        return extent.clamp(min=1).double().prod(1) / own.sum((0, 2)).clamp(min=1)

    factor = (volume_per_point(coords_src) / volume_per_point(coords_tgt)) ** (-1 / 3)
    scaled = coords_src[:, 1:] * factor[coords_src[:, 0].long(), None]
    scaled = scaled.trunc().clamp(0, GRID - 1)
    return torch.cat([coords_src[:, :1], scaled.to(coords_src.dtype)], 1)


def stylise(labelled: Batch, unlabelled: Batch, r: Recipe, coin: bool) -> tuple[Tensor, Tensor]:
    """What the teacher sees: the i-th labelled frame in the style of the i-th unlabelled one.

    Image: FDA, or by the coin (False) mixup. Points: density transfer.

    Returns:
        image (B, 3, H, W), coords (N, 4).
    """
    image, coords = labelled.image, labelled.points
    if r.teacher_image == "fda" or (r.teacher_image == "coin" and coin):
        image = fda(image, unlabelled.image, r.fda_beta)
    elif r.teacher_image == "coin":
        image = mixup(image, unlabelled.image, r.teacher_mix)
    if r.teacher_density:
        coords = density_transfer(coords, unlabelled.points, len(image))
    return image, coords


# ---- the losses ----------------------------------------------------------------------------------


def mimicry(student: Logits) -> tuple[Tensor, Tensor]:
    """MPD, (2D, 3D): each mimicry head imitates the main head of the other modality.

    KL(sg p3 || p2'),  KL(sg p2 || p3')
    """
    p2, p3 = F.softmax(student.main_2d, 1), F.softmax(student.main_3d, 1)
    return kl_divergence(p3, student.mimic_2d), kl_divergence(p2, student.mimic_3d)


def distillation(teacher: Logits, student: Logits) -> tuple[Tensor, Tensor]:
    """DPD, (single-modal, fused), each the sum over the two main heads; t are the teacher's.

        KL(t2 || p2) + KL(t3 || p3)
        KL(softmax(t2 + t3) || p2) + KL(softmax(t2 + t3) || p3)

    The fused target is a second softmax over a sum of probabilities, as released. Its largest value
    is e^2 / (e^2 + K - 1), 0.596 for six classes, so this term also smooths.
    """
    t2, t3 = F.softmax(teacher.main_2d, 1), F.softmax(teacher.main_3d, 1)
    both = F.softmax(t2 + t3, 1)
    single = kl_divergence(t2, student.main_2d) + kl_divergence(t3, student.main_3d)
    fused = kl_divergence(both, student.main_2d) + kl_divergence(both, student.main_3d)
    return single, fused


def debiased_pseudo_loss(logits: Tensor, label: Tensor, kl: Tensor, detach: bool) -> Tensor:
    """xDPL: exp(-KL) * CE(l, pseudo-label). Little trust where the modalities disagree.

    One factor a batch and modality. Released: not detached, so while the cross-entropy is large it
    pays to push the modalities apart.

    Args:
        kl: the mimicry term of the same modality on the same batch.
    """
    trust = torch.exp(-(kl.detach() if detach else kl))
    return trust * cross_entropy(logits, label)


def pseudo_terms(r: Any, tgt: Logits, batch: Batch, *kls: Tensor) -> dict[str, Tensor]:
    """Of both main heads; kls are the mimicry terms, 2D and 3D, of the same batch."""
    terms = {}
    for head, logits, kl in zip(("2d", "3d"), (tgt.main_2d, tgt.main_3d), kls, strict=True):
        label = batch.pseudo[head]
        if r.pseudo_debias:
            loss = debiased_pseudo_loss(logits, label, kl, r.pseudo_detach)
        else:
            loss = cross_entropy(logits, label)
        terms[f"pseudo_{head}"] = r.pseudo * loss
    return terms


def source_share(frames: int) -> int:
    """How many frames of a semi-supervised batch are of the source; the others are the target's."""
    return round(0.5 * frames)


def supervised_loss(
    logits: Tensor, batch: Batch, weight: Tensor, weight_tgt: Tensor | None
) -> Tensor:
    """Cross-entropy of the labelled batch. Semi-supervised: the mean of source and target half."""
    if weight_tgt is None:
        return cross_entropy(logits, batch.label, weight)
    is_source = batch.points[:, 0] < source_share(len(batch.image))
    source = batch.label.masked_fill(~is_source, IGNORE)
    target = batch.label.masked_fill(is_source, IGNORE)
    return 0.5 * (cross_entropy(logits, source, weight) + cross_entropy(logits, target, weight_tgt))


# ---- the system ----------------------------------------------------------------------------------


class System(Contract):
    """FtD++ and, with terms switched off, xMUDA and the baselines.

    Faithful to the release where it surprises: the teacher starts from weights of its own, stays in
    train mode, and its buffers are never averaged.
    """

    Recipe = Recipe
    training_only: ClassVar[tuple[str, ...]] = ("teacher",)
    teachers: ClassVar[dict[str, str]] = {"student": "teacher"}
    scenarios = SCENARIOS
    semi_supervised: ClassVar[dict[str, Any]] = {"supervised": "both"}
    second_stage: ClassVar[dict[str, Any]] = {"pseudo": 1.0}
    # The trust in pseudo-labels is detached: through it, the released form pushes the modalities
    # apart while their cross-entropy is large, which is most of so short a training.
    small: ClassVar[dict[str, Any]] = {
        **recipe.SMALL,
        "class_weights_tgt": (),
        "pseudo_detach": True,
    }

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)

        def network(number: int) -> CrossModal:
            seed_torch(seed, INIT, number)
            classes = len(CLASS_SETS[r.classes])
            return CrossModal(classes, r.width_2d, r.width_3d, r.fusion, r.dropout, r.precision)

        self.student = network(0)
        self.teacher: CrossModal | None = None
        if training and r.uses_teacher:
            self.teacher = network(1).requires_grad_(False)

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        made: dict[str, Stream] = {}
        own = r.batch if r.supervised != "both" else source_share(r.batch)
        side = "tgt" if r.supervised == "target" else "src"
        made["labelled"] = Stream(side, "train", own, True, 0, "class_weights")
        if r.supervised == "both":
            rest = r.batch - own
            made["labelled_tgt"] = Stream(
                "tgt", "train_labelled", rest, True, 1, "class_weights_tgt"
            )
        if r.uses_target:
            split = "train_unlabelled" if r.supervised == "both" else "train"
            made["unlabelled"] = Stream("tgt", split, r.batch, False, 2, pseudo=bool(r.pseudo))
        return made

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One Adam over 2D, 3D and fusion: the three optimisers of the released code."""
        r, student = self.recipe, self.student
        groups = [
            {"name": "2d", "params": list(student.net_2d.parameters()), "lr": r.lr_2d},
            {"name": "3d", "params": list(student.net_3d.parameters()), "lr": r.lr_3d},
        ]
        if student.fusion is not None:
            fusion = list(student.fusion.parameters())
            groups.append({"name": "fusion", "params": fusion, "lr": r.lr_3d})
        # Fused: one pass over the parameters.
        return {"all": torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)}

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        r, student = self.recipe, self.student
        labelled = batches["labelled"]
        if "labelled_tgt" in batches:
            labelled = join([labelled, batches["labelled_tgt"]])
        unlabelled = batches.get("unlabelled")
        weight = labelled.image.new_tensor(r.class_weights)
        weight_tgt = None
        if r.supervised == "both":
            weight_tgt = labelled.image.new_tensor(r.class_weights_tgt)
        terms: dict[str, Tensor] = {}

        image = labelled.image
        if r.student_mix < 1:
            assert unlabelled is not None
            image = mixup(image, unlabelled.image, r.student_mix)
        src = student(image, labelled.pixel, labelled.points)
        terms["seg_2d"] = supervised_loss(src.main_2d, labelled, weight, weight_tgt)
        terms["seg_3d"] = r.ce_3d * supervised_loss(src.main_3d, labelled, weight, weight_tgt)
        if r.mimic_src:
            kl_2d, kl_3d = mimicry(src)
            terms["mimic_2d_src"] = r.mimic_src * kl_2d
            terms["mimic_3d_src"] = r.mimic_src * kl_3d

        if r.sees_target:
            assert unlabelled is not None
            tgt = student(unlabelled.image, unlabelled.pixel, unlabelled.points)
            terms |= self.target_terms(tgt, unlabelled)

        if self.teacher is not None:
            assert unlabelled is not None
            with torch.no_grad():
                image, coords = stylise(labelled, unlabelled, r, chance.coin())
                taught = self.teacher(image, labelled.pixel, coords)
            single, fused = distillation(taught, src)
            terms["distill_single"] = r.distill_single * single
            terms["distill_fused"] = r.distill_fused * fused
        return terms

    def target_terms(self, tgt: Logits, batch: Batch) -> dict[str, Tensor]:
        """The terms of the unlabelled target batch: MPD, and in the second stage pseudo-labels."""
        r = self.recipe
        terms: dict[str, Tensor] = {}
        kl_2d, kl_3d = mimicry(tgt)
        if r.mimic_tgt:
            terms["mimic_2d_tgt"] = r.mimic_tgt * kl_2d
            terms["mimic_3d_tgt"] = r.mimic_tgt * kl_3d
        return terms | (pseudo_terms(r, tgt, batch, kl_2d, kl_3d) if r.pseudo else {})

    def after_step(self, iteration: int) -> None:
        if self.teacher is not None:
            update_teacher(self.teacher, self.student, iteration, self.recipe.ema)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """2D is the main (fused) 2D head, 3D the main 3D head, 2D+3D softmax(p2 + p3)."""
        logits = self.student(batch.image, batch.pixel, batch.points)
        p2, p3 = F.softmax(logits.main_2d, 1), F.softmax(logits.main_3d, 1)
        return {"2d": p2, "3d": p3, "2d+3d": F.softmax(p2 + p3, 1)}

    def camera_network(self) -> dict[str, Tensor]:
        """The 2D network without fusion. With it the main head reads the LiDAR too; the mimicry
        head, which sees the image alone, stands in if it was trained."""
        r, net = self.recipe, self.student.net_2d
        if r.fusion and not (r.mimic_src or r.mimic_tgt):
            return super().camera_network()
        head = net.mimic if r.fusion else net.main
        parts = {"trunk": net.trunk, "head": head}
        return {f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}

    def encoders(self) -> list[nn.Module]:
        return [n.net_2d.trunk for n in (self.student, self.teacher) if n is not None]

    @classmethod
    def cost(cls, r: Any) -> float:
        """3 for a forward and backward of each domain, 1 for the teacher's forward.

        The fusion module takes as long as four fifths of the rest.
        """
        passes = 3.0
        passes += 3.0 if r.sees_target else 0.0
        passes += 1.0 if r.uses_teacher else 0.0
        return r.batch * passes * (1.8 if r.fusion else 1.0)
