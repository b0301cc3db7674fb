"""FtD++ in one file: the losses, the recipes, and the training step.

Notation. A *labelled* batch comes from the source (in the semi-supervised setting, half of it from labelled target frames);
an *unlabelled* one from the target. `p2`, `p3` are the class probabilities of the main 2D and 3D heads, `q2`, `q3` those of the
mimicry heads. The teacher is an exponential moving average of the student and sees the labelled batch dressed in target style.

The released code has one script per scenario, 97-99 % the same text. Here a scenario is a row of `SCENARIOS`, a method a row
of `METHODS`, and `recipe()` lays one over the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp.data import CLASS_SETS, GRID, IGNORE, Batch, density_transfer, fda, mixup
from ftdpp.models import CrossModal, Logits

# ---- loss functions: each is a mean over points, and 0 (with a graph) when no point counts --------------------------


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of the points that have a label, weighted by class: sum of w[y] * -log p[y] over sum of w[y].

    Args:
        logits: (N, K). label: (N,) int64, -100 = ignore. weight: (K,) or None.
    """
    total = F.cross_entropy(logits, label, weight, ignore_index=IGNORE, reduction="sum")
    counts = label != IGNORE
    norm = counts.sum() if weight is None else (weight[label.clamp(min=0)] * counts).sum()
    return total / norm.clamp(min=1e-12)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)), mean over points. target: (N, K) probabilities, taken as given (no gradient)."""
    rows = F.kl_div(F.log_softmax(logits, 1), target.detach(), reduction="none").sum(1)
    return rows.sum() / max(len(rows), 1)


def mimicry(student: Logits) -> tuple[Tensor, Tensor]:
    """Modality-preserving distillation: KL(p3 || q2), KL(p2 || q3). Each mimicry head imitates the other modality."""
    p2, p3 = F.softmax(student.main_2d, 1), F.softmax(student.main_3d, 1)
    return kl_divergence(p3, student.mimic_2d), kl_divergence(p2, student.mimic_3d)


def domain_distillation(teacher: Logits, student: Logits) -> tuple[Tensor, Tensor]:
    """Domain-preserving distillation, (single-modal, fused), each the sum over the two main heads.

    The fused target is softmax(p2 + p3): a second softmax over a sum of probabilities, as released. Its largest value is
    e^2 / (e^2 + K - 1), 0.596 for six classes, so this term also smooths.
    """
    p2, p3 = F.softmax(teacher.main_2d, 1), F.softmax(teacher.main_3d, 1)
    fused = F.softmax(p2 + p3, 1)
    single = kl_divergence(p2, student.main_2d) + kl_divergence(p3, student.main_3d)
    return single, kl_divergence(fused, student.main_2d) + kl_divergence(fused, student.main_3d)


def log_smoothed_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights from point counts: w_c = ln(5 N / N_c), divided by the smallest. A class without points counts as one."""
    total = max(sum(counts), 1)
    w = [math.log(5 * total / max(n, 1)) for n in counts]
    return tuple(x / min(w) for x in w)


