"""Evaluation protocol and pseudo-labels: what is done with a trained student."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ftdpp import data
from ftdpp.checkpoint import FORMAT, RunError, read_metadata, save
from ftdpp.data import CLASS_SETS, IGNORE, Batch, Index, collate, sample
from ftdpp.losses import Recipe
from ftdpp.models import CrossModal, Logits

HEADS = ("2d", "3d", "2d+3d")

# ---- protocol: confusion, IoU, pseudo-label refinement ---------------------------------------------------------------


def confusion(pred: Tensor, label: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts, row = label, column = prediction; points labelled -100 are dropped."""
    kept = label != IGNORE
    return torch.bincount(label[kept] * classes + pred[kept], minlength=classes**2).view(classes, classes)


def iou(matrix: Tensor) -> tuple[list[float], float]:
    """IoU per class and their mean over all K classes.

    A class that neither the labels nor the predictions contain has no IoU: it is nan in the list and, as in the released
    evaluation, counts as 0 in the mean.
    """
    m = matrix.double()
    per_class = m.diag() / (m.sum(0) + m.sum(1) - m.diag())
    return per_class.tolist(), per_class.nan_to_num(0.0).mean().item()


def ensemble(logits: Logits) -> Tensor:
    """softmax(p2 + p3): what the column 2D+3D takes the arg-max of."""
    return F.softmax(F.softmax(logits.main_2d, 1) + F.softmax(logits.main_3d, 1), 1)


def refine(label: Tensor, prob: Tensor, classes: int) -> tuple[Tensor, list[float]]:
    """Keep the confident pseudo-labels of each class, -100 for the rest.

    The threshold of a class is the smaller of 0.9 and the (lower) median confidence of the points predicted as that class,
    over the whole split.

    Args:
        label: (N,) predicted classes. prob: (N,) their probabilities.
    Returns:
        refined labels (N,), threshold per class (0 where nothing was predicted).
    """
    refined, thresholds = label.clone(), []
    for c in range(classes):
        mine = label == c
        threshold = min(prob[mine].median().item(), 0.9) if mine.any() else 0.0
        refined[mine & (prob < threshold)] = IGNORE
        thresholds.append(threshold)
    return refined, thresholds


# ---- evaluation ----------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """mIoU and class IoU of a checkpoint on a split, in percent-free fractions."""

    domain: str
    split: str
    checkpoint: str
    frames: int
    points: int
    miou: dict[str, float]
    iou: dict[str, dict[str, float | None]]
    outside: int  # points of the image that the voxel grid has no room for: not predicted, not in `points`
    absent: list[str]  # classes without a labelled point: they pull the mean down, as in the released evaluation

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def batches_of(index: Index, r: Recipe, size: int, frames: range | None = None) -> Iterator[tuple[int, Batch]]:
    """The frames of an index in order, without augmentation, `size` at a time, each with the number of frames done."""
    frames = frames or range(len(index))
    for start in range(0, len(frames), size):
        chosen = frames[start : start + size]
        yield (
            chosen[-1] + 1,
            collate([sample(index.frame(i), None, 0, np.random.default_rng(0), r.voxels_per_metre) for i in chosen]),
        )


@torch.no_grad()
def evaluate(
    model: CrossModal,
    index: Index,
    r: Recipe,
    checkpoint: str,
    device: torch.device | str = "cpu",
    progress: data.Progress | None = None,
) -> Score:
    """Point-level evaluation of the student in eval mode, on the points that fall into the image, without augmentation.

    2D is the main (fused) 2D head, 3D the main 3D head, 2D+3D the arg-max of the sum of their probabilities. The fused 2D
    result depends a little on the batch (attention over its points): frames go in the index's order, `eval_batch` at a time.

    Raises:
        DataError: when a frame has no labels.
    """
    data.require_labels(index)
    names = CLASS_SETS[r.classes].names
    matrices = {head: torch.zeros(len(names), len(names), dtype=torch.int64) for head in HEADS}
    was_training = model.training
    model.eval()
    seen = 0
    for done, batch in batches_of(index, r, r.eval_batch):
        seen += len(batch.label)
        batch = batch.to(device)
        logits = model(batch.image, batch.pixel, batch.coords)
        for head, scores in zip(HEADS, (logits.main_2d, logits.main_3d, ensemble(logits)), strict=True):
            matrices[head] += confusion(scores.argmax(1), batch.label, len(names)).cpu()
        if progress:
            progress(done, len(index), "evaluating")
    model.train(was_training)
    per_class = {head: iou(m) for head, m in matrices.items()}
    present = matrices["3d"].sum(1) > 0
    return Score(
        domain=index.identity["domain"],
        split=index.identity["split"] or "chosen frames",
        checkpoint=checkpoint,
        frames=len(index),
        points=int(matrices["3d"].sum()),
        miou={h: v[1] for h, v in per_class.items()},
        iou={h: {n: (None if np.isnan(x) else x) for n, x in zip(names, v[0], strict=True)} for h, v in per_class.items()},
        outside=index.fingerprint["points"] - seen,
        absent=[n for n, p in zip(names, present.tolist(), strict=True) if not p],
    )


# ---- pseudo-labels -------------------------------------------------------------------------------------------------


def family(r: Recipe) -> dict[str, str]:
    """What a pseudo-label file and a second stage must share."""
    return {"scenario": r.scenario, "method": r.method, "classes": r.classes}


