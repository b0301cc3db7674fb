"""An image network alone, on dense data sets: source-only and target-only where there is no LiDAR.

`Camera` is the network: FtD++'s camera branch (ResNet-34 U-Net) or DeepLabV2. Every labelled pixel
is a row of the loss. `look` is what points see in a map, between its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import recipe
from ftdpp.data import CLASS_SETS, Batch
from ftdpp.kernels import pixel_to_point
from ftdpp.losses import cross_entropy
from ftdpp.models import UNet2D
from ftdpp.systems import INIT, Chance, Stream, seed_torch
from ftdpp.systems import System as Contract
from ftdpp.systems.deeplab import ASPP, ResNet101

TRUNKS = ("resnet34", "deeplabv2")


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The shared settings, and which domain is labelled."""

    supervised: str = "source"  # source, or target (oracle)
    trunk: str = "resnet34"  # resnet34 (U-Net of FtD++), or deeplabv2 (ResNet-101)
    dropout: float = 0.4  # of the encoder

    def rules(self) -> dict[str, bool]:
        return super().rules() | {
            "supervised must be source or target": self.supervised in ("source", "target"),
            "dropout must lie in 0..1": 0 <= self.dropout < 1,
            f"trunk must be one of {', '.join(TRUNKS)}": self.trunk in TRUNKS,
        }

    def lacking(self) -> dict[str, str]:
        return dict.fromkeys(recipe.OF_3D, "it has no 3D network") | {
            "supervised": "the method decides it"
        }

    def idle(self) -> dict[str, str]:
        no_dropout = {} if self.trunk == "resnet34" else {"dropout": "DeepLabV2 has none"}
        return super().idle() | no_dropout


# Ours, after the protocol of the papers that adapt these data sets with crops of 512 x 512.
_DENSE: dict[str, Any] = {
    "image": (512, 1024),
    "crop": (512, 512),
    "batch": 4,
    "eval_batch": 1,
    "lr_2d": 1e-3,
    "steps": 60_000,
    "milestones": (40_000, 50_000),
}


class _Linear(nn.Linear):
    """A linear layer at each pixel: (B, C, H, W) -> (B, K, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Camera(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> scores of the classes at each pixel (B, K, H, W).

    Args:
        trunk: one of TRUNKS. width: 64 in the papers. bf16: compute the trunk in it, by autocast.
    """

    def __init__(
        self, trunk: str, width: int, classes: int, dropout: float = 0.0, bf16: bool = False
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        self.trunk: UNet2D | ResNet101
        self.head: ASPP | _Linear
        if trunk == "deeplabv2":
            self.trunk = ResNet101(width)
            self.head = ASPP(self.trunk.width, classes)
        else:
            self.trunk = UNet2D(width, dropout)
            self.head = _Linear(width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub

    def forward(self, image: Tensor, added: Sequence[Tensor] = ()) -> Tensor:
        """added: features for the trunk's stages, as in `UNet2D`."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            feat = self.trunk(image.contiguous(memory_format=torch.channels_last), added)
        scores = self.head(feat.to(next(self.head.parameters()).dtype))
        if scores.shape[-2:] != image.shape[-2:]:
            scores = F.interpolate(scores, image.shape[-2:], mode="bilinear")
        return scores


def camera_of(r: Any) -> Camera:
    """The network of a recipe."""
    classes = len(CLASS_SETS[r.classes])
    return Camera(r.trunk, r.width_2d, classes, r.dropout, r.precision == "bf16")


def look(x: Tensor, frame: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """What points see at K places each of the maps of their frames: the weighted sum (N, C).

        sum over k of weight[n, k] * x[frame[n]] at place[n, k]

    Between pixels bilinear; a place beyond the border counts as the nearest one on it.

    Args:
        x: (B, C, h, w). frame: (N,) int64.
        place: (N, K, 2) row, col in pixels of the map; a pixel's centre has whole numbers.
        weight: (N, K).
    """
    b, c, h, w = x.shape
    last = place.new_tensor([h - 1, w - 1])
    place = torch.minimum(place.clamp(min=0), last)
    low = place.detach().floor()
    high = torch.minimum(low + 1, last)
    share = place - low  # of the lower right pixels
    rows, weights = [], []
    for y, share_y in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
        for x_, share_x in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
            rows.append((frame[:, None] * h + y.long()) * w + x_.long())
            weights.append(weight * share_y * share_x)
    flat = x.permute(0, 2, 3, 1).reshape(b * h * w, c)  # free: the maps are channels-last
    # A weighted sum of rows without an array of all of them.
    return F.embedding_bag(
        torch.cat(rows, 1), flat, mode="sum", per_sample_weights=torch.cat(weights, 1)
    )


class System(Contract):
    """A `Camera`; cross-entropy on the labelled domain."""

    Recipe = Recipe
    heads = ("2d",)
    pseudo_heads = ("2d",)
    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        "gta5-cityscapes": {**_DENSE, "classes": "cityscapes19"},
        "synthia-cityscapes": {**_DENSE, "classes": "synthia16"},
    }
    default = _DENSE
    small: ClassVar[dict[str, Any]] = {**recipe.SMALL, "lr_2d": 1e-3}  # 2e-3 swings on 19 classes
    small_crop: ClassVar[dict[str, Any]] = {"image": (128, 256), "crop": (128, 128)}

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)
        seed_torch(seed, INIT, 0)
        self.camera = camera_of(r)

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        side = "tgt" if r.supervised == "target" else "src"
        return {"labelled": Stream(side, "train", r.batch, True, 0, "class_weights")}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        group = {"name": "2d", "params": list(self.parameters()), "lr": self.recipe.lr_2d}
        return {"all": torch.optim.Adam([group], fused=True)}

    def logits(self, batch: Batch) -> Tensor:
        """(N, K) of the batch's rows."""
        return pixel_to_point(self.camera(batch.image), batch.batch_index, batch.pixel)

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        batch = batches["labelled"]
        weight = batch.image.new_tensor(self.recipe.class_weights)
        return {"seg_2d": cross_entropy(self.logits(batch), batch.label, weight)}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"2d": F.softmax(self.logits(batch), 1)}

    def encoders(self) -> list[nn.Module]:
        return [self.camera.trunk]

    def camera_network(self) -> dict[str, Tensor]:
        return self.camera.state_dict()
