"""From data sets on disk to training batches: readers, projection, prepared index, augmentation, stylisation.

A frame is one LiDAR sweep and the image of the front camera. `list_frames` finds the frames of a split, `prepare` keeps
the points that fall into the image and writes them once into flat memory-mapped files, `Index.frame` reads one back,
`sample` augments and voxelises it, `collate` concatenates samples into a `Batch`. A row is a point everywhere.

Conventions: metres, LiDAR frame, x forward for KITTI; pixels are (row, col); images are RGB; coords are voxels (paper: 5 cm).
"released code" below is the code its authors published with the FtD++ paper.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

IGNORE = -100  # label of points that neither the losses nor the metrics count
GRID = 4096  # edge of the voxel grid (the released code calls it full_scale)
FORMAT = 1  # version of the prepared index; a change makes old ones stale
UNLABELLED = 255  # how the index stores IGNORE in a byte
CHUNK = 32  # frames between two checkpoints of `prepare`

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int, str], None]  # frames done, frames in all, what is going on


class DataError(Exception):
    """Data that cannot be used. The message names the file, what was found, what was expected and what to do."""


# ---- domains, splits, classes


@dataclass(frozen=True)
class Domain:
    name: str
    dataset: str  # "nuscenes" | "semantic_kitti" | "virtual_kitti" | "a2d2"
    flip_axis: int  # the 3D flip negates R[flip_axis, flip_axis]: nuScenes' LiDAR looks along y, the others' along x


DOMAINS: dict[str, Domain] = {
    d.name: d
    for d in (
        Domain("usa", "nuscenes", 0),
        Domain("singapore", "nuscenes", 0),
        Domain("day", "nuscenes", 0),
        Domain("night", "nuscenes", 0),
        Domain("skitti", "semantic_kitti", 1),
        Domain("vkitti", "virtual_kitti", 1),
        Domain("a2d2", "a2d2", 1),
    )
}


def _ids(ranges: str, digits: int = 4) -> frozenset[str]:
    """Reads "3 12-14" as {"0003", "0012", "0013", "0014"}."""
    spans = ([int(end) for end in part.split("-")] for part in ranges.split())
    return frozenset(f"{i:0{digits}}" for span in spans for i in range(span[0], span[-1] + 1))


# nuScenes scenes. The 150 of OFFICIAL_VAL are everyone's test split; every other scene is a training scene.
OFFICIAL_VAL = _ids(
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775"
    " 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
)
VAL_NIGHT = _ids("1044-1058")
VAL_SINGAPORE = _ids(  # scene 1044 is in both lists, as released
    "4-11 45-54 347-349 356-359 786-787 789-792 847-856 858 860-866 975-984 988-991 1044 1106-1110"
)
SSDA_TRAIN = _ids(
    "1-2 19-34 41-44 55-61 120-135 138-139 149-152 154-155 157-160 177-185 187-188 190-196 315-318 350-355 360-386"
    " 399-403 405-408 410-439 945 947 949 952-953 955-961 992 994-1025 1045-1058 1074-1102 1104-1105"
)
SSDA_LABELLED = _ids(
    "2 23 30 42 59 120-121 123 130-131 134-135 139 151 154 157 178-179 185 188 191 193 316 362 369-372 379 381 385 399"
    " 402-403 406-407 412 417 421 423-424 426 431 436-437 947 949 953 960-961 997-999 1002 1004 1008 1012 1045 1048"
    " 1050 1058 1074-1075 1077-1079 1083 1085 1087 1090 1095-1096"
)
_VAL_SCENES = {"singapore": VAL_SINGAPORE, "night": VAL_NIGHT}
_SEQUENCES = {
    "train": _ids("0-6 9-10", 2),
    "val": _ids("7", 2),
    "test": _ids("8", 2),
    "train_labelled": _ids("0-1", 2),
    "train_unlabelled": _ids("2-6 9-21", 2),
}
# Frames in the complete data sets (papers of this family); what `check` compares with.
EXPECTED_FRAMES = {
    ("usa", "train"): 15695, ("usa", "test"): 3090, ("day", "train"): 24745, ("day", "test"): 5417,
    ("singapore", "train"): 9665, ("singapore", "val"): 2770, ("singapore", "test"): 2929,
    ("singapore", "train_labelled"): 2845, ("singapore", "train_unlabelled"): 6820,
    ("night", "train"): 2779, ("night", "val"): 606, ("night", "test"): 602,
    ("skitti", "train"): 18029, ("skitti", "val"): 1101, ("skitti", "test"): 4071,
    ("skitti", "train_labelled"): 5642, ("skitti", "train_unlabelled"): 32738,
}  # fmt: skip


def splits(domain: Domain) -> tuple[str, ...]:
    """Names of the splits of a domain. A source domain ("usa", "day") has no "val"."""
    return {
        "usa": ("train", "test"),
        "day": ("train", "test"),
        "night": ("train", "val", "test"),
        "singapore": ("train", "val", "test", "train_labelled", "train_unlabelled"),
        "skitti": ("train", "val", "test", "train_labelled", "train_unlabelled"),
    }.get(domain.name, ("train",))


def _require_split(domain: Domain, split: str | None) -> None:
    if split is None or split in splits(domain):
        return
    why = "a source domain is not split for validation, all its train scenes train; " if split == "val" else ""
    raise DataError(f"domain {domain.name} has no split {split!r}: {why}type one of {', '.join(splits(domain))}")


_KITTI_IDS = {
    0: "unlabeled", 1: "outlier", 10: "car", 11: "bicycle", 13: "bus", 15: "motorcycle", 16: "on-rails", 18: "truck",
    20: "other-vehicle", 30: "person", 31: "bicyclist", 32: "motorcyclist", 40: "road", 44: "parking", 48: "sidewalk",
    49: "other-ground", 50: "building", 51: "fence", 52: "other-structure", 60: "lane-marking", 70: "vegetation",
    71: "trunk", 72: "terrain", 80: "pole", 81: "traffic-sign", 99: "other-object", 252: "moving-car",
    253: "moving-bicyclist", 254: "moving-person", 255: "moving-motorcyclist", 256: "moving-on-rails",
    257: "moving-bus", 258: "moving-truck", 259: "moving-other-vehicle",
}  # fmt: skip
_VKITTI_IDS = {
    0: "Terrain", 1: "Tree", 2: "Vegetation", 3: "Building", 4: "Road", 5: "GuardRail", 6: "TrafficSign",
    7: "TrafficLight", 8: "Pole", 9: "Misc", 10: "Truck", 11: "Car", 12: "Van", 13: "Don't care", 99: "Don't care",
}  # fmt: skip


@dataclass(frozen=True)
class ClassSet:
    """Class names, and for each dataset the raw categories of each class, in the same order; all others are ignored."""

    names: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]]  # dataset -> for each class, "raw name, raw name"

    def table(self, dataset: str, categories: Mapping[int, str] | None = None) -> Array:
        """Lookup array u8 (largest raw id + 1,): raw id -> class index, 255 = ignore.

        `categories` (raw id -> name) is needed where the ids are part of the data: nuScenes (category.json) and A2D2.
        Raises DataError if this class set has no mapping for the dataset.
        """
        if dataset not in self.members:
            known = ", ".join(name for name, classes in CLASS_SETS.items() if dataset in classes.members)
            raise DataError(f"no class map from {dataset} to ({', '.join(self.names)}): type one of {known}")
        if categories is None:
            categories = {"semantic_kitti": _KITTI_IDS, "virtual_kitti": _VKITTI_IDS}.get(dataset, {})
        where = {raw: c for c, raws in enumerate(self.members[dataset]) for raw in raws.split(", ")}
        table = np.full(max([255, *categories]) + 1, UNLABELLED, np.uint8)
        for i, raw in categories.items():
            table[i] = where.get(raw.removeprefix("moving-"), UNLABELLED)
        return table


CLASS_SETS: dict[str, ClassSet] = {
    "street6": ClassSet(
        ("vehicle", "driveable_surface", "sidewalk", "terrain", "manmade", "vegetation"),
        {
            "nuscenes": (
                "vehicle.bicycle, vehicle.bus.bendy, vehicle.bus.rigid, vehicle.car, vehicle.construction, "
                "vehicle.motorcycle, vehicle.trailer, vehicle.truck",
                "flat.driveable_surface", "flat.sidewalk", "flat.terrain", "static.manmade", "static.vegetation",
            ),
            # Our own mapping, so that both datasets share one class set; no released code has it.
            "semantic_kitti": (
                "car, bicycle, motorcycle, bus, truck, other-vehicle, on-rails", "road, lane-marking, parking",
                "sidewalk", "terrain", "building, fence, other-structure, pole, traffic-sign, other-object",
                "vegetation, trunk",
            ),
        },
    ),
    "vkitti6": ClassSet(
        ("vegetation_terrain", "building", "road", "object", "truck", "car"),
        {
            "virtual_kitti": (
                "Terrain, Tree, Vegetation", "Building", "Road", "TrafficSign, TrafficLight, Pole, Misc", "Truck",
                "Car",
            ),
            "semantic_kitti": (
                "vegetation, trunk, terrain", "building", "road, lane-marking",
                "fence, pole, traffic-sign, other-object", "truck", "car",
            ),
        },
    ),
    "a2d2_10": ClassSet(
        ("car", "truck", "bike", "person", "road", "parking", "sidewalk", "building", "nature", "other-objects"),
        {
            "a2d2": (
                "Car 1, Car 2, Car 3, Car 4, Ego car", "Truck 1, Truck 2, Truck 3",
                "Bicycle 1, Bicycle 2, Bicycle 3, Bicycle 4, Small vehicles 1, Small vehicles 2, Small vehicles 3",
                "Pedestrian 1, Pedestrian 2, Pedestrian 3",
                "RD normal street, Zebra crossing, Solid line, RD restricted area, Slow drive area, "
                "Drivable cobblestone, Dashed line, Painted driv. instr.",
                "Parking area", "Sidewalk, Curbstone", "Buildings", "Nature object",
                "Poles, Traffic signal 1, Traffic signal 2, Traffic signal 3, Traffic sign 1, Traffic sign 2, "
                "Traffic sign 3, Sidebars, Speed bumper, Irrelevant signs, Road blocks, Obstacles / trash, Animals, "
                "Signal corpus, Electronic traffic, Traffic guide obj., Grid structure",
            ),
            "semantic_kitti": (
                "car", "truck", "bicycle, motorcycle, bicyclist, motorcyclist", "person", "road, lane-marking",
                "parking", "sidewalk", "building", "vegetation, trunk, terrain",
                "fence, pole, traffic-sign, other-object",
            ),
        },
    ),
}  # fmt: skip


# ---- readers: frames as they lie on disk


@dataclass(frozen=True)
class Calib:
    """LiDAR -> camera. `steps` are rigid motions (quaternion wxyz, translation in metres, inverse?) applied in turn;
    `camera` is the (3,3) intrinsic matrix behind them, or, without steps, one (3,4) matrix from LiDAR to pixels."""

    steps: tuple[tuple[tuple[float, ...], tuple[float, ...], bool], ...]
    camera: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FrameRef:
    """What a reader lists: cheap to hold, nothing of the frame is read yet."""

    token: str  # nuScenes: token of the `sample`; SemanticKITTI: "00/000000"
    scene: str  # "scene-0003"; "00"
    dataset: str
    image_path: Path
    points_path: Path
    label_path: Path | None
    image_size: tuple[int, int] | None  # (H, W) where the dataset states it
    calib: Calib
    categories: tuple[tuple[int, str], ...] | None = None  # raw label id -> name, where the ids are part of the data


@dataclass
class RawFrame:
    points: Array  # (M, 4) f32: x, y, z, intensity
    image: Image.Image
    labels: Array | None  # (M,) raw ids


def _calib(path: Path, steps: Iterable[tuple[Any, Any, bool]], camera: Any) -> Calib:
    """Checks the numbers: a NaN here would silently empty every frame."""
    try:
        calib = Calib(
            tuple((tuple(map(float, q)), tuple(map(float, t)), inverse) for q, t, inverse in steps),
            tuple(tuple(map(float, row)) for row in camera),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: calibration is not made of numbers ({error}); restore the original file") from None
    columns = 3 if calib.steps else 4
    shapes = all(len(q) == 4 and len(t) == 3 and any(q) for q, t, _ in calib.steps)
    shapes = shapes and [len(row) for row in calib.camera] == [columns] * 3
    numbers = [*(x for q, t, _ in calib.steps for x in (*q, *t)), *(x for row in calib.camera for x in row)]
    if not shapes or not all(map(math.isfinite, numbers)):
        raise DataError(f"{path}: calibration holds missing, zero or non-finite numbers; restore the original file")
    return calib


_TABLES = ("scene", "log", "sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose", "category")


def _nuscenes_dir(root: Path, version: str | None) -> Path:
    versions = (version,) if version else ("v1.0-trainval", "v1.0-mini")
    for name in versions:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: no folder {' or '.join(versions)} in it; give the nuScenes root that holds this folder")


def _stamp(path: Path) -> tuple[str, int, int]:
    """Path, size, modification time. A missing file has size -1."""
    try:
        stat = path.stat()
        return str(path), stat.st_size, stat.st_mtime_ns
    except FileNotFoundError:
        return str(path), -1, 0


def _source_files(root: Path, domain: Domain, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
    """Every file that the content of an index depends on."""
    files = {p for r in refs for p in (r.image_path, r.points_path, r.label_path) if p is not None}
    if domain.dataset == "nuscenes":
        files |= {_nuscenes_dir(root, version) / f"{name}.json" for name in (*_TABLES, "lidarseg")}
    else:
        files |= {r.points_path.parent.parent / "calib.txt" for r in refs}
    return sorted(files)


def _table(directory: Path, name: str, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[Any]:
    """Rows of a nuScenes table. `keep` decides during parsing: most of the 2.6 million rows of sample_data and
    ego_pose belong to frames between the key frames, and would fill gigabytes."""
    path = directory / f"{name}.json"
    try:
        with path.open() as file:
            rows = json.load(file, object_hook=lambda row: row if keep(row) else None)
        if not isinstance(rows, list):
            raise ValueError("expected a list of rows")
    except FileNotFoundError:
        raise DataError(f"{path}: missing; expected a nuScenes table, download its metadata") from None
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable nuScenes table ({error!r}); download it again") from None
    return [row for row in rows if row is not None]


def _read_nuscenes(root: Path, version: str | None) -> list[tuple[FrameRef, str, str]]:
    """All key frames of a version as (frame, log location, scene description), by scene and time."""
    directory = _nuscenes_dir(root, version)
    stamps = tuple(_stamp(directory / f"{name}.json") for name in (*_TABLES, "lidarseg"))
    return _parse_nuscenes(root, directory, stamps)


@lru_cache(maxsize=2)  # parsing the full tables takes half a minute, and each split asks
def _parse_nuscenes(root: Path, directory: Path, stamps: tuple[Any, ...]) -> list[tuple[FrameRef, str, str]]:
    try:
        return _join_nuscenes(root, directory)
    except KeyError as error:
        raise DataError(f"{directory}: tables do not fit together, {error} is not found; download them again") from None


def _join_nuscenes(root: Path, directory: Path) -> list[tuple[FrameRef, str, str]]:
    channel = {row["token"]: row["channel"] for row in _table(directory, "sensor")}
    sensors = {
        row["token"]: row
        for row in _table(directory, "calibrated_sensor")
        if channel[row["sensor_token"]] in ("LIDAR_TOP", "CAM_FRONT")
    }
    data: dict[tuple[str, str], dict[str, Any]] = {}  # (sample token, channel) -> its key-frame file
    for row in _table(directory, "sample_data", lambda row: row["is_key_frame"] and row["calibrated_sensor_token"] in sensors):
        data[row["sample_token"], channel[sensors[row["calibrated_sensor_token"]]["sensor_token"]]] = row
    wanted = {row["ego_pose_token"] for row in data.values()}
    poses = {row["token"]: row for row in _table(directory, "ego_pose", lambda row: row["token"] in wanted)}
    scenes = {row["token"]: row for row in _table(directory, "scene")}
    location = {row["token"]: row["location"] for row in _table(directory, "log")}
    # Without lidarseg.json the frames are unlabelled, and category.json has no `index` column either.
    lidarseg = _table(directory, "lidarseg") if (directory / "lidarseg.json").exists() else []
    labels = {row["sample_data_token"]: root / row["filename"] for row in lidarseg}
    categories = tuple((r["index"], r["name"]) for r in _table(directory, "category")) if lidarseg else ()

    frames = []
    for sample in sorted(_table(directory, "sample"), key=lambda row: (scenes[row["scene_token"]]["name"], row["timestamp"])):
        scene, token = scenes[sample["scene_token"]], sample["token"]
        lidar, camera = data[token, "LIDAR_TOP"], data[token, "CAM_FRONT"]
        moves = [  # sensor -> ego -> global at the sweep's time, global -> ego -> camera at the image's
            (sensors[lidar["calibrated_sensor_token"]], False),
            (poses[lidar["ego_pose_token"]], False),
            (poses[camera["ego_pose_token"]], True),
            (sensors[camera["calibrated_sensor_token"]], True),
        ]
        ref = FrameRef(
            token,
            scene["name"],
            "nuscenes",
            root / camera["filename"],
            root / lidar["filename"],
            labels.get(lidar["token"]),
            (camera["height"], camera["width"]) if camera.get("height") and camera.get("width") else None,
            _calib(
                directory / "calibrated_sensor.json / ego_pose.json",
                [(row["rotation"], row["translation"], inverse) for row, inverse in moves],
                sensors[camera["calibrated_sensor_token"]]["camera_intrinsic"],
            ),
            categories,
        )
        frames.append((ref, location[scene["log_token"]], scene["description"]))
    return frames


def _list_nuscenes(root: Path, domain: Domain, split: str | None, version: str | None) -> list[FrameRef]:
    def chosen(ref: FrameRef, location: str, description: str) -> bool:
        scene = ref.scene.removeprefix("scene-")
        if split == "train_labelled":  # the released lists, with no look at the location
            return scene in SSDA_LABELLED
        if split == "train_unlabelled":
            return scene in SSDA_TRAIN - SSDA_LABELLED
        night = "night" in description.lower()
        if not {
            "usa": "boston" in location.lower(),
            "singapore": "singapore" in location.lower(),
            "night": night,
            "day": not night,
        }[domain.name]:
            return False
        if split is None:
            return True
        if split == "test" or scene in OFFICIAL_VAL:
            return split == "test" and scene in OFFICIAL_VAL
        return (split == "val") == (scene in _VAL_SCENES.get(domain.name, ()))

    return [ref for ref, location, description in _read_nuscenes(root, version) if chosen(ref, location, description)]


def _kitti_calib(path: Path) -> Calib:
    try:
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        p2, tr = (np.array(rows[key].split(), np.float64).reshape(3, 4) for key in ("P2", "Tr"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; expected the calibration of the sequence, download KITTI odometry") from None
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: expected rows P2 and Tr of 12 numbers, found {error!r}; download it again") from None
    # Single precision on purpose: the released code rounds the product, and with it the last bits of every pixel.
    return _calib(path, [], (p2 @ np.vstack([tr, [0, 0, 0, 1]])).astype(np.float32))


def _list_kitti(root: Path, domain: Domain, split: str | None, version: str | None) -> list[FrameRef]:
    base = next((b for b in (root / "sequences", root / "dataset" / "sequences") if b.is_dir()), None)
    if base is None:
        raise DataError(f"{root}: no folder sequences or dataset/sequences in it; give the SemanticKITTI root")
    refs = []
    for sequence in sorted(p for p in base.iterdir() if p.is_dir() and (split is None or p.name in _SEQUENCES[split])):
        scans = sorted((sequence / "velodyne").glob("*.bin"))
        calib = _kitti_calib(sequence / "calib.txt") if scans else None
        for scan in scans:
            assert calib is not None
            label = sequence / "labels" / f"{scan.stem}.label"
            refs.append(
                FrameRef(
                    f"{sequence.name}/{scan.stem}",
                    sequence.name,
                    "semantic_kitti",
                    sequence / "image_2" / f"{scan.stem}.png",
                    scan,
                    label if label.exists() else None,
                    None,
                    calib,
                )
            )
    return refs


def list_frames(
    root: str | Path, domain: Domain, split: str | None, version: str | None = None, frames: Sequence[str] | None = None
) -> list[FrameRef]:
    """The frames of a split in a fixed order (scene, then time); `split` None: of all scenes of the domain.

    `version` picks "v1.0-mini" or "v1.0-trainval" (nuScenes; by default trainval if it is there). `frames` restricts to
    these tokens. Files of frames are not opened or looked for here. Raises DataError for an unknown split or token, and
    for missing or unreadable tables and calibration. Sources: the split lists of the released code.
    """
    _require_split(domain, split)
    root = Path(root).expanduser().absolute()
    readers = {"nuscenes": _list_nuscenes, "semantic_kitti": _list_kitti}
    if domain.dataset not in readers:
        can = ", ".join(d.name for d in DOMAINS.values() if d.dataset in readers)
        raise DataError(f"{root}: there is no reader for {domain.dataset} yet; type one of {can}")
    refs = readers[domain.dataset](root, domain, split, version)
    if frames is not None:
        unknown = sorted(set(frames) - {ref.token for ref in refs})
        if unknown:
            others = [d for d in DOMAINS.values() if d.dataset == domain.dataset and d is not domain]
            owners = [
                d.name for d in others if any(ref.token == unknown[0] for ref in readers[d.dataset](root, d, None, version))
            ]
            raise DataError(
                f"{root}: no frame {unknown[0]!r} in {domain.name}{f'/{split}' if split else ''} ({len(refs)} frames found)"
                + (f"; it is one of {', '.join(owners)}" if owners else "")
            )
        refs = [ref for ref in refs if ref.token in set(frames)]
    return refs


def read_array(path: Path, dtype: type[np.generic], columns: int) -> Array:
    """The numbers of a binary file, (N, columns). Raises DataError: missing, empty or truncated."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: missing; download the part of the data set that holds it") from None
    row = columns * np.dtype(dtype).itemsize
    if not data or len(data) % row:
        raise DataError(f"{path}: {len(data)} bytes, expected a multiple of {row}; truncated, download it again")
    return np.frombuffer(data, dtype).reshape(-1, columns)


