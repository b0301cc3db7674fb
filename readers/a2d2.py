"""A2D2, the Audi data set: a car with six cameras and five LiDARs in the south of Germany.

A frame is what the front-centre camera sees. On disk, below the root or its camera_lidar_semantic:
DRIVE/{camera,label,lidar}/cam_front_center/TIME_{camera,label,lidar}_frontcenter_NNNNNNNNN.png,
.npz for `lidar`; class_list.json (colour -> class); cams_lidars.json, a download of its own. An npz
holds the points that this camera sees, and their pixels in the *undistorted* image.

Drives, classes and what is left out follow the released code. It has frames without `row` in the
npz, which it skips, and some with over 50,000 points, which it replaces in training by their index
in a list; here both kinds are frames without points, which no index keeps.

Sources: a2d2.audi and its tutorial (keys of the files, camera model, points in the frame of the
camera's view: x ahead, y to the left, z up); docs.opencv.org, module calib3d (lens distortion).
"""

from __future__ import annotations

import json
import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers.base import (
    PIXELS,
    Array,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    missing,
    read_image,
    regular,
    stamp,
    why,
)

DRIVES = {
    "train": (
        "20180810_142822", "20180925_101535", "20180925_112730", "20180925_124435",
        "20180925_135056", "20181008_095521", "20181016_082154", "20181016_125231",
        "20181107_132300", "20181107_132730", "20181107_133258", "20181107_133445",
        "20181108_084007", "20181108_091945", "20181108_103155", "20181108_123750",
        "20181108_141609", "20181204_135952", "20181204_154421", "20181204_170238",
    ),
    "test": ("20180807_145028",),
}  # fmt: skip
MAX_POINTS = 50_000  # frames with more are left out
_MAX_BYTES = 1 << 26  # of an npz when unpacked; those of the data set have a few megabytes
_INNER = "camera_lidar_semantic"  # what the archive unpacks to
_NO_COLOUR = 255  # raw id of colours that are no class: interpolation makes them along edges


class A2d2(Reader):
    name = "a2d2"
    domains = (Domain("a2d2", "a2d2", 1, tuple(DRIVES), {"train": 27695, "test": 942}),)
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a2d2_10": (
            "Car 1, Car 2, Car 3, Car 4, Ego car",
            "Truck 1, Truck 2, Truck 3",
            "Bicycle 1, Bicycle 2, Bicycle 3, Bicycle 4, "
            "Small vehicles 1, Small vehicles 2, Small vehicles 3",
            "Pedestrian 1, Pedestrian 2, Pedestrian 3",
            "RD normal street, Zebra crossing, Solid line, RD restricted area, Slow drive area, "
            "Drivable cobblestone, Dashed line, Painted driv. instr.",
            "Parking area",
            "Sidewalk, Curbstone",
            "Buildings",
            "Nature object",
            "Poles, Traffic signal 1, Traffic signal 2, Traffic signal 3, Traffic sign 1, "
            "Traffic sign 2, Traffic sign 3, Sidebars, Speed bumper, Irrelevant signs, "
            "Road blocks, Obstacles / trash, Animals, Signal corpus, Electronic traffic, "
            "Traffic guide obj., Grid structure",
        )
    }
    label_files = "the label folders"
    image = (302, 480)  # from 1208x1920

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        base = _base(root)
        for path in _tables(base):
            if root not in path.parents:  # an index names its files by their place in the root
                raise DataError(f"{path}: lies outside of {root}; give {path.parent} as the root")
        camera, palette = _read_tables(base)
        refs = []
        for drive in sorted(d for s in DRIVES if split in (None, s) for d in DRIVES[s]):
            files = (base / drive / "camera" / "cam_front_center").glob("*_camera_frontcenter_*")
            for image in sorted(path for path in files if path.suffix == ".png"):
                lidar, label = (_sibling(image, kind) for kind in ("lidar", "label"))
                refs.append(
                    FrameRef(
                        token=f"{drive}/{image.stem.rsplit('_', 1)[1]}",
                        scene=drive,
                        reader=self.name,
                        image_path=image,
                        points_path=lidar.with_suffix(".npz"),
                        label_path=label if label.exists() else None,
                        image_size=camera.size,
                        categories=palette.categories,
                    )
                )
        return refs

    def read(self, ref: FrameRef) -> RawFrame:
        """Points are (M, 4): x, y, z and the depth along the optical axis."""
        assert ref.points_path is not None
        camera, palette = _read_tables(ref.image_path.parents[3])
        points, row_col = _read_lidar(ref.points_path)
        image = Image.fromarray(_undistorted(_read_picture(ref.image_path, camera), camera))
        labels = None
        if ref.label_path is not None:
            picture = _read_picture(ref.label_path, camera)
            labels = np.full(len(points), _NO_COLOUR, np.uint8)
            inside = _inside(row_col, camera.size)
            row, col = row_col[inside].astype(np.int64).T
            colours = _blend(picture, camera, row * camera.size[1] + col).astype(np.int64)
            labels[inside] = palette.ids(colours @ [1 << 16, 1 << 8, 1])
        return RawFrame(image, points, labels, row_col=row_col)

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        """Pixels and depths are those of the npz. Kept are points with depth > 0 whose pixel is in
        the image; row 0 and column 0 belong to it."""
        assert raw.points is not None and raw.row_col is not None
        depth = raw.points[:, 3]
        inside = _inside(raw.row_col, (raw.image.height, raw.image.width))
        rows = np.flatnonzero(inside & np.isfinite(depth) & (depth > 0))
        return rows, raw.row_col[rows], depth[rows]

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return dict(ref.categories) | {_NO_COLOUR: "no class"}

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        return _tables(_base(root))


