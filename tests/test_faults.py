"""What goes wrong, and what is printed then: docs/faults.md, written by these tests.

Every case ends in one line that names what was found, in an exit code of its kind, and never in a
traceback. `FTD_FAULTS=write pytest tests/test_faults.py` writes the page anew; without it, the page
has to say what happens.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ftdpp import checkpoint
from ftdpp.tests import dense_layouts, layouts
from ftdpp.tests.commands import ftd

pytestmark = pytest.mark.usefixtures("on_a_cpu")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
WRITING = os.environ.get("FTD_FAULTS") == "write"


class Row(NamedTuple):
    what: str  # was done
    code: int
    line: str  # that was printed


@contextmanager
def in_time(seconds: int = 30) -> Iterator[None]:
    """What never comes back fails."""

    def late(*args: Any) -> None:
        raise AssertionError(f"not back after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(what: str, *args: object, places: dict[str, Path]) -> Row:
    """Run a command that has to fail, or to do no harm, and keep its last line.

    Args:
        places: folders of this machine, by the names that they have on the page.
    """
    with in_time():
        result = ftd(*args)
    said = [line for line in result.stderr.splitlines() if line.startswith("ftd: ")]
    assert "Traceback" not in result.output, f"{what}: {result.output}"
    assert "an error that is ours" not in result.output, f"{what}: {result.output}"
    if result.exit_code:
        usage = result.stderr.strip().splitlines()[-1]  # of the parser, in a frame of its own
        assert len(said) == 1 or result.exit_code == 2, f"{what}: {result.output}"
        line = said[0].removeprefix("ftd: ") if said else usage.strip("│╯╰─ ")
    else:
        line = "-"
    for name, path in places.items():
        line = line.replace(str(path), name)
    return Row(what, result.exit_code, line)


def require_on_the_page(title: str, rows: list[Row], intro: str = "") -> None:
    """The section of the page is these rows; or it is written."""
    lines = ["| what | exit | what is printed |", "| --- | --- | --- |"]
    for row in rows:
        cells = [row.what, str(row.code), row.line]
        lines.append(
            "| " + " | ".join(c.replace("|", r"\|").replace("<", "&lt;") for c in cells) + " |"
        )
    made = f"## {title}\n\n" + (f"{intro}\n\n" if intro else "") + "\n".join(lines) + "\n"
    text = PAGE.read_text()
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, flags=re.M | re.S)
    if WRITING:
        new = text.replace(found[0], made + "\n") if found else text.rstrip() + "\n\n" + made
        PAGE.write_text(new.rstrip() + "\n")
        return
    assert found is not None and found[0].strip() == made.strip(), (
        f"docs/faults.md does not say what happens under {title!r}: "
        "FTD_FAULTS=write pytest tests/test_faults.py"
    )


# ---- files of data sets --------------------------------------------------------------------------


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "a folder": folder,
    "a pipe": pipe,
    "the first 5 bytes": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "other bytes": lambda path: path.write_bytes(bytes(range(7, 200))),
}
TABLES = "v1.0-mini"
# data set -> how it is written, domain, and the files of it that are damaged
SETS: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    "nuScenes": (
        layouts.nuscenes,
        "singapore",
        (
            "samples/LIDAR_TOP/frame-0001.pcd.bin",
            "samples/CAM_FRONT/frame-0001.png",
            f"lidarseg/{TABLES}/frame-0001_lidarseg.bin",
            f"{TABLES}/scene.json",
            f"{TABLES}/sample_data.json",
            f"{TABLES}/calibrated_sensor.json",
            f"{TABLES}/category.json",
        ),
    ),
    "SemanticKITTI": (
        layouts.kitti,
        "skitti",
        (
            "sequences/00/velodyne/000000.bin",
            "sequences/00/image_2/000000.png",
            "sequences/00/labels/000000.label",
            "sequences/00/calib.txt",
        ),
    ),
    "Virtual KITTI": (
        layouts.virtual_kitti,
        "vkitti",
        ("vkitti_npy/0001/00000.npy", "vkitti_1.3.1_rgb/0001/fog/00000.png"),
    ),
    "A2D2": (
        layouts.a2d2,
        "a2d2",
        (
            "20180810_142822/camera/cam_front_center/20180810142822_camera_frontcenter_000000000.png",
            "20180810_142822/label/cam_front_center/20180810142822_label_frontcenter_000000000.png",
            "20180810_142822/lidar/cam_front_center/20180810142822_lidar_frontcenter_000000000.npz",
            "cams_lidars.json",
            "class_list.json",
        ),
    ),
    "Cityscapes": (
        dense_layouts.cityscapes,
        "cityscapes",
        (
            "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
            "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
            "disparity/train/aachen/aachen_000000_000019_disparity.png",
            "camera/train/aachen/aachen_000000_000019_camera.json",
        ),
    ),
    "GTA5": (dense_layouts.gta5, "gta5", ("images/00001.png", "labels/00001.png")),
    "SYNTHIA": (
        dense_layouts.synthia,
        "synthia",
        (
            "RAND_CITYSCAPES/RGB/0000000.png",
            "RAND_CITYSCAPES/GT/LABELS/0000000.png",
            "RAND_CITYSCAPES/Depth/Depth/0000000.png",
        ),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_files_of_a_data_set(name: str, tmp_path: Path) -> None:
    """Exit code 3, or 0 where frames are usable without that file."""
    write, domain, files = SETS[name]
    whole = write(tmp_path / "whole")
    rows = []
    for number, file in enumerate(files):
        for how, damage in DAMAGE.items():
            root = tmp_path / f"root{number}-{how.replace(' ', '-')}"
            shutil.copytree(whole, root)
            damage(root / file)
            cache = tmp_path / "cache" / root.name
            args = ("data", "prepare", root, "--domain", domain, "--split", "train")
            row = tried(f"`{file}`: {how}", *args, "--cache", cache, places={"ROOT": root})
            assert row.code in (0, 3), row
            assert row.code == 0 or "ROOT" in row.line, row
            rows.append(row)
    require_on_the_page(
        name,
        rows,
        f"`ftd data prepare ROOT --domain {domain}`. Exit code 0: the frames are usable without.",
    )


# ---- numbers that no camera has, labels that no data set has -------------------------------------


def number(path: str, *keys: Any) -> Callable[[Any, Path], None]:
    """Puts a number at a place in a JSON file."""

    def change(value: Any, root: Path) -> None:
        content = json.loads((root / path).read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (root / path).write_text(json.dumps(content))

    return change


def row_of(key: str, at: int) -> Callable[[Any, Path], None]:
    """Puts a number into a row of KITTI's calib.txt."""

    def change(value: Any, root: Path) -> None:
        path = root / "sequences/00/calib.txt"
        rows = dict(line.split(":") for line in path.read_text().splitlines())
        words = rows[key].split()
        words[at] = str(value)
        rows[key] = " ".join(words)
        path.write_text("".join(f"{name}: {row}\n" for name, row in rows.items()))

    return change