# ---- recipes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. `ftd recipes` prints them; `--set name=value` overrides one."""

    scenario: str = ""
    method: str = ""
    classes: str = "street6"  # class set, see data.CLASS_SETS
    # what is trained, on what
    fusion: bool = True  # fusion module in the 2D main head
    supervised: str = "source"  # domain of the labelled batch: source, target (oracle), both (semi-supervised)
    # loss weights
    ce_3d: float = 1.0  # of the 3D cross-entropy
    mimic_src: float = 1.0
    mimic_tgt: float = 0.1
    distill_single: float = 0.1
    distill_fused: float = 0.01
    pseudo: float = 0.0  # of the pseudo-label cross-entropy; 1.0 in the second stage
    pseudo_debias: bool = True  # scale it by exp(-KL) of the mimicry head
    pseudo_detach: bool = False  # stop the gradient through that factor (released: no)
    # stylisation
    teacher_image: str = "coin"  # coin: mixup or FDA by a coin flip per iteration; or fda
    teacher_mix: float = 0.95  # share of the source in the teacher's mixup
    fda_beta: float = 0.1  # side of the exchanged block of the spectrum, as a share of min(H, W)
    ema: float = 0.999  # decay of the teacher
    student_mix: float = 1.0  # share of the source in the student's source image; 1 leaves it alone
    # optimisation: Adam, one learning rate for 2D, one for 3D and fusion
    lr_2d: float = 1e-4
    lr: float = 1e-3
    steps: int = 60_000
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    batch: int = 8
    eval_batch: int = 8
    val_every: int = 5_000
    save_every: int = 5_000
    # class weights of the labelled domain(s); empty: computed from the labelled training points
    class_weights: tuple[float, ...] = ()
    class_weights_tgt: tuple[float, ...] = ()
    # size of the networks and of the data
    width: int = 64
    m: int = 16
    precision: str = "fp32"  # of the two trunks: fp32, or bf16 by autocast; fusion, heads and losses are always fp32
    dropout: tuple[float, float] = (0.4, 0.2)
    image: tuple[int, int] = (225, 400)  # H, W; (0, 0) keeps the original size
    crop: tuple[int, int] = (0, 0)  # training crop H, W; (0, 0) none
    voxels_per_metre: float = 20.0


_XMUDA = {"batch": 8, "lr_2d": 1e-3, "steps": 100_000, "milestones": (80_000, 90_000), "gamma": 0.1}
_NUSCENES = {"classes": "street6", "batch": 8, "eval_batch": 8, "image": (225, 400)}
_KITTI = {"batch": 4, "eval_batch": 1, "mimic_src": 0.1, "mimic_tgt": 0.02, "distill_single": 0.01, "distill_fused": 0.001}
_KITTI_IMAGE = {"image": (0, 0), "crop": (302, 480)}

# What FtD++ does in each scenario (the six released scripts and their configurations). The key "xmuda" holds what xMUDA's own
# release does differently there; the baselines take it too.
SCENARIOS: dict[str, dict[str, Any]] = {
    "usa-singapore": {
        **_NUSCENES,
        "lr_2d": 1e-4,
        "steps": 60_000,
        "milestones": (40_000, 50_000),
        "gamma": 1.0,
        "class_weights": (1.9241476, 1.0, 2.16763851, 2.78254323, 1.54875664, 1.85686537),
        "xmuda": _XMUDA,
    },
    "day-night": {
        **_NUSCENES,
        "lr_2d": 1e-3,
        "steps": 100_000,
        "milestones": (80_000, 90_000),
        "teacher_image": "fda",
        "student_mix": 0.8,
        "class_weights": (1.97516268, 1.0, 2.10103946, 2.05838738, 1.53985452, 1.54031246),
        "xmuda": _XMUDA,
    },
    "vkitti-skitti": {
        **_KITTI,
        **_KITTI_IMAGE,
        "classes": "vkitti6",
        "steps": 60_000,
        "milestones": (48_000, 56_000),
        "val_every": 4_000,
        "ce_3d": 0.1,
        "pseudo_debias": False,
        "class_weights": (1.0, 2.03402089, 1.20641905, 2.21588055, 2.59745666, 1.82057006),
        "xmuda": {
            **_XMUDA,
            "steps": 30_000,
            "milestones": (25_000, 28_000),
            "mimic_tgt": 0.01,
            "val_every": 2_000,
            "save_every": 2_000,
        },
    },
    "a2d2-skitti": {
        **_KITTI,
        **_KITTI_IMAGE,
        "classes": "a2d2_10",
        "steps": 200_000,
        "milestones": (160_000, 180_000),
        "val_every": 10_000,
        "teacher_image": "fda",
        "student_mix": 0.95,
        "class_weights": (
            1.89090012,
            2.0585112,
            3.1970535,
            3.1111633,
            1.0,
            2.93751704,
            1.92053733,
            1.47886874,
            1.04654198,
            1.78266561,
        ),
        "xmuda": {**_XMUDA, "mimic_tgt": 0.01},
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
        1.44266267,
        3.28192912,
        2.89684809,
        3.40990009,
        1.0,
        2.22021218,
        1.44144653,
        1.26582799,
        1.03503295,
        1.59859966,
    ),
}
# Not in the paper: the six street classes on SemanticKITTI, to adapt between drives or single scans.
SCENARIOS["skitti-skitti"] = {**_KITTI_IMAGE, "classes": "street6", "batch": 4, "eval_batch": 1, "xmuda": _XMUDA}

