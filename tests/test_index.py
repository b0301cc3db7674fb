"""The prepared index, on tiny data sets made here."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp import index as indexes
from ftdpp.index import Index, original_frames, prepare, require_labels
from ftdpp.readers import READERS, DataError, FrameRef, list_frames
from ftdpp.tests import layouts
from ftdpp.tests.layouts import CATEGORIES, POINTS, SCENES, SINGAPORE, SKITTI, cut, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.nuscenes(tmp_path / "nuscenes")


def build(root: Path, **changes: Any) -> Index:
    arguments: dict[str, Any] = {
        "root": root, "domain": SINGAPORE, "split": "train", "classes": "street6",
        "size": (112, 200), "cache": root.parent / "cache",
    }  # fmt: skip
    return prepare(**(arguments | changes))


def verify(index: Index) -> None:
    """Every frame has the checksum that was taken when it was prepared."""
    for i, record in enumerate(index._records):
        assert indexes._frame_sha(index.frame(i)) == record["sha"], record["token"]


def test_prepare_holds_what_the_reader_reads(root: Path) -> None:
    index = build(root)
    assert index.tokens == ["frame-0001", "frame-0002", "frame-1100"] and len(index) == 3
    ref = list_frames(root, SINGAPORE, "train")[1]
    reader = READERS[ref.reader]
    raw, frame = reader.read(ref), index.frame(1)
    kept, row_col, _ = reader.project(raw, ref)
    assert raw.points is not None and raw.labels is not None and len(kept) > 0
    np.testing.assert_array_equal(frame.xyz, raw.points[kept, :3])
    scaled = np.floor(row_col) * [112 / 225, 200 / 400]
    np.testing.assert_array_equal(frame.pixel, scaled.astype(int))
    np.testing.assert_array_equal(frame.label, np.array([255, 0, 1, 2, 255])[raw.labels[kept]])
    resized = raw.image.resize((200, 112), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(frame.image, np.asarray(resized))
    assert frame.has_label and not frame.image.flags.writeable
    assert index.frame(-1).token == index.tokens[-1]
    with pytest.raises(IndexError):
        index.frame(3)
    labels = np.concatenate([index.frame(i).label for i in range(3)])
    assert index.counts().tolist() == [int((labels == c).sum()) for c in range(6)]
    f = index.fingerprint
    assert f["points"] == len(labels) == index.counts().sum() + f["ignored"]
    assert f["frames"] == 3
    assert f["empty_frames"] == f["unlabelled_frames"] == f["dropped_points"] == 0
    require_labels(index)
    verify(index)


def test_index_is_plain_and_travels(root: Path) -> None:
    index = build(root)
    files = sorted(path.name for path in index.path.iterdir())
    names = ("depth.bin", "image.bin", "label.bin", "meta.json", "pixel.bin", "xyz.bin")
    assert tuple(files) == names
    assert not list(index.path.parent.glob("*.partial"))
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        frame = worker.submit(index.frame, 1).result()  # it receives the path, not the arrays
    np.testing.assert_array_equal(frame.xyz, index.frame(1).xyz)
    assert len(ForkingPickler.dumps(index)) < 1000


def test_prepare_opens_what_is_there(root: Path) -> None:
    index = build(root)
    told: list[Any] = []
    stamp = (index.path / "meta.json").stat().st_mtime_ns
    again = build(root, progress=lambda *what: told.append(what))
    assert not told and (again.path / "meta.json").stat().st_mtime_ns == stamp
    changes: list[dict[str, Any]] = [
        {},
        {"size": None},
        {"split": "val"},
        {"frames": ["frame-0001"]},
    ]
    assert len({build(root, **change).path for change in changes}) == 4


def test_fingerprint_follows_content_not_place(root: Path, tmp_path: Path) -> None:
    first = build(root).fingerprint
    other = Path(shutil.copytree(root, tmp_path / "elsewhere" / "nuscenes"))
    assert build(other).fingerprint == first
    label = other / "lidarseg/v1.0-mini/frame-0002_lidarseg.bin"
    label.write_bytes(bytes(POINTS))
    changed = build(other).fingerprint
    assert {k for k in first if first[k] != changed[k]} == {
        "content",
        "points_per_class",
        "ignored",
    }


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
        categories = [
            {"token": n, "name": n, "index": i} for i, n in enumerate(reversed(CATEGORIES))
        ]
        write(root / "v1.0-mini/category.json", categories)
    elif change == "damage":
        cut(index.path / "xyz.bin")
        with pytest.raises(DataError, match=r"xyz\.bin: damaged"):
            Index(index.path)
    else:
        write(index.path / "meta.json", "{")
        with pytest.raises(DataError, match=r"meta\.json: missing or unreadable"):
            Index(index.path)
    verify(build(root, progress=lambda done, total, what: told.append(what)))
    reason = {
        "file": "changed since: sources",
        "format": "changed since: format",
        "classes": "label_map",
        "damage": "damaged",
        "meta": "unreadable",
    }
    assert told[0].startswith("building again") and reason[change] in told[0]


@pytest.mark.parametrize("name", ["image", "label", "xyz"])
def test_a_changed_byte_is_found_where_it_is_read(root: Path, name: str) -> None:
    """It would train, and look like any other. Other frames are still read."""
    index = build(root)
    before = [index.frame(i) for i in range(len(index))]
    file = index.path / f"{name}.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = Index(index.path)
    assert np.array_equal(again.frame(0).image, before[0].image)
    with pytest.raises(DataError, match=rf"frame {again.tokens[-1]} is not what was written"):
        again.frame(len(again) - 1)


def test_a_finished_index_needs_no_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be read-only."""
    path = build(root).path

    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(indexes, "locked", refused)
    assert build(root).path == path
    cut(path / "xyz.bin")
    with pytest.raises(PermissionError):
        build(root)