CAMERAS: dict[str, tuple[str, Callable[[Any, Path], None], tuple[Any, ...]]] = {
    "focal length": (
        "nuScenes",
        number(f"{TABLES}/calibrated_sensor.json", 1, "camera_intrinsic", 0, 0),
        (0, 1e-310, 1e308),
    ),
    "place of the camera": (
        "nuScenes",
        number(f"{TABLES}/calibrated_sensor.json", 1, "translation", 2),
        (1e308, -1e308),
    ),
    "rotation of the ego pose": (
        "nuScenes",
        number(f"{TABLES}/ego_pose.json", 0, "rotation"),
        ([0, 0, 0, 0], [1e-310, 0, 0, 0], [1e200, 1e200, 0, 0], [5, 0, 0, 0]),
    ),
    "focal length in P2": ("SemanticKITTI", row_of("P2", 0), (0, 1e-30, 1e30, 1e308, "nan")),
    "an axis in Tr": ("SemanticKITTI", row_of("Tr", 8), (0, 1e-30, 1e30, "inf")),
    "a shift in Tr": ("SemanticKITTI", row_of("Tr", 3), (1e30,)),
    "`CamMatrix`": (
        "A2D2",
        number("cams_lidars.json", "cameras", "front_center", "CamMatrix", 0, 0),
        (0, -80, 1e-310, 1e308),
    ),
    "`Distortion`": (
        "A2D2",
        number("cams_lidars.json", "cameras", "front_center", "Distortion", 0, 1),
        (1e308, "much"),
    ),
}
STRANGE = {  # data set -> file of labels, type
    "nuScenes": (f"lidarseg/{TABLES}/frame-0001_lidarseg.bin", "u1", 77),
    "SemanticKITTI": ("sequences/00/labels/000001.label", "<u4", 300),
}


