"""BFtD: both modalities imitate their fusion (Wu et al., ACM MM 2023). FtD++'s predecessor.

After the description of the released code (Barcaaaa/BFtD-xMUDA at 77a7bf4): its step for day-night
and usa-singapore. What it does for A2D2 cannot run as released, and it has nothing for Virtual
KITTI: those rows are ours, and so are those of other pairs.

FtD++ kept the parts, which are imported from there. What differs:

    MFFM   a classifier of its own: its output is the prediction 2D+3D, and the main 2D head sees
           the image alone; it learns from cross-entropy on the source, and stops the gradient to
           both trunks                                                         class FusionHead
    MPD    both mimicry heads imitate the fusion head; in FtD++ each other         mimicry()
    DPD    the fused teacher is the teacher's fusion head; in FtD++ the softmax of a sum of
           probabilities                                                     fused_distillation()
    MMST   the teacher's images all go through FDA; the student's source image is a mixup
    PL     plain cross-entropy: the abstract has xDPL, the code not (--set pseudo_debias=true)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels
from ftdpp.data import CLASS_SETS, Batch
from ftdpp.kernels import pixel_to_point
from ftdpp.losses import cross_entropy, kl_divergence
from ftdpp.models import RowNorm, update_teacher
from ftdpp.systems import INIT, Chance, ftdpp, seed_torch
from ftdpp.systems.ftdpp import (
    CBAM,
    CrossModal,
    ExternalAttention,
    Logits,
    mixup,
    pseudo_terms,
    stylise,
)

# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe(ftdpp.Recipe):
    """FtD++'s settings, and those of the fusion head."""

    tail: str = "sigmoid"  # of the fusion head: sigmoid (usa-singapore) or norm (day-night)
    seg_fused: float = 1.0  # cross-entropy of the fusion head
    distill_tgt: float = 0.0  # on the target, both main heads from the teacher's fusion head ...
    distill_tgt_after: int = 80_000  # ... after this many iterations

    @property
    def sees_target(self) -> bool:
        return super().sees_target or bool(self.distill_tgt)

    @property
    def uses_teacher(self) -> bool:
        return super().uses_teacher or bool(self.distill_tgt)

    def rules(self) -> dict[str, bool]:
        return super().rules() | {
            "seg_fused and distill_tgt must not be negative": (
                min(self.seg_fused, self.distill_tgt) >= 0
            ),
            "distill_tgt_after must not be negative": self.distill_tgt_after >= 0,
            "tail must be sigmoid or norm": self.tail in ("sigmoid", "norm"),
            "the width_2d/2 heads of the attention have to share 4 width_3d channels evenly: "
            "width_3d must be a multiple of width_2d/8": (
                8 * self.width_3d % max(self.width_2d, 1) == 0
            ),
        }

    def lacking(self) -> dict[str, str]:
        reasons = super().lacking()
        reasons["fusion"] = "its fusion head stands apart; the main 2D head never reads it"
        return reasons

    def idle(self) -> dict[str, str]:
        reasons = super().idle()
        if not self.distill_tgt:
            reasons["distill_tgt_after"] = "distill_tgt is 0"
        elif self.distill_tgt_after >= self.steps - 1:
            reasons["distill_tgt"] = "the run ends before distill_tgt_after"
        return reasons


# distill_single and distill_fused hold the outer factor, 0.1: of 1 and of lambda_cmkd = 0.01. (The
# release's second stage on usa-singapore leaves lambda_cmkd out: --set distill_fused=0.)
_COMMON: dict[str, Any] = {
    "fusion": False,
    "pseudo_debias": False,
    "teacher_image": "fda",
    "distill_single": 0.1,
    "distill_fused": 1e-3,
    "ce_3d": 1.0,
    "lr_2d": 1e-3,
    "steps": 100_000,
    "milestones": (80_000, 90_000),
    "gamma": 0.1,
    "val_every": 5_000,
}
# Ours: the nuScenes step, under the weights, batch, tail and mixup that the release's A2D2 names.
_KITTI: dict[str, Any] = {"mimic_src": 0.1, "mimic_tgt": 0.01, "student_mix": 0.95}
_OWN: dict[str, dict[str, Any]] = {
    "usa-singapore": {"student_mix": 0.99, "distill_tgt": 1e-3},
    "day-night": {"student_mix": 0.8, "tail": "norm"},
    "vkitti-skitti": _KITTI,
    "a2d2-skitti": _KITTI,
}

# ---- MFFM, the fusion head -----------------------------------------------------------------------


