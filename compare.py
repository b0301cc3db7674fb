"""Many runs, one table: several methods with several seeds, selected on val, compared on test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftdpp import checkpoint, runs, systems
from ftdpp.evaluate import evaluate, write_pseudo_labels
from ftdpp.files import Progress, replacing
from ftdpp.index import require_labels
from ftdpp.recipe import RecipeError, given_names, settings_of
from ftdpp.runs import Source
from ftdpp.train import Run


class Job(NamedTuple):
    """One run of a comparison."""

    method: str  # NAME, or NAME+pl for a second stage
    seed: int
    out: Path
    recipe: Any
    given: tuple[str, ...]  # the user's settings that this method reads

    @property
    def pseudo(self) -> Path | None:
        """The labels of a second stage, which lie in its own folder."""
        return self.out / "pseudo.safetensors" if self.recipe.pseudo else None

    @property
    def title(self) -> str:
        return runs.title(self.recipe, self.given)


def plan(
    scenario: str, methods: str, seeds: str, preset: str, overrides: Sequence[str], out: Path
) -> list[Job]:
    """The runs of a comparison, in an order in which a first stage comes before its second.

    A setting goes to the methods that read it.

    Raises:
        RecipeError: a malformed list, an unknown name, or a setting that no method reads.
    """
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise RecipeError(f"--seeds {seeds}: expected numbers from 0 on, as in 0,1,2") from None
    stages: list[tuple[str, bool]] = []
    for name in methods.split(","):
        plain, _, stage = name.partition("+")
        if stage not in ("", "pl"):
            raise RecipeError(f"--methods {name}: expected NAME or NAME+pl")
        stages += [(plain, False), *([(plain, True)] if stage else [])]
    names, read = given_names(overrides), set()
    jobs = []
    for seed in numbers:
        for plain, second in dict.fromkeys(stages):
            unread = systems.recipe(scenario, plain, preset, second).unread()
            mine = [text for n, text in zip(names, overrides, strict=True) if n not in unread]
            r = systems.recipe(scenario, plain, preset, second, mine)
            given = settings_of(r, given_names(mine))
            read |= set(given_names(mine))
            folder = out / runs.run_name(r, given, seed)
            jobs.append(Job(plain + ("+pl" if second else ""), seed, folder, r, given))
    for name, text in zip(names, overrides, strict=True):
        if name not in read:
            raise RecipeError(f"--set {text}: none of {methods} reads it")
    return jobs


@dataclass
class Comparison:
    """The jobs, and where their data comes from."""

    jobs: list[Job]
    src: Source
    tgt: Source
    val: Source
    cache: Path
    device: torch.device
    pretrained: dict[str, Tensor] | None = None
    threads: int = 1
    built_in: bool = False

    def open(self, job: Job, pseudo: Path | None) -> tuple[Run, list[tuple[str, str, str]]]:
        """The run of a job, resumed where it was begun before, and the decisions about it."""
        run, facts = runs.assemble(
            job.recipe,
            job.seed,
            job.out,
            self.src,
            self.tgt,
            self.val,
            self.cache,
            pseudo,
            self.device,
            None,
            self.pretrained,
            job.given,
        )
        if run.last_path.exists():
            run.resume()
        return run, facts

    def prepare(self, progress: Progress) -> tuple[float, list[tuple[str, str, str]]]:
        """Prepare all data, and find out what is left to do before the first step.

        Returns:
            the work in units of `System.cost`, so that one ETA covers all runs; the decisions about
            the run with most of them.
        Raises:
            DataError: a split is missing or unlabelled.
        """
        require_labels(self.tgt.index("test", self.jobs[0].recipe, self.cache, progress))
        for job in self.jobs:
            for stream in systems.METHODS[job.recipe.method].system().streams(job.recipe).values():
                side = self.src if stream.side == "src" else self.tgt
                side.index(stream.split, job.recipe, self.cache, progress)
        work = 0.0
        facts: list[tuple[str, str, str]] = []
        for job in self.jobs:
            ready = job.pseudo if job.pseudo is not None and job.pseudo.exists() else None
            run, found = self.open(job, ready)
            work += runs.work_left(run)
            facts = max(facts, found, key=len)
        return work, facts

    def _labels(self, job: Job) -> Path | None:
        """The pseudo-labels of a second stage, made from its first stage's last checkpoint."""
        if job.pseudo is not None and not job.pseudo.exists():
            name = job.method.removesuffix("+pl")
            [first] = [j for j in self.jobs if (j.method, j.seed) == (name, job.seed)]
            system, meta = checkpoint.load(first.out / "last.safetensors", self.device)
            streams = systems.METHODS[job.recipe.method].system().streams(job.recipe)
            [split] = [stream.split for stream in streams.values() if stream.pseudo]
            index = self.tgt.index(split, job.recipe, self.cache)
            origin = f"last.safetensors, iteration {meta['iteration']}"
            write_pseudo_labels(job.pseudo, system, index, origin, self.device)
        return job.pseudo

    def run(self, drive: Callable[[Run, str], None]) -> list[dict[str, Any]]:
        """Train what is not trained yet and evaluate every best checkpoint on test.

        Args:
            drive: trains a run to its end under a name.
        Returns:
            a row for each job.
        """
        rows = []
        for job in self.jobs:
            run, _ = self.open(job, self._labels(job))
            if run.iteration < run.recipe.steps or run.owed:
                runs.write_record(
                    run, self.src, self.tgt, self.val, self.cache, self.threads, self.built_in
                )
                drive(run, f"{job.title}, seed {job.seed}")
            system, meta = checkpoint.load(run.best_path, self.device)
            origin = f"best.safetensors, iteration {meta['iteration']}"
            index = self.tgt.index("test", job.recipe, self.cache)
            score = evaluate(system, index, origin, self.device)
            row = {"method": job.method, "title": job.title, "seed": job.seed}
            rows.append(row | score.as_dict())
        return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a comparison as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1))