def test_no_index_there(root: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json: missing or unreadable"):
        Index(root)
    with pytest.raises(DataError, match="no class set 'street7': type one of street6"):
        build(root, classes="street7")
    home = layouts.kitti(root.parent / "kitti", ("00",))
    message = rf"no frame of skitti/val; .*type: ftd data check {home} --domain skitti"
    with pytest.raises(DataError, match=message):
        build(home, domain=SKITTI, split="val")


def test_titles(root: Path) -> None:
    assert build(root).title == "singapore/train"
    assert build(root, split=None).title == "singapore, all splits"
    assert build(root, split=None, frames=["frame-0001"]).title == "singapore, chosen frames"


@pytest.mark.parametrize("size", [None, (112, 200)])
def test_original_frame(root: Path, size: tuple[int, int] | None) -> None:
    index = build(root, size=size)
    for i, ref in enumerate(list_frames(root, SINGAPORE, "train")):
        stored, original = index.frame(i), next(original_frames(index, [i]))
        raw = READERS[ref.reader].read(ref)
        _, row_col, _ = READERS[ref.reader].project(raw, ref)
        np.testing.assert_array_equal(original.image, np.asarray(raw.image))
        np.testing.assert_array_equal(original.pixel, np.floor(row_col))
        np.testing.assert_array_equal(original.xyz, stored.xyz)
        np.testing.assert_array_equal(original.label, stored.label)
        assert original.token == stored.token and original.has_label


def test_original_frame_of_changed_data(root: Path) -> None:
    index = build(root, split=None, frames=["frame-0001"])
    label = root / "lidarseg/v1.0-mini/frame-0001_lidarseg.bin"
    content = label.read_bytes()
    label.write_bytes(bytes(POINTS))
    with pytest.raises(DataError, match=r"frame-0001 has changed since .* prepare the data"):
        next(original_frames(index, [0]))
    label.write_bytes(content)
    layouts.cloud(9, 5, 1).tofile(root / "samples/LIDAR_TOP/frame-0001.pcd.bin")
    with pytest.raises(DataError, match="frame frame-0001 has changed since"):
        next(original_frames(index, [0]))
    shutil.rmtree(root)
    with pytest.raises(DataError, match="there is no such folder"):
        next(original_frames(index, [0]))


def test_three_at_once_build_it_once(root: Path) -> None:
    """Whoever comes second waits for the lock and opens what the first one built."""
    cache = root.parent / "contended"
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(build, root, size=(45, 80), cache=cache) for _ in range(3)]
        made = [future.result() for future in waiting]
    assert len({str(index.path) for index in made}) == 1
    assert all(index.fingerprint == made[0].fingerprint for index in made)
    verify(made[0])


