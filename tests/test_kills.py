"""A few kills of every run of the tests; a hundred by a command: see `kills.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ftdpp.tests import kills

FEW = ("train", "workers", "pseudo", "prepare", "synth")  # the quickest; the command has them all


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has computed nothing when it forks."""
    return subprocess.run(
        [sys.executable, "-P", *command], capture_output=True, text=True, timeout=300
    )


def test_what_a_killed_command_leaves_is_gone_on_with_to_the_same_bytes() -> None:
    only = [word for name in FEW for word in ("--only", name)]
    found = ran("-m", "ftdpp.tests.kills", "--kills", str(2 * len(FEW)), *only)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2 * len(FEW) + 1
    assert sum("not reached" in line for line in lines) < len(FEW)
    assert lines[-1].startswith(f"{2 * len(FEW)} kills, 0 with a difference")


BROKEN = """
import sys
from contextlib import contextmanager
from ftdpp import checkpoint
from ftdpp.tests import kills

@contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path.with_name("x")
    path.with_name("x").rename(path)

checkpoint.replacing = in_place
sys.exit(kills.main(["--kills", "12", "--only", "saves"]))
"""


def test_a_writer_that_leaves_files_is_found() -> None:
    """The test of the test."""
    found = ran("-c", textwrap.dedent(BROKEN))
    assert found.returncode == 1, found.stdout + found.stderr
    assert "run/x is left over" in found.stdout


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_write_is_torn(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was brought to disk before stays."""
    shares = []
    monkeypatch.setattr(kills, "pass_point", lambda what, torn=None: torn and shares.append(torn))
    fsync = kills.torn_at(os.fsync)
    with (tmp_path / "a").open("wb") as file:
        for content in (b"first", b"second"):
            file.write(content)
            file.flush()
            fsync(file.fileno())
        shares[1](share)
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
