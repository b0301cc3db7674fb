"""nuScenes with lidarseg labels: six cameras and a LiDAR in Boston and Singapore.

A frame is a key frame: the LiDAR sweep and the image of the front camera. On disk: tables of JSON
below a folder named after the version, files below samples/ and lidarseg/. The split lists are
those of the released code; its class map follows the 16 classes of the lidarseg benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from msgspec import Meta, MsgspecError, Raw, Struct, ValidationError, json

from ftdpp.readers.base import (
    Array,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    ids,
    inside_image,
    make_calib,
    raw_labels,
    read_array,
    read_image,
    regular,
    rotation,
    stamp,
)

# ---- scenes and splits --------------------------------------------------------------------------

# The 150 scenes of OFFICIAL_VAL are everyone's test split; every other scene is a training scene.
OFFICIAL_VAL = ids(
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630"
    " 632-638 770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972"
    " 1059-1073"
)
# What is held out of the training scenes of a target; scene 1044 is in both lists, as released.
VAL_NIGHT = ids("1044-1058")
VAL_SINGAPORE = ids(
    "4-11 45-54 347-349 356-359 786-787 789-792 847-856 858 860-866 975-984 988-991 1044 1106-1110"
)
# Semi-supervised adaptation: training scenes in Singapore, and those of them that have labels.
SSDA_TRAIN = ids(
    "1-2 19-34 41-44 55-61 120-135 138-139 149-152 154-155 157-160 177-185 187-188 190-196 315-318"
    " 350-355 360-386 399-403 405-408 410-439 945 947 949 952-953 955-961 992 994-1025 1045-1058"
    " 1074-1102 1104-1105"
)
SSDA_LABELLED = ids(
    "2 23 30 42 59 120-121 123 130-131 134-135 139 151 154 157 178-179 185 188 191 193 316 362"
    " 369-372 379 381 385 399 402-403 406-407 412 417 421 423-424 426 431 436-437 947 949 953"
    " 960-961 997-999 1002 1004 1008 1012 1045 1048 1050 1058 1074-1075 1077-1079 1083 1085 1087"
    " 1090 1095-1096"
)
_VAL_SCENES = {"singapore": VAL_SINGAPORE, "night": VAL_NIGHT}
# domain -> whether a scene belongs to it, from the log's location and the scene's description
_BELONGS: dict[str, Callable[[str, str], bool]] = {
    "usa": lambda location, description: "boston" in location.lower(),
    "singapore": lambda location, description: "singapore" in location.lower(),
    "day": lambda location, description: "night" not in description.lower(),
    "night": lambda location, description: "night" in description.lower(),
    "nuscenes": lambda location, description: True,
}


def _domain(name: str, **frames: int) -> Domain:
    """`frames`: in the complete data set, as papers of this family count them."""
    return Domain(name, "nuscenes", 0, tuple(frames), frames)


def _in_split(scene: str, domain: str, split: str) -> bool:
    """Whether a scene ("0003") of a domain belongs to one of its splits train, val, test."""
    if scene in OFFICIAL_VAL:
        return split == ("val" if domain == "nuscenes" else "test")
    if scene in _VAL_SCENES.get(domain, ()):
        return split == "val"
    return split == "train"


# ---- the reader ---------------------------------------------------------------------------------


class NuScenes(Reader):
    name = "nuscenes"
    domains = (
        _domain("usa", train=15695, test=3090),
        _domain(
            "singapore", train=9665, val=2770, test=2929, train_labelled=2845, train_unlabelled=6820
        ),
        _domain("day", train=24745, test=5417),
        _domain("night", train=2779, val=606, test=602),
        _domain("nuscenes", train=28130, val=6019),  # the official splits, for weak supervision
    )
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "street6": (
            "vehicle.bicycle, vehicle.bus.bendy, vehicle.bus.rigid, vehicle.car, "
            "vehicle.construction, vehicle.motorcycle, vehicle.trailer, vehicle.truck",
            "flat.driveable_surface",
            "flat.sidewalk",
            "flat.terrain",
            "static.manmade",
            "static.vegetation",
        ),
        "nuscenes16": (
            "movable_object.barrier",
            "vehicle.bicycle",
            "vehicle.bus.bendy, vehicle.bus.rigid",
            "vehicle.car",
            "vehicle.construction",
            "vehicle.motorcycle",
            "human.pedestrian.adult, human.pedestrian.child, human.pedestrian.construction_worker, "
            "human.pedestrian.police_officer",
            "movable_object.trafficcone",
            "vehicle.trailer",
            "vehicle.truck",
            "flat.driveable_surface",
            "flat.other",
            "flat.sidewalk",
            "flat.terrain",
            "static.manmade",
            "static.vegetation",
        ),
    }
    label_files = "lidarseg.json and the lidarseg folder"
    image = (225, 400)  # from 900x1600

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        def chosen(ref: FrameRef, location: str, description: str) -> bool:
            scene = ref.scene.removeprefix("scene-")
            if split == "train_labelled":  # the released lists, with no look at the location
                return scene in SSDA_LABELLED
            if split == "train_unlabelled":
                return scene in SSDA_TRAIN - SSDA_LABELLED
            if not _BELONGS[domain.name](location, description):
                return False
            return split is None or _in_split(scene, domain.name, split)

        directory = _directory(root, version)
        stamps = tuple(stamp(path) for path in _table_files(directory))
        return [row[0] for row in _key_frames(root, directory, stamps) if chosen(*row)]

    def read(self, ref: FrameRef) -> RawFrame:
        assert ref.points_path is not None
        points = read_array(ref.points_path, np.float32, 5)[:, :4]  # the fifth is the ring
        labels = read_array(ref.label_path, np.uint8, 1)[:, 0] if ref.label_path else None
        return RawFrame(read_image(ref.image_path), points, labels)

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        """Kept are points with depth > 0. In double precision, with which kept points and pixels
        equal the released code's bit for bit."""
        assert raw.points is not None and ref.calib is not None
        p = raw.points[:, :3].T.astype(np.float64)
        for quaternion, translation, inverse in ref.calib.steps:
            turn, shift = rotation(quaternion), np.array(translation)[:, None]
            p = turn.T @ (p - shift) if inverse else turn @ p + shift
        front = np.flatnonzero(p[2] > 0)
        uvw = np.array(ref.calib.camera) @ p[:, front]
        rows, row_col = inside_image(uvw, front, (raw.image.height, raw.image.width))
        return rows, row_col, p[2, rows].astype(np.float32)

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return dict(ref.categories)

    def prediction_path(self, ref: FrameRef, split: str) -> Path:
        return Path("lidarseg", split, f"{ref.stem}_lidarseg.bin")

    def write_prediction(self, path: Path, label: Array, ids: Array) -> None:
        """u8, classes from 1 on, 0 where nothing was predicted: with nuscenes16 the ids of the
        lidarseg challenge."""
        raw_labels(label, np.arange(1, len(ids) + 1)).astype(np.uint8).tofile(path)

    def version(self, root: Path, version: str | None) -> str | None:
        return _directory(root, version).name

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        return _table_files(_directory(root, version))


