"""An image network alone, on dense data sets: source-only and target-only where there is no LiDAR.

The trunk is FtD++'s camera branch (ResNet-34 U-Net); every labelled pixel is a row of the loss.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The shared settings, and which domain is labelled."""

    supervised: str = "source"  # source, or target (oracle)
    dropout: float = 0.4  # of the encoder

    def rules(self) -> dict[str, bool]:
        return super().rules() | {
            "supervised must be source or target": self.supervised in ("source", "target"),
            "dropout must lie in 0..1": 0 <= self.dropout < 1,
        }

    def lacking(self) -> dict[str, str]:
        names = ("width_3d", "lr_3d", "voxels_per_metre")
        return dict.fromkeys(names, "it has no 3D network") | {
            "supervised": "the method decides it"
        }


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


class System(Contract):
    """UNet2D and one head; cross-entropy on the labelled domain."""

    Recipe = Recipe
    heads = ("2d",)
    pseudo_heads = ("2d",)
    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        "gta5-cityscapes": {**_DENSE, "classes": "cityscapes19"},
        "synthia-cityscapes": {**_DENSE, "classes": "synthia16"},
    }
    default = _DENSE
    small_crop: ClassVar[dict[str, Any]] = {"image": (128, 256), "crop": (128, 128)}

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)
        seed_torch(seed, INIT, 0)
        self.trunk = UNet2D(r.width_2d, r.dropout)
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        self.head = nn.Linear(r.width_2d, len(CLASS_SETS[r.classes]))

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        side = "tgt" if r.supervised == "target" else "src"
        return {"labelled": Stream(side, "train", r.batch, True, 0, "class_weights")}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        group = {"name": "2d", "params": list(self.parameters()), "lr": self.recipe.lr_2d}
        return {"all": torch.optim.Adam([group], fused=True)}

    def logits(self, batch: Batch) -> Tensor:
        """(N, K) of the batch's rows."""
        device, bf16 = batch.image.device.type, self.recipe.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            feat = self.trunk(batch.image.contiguous(memory_format=torch.channels_last))
        feat = feat.to(self.head.weight.dtype)
        # The head before the lifting: K numbers a pixel to move instead of width_2d.
        scores = self.head(feat.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return pixel_to_point(scores, batch.batch_index, batch.pixel)

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        batch = batches["labelled"]
        weight = batch.image.new_tensor(self.recipe.class_weights)
        return {"seg_2d": cross_entropy(self.logits(batch), batch.label, weight)}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"2d": F.softmax(self.logits(batch), 1)}

    def encoders(self) -> list[nn.Module]:
        return [self.trunk]
