"""A dry run finds what a training takes, and what would fail in it, and leaves nothing behind."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from ftdpp import checkpoint, parallel, rehearsal, runs, train
from ftdpp.evaluate import evaluate
from ftdpp.tests.commands import ftd, train_args, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")

VALIDATED = ("--set", "val_every=2", "--set", "milestones=4")


@pytest.fixture
def tried(world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a dry run; everything that it may write lies below `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def call(*more: object) -> Any:
        args = train_args(tmp_path / "run", world, cache, *VALIDATED, "--dry-run", *more, steps=5)
        result = ftd(*args)
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.rglob("*ftd-dry-run*")), "something is left"
        return result

    return call


def test_what_it_says(tried: Any) -> None:
    result = tried()
    assert result.exit_code == 0, result.output
    text = words(result)
    assert "5 iterations, 3 validations" in text and "dry run: nothing was written" in text
    [step] = re.findall(r"iteration +([0-9.]+) s", text)
    [validation] = re.findall(r"validation +([0-9.]+) s +\(from", text)
    [most] = re.findall(r"in all +about ([0-9:]+)", text)
    seconds = 0
    for part in most.split(":"):
        seconds = 60 * seconds + int(part)
    # of numbers that were rounded when they were printed
    assert abs(seconds - 5 * float(step) - 3 * float(validation)) < 1


def test_it_takes_the_first_and_the_last_steps(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some terms begin late."""
    seen, learn = [], train.Run.learn

    def noted(run: Any, parts: Any) -> Any:
        seen.append(run.iteration)
        return learn(run, parts)

    monkeypatch.setattr(train.Run, "learn", noted)
    assert tried().exit_code == 0
    assert seen == [0, 1, 2, 2, 3, 4]


def test_it_takes_the_largest_frames(finished: Path) -> None:
    """Each stream's two largest, in the same batch; a stream with fewer frames repeats them."""
    r, record = checkpoint.load(finished / "last.safetensors")[0].recipe, runs.read_record(finished)
    assert record is not None
    run, _ = runs.assemble(r, 0, finished, runs.recorded_places(record))
    batches = train.Batches(run.streams, r, 0, run.indexes)
    found = batches.largest()
    for name, stream in run.streams.items():
        index = run.indexes[name]
        order = sorted(range(len(index)), key=lambda i: -int(index.rows()[i]))
        assert found[name].tokens == [index.tokens[i] for i in order[: stream.frames]]
        # Some points may lie outside of the voxels that the chance of this iteration leaves.
        assert sum(found[name].counts) >= 0.9 * sorted(index.rows())[-1]
    draw = batches.draws["labelled"]
    draw.stream = train.dataclasses.replace(draw.stream, frames=len(draw.index) + 1)
    assert sorted(set(draw.largest().tokens)) == sorted(draw.index.tokens)

    some = range(1, 2)
    assert run.val is not None
    score = evaluate(run.system, run.val, "some", frames=some)
    whole = evaluate(run.system, run.val, "all")
    assert score.frames == 1 and whole.frames == len(run.val)
    assert 0 < score.points < whole.points and score.outside == 0


def test_a_disk_that_is_too_small(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room(1 << 40, 0, 1 << 10))
    result = tried()
    assert result.exit_code == 1 and "make room" in words(result), result.output


def test_a_loss_that_is_not_finite(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Run, "learn", lambda run, parts: {"seg": torch.tensor(math.nan)})
    result = tried()
    assert result.exit_code == 4 and "seg = nan" in words(result), result.output


def test_a_checkpoint_that_does_not_come_back(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Run, "resume", lambda run: None)
    result = tried()
    assert result.exit_code == 1 and "did not come back" in words(result), result.output


def test_it_is_of_one_process(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert parallel.asked_for() == 2
    result = tried()
    assert result.exit_code == 2 and "without torchrun" in words(result), result.output


def test_the_time_of_all() -> None:
    found = rehearsal.Measured({}, 2.0, 10.0, 3, 0, 0, 0)
    assert found.seconds(100) == 230
