"""A2D2: the lens, the palette, frames that are left out, damaged files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftdpp.data import CLASS_SETS, class_table
from ftdpp.index import prepare
from ftdpp.readers import READERS, DataError, FrameRef, check, list_frames
from ftdpp.readers import a2d2 as reader
from ftdpp.tests import layouts
from ftdpp.tests.layouts import (
    A2D2,
    A2D2_CAMERA,
    A2D2_SIZE,
    PALETTE,
    POINTS,
    a2d2_label,
    a2d2_points,
    cut,
    picture,
    save_npz,
    write,
)

READER = READERS["a2d2"]
DRIVE = "20180810_142822"
NAME = "20180810142822_{}_frontcenter_000000001"
LIDAR = f"{DRIVE}/lidar/cam_front_center/{NAME.format('lidar')}.npz"
PHOTO = f"{DRIVE}/camera/cam_front_center/{NAME.format('camera')}.png"
LABEL = f"{DRIVE}/label/cam_front_center/{NAME.format('label')}.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.a2d2(tmp_path / "a2d2")


def second(root: Path) -> FrameRef:
    return list_frames(root, A2D2, "train")[1]


# ---- frames -------------------------------------------------------------------------------------


def test_drives() -> None:
    train = reader.DRIVES["train"]
    assert len(train) == len(set(train)) == 20 and reader.DRIVES["test"] == ("20180807_145028",)
    no_lidar = {"20181016_095036", "20181204_191844"}
    assert not no_lidar & {*train, *reader.DRIVES["test"]}
    assert A2D2.frames["train"] == 27695


@pytest.mark.parametrize("folder", [".", "camera_lidar_semantic"])
def test_frames(tmp_path: Path, folder: str) -> None:
    """The root or the folder above it; an unknown drive is none of the data set's."""
    base = layouts.a2d2(tmp_path / folder)
    layouts.a2d2(base, ("20181204_191844",))
    for root in {tmp_path, base}:
        refs = list_frames(root, A2D2, "train")
        assert [ref.token for ref in refs] == [f"{DRIVE}/000000000", f"{DRIVE}/000000001"]
        assert [ref.scene for ref in list_frames(root, A2D2, "test")] == ["20180807_145028"] * 2
        assert len(list_frames(root, A2D2, None)) == 4
        assert refs[1].files == [base / file for file in (PHOTO, LIDAR, LABEL)]
        assert refs[0].image_size == A2D2_SIZE
        for table in READER.tables(root, None, refs):
            assert table.is_file() and table.parent == base


def test_the_calibration_may_lie_beside_the_archive(tmp_path: Path) -> None:
    """It is a download of its own."""
    base = layouts.a2d2(tmp_path / "camera_lidar_semantic")
    (base / "cams_lidars.json").rename(tmp_path / "cams_lidars.json")
    assert READER.tables(tmp_path, None, [])[0] == tmp_path / "cams_lidars.json"
    assert len(prepare(tmp_path, A2D2, "train", "a2d2_10", None, tmp_path / "cache")) == 2
    with pytest.raises(DataError, match=r"cams_lidars\.json: lies outside of .*semantic; give"):
        list_frames(base, A2D2, "train")


def test_without_labels(root: Path, tmp_path: Path) -> None:
    (root / LABEL).unlink()
    assert READER.read(second(root)).labels is None
    train, test = check(root, A2D2)
    assert (train["frames"], train["labelled"], train["missing"]) == (2, 1, 0)
    assert test["labelled"] == 2 and "1 frame without labels" in train["note"]


def test_keys_of_both_kinds_and_no_others(root: Path) -> None:
    """The data set has two spellings; the reflectance, which the released code looks for under two
    names, is not needed."""
    plain = READER.read(second(root))
    content = a2d2_points(1)
    del content["reflectance"], content["distance"]
    save_npz(root / LIDAR, content)
    without = READER.read(second(root))
    names = {"points": "pcloud_points"}
    save_npz(root / LIDAR, {names.get(k, f"pcloud_attr.{k}"): v for k, v in content.items()})
    for raw in (without, READER.read(second(root))):
        for name in ("points", "labels", "row_col"):
            np.testing.assert_array_equal(getattr(raw, name), getattr(plain, name))


