"""Training: what is drawn at each iteration, the loop, resume.

A run is a pure function of its recipe, its data and its seed. All chance of iteration i (which
frames, how they are augmented, the coin, dropout) comes from generators seeded with (seed, i), so
there is no generator state to save: the iteration number *is* the state, and a resumed run
continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftdpp import machine, parallel, readers, systems
from ftdpp.checkpoint import (
    FORMAT,
    RunError,
    digest,
    load_state,
    read_tensors,
    read_training,
    save,
)  # fmt: skip
from ftdpp.checkpoint import stored_recipe as recipe_of
from ftdpp.data import CLASS_SETS, Augment, Batch, collate, sample
from ftdpp.evaluate import Score, batches_of, evaluate
from ftdpp.files import Log, Progress
from ftdpp.index import Index, require_labels
from ftdpp.losses import log_smoothed_weights
from ftdpp.processes import die_with_parent
from ftdpp.pseudo_labels import PseudoLabels
from ftdpp.readers import DataError
from ftdpp.recipe import Recipe, settings
from ftdpp.systems import AUGMENT, ORDER, Chance, Stream, generator


class NonFiniteLoss(Exception):
    """A loss term or a parameter is nan or inf."""


class Interrupted(Exception):
    """Training was asked to stop and has saved."""


# ---- data --------------------------------------------------------------------------------------


class _Draw:
    """Frames of an index in an endless order: one permutation after another."""

    def __init__(self, index: Index, stream: Stream, r: Recipe, seed: int) -> None:
        self.index, self.stream, self.recipe, self.seed = index, stream, r, seed
        domain = readers.domains()[index.identity["domain"]]
        self.flip_axis, draw = domain.flip_axis, readers.reader_of(domain).draw
        jitter = 0.0 if stream.weak else Augment.jitter
        self.augment = Augment(crop=r.crop if r.crop != (0, 0) else None, draw=draw, jitter=jitter)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, iteration: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a part of an iteration, a piece of what one part with all frames would be:
        a function of seed, stream and numbers."""
        seed, number, chosen = self.seed, self.stream.number, {}
        frames = self.stream.frames
        for slot in range(part * frames, (part + 1) * frames):
            epoch, place = divmod(iteration * parts * frames + slot, len(self.index))
            if epoch != self._epoch:
                order = generator(seed, ORDER, number, epoch).permutation(len(self.index))
                self._epoch, self._order = epoch, order
            chosen[slot] = int(self._order[place])
        return self._of(chosen, iteration)

    def largest(self) -> Batch:
        """A batch of the frames that have the most rows."""
        order = np.argsort(-self.index.rows(), kind="stable")
        return self._of(dict(enumerate(np.resize(order, self.stream.frames).tolist())), 0)

    def _of(self, chosen: dict[int, int], iteration: int) -> Batch:
        """The batch of frames by slot, augmented as that iteration has it."""
        scale, depth, samples = self.recipe.voxels_per_metre, self.stream.depth, []
        for slot, i in chosen.items():
            chance = generator(self.seed, AUGMENT, self.stream.number, iteration, slot)
            frame = self.index.frame(i)
            samples.append(sample(frame, self.augment, self.flip_axis, chance, scale, depth))
        return collate(samples)