def test_numbers_and_labels(tmp_path: Path) -> None:
    """What would empty frames, or put them on one pixel, or train on labels of another scheme."""
    rows: list[Row] = []

    def refused(what: str, name: str, change: Callable[[Path], object]) -> None:
        write, domain, _ = SETS[name]
        root = write(tmp_path / f"root{len(rows)}")
        change(root)
        args = ("data", "prepare", root, "--domain", domain, "--split", "train")
        places = {"ROOT": root}
        row = tried(f"{name}: {what}", *args, "--cache", tmp_path / "cache", places=places)
        assert row.code == 3 and "ROOT" in row.line, row
        rows.append(row)

    for what, (name, change, values) in CAMERAS.items():
        for value in values:
            refused(f"{what}: {value}", name, partial(change, value))
    for name, (file, kind, value) in STRANGE.items():

        def scribble(root: Path, file: str = file, kind: str = kind, value: int = value) -> None:
            labels = np.fromfile(root / file, kind)
            labels[3:5] = value
            labels.tofile(root / file)

        refused(f"two labels of {value}", name, scribble)
    require_on_the_page("Numbers and labels", rows, "`ftd data prepare ROOT`.")


# ---- checkpoints ---------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def meta(key: str, value: Any) -> Change:
    return lambda tensors, found: found.update({key: value})


def setting(key: str, value: Any) -> Change:
    return lambda tensors, found: found["recipe"].update({key: value})


def metas(key: str, *values: Any) -> dict[str, Change]:
    return {f"`{key}`: {json.dumps(value)}": meta(key, value) for value in values}


def without(key: str) -> Change:
    return lambda tensors, found: found.pop(key)


HEAD = "system/student.net_3d.main.weight"
OF_ANY: dict[str, Change] = {
    **metas("recipe", None, [], "small", {}, 3),
    **metas("iteration", -1, None, "six", 0.5),
    **metas("format", None, 1, "2", [2]),
    **{
        f"setting `{key}`: {json.dumps(value)}": setting(key, value)
        for key, values in {
            "width_2d": (-16, 0, None, "16", 17, 10**9),
            "width_3d": (-4, 0, 3, [4]),
            "image": ([0, 5], [48], None, [2, 40_000], "48,88"),
            "voxels_per_metre": (0, -1, None, 1e300),
            "eval_batch": (-1, 0, None, 2.5),
            "precision": ("fp64", None, 16),
            "fusion": ("no", 0, None),
            "classes": ("street7", None, ["street6"]),
            "dropout": ([0.4], None, ["a", "b"], [2, 3]),
            "gamma": (-1, None, "x"),
            "method": ("ours", None, 5),
            "scenario": (None, "", "usa"),
            "class_weights": ([1.0], [-1] * 6, [0] * 6, None),
            "novelty": (1,),
        }.items()
        for value in values
    },
    "a tensor is missing": lambda tensors, found: tensors.pop(HEAD),
    "a tensor of another shape": lambda tensors, found: tensors.update({HEAD: torch.zeros(7, 4)}),
    "a tensor of NaN": lambda tensors, found: tensors[HEAD].fill_(torch.nan),
    "a tensor that no network has": lambda tensors, found: tensors.update(
        {"system/student.more": torch.zeros(2)}
    ),
}


def a_copy(run: Path, to: Path, change: Change, *names: str) -> Path:
    """A run whose checkpoints were changed."""
    shutil.copytree(run, to)
    for name in names:
        path = to / f"{name}.safetensors"
        tensors, found = checkpoint.read_tensors(path, ""), checkpoint.read_metadata(path)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors, found)
        checkpoint.save(path, tensors, found)
    return to