def test_pixels_and_depth_are_those_of_the_file(root: Path) -> None:
    content = a2d2_points(1)
    content["row"][:6] = [0, -0.5, A2D2_SIZE[0], A2D2_SIZE[0] - 0.5, np.nan, 5]
    content["col"][:6] = [0, 5, 5, A2D2_SIZE[1] - 0.5, 5, 5]
    content["depth"][5] = 0
    save_npz(root / LIDAR, content)
    ref = second(root)
    raw = READER.read(ref)
    kept, row_col, depth = READER.project(raw, ref)
    assert kept[:3].tolist() == [0, 3, 6]  # outside; no pixel; no depth
    np.testing.assert_array_equal(row_col[:, 0], content["row"][kept].astype(np.float32))
    np.testing.assert_array_equal(row_col[:, 1], content["col"][kept].astype(np.float32))
    np.testing.assert_array_equal(depth, content["depth"][kept].astype(np.float32))
    assert raw.labels is not None and set(raw.labels[[1, 2, 4]]) == {255}


@pytest.mark.parametrize("defect", ["row", "many"])
def test_frames_that_are_left_out(root: Path, tmp_path: Path, defect: str) -> None:
    """Those without `row`, and those with over 50,000 points: by their number, not by a list of
    places that depends on the order of the frames."""
    content = a2d2_points(1)
    if defect == "row":
        del content["row"]
    else:
        content = {
            key: np.resize(array, (50_001, *array.shape[1:])) for key, array in content.items()
        }
    save_npz(root / LIDAR, content)
    raw = READER.read(second(root))
    assert raw.points is not None and raw.points.shape == (0, 4)
    index = prepare(root, A2D2, "train", "a2d2_10", None, tmp_path / "cache")
    assert index.tokens == [f"{DRIVE}/000000000"] and index.fingerprint["empty_frames"] == 1
    if defect == "many":
        save_npz(root / LIDAR, {key: array[:50_000] for key, array in content.items()})
        raw = READER.read(second(root))
        assert raw.points is not None and len(raw.points) == 50_000


# ---- labels -------------------------------------------------------------------------------------


def test_classes(root: Path) -> None:
    ref = second(root)
    named = {**dict(enumerate(PALETTE.values())), 255: "no class"}  # of colours between two
    assert READER.categories(ref) == named
    table = class_table(READER, "a2d2_10", READER.categories(ref))
    names = [CLASS_SETS["a2d2_10"][c] if c < 255 else None for c in table[: len(PALETTE)]]
    assert names == ["car", "car", "road", None, "building", "nature"]  # the sky is no class
    assert table[255] == 255
    members = [raw for group in READER.classes["a2d2_10"] for raw in group.split(", ")]
    ignored = 7  # sky, utility vehicle 1 and 2, tractor, non-drivable street, blurred, rain dirt
    assert len(members) == len(set(members)) == 55 - ignored


def test_labels_are_those_of_the_undistorted_image(root: Path) -> None:
    """And a colour that interpolation made, or that no entry has, is ignored."""
    ref = second(root)
    raw = READER.read(ref)
    assert raw.row_col is not None and raw.labels is not None
    camera = camera_of(A2D2_CAMERA)
    image = reader._undistorted(np.asarray(a2d2_label()), camera)
    codes = [int(colour[1:], 16) for colour in PALETTE]
    for (row, col), label in zip(raw.row_col.astype(int), raw.labels, strict=True):
        red, green, blue = (int(value) for value in image[row, col])
        code = red << 16 | green << 8 | blue
        assert label == (codes.index(code) if code in codes else 255)
    assert len(set(raw.labels)) > 3
    assert 255 in raw.labels, "no point on an edge: this test shows less than it should"


