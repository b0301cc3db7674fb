"""Training, evaluation, pseudo-labels, checkpoints.

A run is a pure function of its recipe, its data and its seed. All chance of iteration i (which frames, how they are augmented,
the coin, dropout) is drawn from generators seeded with (seed, i), so there is no generator state to save: the iteration number
*is* the state, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftdpp import data
from ftdpp.data import CLASS_SETS, DOMAINS, IGNORE, Augment, Batch, Index, collate, sample
from ftdpp.losses import Recipe, log_smoothed_weights, step, uses_target, uses_teacher
from ftdpp.models import CrossModal, Logits, convert_released, load_imagenet, update_teacher

FORMAT = 1  # of checkpoints and pseudo-label files
HEADS = ("2d", "3d", "2d+3d")


class RunError(Exception):
    """The run cannot go on as asked: the message says what was found, what was expected and what to type."""


class NonFiniteLoss(Exception):
    """A loss term is nan or inf; the checkpoint of the last save is intact."""


class Interrupted(Exception):
    """Training was asked to stop and has saved."""


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


# ---- chance --------------------------------------------------------------------------------------------------------

_ORDER, _AUGMENT, _COIN, _DROPOUT, _INIT = range(5)  # what a generator is for; keeps the streams apart


def _rng(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose])


def _seed_torch(seed: int, *purpose: int) -> None:
    torch.manual_seed(int(_rng(seed, *purpose).integers(2**62)))


def coin(seed: int, iteration: int) -> bool:
    """True: FDA, False: mixup, for the whole batch of an iteration."""
    return bool(_rng(seed, _COIN, iteration).random() < 0.5)


# ---- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Where the frames of one domain come from: a root on disk, and optionally which frames of it."""

    domain: str
    root: Path
    version: str | None = None
    frames: list[str] | None = None

    def index(self, split: str | None, r: Recipe, cache: Path, progress: data.Progress | None = None) -> Index:
        """The prepared index of a split; an explicit choice of frames overrides the split."""
        domain = DOMAINS[self.domain]
        return data.prepare(
            self.root,
            domain,
            None if self.frames else split,
            r.classes,
            image_size(r, domain.dataset),
            cache,
            version=self.version,
            frames=self.frames,
            progress=progress,
        )


def image_size(r: Recipe, dataset: str) -> tuple[int, int] | None:
    """(H, W) that images are resized to; None keeps the original.

    A model trained on nuScenes' 16:9 images sees KITTI's wide ones at the same height, not squeezed.
    """
    if r.image == (0, 0):
        return None
    height, width = r.image
    if dataset == "semantic_kitti" and width < 2.5 * height:
        return height, round(height * 1242 / 375)
    return height, width


def augment_for(r: Recipe) -> Augment:
    return Augment(crop=r.crop if r.crop != (0, 0) else None)


class _Stream:
    """Frames of an index in an endless order: one permutation after another, each a function of (seed, stream, epoch)."""

    def __init__(self, index: Index, seed: int, number: int, flip_axis: int) -> None:
        self.index, self.seed, self.number, self.flip_axis = index, seed, number, flip_axis
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def take(self, iteration: int, count: int, r: Recipe) -> list[data.Sample]:
        out = []
        for slot in range(count):
            epoch, place = divmod(iteration * count + slot, len(self.index))
            if epoch != self._epoch:
                self._epoch, self._order = (epoch, _rng(self.seed, _ORDER, self.number, epoch).permutation(len(self.index)))
            rng = _rng(self.seed, _AUGMENT, self.number, iteration, slot)
            frame = self.index.frame(int(self._order[place]))
            out.append(sample(frame, augment_for(r), self.flip_axis, rng, r.voxels_per_metre))
        return out


