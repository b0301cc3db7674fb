"""Readers, index, augmentation and stylisation, on real frames (FTD_REALDATA) and on tiny data sets made here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ftdpp import data
from ftdpp.data import (
    CLASS_SETS,
    DOMAINS,
    GRID,
    IGNORE,
    Augment,
    DataError,
    Frame,
    Index,
    check,
    collate,
    density_transfer,
    fda,
    list_frames,
    mixup,
    prepare,
    project,
    read_frame,
    require_labels,
    rotation_3d,
    sample,
    splits,
)

REALDATA = Path(os.environ.get("FTD_REALDATA", Path(__file__).resolve().parents[1].parent / "shared" / "realdata"))
real = pytest.mark.skipif(not REALDATA.is_dir(), reason=f"REAL FRAMES NOT READ: no folder {REALDATA}; set FTD_REALDATA to it")
SINGAPORE, USA, DAY, NIGHT, SKITTI = (DOMAINS[n] for n in ("singapore", "usa", "day", "night", "skitti"))
POINTS = 60

# ---- two tiny data sets in the original layouts


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content.tofile(path)
    elif isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def cloud(seed: int, columns: int, forward: int) -> np.ndarray:
    """Points in front of the sensor; `forward` is the axis that looks ahead."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (POINTS, columns)).astype(np.float32)
    points[:, forward] = rng.uniform(4, 20, POINTS)
    return points


CATEGORIES = ["noise", "vehicle.car", "flat.driveable_surface", "flat.sidewalk", "human.pedestrian.adult"]
SCENES = [  # name, location, description
    ("scene-0001", "singapore-onenorth", "Parked cars"),  # singapore train, SSDA unlabelled
    ("scene-0002", "singapore-onenorth", "Turn left"),  # SSDA labelled
    ("scene-0003", "singapore-onenorth", "Bus"),  # official val
    ("scene-0004", "singapore-queenstown", "Rain"),  # val_singapore
    ("scene-0200", "boston-seaport", "Wait"),
    ("scene-1044", "singapore-hollandvillage", "Night, peds"),  # val_singapore and val_night
    ("scene-1060", "singapore-hollandvillage", "NIGHT"),  # official val
    ("scene-1100", "singapore-hollandvillage", "night"),
]


def nuscenes(root: Path, version: str = "v1.0-mini", labelled: bool = True, scenes: list[Any] = SCENES) -> Path:
    """One frame a scene. The LiDAR looks along y; the camera sits in it, so its z is the LiDAR's y."""
    size, sqrt = (400, 225), 0.5**0.5
    tables: dict[str, list[dict[str, Any]]] = {
        "sensor": [{"token": c, "channel": c} for c in ("LIDAR_TOP", "CAM_FRONT", "CAM_BACK")],
        "calibrated_sensor": [
            {"token": "cal-LIDAR_TOP", "sensor_token": "LIDAR_TOP", "rotation": [1, 0, 0, 0], "translation": [0, 0, 2],
             "camera_intrinsic": []},
        ] + [
            {"token": f"cal-{c}", "sensor_token": c, "rotation": [sqrt, -sqrt, 0, 0], "translation": [0, 0, 2],
             "camera_intrinsic": [[300, 0, 200], [0, 300, 112], [0, 0, 1]]} for c in ("CAM_FRONT", "CAM_BACK")
        ],
        "category": [{"token": n, "name": n, **({"index": i} if labelled else {})} for i, n in enumerate(CATEGORIES)],
        **{name: [] for name in ("scene", "log", "sample", "sample_data", "ego_pose", "lidarseg")},
    }  # fmt: skip
    for i, (name, location, description) in enumerate(scenes):
        token = f"frame-{name[-4:]}"
        tables["log"].append({"token": f"log{i}", "location": location})
        tables["scene"].append({"token": name, "name": name, "log_token": f"log{i}", "description": description})
        tables["sample"].append({"token": token, "scene_token": name, "timestamp": i})
        tables["ego_pose"].append({"token": f"pose{i}", "rotation": [1, 0, 0, 0], "translation": [100 * i, 5, 0]})
        for channel, ending in (("LIDAR_TOP", "pcd.bin"), ("CAM_FRONT", "png"), ("CAM_BACK", "png")):
            row: dict[str, Any] = {
                "token": f"{token}-{channel}", "sample_token": token, "ego_pose_token": f"pose{i}",
                "calibrated_sensor_token": f"cal-{channel}", "is_key_frame": True, "width": 0, "height": 0,
                "filename": f"samples/{channel}/{token}.{ending}",
            }  # fmt: skip
            if channel != "LIDAR_TOP":
                row |= {"width": size[0], "height": size[1]}
            # A sweep between key frames must not be taken for one.
            sweep = row | {"is_key_frame": False, "token": row["token"] + "-sweep", "filename": "sweeps/none"}
            tables["sample_data"] += [row, sweep]
        write(root / f"samples/LIDAR_TOP/{token}.pcd.bin", cloud(i, 5, 1))
        write(root / f"samples/CAM_FRONT/{token}.png", picture(i, *size))
        if labelled:
            file = f"lidarseg/{version}/{token}_lidarseg.bin"
            tables["lidarseg"].append({"token": token, "sample_data_token": f"{token}-LIDAR_TOP", "filename": file})
            write(root / file, np.random.default_rng(i).integers(0, len(CATEGORIES), POINTS).astype(np.uint8))
    if not labelled:
        del tables["lidarseg"]
    for name, rows in tables.items():
        write(root / version / f"{name}.json", rows)
    return root


