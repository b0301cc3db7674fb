"""The loop: repeatability, kill and resume, refusals, what a run leaves."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ftdpp import checkpoint, files, readers, runs, systems, train
from ftdpp.files import Log
from ftdpp.readers import DataError, list_frames
from ftdpp.tests import layouts
from ftdpp.tests.commands import TINY, ftd, same_bytes, stopped_in, train_args, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")


def tiny(method: str = "ftdpp", *more: str) -> Any:
    return systems.recipe("usa-singapore", method, "small", overrides=[*TINY[1::2], *more])


def places(world: Path, cache: Path) -> runs.Places:
    domains = {"src": "usa", "tgt": "singapore", "val": "singapore"}
    return runs.Places({side: runs.Origin(d, world) for side, d in domains.items()}, cache)


def test_run_leaves_everything(finished: Path) -> None:
    with safe_open(finished / "last.safetensors", "pt") as file:
        keys = set(file.keys())
    for wanted in (
        "system/student.net_2d.trunk.conv1.weight",
        "system/student.net_3d.trunk.stem.weight",
        "system/student.fusion.mix.weight",
        "system/teacher.net_2d.main.weight",
        "optimizer/all/student.net_3d.main.weight/exp_avg_sq",
    ):
        assert wanted in keys
    meta = checkpoint.read_metadata(finished / "last.safetensors")
    assert meta["iteration"] == 6
    assert meta["best"]["split"] == "val"
    record = json.loads((finished / "run.json").read_text())
    assert {"command", "recipe", "seed", "versions", "git", "data", "threads"} <= record.keys()
    rows = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [int(r["iteration"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert {"seg_2d", "mimic_2d_src", "mimic_3d_tgt", "distill_single"} <= rows[0].keys()


def test_val_csv(finished: Path) -> None:
    """Iteration, learning rates, seconds, mIoU of each head, IoU of each class."""
    rows = list(csv.DictReader((finished / "val.csv").read_text().splitlines()))
    assert [int(r["iteration"]) for r in rows] == [3, 6]
    assert [float(r["lr all.3d"]) for r in rows] == [6e-3, pytest.approx(6e-4)]
    assert [float(r["lr all.2d"]) for r in rows] == [2e-3, pytest.approx(2e-4)]
    assert 0 <= float(rows[0]["seconds"]) <= float(rows[1]["seconds"])
    best = checkpoint.read_metadata(finished / "best.safetensors")["best"]
    row = next(r for r in rows if int(r["iteration"]) == best["iteration"])
    for head, value in best["miou"].items():
        assert float(row[f"mIoU {head}"]) == pytest.approx(value, abs=1e-6)
        classes = [float(row[f"{head} {c}"] or 0) for c in ("vehicle", "manmade", "vegetation")]
        assert all(0 <= v <= 1 for v in classes)


def test_two_runs_give_equal_bytes(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """Whatever the number of loading processes."""
    more = ("--set", "save_every=2", "--set", "val_every=3", "--set", "milestones=4")
    again = train_args(tmp_path / "again", world, cache, *more, "--workers", 1, steps=6)
    assert ftd(*again).exit_code == 0
    assert same_bytes(finished, tmp_path / "again")
    other = train_args(tmp_path / "other", world, cache, *more, "--seed", 1, steps=1)
    assert ftd(*other).exit_code == 0
    names, row = (tmp_path / "other" / "log.csv").read_text().splitlines()
    first = (finished / "log.csv").read_text().splitlines()
    assert names == first[0] and row != first[1], "another seed is another run"


# A run that is killed in the middle of its fourth iteration.
KILLED = """
import os, signal
from ftdpp import ftd, train
learn = train.Run.learn
def disturbed(run, batches):
    terms = learn(run, batches)
    if run.iteration == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return terms
train.Run.learn = disturbed
ftd.main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_killed_and_resumed_is_the_run_left_alone(
    number: signal.Signals,
    finished: Path,
    world: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    more = ("--set", "save_every=2", "--set", "val_every=3", "--set", "milestones=4")
    args = train_args(out, world, cache, *more, steps=6)
    if number == signal.SIGKILL:
        command = [sys.executable, "-c", KILLED, *args]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        reached = 3  # the last save before the kill was that of the validation
    else:
        learn = train.Run.learn

        def disturbed(run: train.Run, batches: Any) -> Any:
            terms = learn(run, batches)
            if run.iteration == 4:
                signal.raise_signal(number)
            return terms

        # Where a run lets a signal through, the test fails and not pytest.
        before = signal.signal(number, signal.default_int_handler)
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "learn", disturbed)
            stopped = ftd(*args)
        signal.signal(number, before)
        assert stopped.exit_code == 130, stopped.output
        assert f"--resume {out}" in words(stopped)
        reached = 4
    assert checkpoint.read_metadata(out / "last.safetensors")["iteration"] == reached
    resumed = ftd("train", "--resume", out)
    assert resumed.exit_code == 0, resumed.output
    assert same_bytes(finished, out)
    ours, theirs = ((d / "val.csv").read_text().splitlines() for d in (out, finished))
    assert [r.split(",")[0] for r in ours] == [r.split(",")[0] for r in theirs]