class Batches(torch.utils.data.Dataset):
    """Item i is the data of iteration i: (labelled batch, unlabelled batch or None)."""

    def __init__(
        self, r: Recipe, seed: int, labelled: Sequence[Index], unlabelled: Index | None, pseudo: PseudoLabels | None = None
    ) -> None:
        self.recipe, self.pseudo = r, pseudo
        flips = [DOMAINS[i.identity["domain"]].flip_axis for i in labelled]
        self.labelled = [_Stream(i, seed, n, f) for n, (i, f) in enumerate(zip(labelled, flips, strict=True))]
        self.unlabelled = None
        if unlabelled is not None:
            self.unlabelled = _Stream(unlabelled, seed, 2, DOMAINS[unlabelled.identity["domain"]].flip_axis)

    def __getitem__(self, iteration: int) -> tuple[Batch, Batch | None]:
        r = self.recipe
        sizes = [r.batch] if len(self.labelled) == 1 else [round(0.5 * r.batch), r.batch - round(0.5 * r.batch)]
        samples = [s for stream, n in zip(self.labelled, sizes, strict=True) for s in stream.take(iteration, n, r)]
        labelled, unlabelled = collate(samples), None
        if self.unlabelled is not None:
            unlabelled = collate(self.unlabelled.take(iteration, r.batch, r))
            if self.pseudo is not None:
                self.pseudo.attach(unlabelled)
        return labelled, unlabelled


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
    absent: list[str]  # classes without a labelled point: they pull the mean down, as in the released evaluation

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def batches_of(index: Index, r: Recipe, size: int, frames: range | None = None) -> Iterator[tuple[int, Batch]]:
    """The frames of an index in order, without augmentation, `size` at a time, each with the number of frames done."""
    frames = frames or range(len(index))
    for start in range(0, len(frames), size):
        chosen = frames[start : start + size]
        yield chosen[-1] + 1, collate([sample(index.frame(i), None, 0, _rng(0), r.voxels_per_metre) for i in chosen])


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
        DataError: when no frame has labels.
    """
    data.require_labels(index)
    names = CLASS_SETS[r.classes].names
    matrices = {head: torch.zeros(len(names), len(names), dtype=torch.int64) for head in HEADS}
    was_training = model.training
    model.eval()
    for done, batch in batches_of(index, r, r.eval_batch):
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
        absent=[n for n, p in zip(names, present.tolist(), strict=True) if not p],
    )


# ---- pseudo-labels -------------------------------------------------------------------------------------------------


def family(r: Recipe) -> dict[str, str]:
    """What a pseudo-label file and a second stage must share."""
    return {"scenario": r.scenario, "method": r.method, "classes": r.classes}


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
    if not sum(meta["kept_2d"]) or not sum(meta["kept_3d"]):
        raise RunError(f"no pseudo-label was kept (2D {sum(meta['kept_2d'])}, 3D {sum(meta['kept_3d'])} points): nothing written")
    _save(path, tensors, meta)
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
            raise RunError(
                f"{path}: made from other frames ({self.meta['frames']}) than this run's unlabelled target "
                f"({len(index)}); run ftd pseudo on a run with the same --data, image size and frames"
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


# ---- files ---------------------------------------------------------------------------------------------------------


def _save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a safetensors file under a temporary name and rename it: a reader sees the old file or the new one.

    All metadata is one JSON string, because several keys would be stored in random order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"ftd": json.dumps(meta, sort_keys=True)}
        )
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint or pseudo-label file.

    Raises:
        RunError: missing, damaged, not ours, or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ftd")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: not a readable safetensors file ({error})") from None
    if text is None:
        raise RunError(f"{path}: a safetensors file, but not written by ftd; convert a released checkpoint with: ftd convert")
    meta = json.loads(text)
    if meta.get("format") != FORMAT:
        raise RunError(f"{path}: format {meta.get('format')}, this version reads {FORMAT}")
    return meta


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    with safe_open(path, "pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118


def stored_recipe(meta: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["recipe"].items()}
    return Recipe(**values)


def build(r: Recipe) -> CrossModal:
    return CrossModal(len(CLASS_SETS[r.classes].names), r.width, r.m, r.fusion, r.dropout)


def load_student(path: Path, device: torch.device | str = "cpu") -> tuple[CrossModal, Recipe, dict[str, Any]]:
    """The student of a checkpoint, in eval mode, with its recipe and metadata."""
    meta = read_metadata(path)
    if "recipe" not in meta:
        raise RunError(f"{path}: not a checkpoint")
    r = stored_recipe(meta)
    model = build(r)
    model.load_state_dict(read_tensors(path, "student/"))
    return model.to(device).eval(), r, meta


def convert_checkpoints(files: dict[str, Path], r: Recipe, out: Path) -> None:
    """Write released checkpoints (.pth of the parts "2d", "3d", "fusion") as one of ours, readable by `load_student`.

    Raises:
        RunError: a file is unreadable, needs unpickling of arbitrary objects, or does not fit the network.
    """
    state: dict[str, Tensor] = {}
    iteration = 0
    for part, file in files.items():
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RunError(f"{file}: no such file") from None
        except Exception as error:  # torch raises several kinds for a file that is not a plain checkpoint
            raise RunError(f"{file}: not a checkpoint that can be read without running its code ({error})") from None
        weights = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
        iteration = int(loaded.get("iteration", 0)) if isinstance(loaded, dict) and "model" in loaded else iteration
        tensors = {k.removeprefix("module."): v for k, v in weights.items() if isinstance(v, Tensor)}
        state |= convert_released(part, tensors.items())
    model = build(r)
    mine = model.state_dict()
    wrong = [
        k
        for k in {**mine, **state}
        if "num_batches_tracked" not in k and (k not in mine or k not in state or mine[k].shape != state[k].shape)
    ]
    if wrong:
        raise RunError(
            f"{', '.join(str(f) for f in files.values())}: {len(wrong)} tensors do not fit {r.scenario} "
            f"({len(CLASS_SETS[r.classes].names)} classes), first {wrong[0]}; check --scenario and the order of the files"
        )
    meta = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(r),
        "iteration": iteration,
        "class_names": CLASS_SETS[r.classes].names,
        "converted_from": {k: Path(v).name for k, v in files.items()},
    }
    _save(out, {f"student/{k}": state.get(k, v) for k, v in mine.items()}, meta)


# ---- training ------------------------------------------------------------------------------------------------------


def make_optimizer(student: CrossModal, r: Recipe) -> torch.optim.Adam:
    """Adam over three groups (2D, 3D, fusion), each with its learning rate: the three optimisers of the released code."""
    groups = [
        {"params": list(student.net_2d.parameters()), "lr": r.lr_2d, "base": r.lr_2d},
        {"params": list(student.net_3d.parameters()), "lr": r.lr, "base": r.lr},
    ]
    if student.fusion is not None:
        groups.append({"params": list(student.fusion.parameters()), "lr": r.lr, "base": r.lr})
    return torch.optim.Adam(groups, betas=(0.9, 0.999))


def set_learning_rate(optimizer: torch.optim.Optimizer, r: Recipe, iteration: int) -> None:
    """Step schedule, a function of the iteration: times gamma at each milestone passed."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * r.gamma ** sum(iteration >= m for m in r.milestones)


