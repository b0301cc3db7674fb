"""Every built-in pair trains from `ftd train --src A --tgt B` alone."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from ftdpp.tests.commands import ftd, words
from ftdpp.world import layouts

STEPS = 20


@pytest.mark.parametrize("pair", layouts.PAIRS, ids="-".join)
def test_each_built_in_pair_trains(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny world, read through the readers of the real data sets; then scored on val."""
    counts = dict.fromkeys(layouts.DEFAULT_FRAMES[pair], 2)
    monkeypatch.setitem(layouts.DEFAULT_FRAMES, pair, counts)
    out = tmp_path / "run"
    options = ("--steps", STEPS, "--threads", 1, "--out", out, "--cache", tmp_path / "cache")
    result = ftd("train", "--src", pair[0], "--tgt", pair[1], *options)
    assert result.exit_code == 0, result.output
    assert "BUILT-IN STREET WORLD" in words(result)
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["iteration"]) == STEPS
    assert all(math.isfinite(float(value)) for value in rows[-1].values() if value)
    assert all(float(row["seg_2d"]) > 0 for row in rows), "the source's labels are met"
    with (out / "val.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert float(scores[-1]["mIoU 2d"]) > 0, "some class is met"
