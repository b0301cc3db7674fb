"""CrossMatch: adaptation without the source data (Yin et al., ICCV 2023). A RECONSTRUCTION.

Only the abstract is public (DOI 10.1109/ICCV51070.2023.01991). It names: a trained source model and
no source data; an asymmetric two-stream network whose auxiliary stream takes depth as additional
input and is used in training only; pseudo-labels denoised by two heads; a cross-modal consistency
between the streams. Everything below that it does not name (trunk, gates, thresholds, weights,
schedule) is our design. The paper reports 57.7 (GTA5 -> Cityscapes) and 57.5 (SYNTHIA) mIoU.

    f, main        image         -> scores; predicts; starts as the source model
    g, auxiliary   image + depth -> scores; a copy of f and a depth encoder behind closed gates
    f', g'         their teachers: moving averages that see the weak view        after_step()
    strong view    colours, blur, a rectangle of another frame                   strong_view()
    pseudo-labels  the class of their mean, where they agree and are sure        System.kept()

    loss = CE(f(strong), y) + CE(g(strong), y)
         + consistency * [ KL(sg g'(weak) || f(strong)) + KL(sg f'(weak) || g(strong)) ]

A row is a point in the image or, in a dense data set, a pixel: the same place in both views. The
step is `System.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import recipe
from ftdpp.data import CLASS_SETS, IGNORE, Batch
from ftdpp.kernels import pixel_to_point
from ftdpp.losses import kl_divergence, kl_rows, trusted_cross_entropy
from ftdpp.models import update_teacher
from ftdpp.systems import INIT, VIEW, Chance, Stream, seed_torch
from ftdpp.systems import System as Contract
from ftdpp.systems.image import TRUNKS, Camera, camera_of

# ---- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The shared settings, and those of CrossMatch."""

    trunk: str = "resnet34"  # the source model's
    dropout: float = 0.4  # of the resnet34 encoder
    auxiliary: bool = True  # the second stream; without it: plain self-training
    lr_depth: float = 1e-3  # of the depth encoder, which begins from nothing
    depth: str = "sensor"  # what it sees beside the image: sensor (LiDAR, disparity), or none
    agree: bool = True  # pseudo-labels only where both teachers have the same
    trust: bool = True  # weight pseudo-labels by exp(-KL) between the teachers
    consistency: float = 1.0  # weight of the cross-modal consistency
    consistency_to: str = "both"  # who learns from the other's teacher: both, main, auxiliary
    ceiling: float = 0.9  # no class threshold is higher
    threshold_decay: float = 0.9  # of the running medians of the classes' confidences
    ema: float = 0.999  # decay of the teachers
    view_jitter: float = 0.4  # strong view: brightness, contrast, saturation times 1 +- this
    view_blur: float = 1.15  # strong view: largest standard deviation, pixels
    view_mix: float = 0.5  # strong view: sides of the foreign rectangle, a share of the image's

    def rules(self) -> dict[str, bool]:
        shares = (self.ceiling, self.threshold_decay, self.ema, self.view_jitter, self.view_mix)
        return super().rules() | {
            f"trunk must be one of {', '.join(TRUNKS)}": self.trunk in TRUNKS,
            "dropout must lie in 0..1": 0 <= self.dropout < 1,
            "lr_depth must not be negative": self.lr_depth >= 0,
            "depth must be sensor or none": self.depth in ("sensor", "none"),
            "consistency and view_blur must not be negative": (
                min(self.consistency, self.view_blur) >= 0
            ),
            "consistency_to must be both, main or auxiliary": (
                self.consistency_to in ("both", "main", "auxiliary")
            ),
            "ceiling, threshold_decay, ema, view_jitter and view_mix must lie in 0..1": all(
                0 <= share <= 1 for share in shares
            ),
            "a strong view mixes two frames: batch must be at least 2": self.batch >= 2,
        }

    def lacking(self) -> dict[str, str]:
        reasons = {
            "it has no 3D network": recipe.OF_3D,
            "the source model decides it": System.inherited,
            "it has no labels to weight": ("class_weights",),
            "the method decides it": ("auxiliary",),
        }
        if not self.auxiliary:
            names = ("lr_depth", "depth", "agree", "trust", "consistency", "consistency_to")
            reasons["it has no auxiliary stream"] = names
        return {name: why for why, names in reasons.items() for name in names}

    def idle(self) -> dict[str, str]:
        reasons = {} if self.trunk == "resnet34" else {"dropout": "DeepLabV2 has none"}
        if self.depth == "none":
            reasons["lr_depth"] = "depth is none"
        if not self.consistency:
            reasons["consistency_to"] = "consistency is 0"
        return super().idle() | reasons


