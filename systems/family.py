"""xMUDA and the baselines: FtD++'s networks and step with terms switched off, or one exchanged.

    source-only, target-only   cross-entropy on one domain; target-only learns, with --ssda, from
                               the labelled target frames alone
    source-target              with --ssda only: source and labelled target, nothing adapted ("S+T")
    minent                     + the entropy of predictions on the target                entropy()
    logcoral                   + the distance of the domains' feature covariances        log_coral()
    fda                        source images in the target's style                       ftdpp.fda()
    xmuda                      + mimicry on both domains; with --ssda it is xMoSSDA

What the papers call PL is the second stage of a method that does not adapt: `source-only+pl` in
`ftd compare`, with --ssda `source-target+pl`.

They follow xMUDA's own release (valeoai/xmuda_journal) where its configuration differs: learning
rates, schedule, the weight of mimicry on KITTI's target, and, with --ssda, class weights in the
second stage. That release has the losses of MinEnt and logCORAL, and no weight for either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftdpp.data import Batch
from ftdpp.losses import cross_entropy
from ftdpp.systems import NO_TEACHER, Chance, Stream, ftdpp
from ftdpp.systems.ftdpp import Logits

# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe(ftdpp.Recipe):
    """FtD++'s settings, and those of the baselines. Their rows in METHODS set the weights.

    `minent` takes 0.001 from ADVENT (Vu et al., 2019), which minimises the same entropy. The 1 of
    `logcoral` is ours: the term then is 0.005 to 0.04 in the first 60 iterations of the preset
    small, some per cent of the cross-entropy. That `fda` exchanges a tenth of the spectrum is ours,
    too: it is what FtD++ does to these images for its teacher.
    """

    entropy: float = 0.0  # MinEnt
    logcoral: float = 0.0  # deep logCORAL
    student_fda: float = 0.0  # FDA: as fda_beta, for the student's source image; 0: its own style
    pseudo_weighted: bool = False  # class_weights_tgt in the cross-entropy of pseudo-labels

    @property
    def sees_target(self) -> bool:
        return super().sees_target or bool(self.entropy or self.logcoral)

    @property
    def uses_target(self) -> bool:
        return super().uses_target or bool(self.student_fda)

    def rules(self) -> dict[str, bool]:
        return super().rules() | {
            "entropy and logcoral must not be negative": min(self.entropy, self.logcoral) >= 0,
            "student_fda must lie in 0..1": 0 <= self.student_fda <= 1,
            "pseudo-labels are weighted by class or debiased: pseudo_weighted or pseudo_debias": (
                not (self.pseudo_weighted and self.pseudo_debias)
            ),
        }

    def lacking(self) -> dict[str, str]:
        reasons = {}
        if not self.entropy:
            reasons["entropy"] = "it does not minimise the entropy; minent does"
        if not self.logcoral:
            reasons["logcoral"] = "it does not align covariances; logcoral does"
        if not self.student_fda:
            reasons["student_fda"] = "its source images keep their style; fda changes it"
        if not self.pseudo or self.supervised != "both":
            reasons["pseudo_weighted"] = "it has no pseudo-labels beside labelled target frames"
        return super().lacking() | reasons


_COMMON: dict[str, Any] = {
    **NO_TEACHER,
    "fusion": False,
    "ce_3d": 1.0,
    "pseudo_debias": False,
    "batch": 8,
    "lr_2d": 1e-3,
    "steps": 100_000,
    "milestones": (80_000, 90_000),
    "gamma": 0.1,
}
_SSDA: dict[str, Any] = {"supervised": "both", "pseudo_weighted": True}
_OWN: dict[str, dict[str, Any]] = {
    "vkitti-skitti": {
        "steps": 30_000,
        "milestones": (25_000, 28_000),
        "mimic_tgt": 0.01,
        "val_every": 2_000,
        "save_every": 2_000,
    },
    "a2d2-skitti": {"mimic_tgt": 0.01},
    "usa-singapore-ssda": _SSDA,
    "a2d2-skitti-ssda": {**_SSDA, "mimic_tgt": 0.01},
}

# ---- the losses ----------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """MinEnt (Vu et al., 2019): the entropy of the predictions, 1 where a point knows nothing.

        1/N sum_n sum_c -p[n, c] log p[n, c] / log K

    Args:
        logits: (N, K).
    """
    logp = F.log_softmax(logits, 1)
    rows = -(logp.exp() * logp).sum(1) / math.log(logits.shape[1])
    return rows.sum() / max(len(rows), 1)


RIDGE = 1e-3  # ours; on the diagonal of a covariance: a channel that is always 0 has a logarithm


class MatrixLog(torch.autograd.Function):
    """log C = V diag(log w) V' of the symmetric part of C = V diag(w) V', w > 0. (d, d) float64.

    The derivative in a direction E is V (Q * (V' E V)) V', where Q holds divided differences
    (Daleckii and Krein, 1965):

        Q[i, j] = (log w[i] - log w[j]) / (w[i] - w[j]),   1 / w[i] where they are equal

    Through `eigh`, autograd would divide by w[i] - w[j] alone: infinite where eigenvalues repeat,
    as they do for channels that are always 0. Not finite where C is not: then the loop can name the
    term, where `eigh` would raise.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        finite = matrix.isfinite().all()
        usable = torch.where(finite, (matrix + matrix.T) / 2, torch.eye(len(matrix)).to(matrix))
        values, vectors = torch.linalg.eigh(usable)
        ctx.save_for_backward(values, vectors)
        return torch.where(finite, (vectors * values.log()) @ vectors.T, math.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        low = torch.minimum(values[:, None], values)
        apart = torch.maximum(values[:, None], values) / low - 1
        # log1p keeps the digits that a difference of two nearly equal logarithms loses.
        quotient = torch.where(apart > 0, apart.log1p() / apart.clamp(min=1e-300), 1.0) / low
        inner = quotient * (vectors.T @ ((grad + grad.T) / 2) @ vectors)
        return vectors @ inner @ vectors.T


def covariance(x: Tensor) -> Tensor:
    """Of the channels over N >= 2 points, with a ridge: (N, d) -> (d, d) float64."""
    x = x.double()
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1) + RIDGE * torch.eye(x.shape[1]).to(x)


def log_coral(source: Tensor, target: Tensor) -> Tensor:
    """Deep logCORAL: the mean squared difference of the covariances' logarithms.

        1/d^2 || log C_S - log C_T ||^2  (Frobenius)

    The form of xMUDA's release; Wang et al. (2017) have 1/(4 d^2). 0 where a domain has fewer than
    two points.

    Args:
        source, target: (N, d), (M, d) features. The gradient reaches both.
    """
    if min(len(source), len(target)) < 2:
        return 0.0 * (source.sum() + target.sum())
    logs = [MatrixLog.apply(covariance(x)) for x in (source, target)]
    return (logs[0] - logs[1]).square().mean().to(source.dtype)


# ---- the system ----------------------------------------------------------------------------------


class System(ftdpp.System):
    """FtD++'s step under the settings of xMUDA's release."""

    Recipe = Recipe
    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        name: {**row, **_COMMON, **_OWN.get(name, {})} for name, row in ftdpp.SCENARIOS.items()
    }
    default: ClassVar[dict[str, Any]] = _COMMON
    semi_supervised: ClassVar[dict[str, Any]] = _SSDA

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        """Semi-supervised, target-only has the labelled target frames and no others."""
        made = ftdpp.System.streams(r)
        if r.supervised == "target" and r.scenario.endswith("-ssda"):
            made = {name: replace(made[name], split=f"train_{name}") for name in made}
        return made

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        r, student = self.recipe, self.student
        if r.student_fda:
            labelled, unlabelled = batches["labelled"], batches["unlabelled"]
            image = ftdpp.fda(labelled.image, unlabelled.image, r.student_fda)
            batches = {**batches, "labelled": replace(labelled, image=image)}
        if not r.logcoral:
            return super().forward(phase, batches, chance)

        # What the main heads read: the features of the labelled batch, then of the unlabelled one.
        heads = {"2d": student.net_2d.main, "3d": student.net_3d.main}
        seen: dict[str, list[Tensor]] = {name: [] for name in heads}
        watching = [
            head.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
            for name, head in heads.items()
        ]
        try:
            terms = super().forward(phase, batches, chance)
        finally:
            for hook in watching:
                hook.remove()
        points = len(batches["labelled"].label)  # of the source: they come before labelled target's
        for name, (labelled_feat, target) in seen.items():
            loss = log_coral(labelled_feat[:points], target)
            terms[f"logcoral_{name}"] = r.logcoral * loss
        return terms

    def target_terms(self, tgt: Logits, batch: Batch) -> dict[str, Tensor]:
        r = self.recipe
        terms = super().target_terms(tgt, batch)
        heads = {"2d": tgt.main_2d, "3d": tgt.main_3d}
        if r.entropy:
            terms |= {f"entropy_{name}": r.entropy * entropy(x) for name, x in heads.items()}
        if r.pseudo and r.pseudo_weighted:
            weight = batch.image.new_tensor(r.class_weights_tgt)
            for name, x in heads.items():
                loss = cross_entropy(x, batch.pseudo[name], weight)
                terms[f"pseudo_{name}"] = r.pseudo * loss
        return terms