@pytest.mark.parametrize("tail", [b"", b'{"token": "torn'])
def test_killed_prepare_goes_on(root: Path, tail: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(root, cache=root.parent / "whole", split=None)
    monkeypatch.setattr(indexes, "CHUNK", 2)
    done: list[str] = []
    original = indexes.read_frame

    def killed(ref: FrameRef, *rest: Any) -> Any:
        if ref.token == "frame-1044" and not resumed:
            raise KeyboardInterrupt
        done.append(ref.token)
        return original(ref, *rest)

    resumed = False
    monkeypatch.setattr(indexes, "read_frame", killed)
    with pytest.raises(KeyboardInterrupt):
        build(root, split=None)
    (partial,) = (root.parent / "cache").glob("*.partial")
    with (partial / "progress.jsonl").open("ab") as journal:
        journal.write(tail)
    with (partial / "xyz.bin").open("ab") as flat:
        flat.write(b"half a frame")
    resumed, first = True, set(done[:4])
    done.clear()
    index = build(root, split=None)
    assert not first & set(done)
    assert len(done) == len(SCENES) - 1 - 4  # two chunks were kept; one scene is in Boston
    assert index.fingerprint == whole.fingerprint
    for name in ("xyz", "pixel", "label", "image"):
        file = f"{name}.bin"
        assert (index.path / file).read_bytes() == (whole.path / file).read_bytes()
    verify(index)


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_killed_between_the_last_frame_and_the_name(
    root: Path, journal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole takes its name without being read again, and holds nothing more."""
    whole, replace, unlink = build(root, cache=root.parent / "whole"), os.replace, Path.unlink

    def killed(*_: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    def unlinked(path: Path, **more: Any) -> None:
        if path.name == "progress.jsonl":
            raise KeyboardInterrupt
        unlink(path, **more)

    def renamed(src: Path, dst: Path) -> None:
        if src.suffix == ".partial":
            raise KeyboardInterrupt
        replace(src, dst)

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "unlink", unlinked) if journal else (os, "replace", renamed)))
        with pytest.raises(KeyboardInterrupt):
            build(root)
    (partial,) = (root.parent / "cache").glob("*.partial")
    assert (partial / "meta.json").exists()
    assert (partial / "progress.jsonl").exists() == journal
    with monkeypatch.context() as patch:
        patch.setattr(indexes, "read_frame", killed)
        index = build(root)
    assert contents(index.path) == contents(whole.path)
    # ... but not where the data has changed meanwhile.
    os.rename(index.path, partial)
    os.utime(root / "samples/LIDAR_TOP/frame-0001.pcd.bin", ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(indexes, "read_frame", killed)
        with pytest.raises(KeyboardInterrupt):
            build(root)
    assert contents(build(root).path).keys() == contents(whole.path).keys()
    assert not list((root.parent / "cache").glob("*.partial"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_process_notices_an_index_that_was_built_anew(root: Path) -> None:
    """It opens the files itself: those of other frames would pass for the same."""
    index = build(root)
    travelling = ForkingPickler.dumps(index)
    assert ForkingPickler.loads(travelling).tokens == index.tokens
    file = root / "samples/LIDAR_TOP/frame-0001.pcd.bin"
    points = np.fromfile(file, np.float32)
    points[0] += 0.25
    points.tofile(file)
    assert build(root).path == index.path
    with pytest.raises(DataError, match="prepared anew from other data"):
        ForkingPickler.loads(travelling)


@pytest.mark.parametrize("name", ["image", "label", "depth"])
def test_a_file_that_is_cut_off_while_it_is_open(root: Path, name: str) -> None:
    """A frame that was read before is read anew, and the process lives to say so."""
    index = build(root)
    last = len(index) - 1
    for i in range(len(index)):
        index.frame(i)
    file = index.path / f"{name}.bin"
    os.truncate(file, file.stat().st_size - 1)
    index.frame(last - 1)
    with pytest.raises(DataError, match=rf"{name}\.bin: has no \d+ bytes any more; remove") as info:
        index.frame(last)
    assert f"remove {index.path}, and the data is prepared again" in str(info.value)


def test_an_open_index_stays_what_it_was(root: Path) -> None:
    """Another process may build it anew meanwhile. And its files are closed at its end."""
    index = build(root)
    before = index.frame(0).image.copy()
    shutil.rmtree(index.path)
    index.path.mkdir()
    (index.path / "image.bin").write_bytes(bytes(before.size))
    np.testing.assert_array_equal(index.frame(0).image, before)
    held = list(index._open.values())
    assert len(held) == 5 and all(os.fstat(number) for number in held)
    del index
    for number in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_frames_without_labels(tmp_path: Path) -> None:
    root = layouts.nuscenes(tmp_path / "nuscenes", labelled=False)
    index = build(root)
    assert not index.frame(0).has_label and set(index.frame(0).label) == {255}
    assert index.fingerprint["unlabelled_frames"] == 3 and index.counts().sum() == 0
    message = r"3 of 3 frames of singapore/train without labels; expected lidarseg\.json"
    with pytest.raises(DataError, match=message):
        require_labels(index)
    root = layouts.kitti(tmp_path / "kitti")
    mixed = build(root, domain=SKITTI, split="train_unlabelled", classes="a2d2_10", size=None)
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
    verify(index)


def test_kitti_images_keep_their_sizes(tmp_path: Path) -> None:
    root = layouts.kitti(tmp_path / "kitti")
    index = build(root, domain=SKITTI, size=None)
    widths = [320, 320, 324, 324]
    assert [index.frame(i).image.shape for i in range(4)] == [(120, w, 3) for w in widths]
    assert index.frame(0).pixel.max() < 320 and index.fingerprint["size"] is None
    small = build(root, domain=SKITTI, size=(60, 160))
    assert small.frame(3).image.shape == (60, 160, 3)
    np.testing.assert_array_equal(small.frame(0).pixel, index.frame(0).pixel // 2)