def kitti(root: Path, sequences: tuple[str, ...] = ("00", "02", "07", "08", "11"), frames: int = 2) -> Path:
    for s in sequences:
        base = root / "sequences" / s
        tr = "0 -1 0 0 0 0 -1 0 1 0 0 0"
        write(base / "calib.txt", f"P2: 200 0 160 0 0 200 60 0 0 0 1 0\nTr: {tr}\n")
        for i in range(frames):
            write(base / f"velodyne/{i:06}.bin", cloud(i, 4, 0))
            write(base / f"image_2/{i:06}.png", picture(i, 320 + 2 * int(s), 120))
            if s < "11":
                ids = np.array([10, 40, 48, 70, 252, 0], np.uint32)[np.arange(POINTS) % 6] | np.uint32(7 << 16)
                write(base / f"labels/{i:06}.label", ids)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return nuscenes(tmp_path / "nuscenes")


def build(root: Path, **changes: Any) -> Index:
    arguments: dict[str, Any] = {
        "root": root, "domain": SINGAPORE, "split": "train", "classes": "street6", "size": (112, 200),
        "cache": root.parent / "cache",
    }  # fmt: skip
    return prepare(**(arguments | changes))


def scenes_of(root: Path, domain: data.Domain, split: str | None, **kw: Any) -> list[str]:
    return [ref.scene[-4:] for ref in list_frames(root, domain, split, **kw)]


# ---- splits and classes


def test_split_lists() -> None:
    labelled, unlabelled = data.SSDA_LABELLED, data.SSDA_TRAIN - data.SSDA_LABELLED
    assert [len(x) for x in (data.VAL_NIGHT, data.VAL_SINGAPORE, labelled, data.SSDA_TRAIN)] == [15, 69, 72, 241]
    assert labelled < data.SSDA_TRAIN and len(unlabelled) == 169
    assert len(data.OFFICIAL_VAL) == 150
    assert not data.OFFICIAL_VAL & (data.SSDA_TRAIN | data.VAL_SINGAPORE | data.VAL_NIGHT)
    assert not data.VAL_SINGAPORE & data.SSDA_TRAIN
    assert {"1044"} == data.VAL_NIGHT & data.VAL_SINGAPORE
    s = data._SEQUENCES
    assert s["train_labelled"] == {"00", "01"} and s["train"] == {"00", "01", "02", "03", "04", "05", "06", "09", "10"}
    assert not s["train_unlabelled"] & (s["train_labelled"] | s["val"] | s["test"]) and len(s["train_unlabelled"]) == 18
    assert splits(USA) == ("train", "test") and splits(SKITTI)[3:] == ("train_labelled", "train_unlabelled")


def test_nuscenes_splits(root: Path) -> None:
    assert scenes_of(root, SINGAPORE, "train") == ["0001", "0002", "1100"]
    assert scenes_of(root, SINGAPORE, "val") == ["0004", "1044"]
    assert scenes_of(root, SINGAPORE, "test") == ["0003", "1060"]
    assert scenes_of(root, SINGAPORE, "train_labelled") == ["0002"]
    assert scenes_of(root, SINGAPORE, "train_unlabelled") == ["0001", "1100"]
    assert scenes_of(root, USA, "train") == ["0200"] and scenes_of(root, USA, "test") == []
    assert scenes_of(root, NIGHT, "train") == ["1100"] and scenes_of(root, NIGHT, "val") == ["1044"]
    assert scenes_of(root, NIGHT, "test") == ["1060"]
    assert scenes_of(root, DAY, "train") == ["0001", "0002", "0004", "0200"]
    assert sorted(scenes_of(root, DAY, None) + scenes_of(root, NIGHT, None)) == sorted(s[0][-4:] for s in SCENES)
    assert scenes_of(root, USA, None, frames=["frame-0200"]) == ["0200"]
    for frames, split in (["frame-9999"], None), (["frame-0200"], "train"), (["frame-0200"], None):
        with pytest.raises(DataError, match="no frame 'frame-"):
            list_frames(root, SINGAPORE, split, frames=frames)
    with pytest.raises(DataError, match=r"day has no split 'val': a source domain is not split.*train, test"):
        list_frames(root, DAY, "val")
    with pytest.raises(DataError, match="no split 'trian'"):
        list_frames(root, SINGAPORE, "trian")
    with pytest.raises(DataError, match="no reader for a2d2"):
        list_frames(root, DOMAINS["a2d2"], "train")


