"""Comparing many runs: the plan, the table, what is found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftdpp import compare, runs
from ftdpp.recipe import RecipeError
from ftdpp.tests.commands import TINY, ftd, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")


def test_plan() -> None:
    jobs = compare.plan(
        *("usa-singapore", "source-only,ftdpp+pl,ftdpp", "0,1", "small"),
        *(["batch=2", "ema=0.9", "pseudo_detach=false"], Path("runs")),
    )
    methods = ["source-only", "ftdpp", "ftdpp+pl"]
    assert [(j.method, j.seed) for j in jobs] == [(m, s) for s in (0, 1) for m in methods]
    given = [("batch=2",), ("batch=2", "ema=0.9"), ("batch=2", "pseudo_detach=false", "ema=0.9")]
    assert [j.given for j in jobs] == given * 2, "a setting goes to those who read it"
    assert [j.recipe.pseudo for j in jobs] == [0, 0, 1] * 2
    assert jobs[1].out == Path("runs/usa-singapore-ftdpp[batch=2,ema=0.9]-seed0")
    assert jobs[2].out.name == "usa-singapore-ftdpp[batch=2,pseudo_detach=false,ema=0.9]+pl-seed0"
    assert jobs[2].title == "ftdpp, batch=2, pseudo_detach=false, ema=0.9, second stage"
    variants = "ftdpp[fusion=false,dropout=0.1,0.2],ftdpp[distill_single=0,distill_fused=0]+pl"
    chosen = ["batch=2", "ema=0.9"]
    jobs = compare.plan("usa-singapore", variants, "0", "small", chosen, Path("runs"))
    assert [j.out.name for j in jobs] == [
        "usa-singapore-ftdpp[batch=2,fusion=false,dropout=0.1,0.2,ema=0.9]-seed0",
        "usa-singapore-ftdpp[batch=2,distill_single=0.0,distill_fused=0.0]-seed0",
        "usa-singapore-ftdpp[batch=2,distill_single=0.0,distill_fused=0.0]+pl-seed0",
    ], "a setting goes to those of a method's variants that read it"
    assert [j.method for j in jobs][1:] == [
        "ftdpp[distill_single=0,distill_fused=0]",
        "ftdpp[distill_single=0,distill_fused=0]+pl",
    ]
    for text, match in (("ftdpp[", "NAME"), ("ftdpp[ema=0.9]x", "NAME"), ("xmuda[ema=1]", "ema")):
        with pytest.raises(RecipeError, match=match):
            compare.plan("usa-singapore", text, "0", "small", [], Path("runs"))
    with pytest.raises(RecipeError, match="none of source-only reads it"):
        compare.plan("usa-singapore", "source-only", "0", "small", ["ema=0.9"], Path("runs"))


def test_compare_and_train_find_each_others_runs(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", world, "--cache", cache, "--preset", "small", "--threads", 1)
    settings = [*TINY, "--set", "steps=1"]
    result = ftd(
        *("train", "--src", "usa", "--tgt", "singapore", "--method", "source-only", "--seed", 1),
        *(*data, *settings),
    )
    assert result.exit_code == 0, result.output
    made = next((tmp_path / "runs").iterdir())
    stamp = (made / "last.safetensors").stat().st_mtime_ns

    result = ftd("compare", "--methods", "source-only,ftdpp+pl", "--seeds", "0,1", *data, *settings)
    assert result.exit_code == 0, result.output
    assert (made / "last.safetensors").stat().st_mtime_ns == stamp, "it was not trained again"
    rows = json.loads((tmp_path / "runs" / "compare.json").read_text())
    methods = ("source-only", "ftdpp", "ftdpp+pl")
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in (0, 1) for m in methods]
    assert all(r["split"] == "test" for r in rows)
    assert "±" in result.output
    folders = {p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()}
    assert len(folders) == 6 and made.name in folders
    record = runs.read_record(made)
    assert record is not None and record["threads"] == 1

    again = ftd("compare", "--methods", "source-only,ftdpp+pl", "--seeds", "0,1", *data, *settings)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "runs" / "compare.json").read_text()) == rows
    single = ftd("eval", made, "--cache", cache, "--threads", 1)
    mean = next(r for r in rows if (r["method"], r["seed"]) == ("source-only", 1))["miou"]["2d+3d"]
    assert f"{100 * mean:.1f}" in words(single)