@dataclass
class Step:
    """One iteration as the loop reports it."""

    iteration: int  # from 1
    terms: dict[str, float]
    seconds: float
    waited: float  # share of it spent waiting for data


@dataclass
class Run:
    """Everything a training needs, checked and ready. `fit` drives it."""

    out: Path
    recipe: Recipe
    seed: int
    labelled: list[Index]
    unlabelled: Index | None
    val: Index | None
    pseudo: PseudoLabels | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    pretrained: str | None = None  # file of ImageNet weights, "download", or None

    def __post_init__(self) -> None:
        for index in self.labelled:
            data.require_labels(index)
        r = self.recipe
        # Empty weights are computed from the labelled training points: a function of the data, so stored with the recipe.
        if not r.class_weights:
            r = dataclasses.replace(r, class_weights=log_smoothed_weights(self.labelled[0].counts().tolist()))
        if r.supervised == "both" and not r.class_weights_tgt:
            r = dataclasses.replace(r, class_weights_tgt=log_smoothed_weights(self.labelled[1].counts().tolist()))
        classes = len(CLASS_SETS[r.classes].names)
        for name in ("class_weights", "class_weights_tgt"):
            if len(getattr(r, name)) not in (0, classes):
                raise RunError(f"{name} has {len(getattr(r, name))} numbers, {r.classes} has {classes} classes")
        self.recipe = r
        _seed_torch(self.seed, _INIT, 0)
        self.student = build(r)
        self.teacher: CrossModal | None = None
        if uses_teacher(r):
            # A second construction, not a copy: as released, the teacher starts from weights of its own.
            _seed_torch(self.seed, _INIT, 1)
            self.teacher = build(r).requires_grad_(False)
        if self.pretrained:
            for net in (self.student, self.teacher):
                if net is not None:
                    load_imagenet(net.net_2d.trunk, None if self.pretrained == "download" else self.pretrained)
        for net in (self.student, self.teacher):
            if net is not None:
                net.to(self.device).train()
        self.optimizer = make_optimizer(self.student, r)
        self.iteration = 0
        self.best: dict[str, Any] | None = None
        self.stop = False  # set by a signal handler: save after this iteration and leave

    @property
    def last_path(self) -> Path:
        return self.out / "last.safetensors"

    @property
    def best_path(self) -> Path:
        return self.out / "best.safetensors"

    def metadata(self) -> dict[str, Any]:
        """No time and no path in it: equal runs write equal bytes."""
        r, n = self.recipe, self.recipe.batch
        return {
            "format": FORMAT,
            "recipe": dataclasses.asdict(r),
            "seed": self.seed,
            "iteration": self.iteration,
            "best": self.best,
            "class_names": CLASS_SETS[r.classes].names,
            "torch": torch.__version__,
            "rng": {"seed": self.seed, "iteration": self.iteration},
            "sampler": {"frames_drawn": self.iteration * n},
            "data": [i.fingerprint["content"] for i in [*self.labelled, *([self.unlabelled] if self.unlabelled else [])]],
            "pseudo": self.pseudo.meta["checkpoint"] if self.pseudo else None,
            "pretrained": bool(self.pretrained),
        }

    def save(self, path: Path) -> None:
        tensors = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        if self.teacher is not None:
            tensors |= {f"teacher/{k}": v for k, v in self.teacher.state_dict().items()}
        names: dict[Tensor, str] = {p: k for k, p in self.student.named_parameters()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[p]}/{k}": v for k, v in state.items()}
        _save(path, tensors, self.metadata())

    def resume(self) -> None:
        """Continue from `last.safetensors`.

        Raises:
            RunError: it is missing or damaged, or was made with another recipe, seed or data.
        """
        meta = read_metadata(self.last_path)
        mine = json.loads(json.dumps(self.metadata()))
        for key in ("seed", "data", "pseudo", "pretrained"):
            if meta[key] != mine[key]:
                raise RunError(
                    f"{self.last_path}: made with {key} {meta[key]!r}, this command has {mine[key]!r}; repeat the "
                    "command that began the run, or choose another --out"
                )
        differing = [k for k, v in mine["recipe"].items() if meta["recipe"].get(k) != v and k != "save_every"]
        if differing:
            k = differing[0]
            raise RunError(
                f"{self.last_path}: made with {k}={meta['recipe'].get(k)!r}, this command has {mine['recipe'][k]!r}; repeat the "
                "command that began the run, or choose another --out"
            )
        self.student.load_state_dict(read_tensors(self.last_path, "student/"))
        if self.teacher is not None:
            self.teacher.load_state_dict(read_tensors(self.last_path, "teacher/"))
        params = dict(self.student.named_parameters())
        for key, tensor in read_tensors(self.last_path, "optimizer/").items():
            name, _, slot = key.rpartition("/")
            # Adam keeps its step counter on the CPU, the moments beside the parameter.
            self.optimizer.state[params[name]][slot] = tensor if slot == "step" else tensor.to(self.device)
        self.iteration, self.best = meta["iteration"], meta["best"]


