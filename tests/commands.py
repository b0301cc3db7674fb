"""The commands as the tests call them, on a tiny built-in world."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ftdpp import train
from ftdpp.ftd import app

TINY = ["--set", "image=48,88", "--set", "batch=2", "--set", "width_2d=16", "--set", "width_3d=4"]
FILES = ("last.safetensors", "best.safetensors", "log.csv")


def ftd(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def words(result: Result) -> str:
    """The output with its line breaks taken out."""
    return " ".join(result.output.split())


def train_args(
    out: Path, world: Path, cache: Path, *more: object, method: str = "ftdpp", steps: int = 4
) -> list[str]:
    """`ftd train` of a tiny run on one thread, so that bytes can be compared."""
    args = [
        *("train", "--src", "usa", "--tgt", "singapore", "--method", method, "--preset", "small"),
        *("--steps", steps, "--seed", 0, "--out", out, "--data", world, "--cache", cache),
        *("--threads", 1, *TINY, *more),
    ]
    return [str(a) for a in args]


def same_bytes(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


@contextmanager
def stopped_in(iteration: int) -> Iterator[None]:
    """Within it, a training is asked to stop in an iteration, as by Ctrl-C."""
    learn, done = train.Run.learn, []

    def stopping(run: Any, batches: Any) -> Any:
        done.append(run)
        run.stop = len(done) == iteration
        return learn(run, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "learn", stopping)
        yield


def exported(run: Path, out: Path, *where: object) -> dict[str, Any]:
    """Exports a run's best checkpoint and returns its score, which has to be the run's."""
    result = ftd("export", run, "--out", out)
    assert result.exit_code == 0, result.output
    scores = []
    for path in (run, out):
        result = ftd("eval", path, *where, "--json")
        assert result.exit_code == 0, result.output
        scores.append(json.loads(result.stdout[result.stdout.index("{") :]))
        for name in ("checkpoint", "weights"):  # of the file
            scores[-1].pop(name)
    assert scores[0] == scores[1]
    return scores[0]