def _inside(row_col: Array, size: tuple[int, int]) -> Array:
    row, col = row_col.T
    return (row >= 0) & (row < size[0]) & (col >= 0) & (col < size[1])


# ---- files --------------------------------------------------------------------------------------


def _base(root: Path) -> Path:
    """The folder that holds the drives."""
    drives = [drive for names in DRIVES.values() for drive in names]
    for base in (root, root / _INNER):
        if any((base / drive).is_dir() for drive in drives):
            return base
    raise DataError(
        f"{root}: no drive such as {DRIVES['test'][0]} in it or in {_INNER}; give the A2D2 root"
    )


def _tables(base: Path) -> list[Path]:
    """cams_lidars.json and class_list.json: beside the drives, or one folder up."""
    places = (base, base.parent) if base.name == _INNER else (base,)
    return [
        next((place / name for place in places if (place / name).exists()), base / name)
        for name in ("cams_lidars.json", "class_list.json")
    ]


def _read_tables(base: Path) -> tuple[_Camera, _Palette]:
    camera, palette = _tables(base)
    return _camera(stamp(camera)), _palette(stamp(palette))


def _sibling(image: Path, kind: str) -> Path:
    """The file of the same frame in the folder `kind`."""
    time, _, rest = image.name.partition("_camera_")
    return image.parents[2] / kind / image.parent.name / f"{time}_{kind}_{rest}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(regular(path).read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; download it from a2d2.audi and put it into the A2D2 root"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({why(error)}); download it again") from None


