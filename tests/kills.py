"""Kills commands at chosen moments and looks at what is left: python -P -m ftdpp.tests.kills

A job is one command of `ftd` in a folder of its own. Along its way lie points: just before and just
after a file is renamed, removed, brought to disk or appended to, a lock is taken, a frame is read,
an iteration is done; of a file also the moment when a part of it is written. An undisturbed run
counts them, in all its processes. Then one of the job's processes, or all of them, are killed at a
point that the seed draws, the job is gone on with as a user would, and the folder has to be what
the undisturbed run left: the same files, each of the same bytes.

Every command runs in a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ftdpp import compare, files, ftd, index, processes, readers, runs, train
from ftdpp.systems import bftd, clip2uda, crossmatch, family, ftdpp, image, weak
from ftdpp.tests.commands import TINY
from ftdpp.tests.conftest import FRAMES
from ftdpp.world import layouts

SECONDS = 300  # that a command may take
LATE = 30  # seconds in which the processes of a killed one have to end
STEP = ("--set", "save_every=2", "--set", "val_every=3", "--set", "milestones=4")
WHO = ("itself", "the command", "all")  # is killed: the process at the point, its first one, all

assert all((bftd, clip2uda, crossmatch, family, ftdpp, image, weak))  # imported once, for all forks


# ---- in a process that may be killed -------------------------------------------------------------


class Kill(NamedTuple):
    """What happens to a command, known to all its processes."""

    log: str  # the points that were passed, a line of WIDTH bytes each
    at: int = -1  # the number of the point; -1: never
    who: str = "itself"
    share: float = 0.5  # of what is being written there, how much is


WIDTH = 80
VARIABLE = "FTD_KILL"
_counting = threading.Lock()


def pass_point(what: str, torn: Callable[[float], None] | None = None) -> None:
    """Counts a point; at the chosen one somebody dies.

    Args:
        torn: leaves the given share of what was written in the moment before.
    """
    kill = Kill(*json.loads(os.environ[VARIABLE]))
    main = os.getsid(0)
    role = "" if os.getpid() == main else "child: "
    with _counting, open(kill.log, "ab") as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        number = log.seek(0, os.SEEK_END) // WIDTH
        log.write((role + what)[: WIDTH - 1].ljust(WIDTH - 1).encode()[: WIDTH - 1] + b"\n")
    if number != kill.at:
        return
    if torn is not None:
        torn(kill.share)
    if kill.who == "the command":
        os.kill(main, signal.SIGKILL)
    if kill.who == "all":
        for other in alive(main):
            if other != os.getpid():
                os.kill(other, signal.SIGKILL)
    if kill.who != "the command":
        os.kill(os.getpid(), signal.SIGKILL)


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # has ended meanwhile
                continue
            if int(own) == session and state != "Z":
                found.append(int(folder.name))
    return found


def _named(what: str, arguments: Sequence[Any]) -> str:
    path = next((a for a in reversed(arguments) if isinstance(a, str | Path)), None)
    return what if path is None else f"{what} {Path(path).name}"


def counted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A function with a point before it and one after it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        name = _named(what, args)
        pass_point(f"before {name}")
        found = function(*args, **kwargs)
        pass_point(f"after {name}")
        return found

    return call


def torn_at(function: Callable[[int], None]) -> Callable[[int], None]:
    """`os.fsync` with a point at which the file holds a part of what was written since the last."""
    synced: dict[tuple[int, int], int] = {}

    @functools.wraps(function)
    def call(number: int) -> None:
        now = os.fstat(number)
        before = min(synced.get((now.st_dev, now.st_ino), 0), now.st_size)
        end = now.st_size - before

        def torn(share: float) -> None:
            os.ftruncate(number, before + int(share * end))

        pass_point("in the middle of a write before fsync", torn)
        function(number)
        synced[now.st_dev, now.st_ino] = now.st_size
        pass_point("after fsync")

    return call


def torn_append(function: Callable[[files.Log], None]) -> Callable[[files.Log], None]:
    """`Log.flush` with a point at which a part of the rows is there."""

    @functools.wraps(function)
    def call(log: files.Log) -> None:
        before = log.path.stat().st_size if log.path.exists() else 0
        function(log)
        after = log.path.stat().st_size if log.path.exists() else 0
        if before < after:

            def torn(share: float) -> None:
                os.truncate(log.path, before + int(share * (after - before)))

            if before:  # a new one is renamed as a whole
                pass_point(f"in the middle of rows of {log.path.name}", torn)
            pass_point(f"after rows of {log.path.name}")

    return call


COUNTED: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("replace", "unlink", "mkdir", "rmdir")),
    *((fcntl, "flock"), (Path, "write_bytes"), (Path, "write_text")),
    *((train.Run, "learn"), (train, "evaluate"), (train.Batches, "__getitem__")),
    *((compare, "evaluate"), (runs, "write_record"), (index, "read_frame"), (layouts, "_write")),
)


def begin() -> None:
    """Puts the points into this process, and into those that it will start."""
    replaced = [
        *((owner, name, counted(getattr(owner, name), name.strip("_"))) for owner, name in COUNTED),
        (os, "fsync", torn_at(os.fsync)),
        (files.Log, "flush", torn_append(files.Log.flush)),
        (compare, "_work", _work_counted),
        (processes, "_begin", _worker_counted),
    ]
    for owner, name, function in replaced:
        setattr(owner, name, function)


_work, _begin = compare._work, processes._begin  # in a spawned process


def _work_counted(*args: Any) -> None:
    begin()
    pass_point("begins")
    _work(*args)


def _worker_counted() -> None:
    _begin()
    begin()
    pass_point("begins")


# ---- commands in forks ---------------------------------------------------------------------------


def _ftd(*args: str) -> None:
    sys.argv = ["ftd", *args]
    ftd.main()


def _in_a_fork(folder: Path, output: Path, kill: Kill | None, work: Callable[[], None]) -> None:
    """A piece of work in a session of its own, its words in a file."""
    os.setsid()
    os.chdir(folder)
    tempfile.tempdir = str(output.parent)
    with output.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    if kill is not None:
        os.environ[VARIABLE] = json.dumps(kill)
        begin()
    work()


def in_a_fork(
    folder: Path, output: Path, work: Callable[[], None], kill: Kill | None = None
) -> tuple[int, list[str]]:
    """Works in a folder until the last process has ended.

    Args:
        output: file of what is printed.
    Returns:
        the exit code, and what is wrong with how it ended.
    """
    output.unlink(missing_ok=True)
    arguments = folder, output, kill, work
    process = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=arguments)
    process.start()
    assert process.pid is not None
    process.join(SECONDS)
    hangs = process.exitcode is None
    end = time.monotonic() + (0 if hangs else LATE)
    while (left := alive(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    for number in left:
        os.kill(number, signal.SIGKILL)
    process.join()
    assert process.exitcode is not None
    text = output.read_text(errors="replace")
    wrong = []
    if hangs:
        wrong.append(f"not back after {SECONDS} seconds")
    elif left:
        wrong.append(f"{len(left)} of its processes were still there after {LATE} seconds")
    if "Traceback" in text or "an error that is ours" in text:
        wrong.append(f"nobody foresaw it: {last_line(text)}")
    return process.exitcode, wrong


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "(no output)"


# ---- jobs ----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A command of `ftd`, and how a user goes on after a kill: with the same command, but ..."""

    args: tuple[str, ...]
    run: str = ""  # ... this run with --resume, once it has a checkpoint
    made: str = ""  # ... not at all, once this is there
    prepared: bool = True  # its cache holds the prepared data

    def next(self, folder: Path) -> tuple[str, ...] | None:
        """The command to go on with; None: there is nothing to do."""
        if self.made and (folder / self.made).exists():
            return None
        if self.run and (folder / self.run / "last.safetensors").exists():
            workers = self.args[self.args.index("--workers") :][:2]
            return "train", "--resume", self.run, "--device", "cpu", *workers
        return self.args


