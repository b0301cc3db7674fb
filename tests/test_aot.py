"""Every kernel compiled for GPUs that are not here, compared with the kept table.

Nothing spills, and rows are fetched ahead.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).resolve().parents[1] / "bench" / "kernels.csv"
KEPT = list(csv.DictReader(TABLE.read_text().splitlines()))
triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")


# Compiles for the named targets; with "largest" only the last, so the largest, tile of each kernel
# and type.
COMPILE = """
import re, sys
from ftdpp.bench import aot
file, which, *targets = sys.argv[1:]
chosen = list(aot.configurations())
if which == "largest":
    chosen = {re.sub(r" [0-9][0-9 a-z]*", "", c.name): c for c in chosen}.values()
aot.configurations = lambda: iter(chosen)
aot.TARGETS = {name: aot.TARGETS[name] for name in targets}
sys.argv[1:] = ["--write", file]
sys.exit(aot.main())
"""


def compiled(folder: Path, which: str, *targets: str) -> list[dict[str, str]]:
    """The rows that `python -m ftdpp.bench.aot` finds: a process without Triton's interpreter."""
    found = folder / "kernels.csv"
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", COMPILE, str(found), which, *targets]
    environment = {**plain, "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return list(csv.DictReader(found.read_text().splitlines()))


def assert_as_kept(rows: list[dict[str, str]]) -> None:
    kept = {(row["kernel"], row["target"]): row for row in KEPT}
    for row in rows:
        wanted = kept[row["kernel"], row["target"]]
        if triton.__version__ == wanted["triton"]:  # another compiler may use other registers
            assert row == wanted


def test_kernels_compile_without_spills_and_as_kept(tmp_path: Path) -> None:
    """To accept a change: `python -m ftdpp.bench.aot --write bench/kernels.csv`."""
    rows = compiled(tmp_path, "all", "sm_90")
    assert [row["kernel"] for row in rows] == [
        row["kernel"] for row in KEPT if row["target"] == "sm_90"
    ]
    assert_as_kept(rows)


def test_the_largest_tiles_compile_as_kept_for_every_target(tmp_path: Path) -> None:
    """A change of a kernel shows in its rows for sm_90, too; registers run out at the largest tile
    first."""
    rows = compiled(tmp_path, "largest", "sm_80", "gfx942")
    assert {row["target"] for row in rows} == {"sm_80", "gfx942"}
    assert len(rows) == 2 * 43
    assert_as_kept(rows)


def test_the_kept_table_is_whole_and_without_complaint() -> None:
    from ftdpp.bench.aot import complaint

    by_target = {
        target: [row["kernel"] for row in KEPT if row["target"] == target]
        for target in ("sm_80", "sm_90", "gfx942")
    }
    assert by_target["sm_80"] == by_target["sm_90"] == by_target["gfx942"]
    assert len(KEPT) == 3 * len(set(by_target["sm_90"]))
    numbers = ("registers", "spilled", "shared", "async copies")
    for row in KEPT:
        assert not complaint({**row, **{name: int(row[name]) for name in numbers}})


def test_a_spill_and_a_missing_copy_are_refused() -> None:
    from ftdpp.bench.aot import complaint

    row = {
        "kernel": "forward tf32 64x32x64",
        "target": "sm_90",
        "registers": 90,
        "spilled": 0,
        "shared": 1,
        "async copies": 4,
    }
    assert not complaint(row)
    assert "spills 8 bytes" in complaint({**row, "spilled": 8})
    assert "no asynchronous copies" in complaint({**row, "async copies": 0})
    assert not complaint({**row, "async copies": 0, "target": "gfx942"})
