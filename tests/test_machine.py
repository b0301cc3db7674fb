"""How many threads to take on machines of any kind, and memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from ftdpp import machine


def control_groups(root: Path, lines: str, limits: dict[str, str]) -> Path:
    """A root with a proc/self/cgroup and files of limits."""
    for name, text in {"proc/self/cgroup": lines, **limits}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cores", "allowed", "busy", "threads", "words"),
    [
        (2, 2, 0.0, 2, "2 cores"),
        (2, 2, 0.2, 2, "2 cores"),  # what an idle machine shows
        (2, 2, 1.6, 1, "2 cores, 1.6 of them busy: another job is running"),
        (2, 2, 0.9, 1, "2 cores, 0.9 of them busy: another job is running"),
        (2, 2, 7.0, 1, "2 cores, 7.0 of them busy: another job is running"),
        (1, 1, 0.0, 1, "1 core"),
        (16, 16, 3.5, 12, "16 cores, 3.5 of them busy: another job is running"),
        (64, 8, 0.0, 8, "64 cores, 8 allowed to this process"),
        (
            64,
            8,
            60.0,
            4,
            "64 cores, 8 allowed to this process, 60.0 of them busy: another job is running",
        ),
    ],
)
def test_free_threads(
    cores: int, allowed: int, busy: float, threads: int, words: str, tmp_path: Path
) -> None:
    assert machine.free_threads(cores, allowed, busy, tmp_path, {}) == (threads, words)


def test_busy_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at the kernel's counters; without them nothing is known."""
    stat = tmp_path / "stat"
    assert machine.busy_cores(0, stat) == 0
    stat.write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1\n")
    later = "cpu  170 0 60 810 60 0 0 0 0 0\n"  # 80 ticks of work, 20 of idleness and waiting
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: stat.write_text(later))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    assert machine.busy_cores(0, stat) == pytest.approx(4 * 0.8)


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2.0),  # of the group above
        (
            "0::/a/b",
            {
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3.0,
        ),
        ("0::/../../host/path", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x",
            {
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            "1:cpu:/",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ("1:cpuset:/", {"sys/fs/cgroup/cpu.max": "100000 100000"}, None),  # not of the CPU time
    ],
)
def test_control_groups(
    lines: str, limits: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    assert machine.cgroup_cores(control_groups(tmp_path, lines, limits)) == expected


def test_a_limit_bounds_the_threads(tmp_path: Path) -> None:
    root = control_groups(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "350000 100000"})
    found = machine.free_threads(8, 8, 0.0, root, {})
    assert found == (3, "8 cores, limited to 3.5 by the control group")
    assert machine.free_threads(8, 8, 6.0, root, {})[0] == 2
    assert machine.free_threads(2, 2, 0.0, root, {}) == (2, "2 cores"), "a limit above the cores"
    root = control_groups(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "20000 100000"})
    assert machine.free_threads(8, 8, 0.0, root, {})[0] == 1


def test_the_user_decides(tmp_path: Path) -> None:
    found = machine.free_threads(2, 2, 9.0, tmp_path, {"OMP_NUM_THREADS": "7"})
    assert found == (7, "OMP_NUM_THREADS")
    for value in ("", "0", "4,2"):
        assert machine.free_threads(2, 2, 9.0, tmp_path, {"OMP_NUM_THREADS": value})[0] == 1


def test_this_machine() -> None:
    count, words = machine.free_threads(environment={})
    assert count >= 1
    assert "core" in words


def test_describe(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    count = torch.get_num_threads()
    ending = f", {count} thread{'s' * (count > 1)}, torch {torch.__version__}"
    cores = "processor: 0\nmodel name\t: A Kind @ 2 GHz\n\nmodel name\t: Other"
    root = control_groups(tmp_path, "", {"proc/cpuinfo": cores})
    assert machine.describe(cpu, root) == "A Kind @ 2 GHz" + ending
    assert machine.describe(cpu, tmp_path / "none").endswith(ending)


def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    options = []

    class Libc:
        def mallopt(self, option: int, value: int) -> int:
            options.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
    machine.keep_freed_memory()
    assert options == [(-3, 1 << 30), (-1, 1 << 30)]

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    machine.keep_freed_memory()


def test_peak_memory_is_in_bytes() -> None:
    """PyTorch alone takes more than 50 MB."""
    assert 50e6 < machine.peak_memory(torch.device("cpu")) < 1e12