class FusionHead(nn.Module):
    """MFFM: feature map (B, C2, H, W) and point features (N, C3) -> logits (N, K).

    Both inputs are detached. As in FtD++ up to [2D, 3D] of C2 + C3 channels; then, with residual
    attention A and layers of the given widths (64 and 16 in the paper),

        sigmoid   80 -> 80, ReLU, 80 -> 80, ReLU, A, 80 -> 64, ReLU, 64 -> 64, sigmoid, 64 -> K
        norm      80 -> 80, ReLU, 80 -> 64, A, 64 -> 32, BatchNorm, ReLU, 32 -> K
    """

    def __init__(self, c2: int, c3: int, classes: int, tail: str, dropout: float = 0.2) -> None:
        super().__init__()
        c, heads = c2 + c3, c2 // 2
        self.cbam = CBAM(c2)
        self.attend_2d = ExternalAttention(c2, heads, dropout)
        self.attend_3d = ExternalAttention(c3, heads, dropout)
        before: list[nn.Module] = [nn.Linear(c, c), nn.ReLU()]
        if tail == "sigmoid":
            inner = c
            before += [nn.Linear(c, inner), nn.ReLU()]
            after = [nn.Linear(inner, c2), nn.ReLU(), nn.Linear(c2, c2), nn.Sigmoid()]
            width = c2
        else:
            inner, width = c2, c2 // 2
            before += [nn.Linear(c, inner)]
            after = [nn.Linear(inner, width), RowNorm(width), nn.ReLU()]
        self.mix = nn.Sequential(*before)
        self.attend = ExternalAttention(inner, heads, dropout)
        self.classify = nn.Sequential(*after, nn.Linear(width, classes))

    def forward(
        self, map_2d: Tensor, feat_3d: Tensor, batch_index: Tensor, pixel: Tensor
    ) -> Tensor:
        x2 = self.cbam(map_2d, batch_index, pixel)
        x3 = feat_3d.detach()
        x = self.mix(torch.cat([self.attend_2d(x2) + x2, self.attend_3d(x3) + x3], 1))
        logits: Tensor = self.classify(self.attend(x) + x)
        return logits


def look(
    net: CrossModal, fusion: FusionHead, image: Tensor, pixel: Tensor, coords: Tensor
) -> tuple[Logits, Tensor]:
    """The logits of the four heads, and those of the fusion head, (N, K) each.

    Args:
        image: (B, 3, H, W). pixel: (N, 2) row, col. coords: (N, 4) b, x, y, z.
    """
    batch_index = coords[:, 0].long()
    map_2d = net.features_2d(image)
    feat_3d = net.features_3d(coords, kernels.pyramid(coords, net.net_3d.trunk.levels))
    main_2d, mimic_2d = net.net_2d.heads(pixel_to_point(map_2d, batch_index, pixel), None)
    logits = Logits(main_2d, net.net_3d.main(feat_3d), mimic_2d, net.net_3d.mimic(feat_3d))
    return logits, fusion(map_2d, feat_3d, batch_index, pixel)


# ---- the losses ----------------------------------------------------------------------------------


def mimicry(fused: Tensor, student: Logits) -> tuple[Tensor, Tensor]:
    """MPD, (2D, 3D): each mimicry head imitates the fusion head, of logits `fused`.

    KL(sg p_f || p2'),  KL(sg p_f || p3')
    """
    p = F.softmax(fused, 1)
    return kl_divergence(p, student.mimic_2d), kl_divergence(p, student.mimic_3d)


def fused_distillation(fused: Tensor, student: Logits) -> Tensor:
    """Both main heads imitate the teacher's fusion head, of logits `fused`.

    KL(t_f || p2) + KL(t_f || p3),  t_f = softmax(fused)
    """
    t = F.softmax(fused, 1)
    return kl_divergence(t, student.main_2d) + kl_divergence(t, student.main_3d)


# ---- the system ----------------------------------------------------------------------------------