def _read_lidar(path: Path) -> tuple[Array, Array]:
    """Points (M, 4) f32 and pixels (M, 2) f32; M = 0 for a frame that is left out.

    Nothing is unpickled, and no archive is unpacked that claims to be larger than a frame can be.
    Other keys, such as the reflectance, are not read.
    """
    arrays: dict[str, Array] = {}
    try:
        with regular(path).open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("one array, expected an archive of several")
            size = sum(member.file_size for member in file.zip.infolist())
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes when unpacked, expected at most {_MAX_BYTES}")
            keys = {key.removeprefix("pcloud_").removeprefix("attr."): key for key in file.files}
            if "points" not in keys:
                raise ValueError(f"no key 'points', found {', '.join(file.files) or 'none'}")
            if "row" not in keys:  # a known defect of some frames
                return np.empty((0, 4), np.float32), np.empty((0, 2), np.float32)
            for name in ("points", "row", "col", "depth"):
                if name not in keys:
                    raise ValueError(f"no key {name!r}, found {', '.join(file.files)}")
                arrays[name] = file[keys[name]]
    except FileNotFoundError:
        raise missing(path) from None
    except (
        OSError, ValueError, TypeError, EOFError, SyntaxError, RuntimeError, MemoryError,
        OverflowError, RecursionError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
        tokenize.TokenError,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: not readable points ({why(error)}); download it again") from None
    points = arrays["points"]
    shapes = {name: array.shape for name, array in arrays.items()}
    wanted = dict.fromkeys(arrays, points.shape[:1]) | {"points": (*points.shape[:1], 3)}
    if shapes != wanted or any(array.dtype.kind not in "fiu" for array in arrays.values()):
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise DataError(
            f"{path}: {found}; expected numbers, points (M, 3) and the others (M,); "
            "download it again"
        )
    kept = slice(0 if len(points) > MAX_POINTS else None)
    xyzd = np.column_stack([points, arrays["depth"]])[kept].astype(np.float32)
    return xyzd, np.column_stack([arrays["row"], arrays["col"]])[kept].astype(np.float32)


def _read_picture(path: Path, camera: _Camera) -> Array:
    image = read_image(path)
    if (image.height, image.width) != camera.size:
        raise DataError(
            f"{path}: image is {(image.height, image.width)} (H, W), cams_lidars.json says "
            f"{camera.size}; restore it"
        )
    return np.asarray(image)


# ---- palette ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Palette:
    categories: tuple[tuple[int, str], ...]  # raw id, the place in class_list.json; raw name
    colours: Array  # (C,) i64, red << 16 | green << 8 | blue, ascending
    order: Array  # (C,) u8 raw ids of `colours`

    def ids(self, colours: Array) -> Array:
        """Raw ids u8 of colours; of those that are no class `_NO_COLOUR`."""
        place = np.searchsorted(self.colours, colours).clip(max=len(self.colours) - 1)
        found = self.colours[place] == colours
        return np.where(found, self.order[place], np.uint8(_NO_COLOUR))


@lru_cache(maxsize=4)
def _palette(file: tuple[str, int, int]) -> _Palette:
    """Read class_list.json. `file` is its stamp: another stamp, another entry in the cache."""
    path = Path(file[0])
    content = _read_json(path)
    try:
        colours = [int(colour.removeprefix("#"), 16) for colour in content]
        names = list(content.values())
        right = all(isinstance(name, str) for name in names)
        right = right and 0 < len(set(colours)) == len(names) < _NO_COLOUR
        if not right or not all(0 <= colour < 1 << 24 for colour in colours):
            raise ValueError("other names or colours")
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f'{path}: expected colours and class names as in "#ff0000": "Car 1" ({error}); '
            "download it again"
        ) from None
    order = np.argsort(colours)
    return _Palette(tuple(enumerate(names)), np.array(colours)[order], order.astype(np.uint8))


# ---- camera -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    size: tuple[int, int]  # (H, W)
    # For each pixel of the undistorted image, in rows, four neighbours in the original image:
    corner: Array  # (H * W,) i32 the upper left one, as a place in the image with a border of one
    weights: Array  # (4, H * W) u16 of upper left, upper right, lower left, lower right; sum 1024


