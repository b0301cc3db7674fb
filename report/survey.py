"""What a run's checkpoint makes of a labelled split: everything that a report shows of it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftdpp.checkpoint import RunError
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch
from ftdpp.evaluate import batches_of, compared, confusion, iou, refine
from ftdpp.files import Progress
from ftdpp.index import Index, original_frames, require_labels


class Kept(NamedTuple):
    """Pseudo-labels of one class, before and after refinement, as fractions of 1."""

    threshold: float  # of the confidence
    coverage: float  # of the rows of this class: how many keep a label
    before: float  # of the rows predicted as this class: how many are of it
    after: float  # the same of those that are kept


@dataclass
class Survey:
    """Counts over a split. A row is a point, or a pixel of a dense data set."""

    classes: tuple[str, ...]
    heads: tuple[str, ...]
    confusion: dict[str, Tensor]  # head -> (K, K) int64, row = label, column = prediction
    agreement: dict[tuple[str, str], float]  # share of rows where two heads say the same
    teacher: dict[str, float] = field(default_factory=dict)  # ... a head and that of its teacher
    pseudo: dict[str, list[Kept]] = field(default_factory=dict)  # head -> class by class
    wrong: list[float] = field(default_factory=list)  # by frame: share by the last head; nan: none

    def miou(self, head: str) -> float:
        return iou(self.confusion[head])[1]


@contextmanager
def _as_teacher(system: Any) -> Iterator[None]:
    """Within it, each network of a system that has a teacher is that teacher."""
    pairs = [(a, b) for a, b in system.teachers.items() if getattr(system, b, None) is not None]
    for a, b in pairs:
        student, teacher = getattr(system, a), getattr(system, b)
        setattr(system, a, teacher)
        setattr(system, b, student)
    try:
        yield
    finally:
        for a, b in pairs:
            teacher, student = getattr(system, a), getattr(system, b)
            setattr(system, a, student)
            setattr(system, b, teacher)


def has_teacher(system: Any) -> bool:
    return any(getattr(system, name, None) is not None for name in system.teachers.values())


@torch.no_grad()
def look(
    system: Any, index: Index, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Survey:
    """Predict a split as `ftd eval` does, and count.

    Pseudo-labels are those that `ftd pseudo` would keep here; agreement counts rows of the
    prepared size, with and without a label.

    Args:
        system: of `checkpoint.load`, with its teachers where they are to be compared.
    Raises:
        DataError: a frame has no labels.
    """
    require_labels(index)
    system.eval()
    r, heads, names = system.recipe, tuple(system.heads), CLASS_SETS[system.recipe.classes]
    classes = len(names)
    matrices = {h: torch.zeros(classes, classes, dtype=torch.int64) for h in heads}
    same = dict.fromkeys(combinations(heads, 2), 0)
    as_taught = dict.fromkeys(heads if has_teacher(system) else (), 0)
    confidence: dict[str, list[Tensor]] = {head: [] for head in system.pseudo_heads}
    label: dict[str, list[Tensor]] = {head: [] for head in system.pseudo_heads}
    truth: list[Tensor] = []
    wrong: list[float] = []
    originals = original_frames(index, range(len(index)))
    if progress:
        progress(0, len(index), "looking")
    for done, batch in batches_of(index, r, r.eval_batch):
        batch = batch.to(device)
        prob = system.predict(batch)
        for head, predicted, target in compared(prob, batch, originals):
            matrices[head] += confusion(predicted, target, classes).cpu()
        said = {head: p.argmax(1) for head, p in prob.items()}
        for a, b in same:
            same[a, b] += int((said[a] == said[b]).sum())
        if as_taught:
            with _as_teacher(system):
                taught = system.predict(batch)
            for head in heads:
                as_taught[head] += int((taught[head].argmax(1) == said[head]).sum())
        wrong += _wrong(said[heads[-1]], batch)
        for head in label:
            most, which = prob[head].float().cpu().max(1)
            confidence[head].append(most)
            label[head].append(which)
        truth.append(batch.label.cpu())
        if progress:
            progress(done, len(index), "looking")
    rows = torch.cat(truth)
    count = max(len(rows), 1)
    return Survey(
        classes=names,
        heads=heads,
        confusion=matrices,
        agreement={pair: n / count for pair, n in same.items()},
        teacher={head: n / count for head, n in as_taught.items()},
        pseudo={
            h: _kept(torch.cat(label[h]), torch.cat(confidence[h]), rows, classes) for h in label
        },
        wrong=wrong,
    )


def _wrong(predicted: Tensor, batch: Batch) -> list[float]:
    """For each frame of a batch the share of its labelled rows with another prediction."""
    parts = zip(predicted.split(batch.counts), batch.label.split(batch.counts), strict=True)
    return [(said != label)[label != IGNORE].double().mean().item() for said, label in parts]


def _kept(label: Tensor, prob: Tensor, truth: Tensor, classes: int) -> list[Kept]:
    refined, thresholds = refine(label, prob, classes)
    known = truth != IGNORE

    def share(part: Tensor, whole: Tensor) -> float:
        return (part & whole).sum().item() / max(int(whole.sum()), 1)

    found = []
    for c, threshold in enumerate(thresholds):
        is_c = truth == c
        coverage = share(refined != IGNORE, is_c)
        before, after = (share(is_c, known & (x == c)) for x in (label, refined))
        found.append(Kept(threshold, coverage, before, after))
    return found


@torch.no_grad()
def labels_of(
    system: Any, index: Index, i: int, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Head -> predicted classes of a frame's rows, (M,) u8, 255 = none, as `look` saw them: in the
    batch of frames that `ftd eval` puts it into."""
    size = system.recipe.eval_batch
    first = i // size * size
    chosen = range(first, min(first + size, len(index)))
    [(_, batch)] = batches_of(index, system.recipe, size, chosen)
    place = i - first
    found = {}
    for head, prob in system.predict(batch.to(device)).items():
        label = np.full(index.frame(i).rows, UNLABELLED, np.uint8)
        label[batch.keep[place].numpy()] = prob.split(batch.counts)[place].argmax(1).cpu().numpy()
        found[head] = label
    return found


# ---- what a run wrote down while it trained ------------------------------------------------------


Curve = list[tuple[float, float]]  # iteration, value


def curves(path: Path, of_class: str | None = None, points: int = 240) -> dict[str, Curve]:
    """The columns of a CSV that begins with an iteration; a long log is averaged down to some
    `points`. A missing file has no column.

    Args:
        of_class: only the rows of this class, where the second column names one.
    Raises:
        RunError: it holds something else.
    """
    if not path.is_file():
        return {}
    found: dict[str, Curve] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                iteration = float(row.pop("iteration"))
                if row.pop("class", None) != of_class:
                    continue
                for name, text in row.items():
                    if text:
                        found.setdefault(name, []).append((iteration, float(text)))
    except (KeyError, ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(
            f"{path}: not a log of ftd train ({error}); remove it to report without it"
        ) from None
    return {name: _thinned(curve, points) for name, curve in found.items()}


def _thinned(curve: Curve, points: int) -> Curve:
    """Means of as many neighbours as needed."""
    each = -(-len(curve) // points)
    if each < 2:
        return curve
    parts = [curve[i : i + each] for i in range(0, len(curve), each)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]
