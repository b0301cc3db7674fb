"""What readers share: the contract of a reader, what it hands over, checks of files and numbers.

Conventions of every reader: points in metres in the LiDAR frame, pixels as (row, col), RGB images,
depth in metres along the optical axis of the camera.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFile

from ftdpp import files

Array = np.ndarray[Any, np.dtype[Any]]
PIXELS = 1 << 24  # a larger image is refused before it is decoded; those of Cityscapes have 2^21


class DataError(Exception):
    """Data that cannot be used.

    The message names the file, what was found, what was expected and what to do.
    """


# ---- what a reader hands over -------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """A part of a data set that serves as source or target, and its splits."""

    name: str
    reader: str  # key of READERS
    flip_axis: int  # the 3D flip negates R[flip_axis, flip_axis]: 0 where the LiDAR looks along y
    splits: tuple[str, ...]
    frames: Mapping[str, int]  # split -> frames in the complete data set


@dataclass(frozen=True)
class Calib:
    """From the LiDAR to pixels.

    `steps` are rigid motions (quaternion wxyz, translation in metres, inverse?), applied in turn.
    With steps, `camera` is the (3,3) intrinsic matrix behind them; without, it is one (3,4) matrix
    from the LiDAR frame to homogeneous pixels.
    """

    steps: tuple[tuple[tuple[float, ...], tuple[float, ...], bool], ...]
    camera: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FrameRef:
    """A frame that was listed: where it lies. Cheap to hold, nothing of it is read yet."""

    token: str  # unique in the data set
    scene: str
    reader: str  # key of READERS
    image_path: Path
    points_path: Path | None = None  # None: a dense data set has no points
    label_path: Path | None = None  # None: the frame has no labels
    depth_path: Path | None = None
    image_size: tuple[int, int] | None = None  # (H, W) where the data set states it
    calib: Calib | None = None
    categories: tuple[tuple[int, str], ...] = ()  # raw id, raw name: where the ids are data, too
    stem: str = ""  # of its label file, where that is not named after the token

    @property
    def files(self) -> list[Path]:
        """The files that hold this frame. One that holds points and labels counts once."""
        paths = (self.image_path, self.points_path, self.label_path, self.depth_path)
        return list(dict.fromkeys(path for path in paths if path is not None))


@dataclass
class RawFrame:
    """A frame as it lies on disk."""

    image: Image.Image  # RGB
    points: Array | None = None  # (M, 3+) f32: x, y, z, and what else the reader stores
    labels: Array | None = None  # raw ids: (M,) of the points, or (H, W) where `Reader.dense`
    depth: Array | None = None  # (H, W) f32 metres along the optical axis, 0 = unknown
    row_col: Array | None = None  # (M, 2) f32 pixels of the points where the data set stores them


# ---- the contract -------------------------------------------------------------------------------


class Reader(ABC):
    """A data set on disk. A new one is a subclass in a file of its own and a row in READERS."""

    name: str  # key of READERS; prepared indexes store it
    domains: tuple[Domain, ...]
    # class set -> for each of its classes the raw names, as in "car, bus"; all others are ignored
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    label_files: str  # what to add where labels are missing
    image: tuple[int, int] | None = None  # default (H, W) of prepared images; None: the original
    crop: tuple[int, int] | None = None  # default (H, W) of the crop in training
    aspect: float | None = None  # width / height, where images are much wider than 16:9
    dense: bool = False  # labels are images: every pixel is a row, there are no points
    draw: int | None = None  # points drawn at random per sample in training; None: all

    @abstractmethod
    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        """The frames of a split in a fixed order; `split` None: all frames of the domain.

        No file of a frame is opened. Raises DataError for missing or unreadable tables.
        """

    @abstractmethod
    def read(self, ref: FrameRef) -> RawFrame:
        """Read one frame. Raises DataError for a missing, truncated or corrupt file."""

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        """The rows of raw.points that are kept (n,) i64, their pixels (n,2) f32, not rounded, and
        their depths (n,) f32, metres along the optical axis.

        Kept are points in front of the camera and strictly inside raw.image. All points are finite.
        """
        raise TypeError(f"{self.name} has no points to project")

    @abstractmethod
    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        """Raw label id -> raw name."""

    def prediction_path(self, ref: FrameRef, split: str) -> Path:
        """Where a benchmark looks for the labels of a frame, below the folder of predictions."""
        return Path(f"{ref.token}.npy")

    def write_prediction(self, path: Path, label: Array, ids: Array) -> None:
        """Write predicted classes as the data set's benchmark takes them.

        Here, for a data set without a benchmark: npy, u8, the classes as they are.

        Args:
            label: (M,) u8 of all points on disk, or (H, W) of all pixels; 255 = not predicted.
            ids: (K,) i64, of each class the smallest raw id of its first raw name.
        """
        with path.open("wb") as file:  # np.save would add a suffix
            np.save(file, label)

    def version(self, root: Path, version: str | None) -> str | None:
        """The version that is read where `version` is asked for; None: there are no versions."""
        return None

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        """The files, beside the frames' own, that the content of these frames depends on."""
        return []


