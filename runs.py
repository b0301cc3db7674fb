"""From a command to a run: where its frames come from, what is prepared, announced and recorded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftdpp import readers, systems
from ftdpp.checkpoint import RunError
from ftdpp.evaluate import PseudoLabels
from ftdpp.files import Progress, replacing
from ftdpp.index import Index, prepare
from ftdpp.readers import list_frames, plural
from ftdpp.recipe import Recipe
from ftdpp.train import Run


@dataclass
class Source:
    """Where the frames of one domain come from: a root on disk, and optionally which frames."""

    domain: str
    root: Path
    version: str | None = None
    frames: list[str] | None = None

    def index(
        self, split: str | None, r: Recipe, cache: Path, progress: Progress | None = None
    ) -> Index:
        """The prepared index of a split; an explicit choice of frames overrides the split."""
        domain = readers.domains()[self.domain]
        return prepare(
            self.root,
            domain,
            None if self.frames else split,
            r.classes,
            r.image_size(readers.reader_of(domain).aspect),
            cache,
            version=self.version,
            frames=self.frames,
            progress=progress,
        )


def title(r: Recipe, given: tuple[str, ...] = ()) -> str:
    """A run in words: its method, the settings that the user chose, its stage."""
    stage = ["second stage"] if getattr(r, "pseudo", 0) else []
    return ", ".join([r.method, *given, *stage])


def run_name(r: Recipe, given: tuple[str, ...], seed: int) -> str:
    """The name of a run's folder: usa-singapore-ftdpp[fusion=false]+pl-seed0."""
    settings = f"[{','.join(given)}]" if given else ""
    stage = "+pl" if getattr(r, "pseudo", 0) else ""
    return f"{r.scenario}-{r.method}{settings}{stage}-seed{seed}"


def assemble(
    r: Any,
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
    given: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> tuple[Run, list[tuple[str, str, str]]]:
    """Prepare the splits that a recipe needs and build its run.

    Returns:
        the run, and each decision made on the way as (what, value, reason).
    """
    sides = {"src": src, "tgt": tgt}
    streams = systems.METHODS[r.method].system().streams(r)
    indexes = {
        name: sides[stream.side].index(stream.split, r, cache, progress)
        for name, stream in streams.items()
    }
    validation, val_reason = _validation(r, tgt, val, cache, progress)
    labels = None
    if pseudo is not None:
        [taught] = [name for name, stream in streams.items() if stream.pseudo]
        labels = PseudoLabels(pseudo, r, indexes[taught])
    cores = os.cpu_count() or 1
    count = (0 if cores <= 4 else min(8, cores // 2)) if workers is None else workers
    chosen = device or torch.device("cpu")
    run = Run(out, r, seed, indexes, validation, labels, chosen, count, pretrained, given)

    scenario_reason = "a row of the paper"
    if not systems.in_paper(r):
        scenario_reason = f"no paper has this pair: default settings, common classes {r.classes}"
    facts = [("scenario", r.scenario, scenario_reason)]
    for name, stream in streams.items():
        why = "supervised loss" if stream.labels else "adaptation; its labels are never read"
        facts.append(_index_fact(name, indexes[name], sides[stream.side], why))
    for a, b in _same_frames(indexes):
        facts.append(("NOTE", f"{a} and {b} are the same frames", "nothing is transferred"))
    if validation is not None:
        facts.append(_index_fact("validation", validation, val, val_reason))
    else:
        facts.append(("validation", "off", val_reason))
    products = "products in tf32" if chosen.type == "cuda" else "exact"
    faster = f"{products}; --set precision=bf16 is faster where the hardware has it"
    facts.append(("precision", r.precision, faster if r.precision == "fp32" else "--set precision"))
    facts.append(("workers", str(count), f"{cores} cores" if workers is None else "--workers"))
    weights = " ".join(f"{w:.2f}" for w in run.recipe.class_weights)
    computed = "log-smoothed counts of the labelled points"
    facts.append(("class weights", weights, "of the recipe" if r.class_weights else computed))
    return run, facts


def _validation(
    r: Recipe, tgt: Source, val: Source, cache: Path, progress: Progress | None
) -> tuple[Index | None, str]:
    """The index that periodic validation uses, or None, and the reason."""
    domain = readers.domains()[val.domain]
    if tgt.frames and not val.frames:
        return None, "the target frames were named one by one; name others with --val-frames"
    if not val.frames:
        if "val" not in domain.splits:
            return None, f"{domain.name} has no validation split; the last iteration is kept"
        if not list_frames(val.root, domain, "val", val.version):
            return None, f"no frame of the val split of {domain.name} is at {val.root}"
    index = val.index("val", r, cache, progress)
    if index.fingerprint["unlabelled_frames"]:
        return None, "the val split here has frames without labels"
    return index, "periodic validation and the choice of the best checkpoint"


def _index_fact(name: str, index: Index, source: Source, why: str) -> tuple[str, str, str]:
    split = index.identity["split"] or "chosen frames"
    if source.frames:
        domain = readers.domains()[source.domain]
        test = list_frames(source.root, domain, "test", source.version)
        held_out = len({ref.token for ref in test} & set(index.tokens))
        why += f"; {held_out} OF THEM BELONG TO THE TEST SPLIT" if held_out else ""
    size = f"{plural(len(index), 'frame')}, {index.fingerprint['points']:,} points"
    return name, size, f"{index.identity['domain']} {split}: {why}"


def _same_frames(indexes: dict[str, Index]) -> Iterator[tuple[str, str]]:
    """Pairs of streams that hold the same frames."""
    names = list(indexes)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            same_root = indexes[a].identity["root"] == indexes[b].identity["root"]
            if same_root and set(indexes[a].tokens) & set(indexes[b].tokens):
                yield a, b


def work_left(run: Run) -> float:
    """Cost of the iterations and validations that a run still has before it."""
    r = run.recipe
    left = range(run.iteration + 1, r.steps + 1)
    total = len(left) * run.system.cost(r)
    if run.val is not None:
        validations = sum(i % r.val_every == 0 or i == r.steps for i in left)
        total += validations * len(run.val)
    return total


# ---- run.json ----------------------------------------------------------------------------------


def write_record(
    run: Run, src: Source, tgt: Source, val: Source, cache: Path, threads: int, built_in: bool
) -> None:
    """run.json: what a person or `ftd train --resume` has to know of a run."""

    def row(source: Source) -> dict[str, Any]:
        return {**dataclasses.asdict(source), "root": str(source.root)}

    record = {
        "command": sys.argv[1:],
        "recipe": dataclasses.asdict(run.recipe),
        "seed": run.seed,
        "src": row(src),
        "tgt": row(tgt),
        "val": row(val),
        "built_in": built_in,
        "cache": str(cache.absolute()),
        "pseudo": str(run.pseudo.path.absolute()) if run.pseudo is not None else None,
        "threads": threads,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "git": _git_hash(),
        "data": {name: index.fingerprint for name, index in run.indexes.items()},
    }
    with replacing(run.out / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The run.json of a folder; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("expected an object")
        for side in ("src", "tgt", "val"):
            Source(**record[side])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: damaged ({error}); name the data with --data and --domain, and a checkpoint "
            "instead of RUN"
        ) from None
    return record


def recorded_source(record: dict[str, Any], side: str) -> Source:
    """The source of a side, "src", "tgt" or "val", in a record."""
    row = record[side]
    return Source(row["domain"], Path(row["root"]), row["version"], row["frames"])


def _git_hash() -> str | None:
    """The commit of this code, where it lies in a repository."""
    command = ["git", "rev-parse", "HEAD"]
    place = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