def test_checkpoints(finished: Path, cache: Path, tmp_path: Path) -> None:
    rows = []
    for number, (what, change) in enumerate(OF_ANY.items()):
        run = a_copy(finished, tmp_path / f"run{number}", change, "best")
        args = ("eval", run, "--cache", cache, "--threads", 1, "--split", "val")
        row = tried(what, *args, places={"RUN": run})
        assert row.code == 1 and row.line.startswith("RUN/best.safetensors: "), row
        rows.append(row)
        shutil.rmtree(run)
    for how, damage in DAMAGE.items():
        run = tmp_path / f"run-{how.replace(' ', '-')}"
        shutil.copytree(finished, run)
        damage(run / "best.safetensors")
        args = ("eval", run, "--cache", cache, "--threads", 1, "--split", "val")
        row = tried(f"`best.safetensors`: {how}", *args, places={"RUN": run})
        assert row.code == 1, row
        rows.append(row)
    for what, at in {"one bit of its metadata": 200, "one bit of a tensor": -9}.items():
        run = tmp_path / what.replace(" ", "-")
        shutil.copytree(finished, run)
        path = run / "best.safetensors"
        content = bytearray(path.read_bytes())
        content[at if at < 0 else content.index(b"seed") + 8] ^= 1
        path.write_bytes(content)
        args = ("eval", run, "--cache", cache, "--threads", 1, "--split", "val")
        row = tried(f"`best.safetensors`: {what}", *args, places={"RUN": run})
        assert row.code == 1 and "not what was written" in row.line, row
        rows.append(row)
    require_on_the_page("Checkpoints", rows, "Metadata or tensors were changed; `ftd eval RUN`.")


OPTIMISER = "optimizer/all/"
OF_A_TRAINING: dict[str, Change] = {
    **metas("iteration", -3, None, "4", 10**9),
    **metas("seed", -1, None, "0", 7),
    **metas("best", [], {"iteration": 3}, "best"),
    **metas("given", None, [1], {}),
    **metas("data", None, {}, {"labelled": "x"}),
    **metas("processes", 0, 4, None),
    **{
        f"no `{key}`": without(key)
        for key in ("seed", "best", "validation_owed", "given", "data", "pseudo", "iteration")
    },
    "setting `lr_2d`: 1": setting("lr_2d", 1),
    "setting `steps`: 3": setting("steps", 3),
    "one optimiser tensor is missing": lambda tensors, found: tensors.pop(
        next(name for name in tensors if name.startswith(OPTIMISER))
    ),
    "all optimiser state is missing": lambda tensors, found: [
        tensors.pop(name) for name in list(tensors) if name.startswith(OPTIMISER)
    ],
    "an optimiser tensor of NaN": lambda tensors, found: tensors[
        next(name for name in tensors if name.endswith("/exp_avg"))
    ].fill_(torch.nan),
    "converted from released checkpoints": meta("converted_from", {"2d": "a.pth"}),
}


