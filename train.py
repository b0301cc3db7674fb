"""Training: where the frames come from, what is drawn at each iteration, the loop, resume.

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
from torch import Tensor

from ftdpp import data
from ftdpp.checkpoint import FORMAT, RunError, build, load_state, read_metadata, read_tensors, save, stored_recipe
from ftdpp.data import CLASS_SETS, DOMAINS, Augment, Batch, Index, collate, sample
from ftdpp.evaluate import PseudoLabels, Score, evaluate
from ftdpp.losses import Recipe, log_smoothed_weights, source_share, step, uses_target, uses_teacher
from ftdpp.models import CrossModal, update_teacher


class NonFiniteLoss(Exception):
    """A loss term or a parameter is nan or inf."""


class Interrupted(Exception):
    """Training was asked to stop and has saved."""


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
        sizes = [r.batch] if len(self.labelled) == 1 else [source_share(r.batch), r.batch - source_share(r.batch)]
        samples = [s for stream, n in zip(self.labelled, sizes, strict=True) for s in stream.take(iteration, n, r)]
        labelled, unlabelled = collate(samples), None
        if self.unlabelled is not None:
            unlabelled = collate(self.unlabelled.take(iteration, r.batch, r))
            if self.pseudo is not None:
                self.pseudo.attach(unlabelled)
        return labelled, unlabelled


# ---- training ------------------------------------------------------------------------------------------------------


def make_optimizer(student: CrossModal, r: Recipe) -> torch.optim.Adam:
    """Adam over three groups (2D, 3D, fusion), each with its learning rate: the three optimisers of the released code."""
    groups = [
        {"params": list(student.net_2d.parameters()), "lr": r.lr_2d, "base": r.lr_2d},
        {"params": list(student.net_3d.parameters()), "lr": r.lr, "base": r.lr},
    ]
    if student.fusion is not None:
        groups.append({"params": list(student.fusion.parameters()), "lr": r.lr, "base": r.lr})
    return torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)  # one pass over the parameters


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
    pretrained: dict[str, Tensor] | None = None  # of `models.imagenet_weights`

    def __post_init__(self) -> None:
        for index in self.labelled:
            data.require_labels(index)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # some of its gradients add atomically, and would not repeat
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
        for net in (self.student, self.teacher):
            if net is not None:
                if self.pretrained is not None:
                    net.net_2d.trunk.load_state_dict(self.pretrained, strict=False)  # the decoder is not in it
                net.to(self.device).train()
        self.optimizer = make_optimizer(self.student, r)
        self.iteration = 0
        self.best: dict[str, Any] | None = None
        self.owed = False  # a validation of this iteration that a stop came before
        self.stop = False  # set by a signal handler: save after this iteration and leave

    @property
    def last_path(self) -> Path:
        return self.out / "last.safetensors"

    @property
    def best_path(self) -> Path:
        return self.out / "best.safetensors"

    def learn(self, labelled: Batch, unlabelled: Batch | None) -> dict[str, Tensor]:
        """One iteration: losses, gradients, optimiser, teacher. Returns the loss terms."""
        _seed_torch(self.seed, _DROPOUT, self.iteration)
        set_learning_rate(self.optimizer, self.recipe, self.iteration)
        terms = step(self.student, self.teacher, labelled, unlabelled, self.recipe, coin(self.seed, self.iteration))
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.iteration += 1
        if self.teacher is not None:
            update_teacher(self.teacher, self.student, self.iteration, self.recipe.ema)
        return terms

    def metadata(self) -> dict[str, Any]:
        """No time and no path in it: equal runs write equal bytes."""
        r = self.recipe
        return {
            "format": FORMAT,
            "recipe": dataclasses.asdict(r),
            "seed": self.seed,
            "iteration": self.iteration,
            "best": self.best,
            "validation_owed": self.owed,
            "class_names": CLASS_SETS[r.classes].names,
            "torch": torch.__version__,
            "data": [i.fingerprint["content"] for i in [*self.labelled, *([self.unlabelled] if self.unlabelled else [])]],
            "pseudo": self.pseudo.meta["labels"] if self.pseudo else None,
            "pretrained": self.pretrained is not None,
        }

    def save(self, path: Path) -> None:
        """Raises NonFiniteLoss instead of writing a broken network: a gradient may overflow where no loss does."""
        tensors = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        if self.teacher is not None:
            tensors |= {f"teacher/{k}": v for k, v in self.teacher.state_dict().items()}
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise NonFiniteLoss(
                f"iteration {self.iteration}: {len(broken)} tensors are not finite, first {broken[0]}, so a gradient or an "
                f"activation overflowed; {path} was not written. Lower the learning rate (--set lr=..., --set lr_2d=...)"
            )
        names: dict[Tensor, str] = {p: k for k, p in self.student.named_parameters()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[p]}/{k}": v for k, v in state.items()}
        save(path, tensors, self.metadata())

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
        theirs = json.loads(json.dumps(dataclasses.asdict(stored_recipe(meta, self.last_path))))
        differing = [k for k, v in mine["recipe"].items() if theirs[k] != v and k != "save_every"]
        if differing:
            k = differing[0]
            raise RunError(
                f"{self.last_path}: made with {k}={theirs[k]!r}, this command has {mine['recipe'][k]!r}; repeat the command that "
                f"began the run ({self.out / 'run.json'} has it; name the --preset if it did not), or choose another --out"
            )
        load_state(self.student, self.last_path, "student/")
        if self.teacher is not None:
            load_state(self.teacher, self.last_path, "teacher/")
        params = dict(self.student.named_parameters())
        for key, tensor in read_tensors(self.last_path, "optimizer/").items():
            name, _, slot = key.rpartition("/")
            p = params.get(name)  # the moments lie in its memory layout
            if p is None or (slot != "step" and tensor.shape != p.shape) or not tensor.isfinite().all():
                raise RunError(
                    f"{self.last_path}: optimizer/{key} {tuple(tensor.shape)} does not fit the network; the file is damaged, "
                    "begin anew"
                )
            self.optimizer.state[p][slot] = tensor.to(p.device) if slot == "step" else torch.empty_like(p).copy_(tensor)
        self.iteration, self.best, self.owed = meta["iteration"], meta["best"], meta["validation_owed"]


def _check_finite(terms: dict[str, Tensor], labelled: Batch, unlabelled: Batch | None, iteration: int) -> dict[str, float]:
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    bad = [k for k, v in values.items() if not np.isfinite(v)]
    if bad:
        frames = labelled.tokens + (unlabelled.tokens if unlabelled is not None else [])
        raise NonFiniteLoss(
            f"iteration {iteration}: {', '.join(f'{k} = {values[k]}' for k in bad)}; frames {', '.join(frames)}; "
            "nothing was saved since the last checkpoint; begin again with a lower --set lr=... (and lr_2d) in another --out"
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
    if run.owed:
        yield _validate(run)
    while run.iteration < r.steps:
        begin = time.perf_counter()
        labelled, unlabelled = next(loader)
        waited = time.perf_counter() - begin
        labelled = labelled.to(device)
        unlabelled = unlabelled.to(device) if unlabelled is not None else None

        terms = run.learn(labelled, unlabelled)
        values = _check_finite(terms, labelled, unlabelled, run.iteration)  # the one wait for a GPU, and before any save

        seconds = time.perf_counter() - begin
        log.add(run.iteration, values)
        yield Step(run.iteration, values, seconds, waited / seconds)

        ended = run.iteration == r.steps
        if ended and run.val is None:
            run.save(run.best_path)
        run.owed = run.val is not None and (ended or run.iteration % r.val_every == 0)
        if run.owed or ended or run.stop or run.iteration % r.save_every == 0:
            log.flush()
            run.save(run.last_path)  # before a validation, which may take long: a stop must not wait for it
        if run.stop and (run.owed or not ended):
            raise Interrupted(f"interrupted at iteration {run.iteration}, saved to {run.last_path}; continue with --resume")
        if run.owed:
            yield _validate(run)


def _validate(run: Run) -> Score:
    """Evaluate on the validation split and keep the best checkpoint."""
    assert run.val is not None
    score = evaluate(run.student, run.val, run.recipe, f"iteration {run.iteration}", run.device)
    run.owed = False
    if run.best is None or score.miou["2d+3d"] > run.best["miou"]["2d+3d"]:
        run.best = {"iteration": run.iteration, "split": score.split, "miou": score.miou}
        run.save(run.best_path)
    run.save(run.last_path)
    return score


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
    """Tell glibc not to hand freed blocks back to the kernel: each step would fault the same memory in again, at the cost
    of kernel time. Does nothing where there is no glibc."""
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


def assemble(
    r: Recipe,
    seed: int,
    out: Path,
    src: Source,
    tgt: Source,
    val: Source,
    cache: Path,
    pseudo: Path | None = None,
    device: torch.device | None = None,
    workers: int | None = None,
    pretrained: dict[str, Tensor] | None = None,
    progress: data.Progress | None = None,
) -> tuple[Run, list[tuple[str, str, str]]]:
    """Prepare the splits that a recipe needs and build its run.

    Returns:
        the run, and each decision made on the way as (what, value, reason).
    """
    wanted, sides = needs(r), {"src": src, "tgt": tgt}
    labelled = [sides[side].index(split, r, cache, progress) for side, split in wanted["labelled"]]
    unlabelled = tgt.index(wanted["unlabelled"], r, cache, progress) if wanted["unlabelled"] else None
    validation, reason = None, "periodic validation and the choice of the best checkpoint"
    if tgt.frames and not val.frames:
        reason = "none: the target frames were named one by one; name others with --val-frames"
    elif not val.frames and "val" not in data.splits(DOMAINS[tgt.domain]):
        reason = f"none: {tgt.domain} has no validation split"
    elif not data.list_frames(val.root, DOMAINS[val.domain], None if val.frames else "val", val.version, val.frames):
        reason = f"none: no frame of the val split of {val.domain} is at {val.root}"
    else:
        validation = val.index("val", r, cache, progress)
        if validation.fingerprint["unlabelled_frames"]:
            validation, reason = None, "none: the val split here has frames without labels"
    labels = PseudoLabels(pseudo, r, unlabelled) if pseudo and unlabelled is not None else None
    cores = os.cpu_count() or 1
    count = (0 if cores <= 4 else min(8, cores // 2)) if workers is None else workers
    run = Run(out, r, seed, labelled, unlabelled, validation, labels, device or torch.device("cpu"), count, pretrained)

    def row(side: str, index: Index, source: Source, why: str) -> tuple[str, str, str]:
        split = index.identity["split"] or "chosen frames"
        if source.frames:
            test = data.list_frames(source.root, DOMAINS[source.domain], "test", source.version)
            held_out = len({ref.token for ref in test} & set(index.tokens))
            why += f"; {held_out} OF THEM BELONG TO THE TEST SPLIT" if held_out else ""
        return side, f"{len(index)} frames, {index.fingerprint['points']:,} points", f"{index.identity['domain']} {split}: {why}"

    facts = [
        row("labelled", i, sides[side], "supervised loss") for i, (side, _) in zip(labelled, wanted["labelled"], strict=True)
    ]
    if unlabelled is not None:
        facts.append(row("unlabelled", unlabelled, tgt, "adaptation; labels are never read"))
    facts.append(row("validation", validation, val, reason) if validation is not None else ("validation", "off", reason))
    products = "products in tf32" if run.device.type == "cuda" else "exact"
    faster = f"{products}; --set precision=bf16 is faster where the hardware has it"
    facts.append(("precision", r.precision, faster if r.precision == "fp32" else "--set precision"))
    facts.append(("workers", str(count), f"{cores} cores" if workers is None else "--workers"))
    weights = " ".join(f"{w:.2f}" for w in run.recipe.class_weights)
    facts.append(("class weights", weights, "of the recipe" if r.class_weights else "log-smoothed counts of the labelled points"))
    return run, facts


def cost(r: Recipe) -> float:
    """Work of one iteration, in forward passes of a frame, for estimates of time.

    3 for a forward and backward on each domain, 1 for the teacher's forward; the fusion module takes as long as four fifths
    of the rest.
    """
    passes = 3.0 + (3.0 if r.mimic_tgt or r.pseudo else 0.0) + (1.0 if uses_teacher(r) else 0.0)
    return r.batch * passes * (1.8 if r.fusion else 1.0)


def work_left(run: Run) -> float:
    """Cost of the iterations and validations that a run still has before it."""
    r = run.recipe
    left = set(range(run.iteration + 1, r.steps + 1))
    validations = {i for i in left if i % r.val_every == 0 or i == r.steps} if run.val is not None else set()
    return len(left) * cost(r) + len(validations) * (len(run.val) if run.val is not None else 0)
