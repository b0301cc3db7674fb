"""The command line: refusals, exit codes, choices that are announced, looking at data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ftdpp import checkpoint, files, kernels, machine
from ftdpp.ftd import app, main
from ftdpp.tests.commands import ftd, train_args, words
from ftdpp.world import layouts

pytestmark = pytest.mark.usefixtures("on_a_cpu")

PAIR = ("train", "--src", "usa", "--tgt", "singapore")


@pytest.mark.parametrize(("args", "code", "expected"), [
    (("train", "--src", "usa", "--tgt", "singapor"), 2, "did you mean 'singapore'"),
    ((*PAIR, "--method", "ftd++"), 2, "did you mean 'ftdpp'"),
    ((*PAIR, "--set", "lrr_3d=1"), 2, "did you mean 'lr_3d'"),
    (("train", "--src", "usa"), 2, "--tgt missing"),
    (("train",), 2, "--src and --tgt missing"),
    ((*PAIR, "--preset", "small", "--pretrained", "download"), 2, "--preset paper"),
    ((*PAIR, "--preset", "paper", "--pretrained", "NONE/nope.pth"), 2, "nope.pth"),
    ((*PAIR, "--preset", "paper", "--pretrained", __file__), 2, "not a PyTorch file"),
    ((*PAIR, "--ssda", "--tgt-frames", "a"), 2, "--tgt-frames"),
    ((*PAIR, "--src-frames", ""), 2, "--src-frames: expected tokens"),
    ((*PAIR, "--set", "teacher_image=fad"), 2, "coin, fda or none"),
    ((*PAIR, "--set", "pseudo=1"), 2, "--pseudo FILE"),
    ((*PAIR, "--method", "source-only", "--set", "distill_single=1"), 2, "no teacher"),
    ((*PAIR, "--set", "width_2d=8"), 2, "at least 16"),
    ((*PAIR, "--set", "width_2d=17"), 2, "multiple of 8"),
    ((*PAIR, "--set", "width_2d=48"), 2, "multiple of width_2d/8"),
    ((*PAIR, "--set", "width_3d=6"), 2, "multiple of 4"),
    ((*PAIR, "--set", "gamma=-1"), 2, "gamma"),
    ((*PAIR, "--set", "class_weights=-1,1,1,1,1,1"), 2, "not negative"),
    ((*PAIR, "--set", "class_weights=1,nan,1,1,1,1"), 2, "expected tuple"),
    ((*PAIR, "--ssda", "--set", "class_weights_tgt=0,0,0,0,0,0"), 2, "above 0"),
    ((*PAIR, "--set", "voxels_per_metre=600"), 2, "0..100"),
    ((*PAIR, "--set", "class_weights=0,0,0,0,0,0"), 2, "above 0"),
    ((*PAIR, "--src-data", "/"), 2, "--tgt-data"),
    ((*PAIR, "--data-version", "v9"), 2, "built-in world has no versions"),
    ((*PAIR, "--device", "meta"), 2, "only cpu and cuda"),
    ((*PAIR, "--seed", "-1"), 2, "--seed"),
    ((*PAIR, "--threads", "0"), 2, "--threads"),
    ((*PAIR, "--set", "class_weights=1,2"), 2, "wants 6 numbers"),
    ((*PAIR, "--set", "classes=vkitti6"), 2, "has labels for: street6"),
    (("eval", "x", "--count", "2"), 2, "add --overlay"),
    ((*PAIR, "--pseudo", "NONE/nope"), 2, "nope: no such file"),
    ((*PAIR, "--pseudo", __file__), 1, "not a readable safetensors file"),
    ((*PAIR, "--data", "NONE/nowhere"), 3, "nowhere: there is no such folder"),
    (("train", "--src", "usa", "--tgt", "skitti"), 2, "--data"),
    (("train", "--src", "usa", "--tgt", "night"), 2, "no built-in world for usa -> night"),
    ((*PAIR, "--method", "xmuda", "--clip", "street"), 2, "xmuda looks through no CLIP; drop it"),
    (("compare", "--clip", "street"), 2, "unknown setting 'clip'"),
    (("compare", "--seeds", "-1"), 2, "from 0 on"),
    (("compare", "--out", "/proc/x"), 2, "/proc/x: cannot be written"),
    (("compare", "--seeds", "a"), 2, "--seeds"),
    (("compare", "--methods", "ftdpp+x"), 2, "for both stages NAME+pl"),
    (("compare", "--methods", "source-only", "--set", "ema=0.9"), 2, "none of source-only reads"),
    (("compare", "--ssda", "--methods", "source-only"), 2, "no semi-supervised form"),
    (("compare", "--preset", "small", "--pretrained", "download"), 2, "width 64 only"),
    (("compare", "--src", "singapore", "--tgt", "usa"), 2, "no val split"),
    (("compare", "--cache", __file__), 2, "is a file; name a folder"),
    (("eval", "NONE/nowhere"), 1, "nowhere: no such run folder"),
    (("eval", __file__.replace(".py", ".pth")), 1, "no such run folder"),
    (("pseudo", "NONE/nowhere", "--out", "x"), 1, "nowhere: no such run folder"),
    (("pseudo", "NONE/nowhere", "--out", "/proc/x"), 2, "/proc/x: cannot be written"),
    (("pseudo", "NONE/nowhere", "--out", "/"), 2, "is a folder"),
    (("data", "synth", "/proc/x"), 2, "/proc/x: cannot be written"),
    (("data", "synth", "NONE/x", "--src", "usa", "--tgt", "night"), 2, "no built-in world for usa"),
    (("data", "synth", "NONE/x", "--frames", "1,2"), 2, "expected 4 numbers"),
    (("data", "check", "NONE/nowhere", "--domain", "usa"), 3, "nowhere: there is no such folder"),
    (("data", "check", "/", "--domain", "moon"), 2, "unknown domain"),
    (("data", "prepare", "/", "--domain", "usa", "--size", "0,3"), 2, "expected H,W of 1 to 32767"),
    (("recipes", "--scenario", "usa-moon"), 2, "unknown domain 'moon'"),
    (("frobnicate",), 2, "frobnicate"),
])  # fmt: skip
def test_bad_commands(args: tuple[str, ...], code: int, expected: str, tmp_path: Path) -> None:
    """Refused with what to type, before anything is built."""
    more = ["--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    args = tuple(arg.replace("NONE", str(tmp_path / "none")) for arg in args)
    result = ftd(*args, *(more if args[0] == "train" else []))
    assert result.exit_code == code, result.output
    assert expected in words(result)
    assert not list(tmp_path.iterdir())


def test_version_and_help() -> None:
    assert ftd("--version").output.startswith("ftd 0.")
    assert "train" in ftd("-h").output
    assert "--resume" in ftd("train", "-h").output


def test_help_is_immediate() -> None:
    """It must not import torch."""
    heavy = "'torch' in sys.modules or 'numpy' in sys.modules"
    code = f"import sys, ftdpp; from ftdpp import ftd; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_choice_is_announced_with_its_reason(finished: Path) -> None:
    said = " ".join((finished / "stderr.txt").read_text().split())
    for choice in ("scenario", "threads", "device", "kernels", "cache", "precision", "workers"):
        assert choice in said
    assert "--threads" in said and "--preset" in said
    assert "class_weights" in said and "log-smoothed counts" in said
    assert "labelled 4 frames" in said and "adaptation; its labels are never read" in said


def test_threads_are_set_and_recorded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((finished / "run.json").read_text())["threads"] == 1
    before = torch.get_num_threads()
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(machine, "free_threads", lambda: (3, "a reason"))
    assert "threads 3 a reason" in words(ftd("eval", finished)).replace("(", "").replace(")", "")
    ftd("train", "--resume", finished)
    assert used == [3, 1], "free ones; and as the run began"
    assert torch.get_num_threads() == before


def test_the_folder_is_named_by_the_settings(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [*PAIR, "--method", "ftdpp", "--preset", "small", "--data", world, "--cache", cache]
    args += ["--set", "image=48,88", "--set", "fusion=0", "--steps", 1, "--threads", 1]
    result = ftd(*args)
    assert result.exit_code == 0, result.output
    [run] = (tmp_path / "runs").iterdir()
    assert run.name == "usa-singapore-ftdpp[steps=1,image=48,88,fusion=false]-seed0"
    assert "ftdpp[steps=1,image=48,88,fusion=false]" in words(result)
    result = ftd("eval", run, "--cache", cache, "--split", "val")
    assert "ftdpp[steps=1,image=48,88,fusion=false]" in words(result)


def test_recipes_command() -> None:
    result = CliRunner().invoke(app, ["recipes", "--json"])
    assert result.exit_code == 0
    table = json.loads(result.stdout)
    assert table["day-night"]["ftdpp"]["student_mix"] == 0.8
    assert "usa-singapore" in ftd("recipes").output
    one = json.loads(
        CliRunner()
        .invoke(app, ["recipes", "--json", "--scenario", "singapore-usa", "--method", "xmuda"])
        .stdout
    )
    assert list(one) == ["singapore-usa"] and list(one["singapore-usa"]) == ["xmuda"]


def test_data_commands(world: Path, cache: Path, tmp_path: Path) -> None:
    printed = ftd("data", "check", world, "--domain", "singapore", "--json").stdout
    assert {row["split"]: row["frames"] for row in json.loads(printed)["splits"]}["val"] == 2
    result = ftd("data", "check", world, "--domain", "singapore")
    assert result.exit_code == 0, result.output
    prepare = ("data", "prepare", world, "--domain", "singapore", "--cache", cache)
    result = ftd(*prepare, "--split", "val", "--size", "48,88")
    assert result.exit_code == 0, result.output
    assert "2 frames" in result.output
    [made] = json.loads(ftd(*prepare, "--split", "val", "--size", "48,88", "--json").stdout)[
        "indexes"
    ]
    assert made["frames"] == 2 and Path(made["path"], "meta.json").is_file()
    assert ftd("data", "synth", world).exit_code == 2, "an existing folder is not overwritten"
    night = ("--src", "day", "--tgt", "night", "--frames", "1,1,1,1", "--workers", 1)
    result = ftd("data", "synth", tmp_path / "w", *night)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "w" / "v1.0-trainval" / "sample.json").exists()


def test_data_check_and_prepare_exit_3_where_something_is_missing(
    world: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(world, part)
    next((part / "samples" / "CAM_FRONT").glob("n015*")).unlink()
    result = ftd("data", "check", part, "--domain", "singapore")
    assert result.exit_code == 3
    assert "files are missing" in words(result)
    assert "1 file missing, first" in words(result)
    cache = ("--cache", tmp_path / "cache")
    result = ftd("data", "prepare", part, "--domain", "night", *cache)
    assert result.exit_code == 3, result.output
    assert "nothing prepared" in words(result)


def test_the_built_in_world_serves_both_directions() -> None:
    assert layouts.pair_of("singapore", "usa") == ("usa", "singapore")
    assert layouts.pair_of("singapore", "singapore") == ("usa", "singapore")
    assert layouts.pair_of("usa", "night") is None
    assert layouts.pair_of("skitti", "skitti") == ("vkitti", "skitti")


def test_a_run_on_the_built_in_world_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the world is gone: it is generated again."""
    frames = dict.fromkeys(layouts.DEFAULT_FRAMES["usa", "singapore"], 2)
    monkeypatch.setitem(layouts.DEFAULT_FRAMES, ("usa", "singapore"), frames)
    cache, out = tmp_path / "cache", tmp_path / "run"
    args = [*PAIR, "--out", out, "--cache", cache, "--threads", 1, "--steps", 1]
    result = ftd(*args, "--set", "image=48,88", "--set", "width_3d=4", "--set", "batch=2")
    assert result.exit_code == 0, result.output
    assert "BUILT-IN STREET WORLD" in words(result)
    before = (out / "last.safetensors").read_bytes()
    shutil.rmtree(cache)
    result = ftd("train", "--resume", out)
    assert result.exit_code == 0, result.output
    assert (out / "last.safetensors").read_bytes() == before