@pytest.fixture(scope="module")
def halfway(
    finished: Path, world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished run, put back to its fourth iteration: not at its end."""
    from ftdpp.tests.commands import stopped_in, train_args

    out = tmp_path_factory.mktemp("halfway") / "run"
    with stopped_in(2):
        assert ftd(*train_args(out, world, cache, "--device", "cpu", steps=4)).exit_code == 130
    return out


def test_resume(halfway: Path, tmp_path: Path) -> None:
    rows = []
    for number, (what, change) in enumerate(OF_A_TRAINING.items()):
        run = a_copy(halfway, tmp_path / f"run{number}", change, "last")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        row = tried(what, "train", "--resume", run, places={"RUN": run})
        assert row.code == 1 and row.line.startswith("RUN"), row
        left = {path.name: path.read_bytes() for path in run.iterdir()}
        assert {**left, ".lock": b""} == {**before, ".lock": b""}, f"{what}: a file has changed"
        rows.append(row)
        shutil.rmtree(run)
    for file in ("run.json", "last.safetensors"):
        for how, damage in DAMAGE.items():
            run = tmp_path / f"{file}-{how.replace(' ', '-')}"
            shutil.copytree(halfway, run)
            damage(run / file)
            row = tried(f"`{file}`: {how}", "train", "--resume", run, places={"RUN": run})
            assert row.code in (1, 2), row
            rows.append(row)
    require_on_the_page(
        "Resume",
        rows,
        "Metadata or tensors of `last.safetensors` were changed; `ftd train --resume RUN`.",
    )


# ---- pseudo-labels -------------------------------------------------------------------------------


def test_pseudo_labels(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    from ftdpp.tests.commands import train_args

    file = tmp_path / "whole.safetensors"
    made = ftd("pseudo", finished, "--out", file, "--cache", cache, "--threads", 1)
    assert made.exit_code == 0, made.output
    tensors = checkpoint.read_tensors(file, "")
    first = sorted(tensors)[0]
    some: dict[str, Change] = {
        "a label of 6 with six classes": lambda t, m: t[first].fill_(6),
        "a frame is missing": lambda t, m: t.pop(first),
        "a frame too many": lambda t, m: t.update(more=t[first].clone()),
        "one label too few": lambda t, m: t.update({first: t[first][1:].clone()}),
        "labels of 64 bits": lambda t, m: t.update({first: t[first].long()}),
        "one label changed": lambda t, m: t[first].__setitem__(0, (int(t[first][0]) + 1) % 6),
        "all labels 255": lambda t, m: [x.fill_(255) for x in t.values()],
        "no digest": lambda t, m: m.pop("labels"),
        "no `kept`": lambda t, m: m.pop("kept"),
        "`kept`: all 0": meta("kept", {"2d": [0] * 6, "3d": [0] * 6}),
        "`kept`: negative": meta("kept", {"2d": [-1] * 6, "3d": [0] * 6}),
        "`thresholds`: null": meta("thresholds", None),
        "of another method": meta("method", "xmuda"),
        "of another scenario": meta("scenario", "day-night"),
        "of other classes": meta("classes", "nuscenes16"),
        "of other frames": meta("content", "0"),
    }
    rows = []
    for what, change in some.items():
        path = tmp_path / "pseudo.safetensors"
        found = checkpoint.read_metadata(file)
        copy = {key: tensor.clone() for key, tensor in tensors.items()}
        change(copy, found)
        checkpoint.save(path, copy, found)
        args = train_args(tmp_path / "out", world, cache, "--pseudo", path, steps=1)
        row = tried(what, *args, places={"FILE": path})
        assert row.code == 1 and row.line.startswith("FILE: "), row
        assert not (tmp_path / "out" / "last.safetensors").exists()
        rows.append(row)
    require_on_the_page(
        "Pseudo-labels", rows, "A file of `ftd pseudo` was changed; `ftd train --pseudo FILE`."
    )


# ---- settings and options ------------------------------------------------------------------------

SETTINGS = (
    *("width_2d=17", "width_2d=0", "width_2d=wide", "width_3d=3", "width_3d=-4", "image=0,5"),
    *("image=48", "image=2,40000", "image=a,b", "voxels_per_metre=0", "voxels_per_metre=nan"),
    *("precision=fp64", "gamma=1e200", "gamma=-1", "lr_2d=-1", "lr_2d=inf", "steps=0", "batch=0"),
    *(
        "batch=-2",
        "eval_batch=0",
        "val_every=0",
        "save_every=-1",
        "accumulate=0",
        "classes=street7",
    ),
    *("class_weights=1,2", "class_weights=-1,1,1,1,1,1", "dropout=2,3", "dropout=0.1", "novelty=1"),
    *(
        "batch=100000",
        "crop=5",
        "ema=2",
        "fusion=no",
        "student_mix=7",
        "fda_beta=9",
        "milestones=x",
        "image",
        "=3",
    ),
)


def test_settings(tmp_path: Path) -> None:
    rows = []
    for text in SETTINGS:
        args = ("train", "--src", "usa", "--tgt", "singapore", "--preset", "small", "--set", text)
        where = ("--out", tmp_path / "out", "--data", tmp_path)
        row = tried(f"`--set {text}`", *args, *where, places={})
        assert row.code == 2, row
        rows.append(row)
    assert not (tmp_path / "out").exists()
    require_on_the_page("Settings", rows, "`ftd train --src usa --tgt singapore --set ...`.")


PAIR = "train --src usa --tgt singapore --preset small"
OPTIONS = (
    *(f"{PAIR} --workers 100000", f"{PAIR} --workers -1", f"{PAIR} --threads 0"),
    *(f"{PAIR} --steps 0", f"{PAIR} --seed -1", f"{PAIR} --seed one", f"{PAIR} --preset large"),
    *(f"{PAIR} --src-frames ''", f"{PAIR} --val-frames ,", f"{PAIR} --device tpu"),
    *(f"{PAIR} --pretrained nowhere.pth", f"{PAIR} --pseudo nowhere.safetensors"),
    *(f"{PAIR} --method ftd++", f"{PAIR} --method weak --ssda", f"{PAIR} --clip street"),
    *("train --src usa", "train --src mars --tgt singapore", "train --src vkitti --tgt singapore"),
    *("train --resume nowhere", "train --from nowhere --tgt singapore"),
    *("train --src usa --tgt night --data nowhere", "train --nope", "trian"),
    *("eval nowhere", "eval nowhere.safetensors", "pseudo nowhere --out a.safetensors"),
    *("predict nowhere --out labels", "report nowhere", "show nowhere 0 --out a.png"),
    *("table nowhere", "compare --methods xmuda,ftd++", "compare --seeds one --preset small"),
    *("compare --sweep lr_2d --preset small", "compare --src usa,day --tgt singapore"),
    *("compare --jobs 0", "clip --domain mars", "recipes --scenario usa", "data check nowhere"),
    *("data check . --domain usa", "data prepare . --domain singapore --size 200000,200000"),
    *("data prepare . --domain singapore --size 0,5", "data synth w --frames 1,2"),
    "data synth w --frames 1000000000,1,1,1",
    *("data synth w --src usa --tgt night", "doctor --device tpu"),
)


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written by a command that is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "cache"))
    rows = []
    for text in OPTIONS:
        row = tried(f"`ftd {text}`", *shlex.split(text), places={"HERE": tmp_path})
        assert row.code in (1, 2, 3), row
        rows.append(row)
        assert not list(tmp_path.iterdir()), row
    require_on_the_page("Options", rows)


# ---- logs, tables, and where results are written -------------------------------------------------


def test_files_of_a_run(finished: Path, cache: Path, tmp_path: Path) -> None:
    """What reads them names them; what writes them loses nothing."""
    rows = []
    for file, words in {
        "run.json": ("eval",),
        "log.csv": ("report", "--count", 0),
        "val.csv": ("report", "--count", 0),
        "scores.json": ("table",),
    }.items():
        for how, damage in DAMAGE.items():
            run = tmp_path / f"{file}-{how.replace(' ', '-')}"
            shutil.copytree(finished, run)
            (run / "scores.json").write_text("{}")
            damage(run / file)
            args = [words[0], run, *words[1:]]
            if words[0] != "table":
                args += ["--cache", cache, "--threads", 1]
            if words[0] == "report":
                args += ["--out", tmp_path / "report.html"]
            row = tried(f"`ftd {words[0]} RUN`, `{file}`: {how}", *args, places={"RUN": run})
            assert row.code in (0, 1, 2, 3), row
            rows.append(row)
    for content in (
        "",
        "{}",
        "[]",
        '{"rows": 3}',
        '{"command": "", "machine": "", "preset": "", "rows": [1]}',
    ):
        path = tmp_path / "compare.json"
        path.write_text(content)
        row = tried(f"`ftd table FILE` of `{content}`", "table", path, places={"FILE": path})
        assert row.code == 1 and "FILE" in row.line, row
        rows.append(row)
    require_on_the_page("Files of a run", rows)


def test_where_results_go(finished: Path, cache: Path, tmp_path: Path) -> None:
    """A run's own file is never replaced, nor is what is no result of the same kind."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    place, device = tmp_path / "a-folder", tmp_path / "a-pipe.png"
    place.mkdir()
    os.mkfifo(device)
    endings = {"pseudo": "txt", "export": "safetensors", "report": "html", "show": "png"}
    own = {name: tmp_path / f"thesis.{ending}" for name, ending in endings.items()}
    for path in own.values():
        path.write_text("mine")
    known = {"RUN": run, "FOLDER": place, "HERE": tmp_path, "NAME": Path("a" * 240)}
    rows = []
    for words in (["pseudo", run], ["export", run], ["report", run], ["show", run, 0]):
        for out, name in (
            (run / "last.safetensors", "RUN/last.safetensors"),
            (run / "run.json", "RUN/run.json"),
            (place, "a folder"),
            (tmp_path / "missing\0", "a name with a NUL"),
            (tmp_path / f"{'a' * 240}.{endings[words[0]]}", "a name of more than 240 characters"),
            (own[words[0]], "a file of somebody's own"),
            (device, "a pipe"),
        ):
            args = [*words, "--out", out, "--threads", 1, "--cache", cache]
            args = args[: -4 if words[0] == "export" else None] if words[0] != "show" else args[:-2]
            row = tried(f"`ftd {words[0]} RUN --out` {name}", *args, places=known)
            assert row.code == 2, row
            rows.append(row)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert {path.read_text() for path in own.values()} == {"mine"}
    require_on_the_page("Where results go", rows)
