"""Comparing many runs: the plan, the table, what is found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftdpp import checkpoint, compare, results, runs
from ftdpp.recipe import RecipeError
from ftdpp.tests.commands import TINY, ftd, same_bytes, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")


def named(jobs: list[compare.Job]) -> list[str]:
    return [job.out.name for job in jobs]


def plan(methods: str, *chosen: str, seeds: str = "0", sweeps: tuple[str, ...] = ()) -> list[Any]:
    args = methods, seeds, "small", chosen, Path("runs"), sweeps
    return compare.plan("usa-singapore", *args)


def test_plan() -> None:
    settings = "batch=2", "ema=0.9", "pseudo_detach=false"
    jobs = plan("source-only,ftdpp+pl,ftdpp", *settings, seeds="0,1")
    given = ["[batch=2]", "[batch=2,ema=0.9]", "+pl[batch=2,pseudo_detach=false,ema=0.9]"]
    names = [m + g for m, g in zip(("source-only", "ftdpp", "ftdpp"), given, strict=True)]
    assert [(j.title, j.seed) for j in jobs] == [(n, s) for s in (0, 1) for n in names], (
        "a setting goes to those who read it"
    )
    assert named(jobs) == [f"usa-singapore-{n}-seed{s}" for s in (0, 1) for n in names]
    assert [j.recipe.pseudo for j in jobs] == [0, 0, 1] * 2
    assert [j.needs for j in jobs] == [[], [], [jobs[1].out], [], [], [jobs[4].out]]


def test_plan_of_variants() -> None:
    """Settings in brackets belong to one row of the table, and to its first stage."""
    variants = "ftdpp[fusion=false,dropout=0.1,0.2],ftdpp+pl[distill_single=0,pseudo_debias=false]"
    jobs = plan(variants, "batch=2", "ema=0.9")
    assert named(jobs) == [
        "usa-singapore-ftdpp[batch=2,fusion=false,dropout=0.1,0.2,ema=0.9]-seed0",
        "usa-singapore-ftdpp[batch=2,distill_single=0,ema=0.9]-seed0",
        "usa-singapore-ftdpp+pl[batch=2,distill_single=0,pseudo_debias=false,ema=0.9]-seed0",
    ]
    assert jobs[2].first == jobs[1].out
    both = plan("ftdpp[distill_single=0,distill_fused=0],ftdpp", "batch=2", "ema=0.9")
    assert both[0].title == "ftdpp[batch=2,distill_single=0,distill_fused=0]", "no teacher: no ema"
    for text, match in (
        ("ftdpp[", "NAME"),
        ("ftdpp[ema=0.9]x", "NAME"),
        ("ftdpp[ema=0.9]+pl", "NAME"),
        ("xmuda[ema=1]", "ema"),
    ):
        with pytest.raises(RecipeError, match=match):
            plan(text)
    with pytest.raises(RecipeError, match="none of source-only reads it"):
        plan("source-only", "ema=0.9")


def test_plan_of_sweeps() -> None:
    """All combinations; a method that does not read a swept setting is there once a seed."""
    jobs = plan("xmuda,ftdpp", sweeps=("lr_3d=1e-3,3e-3", "ema=0.9,0.99"))
    assert len(jobs) == 6
    assert {j.title for j in jobs} == {
        *(f"ftdpp[lr_3d={lr},ema={e}]" for lr in ("0.001", "0.003") for e in ("0.9", "0.99")),
        *(f"xmuda[lr_3d={lr}]" for lr in ("0.001", "0.003")),
    }
    sizes = plan("xmuda", sweeps=("image=56,100;112,200",))
    assert [j.recipe.image for j in sizes] == [(56, 100), (112, 200)]
    for sweep, match in (("lr_3d=1", "semicolons"), ("ema=0,1", "--sweep ema=0,1: none of xmuda")):
        with pytest.raises(RecipeError, match=match):
            plan("xmuda", sweeps=(sweep,))


@pytest.mark.parametrize("name", compare.LISTS)
def test_lists(name: str) -> None:
    """Each method and setting of them exists, is another run than the others, and a second stage
    has the first one of its own method."""
    scenario = "usa-singapore" + ("-ssda" if "ssda" in name else "")
    methods = compare.listed(name.removesuffix("-ssda"), scenario)
    jobs = compare.plan(scenario, methods, "0", "small", [], Path("runs"))
    wanted = {name.partition("[")[0] for name in compare._names(methods)}
    assert wanted <= {job.title.partition("[")[0] for job in jobs}
    assert len(set(named(jobs))) == len(jobs)
    assert compare.listed("xmuda", scenario) == "xmuda"
    second = [job for job in jobs if job.recipe.second_stage]
    assert len(second) == methods.count("+pl")
    for job in second:
        assert job.first is not None
        assert job.first.name == f"{scenario}-{job.recipe.method}-seed0"
    both = compare.listed(f"weak, {name.removesuffix('-ssda')}", scenario)
    assert both == f"weak,{methods}", "a list is an item among others"


@pytest.mark.parametrize(
    "methods",
    [
        "ftdpp,ftdpp[fusion=false],ftdpp+pl",
        "ftdpp+pl[pseudo_debias=false],ftdpp+pl",
        "ftdpp,xmuda,ftdpp+pl",
    ],
)
def test_a_second_stage_has_its_own_first(methods: str) -> None:
    """Wherever it stands in the list."""
    for job in plan(methods, seeds="0,1"):
        if job.recipe.second_stage:
            assert job.first == Path(f"runs/usa-singapore-ftdpp-seed{job.seed}")


def test_a_source_model_s_settings_are_in_the_name() -> None:
    """Two of them make two rows, not two seeds of one."""
    jobs = plan("crossmatch", sweeps=("lr_3d=1e-3,3e-3",))
    titles = [job.title for job in jobs if job.source is not None]
    assert titles == ["crossmatch[lr_3d=0.001]", "crossmatch[lr_3d=0.003]"]


def test_long_names_of_folders_are_cut_and_differ() -> None:
    weights = [",".join([f"0.12345678901234{i}"] * 6) for i in (1, 2)]
    names = [
        named(plan("xmuda", f"class_weights={w}", "dropout=0.123456789012,0.123456789012",
                   "lr_2d=0.00012345678901234", "lr_3d=0.00012345678901234"))[0]
        for w in weights
    ]  # fmt: skip
    assert names[0] != names[1]
    assert all(len(name) < 255 and name.endswith("-seed0") for name in names)


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
    file = tmp_path / "runs" / "compare.json"
    rows = results.read(file)["rows"]
    methods = ("source-only", "ftdpp", "ftdpp+pl")
    assert [r["method"] for r in rows] == ["source-only", "ftdpp", "ftdpp"] * 2
    assert [(r["title"].split("[")[0], r["seed"]) for r in rows] == [
        (m, s) for s in (0, 1) for m in methods
    ]
    assert all(r["split"] == "test" for r in rows)
    assert "±" in result.output
    folders = {p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()}
    assert len(folders) == 6 and made.name in folders
    record = runs.read_record(made)
    assert record is not None and record["threads"] == 1

    again = ftd("compare", "--methods", "source-only,ftdpp+pl", "--seeds", "0,1", *data, *settings)
    assert again.exit_code == 0, again.output
    assert results.read(file)["rows"] == rows
    collected = sorted(results.collect((tmp_path / "runs").glob("usa-*")), key=str)
    assert collected == sorted(rows, key=str), "each run's folder holds its row"
    single = ftd("eval", made, "--cache", cache, "--threads", 1)
    mean = next(r for r in rows if (r["method"], r["seed"]) == ("source-only", 1))["miou"]["2d+3d"]
    assert f"{100 * mean:.1f}" in words(single)


WHERE = ("--preset", "small", "--threads", 1)


def test_jobs_at_once_give_the_same_bytes(world: Path, cache: Path, tmp_path: Path) -> None:
    """Two processes; the second stage waits for its first."""
    args = ("compare", "--methods", "source-only,ftdpp+pl", "--data", world, "--cache", cache)
    for jobs in (1, 2):
        result = ftd(
            *args, *WHERE, "--steps", 2, *TINY, "--jobs", jobs, "--out", tmp_path / f"{jobs}"
        )
        assert result.exit_code == 0, result.output
    assert "ftdpp+pl" in words(result) and "seed 0: iteration 2 of 2" in words(result)
    runs_ = sorted(path.name for path in (tmp_path / "1").glob("usa-*"))
    assert len(runs_) == 3
    for name in runs_:
        assert same_bytes(tmp_path / "1" / name, tmp_path / "2" / name), name
    rows = [results.read(tmp_path / f"{jobs}" / "compare.json")["rows"] for jobs in (1, 2)]
    assert rows[0] == rows[1]


def test_what_fails_does_not_stop_the_others(world: Path, cache: Path, tmp_path: Path) -> None:
    """A run that diverges, what starts from it, and one that knows nothing of either."""
    methods = "ftdpp+pl[lr_3d=1e30],source-only"
    args = ("compare", "--methods", methods, "--data", world, "--cache", cache, *WHERE, *TINY)
    outputs = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}"
        result = ftd(*args, "--steps", 3, "--jobs", jobs, "--out", out)
        assert result.exit_code == 4, result.output
        assert "2 runs of 3 failed" in words(result)
        assert "from which it starts" in words(result), "the second stage says why"
        [row] = results.read(out / "compare.json")["rows"]
        assert row["method"] == "source-only"
        outputs.append(row)
    assert outputs[0] == outputs[1]


def test_a_killed_process_is_a_failed_run(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that is left needed it: the comparison ends and says so."""
    monkeypatch.setattr(compare, "_work", die)
    args = ("compare", "--data", world, "--cache", cache, *WHERE, *TINY, "--steps", 1)
    result = ftd(*args, "--jobs", 2, "--methods", "xmuda+pl", "--out", tmp_path)
    assert result.exit_code == 1, result.output
    assert "exit code -9" in words(result) and "from which it starts" in words(result)
    assert not (tmp_path / "compare.json").exists(), "no file of no rows"


