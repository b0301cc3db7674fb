"""Readers: splits, class maps, projection, damaged files, a toy data set; on real frames, too."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp import data, index, readers
from ftdpp.data import CLASS_SETS, IGNORE, Augment, class_table, common_class_sets, sample
from ftdpp.index import original_frames, prepare, require_labels
from ftdpp.readers import (
    READERS,
    DataError,
    Domain,
    RawFrame,
    check,
    list_frames,
    nuscenes,
    semantic_kitti,
)
from ftdpp.tests import layouts
from ftdpp.tests.layouts import (
    A2D2,
    CATEGORIES,
    DAY,
    KITTI,
    NIGHT,
    NUSCENES,
    POINTS,
    REALDATA,
    SCENES,
    SINGAPORE,
    SKITTI,
    USA,
    VKITTI,
    cut,
    picture,
    real,
    write,
)
from ftdpp.tests.toy import Toy, write_toy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.nuscenes(tmp_path / "nuscenes")


def scenes_of(root: Path, domain: Domain, split: str | None, **kw: Any) -> list[str]:
    return [ref.scene[-4:] for ref in list_frames(root, domain, split, **kw)]


# ---- splits and classes -------------------------------------------------------------------------


def test_scene_lists() -> None:
    n = nuscenes
    lists = (n.VAL_NIGHT, n.VAL_SINGAPORE, n.SSDA_LABELLED, n.SSDA_TRAIN, n.OFFICIAL_VAL)
    assert [len(scenes) for scenes in lists] == [15, 69, 72, 241, 150]
    assert n.SSDA_LABELLED < n.SSDA_TRAIN
    assert not n.OFFICIAL_VAL & (n.SSDA_TRAIN | n.VAL_SINGAPORE | n.VAL_NIGHT)
    assert not n.VAL_SINGAPORE & n.SSDA_TRAIN
    assert {"1044"} == n.VAL_NIGHT & n.VAL_SINGAPORE


def test_official_numbers_of_frames() -> None:
    """Every key frame is in one split of each pair; KITTI's follow from its sequences' lengths."""
    for pair in ((USA, SINGAPORE), (DAY, NIGHT)):
        parts = [d.frames[s] for d in pair for s in ("train", "val", "test") if s in d.frames]
        assert sum(parts) == 34149
    assert sum(NUSCENES.frames.values()) == 34149
    for domain in (SINGAPORE, NUSCENES, SKITTI, KITTI, VKITTI, A2D2):
        assert set(domain.frames) == set(domain.splits)
    halves = SINGAPORE.frames["train_labelled"] + SINGAPORE.frames["train_unlabelled"]
    assert halves == SINGAPORE.frames["train"]
    lengths = [
        4541, 1101, 4661, 801, 271, 2761, 1101, 1101, 4071, 1591, 1201,
        921, 1061, 3281, 631, 1901, 1731, 491, 1801, 4981, 831, 2721,
    ]  # fmt: skip
    for domain in (SKITTI, KITTI):
        for split, sequences in semantic_kitti.SEQUENCES[domain.name].items():
            assert sum(lengths[int(s)] for s in sequences) == domain.frames[split], split


def test_domains_and_readers_name_each_other() -> None:
    names = ["usa", "singapore", "day", "night", "nuscenes", "skitti", "kitti", "vkitti", "a2d2"]
    assert [name for name in readers.domains() if name in names] == names
    for name, reader in READERS.items():
        assert reader.name == name and all(d.reader == name for d in reader.domains)
        for classes, members in reader.classes.items():
            assert len(members) == len(CLASS_SETS[classes])
    assert USA.splits == ("train", "test")
    assert SKITTI.splits[3:] == ("train_labelled", "train_unlabelled")
    assert SINGAPORE.flip_axis == NUSCENES.flip_axis == 0
    assert all(domain.flip_axis == 1 for domain in (SKITTI, KITTI, VKITTI, A2D2))


def test_common_class_sets() -> None:
    assert common_class_sets(USA, SINGAPORE) == ["street6", "nuscenes16"]
    assert common_class_sets(USA, SKITTI) == common_class_sets(SKITTI, USA) == ["street6"]
    assert common_class_sets(SKITTI, KITTI) == ["street6", "vkitti6", "a2d2_10", "skitti19"]
    assert common_class_sets(VKITTI, SKITTI) == ["vkitti6"]
    assert common_class_sets(A2D2, SKITTI) == ["a2d2_10"]
    assert common_class_sets(A2D2, VKITTI) == []


def test_data_knows_no_data_set_by_name() -> None:
    text = "".join(Path(str(m.__file__)).read_text().lower() for m in (data, index))
    names = {*READERS, *readers.domains(), "kitti", "semantickitti", "a2d2", "vkitti", "lidarseg"}
    assert not [name for name in names if re.search(rf"\b{name}\b", text)]


def test_nuscenes_splits(root: Path) -> None:
    assert scenes_of(root, SINGAPORE, "train") == ["0001", "0002", "1100"]
    assert scenes_of(root, SINGAPORE, "val") == ["0004", "1044"]
    assert scenes_of(root, SINGAPORE, "test") == ["0003", "1060"]
    assert scenes_of(root, SINGAPORE, "train_labelled") == ["0002"]
    assert scenes_of(root, SINGAPORE, "train_unlabelled") == ["0001", "1100"]
    assert scenes_of(root, USA, "train") == ["0200"] and scenes_of(root, USA, "test") == []
    assert scenes_of(root, NIGHT, "train") == ["1100"]
    assert scenes_of(root, NIGHT, "val") == ["1044"]
    assert scenes_of(root, NIGHT, "test") == ["1060"]
    assert scenes_of(root, DAY, "train") == ["0001", "0002", "0004", "0200"]
    both = scenes_of(root, DAY, None) + scenes_of(root, NIGHT, None)
    assert sorted(both) == sorted(scene[0][-4:] for scene in SCENES)
    assert scenes_of(root, NUSCENES, "train") == ["0001", "0002", "0004", "0200", "1044", "1100"]
    assert scenes_of(root, NUSCENES, "val") == ["0003", "1060"]
    assert scenes_of(root, USA, None, frames=["frame-0200"]) == ["0200"]


@pytest.mark.parametrize(
    ("token", "split", "message"),
    [
        ("frame-9999", None, r"no frame 'frame-9999' in singapore \(7 frames found\)$"),
        ("frame-0004", "train_labelled", r"in singapore/train_labelled \(1 frame found\); it bel"),
        ("frame-0200", None, r"in singapore \(7 frames found\); it belongs to usa, day, nuscenes$"),
    ],
)
def test_unknown_frame(root: Path, token: str, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list_frames(root, SINGAPORE, split, frames=[token])


def test_unknown_split(root: Path) -> None:
    wrong = r"day has no split 'val': a source domain has no validation split.*type one of train, "
    with pytest.raises(DataError, match=wrong):
        list_frames(root, DAY, "val")
    with pytest.raises(DataError, match=r"singapore has no split 'trian': type one of train, val"):
        list_frames(root, SINGAPORE, "trian")


def test_versions(root: Path) -> None:
    layouts.nuscenes(root, "v1.0-trainval", scenes=SCENES[:1])
    assert scenes_of(root, SINGAPORE, None) == ["0001"]
    mini = scenes_of(root, SINGAPORE, None, version="v1.0-mini")
    assert len(mini) == len(SCENES) - 1  # one is in Boston
    with pytest.raises(DataError, match=r"no folder v1\.0-test in it"):
        list_frames(root, SINGAPORE, None, "v1.0-test")
    with pytest.raises(DataError, match=r"no folder v1\.0-trainval or v1\.0-mini in it"):
        list_frames(root / "samples", SINGAPORE, None)


def test_a_root_that_is_no_folder(root: Path) -> None:
    (root / "file").touch()
    for domain, reader in ((SINGAPORE, "nuscenes"), (SKITTI, "semantic_kitti")):
        for use in (list_frames, lambda path, domain, split: check(path, domain)):
            with pytest.raises(DataError, match=rf"none: there is no such folder.*{reader} data"):
                use(root / "none", domain, "train")
            with pytest.raises(DataError, match="file: is a file"):
                use(root / "file", domain, "train")


def test_kitti_splits(tmp_path: Path) -> None:
    layouts.kitti(tmp_path / "dataset")
    for root in (tmp_path, tmp_path / "dataset"):
        labelled = list_frames(root, SKITTI, "train_labelled")
        assert [ref.token for ref in labelled] == ["00/000000", "00/000001"]
    assert set(scenes_of(tmp_path, SKITTI, "train_unlabelled")) == {"02", "11"}
    assert set(scenes_of(tmp_path, SKITTI, "val")) == {"07"}
    assert set(scenes_of(tmp_path, SKITTI, "test")) == {"08"}
    assert set(scenes_of(tmp_path, KITTI, "train")) == {"00", "02", "07"}
    assert set(scenes_of(tmp_path, KITTI, "val")) == {"08"}
    assert set(scenes_of(tmp_path, KITTI, "hidden")) == {"11"}
    assert not any(ref.label_path for ref in list_frames(tmp_path, KITTI, "hidden"))
    with pytest.raises(DataError, match="no folder sequences"):
        list_frames(tmp_path / "dataset" / "sequences" / "00", SKITTI, "train")


def test_class_tables() -> None:
    kitti, nus = READERS["semantic_kitti"], READERS["nuscenes"]
    ref: Any = None  # the ids of SemanticKITTI are the same in every frame

    def of_kitti(classes: str, ids: tuple[int, ...]) -> list[int]:
        table = class_table(kitti, classes, kitti.categories(ref))
        assert table.dtype == np.uint8 and set(table) == {*range(len(CLASS_SETS[classes])), 255}
        return table[list(ids)].tolist()

    found = of_kitti("a2d2_10", (10, 252, 30, 254, 40, 60, 13, 257, 72, 52))
    assert found == [0, 0, 3, 3, 4, 4, 255, 255, 8, 255]
    # parking, sidewalk, bike, person
    assert of_kitti("vkitti6", (44, 48, 11, 30, 10, 259)) == [255, 255, 255, 255, 5, 255]
    assert of_kitti("street6", (10, 252, 40, 72, 99, 30, 259)) == [0, 0, 1, 3, 4, 255, 0]
    table = class_table(nus, "street6", dict(enumerate(CATEGORIES)))
    assert list(table[:6]) == [255, 0, 1, 2, 255, 255]
    # bus, on-rails, moving bus; moving person, lane marking, parking; ignored: 0, 1, 52, 99
    found = of_kitti("skitti19", (13, 16, 257, 254, 60, 44, 81, 0, 1, 52, 99))
    assert found == [4, 4, 4, 5, 8, 9, 18, 255, 255, 255, 255]
    table = class_table(nus, "nuscenes16", dict(enumerate([*CATEGORIES, "vehicle.ego"])))
    assert list(table[:7]) == [255, 3, 10, 12, 6, 255, 255]
    with pytest.raises(DataError, match=r"no class map from nuscenes to vkitti6.*street6"):
        class_table(nus, "vkitti6", {})


# ---- reading and projecting ---------------------------------------------------------------------


def test_project_nuscenes_in_words(root: Path) -> None:
    ref = list_frames(root, SINGAPORE, None, frames=["frame-0001"])[0]
    xyz = np.array([[0, 10, 0], [1, 10, 0.5], [0, -10, 0], [7, 10, 0]], np.float32)
    raw = RawFrame(picture(0, 400, 225), xyz)
    kept, row_col, depth = READERS["nuscenes"].project(raw, ref)
    assert kept.tolist() == [0, 1]  # behind the camera; outside the image
    np.testing.assert_allclose(row_col, [[112, 200], [112 - 15, 230]], atol=1e-3)
    np.testing.assert_allclose(depth, [10, 10], atol=1e-5)


def test_project_kitti_in_words(tmp_path: Path) -> None:
    ref = list_frames(layouts.kitti(tmp_path), SKITTI, "test")[0]
    xyz = np.array([[10, 0, 0], [-10, 0, 0], [10, 5, 1], [10, 20, 0]], np.float32)
    kept, row_col, depth = READERS["semantic_kitti"].project(
        RawFrame(picture(0, 320, 120), xyz), ref
    )
    assert kept.tolist() == [0, 2]
    np.testing.assert_allclose(row_col, [[60, 160], [40, 60]], atol=1e-3)
    assert depth.dtype == np.float32 and depth.tolist() == [10, 10]


def test_read(root: Path) -> None:
    raw = READERS["nuscenes"].read(list_frames(root, SINGAPORE, "train")[0])
    assert raw.points is not None and raw.points.shape == (POINTS, 4)
    assert raw.image.size == (400, 225)
    assert raw.labels is not None and raw.labels.shape == (POINTS,)


def test_ids_and_rotation() -> None:
    assert readers.ids("3 12-14") == {"0003", "0012", "0013", "0014"}
    assert readers.ids("7-9", 2) == {"07", "08", "09"}
    quarter = readers.rotation([2, 0, 0, 2])  # about z; any length
    np.testing.assert_allclose(quarter, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15)


CALIBRATION = "v1.0-mini/calibrated_sensor.json"
SWEEP = "samples/LIDAR_TOP/frame-0001.pcd.bin"
PHOTO = "samples/CAM_FRONT/frame-0001.png"
TABLE = "v1.0-mini/sample_data.json"
LABELS = "lidarseg/v1.0-mini/frame-0001_lidarseg.bin"


def swap(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


CORRUPTIONS: list[tuple[str, Callable[[Path], object], str]] = [
    (SWEEP, cut, "expected a multiple of 20"),
    (SWEEP, lambda path: path.write_bytes(b""), "0 bytes"),
    (SWEEP, Path.unlink, r"missing; download what is missing"),
    (PHOTO, lambda path: path.write_bytes(path.read_bytes()[:9000]), "not a readable image"),
    (PHOTO, lambda path: path.write_bytes(b"no image"), "not a readable image"),
    (PHOTO, lambda path: picture(0, 40, 20).save(path), r"\(20, 40\).*\(225, 400\)"),
    (PHOTO, Path.unlink, "missing"),
    (LABELS, cut, "57 labels for 60 points"),
    (LABELS, Path.unlink, "missing"),
    ("v1.0-mini/ego_pose.json", Path.unlink, "missing"),
    ("v1.0-mini/sample_data.json", cut, "not a readable nuScenes table"),
    ("v1.0-mini/scene.json", lambda path: path.write_text("{}"), "not a readable nuScenes table"),
    ("v1.0-mini/log.json", lambda path: path.write_text("[]"), "do not fit together"),
    # Files outside of the root are never read.
    (TABLE, swap('"samples/', '"../samples/'), r"\.\./samples.*expected a path below"),
    (TABLE, swap('"samples/', '"/etc/'), "expected a path below"),
    ("v1.0-mini/lidarseg.json", swap('"lidarseg/', '"../'), "expected a path below"),
    (
        "v1.0-mini/category.json",
        swap('"index": 1}', '"index": 1000000000}'),
        r"row 1: .* <= 255.*index",
    ),
    ("v1.0-mini/category.json", swap('"index": 1}', '"index": -1}'), r"row 1: .* >= 0.*index"),
    (
        "v1.0-mini/category.json",
        swap('"index": 1}', '"index": 0}'),
        "two categories have one index",
    ),
    ("v1.0-mini/category.json", swap('"index": 1}', '"index": 1.5}'), "Expected `int`"),
    ("v1.0-mini/category.json", swap('"index": 1}', '"index": "1"}'), "Expected `int`"),
    (
        "v1.0-mini/category.json",
        swap('"index": 1}', '"other": 1}'),
        "missing required field `index`",
    ),
    (
        "v1.0-mini/sample.json",
        swap('"timestamp": 1', '"timestamp": null, "x": 1'),
        "Expected `int`",
    ),
    ("v1.0-mini/scene.json", swap('"name": "', '"name": null, "x": "'), r"Expected `str`.*name"),
    (
        "v1.0-mini/scene.json",
        swap('"name": "', '"name": "\\ud800'),
        "not a readable nuScenes table",
    ),
    ("v1.0-mini/log.json", swap('"token": "', '"token": ["a"], "x": "'), r"Expected `str`.*token"),
    (TABLE, swap('"samples/', '"samples/\\u0000'), "expected a path below"),
    ("v1.0-mini/scene.json", lambda path: path.write_text("[1, 2]"), "Expected `object`"),
    ("v1.0-mini/scene.json", lambda path: path.write_text("[" * 100_000), "not a readable"),
    (
        "v1.0-mini/ego_pose.json",
        swap('"translation": [0', '"translation": [1' + "0" * 400),
        "Number out of range",
    ),
    # Only PNG and JPEG: Pillow hands PostScript to another program.
    (
        PHOTO,
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "not a readable image",
    ),
    (PHOTO, lambda path: picture(0, 40, 20).save(path, "BMP"), "not a readable image"),
    (PHOTO, lambda path: Image.new("1", (5000, 5000)).save(path), "more than 16777216 pixels"),
    (CALIBRATION, swap("300", "NaN"), "JSON is malformed"),
    (CALIBRATION, swap("300", '"x"'), "Expected `float`"),
]


@pytest.mark.parametrize(("file", "damage", "message"), CORRUPTIONS)
def test_nuscenes_corruption(
    root: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(root / file)
    name = Path(file).name if "do not fit" not in message else "v1.0-mini"
    with pytest.raises(DataError, match=message) as caught:
        prepare(root, SINGAPORE, "train", "street6", (112, 200), root.parent / "cache")
    assert name in str(caught.value)


def test_kitti_corruption(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare(home, SKITTI, "train", "street6", None, tmp_path / "cache")
        shutil.rmtree(home)
        layouts.kitti(home, ("00",))

    home = layouts.kitti(tmp_path / "kitti", ("00",))
    base = home / "sequences/00"
    cut(base / "velodyne/000001.bin")
    refused(r"000001\.bin.*multiple of 16")
    write(base / "labels/000001.label", np.zeros(7, np.uint32))
    refused(r"000001\.label: 7 labels for 60 points")
    write(base / "labels/000001.label", np.full(POINTS, 300, np.uint32))
    refused(rf"000001\.label: label ids 300 \({POINTS} rows\), which the data set does not have")
    (base / "calib.txt").unlink()
    refused(r"calib\.txt: missing")
    write(base / "calib.txt", "P2: 1 2 3\n")
    refused(r"calib\.txt.*12 numbers")
    write(base / "calib.txt", f"P2: {'nan ' * 12}\nTr: {'0 ' * 12}\n")
    refused(r"calib\.txt.*focal length \(pixels\) of nan")
    (base / "image_2/000000.png").unlink()
    refused(r"000000\.png: missing; download")
    shutil.rmtree(base / "image_2")
    refused(r"000000\.png: missing, and 1 more file; download")
    write(
        base / "calib.txt", "P2: 200 0 9999 0 0 200 60 0 0 0 1 0\nTr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
    )
    refused("no point of 2 frames lies in its image")


# ---- what there is ------------------------------------------------------------------------------


def test_check(root: Path) -> None:
    rows = {row["split"]: row for row in check(root, SINGAPORE)}
    assert list(rows) == list(SINGAPORE.splits)
    train = rows["train"]
    assert (train["scenes"], train["frames"], train["labelled"], train["missing"]) == (3, 3, 3, 0)
    assert train["expected"] == 9665 and "3 of 9665 frames" in train["note"]
    (root / "samples/CAM_FRONT/frame-0001.png").unlink()
    (root / "v1.0-mini/lidarseg.json").unlink()
    row = check(root, SINGAPORE)[0]
    assert row["missing"] == 1
    assert re.search(r"; 1 file missing, first .*frame-0001\.png: download", row["note"])
    assert "; 3 frames without labels: usable" in row["note"]
    assert "or add lidarseg.json and the lidarseg folder" in row["note"]
    assert check(root, USA)[1]["note"] == "no frame of this split here"


def test_check_says_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "toy", Toy())
    root = write_toy(tmp_path)
    rows = {row["split"]: row for row in check(root, Toy.domains[0])}
    assert rows["test"]["note"] == rows["train"]["note"] == "complete"
    (root / "wood/test/0.labels").unlink()
    (root / "wood/test/1.points").unlink()
    note = check(root, Toy.domains[0])[2]["note"]
    assert note.startswith("1 of 2 frames: part of the data set")
    assert "1 frame without labels" in note and note.endswith(f"or add {Toy.label_files}")


# ---- a third data set ---------------------------------------------------------------------------


def test_toy_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reader, one row; everything else stays as it is."""
    monkeypatch.setitem(READERS, "toy", Toy())
    root = write_toy(tmp_path / "toy")
    wood, brick = (readers.domains()[name] for name in ("wood", "brick"))
    assert common_class_sets(wood, USA) == common_class_sets(brick, wood) == ["street6"]
    assert len(list_frames(root, wood, None)) == 6 and len(list_frames(root, brick, "val")) == 2

    index = prepare(root, brick, "train", "street6", Toy.image, tmp_path / "cache")
    assert index.tokens == ["brick/train/0", "brick/train/1"] and index.title == "brick/train"
    assert index.identity["dataset"] == "toy" and index.fingerprint["files"]["count"] == 7
    frame = index.frame(0)
    assert frame.image.shape == (60, 100, 3) and len(frame.xyz) > 100
    height = frame.xyz[:, 2]  # the lowest points are sky, which no class takes; then cars, roads
    assert set(frame.label) == {0, 1, 4, 5, 255}
    np.testing.assert_array_equal(frame.label == 255, height < -1.5)
    np.testing.assert_array_equal(frame.label == 5, height >= 1.5)
    row = (60 - 150 * frame.xyz[:, 2] / frame.xyz[:, 0]).astype(np.float32)
    np.testing.assert_array_equal(frame.pixel[:, 0], (np.floor(row) / 2).astype(int))

    s = sample(frame, Augment(crop=(40, 60)), brick.flip_axis, np.random.default_rng(0))
    assert s.image.shape == (3, 40, 60) and set(s.label.tolist()) <= {0, 1, 4, 5, IGNORE}
    batch = data.collate([s, s])
    assert batch.tokens == ["brick/train/0"] * 2
    assert next(original_frames(index, [0])).image.shape == (120, 200, 3)

    (root / "camera.txt").touch()  # a table of the data set: the index depends on it
    told: list[str] = []
    prepare(
        root, brick, "train", "street6", Toy.image, tmp_path / "cache",
        progress=lambda done, total, what: told.append(what),
    )  # fmt: skip
    assert told[0] == "building again, changed since: sources"
    (root / "brick/train/1.labels").unlink()
    index = prepare(root, brick, "train", "street6", Toy.image, tmp_path / "cache")
    message = r"1 of 2 frames of brick/train without labels; expected a \.labels file"
    with pytest.raises(DataError, match=message):
        require_labels(index)