def _check_finite(terms: dict[str, Tensor], labelled: Batch, unlabelled: Batch | None, iteration: int) -> dict[str, float]:
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    bad = [k for k, v in values.items() if not np.isfinite(v)]
    if bad:
        frames = labelled.tokens + (unlabelled.tokens if unlabelled is not None else [])
        raise NonFiniteLoss(
            f"iteration {iteration}: {', '.join(f'{k} = {values[k]}' for k in bad)}; frames {', '.join(frames)}; "
            "nothing was saved since the last checkpoint: --resume with a lower --set lr=..."
        )
    return values


def fit(run: Run) -> Iterator[Step | Score]:
    """Train to the end, yielding a `Step` per iteration and a `Score` per validation; the caller draws them.

    Leaves `last.safetensors`, `best.safetensors` (by 2D+3D mIoU on the validation split; without one, the last) and `log.csv` in
    `run.out`.

    Raises:
        NonFiniteLoss: a term is nan or inf. Interrupted: `run.stop` was set; the state is saved.
    """
    r, device = run.recipe, run.device
    keep_freed_memory()
    run.out.mkdir(parents=True, exist_ok=True)
    batches = Batches(r, run.seed, run.labelled, run.unlabelled, run.pseudo)
    loader = iter(
        torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(run.iteration, r.steps), num_workers=run.workers, generator=torch.Generator()
        )
    )
    log = _Log(run.out / "log.csv", run.iteration)
    if run.iteration and run.best is None and run.val is None and run.iteration >= r.steps:
        return
    while run.iteration < r.steps:
        begin = time.perf_counter()
        labelled, unlabelled = next(loader)
        waited = time.perf_counter() - begin
        labelled = labelled.to(device)
        unlabelled = unlabelled.to(device) if unlabelled is not None else None

        _seed_torch(run.seed, _DROPOUT, run.iteration)
        set_learning_rate(run.optimizer, r, run.iteration)
        terms = step(run.student, run.teacher, labelled, unlabelled, r, coin(run.seed, run.iteration))
        values = _check_finite(terms, labelled, unlabelled, run.iteration + 1)
        run.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        run.optimizer.step()
        run.iteration += 1
        if run.teacher is not None:
            update_teacher(run.teacher, run.student, run.iteration)

        seconds = time.perf_counter() - begin
        log.add(run.iteration, values)
        yield Step(run.iteration, values, seconds, waited / seconds)

        ended = run.iteration == r.steps
        if run.val is not None and (ended or run.iteration % r.val_every == 0):
            score = evaluate(run.student, run.val, r, f"iteration {run.iteration}", device)
            if run.best is None or score.miou["2d+3d"] > run.best["miou"]["2d+3d"]:
                run.best = {"iteration": run.iteration, "split": score.split, "miou": score.miou}
                run.save(run.best_path)
            log.flush()
            run.save(run.last_path)
            yield score
        elif ended or run.stop or run.iteration % r.save_every == 0:
            log.flush()
            run.save(run.last_path)
        if ended and run.val is None:
            run.save(run.best_path)
        if run.stop and not ended:
            raise Interrupted(f"interrupted at iteration {run.iteration}, saved to {run.last_path}")