def made_from(index: Index) -> dict[str, Any]:
    """What a pseudo-label file is about, for people: domain, split and image size."""
    identity = index.identity
    return {"domain": identity["domain"], "split": identity["split"] or "chosen frames", "image size": identity["size"]}


@torch.no_grad()
def write_pseudo_labels(
    path: Path,
    model: CrossModal,
    index: Index,
    r: Recipe,
    checkpoint: str,
    device: torch.device | str = "cpu",
    progress: data.Progress | None = None,
) -> dict[str, Any]:
    """Predict the target training split and keep the confident half: one safetensors file keyed by frame token.

    For every frame `<token>/label_2d`, `<token>/label_3d` (u8, 255 = not kept) and `<token>/prob_2d`, `<token>/prob_3d` (f32), in
    the order of the index's points. The metadata holds thresholds and counts per class.

    Raises:
        RunError: when no label survives.
    """
    names = CLASS_SETS[r.classes].names
    found: dict[str, list[Tensor]] = {"label_2d": [], "label_3d": [], "prob_2d": [], "prob_3d": []}
    kept_rows: list[Tensor] = []
    model.eval()
    for done, batch in batches_of(index, r, r.eval_batch):
        logits = model(batch.image.to(device), batch.pixel.to(device), batch.coords.to(device))
        for m, scores in (("2d", logits.main_2d), ("3d", logits.main_3d)):
            prob, label = F.softmax(scores.float(), 1).cpu().max(1)
            found[f"prob_{m}"] += prob.split(batch.counts)
            found[f"label_{m}"] += label.split(batch.counts)
        kept_rows += batch.keep
        if progress:
            progress(done, len(index), "predicting")

    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {
        "format": FORMAT,
        **family(r),
        "class_names": names,
        "checkpoint": checkpoint,
        "content": index.fingerprint["content"],
        "frames": len(index),
        **made_from(index),
    }
    for m in ("2d", "3d"):
        label, thresholds = refine(torch.cat(found[f"label_{m}"]), torch.cat(found[f"prob_{m}"]), len(names))
        kept = torch.bincount(label[label != IGNORE], minlength=len(names)).tolist()
        predicted = torch.bincount(torch.cat(found[f"label_{m}"]), minlength=len(names)).tolist()
        meta[f"thresholds_{m}"], meta[f"kept_{m}"], meta[f"predicted_{m}"] = thresholds, kept, predicted
        parts = label.split([len(k) for k in kept_rows])
        for i, token in enumerate(index.tokens):
            total = len(index.frame(i).xyz)  # points outside the voxel grid were not predicted
            whole = torch.full((total,), 255, dtype=torch.uint8)
            whole[kept_rows[i]] = torch.where(parts[i] == IGNORE, 255, parts[i]).to(torch.uint8)
            prob = torch.zeros(total)
            prob[kept_rows[i]] = found[f"prob_{m}"][i]
            tensors[f"{token}/label_{m}"], tensors[f"{token}/prob_{m}"] = whole, prob
    digest = hashlib.sha256()
    for key in sorted(k for k in tensors if "/label_" in k):
        digest.update(tensors[key].numpy().tobytes())
    meta["labels"] = digest.hexdigest()
    if not sum(meta["kept_2d"]) or not sum(meta["kept_3d"]):
        raise RunError(f"no pseudo-label was kept (2D {sum(meta['kept_2d'])}, 3D {sum(meta['kept_3d'])} points): nothing written")
    save(path, tensors, meta)
    return meta


class PseudoLabels:
    """A file that `write_pseudo_labels` wrote, checked against the run that wants to train on it.

    Raises:
        RunError: unreadable, of another scenario, method or class set, made from other frames, or keeping nothing.
    """

    def __init__(self, path: Path, r: Recipe, index: Index) -> None:
        self.path, self.meta = path, read_metadata(path)
        if "thresholds_2d" not in self.meta:
            raise RunError(f"{path}: not a pseudo-label file; make one with: ftd pseudo RUN --out FILE")
        for key, wanted in family(r).items():
            if self.meta.get(key) != wanted:
                raise RunError(
                    f"{path}: made for {key} {self.meta.get(key)!r}, this run has {wanted!r}; make one from a run of "
                    f"this {key} with: ftd pseudo RUN --out FILE"
                )
        if self.meta["content"] != index.fingerprint["content"]:
            mine = {**made_from(index), "frames": len(index)}
            differing = [f"{k} {self.meta[k]} instead of {v}" for k, v in mine.items() if self.meta.get(k, v) != v]
            raise RunError(
                f"{path}: not made from this run's unlabelled target: {', '.join(differing) or 'other frames or points'}; "
                "make one from a first stage with the same data, image size and frames: ftd pseudo RUN --domain DOMAIN --out FILE"
            )
        if not sum(self.meta["kept_2d"]) or not sum(self.meta["kept_3d"]):
            raise RunError(f"{path}: keeps no label; train the first stage longer")

    def attach(self, batch: Batch) -> None:
        """Set batch.label_2d and label_3d, (N,) int64 with -100 where no label was kept."""
        with safe_open(self.path, "pt") as file:
            for m in ("2d", "3d"):
                rows = [file.get_tensor(f"{t}/label_{m}")[k] for t, k in zip(batch.tokens, batch.keep, strict=True)]
                label = torch.cat(rows).long()
                setattr(batch, f"label_{m}", label.masked_fill(label == 255, IGNORE))