# ---- tables -------------------------------------------------------------------------------------

_TABLES = (
    "scene",
    "log",
    "sample",
    "sample_data",
    "calibrated_sensor",
    "sensor",
    "ego_pose",
    "category",
    "lidarseg",
)


def _directory(root: Path, version: str | None) -> Path:
    versions = (version,) if version else ("v1.0-trainval", "v1.0-mini")
    if version and PurePosixPath(version).name != version:
        raise DataError(f"{root}: version {version!r}, expected the name of a folder in it")
    for name in versions:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"{root}: no folder {' or '.join(versions)} in it; "
        "give the nuScenes root that holds this folder"
    )


def _table_files(directory: Path) -> list[Path]:
    return [directory / f"{name}.json" for name in _TABLES]


class _Row(Struct):
    """A row of a table: the columns that are read, each of its type; others may be there."""


class _Sensor(_Row):
    token: str
    channel: str


class _Calibrated(_Row):
    token: str
    sensor_token: str
    rotation: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    camera_intrinsic: tuple[tuple[float, float, float], ...]  # none of a LiDAR


class _SampleData(_Row):
    token: str
    sample_token: str
    ego_pose_token: str
    calibrated_sensor_token: str
    filename: str
    is_key_frame: bool
    height: Annotated[int, Meta(ge=0)] | None = None
    width: Annotated[int, Meta(ge=0)] | None = None


class _EgoPose(_Row):
    token: str
    rotation: tuple[float, float, float, float]
    translation: tuple[float, float, float]


class _Scene(_Row):
    token: str
    log_token: str
    name: str
    description: str


class _Log(_Row):
    token: str
    location: str


class _Sample(_Row):
    token: str
    scene_token: str
    timestamp: int


class _Label(_Row):
    sample_data_token: str
    filename: str


class _Category(_Row):
    name: str
    index: Annotated[int, Meta(ge=0, le=255)]


R = TypeVar("R", bound=_Row)


