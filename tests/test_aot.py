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

KEPT = Path(__file__).resolve().parents[1] / "bench" / "kernels.csv"
triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def test_kernels_compile_without_spills_and_as_kept(tmp_path: Path) -> None:
    """To accept a change: `python -m ftdpp.bench.aot --write bench/kernels.csv`."""
    found = tmp_path / "kernels.csv"
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "ftdpp.bench.aot", "--write", str(found)]
    environment = {**plain, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    kept, rows = (list(csv.DictReader(path.read_text().splitlines())) for path in (KEPT, found))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    names, kept_names = ([(row["kernel"], row["target"]) for row in t] for t in (rows, kept))
    assert names == kept_names
    if triton.__version__ == kept[0]["triton"]:  # another compiler may use other registers
        assert rows == kept


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