def test_prepared(root: Path, tmp_path: Path) -> None:
    index = prepare(root, A2D2, "train", "a2d2_10", (30, 48), tmp_path / "cache")
    raw = READER.read(second(root))
    frame = index.frame(1)
    kept, row_col, _ = READER.project(raw, second(root))
    assert raw.points is not None and raw.labels is not None
    np.testing.assert_array_equal(frame.xyz, raw.points[kept, :3])
    np.testing.assert_array_equal(frame.pixel, np.floor(row_col).astype(int) // 2)
    table = np.full(256, 255)
    table[[0, 1, 2, 4, 5]] = [0, 0, 4, 7, 8]
    np.testing.assert_array_equal(frame.label, table[raw.labels[kept]])
    write(root / "cams_lidars.json", {"cameras": {"front_center": WILD}})
    told: list[str] = []
    prepare(
        root, A2D2, "train", "a2d2_10", (30, 48), tmp_path / "cache",
        progress=lambda done, total, what: told.append(what),
    )  # fmt: skip
    assert told[0] == "building again, changed since: sources"


# ---- the lens -----------------------------------------------------------------------------------


def camera_of(entry: dict[str, Any]) -> reader._Camera:
    width, height = entry["Resolution"]
    new, old = (np.array(entry[key], float) for key in ("CamMatrix", "CamMatrixOriginal"))
    sources = reader._sources(new, old, np.ravel(entry["Distortion"]), height, width)
    return reader._Camera((height, width), *sources)


def slow_undistorted(image: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    """Pixel by pixel, as the lens model is written; outside of the image it is black."""
    height, width = image.shape[:2]
    (fx, _, cx), (_, fy, cy), _ = entry["CamMatrix"]
    (gx, _, dx), (_, gy, dy), _ = entry["CamMatrixOriginal"]
    k1, k2, p1, p2, k3 = np.ravel(entry["Distortion"])
    found = np.zeros_like(image)

    def at(i: int, j: int) -> np.ndarray:
        inside = 0 <= i < height and 0 <= j < width
        return image[i, j].astype(int) if inside else np.zeros(3, int)

    for i in range(height):
        for j in range(width):
            x, y = (j - cx) / fx, (i - cy) / fy
            r2 = x**2 + y**2
            radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
            u = gx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)) + dx
            v = gy * (y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y) + dy
            (left, a), (top, b) = divmod(round(32 * u), 32), divmod(round(32 * v), 32)
            upper = (32 - a) * at(top, left) + a * at(top, left + 1)
            lower = (32 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
            found[i, j] = ((32 - b) * upper + b * lower + 512) // 1024
    return found


# Strong, and turned inside out at the corners: places far outside of the image.
WILD = A2D2_CAMERA | {"Distortion": [[0.9, 0.8, 0.05, -0.04, 0.3]]}


@pytest.mark.parametrize("entry", [A2D2_CAMERA, WILD])
def test_undistorted_as_written(entry: dict[str, Any]) -> None:
    image = np.asarray(picture(3, A2D2_SIZE[1], A2D2_SIZE[0]))
    found = reader._undistorted(image, camera_of(entry))
    np.testing.assert_array_equal(found, slow_undistorted(image, entry))
    assert (found != image).mean() > 0.5


@pytest.mark.parametrize("entry", [A2D2_CAMERA, WILD])
def test_undistorted_as_opencv(entry: dict[str, Any]) -> None:
    """The released code uses OpenCV. Not a dependency: this runs where it is installed."""
    cv2 = pytest.importorskip("cv2", reason="LENS NOT COMPARED WITH OPENCV: not installed")
    image = np.asarray(picture(3, A2D2_SIZE[1], A2D2_SIZE[0]))
    new, old = (np.array(entry[key], float) for key in ("CamMatrix", "CamMatrixOriginal"))
    wanted = cv2.undistort(image, old, np.array(entry["Distortion"]), None, new)
    np.testing.assert_array_equal(reader._undistorted(image, camera_of(entry)), wanted)


def test_a_lens_without_distortion_changes_nothing() -> None:
    image = np.asarray(picture(3, A2D2_SIZE[1], A2D2_SIZE[0]))
    same = A2D2_CAMERA | {"Distortion": [[0] * 5], "CamMatrixOriginal": A2D2_CAMERA["CamMatrix"]}
    np.testing.assert_array_equal(reader._undistorted(image, camera_of(same)), image)


# ---- damaged files ------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], object]:
    return lambda path: save_npz(path, {k: v for k, v in a2d2_points(1).items() if k != name})


def replaced(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], object]:
    return lambda path: save_npz(path, a2d2_points(1) | {name: change(a2d2_points(1)[name])})


def camera(**entry: Any) -> Callable[[Path], object]:
    return lambda path: write(path, {"cameras": {"front_center": A2D2_CAMERA | entry}})


def bomb(path: Path) -> None:
    """65 MiB of zeros, some kilobytes on disk."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("points.npy", bytes(65 << 20))


def claim(path: Path) -> None:
    """A header that promises more than the archive holds."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in a2d2_points(1):
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 44, 3)}
                np.lib.format.write_array_header_1_0(file, header)


def flipped(path: Path) -> None:
    """One byte of the points is another."""
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)


def pickled(path: Path) -> None:
    save_npz(path, a2d2_points(1) | {"points": np.array([{"a": 1}] * POINTS, dtype=object)})


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((POINTS, 3)))