def read_frame(ref: FrameRef) -> RawFrame:
    """Reads one frame. Raises DataError for a missing, truncated or corrupt file, an image whose size differs from the
    table's, or a number of labels that differs from the number of points."""
    nuscenes = ref.dataset == "nuscenes"
    points = read_array(ref.points_path, np.float32, 5 if nuscenes else 4)[:, :4]
    try:
        with Image.open(ref.image_path) as file:
            image = file.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{ref.image_path}: missing; download the part of the data set that holds it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{ref.image_path}: not a readable image ({error}); download it again") from None
    size = (image.height, image.width)
    if ref.image_size is not None and size != ref.image_size:
        raise DataError(f"{ref.image_path}: image is {size} (H, W), sample_data.json says {ref.image_size}; restore it")
    labels = None
    if ref.label_path is not None:
        raw = read_array(ref.label_path, np.uint8 if nuscenes else np.uint32, 1)[:, 0]
        labels = raw if nuscenes else raw & 0xFFFF  # KITTI's upper half is the instance
        if len(labels) != len(points):
            raise DataError(f"{ref.label_path}: {len(labels)} labels for {len(points)} points; download both again")
    return RawFrame(points, image, labels)


def _rotation(quaternion: Sequence[float]) -> Array:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def project(xyz: Array, calib: Calib, image_size: tuple[int, int]) -> tuple[Array, Array]:
    """Points (M,3) f32 in metres -> (kept (n,) i64 row numbers, row_col (n,2) f32 pixels, not rounded).

    Kept are points in front of the camera (nuScenes: depth > 0, KITTI: x > 0) and strictly inside the image (H, W).
    nuScenes runs in double, KITTI in single precision: with that, kept points and pixels equal the released code's
    bit for bit.
    """
    if calib.steps:
        p = xyz.T.astype(np.float64)
        for quaternion, translation, inverse in calib.steps:
            rotation, shift = _rotation(quaternion), np.array(translation)[:, None]
            p = rotation.T @ (p - shift) if inverse else rotation @ p + shift
        front = np.flatnonzero(p[2] > 0)
        uvw = np.array(calib.camera) @ p[:, front]
    else:
        front = np.flatnonzero(xyz[:, 0] > 0)
        homogeneous = np.concatenate([xyz[front], np.ones((len(front), 1), np.float32)], 1)
        uvw = np.array(calib.camera, np.float32) @ homogeneous.T
    with np.errstate(divide="ignore", invalid="ignore"):  # KITTI: x > 0 does not rule out depth 0
        row_col = (uvw[:2] / uvw[2]).T[:, ::-1].astype(np.float32)
    # After rounding to single precision: a point that rounds onto the border has no pixel.
    inside = ((row_col > 0) & (row_col < np.array(image_size, np.float32))).all(1)
    return front[inside], row_col[inside]