# Ours. The rates are a tenth of those of a source model: the network is trained already.
_COMMON: dict[str, Any] = {
    "lr_2d": 1e-4,
    "steps": 20_000,
    "milestones": (15_000,),
    "val_every": 2_000,
    "save_every": 2_000,
}
_DENSE: dict[str, Any] = {
    **_COMMON,
    "image": (512, 1024),
    "crop": (512, 512),
    "batch": 4,
    "eval_batch": 1,
}

# ---- the auxiliary stream ------------------------------------------------------------------------

NEAR = 2.0  # metres; what is nearer counts as that near


class DepthEncoder(nn.Module):
    """Depth (B, 1, H, W) in metres, 0 = nothing there -> what it adds to the trunk's three stages.

    Three strided convolutions on inverse depth and validity. Each result passes a gate, one number
    a channel, that starts at zero: in the beginning nothing is added.
    """

    def __init__(self, stages: tuple[int, int, int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
            )
            for cin, cout in zip((2, *stages[:2]), stages, strict=True)
        )
        self.gates = nn.ParameterList(torch.zeros(channels, 1, 1) for channels in stages)

    def forward(self, depth: Tensor) -> list[Tensor]:
        height, width = depth.shape[-2:]
        depth = F.pad(depth, (0, -width % 16, 0, -height % 16))  # as the U-Net pads its image
        valid = (depth > 0).to(depth.dtype)
        x = torch.cat([valid * NEAR / depth.clamp(min=NEAR), valid], 1)
        added = []
        for conv, gate in zip(self.convs, self.gates, strict=True):
            x = conv(x)
            added.append(gate * x)
        return added


class Auxiliary(nn.Module):
    """g: the camera network and, where there is depth, its encoder."""

    def __init__(self, r: Any) -> None:
        super().__init__()
        self.camera = camera_of(r)
        self.depth = DepthEncoder(self.camera.trunk.stages) if r.depth == "sensor" else None

    def forward(self, image: Tensor, depth: Tensor | None) -> Tensor:
        if self.depth is None:
            return self.camera(image)
        assert depth is not None, "a stream with depth was asked for"
        return self.camera(image, self.depth(depth))


# ---- the strong view -----------------------------------------------------------------------------


class View(NamedTuple):
    """Images in which M rows lie, and which row of the weak view each of them is."""

    image: Tensor  # (B, 3, H, W)
    depth: Tensor | None  # (B, 1, H, W)
    frame: Tensor  # (M,)
    pixel: Tensor  # (M, 2) row, col
    row: Tensor  # (M,)