@lru_cache(maxsize=2)
def _camera(file: tuple[str, int, int]) -> _Camera:
    """Read the front-centre camera of cams_lidars.json. `file` is its stamp, as in `_palette`."""
    path = Path(file[0])
    content = _read_json(path)
    try:
        entry = content["cameras"]["front_center"]
        new, old, distortion, (width, height) = (
            np.array(entry[key], np.float64)
            for key in ("CamMatrix", "CamMatrixOriginal", "Distortion", "Resolution")
        )
        lens = entry["Lens"]
        distortion = distortion.ravel()
        if new.shape != (3, 3) or old.shape != (3, 3) or len(distortion) not in (4, 5):
            raise ValueError("matrices need 3x3 numbers, Distortion 4 or 5")
        if not all(np.isfinite(array).all() for array in (new, old, distortion)):
            raise ValueError("a number is not finite")
        if not all(1 <= matrix[i, i] <= 1e6 for matrix in (new, old) for i in (0, 1)):
            raise ValueError("a focal length is not from 1 to 1e6 pixels")
        if not all((np.abs(array) <= 1e6).all() for array in (new, old, distortion)):
            raise ValueError("a number is above 1e6")
        whole = all(n > 0 and n == int(n) for n in (height, width))
        if not whole or height * width > PIXELS:
            raise ValueError(f"Resolution {width}x{height}")
        if lens != "Telecam":
            raise ValueError(f"Lens {lens!r}, that of the front-centre camera is 'Telecam'")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not the calibration of cameras.front_center ({why(error)}); download it again"
        ) from None
    return _Camera(
        (int(height), int(width)),
        *_sources(new, old, np.append(distortion, 0.0)[:5], int(height), int(width)),
    )


def _sources(new: Array, old: Array, distortion: Array, h: int, w: int) -> tuple[Array, Array]:
    """Where each pixel of the undistorted image comes from: `_Camera.corner`, `_Camera.weights`.

    Equal to OpenCV's `undistort`: radial (k1, k2, k3) and tangential (p1, p2) distortion, places
    rounded to 1/32 of a pixel.

    Args:
        new, old: (3,3) camera matrices of the undistorted and of the original image.
        distortion: k1, k2, p1, p2, k3.
    """
    k1, k2, p1, p2, k3 = distortion
    x = ((np.arange(w) - new[0, 2]) / new[0, 0])[None]
    y = ((np.arange(h) - new[1, 2]) / new[1, 1])[:, None]
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    v = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    col, row = old[0, 0] * u + old[0, 2], old[1, 1] * v + old[1, 2]
    # In a border of zeros around the image: what comes from outside is black.
    col, row = (
        np.rint(32 * (place.clip(-1, n) + 1)).astype(np.int64).ravel()
        for place, n in ((col, w), (row, h))
    )
    left, top = np.minimum(col >> 5, w), np.minimum(row >> 5, h)
    right, down = col - 32 * left, row - 32 * top
    weights = [(32 - down) * (32 - right), (32 - down) * right, down * (32 - right), down * right]
    return (top * (w + 2) + left).astype(np.int32), np.stack(weights).astype(np.uint16)


def _undistorted(image: Array, camera: _Camera) -> Array:
    """The undistorted image (H, W, 3) u8."""
    return _blend(image, camera, slice(None)).reshape(image.shape)


def _blend(image: Array, camera: _Camera, chosen: Array | slice) -> Array:
    """Colours (n, 3) u8 of the chosen pixels of the undistorted image, bilinear."""
    height, width = camera.size
    padded = np.zeros((height + 2, width + 2, 4), np.uint8)
    padded[1:-1, 1:-1, :3] = image
    packed = padded.view(np.uint32).ravel()  # one gather for the colours of a pixel
    corner, weights = camera.corner[chosen], camera.weights[:, chosen]
    total = np.full((len(corner), 4), 512, np.uint32)
    for weight, offset in zip(weights, (0, 1, width + 2, width + 3), strict=True):
        colours = packed[corner + offset].view(np.uint8).reshape(-1, 4)
        total += colours * weight[:, None].astype(np.uint32)
    return (total[:, :3] >> 10).astype(np.uint8)