def die(*_: Any) -> None:
    """In the place of a run's process."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_labels_of_another_first_stage_are_refused(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    args = ("compare", "--data", world, "--cache", cache, "--out", tmp_path, *WHERE, *TINY)
    args = (*args, "--steps", 1, "--methods", "source-only+pl")
    assert ftd(*args).exit_code == 0
    [second] = tmp_path.glob("*+pl*")
    for name in ("last.safetensors", "best.safetensors"):  # as if stopped before its end
        (second / name).unlink()
    [first] = tmp_path.glob("usa-singapore-source-only[[]*")
    last = first / "last.safetensors"
    tensors = checkpoint.read_tensors(last, "")
    name = next(name for name in tensors if name.endswith("net_3d.main.bias"))
    tensors[name] = tensors[name] + 1
    checkpoint.save(last, tensors, checkpoint.read_metadata(last))
    result = ftd(*args)
    assert result.exit_code == 1, result.output
    assert "not made by" in words(result) and f"remove {second}" in words(result)


def test_a_stop_saves_every_run(world: Path, cache: Path, tmp_path: Path) -> None:
    """SIGTERM to the parent alone: its processes save, and the same command goes on."""
    command: list[Any] = [
        sys.executable,
        "-P",
        "-m",
        "ftdpp",
        "compare",
        "--methods",
        "source-only,xmuda",
    ]
    command += ["--data", world, "--cache", cache, "--out", tmp_path, "--jobs", 2, *WHERE, *TINY]
    command += ["--steps", 4000, "--set", "val_every=4000", "--set", "save_every=4000"]
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stderr is not None
        begun: set[str] = set()
        for line in process.stderr:
            if "seed 0: iteration" in line:
                begun |= {name for name in ("source-only", "xmuda") if name in line}
            if len(begun) == 2:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "runs were saved (nothing is lost)" in rest
    for name in begun:
        [run] = tmp_path.glob(f"usa-singapore-{name}*")
        assert 0 < checkpoint.read_metadata(run / "last.safetensors")["iteration"] < 4000


def test_pairs_of_domains(world: Path, cache: Path, tmp_path: Path) -> None:
    """Several scenarios in one command, a table each."""
    pairs = ("--src", "usa,singapore", "--tgt", "singapore,singapore", "--methods", "source-only")
    where = ("--data", world, "--cache", cache, "--out", tmp_path)
    result = ftd("compare", *pairs, *where, *WHERE, "--steps", 1, *TINY)
    assert result.exit_code == 0, result.output
    rows = results.read(tmp_path / "compare.json")["rows"]
    assert [row["scenario"] for row in rows] == ["usa-singapore", "singapore-singapore"]
    assert "usa -> singapore: mIoU" in words(result)
    assert "singapore -> singapore: mIoU" in words(result)
    wrong = ftd("compare", "--src", "usa,day", "--tgt", "singapore", "--data", world)
    assert wrong.exit_code == 2 and "2 and 1 domains" in words(wrong)