def _table(
    directory: Path, name: str, kind: type[R], keep: Callable[[R], bool] = lambda row: True
) -> list[R]:
    """Rows of a table, decoded one after another, each against its declared columns. `keep` decides
    at once: most of the 2.6 million rows of sample_data and ego_pose belong to frames between the
    key frames, and would fill gigabytes.

    Raises:
        DataError: no such table, no JSON, or a row with a column missing or of another type.
    """
    path, kept, number = directory / f"{name}.json", [], -1
    decoder = json.Decoder(kind)
    try:
        for raw in json.decode(regular(path).read_bytes(), type=list[Raw]):
            number += 1
            row = decoder.decode(raw)
            if keep(row):
                kept.append(row)
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; expected a nuScenes table, download its metadata"
        ) from None
    except (MsgspecError, UnicodeDecodeError, RecursionError) as error:
        where = f"row {number}: " if isinstance(error, ValidationError) and number >= 0 else ""
        raise DataError(
            f"{path}: not a readable nuScenes table ({where}{error}); download it again"
        ) from None
    return kept


def _below(root: Path, table: Path, name: str) -> Path:
    """The file that a table names. Raises DataError for one that is not below the root."""
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not plain.parts or "\0" in name:
        raise DataError(
            f"{table}: file name {name!r}, expected a path below {root}; download the table again"
        )
    return root / plain


@lru_cache(maxsize=2)  # the full tables take seconds, and each split asks
def _key_frames(
    root: Path, directory: Path, stamps: tuple[tuple[str, int, int], ...]
) -> list[tuple[FrameRef, str, str]]:
    """All key frames as (frame, location, description), by scene and time.

    `stamps` of the tables: another stamp, another entry in the cache.
    """
    try:
        return _join_tables(root, directory)
    except KeyError as error:
        raise DataError(
            f"{directory}: tables do not fit together, {error} is not found; download them again"
        ) from None


def _join_tables(root: Path, directory: Path) -> list[tuple[FrameRef, str, str]]:
    channel = {row.token: row.channel for row in _table(directory, "sensor", _Sensor)}
    sensors = {
        row.token: row
        for row in _table(directory, "calibrated_sensor", _Calibrated)
        if channel[row.sensor_token] in ("LIDAR_TOP", "CAM_FRONT")
    }
    files: dict[tuple[str, str], _SampleData] = {}  # (sample, channel) -> its key-frame file
    for data in _table(
        directory,
        "sample_data",
        _SampleData,
        lambda row: row.is_key_frame and row.calibrated_sensor_token in sensors,
    ):
        sensor = sensors[data.calibrated_sensor_token].sensor_token
        files[data.sample_token, channel[sensor]] = data
    wanted = {row.ego_pose_token for row in files.values()}
    poses = {
        row.token: row
        for row in _table(directory, "ego_pose", _EgoPose, lambda row: row.token in wanted)
    }
    scenes = {row.token: row for row in _table(directory, "scene", _Scene)}
    location = {row.token: row.location for row in _table(directory, "log", _Log)}
    # Without lidarseg.json frames have no labels, and category.json has no column `index`, either.
    table = directory / "lidarseg.json"
    lidarseg = _table(directory, "lidarseg", _Label) if table.exists() else []
    labels = {row.sample_data_token: _below(root, table, row.filename) for row in lidarseg}
    categories: tuple[tuple[int, str], ...] = ()
    if lidarseg:
        categories = tuple((r.index, r.name) for r in _table(directory, "category", _Category))
        if len(dict(categories)) < len(categories):
            raise DataError(
                f"{directory / 'category.json'}: two categories have one index; download it again"
            )
    table = directory / "sample_data.json"

    frames = []
    for sample in sorted(
        _table(directory, "sample", _Sample),
        key=lambda row: (scenes[row.scene_token].name, row.timestamp),
    ):
        scene, token = scenes[sample.scene_token], sample.token
        lidar, camera = files[token, "LIDAR_TOP"], files[token, "CAM_FRONT"]
        moves: list[tuple[_Calibrated | _EgoPose, bool]] = [
            (sensors[lidar.calibrated_sensor_token], False),  # sensor, ego, world ...
            (poses[lidar.ego_pose_token], False),  # ... at the sweep's time;
            (poses[camera.ego_pose_token], True),  # world, ego, camera ...
            (sensors[camera.calibrated_sensor_token], True),  # ... at the image's
        ]
        ref = FrameRef(
            token=token,
            scene=scene.name,
            reader=NuScenes.name,
            image_path=_below(root, table, camera.filename),
            points_path=_below(root, table, lidar.filename),
            label_path=labels.get(lidar.token),
            image_size=(camera.height, camera.width) if camera.height and camera.width else None,
            calib=make_calib(
                directory / "calibrated_sensor.json / ego_pose.json",
                [(row.rotation, row.translation, inverse) for row, inverse in moves],
                sensors[camera.calibrated_sensor_token].camera_intrinsic,
            ),
            categories=categories,
            stem=lidar.token,
        )
        frames.append((ref, location[scene.log_token], scene.description))
    return frames