class Batches(torch.utils.data.Dataset):
    """Item i is the data of iteration i, a batch of each stream; with parts, of one part of it."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        r: Recipe,
        seed: int,
        indexes: Mapping[str, Index],
        pseudo: PseudoLabels | None = None,
    ) -> None:
        self.pseudo, self.own = pseudo, r.accumulate
        self.first, self.parts = parallel.rank() * self.own, parallel.size() * self.own
        self.draws = {name: _Draw(indexes[name], s, r, seed) for name, s in streams.items()}

    def __getitem__(self, item: int) -> dict[str, Batch]:
        iteration, own = divmod(item, self.own)
        place = iteration, self.first + own, self.parts
        return self._taught({name: draw.batch(*place) for name, draw in self.draws.items()})

    def largest(self) -> dict[str, Batch]:
        """A batch of each stream's largest frames: what an iteration takes at the most."""
        return self._taught({name: draw.largest() for name, draw in self.draws.items()})

    def _taught(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        """With the labels of a first stage."""
        if self.pseudo is not None:
            for name, draw in self.draws.items():
                if draw.stream.pseudo:
                    self.pseudo.attach(batches[name])
        return batches


# ---- a run -------------------------------------------------------------------------------------


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
    recipe: Any  # Recipe
    seed: int
    indexes: dict[str, Index]  # of each stream
    val: Index | None
    pseudo: PseudoLabels | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    pretrained: dict[str, Tensor] | None = None  # of `pretrained.imagenet_weights`
    pretrained_digest: str | None = None  # of the weights that the run began with
    source: dict[str, Tensor] | None = None  # the network that a system without source data is of
    source_digest: str | None = None
    given: tuple[str, ...] = ()  # settings that the user chose, as "name=value"
    progress: Progress | None = None  # told how far a validation is

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            # Some of its gradients add atomically, and would not repeat.
            torch.backends.cudnn.deterministic = True
        self.streams = systems.system_of(self.recipe.method, self.recipe.scenario).streams(
            self.recipe
        )
        self.recipe = self._with_class_weights(self.recipe)
        self.system = systems.build(self.recipe, self.seed)
        if self.pretrained is not None and self.system.encoders():
            self.pretrained_digest = digest(self.pretrained)
            for encoder in self.system.encoders():
                found = encoder.load_state_dict(self.pretrained, strict=False)  # no decoder in it
                assert not found.unexpected_keys, "weights of another network"
        if self.source is not None:
            self.source_digest = digest(self.source)
            self.system.start_from(self.source)
        self.system.to(self.device).train()
        self.network = parallel.together(self.system, self.recipe.sync_batchnorm)
        self.optimizers = self.system.optimizers()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.iteration = 0
        self.best: dict[str, Any] | None = None
        self.owed = False  # a validation due at this iteration, skipped because of a stop
        self.stop = False  # set by a signal handler: save after this iteration and leave
        self.leads = parallel.rank() == 0  # evaluates and writes

    def _with_class_weights(self, r: Any) -> Any:
        """Empty weights are computed from the labelled training points and kept in the recipe."""
        for name, stream in self.streams.items():
            if stream.labels:
                require_labels(self.indexes[name])
                if not self.indexes[name].counts().any():
                    raise DataError(
                        f"{self.indexes[name].title}: none of its points has a label of the class "
                        f"set {self.recipe.classes}; choose other frames or classes"
                    )
            if stream.weights and not getattr(r, stream.weights):
                weights = log_smoothed_weights(self.indexes[name].counts().tolist())
                r = dataclasses.replace(r, **{stream.weights: weights})
        return r

    @property
    def last_path(self) -> Path:
        return self.out / "last.safetensors"

    @property
    def best_path(self) -> Path:
        return self.out / "best.safetensors"

    def learn(self, parts: Sequence[dict[str, Batch]]) -> dict[str, Tensor]:
        """One iteration: losses and gradients of every part, an optimiser step, for each phase.

        Returns the terms, averaged over parts and processes."""
        first, count = parallel.rank() * len(parts), len(parts)
        terms: dict[str, Tensor] = {}
        rate = self.system.rate(self.iteration)
        for number, (phase, optimizer) in enumerate(self.optimizers.items()):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            if self.system.resting(phase, self.iteration):
                continue
            sums: dict[str, Tensor] = {}
            optimizer.zero_grad()
            for i, batches in enumerate(parts):
                chance = Chance(self.seed, self.iteration, first + i)
                chance.seed_dropout(number)
                with parallel.silent(self.network, last=i + 1 == count), parallel.noticing():
                    found = self.network(phase, batches, chance)
                    (torch.stack(list(found.values())).sum() / count).backward()
                for name, term in found.items():
                    sums[name] = sums.get(name, 0) + term.detach() / count
            optimizer.step()
            assert not terms.keys() & sums.keys(), "two phases have a term of one name"
            terms |= sums
        self.iteration += 1
        self.system.after_step(self.iteration)
        return parallel.mean_terms(terms)

    def learning_rates(self) -> dict[str, float]:
        """The rate of each parameter group in the last iteration, named by phase and number."""
        rate = self.system.rate(self.iteration - 1)  # of a resumed run, no group has it yet
        return {
            f"{phase}.{group.get('name', i)}": group["initial_lr"] * rate
            for phase, optimizer in self.optimizers.items()
            for i, group in enumerate(optimizer.param_groups)
        }

    def metadata(self) -> dict[str, Any]:
        """No time and no path in it: equal runs write equal bytes."""
        r = self.recipe
        return {
            "format": FORMAT,
            "recipe": dataclasses.asdict(r),
            "given": list(self.given),
            "seed": self.seed,
            "iteration": self.iteration,
            "processes": parallel.size(),
            "best": self.best,
            "validation_owed": self.owed,
            "class_names": CLASS_SETS[r.classes],
            "torch": torch.__version__,
            "data": {name: index.fingerprint["content"] for name, index in self.indexes.items()},
            "pseudo": self.pseudo.meta["labels"] if self.pseudo else None,
            "pretrained": self.pretrained_digest,
            "source": self.source_digest,
            "frozen": self.system.frozen(),
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint; of several processes, the first one.

        Raises:
            NonFiniteLoss: a tensor is not finite, since a gradient may overflow where no loss does.
                Nothing is written then.
        """
        if parallel.rank():
            return
        tensors = {f"system/{k}": v for k, v in self.system.state_dict().items()}
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise NonFiniteLoss(
                f"iteration {self.iteration}: {len(broken)} tensors are not finite, first "
                f"{broken[0]}, so a gradient or an activation overflowed; {path} was not written. "
                f"Lower the learning rate ({rate_settings(self.recipe)})"
            )
        names = {p: k for k, p in self.system.named_parameters()}
        for phase, optimizer in self.optimizers.items():
            for p, state in optimizer.state.items():
                for slot, value in state.items():
                    tensors[f"optimizer/{phase}/{names[p]}/{slot}"] = value
        save(path, tensors, self.metadata())

    def resume(self) -> None:
        """Continue from `last.safetensors`.

        Raises:
            RunError: it is missing or damaged, or was made with another recipe, seed or data.
        """
        path = self.last_path
        meta, mine = read_training(path), json.loads(json.dumps(self.metadata()))
        if meta["iteration"] > self.recipe.steps:
            raise RunError(
                f"{path}: at iteration {meta['iteration']} of {self.recipe.steps}; the file is "
                "damaged, begin anew"
            )
        ended = meta["iteration"] == self.recipe.steps and not meta["validation_owed"]
        if meta["processes"] != mine["processes"] and not ended:
            raise RunError(
                f"{path}: made by {meta.get('processes', 1)} processes, these are "
                f"{mine['processes']}; another number would draw other frames: go on with "
                f"torchrun --nproc-per-node={meta.get('processes', 1)}, or begin anew"
            )
        for key in ("seed", "data", "pseudo", "pretrained", "source", "frozen"):
            if meta[key] != mine[key]:
                raise RunError(
                    f"{path}: made with another {key} than this command's; the run began with what "
                    f"{self.out / 'run.json'} names; go on with that, or choose another --out"
                )
        theirs = json.loads(json.dumps(dataclasses.asdict(recipe_of(meta, path))))
        for name, value in mine["recipe"].items():
            if theirs[name] != value and name != "save_every":
                raise RunError(
                    f"{path}: made with {name}={theirs[name]!r}, this command has {value!r}; "
                    f"continue it with: ftd train --resume {quote(str(self.out))}; or choose "
                    "another --out"
                )
        load_state(self.system, path)
        self._load_optimizers(meta)
        self.iteration, self.best = meta["iteration"], meta["best"]
        self.owed = meta["validation_owed"]

    def _load_optimizers(self, meta: dict[str, Any]) -> None:
        params = dict(self.system.named_parameters())
        for key, tensor in read_tensors(self.last_path, "optimizer/").items():
            phase, _, rest = key.partition("/")
            name, _, slot = rest.rpartition("/")
            p, optimizer = params.get(name), self.optimizers.get(phase)
            fits = p is not None and (slot == "step" or tensor.shape == p.shape)
            if p is None or optimizer is None or not fits or not tensor.isfinite().all():
                raise RunError(
                    f"{self.last_path}: optimizer/{key} {tuple(tensor.shape)} does not fit the "
                    "network; the file is damaged, begin anew"
                )
            # The moments lie in their parameter's memory layout.
            moved = tensor.to(p.device)
            fresh = moved if slot == "step" else torch.empty_like(p).copy_(moved)
            optimizer.state[p][slot] = fresh
        for phase, optimizer in self.optimizers.items():
            slots = {frozenset(state) for state in optimizer.state.values()}
            worked = (not self.system.resting(phase, i) for i in range(meta["iteration"]))
            if len(slots) != any(worked):
                raise RunError(
                    f"{self.last_path}: the state of optimizer/{phase} is not complete; the file "
                    "is damaged, begin anew"
                )


def rate_settings(r: Recipe) -> str:
    """The learning rates that a run reads, as one would type them."""
    unread = r.unread()
    names = [name for name in settings(type(r)) if name.startswith("lr_") and name not in unread]
    return ", ".join(f"--set {name}=..." for name in names)


def _deaf(number: int) -> None:
    """Of a loading process: the parent decides when it ends, and saves first."""
    die_with_parent()
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)


# ---- the loop ----------------------------------------------------------------------------------


def fit(run: Run) -> Iterator[Step | Score]:
    """Train to the end, yielding a `Step` per iteration and a `Score` per validation.

    Leaves in `run.out`: `last.safetensors`, `best.safetensors` (by the last head's mIoU on the
    validation split; without one, the last), `log.csv`, `val.csv` and, of a system that measures
    itself, `audit.csv`.

    Raises:
        NonFiniteLoss: a term is nan or inf. Interrupted: `run.stop` was set; the state is saved.
        RunError: a data loading process was killed.
    """
    try:
        yield from _fit(run)
    except RuntimeError as error:  # raised wherever the process is when the kernel kills another
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"a data loading process ended ({' '.join(str(error).split())}); go on from the last "
            f"save, with fewer of them: ftd train --resume {quote(str(run.out))} --workers 0"
        ) from None


def _fit(run: Run) -> Iterator[Step | Score]:
    r, device = run.recipe, run.device
    machine.keep_freed_memory()
    run.out.mkdir(parents=True, exist_ok=True)
    batches = Batches(run.streams, r, run.seed, run.indexes, run.pseudo)
    loader = iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(run.iteration * r.accumulate, r.steps * r.accumulate),
            num_workers=run.workers,
            worker_init_fn=_deaf if run.workers else None,
            generator=torch.Generator(),
        )
    )
    log = Log(run.out / "log.csv", run.iteration, run.leads)
    val_log = Log(run.out / "val.csv", run.iteration - run.owed, run.leads)
    begun = time.perf_counter()
    if run.owed:
        yield from _validate(run, val_log, begun)
    while run.iteration < r.steps:
        start = time.perf_counter()
        loaded = [next(loader) for _ in range(r.accumulate)]
        waited = time.perf_counter() - start
        parts = [{name: b.to(device) for name, b in batches.items()} for batches in loaded]

        terms = run.learn(parts)
        values = check_finite(terms, parts, run)  # waits for a GPU; before any save

        seconds = time.perf_counter() - start
        log.add({"iteration": run.iteration, **{k: f"{v:.6g}" for k, v in values.items()}})
        yield Step(run.iteration, values, seconds, waited / seconds)

        ended = run.iteration == r.steps
        run.owed = run.val is not None and (ended or run.iteration % r.val_every == 0)
        stop = parallel.any_of(run.stop, device)  # all processes or none
        if run.owed or ended or stop or run.iteration % r.save_every == 0:
            log.flush()
            run.save(run.last_path)  # before a validation, which may take long: a stop cannot wait
        if stop and (run.owed or not ended):
            parallel.any_of(True, device)  # until the first process has saved
            raise Interrupted(
                f"interrupted at iteration {run.iteration}, saved to {run.last_path}; continue "
                f"with: ftd train --resume {quote(str(run.out))}"
            )
        if run.owed:
            yield from _validate(run, val_log, begun)
    # After the last checkpoint, from which a run that was killed in between gets here again.
    if run.val is None and not run.best_path.exists():
        run.save(run.best_path)


def check_finite(
    terms: dict[str, Tensor], parts: Sequence[dict[str, Batch]], run: Run
) -> dict[str, float]:
    """The terms as numbers. Raises NonFiniteLoss, which names the iteration and its frames."""
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    bad = [f"{name} = {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        frames = [token for part in parts for batch in part.values() for token in batch.tokens]
        raise NonFiniteLoss(
            f"iteration {run.iteration}: {', '.join(bad)}; frames {', '.join(frames)}; nothing was "
            f"saved since the last checkpoint; begin again with lower rates "
            f"({rate_settings(run.recipe)}) in another --out"
        )
    return values


def _validate(run: Run, log: Log, begun: float) -> Iterator[Score]:
    """Evaluate on the validation split and keep the best checkpoint; the first process does."""
    run.owed = False
    if not run.leads:
        return
    assert run.val is not None
    name = f"iteration {run.iteration}"
    score = evaluate(run.system, run.val, name, run.device, run.progress)
    chosen_by = run.system.heads[-1]
    if run.best is None or score.miou[chosen_by] > run.best["miou"][chosen_by]:
        run.best = {"iteration": run.iteration, "split": score.split, "miou": score.miou}
        run.save(run.best_path)
    row: dict[str, Any] = {"iteration": run.iteration}
    row |= {f"lr {name}": f"{rate:.6g}" for name, rate in run.learning_rates().items()}
    row |= {"seconds": f"{time.perf_counter() - begun:.1f}"}  # since this process began to train
    row |= {f"mIoU {head}": f"{value:.6f}" for head, value in score.miou.items()}
    for head, classes in score.iou.items():
        for name, value in classes.items():
            row[f"{head} {name}"] = "" if value is None else f"{value:.6f}"
    log.add(row)
    log.flush()
    _audit(run)
    run.save(run.last_path)
    yield score


@torch.no_grad()
def _audit(run: Run) -> None:
    """Write what the system measures of itself on the validation split to audit.csv."""
    assert run.val is not None
    depth = any(stream.depth for stream in run.streams.values())
    found = batches_of(run.val, run.recipe, run.recipe.eval_batch, depth=depth)
    run.system.eval()
    rows = run.system.audit(batch.to(run.device) for _, batch in found)
    run.system.train()
    if rows:
        log = Log(run.out / "audit.csv", run.iteration - 1)
        for row in rows:
            log.add({"iteration": run.iteration, **row})
        log.flush()
