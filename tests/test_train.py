"""The loop: repeatability, kill and resume, protocol, pseudo-labels, and the commands with their exit codes."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from ftdpp import bench, checkpoint, data, evaluate, kernels, losses, screen, train
from ftdpp.data import IGNORE
from ftdpp.ftd import app

TINY = ["--set", "image=48,88", "--set", "batch=2", "--set", "width=16", "--set", "m=4"]


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu() -> Iterator[None]:
    """Promises about bytes are made for a CPU; the CLI would choose a GPU where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def ftd(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def train_args(out: Path, world: Path, cache: Path, *more: object, method: str = "ftdpp", steps: int = 4) -> list[str]:
    args = ["train", "--src", "usa", "--tgt", "singapore", "--method", method, "--preset", "small", "--steps", steps, "--seed", 0,
            "--out", out, "--data", world, "--cache", cache, *TINY, *more]  # fmt: skip
    return [str(a) for a in args]


@pytest.fixture(scope="module")
def finished(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations, saved every two."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = ftd(*train_args(out, world, cache, "--set", "save_every=2", steps=6))
    assert result.exit_code == 0, result.output
    return out


def same_bytes(a: Path, b: Path) -> bool:
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in ("last.safetensors", "best.safetensors", "log.csv"))


def test_run_leaves_everything(finished: Path) -> None:
    with safe_open(finished / "last.safetensors", "pt") as file:
        keys = set(file.keys())
    for wanted in ("student/net_2d.trunk.conv1.weight", "student/net_3d.trunk.stem.weight", "student/fusion.mix.weight",
                   "teacher/net_2d.main.weight", "optimizer/net_3d.main.weight/exp_avg_sq"):  # fmt: skip
        assert wanted in keys
    meta = checkpoint.read_metadata(finished / "last.safetensors")
    assert meta["iteration"] == 6
    assert meta["best"]["split"] == "val"
    record = json.loads((finished / "run.json").read_text())
    assert {"command", "recipe", "seed", "versions", "git", "data"} <= record.keys()
    rows = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [int(r["iteration"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert {"seg_2d", "seg_3d", "mimic_2d_src", "mimic_3d_tgt", "distill_single", "distill_fused"} <= rows[0].keys()


def test_two_runs_give_equal_bytes(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    """Whatever the number of loading processes."""
    assert ftd(*train_args(tmp_path / "again", world, cache, "--set", "save_every=2", "--workers", 1, steps=6)).exit_code == 0
    assert same_bytes(finished, tmp_path / "again")
    assert ftd(*train_args(tmp_path / "other", world, cache, "--set", "save_every=2", "--seed", 1, steps=6)).exit_code == 0
    assert not same_bytes(finished, tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_and_resumed_is_the_run_left_alone(number: int, finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = train_args(out, world, cache, "--set", "save_every=2", steps=6)
    process = subprocess.Popen([sys.executable, "-m", "ftdpp.ftd", *args], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "last.safetensors").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    reached = checkpoint.read_metadata(out / "last.safetensors")["iteration"]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    elif reached < 6:  # the signal may come after the last iteration on a fast machine
        assert process.returncode == 130, err
        assert "saved" in err
    assert reached >= 2
    result = ftd(*args, "--resume")
    assert result.exit_code == 0, result.output
    assert same_bytes(finished, out)


def test_stop_at_a_validation(world: Path, cache: Path, tmp_path: Path) -> None:
    """It is saved at once; the validation is owed and made up for on resume, with the same bytes in the end."""
    r = losses.recipe("usa-singapore", "xmuda", "small", overrides=[*TINY[1::2], "steps=4", "val_every=2", "save_every=4"])
    src, tgt = train.Source("usa", world), train.Source("singapore", world)

    def run(name: str) -> train.Run:
        return train.assemble(r, 0, tmp_path / name, src, tgt, tgt, cache)[0]

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


def test_resume_refuses_what_does_not_fit(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    again = train_args(finished, world, cache, "--set", "save_every=2", steps=6)
    result = ftd(*again)
    assert result.exit_code == 2
    assert "--resume" in result.output
    result = ftd(*again, "--resume", "--set", "lr=0.5")
    assert result.exit_code == 1
    assert "lr=" in result.output
    assert ftd(*train_args(tmp_path / "none", world, cache), "--resume").exit_code == 2
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "last.safetensors").write_bytes((finished / "last.safetensors").read_bytes()[:1000])
    result = ftd(*train_args(broken, world, cache), "--resume")
    assert result.exit_code == 1
    assert "last.safetensors" in result.output


def test_a_broken_network_is_not_saved(world: Path, cache: Path, tmp_path: Path) -> None:
    r = losses.recipe("usa-singapore", "source-only", "small", overrides=["image=48,88", "width=16", "m=4"])
    run = train.Run(tmp_path, r, 0, [train.Source("usa", world).index("train", r, cache)], None, None)
    run.save(run.last_path)
    before = run.last_path.read_bytes()
    run.student.net_3d.main.weight.data[0, 0] = float("inf")
    with pytest.raises(train.NonFiniteLoss, match=r"net_3d\.main\.weight.*was not written"):
        run.save(run.last_path)
    assert run.last_path.read_bytes() == before


def test_non_finite_loss_names_term_and_frames(world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd(*train_args(tmp_path / "run", world, cache, "--set", "lr=1e30"))
    assert result.exit_code == 4, result.output
    assert "nan" in result.output or "inf" in result.output
    index = train.Source("usa", world).index(
        "train", losses.recipe("usa-singapore", "ftdpp", "small", overrides=["image=48,88"]), cache
    )
    assert any(token in result.output.replace("\n", "") for token in index.tokens)
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(("args", "code", "words"), [
    (["train", "--src", "usa", "--tgt", "singapor"], 2, "did you mean 'singapore'"),
    (["train", "--src", "usa", "--tgt", "singapore", "--method", "ftd++"], 2, "did you mean 'ftdpp'"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "lrr=1"], 2, "did you mean 'lr'"),
    (["train", "--src", "usa"], 2, "--tgt"),
    (["train", "--src", "usa", "--tgt", "singapore", "--preset", "small", "--pretrained", "download"], 2, "--preset paper"),
    (["train", "--src", "usa", "--tgt", "singapore", "--preset", "paper", "--pretrained", "/nope.pth"], 2, "/nope.pth"),
    (["train", "--src", "usa", "--tgt", "singapore", "--ssda", "--tgt-frames", "a"], 2, "--tgt-frames"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "teacher_image=fad"], 2, "coin or fda"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "pseudo=1"], 2, "--pseudo FILE"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "width=8"], 2, "at least 16"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "width=17"], 2, "multiple of 8"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "width=48"], 2, "multiple of width/8"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "m=6"], 2, "and m of 4"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "gamma=-1"], 2, "gamma"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "class_weights=-1,1,1,1,1,1"], 2, "not be negative"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "class_weights=1,nan,1,1,1,1"], 2, "expected tuple"),
    (["train", "--src", "usa", "--tgt", "singapore", "--ssda", "--set", "class_weights_tgt=0,0,0,0,0,0"], 2, "above 0"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "voxels_per_metre=600"], 2, "0..100"),
    (["train", "--src", "usa", "--tgt", "singapore", "--set", "class_weights=0,0,0,0,0,0"], 2, "above 0"),
    (["train", "--src", "usa", "--tgt", "singapore", "--src-data", "/nowhere"], 2, "--tgt-data"),
    (["train", "--src", "usa", "--tgt", "singapore", "--data-version", "v9"], 2, "built-in world has no versions"),
    (["train", "--src", "usa", "--tgt", "singapore", "--preset", "paper", "--pretrained", __file__], 2, "state dict"),
    (["train", "--src", "usa", "--tgt", "singapore", "--device", "meta"], 2, "only cpu and cuda"),
    (["train", "--src", "usa", "--tgt", "singapore", "--seed", "-1"], 2, "--seed"),
    (["compare", "--seeds", "-1"], 2, "from 0 on"),
    (["compare", "--out", "/proc/x"], 2, "/proc/x: cannot be written"),
    (["compare", "--seeds", "a"], 2, "--seeds"),
    (["compare", "--methods", "ftdpp+x"], 2, "NAME+pl"),
    (["compare", "--ssda", "--methods", "source-only"], 2, "no semi-supervised form"),
    (["compare", "--preset", "small", "--pretrained", "download"], 2, "width 64 only"),
    (["train", "--src", "skitti", "--tgt", "skitti"], 2, "--data"),
    (["train", "--src", "usa", "--tgt", "singapore", "--data", "/nowhere"], 3, "/nowhere"),
    (["eval", "/nowhere"], 1, "/nowhere"),
    (["pseudo", "/nowhere", "--out", "x"], 1, "/nowhere"),
    (["compare", "--cache", __file__], 1, "Not a directory"),
    (["pseudo", "/nowhere", "--out", "/proc/x"], 2, "/proc/x: cannot be written"),
    (["pseudo", "/nowhere", "--out", "/"], 2, "is a folder"),
    (["eval", __file__.replace(".py", ".pth")], 1, "no such run folder"),
    (["data", "synth", "/proc/x"], 2, "/proc/x: cannot be written"),
    (["data", "check", "/nowhere", "--domain", "usa"], 3, "/nowhere"),
    (["frobnicate"], 2, "frobnicate"),
])  # fmt: skip
def test_bad_commands(args: list[str], code: int, words: str, tmp_path: Path) -> None:
    result = ftd(*args, *(["--out", tmp_path / "run", "--cache", tmp_path] if args[0] == "train" else []))
    assert result.exit_code == code, result.output
    assert words in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("nothing left"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory(error: Exception, world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(train, "step", full)
    result = ftd(*train_args(tmp_path / "run", world, cache))
    assert result.exit_code == 5
    assert "batch" in result.output


def damaged(finished: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Path:
    """The run's checkpoint with one thing changed."""
    tensors, meta = (
        checkpoint.read_tensors(finished / "last.safetensors", ""),
        checkpoint.read_metadata(finished / "last.safetensors"),
    )
    change(tensors, meta)
    checkpoint.save(out, tensors, meta)
    return out


def test_checkpoints_that_do_not_fit(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    """Each is refused with the name of what is wrong."""
    name = "student/net_3d.main.weight"
    changes: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
        f"{name} is missing": lambda tensors, meta: tensors.pop(name),
        "student/of_another is (2,), by its recipe it should be missing": lambda tensors, meta: tensors.update(
            {"student/of_another": torch.zeros(2)}
        ),
        f"{name} is (7, 4)": lambda tensors, meta: tensors.update({name: torch.zeros(7, 4)}),
        f"{name} holds values that are not finite": lambda tensors, meta: tensors[name].fill_(torch.nan),
        "setting 'novelty'": lambda tensors, meta: meta["recipe"].update(novelty=1),
        "class set 'street7'": lambda tensors, meta: meta["recipe"].update(classes="street7"),
        "not a checkpoint": lambda tensors, meta: meta.pop("recipe"),
    }
    for words, change in changes.items():
        path = damaged(finished, tmp_path / "x.safetensors", change)
        result = ftd("eval", path, "--data", world, "--domain", "singapore", "--cache", cache)
        assert result.exit_code == 1, result.output
        assert words in result.output.replace("\n", " ")
    (tmp_path / "x.pth").write_bytes(b"")
    assert "ftd convert" in ftd("eval", tmp_path / "x.pth").output.replace("\n", " ")
    (tmp_path / "run.json").write_text("{")
    result = ftd("eval", damaged(finished, tmp_path / "x.safetensors", lambda tensors, meta: None))
    assert result.exit_code == 1
    assert "run.json: damaged" in result.output.replace("\n", " ")


def test_resume_checks_the_optimiser(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    name = "optimizer/net_3d.main.weight/exp_avg"
    for change in (
        lambda tensors, meta: tensors.update({name: torch.zeros(7)}),
        lambda tensors, meta: tensors.update({"optimizer/foo/exp_avg": torch.zeros(7)}),
        lambda tensors, meta: tensors[name].fill_(torch.inf),
    ):
        damaged(finished, tmp_path / "last.safetensors", change)
        result = ftd(*train_args(tmp_path, world, cache, "--set", "save_every=2", "--resume", steps=6))
        assert result.exit_code == 1, result.output
        assert "does not fit the network" in result.output.replace("\n", " ")


def test_named_frames_of_the_test_split_are_announced(world: Path, cache: Path, tmp_path: Path) -> None:
    test = [ref.token for ref in data.list_frames(world, data.DOMAINS["singapore"], "test")]
    for chosen in ("--src-frames", "--tgt-frames"):
        result = ftd(*train_args(tmp_path / chosen, world, cache, chosen, ",".join(test), steps=1))
        if chosen == "--src-frames":
            assert result.exit_code == 3, "frames of Singapore are no frames of the USA"
            assert f"no frame {sorted(test)[0]!r} in usa" in result.output.replace("\n", " ")
            assert "it is one of singapore" in result.output.replace("\n", " ")
        else:
            assert result.exit_code == 0, result.output
            assert f"{len(test)} OF THEM BELONG TO THE TEST SPLIT" in " ".join(result.output.split())


@pytest.mark.parametrize("soft_wrap", [False, True])
@pytest.mark.parametrize("width", [40, 80])
def test_every_loss_term_is_visible(width: int, soft_wrap: bool) -> None:
    """On a narrow terminal, too, and where the output is no terminal."""
    console = Console(width=width, file=io.StringIO(), soft_wrap=soft_wrap)
    display = screen.Display(console, 10.0)
    terms = dict.fromkeys(("seg_2d", "seg_3d", "mimic_2d_src", "mimic_3d_src", "mimic_2d_tgt", "distill_fused"), 0.25)
    with display.progress:
        display.step("source-only seed 0", train.Step(7, terms, 0.5, 0.1), 1.0, 2**30)
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    whole = ["source-only seed 0"] if width == 80 else []  # cut on the narrower one
    for wanted in (*whole, "7 | ETA 0:04", "500 ms, data wait 10%, 1.0 GiB", *(f"{term} 0.25" for term in terms)):
        assert wanted in shown


def test_help_is_immediate() -> None:
    """It must not import torch."""
    code = "import sys; from ftdpp import ftd; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_eval_json(finished: Path, cache: Path) -> None:
    for which in ("best", "last"):
        result = CliRunner().invoke(
            app, ["eval", str(finished), "--split", "test", "--checkpoint", which, "--json", "--cache", str(cache)]
        )
        assert result.exit_code == 0, result.output
        score = json.loads(result.stdout)
        assert score["split"] == "test"
        assert score["checkpoint"].startswith(f"{which}.safetensors, iteration")
        assert set(score["miou"]) == set(score["iou"]) == {"2d", "3d", "2d+3d"}
        for head, classes in score["iou"].items():
            assert list(classes) == list(data.CLASS_SETS["street6"].names)
            mean = sum(v or 0.0 for v in classes.values()) / 6
            assert score["miou"][head] == pytest.approx(mean)


def test_eval_table_and_pictures(finished: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd("eval", finished, "--cache", cache, "--overlay", tmp_path)
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    assert "singapore test" in result.output.replace("\n", " ")
    assert len(list(tmp_path.glob("*.png"))) == 4  # two frames, predicted and labelled
    assert ftd("eval", finished, "--split", "tset").exit_code == 2


def test_points_outside_the_grid_are_counted(finished: Path, world: Path, cache: Path) -> None:
    """With voxels of 1 cm the grid is 41 m wide, and the built-in streets are longer."""
    model, r, _ = checkpoint.load_student(finished / "last.safetensors")
    index = train.Source("singapore", world).index("test", r, cache)
    whole, cut = (evaluate.evaluate(model, index, dataclasses.replace(r, voxels_per_metre=v), "x") for v in (10.0, 100.0))
    assert whole.outside == 0
    assert 0 < cut.outside < index.fingerprint["points"]
    assert cut.points < whole.points
    assert f"{cut.outside:,} POINTS OUTSIDE" in str(screen.score_table(cut, "ftdpp").title)
    assert "OUTSIDE" not in str(screen.score_table(whole, "ftdpp").title)


def test_confusion_and_iou_slowly() -> None:
    g = torch.Generator().manual_seed(0)
    pred, label = torch.randint(0, 3, (200,), generator=g), torch.randint(0, 3, (200,), generator=g)
    label[::7] = IGNORE
    matrix = evaluate.confusion(pred, label, 4)
    for i in range(4):
        for j in range(4):
            assert matrix[i, j] == sum(a == i and b == j for a, b in zip(label.tolist(), pred.tolist(), strict=True))
    per_class, mean = evaluate.iou(matrix)
    for c in range(3):
        seen = [(a, b) for a, b in zip(label.tolist(), pred.tolist(), strict=True) if a != IGNORE]
        both, either = sum(a == b == c for a, b in seen), sum(c in (a, b) for a, b in seen)
        assert per_class[c] == pytest.approx(both / either)
    assert per_class[3] != per_class[3], "an absent class has no IoU"
    assert mean == pytest.approx(sum(per_class[:3]) / 4), "and counts as 0 in the mean"
    assert evaluate.iou(evaluate.confusion(pred, torch.full((200,), IGNORE), 4))[1] == 0


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------


def test_refine_slowly() -> None:
    g = torch.Generator().manual_seed(0)
    label, prob = torch.randint(0, 4, (301,), generator=g), torch.rand(301, generator=g)
    prob[label == 3] = 0.95
    refined, thresholds = evaluate.refine(label, prob, 5)
    for c in range(4):
        mine = sorted(prob[label == c].tolist())
        assert thresholds[c] == pytest.approx(min(mine[(len(mine) - 1) // 2], 0.9))
        assert (refined == c).sum() >= len(mine) / 2
    assert (refined == 3).sum() == (label == 3).sum(), "all at 0.9 and above are kept"
    assert thresholds[4] == 0
    for a, b, p in zip(label.tolist(), refined.tolist(), prob.tolist(), strict=True):
        assert b == (a if p >= torch.tensor(thresholds[a]).item() else IGNORE)


def test_pseudo_labels_and_second_stage(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pseudo.safetensors"
    result = ftd("pseudo", finished, "--out", file, "--cache", cache)
    assert result.exit_code == 0, result.output
    tensors, meta = load_file(file), checkpoint.read_metadata(file)
    model, r, _ = checkpoint.load_student(finished / "last.safetensors")
    index = train.Source("singapore", world).index("train", r, cache)
    assert {k.rsplit("/", 1)[0] for k in tensors} == set(index.tokens)
    [(_, batch)] = evaluate.batches_of(index, r, len(index))
    with torch.no_grad():
        logits = torch.cat([model(b.image, b.pixel, b.coords).main_3d for _, b in evaluate.batches_of(index, r, r.eval_batch)])
    prob, label = logits.softmax(1).max(1)
    refined, thresholds = evaluate.refine(label, prob, 6)
    assert meta["thresholds_3d"] == pytest.approx(thresholds)
    stored = torch.cat([tensors[f"{t}/label_3d"] for t in index.tokens]).long()
    assert torch.equal(stored.masked_fill(stored == 255, IGNORE), refined)
    assert meta["kept_3d"] == torch.bincount(refined[refined != IGNORE], minlength=6).tolist()

    labels = evaluate.PseudoLabels(file, r, index)
    labels.attach(batch)
    assert batch.label_3d is not None
    assert torch.equal(batch.label_3d, refined)

    second = ftd(*train_args(tmp_path / "second", world, cache, "--pseudo", file, steps=2))
    assert second.exit_code == 0, second.output
    assert "pseudo_2d" in (tmp_path / "second" / "log.csv").read_text()

    wrong = ftd(*train_args(tmp_path / "wrong", world, cache, "--pseudo", file, method="xmuda"))
    assert wrong.exit_code == 1
    assert "method" in wrong.output
    assert ftd(*train_args(tmp_path / "wrong", world, cache, "--pseudo", file, "--src", "day", "--tgt", "night")).exit_code in (
        1,
        3,
    )
    assert ftd(*train_args(tmp_path / "wrong", world, cache, "--pseudo", tmp_path / "none")).exit_code == 2
    result = ftd(*train_args(tmp_path / "wrong", world, cache, "--pseudo", finished / "last.safetensors"))
    assert result.exit_code == 1
    assert "not a pseudo-label file" in result.output

    for domain, split, words in (
        ("usa", "train", "domain singapore instead of usa"),
        ("singapore", "val", "frames 4 instead of 2"),
    ):
        with pytest.raises(checkpoint.RunError, match=words):
            evaluate.PseudoLabels(file, r, train.Source(domain, world).index(split, r, cache))

    meta["kept_2d"] = [0] * 6
    checkpoint.save(tmp_path / "empty.safetensors", tensors, meta)
    with pytest.raises(checkpoint.RunError, match="keeps no label"):
        evaluate.PseudoLabels(tmp_path / "empty.safetensors", r, index)


# ---- other settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["source-only", "source-only-fusion", "xmuda", "target-only"])
def test_every_method_trains(method: str, world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd(*train_args(tmp_path / "run", world, cache, method=method, steps=2))
    assert result.exit_code == 0, result.output
    assert checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")["recipe"]["method"] == method


def test_compare(world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd(
        "compare",
        "--methods",
        "source-only,ftdpp+pl",
        "--seeds",
        "0,1",
        "--preset",
        "small",
        "--data",
        world,
        "--cache",
        cache,
        "--out",
        tmp_path,
        *TINY,
        "--set",
        "steps=2",
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [(r["method"], r["seed"]) for r in rows] == [(m, s) for s in (0, 1) for m in ("source-only", "ftdpp", "ftdpp+pl")]
    assert all(r["split"] == "test" for r in rows)
    assert "±" in result.output


def test_convert_released_checkpoints(tmp_path: Path) -> None:
    """Files with the released names, as .pth, give a checkpoint that loads; a pickle with code in it is refused."""
    r = losses.recipe("usa-singapore")
    model = checkpoint.build(r)
    parts: dict[str, dict[str, torch.Tensor]] = {"2d": {}, "3d": {}, "fusion": {}}
    released = {
        "net_2d.trunk.up.0.": "net_2d.dec_t_conv_stage2.", "net_2d.trunk.up.1.": "net_2d.dec_t_conv_stage3.",
        "net_2d.trunk.up.2.": "net_2d.dec_t_conv_stage4.", "net_2d.trunk.up.3.": "net_2d.dec_t_conv_stage5.",
        "net_2d.trunk.merge.0.": "net_2d.dec_conv_stage1.", "net_2d.trunk.merge.1.": "net_2d.dec_conv_stage2.",
        "net_2d.trunk.merge.2.": "net_2d.dec_conv_stage3.", "net_2d.trunk.merge.3.": "net_2d.dec_conv_stage4.",
        "net_2d.trunk.": "net_2d.", "net_2d.fused_in.": "proj_head1.", "net_2d.fused_out.": "proj_head2.",
        "net_2d.main.": "cls_head1.", "net_2d.mimic.": "cls_head2.", "net_3d.main.": "cls_head1.", "net_3d.mimic.": "cls_head2.",
        "net_3d.trunk.stem.": "net_3d.sparseModel.1.", "net_3d.trunk.norm.": "net_3d.sparseModel.3.",
        "fusion.cbam.channel.": "cbam.ca.se.", "fusion.cbam.spatial.": "cbam.sa.conv.", "fusion.mix.": "mlp.0.",
        "fusion.out.": "fusion.0.", "fusion.norm.": "fusion.1.",
    }  # fmt: skip
    for level in range(7):
        for ours, theirs in (("encode", "0"), ("down", "1.1"), ("up", "1.1"), ("decode", "3")):
            first = 3 if ours == "up" else 0
            for i, kind in enumerate(("norm", "conv")):
                released[f"net_3d.trunk.{ours}.{level}.{kind}."] = f"net_3d.sparseModel.2{'.1.1.2' * level}.{theirs}.{first + i}."
    for ours, theirs in (("attend_2d", "ea_2d"), ("attend_3d", "ea_3d"), ("attend", "ea_fuse")):
        for a, b in (("expand", "trans_dims"), ("key", "linear_0"), ("value", "linear_1"), ("project", "proj")):
            released[f"fusion.{ours}.{a}."] = f"{theirs}.{b}."
    for name, tensor in model.state_dict().items():
        prefix = max((p for p in released if name.startswith(p)), key=len)
        part = "fusion" if name.startswith("fusion") else name[4:6]
        value = tensor.unsqueeze(1) if part == "3d" and tensor.ndim == 3 else tensor
        parts[part][released[prefix] + name.removeprefix(prefix)] = value
    for part, state in parts.items():
        torch.save({"model": state, "iteration": 60000}, tmp_path / f"{part}.pth")
    args = ["convert", "--2d", tmp_path / "2d.pth", "--3d", tmp_path / "3d.pth", "--fusion", tmp_path / "fusion.pth",
            "--out", tmp_path / "x.safetensors", "--scenario"]  # fmt: skip
    result = ftd(*args, "usa-singapore")
    assert result.exit_code == 0, result.output
    loaded, _, meta = checkpoint.load_student(tmp_path / "x.safetensors")
    assert meta["iteration"] == 60000
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert ftd(*args, "a2d2-skitti").exit_code == 1, "ten classes do not fit six"

    torch.save({"model": os.system}, tmp_path / "3d.pth")
    result = ftd(*args, "usa-singapore")
    assert result.exit_code == 1
    assert "3d.pth" in result.output


def test_recipes_command() -> None:
    result = CliRunner().invoke(app, ["recipes", "--json"])
    assert result.exit_code == 0
    table = json.loads(result.stdout)
    assert table["day-night"]["ftdpp"]["student_mix"] == 0.8
    assert "usa-singapore" in ftd("recipes").output


def test_data_commands(world: Path, cache: Path, tmp_path: Path) -> None:
    result = ftd("data", "check", world, "--domain", "singapore")
    assert result.exit_code == 0, result.output
    result = ftd("data", "prepare", world, "--domain", "singapore", "--split", "val", "--size", "48,88", "--cache", cache)
    assert result.exit_code == 0, result.output
    assert "2 frames" in result.output
    assert ftd("data", "synth", world).exit_code == 2, "an existing folder is not overwritten"
    result = ftd("data", "synth", tmp_path / "w", "--src", "day", "--tgt", "night", "--frames", "1,1,1,1", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "w" / "v1.0-trainval" / "sample.json").exists()


def test_semi_supervised(world: Path, cache: Path, tmp_path: Path) -> None:
    frames = len(data.list_frames(world, data.DOMAINS["singapore"], "train_labelled"))
    result = ftd(*train_args(tmp_path / "run", world, cache, "--ssda", steps=2))
    if frames:
        assert result.exit_code == 0, result.output
        assert checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")["recipe"]["supervised"] == "both"
    else:
        assert result.exit_code == 3, result.output


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTD_KERNELS", raising=False)
    result = ftd("doctor", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "torch-scatter" in result.output
    assert "WRONG" not in result.output
    right = kernels.sparse_conv
    monkeypatch.setattr(kernels, "sparse_conv", lambda x, w, kmap: right(x, w, kmap) * 1.001)
    result = ftd("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert ftd("bench", "--device", "cpu").exit_code == 1, "no timing behind a red check"
    monkeypatch.setenv("FTD_KERNELS", "spconv")
    result = ftd("doctor", "--device", "cpu")
    assert result.exit_code == 2


def test_bench(world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is timed, and those with a floor are not below a plausible part of it."""
    monkeypatch.setattr(bench, "LOADS", 2)
    cpu = torch.device("cpu")
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # a setting of the whole process
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)  # no peer, even where it is installed
    rows = bench.run(world, cache, 1, cpu, (1, 2))
    assert len(rows) == 2 + 5 * 3 + 1 + 4 + 2 * 3  # two batches and a whole sweep; four steps, the parts of two
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["times floor"] > 0.5 for row in rows if row["times floor"])
    for _ in range(2):
        bench.append(tmp_path / "cpu.csv", rows, cpu)
    assert len((tmp_path / "cpu.csv").read_text().splitlines()) == 1 + 2 * len(rows)
    bench.check_columns(tmp_path / "cpu.csv")
    (tmp_path / "other.csv").write_text("date,loss\n")
    result = ftd("bench", "--out", str(tmp_path / "other.csv"))
    assert result.exit_code == 3, result.output
    assert "other.csv: begins with" in result.output
    assert (tmp_path / "other.csv").read_text() == "date,loss\n"