def test_what_nobody_foresaw_ends_in_one_line(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file that a bug report needs; nothing of a page of traceback."""

    def broken(*args: object) -> None:
        raise KeyError("no\nsuch [red]thing")

    monkeypatch.setattr(checkpoint, "load", broken)
    found = ftd("eval", finished)
    assert found.exit_code == 1 and "Traceback" not in found.output
    [line] = [line for line in found.stderr.splitlines() if "an error that is ours" in line]
    assert "KeyError: 'no\\nsuch [red]thing'; please report it with" in line
    path = Path(line.split()[-1])
    text = path.read_text()
    path.unlink()
    for word in ("command: ftd", "torch: ", "machine: ", "Traceback", "in broken", "KeyError"):
        assert word in text


def test_an_empty_argument(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out "$UNSET" would be the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["ftd", "train", "--src", "usa", "--tgt", "night", "--out", ""]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "the argument after --out is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FTD_CACHE", raising=False)
    for shared in ("", "here", "./here"):  # an empty or a relative one counts as none
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert files.cache_home() == tmp_path / ".cache" / "ftd"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.cache_home() == Path("/elsewhere/ftd")
    monkeypatch.setenv("FTD_CACHE", "~/c")  # as --cache sets it
    assert files.cache_home() == tmp_path / "c"
    monkeypatch.setenv("FTD_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="name it with --cache"):
        files.cache_home()


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTD_KERNELS", raising=False)
    found = json.loads(ftd("doctor", "--device", "cpu", "--json").stdout)
    assert found["ok"] and found["machine"]["device"]["value"] == "cpu" and found["checks"]
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
    assert ftd("doctor", "--device", "cpu").exit_code == 2


def test_tensorboard(world: Path, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    args = train_args(tmp_path / "run", world, cache, "--tensorboard", steps=1)
    result = ftd(*args)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