# ---- checks and small tools ---------------------------------------------------------------------


def ids(ranges: str, digits: int = 4) -> frozenset[str]:
    """Read "3 12-14" as {"0003", "0012", "0013", "0014"}."""
    spans = ([int(end) for end in part.split("-")] for part in ranges.split())
    return frozenset(f"{i:0{digits}}" for span in spans for i in range(span[0], span[-1] + 1))


def rotation(quaternion: Sequence[float] | Array) -> Array:
    """The (3,3) matrix of a quaternion (w, x, y, z), which need not have unit length."""
    return unit_rotation(np.array(quaternion) / np.linalg.norm(quaternion))


def unit_rotation(quaternion: Sequence[float] | Array) -> Array:
    """The (3,3) matrix of a quaternion (w, x, y, z) of unit length."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def compose(a: Array, b: Array) -> Array:
    """The product of two quaternions: rotate by b, then by a."""
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])


def euler(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """The quaternion (w, x, y, z) of a roll about x, then a pitch about y, then a yaw about z."""
    about_x, about_y, about_z = (
        np.array([math.cos(angle / 2), *(math.sin(angle / 2) * axis)])
        for angle, axis in zip((roll, pitch, yaw), np.eye(3), strict=True)
    )
    return compose(compose(about_z, about_y), about_x)


def inside_image(uvw: Array, rows: Array, image_size: tuple[int, int]) -> tuple[Array, Array]:
    """Homogeneous pixels (3,n) of the points `rows` (n,) -> those of `rows` that have a pixel,
    their pixels (m,2) f32, not rounded.

    The comparison follows the rounding to single precision: a point that rounds onto the border
    has no pixel.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # depth 0: no pixel
        row_col = (uvw[:2] / uvw[2]).T[:, ::-1].astype(np.float32)
    inside = ((row_col > 0) & (row_col < np.array(image_size, np.float32))).all(1)
    return rows[inside], row_col[inside]


RESTORE = "restore the original file"


def make_calib(path: Path, steps: Iterable[tuple[Any, Any, bool]], camera: Any) -> Calib:
    """A calibration from the numbers that `path` holds.

    Raises DataError for what no camera has: such numbers would silently empty every frame, or put
    all of its points on one pixel.
    """
    try:
        calib = Calib(
            tuple((tuple(map(float, q)), tuple(map(float, t)), inverse) for q, t, inverse in steps),
            tuple(tuple(map(float, row)) for row in camera),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: calibration is not made of numbers ({error}); restore the original file"
        ) from None
    columns = 3 if calib.steps else 4
    complete = [len(row) for row in calib.camera] == [columns] * 3 and all(
        len(q) == 4 and len(t) == 3 and any(q) for q, t, _ in calib.steps
    )
    if not complete:
        raise DataError(f"{path}: calibration holds missing or zero numbers; {RESTORE}")
    # The last row is the optical axis; focal lengths are what of the others is at right angles to
    # it, in an intrinsic matrix and in one that is turned.
    rows = np.array(calib.camera)[:, :3]
    with np.errstate(all="ignore"):
        axis = np.linalg.norm(rows[2])
        across = rows[:2] - np.outer(rows[:2] @ rows[2], rows[2]) / axis**2
        focal = np.linalg.norm(across, axis=1)
    turns = [math.hypot(*q) for q, _, _ in calib.steps]
    shifts = [x for _, t, _ in calib.steps for x in t] + [row[3] for row in calib.camera if row[3:]]
    limits: list[tuple[str, list[float], float, float]] = [
        ("focal length (pixels)", focal.tolist(), 1, 1e6),
        ("length of an axis", [float(axis), *turns], 0.5, 2),
        ("shift", list(map(abs, shifts)), 0, 1e9),
    ]
    for what, found, low, high in limits:
        wrong = [x for x in found if not low <= x <= high]  # NaN is among them
        if wrong:
            raise DataError(
                f"{path}: calibration holds a {what} of {wrong[0]:.3g}, expected {low:g} to "
                f"{high:g}; {RESTORE}"
            )
    return calib