class System(ftdpp.System):
    """xMUDA's student, a fusion head that teaches it, and a moving average of both."""

    Recipe = Recipe
    training_only: ClassVar[tuple[str, ...]] = ("teacher", "teacher_fusion")
    teachers: ClassVar[dict[str, str]] = {"student": "teacher", "fusion": "teacher_fusion"}
    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        name: {**ftdpp.SCENARIOS[name], **_COMMON, **own} for name, own in _OWN.items()
    }
    default: ClassVar[dict[str, Any]] = {**_COMMON, "student_mix": 0.99}
    semi_supervised: ClassVar[dict[str, Any]] = {}  # the paper has none
    second_stage: ClassVar[dict[str, Any]] = {"pseudo": 0.1}
    # The extra term sets in at the same share of the training as in the paper.
    small: ClassVar[dict[str, Any]] = {**ftdpp.System.small, "distill_tgt_after": 768}

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)

        def head(number: int) -> FusionHead:
            seed_torch(seed, INIT, number)
            classes = len(CLASS_SETS[r.classes])
            return FusionHead(r.width_2d, r.width_3d, classes, r.tail, r.dropout[1])

        self.fusion = head(2)
        self.teacher_fusion: FusionHead | None = None
        if self.teacher is not None:
            self.teacher_fusion = head(3).requires_grad_(False)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        made = super().optimizers()
        fusion = {"name": "fusion", "params": list(self.fusion.parameters())}
        made["all"].add_param_group({**fusion, "lr": self.recipe.lr_3d})
        return made

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        r, student, fusion = self.recipe, self.student, self.fusion
        labelled, unlabelled = batches["labelled"], batches.get("unlabelled")
        weight = labelled.image.new_tensor(r.class_weights)
        terms: dict[str, Tensor] = {}

        image = labelled.image
        if r.student_mix < 1:
            assert unlabelled is not None
            image = mixup(image, unlabelled.image, r.student_mix)
        src, fused_src = look(student, fusion, image, labelled.pixel, labelled.points)
        terms["seg_2d"] = cross_entropy(src.main_2d, labelled.label, weight)
        terms["seg_3d"] = r.ce_3d * cross_entropy(src.main_3d, labelled.label, weight)
        terms["seg_fused"] = r.seg_fused * cross_entropy(fused_src, labelled.label, weight)
        if r.mimic_src:
            kl_2d, kl_3d = mimicry(fused_src, src)
            terms["mimic_2d_src"] = r.mimic_src * kl_2d
            terms["mimic_3d_src"] = r.mimic_src * kl_3d

        tgt: Logits | None = None
        if r.sees_target:
            assert unlabelled is not None
            image, coords = unlabelled.image, unlabelled.points
            tgt, fused_tgt = look(student, fusion, image, unlabelled.pixel, coords)
            terms |= self.terms_on_target(tgt, fused_tgt, unlabelled)

        if self.teacher is not None and self.teacher_fusion is not None:
            assert unlabelled is not None
            teachers = self.teacher, self.teacher_fusion
            with torch.no_grad():
                image, coords = stylise(labelled, unlabelled, r, chance.coin())
                taught, taught_fused = look(*teachers, image, labelled.pixel, coords)
            t2, t3 = F.softmax(taught.main_2d, 1), F.softmax(taught.main_3d, 1)
            single = kl_divergence(t2, src.main_2d) + kl_divergence(t3, src.main_3d)
            terms["distill_single"] = r.distill_single * single
            terms["distill_fused"] = r.distill_fused * fused_distillation(taught_fused, src)
            if r.distill_tgt and chance.iteration > r.distill_tgt_after:
                assert tgt is not None
                image, coords = unlabelled.image, unlabelled.points
                with torch.no_grad():
                    _, taught_fused = look(*teachers, image, unlabelled.pixel, coords)
                terms["distill_tgt"] = r.distill_tgt * fused_distillation(taught_fused, tgt)
        return terms

    def terms_on_target(self, tgt: Logits, fused: Tensor, batch: Batch) -> dict[str, Tensor]:
        """MPD, and in the second stage pseudo-labels; the fusion head learns from neither."""
        r = self.recipe
        terms: dict[str, Tensor] = {}
        kl_2d, kl_3d = mimicry(fused, tgt)
        if r.mimic_tgt:
            terms["mimic_2d_tgt"] = r.mimic_tgt * kl_2d
            terms["mimic_3d_tgt"] = r.mimic_tgt * kl_3d
        return terms | (pseudo_terms(r, tgt, batch, kl_2d, kl_3d) if r.pseudo else {})

    def after_step(self, iteration: int) -> None:
        super().after_step(iteration)
        if self.teacher_fusion is not None:
            update_teacher(self.teacher_fusion, self.fusion, iteration, self.recipe.ema)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """2D and 3D are the main heads, 2D+3D is the fusion head, as in the release."""
        logits, fused = look(self.student, self.fusion, batch.image, batch.pixel, batch.points)
        heads = {"2d": logits.main_2d, "3d": logits.main_3d, "2d+3d": fused}
        return {name: F.softmax(x, 1) for name, x in heads.items()}

    @classmethod
    def cost(cls, r: Any) -> float:
        """The fusion head takes as long as FtD++'s."""
        return 1.8 * super().cost(r)
