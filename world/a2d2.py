"""Writes the street world in the layout of A2D2: front camera and lidars, at a quarter of its size.

The lidar file holds what the front-centre camera sees, in that camera's view: x ahead, y to the
left, z up. Images are distorted as the real lens distorts them; rows and columns are undistorted.
The functions are those of `rig.Layout`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from ftdpp import files as disk
from ftdpp.readers.a2d2 import DRIVES
from ftdpp.readers.base import Array, unit_rotation
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Lidar, Picture, sweep
from ftdpp.world.rig import Shot
from ftdpp.world.scene import WORLDS, Scene

CAMERA = Camera(302, 480, 434.0, 241.4, 171.1)  # of undistorted images
LENS, DISTORTION = 460.5, -0.2611  # focal length of distorted images, radial distortion
CAMERA_AT = np.array([1.71, 0.0, 1.22])
# Velodyne VLP-16s, 16 beams 2 degrees apart: position; yaw, pitch, roll in degrees.
LIDAR = Lidar(tuple(np.radians(np.linspace(-15, 15, 16))), 300, 100.0, (-0.75, 0.75))
LIDARS = {
    "front_left": ((1.1, 0.58, 1.62), (0.0, 6.0, -8.0)),
    "front_center": ((1.3, 0.0, 1.72), (0.0, 3.0, 0.0)),
    "front_right": ((1.1, -0.58, 1.62), (0.0, 6.0, 8.0)),
}
# Labels -> colour and class of class_list.json, which holds the classes of the street world.
_CLASSES = {
    "car van": "#ff0000 Car 1", "bicycle rider": "#b65906 Bicycle 1",
    "person": "#cc99ff Pedestrian 1", "truck": "#ff8000 Truck 1",
    "motorcycle": "#00c800 Small vehicles 2", "traffic_light": "#0080ff Traffic signal 1",
    "traffic_sign": "#00ffff Traffic sign 1", "bus train": "#ffff00 Utility vehicle 1",
    "barrier": "#e96400 Sidebars", "lane_marking": "#ffc125 Solid line",
    "traffic_cone": "#b97a57 Road blocks", "other_object": "#ff0080 Obstacles / trash",
    "pole": "#fff68f Poles", "fence": "#eea2ad Grid structure",
    "vegetation trunk terrain": "#93fdc2 Nature object", "parking": "#9696c8 Parking area",
    "sidewalk": "#b496c8 Sidewalk", "road": "#ff00ff RD normal street", "sky": "#87ceff Sky",
    "building wall": "#f1e6ff Buildings", "noise": "#60458f Blurred area",
}  # fmt: skip
CLASS_LIST = dict(entry.split(" ", 1) for entry in _CLASSES.values())
IDS = rig.label_table({labels: index for index, labels in enumerate(_CLASSES)})
COLOURS = np.array([list(bytes.fromhex(colour[1:])) for colour in CLASS_LIST], np.uint8)[IDS]


def places(world: str, part: str) -> list[tuple[str, str]]:
    return rig.in_turn(world, list(DRIVES[part]))


def files(shot: Shot) -> tuple[str, ...]:
    stamp = shot.place.replace("_", "")
    return tuple(
        f"{shot.place}/{kind}/cam_front_center/{stamp}_{kind}_frontcenter_{shot.index:09}.{ending}"
        for kind, ending in (("lidar", "npz"), ("label", "png"), ("camera", "png"))
    )


@cache
def _lens() -> tuple[Array, Array]:
    """Row and column (H, W) in the undistorted image of each pixel of the distorted one."""
    row, col = np.mgrid[: CAMERA.height, : CAMERA.width].astype(np.float64)
    x, y = (col - CAMERA.centre_u) / LENS, (row - CAMERA.centre_v) / LENS
    far = np.hypot(x, y)
    free = far
    for _ in range(8):  # far = free * (1 + DISTORTION * free**2), solved for free
        free = far / (1 + DISTORTION * free**2)
    scale = CAMERA.focal * free / np.maximum(far, 1e-9)
    out = scale * y + CAMERA.centre_v, scale * x + CAMERA.centre_u
    return out[0].clip(0, CAMERA.height - 1), out[1].clip(0, CAMERA.width - 1)


def distort(image: Array) -> Array:
    """What the lens makes of an undistorted image (H, W, 3) u8, with linear interpolation."""
    row, col = _lens()
    top = np.minimum(row.astype(int), CAMERA.height - 2)
    left = np.minimum(col.astype(int), CAMERA.width - 2)
    down, right = (row - top)[..., None], (col - left)[..., None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)


def look(shot: Shot, scene: Scene) -> Picture:
    return rig.ahead(shot, scene, CAMERA, CAMERA_AT)


def _points(shot: Shot, scene: Scene) -> Array:
    """(M, 5): x, y, z in the camera's view, intensity, number of the lidar."""
    ego, drop = rig.ego_pose(scene, shot), WORLDS[shot.world].lidar_drop
    at, view = rig.mounted(ego, CAMERA_AT, np.eye(3))
    parts = []
    for number, (position, angles) in enumerate(LIDARS.values()):
        turn = unit_rotation(rig.euler(*np.radians(angles)))
        origin, rotation = rig.mounted(ego, np.array(position), turn)
        rng = shot.rng(1 + number)
        points, _ = sweep(scene, scene.primitives, LIDAR, origin, rotation, drop, rng)
        seen = (points[:, :3] @ rotation.T + origin - at) @ view
        parts.append(np.column_stack([seen, points[:, 3], np.full(len(seen), number)]))
    return np.concatenate(parts)


