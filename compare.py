"""Many runs, one table: methods x scenarios x seeds, selected on val, compared on test.

Every run has a folder of its own, named by what it is: a run that is there (from `ftd train`, or
from a comparison that was interrupted) is continued or taken as it is.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftdpp import checkpoint, machine, results, runs, screen, systems
from ftdpp.checkpoint import RunError
from ftdpp.evaluate import evaluate, write_pseudo_labels
from ftdpp.files import Progress, claimed
from ftdpp.index import Index, require_labels
from ftdpp.kernels import KernelError
from ftdpp.readers import DataError, domains, plural
from ftdpp.recipe import RecipeError, given_names, settings, settings_of
from ftdpp.runs import Places
from ftdpp.train import Interrupted, NonFiniteLoss, Run


class Job(NamedTuple):
    """One run of a comparison."""

    seed: int
    out: Path
    recipe: Any
    given: tuple[str, ...]  # the user's settings that it or its source model reads
    source: Path | None = None  # the run that a method without source data starts from
    first: Path | None = None  # the run that a second stage takes its pseudo-labels from

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

    @property
    def needs(self) -> list[Path]:
        """The runs that have to be at their end before this one begins."""
        return [path for path in (self.source, self.first) if path is not None]


# ---- the plan ----------------------------------------------------------------------------------

SOURCE_MODEL = "source-only"  # what methods without source data start from

# Lists that --methods takes by name: the paper's tables, and FtD++ without one of its parts.
LISTS = {
    "paper": "source-only+pl,logcoral,minent,xmuda+pl,bftd+pl,ftdpp+pl,target-only",
    "paper-ssda": "target-only,source-target+pl,logcoral,minent,xmuda+pl,ftdpp+pl",
    "ablations": (
        "ftdpp+pl,ftdpp[fusion=false],ftdpp[mimic_src=0,mimic_tgt=0],ftdpp[distill_single=0],"
        "ftdpp[distill_fused=0],ftdpp[distill_single=0,distill_fused=0],"
        "ftdpp[teacher_image=none],ftdpp[teacher_density=false],ftdpp+pl[pseudo_debias=false]"
    ),
}


def listed(methods: str | None, scenario: str) -> str:
    """The methods of a scenario: lists by their methods, the usual ones where none is named."""
    if methods is None:
        dense = systems.is_dense(scenario)
        return "source-only,target-only" if dense else "source-only,ftdpp"
    form = "-ssda" if scenario.endswith("-ssda") else ""
    return ",".join(LISTS.get(name + form, name) for name in _names(methods))


def _names(methods: str) -> list[str]:
    """Between commas that are in no brackets."""
    return [name.strip() for name in re.split(r",(?![^\[]*\])", methods)]


class _Named(NamedTuple):
    """A method as the user named it."""

    method: str
    own: tuple[str, ...]  # settings in brackets
    second: bool  # stage
    first: tuple[str, ...] = ()  # settings in brackets of a second stage's first


def plan(
    scenario: str,
    methods: str,
    seeds: str,
    preset: str,
    overrides: Sequence[str],
    out: Path,
    sweeps: Sequence[str] = (),
) -> list[Job]:
    """The runs of a comparison, in an order in which a first stage comes before its second, and a
    source model before the methods that start from it.

    A setting goes to the methods that read it.

    Args:
        methods: names with commas between; NAME[setting=value,...] for a method under settings of
            its own; NAME+pl, NAME+pl[...] for both stages.
        sweeps: "name=value,value,..." each: all combinations are run. Values that hold commas
            themselves are separated by semicolons.
    Raises:
        RecipeError: a malformed list, an unknown name, or a setting that no method reads.
    """
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise RecipeError(f"--seeds {seeds}: expected numbers from 0 on, as in 0,1,2") from None
    named = _named(methods, scenario)
    combinations = [[*overrides, *more] for more in itertools.product(*map(_values, sweeps))]
    read: set[str] = set()
    jobs: dict[Path, Job] = {}  # a method that does not read what is swept is there once
    for seed in numbers:
        for chosen in combinations:
            for job in _plan_one(scenario, named, seed, preset, chosen, out, read):
                jobs.setdefault(job.out, job)
    for text in (*overrides, *sweeps):
        if text.partition("=")[0] not in read:
            option = "--set" if text in overrides else "--sweep"
            raise RecipeError(f"{option} {text}: none of {methods} reads it")
    return list(jobs.values())


def _named(methods: str, scenario: str) -> list[_Named]:
    """The methods of a list, each behind what it needs."""
    named: list[_Named] = []
    for text in _names(methods):
        found = re.fullmatch(r"([^\[\]+]+)(\+pl)?(?:\[([^\[\]]+)\])?", text)
        if not found:
            raise RecipeError(
                f"--methods {text}: expected NAME, NAME[setting=value,...], and for both stages "
                "NAME+pl, NAME+pl[setting=value,...]"
            )
        method, second = found[1], bool(found[2])
        # A comma before a name, not one between the numbers of a tuple.
        own = tuple(part for part in re.split(r",(?=[a-z_0-9]+=)", found[3] or "") if part)
        if systems.is_source_free(method):
            if second:
                raise RecipeError(f"--methods {text}: {method} has no second stage; drop +pl")
            if scenario.endswith("-ssda"):
                raise RecipeError(f"{method} has no semi-supervised form; drop --ssda")
            named.append(_Named(SOURCE_MODEL, (), False))
        first: tuple[str, ...] = ()
        if second:  # the first stage does not read what is about pseudo-labels
            systems.recipe(scenario, method, "small", True, own)
            unread = systems.recipe(scenario, method, "small").lacking()
            first = tuple(part for part in own if part.partition("=")[0] not in unread)
            named.append(_Named(method, first, False))
        named.append(_Named(method, own, second, first))
    return list(dict.fromkeys(named))


def _values(sweep: str) -> list[str]:
    """The settings of "name=value,value,..."."""
    name, found, values = sweep.partition("=")
    parts = [value for value in values.split(";" if ";" in values else ",") if value]
    if not found or len(parts) < 2:
        raise RecipeError(
            f"--sweep {sweep}: expected name=value,value,... as in lr_3d=1e-3,3e-3; semicolons "
            "between values that hold commas"
        )
    return [f"{name}={value}" for value in parts]


def _plan_one(
    scenario: str,
    named: Sequence[_Named],
    seed: int,
    preset: str,
    overrides: Sequence[str],
    out: Path,
    read: set[str],
) -> list[Job]:
    """The runs of one seed under the same settings; their names go into `read` where one is."""
    names = given_names(overrides)
    # Settings of some of the methods; what none has is refused by the first recipe.
    everywhere: set[str] = set()
    for method in {row.method for row in named} & systems.METHODS.keys():
        everywhere |= settings(systems.system_of(method, scenario).Recipe).keys()
    jobs: list[Job] = []
    firsts: dict[tuple[str, tuple[str, ...]], Path] = {}  # what is no second stage, by its name
    model: Job | None = None
    for method, own, second, needed in named:
        source = model if systems.is_source_free(method) else None
        theirs = source.recipe if source is not None else None
        base = systems.recipe(scenario, method, preset, second, (), theirs)
        variant = systems.recipe(scenario, method, preset, second, own, theirs)
        lacking = base.lacking() | (variant.unread() if own else {})
        unread = lacking.keys() | (everywhere - settings(type(base)).keys())
        mine = [t for n, t in zip(names, overrides, strict=True) if n not in unread]
        read |= set(given_names(mine))
        mine += own
        r = systems.recipe(scenario, method, preset, second, mine, theirs)
        given = settings_of(r, base, given_names(mine))
        listed = given if source is None else runs.names_source(r, given, source.given)
        start = source.out if source is not None else None
        first = firsts[method, needed] if second else None
        folder = out / runs.run_name(r, listed, seed)
        jobs.append(Job(seed, folder, r, listed, start, first))
        if not second:
            firsts[method, own] = folder
        if method == SOURCE_MODEL and not own and not second:
            model = jobs[-1]
    return jobs


# ---- the work ----------------------------------------------------------------------------------

# What may happen to one run while the others go on.
EXPECTED = (RunError, DataError, NonFiniteLoss, KernelError, MemoryError, torch.OutOfMemoryError)


@dataclass
class Comparison:
    """The jobs, and where their data comes from."""

    jobs: list[Job]
    places: dict[str, Places]  # by scenario
    device: torch.device
    threads: int  # of one run
    pretrained: dict[str, Tensor] | None = None
    workers: int | None = None  # data loading processes of one run; None: as many as fit
    failed: dict[Path, Exception] = field(default_factory=dict)  # by folder

    def split(self, job: Job) -> str:
        """The split of the figures: test; val where the labels of test are not public."""
        target = self.places[job.recipe.scenario].origins["tgt"]
        return "test" if "test" in domains()[target.domain].splits else "val"

    def places_of(self, job: Job) -> Places:
        places = self.places[job.recipe.scenario]
        return places if job.source is None else places.without_source()

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
            workers=self.workers,
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
        for job in self.jobs:
            require_labels(self._test(job, progress))
            system = systems.system_of(job.recipe.method, job.recipe.scenario)
            for stream in system.streams(job.recipe).values():
                places = self.places[job.recipe.scenario]
                origin = places.origins[stream.side]
                origin.index(stream.split, job.recipe, places.cache, progress)
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
        places = self.places[job.recipe.scenario]
        return places.origins["tgt"].index(self.split(job), job.recipe, places.cache, progress)

    def _labels(self, job: Job, progress: Progress) -> Path | None:
        """The pseudo-labels of a second stage, made from its first stage's last checkpoint.

        Raises:
            RunError: those that are there were made by another network.
        """
        if job.first is None:
            return None
        last = job.first / "last.safetensors"
        system, meta = checkpoint.load(last, self.device)
        found = job.pseudo
        assert found is not None
        if found.exists():
            theirs = checkpoint.read_metadata(found).get("weights")
            if theirs != checkpoint.digest(system.state_dict()):
                raise RunError(
                    f"{found}: not made by {last}; remove {job.out}, or use another --out"
                )
            return found
        streams = systems.system_of(job.recipe.method, job.recipe.scenario).streams(job.recipe)
        split = streams[runs.taught_stream(job.recipe)].split
        places = self.places[job.recipe.scenario]
        index = places.origins["tgt"].index(split, job.recipe, places.cache, progress)
        origin = f"last.safetensors, iteration {meta['iteration']}"
        own = job.out / "pseudo.safetensors"
        write_pseudo_labels(own, system, index, origin, self.device, progress)
        return own

    def _train(self, run: Run, job: Job, display: Any) -> None:
        """Train a run to its end; one that was begun, with as many threads as it was begun with."""
        threads, record = self.threads, runs.read_record(run.out)
        try:
            with claimed(run.out):
                if record is None or not run.iteration:
                    source = None if job.source is None else job.source / "best.safetensors"
                    runs.write_record(run, self.places_of(job), threads, source)
                else:
                    threads = record["threads"]
                torch.set_num_threads(threads)
                screen.drive(run, self.name(job), display)
        except BlockingIOError:
            raise RunError(f"{run.out}: another process trains there") from None
        finally:
            torch.set_num_threads(self.threads)

    def name(self, job: Job) -> str:
        """What the progress calls a run."""
        where = f"{job.recipe.scenario} " if len(self.places) > 1 else ""
        return f"{where}{job.title}, seed {job.seed}"

    def finish(self, job: Job, display: Any) -> results.Row:
        """Train what is not trained yet of a job, and its best checkpoint's row on test.

        A row that the run's folder holds is taken, if it is of this checkpoint and this data.
        """
        progress, test = display.tell, self._test(job, display.tell)
        labels = self._labels(job, progress) if job.first is not None else None  # still its own
        if (done := self._row(job, test)) is not None:
            return done
        run, _ = self.open(job, labels, progress)
        if run.iteration < run.recipe.steps or run.owed:
            self._train(run, job, display)
        weights = results.weights_of(job.out)
        system, meta = checkpoint.load(run.best_path, self.device)
        origin = f"best.safetensors, iteration {meta['iteration']}"
        score = evaluate(system, test, origin, self.device, progress)
        row = results.row_of(score, meta, job.title, test, weights)
        results.keep(job.out, row)
        return row

    def _row(self, job: Job, test: Index) -> results.Row | None:
        """The row of a run that is at its end, where its folder holds it."""
        last = job.out / "last.safetensors"
        if not last.exists():
            return None
        meta = checkpoint.read_training(last)
        if meta["iteration"] < job.recipe.steps or meta["validation_owed"]:
            return None
        try:
            row = results.of_run(job.out, self.split(job))
        except RunError:
            return None
        return row if row.get("data") == test.fingerprint["content"] else None

    def attempt(self, job: Job, display: Any) -> results.Row | Exception:
        """The row of a job, or why there is none; what nobody foresaw is raised."""
        try:
            self.require(job)
            return self.finish(job, display)
        except EXPECTED as error:
            return error
        except BrokenPipeError:  # the reader of the output is gone
            raise
        except OSError as error:
            return RunError(f"{error.filename or 'a file'}: {error.strerror or error}")
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch reports it on a CPU
                raise
            return MemoryError(str(error).splitlines()[0])

    def run(self, display: Any) -> list[results.Row]:
        """All jobs, one after another. What fails is kept in `failed`, and the others go on.

        Args:
            display: a `screen.Display`.
        Returns:
            the rows of those that were finished.
        """
        rows = []
        for job in self.jobs:
            found = self.attempt(job, display)
            if isinstance(found, Exception):
                self.failed[job.out] = found
            else:
                rows.append(found)
        return rows

    def require(self, job: Job) -> None:
        """Raises RunError where a run that this one needs has failed."""
        for path in job.needs:
            if path in self.failed:
                raise RunError(f"{path} failed, from which it starts")

    def run_parallel(self, count: int, display: Any) -> list[results.Row]:
        """All jobs, `count` at a time, each in a process of its own. Equal to `run` to the byte.

        SIGINT and SIGTERM stop the processes, each of which saves first.

        Args:
            display: a `screen.Display`.
        Raises:
            Interrupted: all have saved.
        """
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        waiting, rows = list(self.jobs), {}
        running: dict[Connection, tuple[Job, BaseProcess]] = {}
        stopped = False

        def stop(signum: int, frame: Any) -> None:
            nonlocal stopped
            stopped = True
            for _, process in list(running.values()):
                process.terminate()

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            while running or (waiting and not stopped):
                for job in self._ready(waiting, running)[: count - len(running)]:
                    if stopped:
                        break
                    waiting.remove(job)
                    here, there = context.Pipe(duplex=False)
                    work = self, job, len(running), there
                    process: BaseProcess = context.Process(target=_work, args=work)
                    process.start()
                    there.close()
                    running[here] = job, process
                    if stopped:  # while it was started
                        process.terminate()
                if not running:  # the rest needed what has failed
                    continue
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    job, process = running[ready]
                    try:
                        what, *parts = ready.recv()
                    except (EOFError, OSError):  # ended, or killed in the middle of a message
                        process.join()
                        del running[ready]
                        if job.out not in rows and job.out not in self.failed:
                            self.failed[job.out] = RunError(
                                f"its process ended with exit code {process.exitcode}"
                            )
                        continue
                    if what == "row":
                        rows[job.out] = parts[0]
                        display.ended(self.name(job))
                    elif what == "failed":
                        self.failed[job.out] = parts[0]
                    else:
                        getattr(display, what)(*parts)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            for _, process in running.values():
                process.terminate()
        lost = [str(p) for p, e in self.failed.items() if not isinstance(e, Interrupted)]
        if stopped:
            state = f"{', '.join(lost)} ended without it" if lost else "nothing is lost"
            raise Interrupted(f"interrupted, runs were saved ({state}); the same command goes on")
        return [rows[job.out] for job in self.jobs if job.out in rows]

    def _ready(
        self, waiting: list[Job], running: dict[Connection, tuple[Job, BaseProcess]]
    ) -> list[Job]:
        """The jobs whose needs are at their end; those whose needs failed are failed, too."""
        open_ = {job.out for job in waiting} | {job.out for job, _ in running.values()}
        for job in list(waiting):
            try:
                self.require(job)
            except RunError as error:
                self.failed[job.out] = error
                waiting.remove(job)
        return [job for job in waiting if not open_ & set(job.needs)]

    def report(self) -> None:
        """Raises the first failure, of the same kind and with the names of all."""
        if self.failed:
            kind = type(next(iter(self.failed.values())))
            lines = "; ".join(f"{path}: {error}" for path, error in self.failed.items())
            failed = plural(len(self.failed), "run")
            again = "the same command tries them again"
            raise kind(f"{failed} of {len(self.jobs)} failed ({again}): {lines}")


class _Remote:
    """Stands in a process of its own for the display of the parent."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name = connection, name

    def _send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:  # the parent was killed
            signal.raise_signal(signal.SIGTERM)

    def step(self, *arguments: Any) -> None:
        self._send("step", *arguments)

    def validated(self, *arguments: Any) -> None:
        self._send("validated", *arguments)

    def tell(self, done: int, total: int, what: str) -> None:
        self._send("tell", done, total, what, self.name)


def _work(comparison: Comparison, job: Job, place: int, connection: Connection) -> None:
    """What a process of its own does: one job, told to the parent.

    Args:
        place: among those that run at once; they take the GPUs in turn.
    """
    os.setpgrp()  # Ctrl-C reaches the parent, which stops this process once
    if comparison.device.type == "cuda" and comparison.device.index is None:
        comparison.device = torch.device("cuda", place % torch.cuda.device_count())
    machine.use(comparison.device)
    torch.set_num_threads(comparison.threads)
    remote = _Remote(connection, comparison.name(job))
    try:
        found = comparison.attempt(job, remote)
    except Interrupted as error:
        found = error
    with suppress(OSError):  # the parent was killed
        if isinstance(found, Exception):  # without its traceback, which does not travel
            connection.send(("failed", type(found)(*found.args)))
        else:
            connection.send(("row", found))
