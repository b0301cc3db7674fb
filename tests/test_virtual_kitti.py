"""Virtual KITTI: weathers, pixels, labels, damaged files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ftdpp.data import class_table
from ftdpp.index import prepare
from ftdpp.readers import READERS, DataError, check, list_frames, virtual_kitti
from ftdpp.tests import layouts
from ftdpp.tests.layouts import POINTS, VKITTI, VKITTI_LABELS, cut, picture

READER = READERS["virtual_kitti"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.virtual_kitti(tmp_path / "vkitti", ("0020",))


def test_each_weather_is_a_frame(tmp_path: Path) -> None:
    """The released text and code name the folder of the clouds differently: both are read."""
    for name in ("vkitti_npy", "vkitti3d_npy"):
        root = layouts.virtual_kitti(tmp_path / name, clouds=name)
        refs = list_frames(root, VKITTI, "train")
        weathers = ("clone", "fog", "morning", "overcast", "rain", "sunset")
        assert [ref.token for ref in refs] == [
            f"{sequence}/{weather}/00000" for sequence in ("0001", "0020") for weather in weathers
        ]
        assert len({ref.image_path for ref in refs}) == 12
        assert len({ref.points_path for ref in refs}) == 2
        assert all(len(ref.files) == 2 for ref in refs)  # the cloud holds the labels, too
    (row,) = check(root, VKITTI)
    assert (row["scenes"], row["frames"], row["labelled"], row["missing"]) == (2, 12, 12, 0)
    assert row["expected"] == 2126 * 6
    assert READER.draw == 10_000 and not READER.dense


def test_a_point_lies_at_the_pixel_that_it_was_made_from(root: Path) -> None:
    """In single precision on disk, too, and at the corners of the image."""
    ref = list_frames(root, VKITTI, "train")[0]
    assert ref.points_path is not None
    cloud = np.load(ref.points_path)
    for dtype in (np.float64, np.float32):
        np.save(ref.points_path, cloud.astype(dtype))
        raw = READER.read(ref)
        assert raw.points is not None and raw.points.dtype == np.float32
        kept, row_col, depth = READER.project(raw, ref)
        assert kept.tolist() == list(range(POINTS))
        np.testing.assert_allclose(row_col[:2], [[0.5, 0.5], [374.5, 1241.5]], atol=1e-3)
        np.testing.assert_array_equal(depth, cloud[:, 0].astype(np.float32))
        camera = np.array([-cloud[:, 1], -cloud[:, 2]]) / cloud[:, 0]
        wanted = np.rint(725 * camera[::-1] + [[187.0], [620.5]]).T
        np.testing.assert_array_equal(np.floor(row_col), wanted)


def test_points_behind_the_camera_are_not_kept(root: Path) -> None:
    ref = list_frames(root, VKITTI, "train")[0]
    raw = READER.read(ref)
    assert raw.points is not None
    raw.points[3, 0] *= -1
    kept, _, _ = READER.project(raw, ref)
    assert kept.tolist() == [i for i in range(POINTS) if i != 3]


def test_classes(root: Path) -> None:
    """Terrain, tree and vegetation are one; guard rail, van and "don't care" (13, 99) ignored."""
    ref = list_frames(root, VKITTI, "train")[0]
    table = class_table(READER, "vkitti6", READER.categories(ref))
    assert table[:14].tolist() == [0, 0, 0, 1, 2, 255, 3, 3, 3, 3, 4, 5, 255, 255]
    assert table[99] == 255


def test_prepared(root: Path, tmp_path: Path) -> None:
    index = prepare(root, VKITTI, "train", "vkitti6", None, tmp_path / "cache")
    assert len(index) == 6 and index.fingerprint["points"] == 6 * POINTS
    assert index.fingerprint["files"]["count"] == 7  # six images, one cloud
    fog = index.frame(1)
    assert fog.image.shape == (375, 1242, 3) and fog.image[0, 0].tolist() == [40, 0, 0]
    wanted = [{0: 0, 3: 1, 4: 2}.get(label, 255) for label in VKITTI_LABELS]
    np.testing.assert_array_equal(fog.label, np.resize(wanted, POINTS))
    np.testing.assert_array_equal(fog.xyz, index.frame(0).xyz)


def test_no_clouds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder vkitti_npy or vkitti3d_npy.*create_npy\.py"):
        list_frames(tmp_path, VKITTI, "train")


def rewrite(change: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.asarray(change(np.load(path))))


def put(value: float, column: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(cloud: np.ndarray) -> np.ndarray:
        cloud[5, column] = value
        return cloud

    return change


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, points=np.zeros(3))


def claim(path: Path) -> None:
    """A header that promises more than the file holds."""
    with path.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 7)}
        np.lib.format.write_array_header_1_0(file, header)


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def header_of(shape: str) -> Callable[[Path], object]:
    """Writes a header that claims this shape, which need not be one."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}"
    head = b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"
    return lambda path: path.write_bytes(head + bytes(60 * 7 * 8))


