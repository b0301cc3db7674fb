"""Tiny data sets in the original layouts, and where real frames lie. `toy.py` is beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp import readers

DEFAULT = Path(__file__).resolve().parents[1].parent / "shared" / "realdata"
REALDATA = Path(os.environ.get("FTD_REALDATA", DEFAULT))
real = pytest.mark.skipif(
    not REALDATA.is_dir(),
    reason=f"REAL FRAMES NOT READ: no folder {REALDATA}; set FTD_REALDATA to it",
)
SINGAPORE, USA, DAY, NIGHT, SKITTI = (
    readers.domains()[name] for name in ("singapore", "usa", "day", "night", "skitti")
)
POINTS = 60


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def cloud(seed: int, columns: int, forward: int) -> np.ndarray:
    """Points in front of the sensor; `forward` is the axis that looks ahead."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (POINTS, columns)).astype(np.float32)
    points[:, forward] = rng.uniform(4, 20, POINTS)
    return points


CATEGORIES = [
    "noise", "vehicle.car", "flat.driveable_surface", "flat.sidewalk", "human.pedestrian.adult",
]  # fmt: skip
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


def nuscenes(
    root: Path, version: str = "v1.0-mini", labelled: bool = True, scenes: list[Any] = SCENES
) -> Path:
    """One frame a scene. The LiDAR looks along y; the camera sits in it, its z is the LiDAR's y."""
    size, sqrt = (400, 225), 0.5**0.5
    level = {"rotation": [1, 0, 0, 0], "translation": [0, 0, 2]}
    ahead = {"rotation": [sqrt, -sqrt, 0, 0], "translation": [0, 0, 2]}
    camera = {"camera_intrinsic": [[300, 0, 200], [0, 300, 112], [0, 0, 1]], **ahead}
    channels = {"LIDAR_TOP": "pcd.bin", "CAM_FRONT": "png", "CAM_BACK": "png"}
    tables: dict[str, list[dict[str, Any]]] = {
        "sensor": [{"token": channel, "channel": channel} for channel in channels],
        "calibrated_sensor": [
            {"token": f"cal-{channel}", "sensor_token": channel}
            | ({"camera_intrinsic": [], **level} if channel == "LIDAR_TOP" else camera)
            for channel in channels
        ],
        "category": [
            {"token": name, "name": name, **({"index": i} if labelled else {})}
            for i, name in enumerate(CATEGORIES)
        ],
    }
    for name in ("scene", "log", "sample", "sample_data", "ego_pose", "lidarseg"):
        tables[name] = []
    for i, (name, location, description) in enumerate(scenes):
        token = f"frame-{name[-4:]}"
        pose = {"token": f"pose{i}", "rotation": [1, 0, 0, 0], "translation": [100 * i, 5, 0]}
        scene = {"token": name, "name": name, "log_token": f"log{i}", "description": description}
        tables["log"].append({"token": f"log{i}", "location": location})
        tables["scene"].append(scene)
        tables["sample"].append({"token": token, "scene_token": name, "timestamp": i})
        tables["ego_pose"].append(pose)
        for channel, ending in channels.items():
            row: dict[str, Any] = {
                "token": f"{token}-{channel}",
                "sample_token": token,
                "ego_pose_token": f"pose{i}",
                "calibrated_sensor_token": f"cal-{channel}",
                "is_key_frame": True,
                "width": 0,
                "height": 0,
                "filename": f"samples/{channel}/{token}.{ending}",
            }
            if channel != "LIDAR_TOP":
                row |= {"width": size[0], "height": size[1]}
            # A sweep between key frames must not be taken for one.
            between = {"is_key_frame": False, "filename": "sweeps/none"}
            tables["sample_data"] += [row, row | between | {"token": row["token"] + "-sweep"}]
        write(root / f"samples/LIDAR_TOP/{token}.pcd.bin", cloud(i, 5, 1))
        write(root / f"samples/CAM_FRONT/{token}.png", picture(i, *size))
        if labelled:
            file = f"lidarseg/{version}/{token}_lidarseg.bin"
            labels = np.random.default_rng(i).integers(0, len(CATEGORIES), POINTS)
            tables["lidarseg"].append(
                {"token": token, "sample_data_token": f"{token}-LIDAR_TOP", "filename": file}
            )
            write(root / file, labels.astype(np.uint8))
    if not labelled:
        del tables["lidarseg"]
    for name, rows in tables.items():
        write(root / version / f"{name}.json", rows)
    return root


def kitti(
    root: Path, sequences: tuple[str, ...] = ("00", "02", "07", "08", "11"), frames: int = 2
) -> Path:
    for sequence in sequences:
        base = root / "sequences" / sequence
        tr = "0 -1 0 0 0 0 -1 0 1 0 0 0"
        write(base / "calib.txt", f"P2: 200 0 160 0 0 200 60 0 0 0 1 0\nTr: {tr}\n")
        for i in range(frames):
            write(base / f"velodyne/{i:06}.bin", cloud(i, 4, 0))
            write(base / f"image_2/{i:06}.png", picture(i, 320 + 2 * int(sequence), 120))
            if sequence < "11":
                ids = np.array([10, 40, 48, 70, 252, 0], np.uint32)[np.arange(POINTS) % 6]
                write(base / f"labels/{i:06}.label", ids | np.uint32(7 << 16))
    return root