def test_versions(root: Path) -> None:
    nuscenes(root, "v1.0-trainval", scenes=SCENES[:1])
    assert scenes_of(root, SINGAPORE, None) == ["0001"]
    assert len(scenes_of(root, SINGAPORE, None, version="v1.0-mini")) == len(SCENES) - 1  # one is in Boston
    with pytest.raises(DataError, match=r"no folder v1\.0-test"):
        list_frames(root, SINGAPORE, None, "v1.0-test")
    with pytest.raises(DataError, match=r"v1\.0-trainval or v1\.0-mini"):
        list_frames(root / "samples", SINGAPORE, None)


def test_kitti_splits(tmp_path: Path) -> None:
    kitti(tmp_path / "dataset")
    for root in (tmp_path, tmp_path / "dataset"):
        assert [r.token for r in list_frames(root, SKITTI, "train_labelled")] == ["00/000000", "00/000001"]
    assert set(scenes_of(tmp_path, SKITTI, "train_unlabelled")) == {"02", "11"}
    assert set(scenes_of(tmp_path, SKITTI, "val")) == {"07"} and set(scenes_of(tmp_path, SKITTI, "test")) == {"08"}
    with pytest.raises(DataError, match="sequences"):
        list_frames(tmp_path / "none", SKITTI, "train")


def test_class_tables() -> None:
    for name, dataset, size in (("street6", "semantic_kitti", 6), ("vkitti6", "virtual_kitti", 6),
                                ("vkitti6", "semantic_kitti", 6), ("a2d2_10", "semantic_kitti", 10)):  # fmt: skip
        table = CLASS_SETS[name].table(dataset)
        assert table.dtype == np.uint8 and set(table) == {*range(size), 255}, (name, dataset)
    for classes in CLASS_SETS.values():
        assert all(len(raw) == len(classes.names) for raw in classes.members.values())
    a2d2 = CLASS_SETS["a2d2_10"].table("semantic_kitti")
    assert [a2d2[i] for i in (10, 252, 30, 254, 40, 60, 13, 257, 72, 52)] == [0, 0, 3, 3, 4, 4, 255, 255, 8, 255]
    vkitti = CLASS_SETS["vkitti6"].table("semantic_kitti")
    assert [vkitti[i] for i in (44, 48, 11, 30)] == [255] * 4  # parking, sidewalk, bike, person
    assert list(CLASS_SETS["vkitti6"].table("virtual_kitti")[[5, 12, 99, 0]]) == [255, 255, 255, 0]
    nus = CLASS_SETS["street6"].table("nuscenes", dict(enumerate(CATEGORIES)))
    assert list(nus[:6]) == [255, 0, 1, 2, 255, 255]
    with pytest.raises(DataError, match=r"no class map from nuscenes.*street6"):
        CLASS_SETS["vkitti6"].table("nuscenes")


# ---- reading and projecting


def test_project_nuscenes_in_words(root: Path) -> None:
    ref = list_frames(root, SINGAPORE, None, frames=["frame-0001"])[0]
    xyz = np.array([[0, 10, 0], [1, 10, 0.5], [0, -10, 0], [7, 10, 0]], np.float32)
    kept, row_col = project(xyz, ref.calib, (225, 400))
    assert kept.tolist() == [0, 1]  # behind the camera; outside the image
    np.testing.assert_allclose(row_col, [[112, 200], [112 - 15, 230]], atol=1e-3)


def test_read_frame(root: Path) -> None:
    raw = read_frame(list_frames(root, SINGAPORE, "train")[0])
    assert raw.points.shape == (POINTS, 4) and raw.image.size == (400, 225)
    assert raw.labels is not None and raw.labels.shape == (POINTS,)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


CORRUPTIONS: list[tuple[str, Callable[[Path], object], str]] = [
    ("samples/LIDAR_TOP/frame-0001.pcd.bin", cut, "expected a multiple of 20"),
    ("samples/LIDAR_TOP/frame-0001.pcd.bin", lambda p: p.write_bytes(b""), "0 bytes"),
    ("samples/LIDAR_TOP/frame-0001.pcd.bin", Path.unlink, "missing"),
    ("samples/CAM_FRONT/frame-0001.png", lambda p: p.write_bytes(p.read_bytes()[:9000]), "not a readable image"),
    ("samples/CAM_FRONT/frame-0001.png", lambda p: p.write_bytes(b"no image"), "not a readable image"),
    ("samples/CAM_FRONT/frame-0001.png", lambda p: picture(0, 40, 20).save(p), r"\(20, 40\).*\(225, 400\)"),
    ("samples/CAM_FRONT/frame-0001.png", Path.unlink, "missing"),
    ("lidarseg/v1.0-mini/frame-0001_lidarseg.bin", cut, "57 labels for 60 points"),
    ("lidarseg/v1.0-mini/frame-0001_lidarseg.bin", Path.unlink, "missing"),
    ("v1.0-mini/ego_pose.json", Path.unlink, "missing"),
    ("v1.0-mini/sample_data.json", cut, "not a readable nuScenes table"),
    ("v1.0-mini/scene.json", lambda p: p.write_text("{}"), "not a readable nuScenes table"),
    ("v1.0-mini/log.json", lambda p: p.write_text("[]"), "do not fit together"),
    ("v1.0-mini/calibrated_sensor.json", lambda p: p.write_text(p.read_text().replace("300", "NaN")), "non-finite"),
    ("v1.0-mini/calibrated_sensor.json", lambda p: p.write_text(p.read_text().replace("300", '"x"')), "numbers"),
]