def test_resume_needs_nothing_else_and_takes_nothing_else(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert ftd(*train_args(out, world, cache, steps=2)).exit_code == 0
    before = (out / "last.safetensors").read_bytes()
    result = ftd("train", "--resume", out)
    assert result.exit_code == 0, result.output
    assert (out / "last.safetensors").read_bytes() == before, "it was at its end"
    for option in (["--src", "usa"], ["--set", "lr_3d=1"], ["--method", "xmuda"], ["--out", out]):
        result = ftd("train", "--resume", out, *option)
        assert result.exit_code == 2
        assert f"drop {option[0]}" in words(result)
    (out / "run.json").unlink()
    result = ftd("train", "--resume", out)
    assert result.exit_code == 1
    assert "no run.json" in words(result)


def test_resume_where_the_data_has_moved(world: Path, cache: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    shutil.copytree(world, away)
    out = tmp_path / "run"
    args = train_args(out, away, cache, "--set", "save_every=1", steps=2)
    with stopped_in(1):
        assert ftd(*args).exit_code == 130
    shutil.rmtree(away)
    result = ftd("train", "--resume", out)
    assert result.exit_code == 3
    assert "there is no such folder" in words(result)
    result = ftd("train", "--resume", out, "--data", world)
    assert result.exit_code == 0, result.output


def test_two_processes_do_not_share_a_folder(world: Path, cache: Path, tmp_path: Path) -> None:
    with files.claimed(tmp_path / "run"):
        result = ftd(*train_args(tmp_path / "run", world, cache, steps=1))
    assert result.exit_code == 2
    assert "another process trains there" in words(result)
    assert not (tmp_path / "run" / "run.json").exists()


def test_imagenet_weights_are_part_of_a_run(world: Path, cache: Path, tmp_path: Path) -> None:
    """They reach student and teacher; a run is not resumed with others."""
    r, there = tiny(), places(world, cache)
    encoder = systems.build(r).encoders()[0].state_dict()
    weights = {k: torch.full_like(v, 0.5) for k, v in encoder.items() if k.startswith("conv1")}

    def run(**more: Any) -> train.Run:
        return runs.assemble(r, 0, tmp_path, there, **more)[0]

    begun = run(pretrained=weights)
    for net in (begun.system.student, begun.system.teacher):
        assert (net.net_2d.trunk.conv1.weight == 0.5).all()
    begun.save(begun.last_path)
    with pytest.raises(checkpoint.RunError, match="another pretrained"):
        run().resume()
    run(pretrained=weights).resume()
    run(pretrained_digest=begun.pretrained_digest).resume()


def test_a_log_survives_a_kill_and_new_columns(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv", 0)
    for i in (1, 2, 3):
        log.add({"iteration": i, "a": i})
    log.flush()
    log.add({"iteration": 4, "a": 4, "b": 5})
    log.flush()
    with (tmp_path / "log.csv").open("a") as f:
        f.write("5")  # torn by a kill
    log = Log(tmp_path / "log.csv", 3)
    log.add({"iteration": 4, "b": 6})
    log.flush()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [(r["iteration"], r["a"], r["b"]) for r in rows] == [
        *(("1", "1", ""), ("2", "2", ""), ("3", "3", "")),
        ("4", "", "6"),
    ]


def test_stop_at_a_validation(world: Path, cache: Path, tmp_path: Path) -> None:
    """Saved at once; the validation is owed and made up for on resume, with the same bytes."""
    r = tiny("xmuda", "steps=4", "val_every=2", "save_every=4")

    def run(name: str) -> train.Run:
        return runs.assemble(r, 0, tmp_path / name, places(world, cache))[0]

    list(train.fit(whole := run("whole")))
    stopped = run("stopped")

    def stop_after_two() -> None:
        for event in train.fit(stopped):
            stopped.stop = isinstance(event, train.Step) and event.iteration == 2

    with pytest.raises(train.Interrupted, match="--resume"):
        stop_after_two()
    assert checkpoint.read_metadata(stopped.last_path)["validation_owed"]
    resumed = run("stopped")
    resumed.resume()
    kinds = [type(event).__name__ for event in train.fit(resumed)]
    assert kinds == ["Score", "Step", "Step", "Score"]
    assert same_bytes(whole.out, resumed.out)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    result = ftd(*train_args(finished, world, cache, steps=6))
    assert result.exit_code == 2
    assert f"--resume {finished}" in words(result)
    run, _ = runs.assemble(tiny("ftdpp", "lr_3d=0.5"), 0, finished, places(world, cache))
    with pytest.raises(checkpoint.RunError, match="lr_3d="):
        run.resume()
    assert ftd("train", "--resume", tmp_path / "none").exit_code == 1
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (finished / "last.safetensors").read_bytes()
    (broken / "last.safetensors").write_bytes(whole[:1000])
    (broken / "run.json").write_text((finished / "run.json").read_text())
    result = ftd("train", "--resume", broken)
    assert result.exit_code == 1
    assert "last.safetensors" in result.output


def test_a_broken_network_is_not_saved(world: Path, cache: Path, tmp_path: Path) -> None:
    r = tiny("source-only")
    index = runs.Origin("usa", world).index("train", r, cache)
    run = train.Run(tmp_path, r, 0, {"labelled": index}, None)
    run.save(run.last_path)
    before = run.last_path.read_bytes()
    run.system.student.net_3d.main.weight.data[0, 0] = float("inf")
    with pytest.raises(train.NonFiniteLoss, match=r"net_3d\.main\.weight.*was not written"):
        run.save(run.last_path)
    assert run.last_path.read_bytes() == before


def test_non_finite_loss_names_term_and_frames(world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd(*train_args(tmp_path / "run", world, cache, "--set", "lr_3d=1e30"))
    assert result.exit_code == 4, result.output
    assert "seg_3d = nan" in words(result)
    index = runs.Origin("usa", world).index("train", tiny(), cache)
    assert any(token in result.output.replace("\n", "") for token in index.tokens)
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("nothing left"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory(
    error: Exception, world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(train.Run, "learn", full)
    result = ftd(*train_args(tmp_path / "run", world, cache))
    assert result.exit_code == 5
    assert "batch" in result.output


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def damaged(finished: Path, out: Path, change: Change) -> Path:
    """The run's checkpoint with one thing changed."""
    path = finished / "last.safetensors"
    tensors, meta = checkpoint.read_tensors(path, ""), checkpoint.read_metadata(path)
    change(tensors, meta)
    checkpoint.save(out, tensors, meta)
    return out


def test_checkpoints_that_do_not_fit(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """Each is refused with the name of what is wrong."""
    name = "system/student.net_3d.main.weight"
    short = name.removeprefix("system/")
    changes: dict[str, Change] = {
        f"{short} is missing": lambda tensors, meta: tensors.pop(name),
        "student.of_another is (2,), by its recipe it should be missing": (
            lambda tensors, meta: tensors.update({"system/student.of_another": torch.zeros(2)})
        ),
        f"{short} is (7, 4)": lambda tensors, meta: tensors.update({name: torch.zeros(7, 4)}),
        f"{short} holds values that are not finite": (
            lambda tensors, meta: tensors[name].fill_(torch.nan)
        ),
        "setting 'novelty'": lambda tensors, meta: meta["recipe"].update(novelty=1),
        "class set 'street7'": lambda tensors, meta: meta["recipe"].update(classes="street7"),
        "method 'ours'": lambda tensors, meta: meta["recipe"].update(method="ours"),
        "format 1, this version reads": lambda tensors, meta: meta.update(format=1),
        "not a checkpoint": lambda tensors, meta: meta.pop("recipe"),
    }
    for expected, change in changes.items():
        path = damaged(finished, tmp_path / "x.safetensors", change)
        data = ("--data", world, "--domain", "singapore", "--cache", cache)
        result = ftd("eval", path, *data)
        assert result.exit_code == 1, result.output
        assert expected in words(result)
    (tmp_path / "x.pth").write_bytes(b"")
    assert "ftd convert" in words(ftd("eval", tmp_path / "x.pth", *data))
    (tmp_path / "run.json").write_text("{")
    result = ftd("eval", damaged(finished, tmp_path / "x.safetensors", lambda tensors, meta: None))
    assert result.exit_code == 1
    assert "run.json: damaged" in words(result)


def test_resume_checks_the_optimiser(finished: Path, tmp_path: Path) -> None:
    name = "optimizer/all/student.net_3d.main.weight/exp_avg"
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    changes: list[Change] = [
        lambda tensors, meta: tensors.update({name: torch.zeros(7)}),
        lambda tensors, meta: tensors.update({"optimizer/all/foo/exp_avg": torch.zeros(7)}),
        lambda tensors, meta: tensors.update({"optimizer/other/foo/step": torch.zeros(())}),
        lambda tensors, meta: tensors[name].fill_(torch.inf),
        lambda tensors, meta: tensors.pop(name),
        lambda tensors, meta: [tensors.pop(k) for k in list(tensors) if k.startswith("optim")],
    ]
    for change in changes:
        damaged(finished, tmp_path / "last.safetensors", change)
        result = ftd("train", "--resume", tmp_path)
        assert result.exit_code == 1, result.output
        said = words(result)
        assert "does not fit the network" in said or "is not complete" in said


def test_named_frames_of_the_test_split_are_announced(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    singapore = readers.domains()["singapore"]
    test = [ref.token for ref in list_frames(world, singapore, "test")]
    chosen = ",".join(test)
    result = ftd(*train_args(tmp_path / "a", world, cache, "--src-frames", chosen, steps=1))
    assert result.exit_code == 3, "frames of Singapore are no frames of the USA"
    assert f"no frame {sorted(test)[0]!r} in usa" in words(result)
    assert "it belongs to singapore" in words(result)
    result = ftd(*train_args(tmp_path / "b", world, cache, "--tgt-frames", chosen, steps=1))
    assert result.exit_code == 0, result.output
    assert f"{len(test)} OF THEM BELONG TO THE TEST SPLIT" in words(result)


def test_the_same_frames_on_both_sides_are_announced(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    both = ("--src", "singapore", "--tgt", "singapore")
    result = ftd(*train_args(tmp_path / "run", world, cache, *both, steps=1))
    assert result.exit_code == 0, result.output
    assert "labelled and unlabelled share 8 frames" in words(result)


@pytest.mark.parametrize("method", ["source-only", "source-only-fusion", "xmuda", "target-only"])
def test_every_method_trains(method: str, world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd(*train_args(tmp_path / "run", world, cache, method=method, steps=2))
    assert result.exit_code == 0, result.output
    meta = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    assert meta["recipe"]["method"] == method


def test_a_pair_that_no_paper_has_trains_without_validation(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    reverse = ("--src", "singapore", "--tgt", "usa")
    result = ftd(*train_args(tmp_path / "run", world, cache, *reverse, steps=1))
    assert result.exit_code == 0, result.output
    said = words(result)
    assert "no paper has this pair: default settings, common classes street6" in said
    assert "usa has no validation split" in said
    assert said.index("no validation split") < said.index("done:")
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_semi_supervised(world: Path, cache: Path, tmp_path: Path) -> None:
    singapore = readers.domains()["singapore"]
    assert list_frames(world, singapore, "train_labelled"), "the fixture has labelled scenes"
    result = ftd(*train_args(tmp_path / "run", world, cache, "--ssda", steps=2))
    assert result.exit_code == 0, result.output
    meta = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    assert meta["recipe"]["supervised"] == "both"
    assert list(meta["data"]) == ["labelled", "labelled_tgt", "unlabelled"]


def test_a_target_without_labels_cannot_be_the_oracle(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "world"
    bare.mkdir()
    for entry in world.iterdir():
        os.symlink(entry, bare / entry.name)
    tables = bare / "v1.0-trainval"
    tables.unlink()
    tables.mkdir()
    for table in (world / "v1.0-trainval").iterdir():
        if table.name != "lidarseg.json":
            os.symlink(table, tables / table.name)
    unlabelled = places(world, cache)
    unlabelled.origins["tgt"] = unlabelled.origins["val"] = runs.Origin("singapore", bare)
    with pytest.raises(DataError, match=r"without labels.*lidarseg\.json"):
        runs.assemble(tiny("target-only"), 0, tmp_path, unlabelled)


@pytest.mark.parametrize("method", ["source-only", "ftdpp", "bftd"])
def test_frames_of_one_point(method: str, tmp_path: Path) -> None:
    """A batch of one such frame has no variance to normalise by."""
    scenes = [("scene-0001", "singapore-onenorth", ""), ("scene-0200", "boston-seaport", "")]
    root = layouts.nuscenes(tmp_path / "data", scenes=scenes)
    for path in (root / "samples/LIDAR_TOP").iterdir():
        np.array([0, 10, 0.5, 1, 0], np.float32).tofile(path)
    for path in (root / "lidarseg/v1.0-mini").iterdir():
        np.array([1], np.uint8).tofile(path)
    args = train_args(tmp_path / "run", root, tmp_path / "cache", method=method, steps=2)
    result = ftd(*args, "--set", "batch=1", "--data-version", "v1.0-mini")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert [row["iteration"] for row in rows] == ["1", "2"]