def recolour(image: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with brightness, contrast and saturation times `factors`
    (3, B)."""
    bright, contrast, colour = factors[..., None, None, None]
    x = (image * bright).clamp(0, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    grey = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    return (grey + (x - grey) * colour).clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """An image (3, H, W) after a Gaussian of a standard deviation in pixels; 0 changes nothing."""
    reach = math.ceil(3 * sigma)
    if not reach:
        return image
    steps = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(image[None], (reach,) * 4, mode="replicate")[0][:, None]
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x[:, 0]


def strong_view(batch: Batch, r: Recipe, rng: np.random.Generator) -> View:
    """The batch with other colours, blurred, and in each frame a rectangle of the next frame.

    Pixels, depth and rows of the rectangle move alike. Where a row was covered it is gone, where it
    is shown in two frames it counts twice.
    """
    image = batch.image
    frames, _, height, width = image.shape
    factors = rng.uniform(1 - r.view_jitter, 1 + r.view_jitter, (3, frames))
    image = recolour(image, image.new_tensor(factors))
    sigmas = rng.uniform(0, r.view_blur, frames) * (rng.random(frames) < 0.5)
    image = torch.stack([blur(x, s) for x, s in zip(image, sigmas.tolist(), strict=True)])

    inside = torch.zeros(frames, height, width, dtype=torch.bool)
    high, wide = round(r.view_mix * height), round(r.view_mix * width)
    for b in range(frames):
        top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
        inside[b, top : top + high, left : left + wide] = True
    inside = inside.to(image.device)
    image = torch.where(inside[:, None], image.roll(-1, 0), image)
    depth = batch.depth
    if depth is not None:
        depth = torch.where(inside[:, None], depth.roll(-1, 0), depth)

    own, rows = batch.batch_index, torch.arange(len(batch.pixel), device=image.device)
    guest = (own - 1) % frames  # the frame that shows a rectangle of this row's frame
    y, x = batch.pixel.unbind(1)
    stays, shown = ~inside[own, y, x], inside[guest, y, x]
    return View(
        image=image,
        depth=depth,
        frame=torch.cat([own[stays], guest[shown]]),
        pixel=torch.cat([batch.pixel[stays], batch.pixel[shown]]),
        row=torch.cat([rows[stays], rows[shown]]),
    )


# ---- pseudo-labels -------------------------------------------------------------------------------


class Thresholds(nn.Module):
    """For each class the running median of its confidences; at most `ceiling` counts.

    The median over a whole split (`evaluate.refine`) needs a pass over the data; an exponential
    average of the batches' medians follows the teachers while they learn.
    """

    def __init__(self, classes: int, ceiling: float, decay: float) -> None:
        super().__init__()
        self.ceiling, self.decay = ceiling, decay
        self.register_buffer("median", torch.zeros(classes))  # 0: the class was not met yet
        self.median: Tensor

    def update(self, label: Tensor, confidence: Tensor) -> None:
        """label, confidence (N,): what was predicted, and how sure."""
        for c in range(len(self.median)):
            mine = confidence[label == c]
            if len(mine):
                old, new = self.median[c], mine.median()
                self.median[c] = torch.where(old > 0, torch.lerp(new, old, self.decay), new)

    def forward(self, label: Tensor, confidence: Tensor) -> Tensor:
        """(N,) whether each is sure enough."""
        return confidence >= self.median.clamp(max=self.ceiling)[label]


class Taught(NamedTuple):
    """What the teachers say of the N rows of a weak view."""

    main: Tensor  # (N, K) probabilities of f'
    auxiliary: Tensor | None  # (N, K) of g'
    label: Tensor  # (N,) the class of their mean
    confidence: Tensor  # (N,) its probability
    weight: Tensor  # (N,) trust


# ---- the system ----------------------------------------------------------------------------------


class System(Contract):
    """CrossMatch and, without its auxiliary stream, plain self-training."""

    Recipe = Recipe
    heads = ("2d",)
    pseudo_heads = ("2d",)
    training_only = ("auxiliary", "main_teacher", "auxiliary_teacher", "thresholds")
    teachers: ClassVar[dict[str, str]] = {"main": "main_teacher"}
    source_free = True
    inherited = ("classes", "width_2d", "image", "crop", "trunk")
    note = (
        "a reconstruction from the abstract of CrossMatch (ICCV 2023), which reports 57.7 and 57.5 "
        "mIoU on GTA5 and SYNTHIA -> Cityscapes"
    )
    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        "gta5-cityscapes": {**_DENSE, "classes": "cityscapes19"},
        "synthia-cityscapes": {**_DENSE, "classes": "synthia16"},
    }
    default = _COMMON
    # Tuned on val, seed 0 of day -> night and gta5 -> cityscapes. At five times this rate
    # pseudo-labels of 19 classes collapse; ema 0.999 would take longer than the run to follow.
    small: ClassVar[dict[str, Any]] = {
        **recipe.SMALL,
        "lr_2d": 1e-4,
        "lr_depth": 5e-3,
        "steps": 360,
        "milestones": (270,),
        "val_every": 120,
        "save_every": 120,
        "ema": 0.99,
    }

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)
        seed_torch(seed, INIT, 0)
        self.main = camera_of(r)
        self.main_teacher: Camera | None = None
        self.auxiliary: Auxiliary | None = None
        self.auxiliary_teacher: Auxiliary | None = None
        if training:
            self.main_teacher = camera_of(r).requires_grad_(False)
            self.thresholds = Thresholds(len(CLASS_SETS[r.classes]), r.ceiling, r.threshold_decay)
            if r.auxiliary:
                self.auxiliary = Auxiliary(r)
                self.auxiliary_teacher = Auxiliary(r).requires_grad_(False)
            self.start_from(self.main.state_dict())

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Every network begins as the source model; the gates are closed."""
        assert self.main_teacher is not None, "built for training"
        self.main.load_state_dict(weights)
        self.main_teacher.load_state_dict(weights)
        if self.auxiliary is not None and self.auxiliary_teacher is not None:
            self.auxiliary.camera.load_state_dict(weights)
            self.auxiliary_teacher.load_state_dict(self.auxiliary.state_dict())

    def train(self, mode: bool = True) -> System:
        """In training the teachers normalise with their batch's statistics, without dropout."""
        super().train(mode)
        for teacher, _ in self._teachers():
            for module in teacher.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        return self

    def _teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each teacher and its student."""
        if self.main_teacher is not None:
            yield self.main_teacher, self.main
        if self.auxiliary_teacher is not None and self.auxiliary is not None:
            yield self.auxiliary_teacher, self.auxiliary

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        depth = r.auxiliary and r.depth == "sensor"
        return {"target": Stream("tgt", "train", r.batch, False, 2, depth=depth, weak=True)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        r, params = self.recipe, list(self.main.parameters())
        encoder: list[nn.Parameter] = []
        if self.auxiliary is not None:
            params += self.auxiliary.camera.parameters()
            if self.auxiliary.depth is not None:
                encoder += self.auxiliary.depth.parameters()
        groups = [{"name": "2d", "params": params, "lr": r.lr_2d}]
        if encoder:
            groups.append({"name": "depth", "params": encoder, "lr": r.lr_depth})
        return {"all": torch.optim.Adam(groups, fused=True)}

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        """The teachers on the weak view: p = (softmax f' + softmax g') / 2 and its class."""
        assert self.main_teacher is not None, "built for training"
        r, place = self.recipe, (batch.batch_index, batch.pixel)
        main = F.softmax(pixel_to_point(self.main_teacher(batch.image), *place), 1)
        mean, auxiliary = main, None
        weight = torch.ones_like(main[:, 0])
        if self.auxiliary_teacher is not None:
            scores = self.auxiliary_teacher(batch.image, batch.depth)
            auxiliary = F.softmax(pixel_to_point(scores, *place), 1)
            mean = (main + auxiliary) / 2
            if r.trust:
                weight = torch.exp(-kl_rows(main, auxiliary))
        confidence, label = mean.max(1)
        return Taught(main, auxiliary, label, confidence, weight)

    def kept(self, taught: Taught) -> Tensor:
        """(N,) the rows whose pseudo-label counts: the teachers agree and are sure enough."""
        sure: Tensor = self.thresholds(taught.label, taught.confidence)
        if taught.auxiliary is not None and self.recipe.agree:
            sure = sure & (taught.main.argmax(1) == taught.auxiliary.argmax(1))
        return sure

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        r, batch = self.recipe, batches["target"]
        taught = self.teach(batch)
        self.thresholds.update(taught.label, taught.confidence)
        label = taught.label.masked_fill(~self.kept(taught), IGNORE)

        view = strong_view(batch, r, chance.generator(VIEW))
        label, weight = label[view.row], taught.weight[view.row]
        main = pixel_to_point(self.main(view.image), view.frame, view.pixel)
        terms = {"pseudo_main": trusted_cross_entropy(main, label, weight)}
        if self.auxiliary is not None:
            assert taught.auxiliary is not None
            scores = self.auxiliary(view.image, view.depth)
            auxiliary = pixel_to_point(scores, view.frame, view.pixel)
            terms["pseudo_auxiliary"] = trusted_cross_entropy(auxiliary, label, weight)
            if r.consistency and r.consistency_to != "auxiliary":
                kl = kl_divergence(taught.auxiliary[view.row], main)
                terms["consistency_main"] = r.consistency * kl
            if r.consistency and r.consistency_to != "main":
                kl = kl_divergence(taught.main[view.row], auxiliary)
                terms["consistency_auxiliary"] = r.consistency * kl
        return terms

    def after_step(self, iteration: int) -> None:
        """Teachers follow their students: until iteration 1 / (1 - ema) as the plain mean of all so
        far. The running statistics, with which the main stream will predict, are those of the weak
        view, which the teachers see: of the strong one they are off.
        """
        for teacher, student in self._teachers():
            update_teacher(teacher, student, iteration, self.recipe.ema)
            for weak, strong in zip(teacher.buffers(), student.buffers(), strict=True):
                strong.copy_(weak)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """The main stream alone: it needs no depth."""
        scores = pixel_to_point(self.main(batch.image), batch.batch_index, batch.pixel)
        return {"2d": F.softmax(scores, 1)}

    def camera_network(self) -> dict[str, Tensor]:
        return self.main.state_dict()

    def audit(self, batches: Iterator[Batch]) -> list[dict[str, Any]]:
        """Precision and coverage of the pseudo-labels, class by class, in percent.

        Before denoising every row has a label, the class of the mean; after it those that `kept`
        says. Precision: of the rows that have the class as pseudo-label, how many are of it.
        Coverage: of the rows that are of the class, how many have a pseudo-label. Also the
        precision of either teacher alone, on all rows: which of them is wrong.
        """
        names = CLASS_SETS[self.recipe.classes]
        counts: dict[str, Tensor] = {}

        def count(name: str, label: Tensor) -> None:
            found = torch.bincount(label, minlength=len(names)).cpu()
            counts[name] = counts.get(name, torch.zeros(len(names), dtype=torch.int64)) + found

        for batch in batches:
            taught, truth = self.teach(batch), batch.label
            known = truth != IGNORE
            kept = self.kept(taught) & known
            count("rows", truth[known])
            count("covered", truth[kept])
            labels = {"before": (taught.label, known), "after": (taught.label, kept)}
            labels["main"] = taught.main.argmax(1), known
            if taught.auxiliary is not None:
                labels["auxiliary"] = taught.auxiliary.argmax(1), known
            for name, (label, rows) in labels.items():
                count(name, label[rows])
                count(f"right {name}", label[rows & (label == truth)])

        def percent(part: Tensor, whole: Tensor) -> list[str]:
            parts = [*(part / whole).tolist(), (part.sum() / whole.sum()).item()]
            return ["" if math.isnan(x) else f"{100 * x:.2f}" for x in parts]

        columns: dict[str, list[Any]] = {"class": [*names, "all"]}
        columns["rows"] = [*counts["rows"].tolist(), int(counts["rows"].sum())]
        columns["precision before"] = percent(counts["right before"], counts["before"])
        columns["precision after"] = percent(counts["right after"], counts["after"])
        columns["coverage after"] = percent(counts["covered"], counts["rows"])
        for name in ("main", "auxiliary"):
            if name in counts:
                columns[f"precision {name} teacher"] = percent(
                    counts[f"right {name}"], counts[name]
                )
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def cost(cls, r: Any) -> float:
        """3 for a forward and backward, 1 for a teacher's forward, for each stream."""
        return 4.0 * r.batch * (2 if r.auxiliary else 1)
