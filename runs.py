"""From a command to a run: where its frames come from, what is prepared, announced and recorded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch
from torch import Tensor

from ftdpp import checkpoint, files, machine, readers, systems
from ftdpp.checkpoint import RunError
from ftdpp.files import Progress
from ftdpp.index import Index, few_labels, prepare, require_depth, require_frames
from ftdpp.pseudo_labels import PseudoLabels
from ftdpp.readers import DataError, list_frames, plural
from ftdpp.recipe import Recipe, RecipeError, settings
from ftdpp.systems import clip
from ftdpp.train import Run


@dataclass
class Origin:
    """Where the frames of one domain come from: a root on disk, and optionally which frames."""

    domain: str
    root: Path
    version: str | None = None
    frames: list[str] | None = None

    def require(self, split: str | None) -> None:
        """Raises DataError where the split has no frame or misses a file."""
        domain = readers.domains()[self.domain]
        require_frames(self.root, domain, None if self.frames else split, self.version, self.frames)

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


@dataclass
class Places:
    """Where all data of a run comes from."""

    origins: dict[str, Origin]  # "tgt", "val" and, where the method has a source, "src"
    cache: Path  # of the prepared indexes
    built_in: bool = False  # the roots are those of the built-in world

    def without_source(self) -> Places:
        """The places of a method that reads no source data."""
        origins = {side: origin for side, origin in self.origins.items() if side != "src"}
        return dataclasses.replace(self, origins=origins)


@dataclass
class Source:
    """A trained network from which a method without source data starts."""

    path: Path
    recipe: Any  # Recipe
    network: dict[str, Tensor]  # of `System.camera_network`
    domain: str  # where its labels came from
    title: str
    given: tuple[str, ...]  # settings that its user chose


def read_source(path: Path, tgt: str, data: Path | None) -> Source:
    """The source model of a checkpoint.

    Args:
        tgt, data: domain and root of the target that it will be adapted to.
    Raises:
        RunError: no such checkpoint; it saw labels of the target; or it was trained on a data set
        on disk and no root of the target is named. RecipeError: it has no network of images.
    """
    system, meta = checkpoint.load(path)
    r = system.recipe
    pair = dict(zip(("src", "tgt"), r.scenario.removesuffix("-ssda").split("-"), strict=True))
    sides = {stream.side for stream in system.streams(r).values() if stream.labels} or {"src"}
    if tgt in {pair[side] for side in sides}:
        raise RunError(
            f"{path}: {r.method} was trained with labels of {tgt}; name a run that was not, or "
            "another --tgt"
        )
    record = read_record(path.parent)
    if record is not None and not record["built_in"] and data is None:
        raise RunError(
            f"{path}: was trained on a data set on disk; name the root of {tgt} with --data"
        )
    given = tuple(meta.get("given", ()))  # a converted checkpoint has none
    domain = pair["src" if "src" in sides else "tgt"]
    what = f"{title(r, given)}, iteration {meta['iteration']}"
    return Source(path, r, system.camera_network(), domain, what, given)


def names_source(r: Recipe, given: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[str, ...]:
    """The settings in the name of a run that starts from another: its own, and those of the other
    that it does not have itself."""
    own = settings(type(r)).keys() - r.lacking().keys()
    return (*(text for text in theirs if text.partition("=")[0] not in own), *given)


def title(r: Recipe, given: tuple[str, ...] = ()) -> str:
    """A method as it is named everywhere: NAME, +pl for a second stage, [the user's settings]."""
    chosen = f"[{','.join(given)}]" if given else ""
    return f"{r.method}{'+pl' if r.second_stage else ''}{chosen}"


def run_name(r: Recipe, given: tuple[str, ...], seed: int) -> str:
    """The name of a run's folder: usa-singapore-ftdpp+pl[fusion=false]-seed0.

    A name that no folder can have is cut, and tells itself apart by a digest.
    """
    whole = f"{r.scenario}-{title(r, given)}"
    name = whole.replace("/", "_")
    if name != whole or len(name) > 200:
        name = f"{name[:180]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return f"{name}-seed{seed}"


def taught_stream(r: Recipe) -> str:
    """The stream that receives the pseudo-labels of a first stage.

    Raises:
        RunError: there is none.
    """
    streams = systems.system_of(r.method, r.scenario).streams(r)
    names = [name for name, stream in streams.items() if stream.pseudo]
    if len(names) != 1:
        raise RunError(f"{r.method} has {len(names)} streams that take pseudo-labels, expected 1")
    return names[0]


Fact = tuple[str, str, str]  # what was decided, the value, the reason


def assemble(
    r: Any,
    seed: int,
    out: Path,
    places: Places,
    *,
    pseudo: Path | None = None,
    device: torch.device | None = None,
    workers: int | None = None,
    pretrained: dict[str, Tensor] | None = None,
    pretrained_digest: str | None = None,
    source: dict[str, Tensor] | None = None,
    source_digest: str | None = None,
    given: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> tuple[Run, list[Fact]]:
    """Prepare the splits that a recipe needs and build its run.

    Args:
        pseudo: the pseudo-labels of a second stage. pretrained: ImageNet weights; or, of a run that
        goes on, pretrained_digest: of those that it began with. source, source_digest: likewise the
        network that a system without source data starts from.
    Returns:
        the run, and each decision made on the way.
    """
    require_memory(r, device or torch.device("cpu"))
    streams = systems.system_of(r.method, r.scenario).streams(r)
    if r.needs_clip:
        clip.make_ready(r.needs_clip, progress)
    for stream in streams.values():  # whatever is missing is said before anything is prepared
        places.origins[stream.side].require(stream.split)
    indexes = {
        name: places.origins[stream.side].index(stream.split, r, places.cache, progress)
        for name, stream in streams.items()
    }
    for name, stream in streams.items():
        if stream.few:
            few = r.labelled, r.mask_seed, r.balanced
            indexes[name] = few_labels(indexes[name], *few, progress)
    validation, val_reason = _validation(r, places, progress)
    for name, stream in streams.items():
        if stream.few and validation is not None:
            _require_hidden(indexes[name], validation)
        for index in (indexes[name], validation):  # a system may look at itself on the latter
            if stream.depth and index is not None:
                require_depth(index)
    labels = PseudoLabels(pseudo, r, indexes[taught_stream(r)]) if pseudo is not None else None
    cores = machine.allowed_cores()
    run = Run(
        out=out,
        recipe=r,
        seed=seed,
        indexes=indexes,
        val=validation,
        pseudo=labels,
        device=device or torch.device("cpu"),
        workers=(0 if cores <= 4 else min(8, cores // 2)) if workers is None else workers,
        pretrained=pretrained,
        pretrained_digest=pretrained_digest,
        source=source,
        source_digest=source_digest,
        given=given,
    )

    scenario_reason = "a row of the paper"
    if run.system.source_free:
        scenario_reason = "a source model and an unlabelled target; settings of ours"
    elif not systems.in_paper(r):
        scenario_reason = f"no paper has this pair: default settings, common classes {r.classes}"
    facts = [("scenario", r.scenario, scenario_reason)]
    if run.system.note:
        facts.append(("NOTE", r.method, run.system.note))
    if r.needs_clip == clip.STREET:
        facts.append(
            ("CLIP", r.needs_clip, "small, trained on generated streets; --clip names one")
        )
    elif r.needs_clip:
        facts.append(("CLIP", r.needs_clip, "frozen"))
    for name, stream in streams.items():
        why = "supervised loss" if stream.labels else "adaptation; its labels are never read"
        if stream.few:
            count = int(indexes[name].counts().sum())
            why += f" on {plural(count, 'label')}; no other label is read"
        facts.append(_index_fact(name, indexes[name], places.origins[stream.side], why))
    for a, b, count in _shared_frames(indexes):
        facts.append(("NOTE", f"{a} and {b} share {plural(count, 'frame')}", "same root"))
    if validation is not None:
        facts.append(_index_fact("validation", validation, places.origins["val"], val_reason))
    else:
        facts.append(("validation", "off", val_reason))
    products = "convolutions in tf32" if run.device.type == "cuda" else "exact"
    faster = f"{products}; --set precision=bf16 is faster where the hardware has it"
    facts.append(("precision", r.precision, faster if r.precision == "fp32" else "--set precision"))
    why = f"{plural(cores, 'core')} for this process" if workers is None else "--workers"
    facts.append(("workers", str(run.workers), why))
    for stream in streams.values():
        if stream.weights:
            weights = " ".join(f"{w:.2f}" for w in getattr(run.recipe, stream.weights))
            computed = "log-smoothed counts of the labelled points"
            why = "of the recipe" if getattr(r, stream.weights) else computed
            facts.append((stream.weights, weights, why))
    return run, facts


MAPS = 8  # of the image's size and the trunk's width are kept for the gradient, at the very least


def require_memory(r: Recipe, device: torch.device) -> None:
    """Refuses an update that is certain not to fit, before anything is prepared for it.

    Counted are feature maps at full resolution alone: what really is needed is more.

    Raises:
        RecipeError: with the estimate.
    """
    if "width_2d" in r.unread():
        return
    height, width = r.crop if r.crop != (0, 0) else r.image
    needed, there = MAPS * r.batch * height * width * r.width_2d * 4, machine.memory(device)
    if needed > there:
        raise RecipeError(
            f"batch {r.batch} of {height}x{width} images at width {r.width_2d} takes more than "
            f"{needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}; choose a smaller "
            "--set batch=..., and --set accumulate=... for an update of as many frames"
        )


def _validation(r: Recipe, places: Places, progress: Progress | None) -> tuple[Index | None, str]:
    """The index that periodic validation uses, or None, and the reason."""
    val, domain = places.origins["val"], readers.domains()[places.origins["val"].domain]
    if places.origins["tgt"].frames and not val.frames:
        return None, "the target frames were named one by one; name others with --val-frames"
    if not val.frames:
        if "val" not in domain.splits:
            return None, f"{domain.name} has no validation split; the last iteration is kept"
        if not list_frames(val.root, domain, "val", val.version):
            return None, f"no frame of the val split of {domain.name} is at {val.root}"
    index = val.index("val", r, places.cache, progress)
    if index.fingerprint["unlabelled_frames"]:
        return None, "the val split here has frames without labels"
    return index, "periodic validation and the choice of the best checkpoint"


def _index_fact(name: str, index: Index, origin: Origin, why: str) -> Fact:
    split = index.identity["split"] or "chosen frames"
    if origin.frames:
        domain = readers.domains()[origin.domain]
        test = list_frames(origin.root, domain, "test", origin.version)
        held_out = len({ref.token for ref in test} & set(index.tokens))
        why += f"; {held_out} OF THEM BELONG TO THE TEST SPLIT" if held_out else ""
    empty = index.fingerprint["empty_frames"]
    why += f"; LEFT OUT: {plural(empty, 'frame')} without a point in the image" if empty else ""
    size = f"{plural(len(index), 'frame')}, {index.fingerprint['points']:,} points"
    return name, size, f"{index.identity['domain']} {split}: {why}"


def _shared_frames(indexes: dict[str, Index]) -> Iterator[tuple[str, str, int]]:
    """Pairs of streams that have frames in common, and how many."""
    for (a, first), (b, second) in combinations(indexes.items(), 2):
        common = set(first.tokens) & set(second.tokens)
        if common and first.identity["root"] == second.identity["root"]:
            yield a, b, len(common)


def _require_hidden(few: Index, validation: Index) -> None:
    """Raises DataError where validation would read labels that training may not."""
    same_root = few.identity["root"] == validation.identity["root"]
    common = sorted(set(few.tokens) & set(validation.tokens)) if same_root else []
    if common:
        raise DataError(
            f"{plural(len(common), 'frame')} of training, first {common[0]}, would be validated "
            "with all labels; name others with --val-frames"
        )


def work_left(run: Run) -> float:
    """Cost of the iterations and validations that a run still has before it."""
    r = run.recipe
    total = (r.steps - run.iteration) * run.system.cost(r) * r.accumulate
    if run.val is not None and run.iteration < r.steps:
        validations = r.steps // r.val_every - run.iteration // r.val_every
        validations += r.steps % r.val_every > 0  # the last iteration is validated
        total += validations * len(run.val)
    return total


def is_target(folder: Path, origin: Origin) -> bool:
    """Whether frames come from where the run in a folder has its target from."""
    record = read_record(folder)
    places = recorded_places(record).origins if record is not None else {}
    mine = places.get("tgt")
    theirs = origin.domain, origin.root, origin.version
    return mine is not None and (mine.domain, mine.root, mine.version) == theirs


# ---- run.json ----------------------------------------------------------------------------------


class _OriginRecord(TypedDict):
    domain: str
    root: str
    version: str | None
    frames: list[str] | None


class _Print(TypedDict):
    """The part of an index's fingerprint that is shown."""

    frames: int
    points: int
    content: str


class Record(TypedDict):
    """What run.json holds."""

    command: list[str]
    recipe: dict[str, Any]
    seed: int
    origins: dict[str, _OriginRecord]
    built_in: bool
    cache: str
    pseudo: str | None
    source: str | None
    threads: Annotated[int, msgspec.Meta(ge=1)]
    versions: dict[str, str]
    git: str | None
    data: dict[str, _Print]


def write_record(run: Run, places: Places, threads: int, source: Path | None = None) -> None:
    """run.json: what a person or `ftd train --resume` has to know of a run.

    Args:
        source: the checkpoint that a run without source data started from.
    """
    origins = {
        side: {**dataclasses.asdict(origin), "root": str(origin.root)}
        for side, origin in places.origins.items()
    }
    record = {
        "command": sys.argv[1:],
        "recipe": dataclasses.asdict(run.recipe),
        "seed": run.seed,
        "origins": origins,
        "built_in": places.built_in,
        "cache": str(places.cache.absolute()),
        "pseudo": str(run.pseudo.path.absolute()) if run.pseudo is not None else None,
        "source": None if source is None else str(source.absolute()),
        "threads": threads,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "git": git_hash(),
        "data": {name: index.fingerprint for name, index in run.indexes.items()},
    }
    files.write(run.out / "run.json", json.dumps(record, indent=1).encode())


def read_record(folder: Path) -> Record | None:
    """The run.json of a folder; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RunError(
            f"{path}: damaged ({error}); name the data with --data and --domain, and a "
            "checkpoint instead of RUN"
        ) from None
    return record


def recorded_places(record: Record) -> Places:
    """Where the data of a recorded run came from."""
    origins = {
        side: Origin(row["domain"], Path(row["root"]), row["version"], row["frames"])
        for side, row in record["origins"].items()
    }
    return Places(origins, Path(record["cache"]), record["built_in"])


def git_hash() -> str | None:
    """The commit of this code, where it lies in a repository of its own."""
    place = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        found = subprocess.run(
            ["git", *words], cwd=place, capture_output=True, text=True, timeout=5
        )
        return found.stdout.strip()

    try:
        own = Path(git("rev-parse", "--show-toplevel")) == place
        return git("rev-parse", "HEAD") if own else None
    except (OSError, subprocess.TimeoutExpired):
        return None
