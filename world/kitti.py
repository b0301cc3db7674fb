"""Writes the street world in the layout of SemanticKITTI: 64 beams, KITTI's camera.

The functions are those of `rig.Layout`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ftdpp.readers.base import Array
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Lidar, Picture, photo, sweep
from ftdpp.world.rig import Shot
from ftdpp.world.scene import WORLDS, Scene

# A Velodyne HDL-64 has 64 beams in two blocks and 2,083 columns; ours half the columns, so that a
# frame has about 7,000 points in the image.
_BEAMS = np.concatenate([np.linspace(-24.33, -8.83, 32), np.linspace(-8.33, 2.0, 32)])
LIDAR = Lidar(tuple(np.radians(_BEAMS)), 1042, 100.0)
CAMERA = Camera(375, 1242, 718.856, 607.193, 185.216)
# From the LiDAR's frame to camera 0, and camera 2 beside it: as in KITTI odometry's sequence 00.
TURN = np.array(
    [
        [4.276802385584e-04, -9.999672484946e-01, -8.084491683471e-03],
        [-7.210626507497e-03, 8.081198471645e-03, -9.999413164504e-01],
        [9.999738645903e-01, 4.859485810390e-04, -7.206933692422e-03],
    ]
)
SHIFT = np.array([-0.01198459927713, -0.0540398472975, -0.2921968648686])
SEQUENCES = {"train": "00 01 02 03 04 05 06 09 10", "val": "07", "test": "08"}
ASIDE = np.array([0.06, 0.0, 0.0])  # of a point as camera 2 sees it
IDS = rig.label_table(
    {
        "noise": 1, "car van": 10, "bicycle": 11, "bus": 13, "motorcycle": 15, "train": 16,
        "truck": 18, "person": 30, "rider": 31, "road": 40, "parking": 44, "sidewalk": 48,
        "building": 50, "wall fence barrier": 51, "lane_marking": 60, "vegetation": 70, "trunk": 71,
        "terrain": 72, "pole": 80, "traffic_sign": 81,
        "traffic_light traffic_cone other_object": 99,
    },
    np.uint32,
)  # fmt: skip


def places(world: str, part: str) -> list[tuple[str, str]]:
    return rig.in_turn(world, SEQUENCES[part].split())


def files(shot: Shot) -> tuple[str, ...]:
    base, name = f"sequences/{shot.place}", f"{shot.index:06}"
    return (
        f"{base}/velodyne/{name}.bin",
        f"{base}/labels/{name}.label",
        f"{base}/image_2/{name}.png",
    )


def _lidar_pose(shot: Shot, scene: Scene) -> rig.Pose:
    return rig.mounted(rig.ego_pose(scene, shot), np.array([0.0, 0.0, 1.73]), np.eye(3))


def look(shot: Shot, scene: Scene) -> Picture:
    at, rotation = _lidar_pose(shot, scene)
    origin = -TURN.T @ (SHIFT + ASIDE)  # of camera 2, in the LiDAR's frame
    pose = at + rotation @ origin, rotation @ TURN.T
    return photo(scene, scene.primitives, CAMERA, *pose, shot.rng())


def write(root: Path, shot: Shot) -> None:
    scene, drop = shot.scene(), WORLDS[shot.world].lidar_drop
    pose = _lidar_pose(shot, scene)
    points, labels = sweep(scene, scene.primitives, LIDAR, *pose, drop, shot.rng(1))
    points[:, 3] /= 255
    sweep_file, label_file, image_file = (root / file for file in files(shot))
    rig.dump(sweep_file, points[:, :4].copy())
    rig.dump(label_file, IDS[labels])
    rig.save(image_file, look(shot, scene).image)


def _row(matrix: Array) -> str:
    return " ".join(f"{number:.12e}" for number in matrix.ravel())


def tables(root: Path, shots: list[Shot]) -> None:
    k = np.array(rig.intrinsic(CAMERA))
    p2 = np.hstack([k, (k @ ASIDE)[:, None]])
    tr = np.hstack([TURN, SHIFT[:, None]])
    for place in sorted({shot.place for shot in shots}):
        rig.text(root / "sequences" / place / "calib.txt", f"P2: {_row(p2)}\nTr: {_row(tr)}\n")