def _jobs(base: Path) -> dict[str, Job]:
    """Every job by its name; `base` holds what they read."""
    cpu = ("--device", "cpu", "--threads", "1", "--cache", "cache")
    where = ("--preset", "small", *cpu, "--workers", "0", "--out", "run")
    pair = ("--src", "usa", "--tgt", "singapore", "--data", str(base / "world"))
    chosen = ",".join((base / "tokens").read_text().split()) if (base / "tokens").exists() else ""

    def trained(method: str, *more: str, steps: int = 4, tiny: Sequence[str] = TINY) -> Job:
        fixed = ("train", *pair, "--method", method, "--steps", str(steps), *where, *tiny)
        return Job((*fixed, *more), run="run")

    dense = ("--src", "gta5", "--tgt", "cityscapes", "--src-data", str(base / "dense" / "gta5"))
    roots = ("--tgt-data", str(base / "dense" / "cityscapes"), "--steps", "3")
    small = ("--set", "image=48,96", "--set", "crop=48,48", "--set", "batch=2")
    adapt = ("--from", str(base / "source"), "--tgt", "singapore", "--data", str(base / "world"))
    pairs = ("compare", *pair, "--preset", "small", *cpu, "--steps", "2", *TINY, "--out", "runs")
    synth = ("data", "synth", "world", "--frames", "2,2,1,1", "--workers")
    return {
        "train": trained("ftdpp", *STEP, steps=5),
        "workers": trained("xmuda", *STEP, "--workers", "2", steps=5),
        "saves": trained("xmuda", "--set", "save_every=1", "--set", "val_every=1"),
        "unvalidated": trained("xmuda", "--tgt-frames", chosen, steps=2),
        "second-stage": trained("xmuda", *STEP, "--pseudo", str(base / "labels.safetensors")),
        "pseudo": Job(("pseudo", str(base / "first"), "--out", "labels.safetensors", *cpu)),
        "prepare": Job(
            (
                *("data", "prepare", str(base / "world"), "--domain", "singapore"),
                *("--size", "48,88", "--cache", "cache"),
            ),
            prepared=False,
        ),
        "synth": Job((*synth, "1"), made="world", prepared=False),
        "synth-workers": Job((*synth, "2"), made="world", prepared=False),
        "from-nothing": Job(
            (
                *("train", "--src", "usa", "--tgt", "singapore", "--method", "source-only"),
                *("--steps", "2", *where, *TINY),
            ),
            run="run",
            prepared=False,
        ),
        "compare": Job((*pairs, "--methods", "source-only+pl")),
        "compare-2": Job((*pairs, "--methods", "source-only,xmuda", "--jobs", "2")),
        "bftd": trained("bftd", *STEP),
        "crossmatch": Job(
            ("train", *adapt, *where, "--steps", "3", "--set", "batch=2", "--set", "val_every=2"),
            run="run",
        ),
        "clip2uda": trained("clip2uda", *STEP, "--clip", str(base / "clip"), tiny=TINY[:4]),
        "weak": Job(
            (
                *("train", "--src", "singapore", "--tgt", "singapore", "--method", "weak"),
                *("--data", str(base / "world"), "--steps", "3", *where, *TINY),
                *("--set", "labelled=0.02", "--set", "val_every=2", "--clip", str(base / "clip")),
            ),
            run="run",
        ),
        "ssda": trained("minent", *STEP, "--ssda"),
        "images": Job(("train", *dense, *roots, *where, *small, "--set", "val_every=2"), run="run"),
    }


