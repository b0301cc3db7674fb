"""Many runs, one table: several methods with several seeds, selected on val, compared on test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftdpp import checkpoint, files, runs, systems
from ftdpp.checkpoint import RunError
from ftdpp.evaluate import evaluate, write_pseudo_labels
from ftdpp.files import Progress
from ftdpp.index import Index, require_labels
from ftdpp.readers import domains
from ftdpp.recipe import RecipeError, given_names, settings, settings_of
from ftdpp.runs import Places
from ftdpp.train import Run


class Job(NamedTuple):
    """One run of a comparison."""

    method: str  # as it was named: NAME, NAME[settings], with +pl for a second stage
    seed: int
    out: Path
    recipe: Any
    given: tuple[str, ...]  # the user's settings that this method reads
    source: Path | None = None  # the run that a method without source data starts from

    @property
    def pseudo(self) -> Path | None:
        """The labels of a second stage: those it was begun with, or a file in its own folder."""
        if not self.recipe.second_stage:
            return None
        record = runs.read_record(self.out)
        begun = record["pseudo"] if record is not None else None
        return Path(begun) if begun else self.out / "pseudo.safetensors"

    @property
    def title(self) -> str:
        return runs.title(self.recipe, self.given)


SOURCE_MODEL = "source-only"  # what methods without source data start from


def plan(
    scenario: str, methods: str, seeds: str, preset: str, overrides: Sequence[str], out: Path
) -> list[Job]:
    """The runs of a comparison, in an order in which a first stage comes before its second, and a
    source model before the methods that start from it.

    A setting goes to the methods that read it.

    Args:
        methods: names with commas between; NAME[setting=value,...] for a method under settings of
            its own, +pl behind a name for both stages.
    Raises:
        RecipeError: a malformed list, an unknown name, or a setting that no method reads.
    """
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise RecipeError(f"--seeds {seeds}: expected numbers from 0 on, as in 0,1,2") from None
    stages: list[tuple[str, str, bool]] = []
    for name in re.split(r",(?![^\[]*\])", methods):  # commas that are in no brackets
        found = re.fullmatch(r"([^\[\]+]+)(?:\[([^\[\]]+)\])?(\+pl)?", name)
        if not found:
            raise RecipeError(
                f"--methods {name}: expected NAME, NAME[setting=value,...], and +pl behind it for "
                "both stages"
            )
        plain, own, stage = found[1], found[2] or "", bool(found[3])
        if systems.is_source_free(plain):
            if stage:
                raise RecipeError(f"--methods {name}: {plain} has no second stage; drop +pl")
            if scenario.endswith("-ssda"):
                raise RecipeError(f"{plain} has no semi-supervised form; drop --ssda")
            stages.append((SOURCE_MODEL, "", False))
        stages += [(plain, own, False), *([(plain, own, True)] if stage else [])]
    names, read = given_names(overrides), set()
    # Settings of some of the methods; what none has is refused by the first recipe.
    everywhere: set[str] = set()
    for plain in {name for name, _, _ in stages} & systems.METHODS.keys():
        everywhere |= settings(systems.system_of(plain, scenario).Recipe).keys()
    jobs = []
    for seed in numbers:
        model: Job | None = None  # of this seed
        for plain, own, second in dict.fromkeys(stages):
            source = model if systems.is_source_free(plain) else None
            theirs = source.recipe if source is not None else None
            base = systems.recipe(scenario, plain, preset, second, (), theirs)
            # A comma before a name, not one between the numbers of a tuple.
            chosen = [text for text in re.split(r",(?=[a-z_0-9]+=)", own) if text]
            variant = systems.recipe(scenario, plain, preset, second, chosen, theirs)
            lacking = base.lacking() | (variant.unread() if chosen else {})
            unread = lacking.keys() | (everywhere - settings(type(base)).keys())
            mine = [t for n, t in zip(names, overrides, strict=True) if n not in unread]
            read |= set(given_names(mine))
            mine += chosen
            r = systems.recipe(scenario, plain, preset, second, mine, theirs)
            given = settings_of(r, base, given_names(mine))
            named = given if source is None else runs.names_source(r, given, source.given)
            folder = out / runs.run_name(r, named, seed)
            start = source.out if source is not None else None
            label = plain + (f"[{own}]" if own else "") + ("+pl" if second else "")
            job = Job(label, seed, folder, r, given, start)
            model = job if label == SOURCE_MODEL else model
            jobs.append(job)
    for name, text in zip(names, overrides, strict=True):
        if name not in read:
            raise RecipeError(f"--set {text}: none of {methods} reads it")
    return jobs


@dataclass
class Comparison:
    """The jobs, and where their data comes from."""

    jobs: list[Job]
    places: Places
    device: torch.device
    threads: int
    pretrained: dict[str, Tensor] | None = None

    @property
    def split(self) -> str:
        """The split of the figures: test; val where the labels of test are not public."""
        return "test" if "test" in domains()[self.places.origins["tgt"].domain].splits else "val"

    def places_of(self, job: Job) -> Places:
        return self.places if job.source is None else self.places.without_source()

    def open(
        self, job: Job, pseudo: Path | None, progress: Progress
    ) -> tuple[Run, list[runs.Fact]]:
        """The run of a job, resumed where it was begun before, and the decisions about it."""
        source = None
        if job.source is not None and (job.source / "best.safetensors").exists():
            trained, _ = checkpoint.load(job.source / "best.safetensors")
            source = trained.camera_network()
        run, facts = runs.assemble(
            job.recipe,
            job.seed,
            job.out,
            self.places_of(job),
            pseudo=pseudo,
            device=self.device,
            pretrained=self.pretrained if job.source is None else None,
            source=source,
            given=job.given,
            progress=progress,
        )
        if run.val is None:
            why = next(reason for what, _, reason in facts if what == "validation")
            raise RunError(f"a comparison selects checkpoints on val: {why}; use ftd train")
        if run.last_path.exists():
            run.resume()
        return run, facts

    def prepare(self, progress: Progress) -> tuple[float, list[runs.Fact]]:
        """Prepare all data, and find out what is left to do before the first step.

        Returns:
            the work in units of `System.cost`, so that one ETA covers all runs; the decisions about
            the run with most of them.
        Raises:
            DataError: a split is missing or unlabelled. RunError: there is nothing to select on.
        """
        require_labels(self._test(self.jobs[0], progress))
        for job in self.jobs:
            for stream in (
                systems.system_of(job.recipe.method, job.recipe.scenario)
                .streams(job.recipe)
                .values()
            ):
                origin = self.places.origins[stream.side]
                origin.index(stream.split, job.recipe, self.places.cache, progress)
        work = 0.0
        facts: list[runs.Fact] = []
        notes: list[runs.Fact] = []
        for job in self.jobs:
            ready = job.pseudo if job.pseudo is not None and job.pseudo.exists() else None
            run, found = self.open(job, ready, progress)
            work += runs.work_left(run)
            facts = max(facts, found, key=len)
            notes += [fact for fact in found if fact[0] == "NOTE" and fact not in notes]
        return work, [*(fact for fact in facts if fact[0] != "NOTE"), *notes]

    def _test(self, job: Job, progress: Progress) -> Index:
        return self.places.origins["tgt"].index(self.split, job.recipe, self.places.cache, progress)

    def _labels(self, job: Job, progress: Progress) -> Path | None:
        """The pseudo-labels of a second stage, made from its first stage's last checkpoint."""
        if job.pseudo is not None and not job.pseudo.exists():
            name = job.method.removesuffix("+pl")
            [first] = [j for j in self.jobs if (j.method, j.seed) == (name, job.seed)]
            system, meta = checkpoint.load(first.out / "last.safetensors", self.device)
            streams = systems.system_of(job.recipe.method, job.recipe.scenario).streams(job.recipe)
            split = streams[runs.taught_stream(job.recipe)].split
            target = self.places.origins["tgt"]
            index = target.index(split, job.recipe, self.places.cache, progress)
            origin = f"last.safetensors, iteration {meta['iteration']}"
            write_pseudo_labels(job.pseudo, system, index, origin, self.device, progress)
        return job.pseudo

    def _train(self, run: Run, job: Job, drive: Callable[[Run, str], None]) -> None:
        """Train a run to its end; one that was begun, with as many threads as it was begun with."""
        threads, record = self.threads, runs.read_record(run.out)
        if record is None or not run.iteration:
            source = None if job.source is None else job.source / "best.safetensors"
            runs.write_record(run, self.places_of(job), threads, source)
        else:
            threads = record["threads"]
        torch.set_num_threads(threads)
        drive(run, f"{job.title}, seed {job.seed}")
        torch.set_num_threads(self.threads)

    def run(self, drive: Callable[[Run, str], None], progress: Progress) -> list[dict[str, Any]]:
        """Train what is not trained yet and evaluate every best checkpoint on test.

        Args:
            drive: trains a run to its end under a name. progress: told of everything else.
        Returns:
            a row for each job.
        """
        rows = []
        for job in self.jobs:
            run, _ = self.open(job, self._labels(job, progress), progress)
            if run.iteration < run.recipe.steps or run.owed:
                self._train(run, job, drive)
            system, meta = checkpoint.load(run.best_path, self.device)
            origin = f"best.safetensors, iteration {meta['iteration']}"
            score = evaluate(system, self._test(job, progress), origin, self.device, progress)
            row = {"method": job.method, "title": job.title, "seed": job.seed}
            rows.append(row | score.as_dict())
        return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a comparison as JSON."""
    files.write(path, json.dumps(rows, indent=1).encode())