CLOUD, PHOTO = "vkitti_npy/0020/00000.npy", "vkitti_1.3.1_rgb/0020/rain/00000.png"
CORRUPTIONS: list[tuple[str, Callable[[Path], object], str]] = [
    (CLOUD, cut, "not a readable array"),
    (CLOUD, claim, "not a readable array"),
    (CLOUD, pickled, "not a readable array"),
    (CLOUD, lambda path: path.write_bytes(b""), "not a readable array"),
    (CLOUD, lambda path: path.write_bytes(b"no array"), "not a readable array"),
    (CLOUD, header_of("(True, 7)"), "not a readable array"),
    (CLOUD, header_of("(1" + "0" * 30 + ", 7)"), "not a readable array"),
    (CLOUD, header_of("(60, 7), ((("), "not a readable array"),
    (CLOUD, archive, "an archive, expected one array"),
    (CLOUD, rewrite(lambda cloud: cloud[:, :6]), r"\(60, 6\), expected numbers \(N, 7\)"),
    (CLOUD, rewrite(lambda cloud: cloud[0]), r"\(7,\), expected numbers"),
    (CLOUD, rewrite(lambda cloud: cloud.astype(int)), "int64.*expected numbers"),
    (CLOUD, rewrite(put(14, 6)), r"label 14, expected 0 to 13 or 99"),
    (CLOUD, rewrite(put(3.5, 6)), r"label 3\.5"),
    (CLOUD, rewrite(put(np.nan, 6)), r"label nan"),
    (PHOTO, Path.unlink, "missing"),
    (PHOTO, lambda path: path.write_bytes(path.read_bytes()[:100]), "not a readable image"),
    (PHOTO, lambda path: picture(0, 40, 20).save(path), r"\(20, 40\).*\(375, 1242\)"),
]


@pytest.mark.parametrize(("file", "damage", "message"), CORRUPTIONS)
def test_corruption(
    root: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(root / file)
    with pytest.raises(DataError, match=message) as caught:
        prepare(root, VKITTI, "train", "vkitti6", None, tmp_path / "cache")
    assert str(root / file) in str(caught.value)


def test_more_points_than_pixels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_kitti, "MAX_POINTS", POINTS - 1)
    with pytest.raises(DataError, match=r"00000\.npy: 60 points, an image has 59 pixels"):
        READER.read(list_frames(root, VKITTI, "train")[0])


def test_non_finite_points_are_dropped(root: Path, tmp_path: Path) -> None:
    rewrite(put(np.inf, 1))(root / CLOUD)
    index = prepare(root, VKITTI, "train", "vkitti6", None, tmp_path / "cache")
    assert index.fingerprint["dropped_points"] == 6
    assert len(index.frame(0).xyz) == POINTS - 1


def test_nothing_is_unpickled(root: Path) -> None:
    """An archive in place of the cloud is closed again, and not opened further."""
    with zipfile.ZipFile(root / CLOUD, "w") as file:
        file.writestr("points.npy", b"no array")
    with pytest.raises(DataError, match="an archive"):
        READER.read(list_frames(root, VKITTI, "train")[0])