NAMES = tuple(_jobs(Path("/")))


def _write_worlds(base: Path) -> None:
    layouts.write_world(base / "world", "usa", "singapore", FRAMES, seed=0, workers=1)
    frames = {"source": 2, "target": 2, "val": 1}
    layouts.write_world(base / "dense", "gta5", "cityscapes", frames, seed=0, workers=1)
    refs = readers.list_frames(base / "world", readers.domains()["singapore"], "train")
    (base / "tokens").write_text("\n".join(ref.token for ref in refs[:4]))


def _write_clip(base: Path) -> None:
    from ftdpp.tests.random_clip import write_clip

    write_clip(base / "clip")


def prepare(base: Path, wanted: Sequence[str]) -> dict[str, Job]:
    """Makes in `base` what the wanted jobs read, and returns the jobs."""
    base.mkdir()
    output = base / "output.txt"

    def made(work: Callable[..., None], *args: Any) -> None:
        code, wrong = in_a_fork(base, output, functools.partial(work, *args))
        if code or wrong:
            raise AssertionError(f"{args}: exit code {code}, {wrong}\n{output.read_text()}")

    made(_write_worlds, base)
    world, where = str(base / "world"), ("--cache", "cache", "--device", "cpu", "--threads", "1")
    pair = ("train", "--src", "usa", "--tgt", "singapore", "--data", world, "--preset", "small")
    steps = ("--steps", "2", *where, *TINY, "--method")
    made(_ftd, *pair, *steps, "xmuda", "--out", "first")
    if "crossmatch" in wanted:
        made(_ftd, *pair, *steps, "source-only", "--out", "source")
    if "second-stage" in wanted:
        made(_ftd, "pseudo", "first", "--out", "labels.safetensors", *where)
    if {"clip2uda", "weak"} & set(wanted):
        import transformers  # once, for all forks

        assert transformers.CLIPModel and transformers.CLIPTokenizer
        made(_write_clip, base)
    return {name: job for name, job in _jobs(base).items() if name in wanted}