def one_bit(path: Path) -> None:
    """Flips a bit of the pixels' data: Pillow would decode it into another label."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 4
    path.write_bytes(content)


TABLE, COLOURS = "cams_lidars.json", "class_list.json"
CORRUPTIONS: list[tuple[str, Callable[[Path], object], str]] = [
    (LIDAR, Path.unlink, "missing"),
    (LIDAR, cut, "not readable points"),
    (LIDAR, lambda path: path.write_bytes(path.read_bytes()[:200]), "not readable points"),
    (LIDAR, lambda path: path.write_bytes(b""), "not readable points"),
    (LIDAR, lambda path: path.write_bytes(b"no archive"), "not readable points"),
    (LIDAR, flipped, "not readable points"),
    (LIDAR, pickled, "not readable points .Python objects"),
    (LIDAR, bomb, "68157440 bytes when unpacked, expected at most 67108864"),
    (LIDAR, claim, "not readable points"),
    (LIDAR, one_array, "one array, expected an archive"),
    (LIDAR, without("points"), "no key 'points', found row, col, depth"),
    (LIDAR, without("col"), "no key 'col'"),
    (LIDAR, without("depth"), "no key 'depth'"),
    (LIDAR, replaced("points", lambda a: a[:, :2]), r"points float64 \(60, 2\).*expected numbers"),
    (LIDAR, replaced("points", lambda a: a[0]), r"points float64 \(3,\)"),
    (LIDAR, replaced("points", lambda a: 1.0), r"points float64 \(\)"),
    (LIDAR, replaced("row", lambda a: a[:-1]), r"row float64 \(59,\)"),
    (LIDAR, replaced("depth", lambda a: a.astype(str)), "depth <U"),
    (PHOTO, lambda path: path.write_bytes(path.read_bytes()[:900]), "not a readable image"),
    (PHOTO, lambda path: picture(0, 40, 20).save(path), r"\(20, 40\).*\(60, 96\)"),
    (LABEL, lambda path: picture(0, 40, 20).save(path), r"\(20, 40\).*\(60, 96\)"),
    (LABEL, lambda path: path.write_bytes(b"no image"), "not a readable image"),
    (TABLE, Path.unlink, r"missing; download it from a2d2\.audi"),
    (TABLE, cut, "not readable JSON"),
    (TABLE, lambda path: path.write_bytes(b"\xff\xfe"), "not readable JSON"),
    (TABLE, lambda path: write(path, {"cameras": {}}), "front_center"),
    (TABLE, lambda path: write(path, []), "not the calibration"),
    (TABLE, camera(CamMatrix=[[1, 0], [0, 1]]), "3x3"),
    (TABLE, camera(CamMatrix=[[0, 0, 5], [0, 80, 5], [0, 0, 1]]), "focal length"),
    (TABLE, camera(CamMatrixOriginal="none"), "not the calibration"),
    (TABLE, camera(Distortion=[[0.1]]), "4 or 5"),
    (TABLE, camera(Distortion=[[float("nan")] * 5]), "not finite"),
    (TABLE, camera(Resolution=[10**9, 10**9]), "Resolution"),
    (TABLE, camera(Resolution=[10_000, 10_000]), "Resolution"),
    (TABLE, camera(Distortion=[[10**400, 0, 0, 0]]), "not the calibration"),
    (TABLE, lambda path: path.write_text("[" * 100_000), "not readable JSON"),
    (LABEL, one_bit, "not a readable image"),
    (TABLE, camera(Resolution=[96]), "not the calibration"),
    (TABLE, camera(Lens="Fisheye"), "Fisheye"),
    (COLOURS, Path.unlink, r"missing; download it from a2d2\.audi"),
    (COLOURS, cut, "not readable JSON"),
    (COLOURS, lambda path: write(path, []), "expected colours and class names"),
    (COLOURS, lambda path: write(path, {}), "expected colours and class names"),
    (COLOURS, lambda path: write(path, {"red": "Car 1"}), "expected colours and class names"),
    (COLOURS, lambda path: write(path, {"#ff0000": 1}), "expected colours and class names"),
    (COLOURS, lambda path: write(path, {"#ff00000": "Car 1"}), "expected colours and class names"),
    (COLOURS, lambda path: write(path, {"#1": "a", "#01": "b"}), "expected colours and class"),
]


@pytest.mark.parametrize(("file", "damage", "message"), CORRUPTIONS)
def test_corruption(
    root: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(root / file)
    with pytest.raises(DataError, match=message) as caught:
        prepare(root, A2D2, "train", "a2d2_10", None, tmp_path / "cache")
    assert str(root / file) in str(caught.value)


def test_no_drive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no drive such as 20180807_145028.*A2D2 root"):
        list_frames(tmp_path, A2D2, "train")


def test_another_calibration_is_read_again(root: Path) -> None:
    before = READER.read(second(root))
    table = json.loads((root / TABLE).read_text())
    table["cameras"]["front_center"]["Distortion"] = [[0.3, 0, 0, 0]]
    write(root / TABLE, table)
    assert np.asarray(READER.read(second(root)).image).tolist() != np.asarray(before.image).tolist()