@pytest.mark.parametrize(("file", "damage", "message"), CORRUPTIONS)
def test_nuscenes_corruption(root: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(root / file)
    name = Path(file).name if "do not fit" not in message else "v1.0-mini"
    with pytest.raises(DataError, match=message) as caught:
        build(root)
    assert name in str(caught.value)


def test_kitti_corruption(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare(home, SKITTI, "train", "street6", None, tmp_path / "cache")
        shutil.rmtree(home)
        kitti(home, ("00",))

    home = kitti(tmp_path / "kitti", ("00",))
    base = home / "sequences/00"
    cut(base / "velodyne/000001.bin")
    refused(r"000001\.bin.*multiple of 16")
    write(base / "labels/000001.label", np.zeros(7, np.uint32))
    refused(r"000001\.label: 7 labels for 60 points")
    write(base / "labels/000001.label", np.full(POINTS, 300, np.uint32))
    refused(r"000001\.label: label id 300")
    (base / "calib.txt").unlink()
    refused(r"calib\.txt: missing")
    write(base / "calib.txt", "P2: 1 2 3\n")
    refused(r"calib\.txt.*12 numbers")
    write(base / "calib.txt", f"P2: {'nan ' * 12}\nTr: {'0 ' * 12}\n")
    refused(r"calib\.txt.*non-finite")
    (base / "image_2/000000.png").unlink()
    refused(r"000000\.png: missing")
    with pytest.raises(DataError, match="no class set 'street7'"):
        prepare(home, SKITTI, "train", "street7", None, tmp_path / "cache")
    with pytest.raises(DataError, match="no frame of skitti/val"):
        prepare(home, SKITTI, "val", "street6", None, tmp_path / "cache")
    write(base / "calib.txt", "P2: 200 0 9999 0 0 200 60 0 0 0 1 0\nTr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n")
    refused("none of 2 frames has a point in the image")


# ---- the prepared index


def test_prepare_holds_what_the_reader_reads(root: Path) -> None:
    index = build(root)
    assert index.tokens == ["frame-0001", "frame-0002", "frame-1100"] and len(index) == 3
    ref = list_frames(root, SINGAPORE, "train")[1]
    raw, frame = read_frame(ref), index.frame(1)
    kept, row_col = project(raw.points[:, :3], ref.calib, (225, 400))
    assert raw.labels is not None and len(kept) > 0
    np.testing.assert_array_equal(frame.xyz, raw.points[kept, :3])
    np.testing.assert_array_equal(frame.pixel, (np.floor(row_col) * [112 / 225, 200 / 400]).astype(int))
    np.testing.assert_array_equal(frame.label, np.array([255, 0, 1, 2, 255])[raw.labels[kept]])
    resized = raw.image.resize((200, 112), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(frame.image, np.asarray(resized))
    assert frame.has_label and not frame.image.flags.writeable and index.frame(-1).token == index.tokens[-1]
    with pytest.raises(IndexError):
        index.frame(3)
    labels = np.concatenate([index.frame(i).label for i in range(3)])
    assert index.counts().tolist() == [int((labels == c).sum()) for c in range(6)]
    f = index.fingerprint
    assert f["points"] == len(labels) == index.counts().sum() + f["ignored"]
    assert (f["frames"], f["empty_frames"], f["unlabelled_frames"], f["dropped_points"]) == (3, 0, 0, 0)
    require_labels(index)
    index.verify()


def test_index_is_plain_and_travels(root: Path) -> None:
    index = build(root)
    assert {p.name for p in index.path.iterdir()} == {"meta.json", "xyz.bin", "pixel.bin", "label.bin", "image.bin"}
    assert not list(index.path.parent.glob("*.partial"))
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:  # receives the path, not the arrays
        np.testing.assert_array_equal(worker.submit(index.frame, 1).result().xyz, index.frame(1).xyz)
    assert len(ForkingPickler.dumps(index)) < 1000


def test_prepare_opens_what_is_there(root: Path) -> None:
    index = build(root)
    told: list[Any] = []
    stamp = (index.path / "meta.json").stat().st_mtime_ns
    again = build(root, progress=lambda *what: told.append(what))
    assert not told and (again.path / "meta.json").stat().st_mtime_ns == stamp
    assert len({build(root, **c).path for c in ({}, {"size": None}, {"split": "val"}, {"frames": ["frame-0001"]})}) == 4


def test_fingerprint_follows_content_not_place(root: Path, tmp_path: Path) -> None:
    first = build(root).fingerprint
    other = Path(shutil.copytree(root, tmp_path / "elsewhere" / "nuscenes"))
    assert build(other).fingerprint == first
    label = other / "lidarseg/v1.0-mini/frame-0002_lidarseg.bin"
    label.write_bytes(bytes(POINTS))
    changed = build(other).fingerprint
    assert {k for k in first if first[k] != changed[k]} == {"content", "points_per_class", "ignored"}


@pytest.mark.parametrize("change", ["file", "format", "classes", "damage", "meta"])
def test_stale_index_is_rebuilt_with_a_reason(root: Path, change: str) -> None:
    index = build(root)
    told: list[str] = []
    if change == "file":
        os.utime(root / "samples/LIDAR_TOP/frame-0001.pcd.bin", ns=(1, 1))
    elif change == "format":  # written by another version, under the name of this one
        meta = json.loads((index.path / "meta.json").read_text())
        meta["identity"]["format"] = 0
        write(index.path / "meta.json", meta)
    elif change == "classes":
        categories = [{"token": n, "name": n, "index": i} for i, n in enumerate(reversed(CATEGORIES))]
        write(root / "v1.0-mini/category.json", categories)
    elif change == "damage":
        cut(index.path / "xyz.bin")
        with pytest.raises(DataError, match=r"xyz\.bin: damaged"):
            Index(index.path)
    else:
        write(index.path / "meta.json", "{")
        with pytest.raises(DataError, match=r"meta\.json: unreadable"):
            Index(index.path)
    build(root, progress=lambda done, total, what: told.append(what)).verify()
    reason = {"file": "sources", "format": "format 0", "classes": "label_map", "damage": "damaged", "meta": "unreadable"}
    assert told[0].startswith("building again") and reason[change] in told[0]


def test_verify_finds_a_flipped_byte(root: Path) -> None:
    index = build(root)
    content = bytearray((index.path / "image.bin").read_bytes())
    content[-1] ^= 1
    (index.path / "image.bin").write_bytes(content)
    with pytest.raises(DataError, match="frame-1100 is damaged"):
        Index(index.path).verify()
    with pytest.raises(DataError, match="missing; no finished index"):
        Index(root)


def test_three_at_once_build_it_once(root: Path) -> None:
    """Whoever comes second waits for the lock and opens what the first one built."""
    cache = root.parent / "contended"
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: prepare(root, SINGAPORE, "train", "street6", (45, 80), cache), range(3)))
    assert len({str(index.path) for index in made}) == 1
    assert all(index.fingerprint == made[0].fingerprint for index in made)
    made[0].verify()


@pytest.mark.parametrize("tail", [b"", b'{"token": "torn'])
def test_killed_prepare_goes_on(root: Path, tail: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(root, cache=root.parent / "whole", split=None)
    monkeypatch.setattr(data, "CHUNK", 2)
    done: list[str] = []
    original = data._prepare_frame

    def killed(ref: data.FrameRef, *rest: Any) -> Any:
        if ref.token == "frame-1044" and not resumed:
            raise KeyboardInterrupt
        done.append(ref.token)
        return original(ref, *rest)

    resumed = False
    monkeypatch.setattr(data, "_prepare_frame", killed)
    with pytest.raises(KeyboardInterrupt):
        build(root, split=None)
    (partial,) = (root.parent / "cache").glob("*.partial")
    with (partial / "progress.jsonl").open("ab") as journal:
        journal.write(tail)
    with (partial / "xyz.bin").open("ab") as file:
        file.write(b"half a frame")
    resumed, first = True, set(done[:4])
    done.clear()
    index = build(root, split=None)
    assert not first & set(done) and len(done) == len(SCENES) - 1 - 4  # two chunks were kept; one scene is in Boston
    assert index.fingerprint == whole.fingerprint
    for name in ("xyz", "pixel", "label", "image"):
        assert (index.path / f"{name}.bin").read_bytes() == (whole.path / f"{name}.bin").read_bytes()
    index.verify()


def test_frames_without_labels(tmp_path: Path) -> None:
    root = nuscenes(tmp_path / "nuscenes", labelled=False)
    index = build(root)
    assert not index.frame(0).has_label and set(index.frame(0).label) == {255}
    assert index.fingerprint["unlabelled_frames"] == 3 and index.counts().sum() == 0
    with pytest.raises(DataError, match=r"3 of 3 frames of singapore/train have no labels; expected lidarseg\.json"):
        require_labels(index)
    mixed = prepare(kitti(tmp_path / "kitti"), SKITTI, "train_unlabelled", "a2d2_10", None, tmp_path / "cache")
    assert mixed.fingerprint["unlabelled_frames"] == 2 and mixed.counts().sum() > 0
    with pytest.raises(DataError, match=r"2 of 4 frames.*labels folders"):
        require_labels(mixed)


def test_bad_points_are_dropped_and_counted(root: Path) -> None:
    file = root / "samples/LIDAR_TOP/frame-0001.pcd.bin"
    points = np.fromfile(file, np.float32).reshape(-1, 5)
    points[:3, 0], points[3, 1] = np.nan, np.inf
    points.tofile(file)
    empty = np.fromfile(root / "samples/LIDAR_TOP/frame-0002.pcd.bin", np.float32).reshape(-1, 5)
    empty[:, 1] *= -1  # all behind the camera
    empty.tofile(root / "samples/LIDAR_TOP/frame-0002.pcd.bin")
    index = build(root)
    assert index.tokens == ["frame-0001", "frame-1100"]
    assert index.fingerprint["dropped_points"] == 4 and index.fingerprint["empty_frames"] == 1
    labels = np.fromfile(root / "lidarseg/v1.0-mini/frame-0001_lidarseg.bin", np.uint8)
    rows = {tuple(p): i for i, p in enumerate(points[:, :3])}
    frame = index.frame(0)  # labels stay with their points
    expected = [[255, 0, 1, 2, 255][labels[rows[tuple(p)]]] for p in frame.xyz]
    assert frame.label.tolist() == expected
    index.verify()


def test_kitti_images_keep_their_sizes(tmp_path: Path) -> None:
    index = prepare(kitti(tmp_path / "k"), SKITTI, "train", "street6", None, tmp_path / "cache")
    assert [index.frame(i).image.shape for i in range(4)] == [(120, 320, 3)] * 2 + [(120, 324, 3)] * 2
    assert index.frame(0).pixel.max() < 320 and index.fingerprint["size"] is None
    small = prepare(tmp_path / "k", SKITTI, "train", "street6", (60, 160), tmp_path / "cache")
    assert small.frame(3).image.shape == (60, 160, 3)
    np.testing.assert_array_equal(small.frame(0).pixel, index.frame(0).pixel // 2)


def test_check(root: Path) -> None:
    rows = {row["split"]: row for row in check(root, SINGAPORE)}
    assert list(rows) == list(splits(SINGAPORE))
    train = rows["train"]
    assert (train["scenes"], train["frames"], train["labelled"], train["missing"]) == (3, 3, 3, 0)
    assert train["expected"] == 9665 and "3 of 9665" in train["note"]
    (root / "samples/CAM_FRONT/frame-0001.png").unlink()
    (root / "v1.0-mini/lidarseg.json").unlink()
    row = check(root, SINGAPORE)[0]
    assert row["missing"] == 1 and "frame-0001.png" in row["note"] and "no lidarseg.json: 3 frames" in row["note"]
    assert check(root, USA)[1]["note"] == "no frame of this split here"


# ---- samples and batches


def a_frame(n: int = 2000, height: int = 112, width: int = 200) -> Frame:
    rng = np.random.default_rng(0)
    xyz = rng.uniform([-30, 0, -2], [30, 60, 6], (n, 3)).astype(np.float32)
    pixel = np.stack([rng.integers(0, height, n), rng.integers(0, width, n)], 1).astype(np.int16)
    label = rng.choice(np.array([0, 1, 5, 255], np.uint8), n)
    return Frame("f", xyz, pixel, label, True, rng.integers(0, 256, (height, width, 3), np.uint8))


def test_sample_without_augmentation() -> None:
    frame, rng = a_frame(), np.random.default_rng(3)
    s = sample(frame, None, 0, rng)
    assert rng.bit_generator.state == np.random.default_rng(3).bit_generator.state  # testing draws nothing
    scaled = frame.xyz * np.float32(20)
    np.testing.assert_array_equal(s.coords.numpy(), np.floor(scaled - scaled.min(0)))
    np.testing.assert_array_equal(s.pixel.numpy(), frame.pixel)
    np.testing.assert_array_equal(s.image.numpy().transpose(1, 2, 0) * 255, frame.image)
    assert [s.image.dtype, s.pixel.dtype, s.coords.dtype, s.label.dtype] == [
        torch.float32, torch.int64, torch.int32, torch.int64]  # fmt: skip
    assert (s.label.numpy()[frame.label == 255] == IGNORE).all() and set(s.label.tolist()) == {0, 1, 5, IGNORE}


def test_augmentation_is_a_function_of_the_rng() -> None:
    frame = a_frame()
    a, b, c = (sample(frame, Augment(crop=(80, 120)), 0, np.random.default_rng(seed)) for seed in (5, 5, 6))
    for name in ("image", "pixel", "coords", "label", "keep"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.image, c.image) and a.coords.shape[0] != c.coords.shape[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_flip_touches_one_element(axis: int) -> None:
    assert SINGAPORE.flip_axis == 0 and SKITTI.flip_axis == 1
    flipped = 0
    for seed in range(40):  # with and without the flip the noise is the same
        plain = rotation_3d(Augment(flip_3d=False, rotate=False), axis, np.random.default_rng(seed))
        matrix = rotation_3d(Augment(rotate=False), axis, np.random.default_rng(seed))
        changed = np.argwhere(matrix != plain).tolist()
        assert changed in ([], [[axis, axis]])
        flipped += bool(changed)
        assert not changed or matrix[axis, axis] == -plain[axis, axis]
    assert 10 < flipped < 30
    turn = rotation_3d(Augment(noise=0, flip_3d=False), 0, np.random.default_rng(0))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert turn[2].tolist() == [0, 0, 1]


def test_nothing_leaves_the_grid_or_the_image() -> None:
    frame = a_frame()
    huge = Frame("huge", frame.xyz * 6, frame.pixel, frame.label, True, frame.image)  # 360 m, the grid is 205 m
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for f in (frame, huge):
            s = sample(f, Augment(crop=(80, 120)), 1, rng)
            assert s.coords.min() >= 0 and s.coords.max() < GRID
            assert s.image.shape == (3, 80, 120) and s.image.min() >= 0 and s.image.max() <= 1
            assert (s.pixel >= 0).all() and (s.pixel < torch.tensor([80, 120])).all()
            assert len(s.keep) == len(s.label) == len(s.coords) == len(s.pixel) > 0
            raw = torch.from_numpy(f.label)[s.keep].long()
            assert torch.equal(s.label, torch.where(raw == 255, IGNORE, raw))
    assert len(sample(huge, None, 0, rng).keep) < len(huge.xyz)


def test_flip_and_crop_move_pixels_with_their_points() -> None:
    frame = a_frame()
    seen = set()
    for seed in range(12):
        s = sample(frame, Augment(jitter=0, crop=(60, 90)), 0, np.random.default_rng(seed))
        colour = s.image[:, s.pixel[:, 0], s.pixel[:, 1]].T.numpy()
        row, col = frame.pixel[s.keep].T
        np.testing.assert_allclose(colour, frame.image[row, col] / 255, atol=1e-6)
        assert set(np.unique(s.pixel[:, 0].numpy() - row)) == {-52}  # bottom-aligned: 112 - 60
        seen.add(bool(np.ptp(s.pixel[:, 1].numpy() - col)))
    assert seen == {True, False}


def test_crop_limits() -> None:
    with pytest.raises(DataError, match="112x200 is smaller than the crop 302x480"):
        sample(a_frame(), Augment(crop=(302, 480)), 1, np.random.default_rng(0))
    few = sample(a_frame(50), Augment(crop=(100, 100)), 1, np.random.default_rng(0))
    assert 0 < len(few.keep) <= 50 and few.image.shape == (3, 100, 100)  # the fullest of ten
    sky = a_frame()
    sky.pixel[:, 0] = 3
    with pytest.raises(DataError, match="frame f: no point in the lower 20 rows"):
        sample(sky, Augment(crop=(20, 100)), 1, np.random.default_rng(0))


def test_jitter_on_grey() -> None:
    """On a grey image contrast and saturation change nothing and brightness scales by 0.6 to 1.4."""
    grey = replace(a_frame(), image=np.full((8, 8, 3), 100, np.uint8))
    values = [float(sample(grey, Augment(), 0, np.random.default_rng(i)).image.mean() * 255) for i in range(200)]
    assert 60 <= min(values) < 70 and 130 < max(values) <= 140
    two = replace(grey, image=np.repeat(np.array([[[60], [180]]], np.uint8), 3, 2))
    contrasts = [np.ptp(sample(two, Augment(), 0, np.random.default_rng(i)).image.numpy()) * 255 for i in range(200)]
    assert min(contrasts) < 72 < 168 < max(contrasts)  # brightness alone would stay within 120 * 0.6 and 120 * 1.4
    out = sample(grey, Augment(jitter=0), 0, np.random.default_rng(0)).image
    assert torch.equal(out, torch.full_like(out, 100) / 255)


def test_collate() -> None:
    samples = [sample(a_frame(n), None, 0, np.random.default_rng(0)) for n in (30, 20)]
    batch = collate(samples)
    assert batch.image.shape == (2, 3, 112, 200) and batch.counts == [30, 20] and batch.tokens == ["f", "f"]
    assert batch.coords.dtype == torch.int32 and batch.coords[:, 0].tolist() == [0] * 30 + [1] * 20
    assert torch.equal(batch.coords[30:, 1:], samples[1].coords) and torch.equal(batch.keep[1], samples[1].keep)
    batch.label_2d = batch.label.clone()
    moved = batch.to("meta")
    assert moved.image.is_meta and moved.label_2d is not None and moved.label_2d.is_meta
    assert moved.label_3d is None and not batch.image.is_meta
    wide = sample(a_frame(10, 112, 208), None, 0, np.random.default_rng(0))
    assert collate([wide]).image.shape[-1] == 208
    with pytest.raises(DataError, match=r"different sizes \[\(112, 200\), \(112, 208\)\].*batch=1"):
        collate([wide, samples[0]])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


# ---- stylisation


@pytest.mark.parametrize("size", [(56, 100), (57, 101), (8, 8)])
def test_fda(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    source, target = torch.rand(2, 3, *size), torch.rand(2, 3, *size) * 0.4
    torch.testing.assert_close(fda(source, source), source, atol=1e-5, rtol=0)
    out, side = fda(source, target), int(0.1 * min(size))
    a, s, t = (torch.fft.fft2(x).abs() for x in (out, source, target))
    h, w = size
    for r in range(h):  # slowly, in words: within `side` of a corner the target's amplitude, elsewhere the source's
        for c in range(w):
            low = (r < side or r >= h - side) and (c < side or c >= w - side)
            # Real output needs a symmetric spectrum; for r = side the mirror row lies inside, so look at inner cells.
            if low == ((h - r) % h < side or (h - r) % h >= h - side) * ((w - c) % w < side or (w - c) % w >= w - side):
                torch.testing.assert_close(a[..., r, c], (t if low else s)[..., r, c], atol=2e-3, rtol=1e-3)
    with pytest.raises(DataError, match="one to one"):
        fda(source, target[:1])


def test_mixup() -> None:
    source, target = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    torch.testing.assert_close(mixup(source, target, 0.95), torch.full_like(source, 0.95))


def voxels(sizes: list[int], reach: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    parts = [np.column_stack([np.full(n, b), rng.integers(0, reach, (n, 3))]) for b, n in enumerate(sizes)]
    return torch.from_numpy(np.concatenate(parts)).int()


def volume(coords: torch.Tensor, b: int) -> float:
    xyz = coords[coords[:, 0] == b, 1:].double()
    return float((xyz.amax(0) - xyz.amin(0)).prod() / len(xyz))


def test_density_transfer() -> None:
    source, target = voxels([500, 900, 300], 1500, 0), voxels([700, 400, 350], 1200, 1)
    out = density_transfer(source, target, 3)
    assert out.dtype == torch.int32 and torch.equal(out[:, 0], source[:, 0])
    for b in range(3):
        assert abs(volume(out, b) / volume(target, b) - 1) < 0.01
        alpha = (volume(source, b) / volume(target, b)) ** (-1 / 3)
        own = source[:, 0] == b
        assert torch.equal(out[own, 1:], (source[own, 1:].double() * alpha).int())
    shuffled = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, density_transfer(source, target[shuffled], 3))


def test_density_transfer_at_the_edges() -> None:
    sparse, dense = voxels([10], 4000, 0), voxels([5000], 4000, 1)
    grown = density_transfer(dense, sparse, 1)
    assert grown[:, 1:].max() == GRID - 1 and grown.min() >= 0
    flat = dense.clone()
    flat[:, 3] = 7
    for a, b in ((dense, flat), (flat, dense), (dense[:1], dense), (dense, dense[:1])):
        out = density_transfer(a, b, 1)
        assert out.shape == a.shape and out.min() >= 0 and out.max() < GRID


# ---- real frames


# Without the translation: a factor above 1 would push the source over the grid's border, where it is held.
KITTI_CROP = Augment(crop=(302, 480), translate=False)


@real
def test_real_frames(tmp_path: Path) -> None:
    tokens = {"v1.0-mini": ("ca9a282c9e77460f8360f564131a8af5", 3067), None: ("fd8420396768425eabec9bdddf7e64b6", 2984)}
    for version, (token, points) in tokens.items():
        index = prepare(REALDATA / "nuscenes", SINGAPORE, None, "street6", (225, 400), tmp_path, version=version, frames=[token])
        assert index.tokens == [token] and index.fingerprint["points"] == points
        assert index.frame(0).image.shape == (225, 400, 3) and not index.frame(0).has_label
    assert scenes_of(REALDATA / "nuscenes", SINGAPORE, "test") == ["0003"]
    assert scenes_of(REALDATA / "nuscenes", SINGAPORE, "train_unlabelled", version="v1.0-mini") == ["0061"]
    index = prepare(REALDATA / "semantic_kitti", SKITTI, "train", "a2d2_10", None, tmp_path)
    assert index.tokens == ["00/000000", "00/000001"] and [len(index.frame(i).xyz) for i in (0, 1)] == [19369, 19154]
    require_labels(index)
    rng = np.random.default_rng(0)
    batch = collate([sample(index.frame(i), KITTI_CROP, SKITTI.flip_axis, rng) for i in (0, 1)])
    assert batch.image.shape == (2, 3, 302, 480) and min(batch.counts) > 1000
    assert set(batch.label.tolist()) <= {IGNORE, *range(10)}
    other = collate([sample(index.frame(i), KITTI_CROP, SKITTI.flip_axis, rng) for i in (1, 0)])
    stylised = density_transfer(batch.coords, other.coords, 2)
    assert all(abs(volume(stylised, b) / volume(other.coords, b) - 1) < 0.01 for b in (0, 1))