def require_known(path: Path, labels: Array, known: Collection[int]) -> None:
    """Raises DataError for a label id (whole numbers, not negative) that the data set has not."""
    found = np.bincount(labels.ravel(), minlength=1)
    strange = sorted(set(np.flatnonzero(found).tolist()) - set(known))
    if strange:
        some = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
        raise DataError(
            f"{path}: label ids {some} ({plural(int(found[strange].sum()), 'row')}), which the "
            "data set does not have; these are no original labels, restore the file"
        )


def raw_labels(label: Array, ids: Array) -> Array:
    """Classes u8, 255 = not predicted, as raw ids i64; 0, which all benchmarks ignore, for none."""
    table = np.zeros(256, np.int64)
    table[: len(ids)] = ids
    return table[label]


def plural(count: int, noun: str) -> str:
    """1, "frame" -> "1 frame"; 2, "frame" -> "2 frames"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def why(error: Exception) -> str:
    """An error in a few words; without the advice to unpickle, which NumPy gives."""
    if "pickle" in str(error):
        return "Python objects, which are never loaded from a file"
    named = isinstance(error, ValueError | OSError)  # these say what is wrong by themselves
    return " ".join((str(error) if named else f"{type(error).__name__}: {error}").split())[:160]


def stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and modification time of a file; a missing one has size -1."""
    try:
        found = path.stat()
        return str(path), found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        return str(path), -1, 0


def missing(path: Path) -> DataError:
    """The error for a file that is not there."""
    return DataError(f"{path}: missing; download the part of the data set that holds it")


def regular(path: Path) -> Path:
    """`files.regular` of a data set. Raises FileNotFoundError; DataError where it is no file."""
    try:
        return files.regular(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; restore it") from None


def read_array(path: Path, dtype: type[np.generic], columns: int) -> Array:
    """The numbers of a binary file, (N, columns). Raises DataError: missing, empty or truncated."""
    try:
        content = regular(path).read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise DataError(f"{path}: not readable ({error}); restore the original file") from None
    row = columns * np.dtype(dtype).itemsize
    if not content or len(content) % row:
        raise DataError(
            f"{path}: {len(content)} bytes, expected a multiple of {row}; "
            "truncated, download it again"
        )
    return np.frombuffer(content, dtype).reshape(-1, columns)


@contextmanager
def open_image(path: Path, *formats: str) -> Iterator[ImageFile.ImageFile]:
    """An open image of a size that is allowed; failures inside the block become a DataError.

    formats: in Pillow's words; without them PNG and JPEG. Others are never opened: for some Pillow
    runs another program. Of a PNG the checksums come first: Pillow decodes pixels without them, and
    a wrong label looks like any.
    """
    allowed = formats or ("PNG", "JPEG")
    large = f"{path}: an image of more than {PIXELS} pixels is not read; restore the original file"
    try:
        with Image.open(regular(path), formats=allowed) as file:
            if file.width * file.height > PIXELS:
                raise DataError(large)
            if file.format == "PNG":
                file.verify()
        with Image.open(path, formats=allowed) as file:  # what is verified cannot be read
            yield file
    except FileNotFoundError:
        raise missing(path) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(large) from None
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        kind = " or ".join(formats) or "image"
        raise DataError(f"{path}: not a readable {kind} ({error}); download it again") from None


def read_image(path: Path, *formats: str) -> Image.Image:
    """An image in RGB, of PNG or JPEG unless formats are named. Raises DataError."""
    with open_image(path, *formats) as file:
        return file.convert("RGB")
