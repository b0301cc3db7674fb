"""What is done with a trained system: the evaluation protocol and pseudo-labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp.checkpoint import FORMAT, RunError, digest, save
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch, Frame, collate, sample
from ftdpp.files import Progress
from ftdpp.index import Index, original_frames, require_labels
from ftdpp.pseudo_labels import made_from, stage_identity
from ftdpp.recipe import Recipe

# ---- protocol ----------------------------------------------------------------------------------


def confusion(pred: Tensor, label: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts, row = label, column = prediction; points labelled -100 are dropped."""
    kept = label != IGNORE
    pairs = label[kept] * classes + pred[kept]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou(matrix: Tensor) -> tuple[list[float], float]:
    """IoU per class and their mean over all K classes.

    A class that neither the labels nor the predictions contain has no IoU: it is nan in the list
    and, as in the released evaluation, counts as 0 in the mean.
    """
    m = matrix.double()
    per_class = m.diag() / (m.sum(0) + m.sum(1) - m.diag())
    return per_class.tolist(), per_class.nan_to_num(0.0).mean().item()


def refine(label: Tensor, prob: Tensor, classes: int) -> tuple[Tensor, list[float]]:
    """Keep the confident pseudo-labels of each class, -100 for the rest.

    The threshold of a class is the smaller of 0.9 and the (lower) median confidence of the points
    predicted as that class, over the whole split.

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


# ---- evaluation --------------------------------------------------------------------------------


@dataclass
class Score:
    """mIoU and class IoU of a checkpoint on a split, as fractions of 1, by head."""

    domain: str
    split: str
    checkpoint: str
    frames: int
    points: int
    miou: dict[str, float]
    iou: dict[str, dict[str, float | None]]  # head -> class -> IoU; None where there is none
    outside: int  # points that the voxel grid has no room for: not predicted, not in `points`
    absent: list[str]  # classes without a labelled point: they pull the mean down, as released
    pixels: tuple[int, int] | None = None  # (H, W) of the labels, where the rows are pixels

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def batches_of(
    index: Index, r: Recipe, size: int, frames: range | None = None, depth: bool = False
) -> Iterator[tuple[int, Batch]]:
    """The frames of an index in order, `size` at a time, without augmentation.

    Yields:
        the number of frames done so far, and the batch.
    """
    frames = frames or range(len(index))
    unused = np.random.default_rng(0)  # without augmentation nothing is drawn
    for start in range(0, len(frames), size):
        chosen = frames[start : start + size]
        samples = [
            sample(index.frame(i), None, 0, unused, r.voxels_per_metre, depth) for i in chosen
        ]
        yield chosen[-1] + 1, collate(samples)


@torch.no_grad()
def evaluate(
    system: Any,
    index: Index,
    checkpoint: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    frames: range | None = None,
) -> Score:
    """Evaluation of every head on all rows: the points that fall into the image, or all pixels.

    Pixels are compared at the size of the labels on disk, as the benchmarks do. Without
    augmentation, in eval mode. A result of attention over the points of a batch depends a little on
    the batch: frames go in the index's order, `eval_batch` at a time.

    Args:
        checkpoint: what the score says of where the weights come from. frames: only these.
    Raises:
        DataError: a frame has no labels, or pixels' labels have changed since the index was made.
    """
    require_labels(index)
    r, heads = system.recipe, system.heads
    names, frames = CLASS_SETS[r.classes], frames or range(len(index))
    tell = progress or (lambda done, total, what: None)
    matrices = {h: torch.zeros(len(names), len(names), dtype=torch.int64) for h in heads}
    was_training = system.training
    system.eval()
    seen = 0
    tell(0, len(frames), "evaluating")
    pixels: tuple[int, int] | None = None
    originals = original_frames(index, frames)  # lazy: nothing is read for points
    for done, batch in batches_of(index, r, r.eval_batch, frames):
        seen += len(batch.label)
        batch = batch.to(device)
        for head, predicted, label in compared(system.predict(batch), batch, originals):
            matrices[head] += confusion(predicted, label, len(names)).cpu()
            pixels = (label.shape[0], label.shape[1]) if label.ndim == 2 else None
        tell(done - frames.start, len(frames), "evaluating")
    system.train(was_training)
    result = {head: iou(matrix) for head, matrix in matrices.items()}
    labelled = matrices[heads[-1]].sum(1).tolist()  # points of each class; equal for every head
    return Score(
        domain=index.identity["domain"],
        split=index.identity["split"] or "chosen frames",
        checkpoint=checkpoint,
        frames=len(frames),
        points=sum(labelled),
        miou={head: mean for head, (_, mean) in result.items()},
        iou={
            head: {n: None if np.isnan(v) else v for n, v in zip(names, per_class, strict=True)}
            for head, (per_class, _) in result.items()
        },
        outside=int(index.rows()[frames.start : frames.stop].sum()) - seen,
        absent=[name for name, points in zip(names, labelled, strict=True) if not points],
        pixels=pixels,
    )


def compared(
    probabilities: dict[str, Tensor], batch: Batch, originals: Iterator[Frame]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Head, predicted classes and labels, (N,) of points. Of pixels (H, W) frame by frame, at the
    size of the labels: the probabilities are enlarged (bilinear), then the class is chosen."""
    if batch.coords is not None:
        for head, prob in probabilities.items():
            yield head, prob.argmax(1), batch.label
        return
    for i, frame in enumerate(islice(originals, len(batch.counts))):
        label = torch.from_numpy(frame.label).to(batch.label)
        label = label.masked_fill(label == UNLABELLED, IGNORE)
        for head, prob in probabilities.items():
            image = prob.split(batch.counts)[i].t().view(1, -1, *batch.image.shape[-2:])
            enlarged = F.interpolate(image, label.shape, mode="bilinear")
            yield head, enlarged.argmax(1)[0], label