# ---- one kill ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """The digest of each file in a folder, by path; without locks, seconds, and times of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name + "/"] = ""
        elif path.name == "val.csv":
            rows = list(csv.DictReader(io.StringIO(path.read_text())))
            found[name] = json.dumps([{**row, "seconds": ""} for row in rows])
        elif path.name == "meta.json":  # of an index, whose world may have been written anew
            meta = json.loads(path.read_text())
            meta["identity"].pop("sources")
            found[name] = json.dumps(meta)
        elif not path.name.endswith(".lock"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(wanted: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is left over"
        elif wanted[name] != found[name]:
            yield f"{name} has other bytes"


class Whole(NamedTuple):
    """An undisturbed run of a job."""

    files: dict[str, str]
    points: list[str]


def fresh(base: Path, job: Job, folder: Path) -> None:
    """The folder of a job before it begins: always the same one, since its name is recorded."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if job.prepared and (base / "cache").exists():
        shutil.copytree(base / "cache", folder / "cache")


def undisturbed(base: Path, job: Job) -> Whole:
    """A job from its beginning to its end."""
    folder, output, log = base / "job", base / "output.txt", base / "points.txt"
    fresh(base, job, folder)
    log.write_bytes(b"")
    code, wrong = in_a_fork(folder, output, functools.partial(_ftd, *job.args), Kill(str(log)))
    if code or wrong:
        raise AssertionError(f"{job.args}: exit code {code}, {wrong}\n{output.read_text()}")
    return Whole(contents(folder), passed(log))


def passed(log: Path) -> list[str]:
    """The points that a log holds."""
    return [line.strip() for line in log.read_text().splitlines()]


def killed(
    base: Path, job: Job, whole: Whole, at: int, who: str, share: float
) -> tuple[str, list[str]]:
    """A job that is killed at a point and gone on with.

    Returns:
        where it was killed; and what is not as it should be.
    """
    folder, output, log = base / "job", base / "output.txt", base / "points.txt"
    fresh(base, job, folder)
    log.write_bytes(b"")
    kill = Kill(str(log), at, who, share)
    code, found = in_a_fork(folder, output, functools.partial(_ftd, *job.args), kill)
    points = passed(log)
    where = points[at] if at < len(points) else "not reached"
    if code not in (0, -signal.SIGKILL) and not where.startswith("child"):
        found.append(f"exit code {code}: {last_line(output.read_text())}")
    args = None if code == 0 else job.next(folder)
    if args is not None:
        code, wrong = in_a_fork(folder, output, functools.partial(_ftd, *args))
        found += wrong
        if code:
            found.append(f"then exit code {code}: {last_line(output.read_text())}")
    return where, [*found, *differences(whole.files, contents(folder))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -P -m ftdpp.tests.kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=NAMES, help="a job; repeatable")
    chosen = parser.parse_args(arguments)
    wanted = chosen.only or NAMES
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    index.CHUNK = 2  # frames: a tiny data set has several
    layouts.DEFAULT_FRAMES["usa", "singapore"] = dict.fromkeys(FRAMES, 2)
    bad, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftd-kills-") as place:
        base = Path(place) / "base"
        jobs = prepare(base, wanted)
        whole: dict[str, Whole] = {}
        for number in range(chosen.kills):
            name = list(jobs)[number % len(jobs)]
            if name not in whole:
                whole[name] = undisturbed(base, jobs[name])
            chance = np.random.default_rng([chosen.seed, number])
            at, who = int(chance.integers(len(whole[name].points))), str(chance.choice(WHO))
            where, wrong = killed(base, jobs[name], whole[name], at, who, chance.random())
            bad += bool(wrong)
            place_of_it = f"{at + 1} of {len(whole[name].points)}"
            said = "; ".join(wrong) or "as undisturbed"
            print(f"{number + 1:3} {name}: {where} ({place_of_it}), {who} killed: {said}")
            sys.stdout.flush()
    minutes = (time.monotonic() - begun) / 60
    print(f"{chosen.kills} kills, {bad} with a difference, {minutes:.1f} minutes")
    return int(bad > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError:
        traceback.print_exc()
        sys.exit(2)
