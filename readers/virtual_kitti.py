"""Virtual KITTI 1.3.1: five streets of KITTI in a game engine, each in six weathers.

On disk: vkitti_1.3.1_rgb/SEQ/WEATHER/FRAME.png, and the point clouds vkitti_npy/SEQ/FRAME.npy that
create_npy.py of github.com/VisualComputingInstitute/vkitti3D-dataset makes of the depth images
(the loader of the released code calls the folder vkitti3d_npy; both names are read). A cloud is an
array (N, 7): x ahead, y to the left, z up in metres, red, green, blue, label. Each weather of a
frame is a frame of its own here; the released code draws one of them whenever it reads the frame.
"""

from __future__ import annotations

import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from ftdpp.readers.base import (
    Array,
    Calib,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    inside_image,
    read_image,
    regular,
    why,
)

SEQUENCES = ("0001", "0002", "0006", "0018", "0020")
WEATHERS = ("clone", "fog", "morning", "overcast", "rain", "sunset")
SIZE = (375, 1242)  # of every image
MAX_POINTS = SIZE[0] * SIZE[1]  # a point is a pixel of the depth image
_CLOUDS = ("vkitti_npy", "vkitti3d_npy")
_RAW_NAMES = {
    0: "Terrain", 1: "Tree", 2: "Vegetation", 3: "Building", 4: "Road", 5: "GuardRail",
    6: "TrafficSign", 7: "TrafficLight", 8: "Pole", 9: "Misc", 10: "Truck", 11: "Car", 12: "Van",
    13: "Don't care", 99: "Don't care",
}  # fmt: skip
# Focal length 725, centre (620.5, 187). create_npy.py puts the centre of pixel (i, j) at v = i and
# u = j: half a pixel is added so that the integer part of a pixel is the one that the point comes
# from. The released code adds nothing, and rounding errors move half of its points by a pixel.
_CALIB = Calib((), ((621.0, -725.0, 0.0, 0.0), (187.5, 0.0, -725.0, 0.0), (1.0, 0.0, 0.0, 0.0)))


class VirtualKitti(Reader):
    name = "virtual_kitti"
    domains = (Domain("vkitti", "virtual_kitti", 1, ("train",), {"train": 2126 * len(WEATHERS)}),)
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vkitti6": (
            "Terrain, Tree, Vegetation",
            "Building",
            "Road",
            "TrafficSign, TrafficLight, Pole, Misc",
            "Truck",
            "Car",
        )
    }
    label_files = "the point clouds, which hold the labels"
    crop = (302, 480)
    aspect = 1242 / 375
    draw = 10_000

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        """Sequence by sequence, frame by frame, the weathers of a frame one after another."""
        base = next((root / name for name in _CLOUDS if (root / name).is_dir()), None)
        if base is None:
            raise DataError(
                f"{root}: no folder {' or '.join(_CLOUDS)} in it; give the Virtual KITTI root, and "
                "make its point clouds with create_npy.py of the vkitti3D-dataset"
            )
        return [
            FrameRef(
                token=f"{sequence}/{weather}/{cloud.stem}",
                scene=sequence,
                reader=self.name,
                image_path=root / "vkitti_1.3.1_rgb" / sequence / weather / f"{cloud.stem}.png",
                points_path=cloud,
                label_path=cloud,
                image_size=SIZE,
                calib=_CALIB,
            )
            for sequence in SEQUENCES
            for cloud in sorted((base / sequence).glob("*.npy"))
            for weather in WEATHERS
        ]

    def read(self, ref: FrameRef) -> RawFrame:
        assert ref.points_path is not None
        cloud = _read_cloud(ref.points_path)
        points, labels = cloud[:, :3].astype(np.float32), cloud[:, 6]
        known = np.isin(labels, list(_RAW_NAMES))  # before a half or a NaN becomes a whole number
        if not known.all():
            raise DataError(
                f"{ref.points_path}: label {labels[~known][0]:g}, expected 0 to 13 or 99; "
                "make the point cloud again"
            )
        return RawFrame(read_image(ref.image_path), points, labels.astype(np.uint8))

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        """Kept are points with x > 0; in double precision."""
        assert raw.points is not None and ref.calib is not None
        xyz = raw.points[:, :3].astype(np.float64)
        front = np.flatnonzero(xyz[:, 0] > 0)
        uvw = np.array(ref.calib.camera)[:, :3] @ xyz[front].T
        rows, row_col = inside_image(uvw, front, (raw.image.height, raw.image.width))
        return rows, row_col, raw.points[rows, 0]

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return _RAW_NAMES


def _read_cloud(path: Path) -> Array:
    """The (N, 7) floating-point numbers of a cloud, still on disk; nothing is unpickled."""
    try:
        cloud = np.load(regular(path), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; make the point cloud again") from None
    except (
        OSError, ValueError, TypeError, OverflowError, EOFError, SyntaxError, MemoryError,
        RecursionError, tokenize.TokenError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path}: not a readable array ({why(error)}); make the point cloud again"
        ) from None
    if not isinstance(cloud, np.ndarray):
        cloud.close()
        raise DataError(f"{path}: an archive, expected one array; make the point cloud again")
    if cloud.ndim != 2 or cloud.shape[1] != 7 or cloud.dtype.kind != "f":
        raise DataError(
            f"{path}: {cloud.dtype} {cloud.shape}, expected numbers (N, 7): x, y, z, red, green, "
            "blue, label; make the point cloud again"
        )
    if len(cloud) > MAX_POINTS:
        raise DataError(
            f"{path}: {len(cloud)} points, an image has {MAX_POINTS} pixels; "
            "make the point cloud again"
        )
    return cloud