# ---- pseudo-labels -----------------------------------------------------------------------------


@torch.no_grad()
def write_pseudo_labels(
    path: Path,
    system: Any,
    index: Index,
    checkpoint: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict the target training split and keep the confident half of the labels.

    For every frame and each of the system's `pseudo_heads` a tensor `<token>/<head>` (u8, 255 = not
    kept), in the order of the index's points. The metadata holds thresholds and counts per class.

    Returns:
        the metadata.
    Raises:
        RunError: no label of a head survives; nothing is written.
    """
    r, heads = system.recipe, system.pseudo_heads
    tell = progress or (lambda done, total, what: None)
    classes = len(CLASS_SETS[r.classes])
    label: dict[str, list[Tensor]] = {head: [] for head in heads}
    confidence: dict[str, list[Tensor]] = {head: [] for head in heads}
    kept_rows: list[Tensor] = []
    system.eval()
    tell(0, len(index), "predicting")
    for done, batch in batches_of(index, r, r.eval_batch):
        probabilities = system.predict(batch.to(device))
        for head in heads:
            prob, predicted = probabilities[head].float().cpu().max(1)
            confidence[head].append(prob)
            label[head].append(predicted)
        kept_rows += batch.keep
        tell(done, len(index), "predicting")

    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {
        "format": FORMAT,
        **stage_identity(r),
        "class_names": CLASS_SETS[r.classes],
        "checkpoint": checkpoint,
        "weights": digest(system.state_dict()),
        "content": index.fingerprint["content"],
        "frames": len(index),
        **made_from(index),
        **{key: {} for key in ("thresholds", "kept", "predicted")},
    }
    for head in heads:
        predicted = torch.cat(label[head])
        refined, thresholds = refine(predicted, torch.cat(confidence[head]), classes)
        kept = torch.bincount(refined[refined != IGNORE], minlength=classes).tolist()
        meta["thresholds"][head], meta["kept"][head] = thresholds, kept
        meta["predicted"][head] = torch.bincount(predicted, minlength=classes).tolist()
        parts = refined.split([len(rows) for rows in kept_rows])
        for i, (token, part) in enumerate(zip(index.tokens, parts, strict=True)):
            # Points outside the voxel grid were not predicted.
            whole = torch.full((index.frame(i).rows,), UNLABELLED, dtype=torch.uint8)
            whole[kept_rows[i]] = part.masked_fill(part == IGNORE, UNLABELLED).to(torch.uint8)
            tensors[f"{token}/{head}"] = whole
    empty = [head for head in heads if not sum(meta["kept"][head])]
    if empty:
        raise RunError(f"no pseudo-label of {', '.join(empty)} was kept: nothing written")
    meta["labels"] = digest(tensors)
    save(path, tensors, meta)
    return meta