class _Log:
    """log.csv: iteration, then every loss term. On resume the rows after the checkpoint are cut off."""

    def __init__(self, path: Path, iteration: int) -> None:
        self.path, self.rows = path, []  # type: Path, list[dict[str, Any]]
        if path.exists() and iteration:
            with path.open(newline="") as f:
                kept = [row for row in csv.DictReader(f) if int(row["iteration"]) <= iteration]
            path.unlink()
            self.rows = list(kept)
            self.flush()
        else:
            path.unlink(missing_ok=True)

    def add(self, iteration: int, terms: dict[str, float]) -> None:
        self.rows.append({"iteration": iteration, **{k: f"{v:.6g}" for k, v in terms.items()}})
        if len(self.rows) >= 50:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as f:
            writer = csv.DictWriter(f, list(self.rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(self.rows)
        self.rows = []


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed blocks back to the kernel: each step would fault the same gigabyte in again, which takes a
    third of a CPU training step. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's largest allocation, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def needs(r: Recipe) -> dict[str, Any]:
    """Which splits a recipe trains on: {"labelled": [(side, split)], "unlabelled": split of the target or None}."""
    labelled = {
        "source": [("src", "train")],
        "target": [("tgt", "train")],
        "both": [("src", "train"), ("tgt", "train_labelled")],
    }[r.supervised]
    unlabelled = ("train_unlabelled" if r.supervised == "both" else "train") if uses_target(r) else None
    return {"labelled": labelled, "unlabelled": unlabelled}
