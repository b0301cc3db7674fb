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
SINGAPORE, USA, DAY, NIGHT, NUSCENES, SKITTI, KITTI, VKITTI, A2D2 = (
    readers.domains()[name]
    for name in (
        "singapore", "usa", "day", "night", "nuscenes", "skitti", "kitti", "vkitti", "a2d2",
    )
)  # fmt: skip
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


VKITTI_LABELS = [0, 3, 4, 12, 13, 99]


def virtual_kitti(
    root: Path, sequences: tuple[str, ...] = ("0001", "0020"), clouds: str = "vkitti_npy"
) -> Path:
    """One frame a sequence in all weathers. A point is a pixel of the depth image, as in the
    original; the first two are the corners of the image."""
    height, width = 375, 1242
    for s, sequence in enumerate(sequences):
        rng = np.random.default_rng(s)
        pixel = np.stack([rng.integers(0, height, POINTS), rng.integers(0, width, POINTS)])
        pixel[:, :2] = [[0, height - 1], [0, width - 1]]
        depth = rng.uniform(4, 90, POINTS)
        y, z = (620.5 - pixel[1]) / 725 * depth, (187 - pixel[0]) / 725 * depth
        colours, label = rng.integers(0, 256, (3, POINTS)), np.resize(VKITTI_LABELS, POINTS)
        (root / clouds / sequence).mkdir(parents=True)
        cloud = np.stack([depth, y, z, *colours, label], 1)
        np.save(root / clouds / sequence / "00000.npy", cloud)
        for w, weather in enumerate(("clone", "fog", "morning", "overcast", "rain", "sunset")):
            image = Image.new("RGB", (width, height), (40 * w, 40 * s, 0))
            write(root / "vkitti_1.3.1_rgb" / sequence / weather / "00000.png", image)
    return root


PALETTE = {
    "#ff0000": "Car 1", "#c80000": "Car 2", "#ff00ff": "RD normal street", "#87ceff": "Sky",
    "#f1e6ff": "Buildings", "#93fdc2": "Nature object",
}  # fmt: skip
A2D2_SIZE = (60, 96)
A2D2_CAMERA = {
    "Lens": "Telecam",
    "Resolution": [A2D2_SIZE[1], A2D2_SIZE[0]],
    "CamMatrix": [[80, 0, 47.5], [0, 80, 29.5], [0, 0, 1]],
    "CamMatrixOriginal": [[82, 0, 48.2], [0, 81, 29.1], [0, 0, 1]],
    "Distortion": [[-0.26, 0.1, 0.001, -0.002, -0.02]],
}


def a2d2_points(seed: int) -> dict[str, np.ndarray]:
    """What an npz holds: points in the camera's view, x ahead, and their pixels."""
    points = cloud(seed, 3, 0).astype(np.float64)
    x, y, z = points.T
    return {
        "points": points,
        "row": 29.5 - 80 * z / x,
        "col": 47.5 - 80 * y / x,
        "depth": x,
        "distance": np.linalg.norm(points, axis=1),
        "reflectance": np.full(POINTS, 7),
    }


def save_npz(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **content)


def a2d2_label() -> Image.Image:
    """Vertical stripes of 16 pixels, one a class."""
    colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE]
    row = np.repeat(np.array(colours, np.uint8), 16, 0)
    return Image.fromarray(np.repeat(row[None], A2D2_SIZE[0], 0))


def a2d2(
    root: Path, drives: tuple[str, ...] = ("20180807_145028", "20180810_142822"), frames: int = 2
) -> Path:
    write(root / "class_list.json", PALETTE)
    write(root / "cams_lidars.json", {"cameras": {"front_center": A2D2_CAMERA}})
    for drive in drives:
        for i in range(frames):
            base, name = root / drive, drive.replace("_", "") + "_{}_frontcenter_" + f"{i:09}"
            image = picture(i, A2D2_SIZE[1], A2D2_SIZE[0])
            write(base / "camera/cam_front_center" / (name.format("camera") + ".png"), image)
            write(base / "label/cam_front_center" / (name.format("label") + ".png"), a2d2_label())
            lidar = base / "lidar/cam_front_center" / (name.format("lidar") + ".npz")
            lidar.parent.mkdir(parents=True, exist_ok=True)
            save_npz(lidar, a2d2_points(i))
    return root
