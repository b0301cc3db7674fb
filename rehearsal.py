"""A dry run: what a training will take, measured before it, on the largest frames that it can draw.

The first three steps, the last three (some terms begin late), an evaluation and a checkpoint are
the real ones, so that what would fail after hours fails here: memory that is not enough, a disk
that is full. Phases that take turns for longer are not seen, nor what other processes need.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ftdpp import machine
from ftdpp.checkpoint import RunError, digest
from ftdpp.evaluate import evaluate
from ftdpp.train import Batches, Run, check_finite

STEPS = 3
FILES = 3  # last, best, and the one that is being written before it takes a name


@dataclass(frozen=True)
class Measured:
    """What a dry run found."""

    rows: dict[str, int]  # points or pixels of the largest batch, by stream
    step: float  # seconds of an iteration on it, or of loading it where that takes longer
    validation: float  # seconds of one, by its first frames; 0 where there is none
    validations: int
    memory: int  # bytes: the largest that this process (or the GPU) had
    checkpoint: int  # bytes of a file
    free: int  # bytes on the disk of the run folder

    def seconds(self, steps: int) -> float:
        """Of a whole training whose batches are all as large as the largest."""
        return steps * self.step + self.validations * self.validation


def rehearse(run: Run) -> Measured:
    """Iterations, an evaluation and a checkpoint there and back. Leaves nothing on disk; the run
    itself has then been trained a little, and is no more use.

    Raises:
        RunError: the checkpoints will not fit on the disk, or do not hold what was saved.
        NonFiniteLoss: a term is nan or inf. MemoryError, torch.OutOfMemoryError: there is too
        little.
    """
    r, source = run.recipe, Batches(run.streams, run.recipe, run.seed, run.indexes, run.pseudo)
    machine.keep_freed_memory()
    slowest = 0.0
    for first in (0, max(r.steps - STEPS, 0)):
        run.iteration, times = first, []
        for _ in range(min(STEPS, r.steps)):
            begun = time.perf_counter()
            loaded = [source.largest() for _ in range(r.accumulate)]
            ready = time.perf_counter()
            parts = [{name: b.to(run.device) for name, b in batches.items()} for batches in loaded]
            check_finite(run.learn(parts), parts, run)  # waits for a GPU
            load, step = ready - begun, time.perf_counter() - ready
            times.append(max(step, load / run.workers) if run.workers else load + step)
        slowest = max(slowest, statistics.median(times[1:] or times))  # the first one allocates
    rows = {name: sum(batch.counts) for name, batch in loaded[0].items()}

    seconds, validations = 0.0, 0
    if run.val is not None:
        some = range(min(len(run.val), 2 * r.eval_batch))
        begun = time.perf_counter()
        evaluate(run.system, run.val, "dry run", run.device, run.progress, some)
        seconds = (time.perf_counter() - begun) * len(run.val) / len(some)
        validations = -(-r.steps // r.val_every)

    place = next(p for p in (run.out, *run.out.absolute().parents) if p.exists())
    size = _there_and_back(run, place)
    free = shutil.disk_usage(place).free
    if FILES * size > free:
        raise RunError(
            f"{run.out}: {free / 2**20:,.0f} MiB are free, and checkpoints take up to "
            f"{FILES * size / 2**20:,.0f}; make room, or choose another --out"
        )
    memory = machine.peak_memory(run.device)
    return Measured(rows, slowest, seconds, validations, memory, size, free)


@torch.no_grad()
def _there_and_back(run: Run, place: Path) -> int:
    """Save, spoil and load the run, on the disk that it will use; the bytes of its checkpoint."""
    out, before = run.out, digest(run.system.state_dict())
    with tempfile.TemporaryDirectory(dir=place, prefix=".ftd-dry-run-") as folder:
        run.out = Path(folder)
        try:
            run.save(run.last_path)
            size = run.last_path.stat().st_size
            for parameter in run.system.parameters():
                parameter.zero_()
            run.resume()
        finally:
            run.out = out
    if digest(run.system.state_dict()) != before:
        raise RunError(
            f"{place}: a checkpoint did not come back as it was saved there; check that disk"
        )
    return size
