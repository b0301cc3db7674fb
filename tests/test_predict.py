"""Labels as the benchmarks take them: what a benchmark would read is what the network said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ftdpp import inference, readers, systems
from ftdpp.readers import DataError
from ftdpp.tests import dense_layouts, layouts
from ftdpp.tests.commands import ftd, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")

NONE = 255


def a_system(scenario: str, *settings: str, method: str = "source-only") -> systems.System:
    chosen = ["image=48,88", "width_2d=16", *settings]
    return systems.build(systems.recipe(scenario, method, "small", overrides=chosen)).eval()


def last_head(system: systems.System, ref: readers.FrameRef) -> np.ndarray:
    return inference.label_heads(system, ref)[system.heads[-1]]


def predicted(root: Path, domain: str, split: str, system: systems.System, out: Path) -> list[Path]:
    row = readers.domains()[domain]
    refs = readers.list_frames(root, row, split)
    count = inference.write_predictions(system, refs, split, out)
    reader = readers.reader_of(row)
    files = [out / reader.prediction_path(ref, split) for ref in refs]
    labels = [last_head(system, ref) for ref in refs]
    assert count == sum(int((label != NONE).sum()) for label in labels) > 0
    assert sorted(files) == sorted(path for path in out.rglob("*") if path.is_file())
    return files


def test_semantic_kitti(tmp_path: Path) -> None:
    """Sequences without labels; read back as labels the files give the predicted classes."""
    root = layouts.kitti(tmp_path / "kitti")
    system = a_system("skitti-skitti", "classes=skitti19", "width_3d=4")
    files = predicted(root, "kitti", "hidden", system, tmp_path / "out")
    assert files[0] == tmp_path / "out/sequences/11/predictions/000000.label"
    row = readers.domains()["kitti"]
    reader = readers.reader_of(row)
    refs = readers.list_frames(root, row, "hidden")
    seen = set()
    for ref, path in zip(refs, files, strict=True):
        stored = np.fromfile(path, np.uint32)
        label = last_head(system, ref)
        assert len(stored) == len(reader.read(ref).points)
        names = reader.categories(ref)
        for raw, c in set(zip(stored.tolist(), label.tolist(), strict=True)):
            assert (raw == 0) == (c == NONE)
            if raw:
                assert raw < 252, "what moves is not told apart"
                assert names[raw] == reader.classes["skitti19"][c].split(", ")[0]
                seen.add(c)
        rows, _, _ = reader.project(reader.read(ref), ref)
        assert set(np.flatnonzero(label != NONE)) <= set(rows), "what the camera sees, no more"
    assert seen


def test_nuscenes(tmp_path: Path) -> None:
    """Without lidarseg; files are called after the sweep, classes count from 1."""
    root = layouts.nuscenes(tmp_path / "nuscenes", "v1.0-trainval", labelled=False)
    system = a_system("usa-singapore", "classes=nuscenes16", "width_3d=4")
    row = readers.domains()["singapore"]
    split = next(name for name in row.splits if readers.list_frames(root, row, name))
    files = predicted(root, "singapore", split, system, tmp_path / "out")
    ref = readers.list_frames(root, row, split)[0]
    assert files[0].parent == tmp_path / "out/lidarseg" / split
    assert files[0].name == f"{ref.stem}_lidarseg.bin" and ref.stem != ref.token
    label, stored = (last_head(system, ref), np.fromfile(files[0], np.uint8))
    assert np.array_equal(stored, np.where(label == NONE, 0, label + 1))
    outside = dataclasses.replace(ref, stem="../../gone")
    with pytest.raises(DataError, match="no file name"):
        inference.write_predictions(system, [outside], split, tmp_path / "out")
    assert not (tmp_path / "gone_lidarseg.bin").exists()


def test_cityscapes(tmp_path: Path) -> None:
    """At the photo's size, in label ids: the reader takes them for labels."""
    root = dense_layouts.cityscapes(tmp_path / "cityscapes")
    system = a_system("gta5-cityscapes")
    files = predicted(root, "cityscapes", "val", system, tmp_path / "out")
    shutil.rmtree(root / "gtFine")
    for path in files:
        place = root / "gtFine" / path.relative_to(tmp_path / "out")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    row = readers.domains()["cityscapes"]
    reader = readers.reader_of(row)
    for ref in readers.list_frames(root, row, "val"):
        raw = reader.read(ref)
        assert raw.labels is not None and raw.labels.shape == (24, 40)
        names = np.array([reader.categories(ref)[i] for i in raw.labels.flat])
        said = np.array(reader.classes["cityscapes19"])[last_head(system, ref)]
        assert np.array_equal(names, said.flat)


def test_a_data_set_without_a_benchmark(tmp_path: Path) -> None:
    root = dense_layouts.gta5(tmp_path / "gta5")
    system = a_system("gta5-cityscapes")
    files = predicted(root, "gta5", "train", system, tmp_path / "out")
    row = readers.domains()["gta5"]
    ref = readers.list_frames(root, row, "train")[0]
    assert np.array_equal(np.load(files[0]), last_head(system, ref))


def test_labels_are_not_read_and_points_keep_their_place(tmp_path: Path) -> None:
    """Broken labels do not matter; a point that is not finite stays without a label."""
    root = layouts.kitti(tmp_path / "kitti", ("08",), 1)
    system = a_system("skitti-skitti", "width_3d=4")
    row = readers.domains()["skitti"]
    [ref] = readers.list_frames(root, row, "test")
    whole = last_head(system, ref)
    assert ref.label_path is not None and ref.points_path is not None
    ref.label_path.write_bytes(b"torn")
    points = np.fromfile(ref.points_path, np.float32).reshape(-1, 4)
    np.insert(points, 3, np.nan, axis=0).tofile(ref.points_path)
    assert np.array_equal(last_head(system, ref), np.insert(whole, 3, NONE))


def test_the_command(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    where = ("--cache", cache, "--threads", 1)
    result = ftd("predict", finished, "--out", out, *where, "--overlay", tmp_path / "p",
                 "--count", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "points that the camera sees" in words(result) and "2D+3D head" in words(result)
    assert len(list((out / "lidarseg" / "test").glob("*_lidarseg.bin"))) == 2
    assert len(list((tmp_path / "p").glob("*.png"))) == 1
    told = ftd("predict", finished, "--out", tmp_path / "more", *where, "--json")
    about = json.loads(told.stdout)
    assert about.pop("labelled") == sum(
        int((np.fromfile(path, np.uint8) > 0).sum()) for path in (out / "lidarseg").rglob("*.bin")
    )
    wanted = {"domain": "singapore", "split": "test", "files": 2, "head": "2d+3d"}
    assert about.pop("method").startswith("ftdpp[steps=6,")
    assert about == {"out": str(tmp_path / "more"), **wanted}
    again = ftd("predict", finished, "--out", out, *where)
    assert again.exit_code == 2 and "is there and not empty" in words(again)
    wrong = ftd("predict", finished, "--out", tmp_path / "x", "--split", "nope", *where)
    assert wrong.exit_code == 2 and "singapore has" in words(wrong)
    source = ("--domain", "usa", "--data", world, "--split", "test", *where)
    none = ftd("predict", finished, "--out", tmp_path / "y", *source)
    assert none.exit_code == 3 and "no frame of usa test" in words(none)
    assert not (tmp_path / "y").exists()