# ---- real frames --------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("version", "token", "points"),
    [
        ("v1.0-mini", "ca9a282c9e77460f8360f564131a8af5", 3067),
        (None, "fd8420396768425eabec9bdddf7e64b6", 2984),
    ],
)
def test_real_nuscenes(tmp_path: Path, version: str | None, token: str, points: int) -> None:
    root = REALDATA / "nuscenes"
    index = prepare(
        root, SINGAPORE, None, "street6", (225, 400), tmp_path, version=version, frames=[token]
    )
    assert index.tokens == [token] and index.fingerprint["points"] == points
    assert index.frame(0).image.shape == (225, 400, 3) and not index.frame(0).has_label
    assert next(original_frames(index, [0])).image.shape == (900, 1600, 3)


@real
def test_real_nuscenes_splits() -> None:
    root = REALDATA / "nuscenes"
    assert scenes_of(root, SINGAPORE, "test") == ["0003"]
    assert scenes_of(root, SINGAPORE, "train_unlabelled", version="v1.0-mini") == ["0061"]


@real
def test_real_kitti(tmp_path: Path) -> None:
    index = prepare(REALDATA / "semantic_kitti", SKITTI, "train", "a2d2_10", None, tmp_path)
    assert index.tokens == ["00/000000", "00/000001"]
    assert [len(index.frame(i).xyz) for i in (0, 1)] == [19369, 19154]
    require_labels(index)
    rng, augment = np.random.default_rng(0), Augment(crop=READERS["semantic_kitti"].crop)
    samples = [sample(index.frame(i), augment, SKITTI.flip_axis, rng) for i in (0, 1)]
    batch = data.collate(samples)
    assert batch.image.shape == (2, 3, 302, 480) and min(batch.counts) > 1000
    assert set(batch.label.tolist()) <= {IGNORE, *range(10)}