_PLAIN = {"fusion": False, "distill_single": 0.0, "distill_fused": 0.0, "student_mix": 1.0, "ce_3d": 1.0, "pseudo_debias": False}
METHODS: dict[str, dict[str, Any]] = {
    "source-only": {**_PLAIN, "mimic_src": 0.0, "mimic_tgt": 0.0},
    "source-only-fusion": {"mimic_src": 0.0, "mimic_tgt": 0.0, "distill_single": 0.0, "distill_fused": 0.0, "student_mix": 1.0},
    "xmuda": _PLAIN,
    "ftdpp": {},
    "target-only": {**_PLAIN, "mimic_src": 0.0, "mimic_tgt": 0.0, "supervised": "target", "class_weights": ()},
}
BASED_ON_XMUDA = ("source-only", "xmuda", "target-only")
NOT_SEMI_SUPERVISED = ("source-only", "source-only-fusion", "target-only")

# A network and a schedule of the same architecture that two CPU cores train in minutes: narrower, smaller images, voxels of
# 10 cm. Without ImageNet weights the 2D branch starts from nothing, so it learns at a higher rate, and 3D at a rate that makes
# up for few steps; the class weights follow from the data. The drop of the rate at the end lets the running statistics
# (momentum 0.01 in 3D) catch up with the weights before they are used. The trust in pseudo-labels is detached: through it, the
# released form pushes the modalities apart while their cross-entropy is large, which is most of so short a training.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "width": 16,
        "m": 8,
        "image": (112, 200),
        "voxels_per_metre": 10.0,
        "batch": 4,
        "steps": 960,
        "milestones": (720,),
        "gamma": 0.1,
        "lr_2d": 2e-3,
        "lr": 6e-3,
        "val_every": 240,
        "save_every": 240,
        "class_weights": (),
        "class_weights_tgt": (),
        "pseudo_detach": True,
        "kitti": {"image": (112, 371), "crop": (112, 200)},
    },
}


class RecipeError(ValueError):
    """No such scenario, method, preset or setting, or a value of the wrong type: a mistake in the command."""