def write(root: Path, shot: Shot) -> None:
    scene = shot.scene()
    points = _points(shot, scene)
    points = points[points[:, 0] > 0]
    x, y, z = points[:, :3].T
    col, row = CAMERA.centre_u - CAMERA.focal * y / x, CAMERA.centre_v - CAMERA.focal * z / x
    inside = (row >= 0) & (row < CAMERA.height - 1) & (col >= 0) & (col < CAMERA.width - 1)
    points, row, col = points[inside], row[inside], col[inside]
    lidar_file, label_file, image_file = (root / file for file in files(shot))
    with disk.replacing(lidar_file) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            points=points[:, :3],
            row=row,
            col=col,
            depth=points[:, 0],
            distance=np.linalg.norm(points[:, :3], axis=1),
            azimuth=np.arctan2(points[:, 1], points[:, 0]),
            reflectance=points[:, 3],
            lidar_id=points[:, 4].astype(np.int64),
        )
    picture = look(shot, scene)
    sources = tuple(np.rint(v).astype(int) for v in _lens())
    rig.save(label_file, COLOURS[picture.label[sources]])
    rig.save(image_file, distort(picture.image))


def tables(root: Path, shots: list[Shot]) -> None:
    level = {"x-axis": [1.0, 0.0, 0.0], "y-axis": [0.0, 1.0, 0.0]}
    camera = {
        "view": {"origin": CAMERA_AT.tolist(), **level},
        "Lens": "Telecam",
        "CamMatrix": rig.intrinsic(CAMERA),
        "CamMatrixOriginal": rig.intrinsic(replace(CAMERA, focal=LENS)),
        "Distortion": [[DISTORTION, 0.0, 0.0, 0.0, 0.0]],
        "Resolution": [CAMERA.width, CAMERA.height],
    }
    lidars = {name: {"view": {"origin": at, **level}} for name, (at, _) in LIDARS.items()}
    config = {"cameras": {"front_center": camera}, "lidars": lidars}
    rig.text(root / "cams_lidars.json", json.dumps(config, indent=1) + "\n")
    rig.text(root / "class_list.json", json.dumps(CLASS_LIST, indent=1) + "\n")
