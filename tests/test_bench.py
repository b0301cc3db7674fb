"""The benchmark: which rows it has, what is in them, and the file it adds them to."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftdpp import machine, systems
from ftdpp.bench import peers, speed
from ftdpp.readers import DataError
from ftdpp.tests.commands import ftd, words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTD_KERNELS", raising=False)
    monkeypatch.setattr(speed, "LOADS", 2)
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)  # of the whole process
    monkeypatch.setattr(peers, "installed", lambda *_: [])  # even where there are some


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, batches and sweeps: what the rows are does not depend on them."""
    recipe, sweep = systems.recipe, speed.whole_sweep

    def small(*args: Any, **more: Any) -> Any:
        return dataclasses.replace(recipe(*args, **more), image=(48, 88), batch=2, width_3d=4)

    monkeypatch.setattr(systems, "recipe", small)
    monkeypatch.setattr(speed, "whole_sweep", lambda points: sweep(points[::8]))


@pytest.mark.usefixtures("little")
def test_rows(world: Path, cache: Path, tmp_path: Path) -> None:
    """One row for each thing that is timed, and a file that takes rows of two runs."""
    rows = speed.run(world, cache, 1, CPU, (1, 2))
    names = [row["what"] for row in rows]
    assert len(set(names)) == len(names)
    # Product and copy; two batches and a whole sweep; loading; six steps, the parts of two.
    assert len(rows) == 2 + 5 * 3 + 1 + 6 + 2 * 3
    for row in rows:
        assert row["ms"] > 0
        assert row["a second"] == pytest.approx(1e3 / row["ms"])
        assert row["kernels"] is None, "no kernel is launched on a CPU"
    for name, row in zip(names, rows, strict=True):
        has_floor = name.startswith(("matrix", "copy", "sparse U-Net", "training", "..."))
        assert (row["floor ms"] is not None) == has_floor, name
        if has_floor:
            assert row["times floor"] == pytest.approx(row["ms"] / row["floor ms"])
            assert row["GFLOP/s"] or row["GB/s"]
    held = {
        name.split(", ")[1]: row["MiB"] for name, row in zip(names, rows, strict=True) if row["MiB"]
    }
    assert held.keys() == {"source-only", "xmuda", "ftdpp", "self-training", "crossmatch"}
    assert held["crossmatch"] > 1.8 * held["self-training"] > 0, "two streams instead of one"

    file = tmp_path / "new" / "cpu.csv"
    for _ in range(2):
        speed.check_columns(file)
        speed.append(file, rows, CPU)
    stored = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["what"] for row in stored] == names * 2
    assert list(stored[0]) == speed.COLUMNS
    assert all(row["machine"] == machine.describe(CPU) for row in stored)
    kept = Path(speed.__file__).with_name("cpu.csv")
    speed.check_columns(kept)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("date,loss\n")
    with pytest.raises(DataError, match=r"other\.csv: begins with .*date,loss.*--out"):
        speed.check_columns(other)
    result = ftd("bench", "--device", "cpu", "--out", other)
    assert result.exit_code == 3, result.output
    assert "other.csv: begins with" in words(result)
    assert other.read_text() == "date,loss\n"
    empty = tmp_path / "empty.csv"
    empty.touch()
    speed.check_columns(empty)


def test_memory_of_a_step() -> None:
    """Weights, gradients, two moments, and what the backward pass needs, counted by hand."""

    class Linear(systems.System):
        def __init__(self) -> None:
            super().__init__(None)
            self.layer = torch.nn.Linear(5, 3, bias=False)

        def optimizers(self) -> dict[str, torch.optim.Optimizer]:
            return {"all": torch.optim.Adam(self.parameters())}

        def forward(self, phase: str, batches: Any, chance: Any) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(batches["x"]).square().sum()}

    system = Linear()
    run = SimpleNamespace(system=system, optimizers=system.optimizers())
    weights, x, y = 15, 7 * 5, 7 * 3
    found = speed.memory(run, {"x": torch.rand(7, 5)})  # type: ignore[dict-item]
    assert found == 4 * (4 * weights + x + y)


def test_flop_and_bytes_of_the_network() -> None:
    """Two neighbouring voxels, one level: two convolutions and their pairs counted by hand."""
    net = speed.UNet3D(width=4, levels=1)
    pyramid = speed.Pyramid(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]]), 1)
    flop, moved = speed.unet_cost(net, pyramid)
    pairs = 4  # each voxel with itself and with the other
    assert flop == 2 * pairs * (1 * 4 + 4 * 4)
    stem, encode = 2 * 1 + 2 * 4 + 27 * 1 * 4, 2 * 4 + 2 * 4 + 27 * 4 * 4
    assert moved == 4 * (stem + encode)


def test_deviation_in_words() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert peers.deviation(wanted * 1.001, wanted) == "output differs by 1e-03"