def unknown(what: str, found: str, known: Sequence[str]) -> RecipeError:
    """The error for a misspelt name, with the closest known one."""
    close = get_close_matches(found, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return RecipeError(f"unknown {what} {found!r}; {hint}known: {', '.join(known)}")


def recipe(
    scenario: str, method: str = "ftdpp", preset: str = "paper", pseudo: bool = False, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of a run: scenario row, method row, preset, second stage, then the user's overrides.

    Args:
        overrides: "name=value" strings, parsed to the field's type; a tuple is written 40,50.
    Raises:
        RecipeError: an unknown name (with the closest known one) or a value of another type.
    """
    for what, found, table in (("scenario", scenario, SCENARIOS), ("method", method, METHODS), ("preset", preset, PRESETS)):
        if found not in table:
            raise unknown(what, found, list(table))
    row, size = dict(SCENARIOS[scenario]), dict(PRESETS[preset])
    xmuda, kitti = row.pop("xmuda", {}), size.pop("kitti", {})
    if "crop" in row:
        size |= kitti
    values = {**row, **(xmuda if method in BASED_ON_XMUDA else {}), **METHODS[method], **size}
    if row.get("supervised") == "both" and method in NOT_SEMI_SUPERVISED:
        raise RecipeError(f"{method} has no semi-supervised form; drop --ssda, or use --method xmuda or ftdpp")
    if pseudo:
        values["pseudo"] = 1.0
    made = Recipe(scenario=scenario, method=method, **values)
    fields = {f.name: f for f in dataclasses.fields(Recipe) if f.name not in ("scenario", "method")}
    for text in overrides:
        name, sep, value = text.partition("=")
        if not sep:
            raise RecipeError(f"--set wants name=value; found {text!r}")
        if name not in fields:
            raise unknown("setting", name, list(fields))
        made = dataclasses.replace(made, **{name: _parse(name, value, getattr(made, name), str(fields[name].type))})
    _check(made)
    if pseudo and not made.pseudo:
        raise RecipeError("--pseudo needs a pseudo weight above 0")
    if made.pseudo and not pseudo:
        raise RecipeError("pseudo > 0 needs pseudo-labels; name their file with --pseudo FILE")
    return made


def _check(r: Recipe) -> None:
    """Refuse values that no training could use."""
    weights = (r.lr, r.lr_2d, r.ce_3d, r.mimic_src, r.mimic_tgt, r.pseudo, r.distill_single, r.distill_fused)
    shares = (r.student_mix, r.teacher_mix, r.fda_beta, r.ema)
    periods = (r.steps, r.batch, r.eval_batch, r.val_every, r.save_every)
    rules = {
        "steps, batch, eval_batch, val_every and save_every must be at least 1": min(periods) >= 1,
        "a semi-supervised batch holds source and labelled target frames: batch must be at least 2": (
            r.supervised != "both" or r.batch >= 2
        ),
        "supervised must be source, target or both": r.supervised in ("source", "target", "both"),
        "precision must be fp32 or bf16": r.precision in ("fp32", "bf16"),
        "teacher_image must be coin or fda": r.teacher_image in ("coin", "fda"),
        f"classes must be one of {', '.join(CLASS_SETS)}": r.classes in CLASS_SETS,
        "learning rates and loss weights must not be negative": min(weights) >= 0,
        "student_mix, teacher_mix, fda_beta and ema must lie in 0..1": all(0 <= v <= 1 for v in shares),
        "dropout wants two numbers in 0..1 (2D encoder, attention)": len(r.dropout) == 2 and all(0 <= p < 1 for p in r.dropout),
        "image and crop want H,W; 0,0 for none": len(r.image) == len(r.crop) == 2 and min(*r.image, *r.crop) >= 0,
        # Narrower than 16, oneDNN's gradient of the strided 1x1 convolutions crashes (torch 2.13 on a CPU).
        "width must be at least 16 and a multiple of 8, and m of 4": r.width >= 16 and r.m > 0 and r.width % 8 == r.m % 4 == 0,
        "the width/2 heads of the attention have to share 4 m channels evenly: m must be a multiple of width/8": (
            not r.fusion or 8 * r.m % max(r.width, 1) == 0
        ),
        f"voxels_per_metre must lie in 0..100: the grid has {GRID} voxels a side": 0 < r.voxels_per_metre <= 100,
        "gamma and class weights must not be negative, and one class weight must be above 0": (
            r.gamma >= 0 and all(min(w) >= 0 and max(w) > 0 for w in (r.class_weights, r.class_weights_tgt) if w)
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise RecipeError("; ".join(broken))


def _parse(name: str, text: str, old: Any, kind: str) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, tuple):
            number = float if "float" in kind else int
            value = tuple(number(part) for part in text.split(",") if part)
        else:
            value = type(old)(text)
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise RecipeError(f"--set {name}={text}: expected {kind}, as in {name}={old}") from None


# ---- the training step ---------------------------------------------------------------------------------------------


def uses_target(r: Recipe) -> bool:
    """Whether a step of this recipe needs a batch of unlabelled target frames."""
    return bool(r.mimic_tgt or r.pseudo or uses_teacher(r) or r.student_mix < 1)


def uses_teacher(r: Recipe) -> bool:
    """Whether a step of this recipe needs the EMA teacher."""
    return bool(r.distill_single or r.distill_fused)


def stylise(labelled: Batch, unlabelled: Batch, r: Recipe, coin: bool) -> tuple[Tensor, Tensor]:
    """What the teacher sees: the i-th labelled frame in the style of the i-th unlabelled one.

    Image: FDA, or by the coin (False) mixup. Points: density transfer.

    Returns:
        image (B, 3, H, W), coords (N, 4).
    """
    if r.teacher_image == "fda" or coin:
        image = fda(labelled.image, unlabelled.image, r.fda_beta)
    else:
        image = mixup(labelled.image, unlabelled.image, r.teacher_mix)
    return image, density_transfer(labelled.coords, unlabelled.coords, len(labelled.image))


def source_share(frames: int) -> int:
    """How many frames of a semi-supervised batch, its first ones, are of the source; the others are labelled target frames."""
    return round(0.5 * frames)


def supervised_loss(logits: Tensor, batch: Batch, weight: Tensor, weight_tgt: Tensor | None) -> Tensor:
    """Cross-entropy of the labelled batch. Semi-supervised: the mean of its source half and its target half."""
    if weight_tgt is None:
        return cross_entropy(logits, batch.label, weight)
    is_source = batch.coords[:, 0] < source_share(len(batch.image))
    source, target = batch.label.masked_fill(~is_source, IGNORE), batch.label.masked_fill(is_source, IGNORE)
    return 0.5 * (cross_entropy(logits, source, weight) + cross_entropy(logits, target, weight_tgt))


def step(
    student: CrossModal, teacher: CrossModal | None, labelled: Batch, unlabelled: Batch | None, r: Recipe, coin: bool
) -> dict[str, Tensor]:
    """The loss terms of one iteration, each weighted: their sum is what is minimised, and what is logged.

    Args:
        student, teacher: in train mode, both (the teacher too normalises by its own batch and drops out).
        labelled: batch with labels. unlabelled: of the target; its labels are not read. None if the recipe needs none.
        coin: this iteration's coin flip, True for FDA.
    """
    weight = labelled.image.new_tensor(r.class_weights)
    weight_tgt = labelled.image.new_tensor(r.class_weights_tgt) if r.supervised == "both" else None
    terms: dict[str, Tensor] = {}

    image = labelled.image
    if r.student_mix < 1:
        assert unlabelled is not None
        image = mixup(image, unlabelled.image, r.student_mix)
    src = student(image, labelled.pixel, labelled.coords)
    terms["seg_2d"] = supervised_loss(src.main_2d, labelled, weight, weight_tgt)
    terms["seg_3d"] = r.ce_3d * supervised_loss(src.main_3d, labelled, weight, weight_tgt)
    if r.mimic_src:
        kl_2d, kl_3d = mimicry(src)
        terms["mimic_2d_src"], terms["mimic_3d_src"] = r.mimic_src * kl_2d, r.mimic_src * kl_3d

    if r.mimic_tgt or r.pseudo:
        assert unlabelled is not None
        tgt = student(unlabelled.image, unlabelled.pixel, unlabelled.coords)
        kl_2d, kl_3d = mimicry(tgt)
        if r.mimic_tgt:
            terms["mimic_2d_tgt"], terms["mimic_3d_tgt"] = r.mimic_tgt * kl_2d, r.mimic_tgt * kl_3d
        if r.pseudo:
            assert unlabelled.label_2d is not None and unlabelled.label_3d is not None
            for name, logits, label, kl in (
                ("pseudo_2d", tgt.main_2d, unlabelled.label_2d, kl_2d),
                ("pseudo_3d", tgt.main_3d, unlabelled.label_3d, kl_3d),
            ):
                # One factor a batch and modality: little trust where the modalities disagree. Released: not detached.
                trust = torch.exp(-(kl.detach() if r.pseudo_detach else kl)) if r.pseudo_debias else 1.0
                terms[name] = r.pseudo * trust * cross_entropy(logits, label)

    if uses_teacher(r):
        assert unlabelled is not None and teacher is not None
        with torch.no_grad():
            styled_image, styled_coords = stylise(labelled, unlabelled, r, coin)
            target = teacher(styled_image, labelled.pixel, styled_coords)
        single, fused = domain_distillation(target, src)
        terms["distill_single"], terms["distill_fused"] = r.distill_single * single, r.distill_fused * fused
    return terms
