"""A few kills of every run of the tests; a hundred by a command: see `kills.py`."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftdpp.tests import kills

FEW = ("workers", "pseudo", "prepare", "synth")  # the quickest; the command has them all


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has computed nothing when it forks."""
    return subprocess.run(
        [sys.executable, "-P", *command], capture_output=True, text=True, timeout=900
    )


def test_what_a_killed_command_leaves_is_gone_on_with_to_the_same_bytes() -> None:
    only = [word for name in FEW for word in ("--only", name)]
    found = ran("-m", "ftdpp.tests.kills", "--kills", str(len(FEW)), *only)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == len(FEW) + 1 and "not reached" not in found.stdout
    assert lines[-1].startswith(f"{len(FEW)} kills, 0 with a difference")


BROKEN = """
import os, sys
from contextlib import contextmanager
from pathlib import Path
from ftdpp import files
from ftdpp.tests import kills

@contextmanager
def leaving(path):
    temporary = path.with_name(f"x{os.getpid()}")
    yield temporary
    temporary.rename(path)

base = Path(sys.argv[1])
job = kills.prepare(base, ["pseudo"])["pseudo"]
files.replacing = leaving
whole = kills.undisturbed(base, job)
for when in ("before", "after"):
    [at] = (i for i, point in enumerate(whole.points) if point.startswith(f"{when} write_bytes x"))
    print(kills.killed(base, job, whole, at, "itself", 0.5))
"""


def test_what_is_left_over_is_found(tmp_path: Path) -> None:
    """The test of the test."""
    found = ran("-c", BROKEN, str(tmp_path / "base"))
    assert found.returncode == 0, found.stdout + found.stderr
    before, after = map(ast.literal_eval, found.stdout.splitlines())
    assert before[0].startswith("before write_bytes x") and before[1] == []
    assert after[0].startswith("after write_bytes x")
    [wrong] = after[1]
    assert wrong.startswith("x") and wrong.endswith("is left over")


def test_every_difference_is_found() -> None:
    whole, found = {"a": "1", "b": "2", "c": "3"}, {"b": "2", "c": "4", "d": "5"}
    told = ["a is missing", "c has other bytes", "d is left over"]
    assert list(kills.differences(whole, found)) == told


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_write_is_torn(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was brought to disk before stays."""
    torn = []

    def noted(what: str, tear: Callable[[float], None] | None = None) -> None:
        if tear is not None:
            torn.append(tear)

    monkeypatch.setattr(kills, "pass_point", noted)
    fsync = kills.torn_at(os.fsync)
    with (tmp_path / "a").open("wb") as file:
        for content in (b"first", b"second"):
            file.write(content)
            file.flush()
            fsync(file.fileno())
        torn[1](share)
    assert (tmp_path / "a").read_bytes() == b"first" + b"second"[: int(6 * share)]


def test_the_processes_of_a_session() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, start_new_session=True) as one:
        try:
            while len(kills.alive(one.pid)) < 2:
                assert one.poll() is None
        finally:
            os.killpg(one.pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while kills.alive(one.pid):
        assert time.monotonic() < end