# ---- the prepared index


@dataclass
class Frame:
    token: str
    xyz: Array  # (M, 3) f32, metres
    pixel: Array  # (M, 2) i16: row, col in `image`
    label: Array  # (M,) u8, 255 = ignore
    has_label: bool
    image: Array  # (H, W, 3) u8


_FIELDS: tuple[tuple[str, type[np.generic], int], ...] = (
    ("xyz", np.float32, 3),
    ("pixel", np.int16, 2),
    ("label", np.uint8, 1),
    ("image", np.uint8, 1),
)


def _sha(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


class Index:
    """A prepared split: memory-mapped flat arrays (raw bytes) and a JSON file; holds no data in memory.

    Frames without a point in the image are not in it. Raises DataError if the directory is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "meta.json").read_text())
            self.identity: dict[str, Any] = meta["identity"]
            self.fingerprint: dict[str, Any] = meta["fingerprint"]
            self._records: list[dict[str, Any]] = [r for r in meta["frames"] if r["points"]]
        except FileNotFoundError:
            raise DataError(f"{self.path / 'meta.json'}: missing; no finished index, prepare the data again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path / 'meta.json'}: unreadable ({error!r}); prepare the data again") from None
        if self.identity.get("format") != FORMAT:
            raise DataError(f"{self.path}: format {self.identity.get('format')}, expected {FORMAT}; prepare it again")
        self.tokens: list[str] = [r["token"] for r in self._records]
        self._points = np.cumsum([0, *(r["points"] for r in self._records)])
        self._bytes = np.cumsum([0, *(r["shape"][0] * r["shape"][1] * 3 for r in self._records)])
        self._maps: dict[str, Array] = {}
        for name, dtype, columns in _FIELDS:
            file = self.path / f"{name}.bin"
            rows = int((self._bytes if name == "image" else self._points)[-1])
            size, found = rows * columns * np.dtype(dtype).itemsize, _stamp(file)[1]
            if found != size:
                raise DataError(f"{file}: damaged, {found} bytes, expected {size}; prepare the data again")
            self._maps[name] = np.memmap(file, dtype, "r", shape=(rows, columns) if columns > 1 else (rows,))

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.path,)  # a data worker maps the files itself; the arrays would travel whole

    def __len__(self) -> int:
        return len(self.tokens)

    def frame(self, i: int) -> Frame:
        """Frame i; its arrays are read-only views of the files. Raises IndexError beyond the last one."""
        i = range(len(self))[i]
        record, maps, rows = self._records[i], self._maps, slice(*self._points[i : i + 2])
        xyz, pixel, label = (maps[name][rows] for name in ("xyz", "pixel", "label"))
        image = maps["image"][slice(*self._bytes[i : i + 2])].reshape(*record["shape"], 3)
        return Frame(record["token"], xyz, pixel, label, record["has_label"], image)

    def counts(self) -> Array:
        """Points per class, i64 (K,); ignored points are not in it."""
        return np.array(self.fingerprint["points_per_class"], np.int64)

    def verify(self) -> None:
        """Reads everything and compares with the checksums; raises DataError naming the first frame that differs."""
        for i, record in enumerate(self._records):
            if _frame_sha(self.frame(i)) != record["sha"]:
                raise DataError(f"{self.path}: frame {record['token']} is damaged; delete the folder, prepare again")


def _frame_sha(frame: Frame) -> str:
    arrays = (frame.xyz, frame.pixel, frame.label, frame.image)
    return _sha(frame.token, list(frame.image.shape), *(np.ascontiguousarray(a).tobytes() for a in arrays))


def require_labels(index: Index) -> None:
    """Raises DataError if a frame of the index has no labels: for splits that train with labels or are tested."""
    missing = index.fingerprint["unlabelled_frames"]
    if missing:
        i = index.identity
        need = "lidarseg.json and the lidarseg folder" if i["dataset"] == "nuscenes" else "the labels folders"
        raise DataError(
            f"{i['root']}: {missing} of {len(index)} frames of {i['domain']}/{i['split']} have no labels; "
            f"expected {need}; add them, or use this split as an unlabelled target"
        )


def _prepare_frame(ref: FrameRef, table: Array, size: tuple[int, int] | None) -> tuple[Frame, int]:
    """Reads and projects a frame; returns it with its number of non-finite points, which are dropped."""
    raw = read_frame(ref)
    finite = np.isfinite(raw.points[:, :3]).all(1)
    rows = np.flatnonzero(finite)
    height, width = raw.image.height, raw.image.width
    kept, row_col = project(raw.points[rows, :3], ref.calib, (height, width))
    rows, pixel = rows[kept], np.floor(row_col).astype(np.float64)
    if size is not None and size != (height, width):
        raw.image = raw.image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        pixel = pixel * np.array([size[0] / height, size[1] / width])
    label = np.full(len(rows), UNLABELLED, np.uint8)
    if raw.labels is not None:
        if len(raw.labels) and raw.labels.max() >= len(table):
            raise DataError(f"{ref.label_path}: label id {raw.labels.max()}, expected < {len(table)}; restore the file")
        label = table[raw.labels[rows]]
    image = np.asarray(raw.image)
    frame = Frame(ref.token, raw.points[rows, :3], pixel.astype(np.int16), label, raw.labels is not None, image)
    return frame, int((~finite).sum())


def prepare(
    root: str | Path,
    domain: Domain,
    split: str | None,
    classes: str,
    size: tuple[int, int] | None,
    cache: str | Path,
    version: str | None = None,
    frames: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Index:
    """Writes the index of a split below `cache`, or opens it if it is there and nothing it depends on has changed.

    size: (H, W) of the stored images, bilinear; None keeps the originals (images may then differ in size). Pixels are
    scaled as in the released code: int(H / H_original * floor(row)). An interrupted call goes on where it stopped; a
    finished index appears under its name in one rename. A stale or damaged index is built anew, and `progress` is told
    why. Raises DataError for anything in the data that cannot be used.
    """
    root, tell = Path(root).expanduser().resolve(), progress or (lambda done, total, what: None)
    if classes not in CLASS_SETS:
        raise DataError(f"no class set {classes!r}: type one of {', '.join(CLASS_SETS)}")
    refs = list_frames(root, domain, split, version, frames)
    if not refs:
        raise DataError(f"{root}: no frame of {domain.name}/{split} found; `ftd data check` lists what there is")
    stamps = [_stamp(file) for file in _source_files(root, domain, version, refs)]
    listed = {str(p) for r in refs for p in (r.image_path, r.points_path, r.label_path)}
    absent = [path for path, bytes_, _ in stamps if bytes_ < 0 and path in listed]
    if absent:
        raise DataError(f"{absent[0]}: missing, and {len(absent) - 1} more; download them or name the `frames` to use")
    categories = refs[0].categories
    table = CLASS_SETS[classes].table(domain.dataset, None if categories is None else dict(categories))
    if domain.dataset == "nuscenes":
        version = _nuscenes_dir(root, version).name
    identity = {
        "format": FORMAT, "root": str(root), "version": version, "domain": domain.name, "dataset": domain.dataset,
        "split": split, "classes": classes, "size": size and list(size), "frames": frames and sorted(frames),
        "label_map": _sha(table.tobytes()), "sources": _sha(stamps),
    }  # fmt: skip
    place = _sha([identity[k] for k in ("format", "root", "version", "frames")])[:8]
    pixels = f"{size[0]}x{size[1]}" if size else "full"
    final = Path(cache).expanduser() / f"{domain.name}-{split or 'all'}-{classes}-{pixels}-{place}"
    with locked(final):
        return _open_or_build(final, identity, refs, stamps, table, size, root, tell)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time builds `folder`; the others wait and find it finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_or_build(
    final: Path,
    identity: dict[str, Any],
    refs: list[FrameRef],
    stamps: list[tuple[str, int, int]],
    table: Array,
    size: tuple[int, int] | None,
    root: Path,
    tell: Progress,
) -> Index:
    if final.exists():
        try:
            index = Index(final)
            changed = [key for key in identity if index.identity.get(key) != identity[key]]
            if not changed:
                return index
            why = f"changed since: {', '.join(changed)}"
        except DataError as error:
            why = str(error)
        tell(0, len(refs), f"building again, {why}")
        shutil.rmtree(final)
    partial = final.with_name(final.name + ".partial")
    records = _write(partial, identity, refs, table, size, tell)
    fingerprint = _fingerprint(records, identity, root, stamps)
    if not fingerprint["frames"]:
        raise DataError(f"{root}: none of {len(refs)} frames has a point in the image; the calibration does not fit")
    meta = {"identity": identity, "fingerprint": fingerprint, "frames": records}
    (partial / "meta.json").write_text(json.dumps(meta))
    os.replace(partial, final)
    (final / "progress.jsonl").unlink()  # only now: a kill just before the rename loses nothing
    return Index(final)


def _write(
    partial: Path, identity: dict[str, Any], refs: list[FrameRef], table: Array, size: tuple[int, int] | None, tell: Progress
) -> list[dict[str, Any]]:
    """Appends the frames to the flat files. progress.jsonl holds the identity, then a line a frame; a chunk's lines are
    written after its data has reached the disk, so whatever lies behind the last line is cut off on resume."""
    journal, classes = partial / "progress.jsonl", len(CLASS_SETS[identity["classes"]].names)
    records: list[dict[str, Any]] = []
    try:
        lines = journal.read_text().split("\n")[:-1]  # a torn last line has no newline
        if json.loads(lines[0]) == identity:
            records = [json.loads(line) for line in lines[1:]]
    except (FileNotFoundError, ValueError, IndexError):
        pass  # nothing to go on from
    ends = {
        name: sum(r["shape"][0] * r["shape"][1] * 3 if name == "image" else r["points"] for r in records if r["points"])
        * columns * np.dtype(dtype).itemsize
        for name, dtype, columns in _FIELDS
    }  # fmt: skip
    if not records or any(_stamp(partial / f"{name}.bin")[1] < end for name, end in ends.items()):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        records, ends = [], dict.fromkeys(ends, 0)
        journal.write_text(json.dumps(identity) + "\n")
    else:
        journal.write_text("".join(json.dumps(line) + "\n" for line in (identity, *records)))
    files = {name: (partial / f"{name}.bin").open("ab") for name in ends}
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, journal.open("a") as log:
            for name, file in files.items():
                file.truncate(ends[name])
            for start in range(len(records), len(refs), CHUNK):
                tell(start, len(refs), "preparing")
                chunk = list(pool.map(lambda ref: _prepare_frame(ref, table, size), refs[start : start + CHUNK]))
                for frame, dropped in chunk:
                    if len(frame.xyz):
                        for name, file in files.items():
                            file.write(np.ascontiguousarray(getattr(frame, name)).tobytes())
                    counts = np.bincount(frame.label, minlength=256)
                    records.append({
                        "token": frame.token, "points": len(frame.xyz), "shape": list(frame.image.shape[:2]),
                        "has_label": frame.has_label, "counts": counts[:classes].tolist(),
                        "ignored": int(counts[UNLABELLED]), "dropped": dropped, "sha": _frame_sha(frame),
                    })  # fmt: skip
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                log.write("".join(json.dumps(record) + "\n" for record in records[start:]))
                log.flush()
                os.fsync(log.fileno())
            tell(len(refs), len(refs), "prepared")
    finally:
        for file in files.values():
            file.close()
    return records


def _fingerprint(
    records: list[dict[str, Any]], identity: dict[str, Any], root: Path, stamps: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """What the index holds, equal for equal data on any machine: no absolute path and no time in it."""
    kept = [r for r in records if r["points"]]
    return {
        **{key: identity[key] for key in ("format", "version", "domain", "split", "classes", "size", "label_map")},
        "class_names": CLASS_SETS[identity["classes"]].names,
        "frames": len(kept),
        "empty_frames": len(records) - len(kept),
        "unlabelled_frames": sum(not r["has_label"] for r in kept),
        "points": sum(r["points"] for r in kept),
        "points_per_class": np.sum([r["counts"] for r in records], 0).tolist(),
        "ignored": sum(r["ignored"] for r in kept),
        "dropped_points": sum(r["dropped"] for r in records),
        "content": _sha([r["sha"] for r in kept]),
        "files": {
            "count": sum(size >= 0 for _, size, _ in stamps),
            "bytes": sum(max(size, 0) for _, size, _ in stamps),
            "names_and_sizes": _sha([[Path(path).relative_to(root).as_posix(), size] for path, size, _ in stamps]),
        },
    }


def check(root: str | Path, domain: Domain, version: str | None = None) -> list[dict[str, Any]]:
    """One row a split: scenes, frames, labelled frames, missing files, the official number of frames, and a note that
    says what is missing. Opens no frame. Raises DataError if the root is not a data set of this kind."""
    rows = []
    for split in splits(domain):
        refs = list_frames(root, domain, split, version)
        missing = [p for r in refs for p in (r.image_path, r.points_path, r.label_path) if p and not p.exists()]
        labelled, expected = sum(r.label_path is not None for r in refs), EXPECTED_FRAMES.get((domain.name, split))
        notes = []
        if not refs:
            notes.append("no frame of this split here")
        elif expected is not None and len(refs) != expected:
            notes.append(f"{len(refs)} of {expected} frames: part of the data set, numbers will not compare")
        if labelled < len(refs):
            what = "no lidarseg.json" if domain.dataset == "nuscenes" and not labelled else "label files absent"
            notes.append(f"{what}: {len(refs) - labelled} frames can only serve as unlabelled target")
        if missing:
            notes.append(f"{len(missing)} files missing, first {missing[0]}: download them or name the frames to use")
        rows.append(
            {
                "split": split,
                "scenes": len({r.scene for r in refs}),
                "frames": len(refs),
                "labelled": labelled,
                "missing": len(missing),
                "expected": expected,
                "note": "; ".join(notes) or "complete",
            }
        )
    return rows


# ---- samples and batches


@dataclass(frozen=True)
class Augment:
    """A train-time recipe; the defaults are the released ones. Testing has none: pass None."""

    noise: float = 0.1  # standard deviation of what is added to each element of the 3x3 matrix
    flip_3d: bool = True
    rotate: bool = True  # about z, any angle
    translate: bool = True  # anywhere in the grid
    jitter: float = 0.4  # brightness, contrast and saturation are multiplied by 1 +- this
    flip_2d: bool = True  # independent of flip_3d, as released
    crop: tuple[int, int] | None = None  # (H, W), bottom of the image, random column: (302, 480) for KITTI


@dataclass
class Sample:
    token: str
    image: Tensor  # (3, H, W) f32 in [0, 1]
    pixel: Tensor  # (n, 2) i64 row, col
    coords: Tensor  # (n, 3) i32 voxels, in [0, GRID)
    label: Tensor  # (n,) i64, IGNORE = -100
    keep: Tensor  # (n,) i64 rows of the frame's stored points


def rotation_3d(augment: Augment, flip_axis: int, rng: np.random.Generator) -> Array:
    """(3,3) matrix for row vectors: identity + noise, one element negated with probability 1/2, turned about z.

    The flip negates only R[flip_axis, flip_axis]; the noise beside it keeps its sign, as in the released code.
    """
    matrix = np.eye(3) + augment.noise * rng.standard_normal((3, 3))
    if augment.flip_3d and rng.random() < 0.5:
        matrix[flip_axis, flip_axis] *= -1
    if augment.rotate:
        angle = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(angle), np.sin(angle)
        matrix = matrix @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return matrix


def _crop(frame: Frame, keep: Array, crop: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, Array]:
    """Top, left and the remaining rows. Up to ten columns are tried for more than 100 points; if none has them the
    fullest stays (the released code then takes the whole image, which no batch of crops can hold)."""
    height, width = frame.image.shape[:2]
    if height < crop[0] or width < crop[1]:
        raise DataError(f"frame {frame.token}: image {height}x{width} is smaller than the crop {crop[0]}x{crop[1]}")
    row, col = frame.pixel[keep].T
    top, best, best_left = height - crop[0], keep[:0], 0
    for _ in range(10):
        left = int(rng.integers(width - crop[1] + 1))
        inside = keep[(row >= top) & (col >= left) & (col < left + crop[1])]
        if len(inside) > len(best):
            best, best_left = inside, left
        if len(best) > 100:
            break
    if not len(best):
        raise DataError(f"frame {frame.token}: no point in the lower {crop[0]} rows; use a larger crop or leave it out")
    return top, best_left, best


def _jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(float(factors[i]))
    return image


def sample(frame: Frame, augment: Augment | None, flip_axis: int, rng: np.random.Generator, scale: float = 20.0) -> Sample:
    """Augments a frame and turns metres into voxels (`scale` voxels a metre); all chance comes from `rng`.

    Points that leave the grid are dropped.
    Raises DataError if the crop does not fit. Source: the released code; the colour jitter comes after the crop.
    """
    keep = np.arange(len(frame.xyz))
    image, top, left = frame.image, 0, 0
    if augment is not None and augment.crop is not None:
        top, left, keep = _crop(frame, keep, augment.crop, rng)
        image = image[top : top + augment.crop[0], left : left + augment.crop[1]]
    if augment is not None and augment.jitter:
        image = np.asarray(_jitter(Image.fromarray(np.ascontiguousarray(image)), augment.jitter, rng))
    flip = augment is not None and augment.flip_2d and rng.random() < 0.5

    points = frame.xyz[keep]
    if augment is not None:
        points = points @ rotation_3d(augment, flip_axis, rng).astype(np.float32)
    points = points * np.float32(scale)
    points -= points.min(0)
    if augment is not None and augment.translate:
        room = np.maximum(GRID - points.max(0) - 0.001, 0)  # 0 where the cloud is larger than the grid
        points += (room * rng.random(3)).astype(np.float32)
    coords = np.floor(points).astype(np.int32)
    inside = (coords < GRID).all(1)  # never negative: the smallest is 0
    coords, keep = coords[inside], keep[inside]

    pixel = frame.pixel[keep].astype(np.int64) - np.array([top, left])
    if flip:
        image = image[:, ::-1]
        pixel[:, 1] = image.shape[1] - 1 - pixel[:, 1]
    label = frame.label[keep].astype(np.int64)
    label[label == UNLABELLED] = IGNORE
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)
    arrays = (torch.from_numpy(a) for a in (pixels, pixel, coords, label, keep))
    return Sample(frame.token, *arrays)


@dataclass
class Batch:
    """Frames concatenated, one row a point; frame b's rows follow frame b-1's."""

    image: Tensor  # (B, 3, H, W) f32
    pixel: Tensor  # (N, 2) i64 row, col
    coords: Tensor  # (N, 4) i32 b, x, y, z
    label: Tensor  # (N,) i64, IGNORE = -100
    tokens: list[str]
    keep: list[Tensor]  # for each frame, its rows in the index
    counts: list[int]  # points of each frame
    label_2d: Tensor | None = None  # (N,) pseudo-labels
    label_3d: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose network inputs are on `device`; tokens, keep and counts stay where they are."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("image", "pixel", "coords", "label", "label_2d", "label_3d")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def collate(samples: Sequence[Sample]) -> Batch:
    """Concatenates samples. Raises ValueError for none, DataError for images of different sizes (KITTI without a crop)."""
    if not samples:
        raise ValueError("collate needs at least one sample, found none")
    sizes = {tuple(s.image.shape[1:]) for s in samples}
    if len(sizes) > 1:
        raise DataError(
            f"images of different sizes {sorted(sizes)} in one batch: crop or resize them (--set crop=H,W, --set image=H,W), or "
            "use batches of one (--set batch=1, --set eval_batch=1)"
        )
    counts = [len(s.label) for s in samples]
    frame = torch.repeat_interleave(torch.arange(len(samples), dtype=torch.int32), torch.tensor(counts))
    return Batch(
        torch.stack([s.image for s in samples]),
        torch.cat([s.pixel for s in samples]),
        torch.cat([frame[:, None], torch.cat([s.coords for s in samples])], 1),
        torch.cat([s.label for s in samples]),
        [s.token for s in samples],
        [s.keep for s in samples],
        counts,
    )


# ---- stylisation: a source batch in the target's style, for the teacher


def fda(source: Tensor, target: Tensor, beta: float = 0.1) -> Tensor:
    """Images (B,3,H,W): the target's low-frequency amplitudes under the source's phase.

    In the un-shifted spectrum the low frequencies are the four corners; their side is floor(beta * min(H, W)). Not
    clamped to [0,1], as released. Raises DataError if the shapes differ.
    """
    if source.shape != target.shape:
        raise DataError(
            f"fda pairs images one to one: source {tuple(source.shape)}, target {tuple(target.shape)}; crop or resize both alike "
            "(--set crop=H,W, --set image=H,W)"
        )
    side = math.floor(beta * min(source.shape[-2:]))
    spectrum = torch.fft.fft2(source)
    amplitude, style = spectrum.abs(), torch.fft.fft2(target).abs()
    low = torch.zeros(source.shape[-2:], dtype=torch.bool, device=source.device)
    for rows in (slice(0, side), slice(low.shape[0] - side, None)):
        for cols in (slice(0, side), slice(low.shape[1] - side, None)):
            low[rows, cols] = True
    mixed = torch.polar(torch.where(low, style, amplitude), spectrum.angle())
    stylised: Tensor = torch.fft.ifft2(mixed).real
    return stylised


def mixup(source: Tensor, target: Tensor, lam: float) -> Tensor:
    """lam * source + (1 - lam) * target, pixel by pixel; labels stay the source's."""
    return source * lam + target * (1 - lam)


def density_transfer(coords_src: Tensor, coords_tgt: Tensor, batch_size: int) -> Tensor:
    """Voxels (N,4) i32 b,x,y,z of the source, scaled so that frame i has the target frame i's volume per point.

    v = volume of the bounding box / number of points, factor (v_src / v_tgt)^(-1/3), then truncation toward zero, as
    released. Beyond the released code: an extent of 0 counts as 1 voxel, so nothing divides by zero, and what would
    leave the grid stays on its border.
    """

    def volume_per_point(coords: Tensor) -> Tensor:  # (B,) f64
        # A mask per frame and no loop: nothing here waits for the GPU, and the result does not depend on an order.
        own = (coords[:, :1] == torch.arange(batch_size, device=coords.device))[..., None]  # (N, B, 1)
        xyz = coords[:, None, 1:]  # (N, 1, 3)
        extent = torch.where(own, xyz, 0).amax(0) - torch.where(own, xyz, GRID).amin(0)  # (B, 3)
        return extent.clamp(min=1).double().prod(1) / own.sum((0, 2)).clamp(min=1)

    factor = (volume_per_point(coords_src) / volume_per_point(coords_tgt)) ** (-1 / 3)
    scaled = (coords_src[:, 1:] * factor[coords_src[:, 0].long(), None]).trunc().clamp(0, GRID - 1)
    return torch.cat([coords_src[:, :1], scaled.to(coords_src.dtype)], 1)
