"""Writes the street world in the layouts of SemanticKITTI, Virtual KITTI 1.3.1 and A2D2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import numpy as np

from ftdpp.readers import a2d2, semantic_kitti, virtual_kitti
from ftdpp.readers.base import Array, euler, unit_rotation
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Lidar, Pose, sweep
from ftdpp.world.rig import Shot
from ftdpp.world.scene import TABLES, Scene


class SemanticKitti(rig.Layout):
    """64 beams in two blocks, as a Velodyne HDL-64 has them, and KITTI's camera.

    That LiDAR has 2,083 columns; ours half of them, so that a frame has about 7,000 points in the
    image.
    """

    parts = semantic_kitti.SEQUENCES["skitti"]
    beams = np.concatenate([np.linspace(-24.33, -8.83, 32), np.linspace(-8.33, 2.0, 32)])
    lidar = Lidar(np.radians(beams), 1042, 100.0)
    lidar_at = np.array([0.0, 0.0, 1.73])
    turn, shift = np.array(TABLES["kitti"]["turn"]), np.array(TABLES["kitti"]["shift"])
    aside = np.array([0.06, 0.0, 0.0])  # of a point as camera 2 sees it, beside camera 0

    def camera_pose(self, shot: Shot, scene: Scene) -> Pose:
        eye = self.lidar_at - self.turn.T @ (self.shift + self.aside)  # of camera 2
        return rig.mounted(rig.ego_pose(scene, shot), eye, self.turn.T)

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        pose = rig.mounted(rig.ego_pose(scene, shot), self.lidar_at, np.eye(3))
        points, labels = sweep(scene, self.lidar, pose, shot.rng(1))
        points[:, 3] /= 255
        yield points[:, :4].tobytes()
        yield self.IDS[labels].astype(np.uint32).tobytes()
        yield rig.png(self.look(shot, scene).image)

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        k = self.camera.matrix
        p2 = np.column_stack([k, k @ self.aside])
        tr = np.column_stack([self.turn, self.shift])
        rows = (" ".join(f"{number:.12e}" for number in matrix.ravel()) for matrix in (p2, tr))
        calibration = "P2: {}\nTr: {}\n".format(*rows)
        return {f"sequences/{shot.place}/calib.txt": calibration for shot in shots}


POINTS = 30_000  # of Virtual KITTI, drawn from the pixels that hit something
FARTHEST = 120.0  # metres
WEATHERS = TABLES["weathers"]


class VirtualKitti(rig.Layout):
    """Points are pixels with their depth, seen from the camera: x ahead, y to the left, z up."""

    parts: ClassVar = {"train": virtual_kitti.SEQUENCES}

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        seen, camera = self.look(shot, scene), self.camera
        near = np.flatnonzero(seen.depth < FARTHEST)
        drawn = np.sort(shot.rng(1).choice(near, min(POINTS, len(near)), replace=False))
        row, col = np.divmod(drawn, camera.width)
        x = seen.depth.ravel()[drawn]
        left = -(col + 0.5 - camera.centre_u) / camera.focal * x
        up = -(row + 0.5 - camera.centre_v) / camera.focal * x
        colours, label = seen.image.reshape(-1, 3)[drawn].T, self.IDS[seen.label.ravel()[drawn]]
        points = np.stack([x, left, up, *colours, label], 1).astype(np.float32)
        yield rig.saved(np.save, arr=points)
        for weather in WEATHERS:
            yield rig.png(relit(seen.image, seen.depth, weather))


def relit(image: Array, depth: Array, weather: str) -> Array:
    """The image (H, W, 3) u8 in another weather; depth (H, W) metres."""
    gain, colour, haze, reach = WEATHERS[weather]
    if weather == "clone":
        return image
    lit = image.astype(np.float32)
    grey = lit.mean(2, keepdims=True)
    lit = (grey + colour * (lit - grey)) * np.array(gain, np.float32)
    clear = np.exp(-np.minimum(depth, 2_000) / reach, dtype=np.float32)[..., None]
    return (lit * clear + (1 - clear) * np.array(haze, np.float32)).clip(0, 255).astype(np.uint8)


A2D2 = TABLES["a2d2"]
CAMERA = Camera(*TABLES["layouts"]["a2d2"]["camera"])  # of undistorted images
FRONT = A2D2["calibration"]["cameras"]["front_center"]
LENS, DISTORTION = FRONT["CamMatrixOriginal"][0][0], FRONT["Distortion"][0][0]  # focal, radial


class A2d2(rig.Layout):
    """Front camera, at a quarter of its size, and lidars: Velodyne VLP-16s, 16 beams each.

    The lidar file holds what the front-centre camera sees, in that camera's view: x ahead, y to the
    left, z up. Images are distorted as the real lens distorts them; rows and columns are
    undistorted.
    """

    colours = np.array([list(bytes.fromhex(code[1:])) for code in A2D2["classes"]], np.uint8)
    lidar = Lidar(np.radians(np.linspace(-15, 15, 16)), 300, 100.0, (-0.75, 0.75))
    parts = a2d2.DRIVES

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        points = self._points(shot, scene)
        x, y, z = points[:, :3].T
        row, col = CAMERA.centre_v - CAMERA.focal * z / x, CAMERA.centre_u - CAMERA.focal * y / x
        seen = (row >= 0) & (row < CAMERA.height - 1) & (col >= 0) & (col < CAMERA.width - 1)
        seen &= x > 0
        points, row, col = points[seen], row[seen], col[seen]
        x, y, _, reflectance, lidar = points.T
        polar = {"distance": np.linalg.norm(points[:, :3], axis=1), "azimuth": np.arctan2(y, x)}
        place = {"points": points[:, :3], "row": row, "col": col, "depth": x, **polar}
        measured = {"reflectance": reflectance, "lidar_id": lidar.astype(np.int64)}
        yield rig.saved(np.savez, **place, **measured)
        picture = self.look(shot, scene)
        sources = tuple(np.rint(v).astype(int) for v in lens())
        yield rig.png(self.colours[self.IDS[picture.label[sources]]])
        yield rig.png(distort(picture.image))

    def _points(self, shot: Shot, scene: Scene) -> Array:
        """(M, 5): x, y, z in the camera's view, intensity, number of the lidar."""
        ego = rig.ego_pose(scene, shot)
        at, view = rig.mounted(ego, np.array(self.row["eye"]), np.eye(3))
        parts = []
        for number, (name, angles) in enumerate(A2D2["angles"].items()):
            turn = unit_rotation(euler(*np.radians(angles)))
            position = np.array(A2D2["calibration"]["lidars"][name]["view"]["origin"])
            origin, rotation = rig.mounted(ego, position, turn)
            points, _ = sweep(scene, self.lidar, (origin, rotation), shot.rng(1 + number))
            seen = (points[:, :3] @ rotation.T + origin - at) @ view
            parts.append(np.column_stack([seen, points[:, 3], np.full(len(seen), number)]))
        return np.concatenate(parts)

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        content = {"cams_lidars.json": A2D2["calibration"], "class_list.json": A2D2["classes"]}
        return {name: json.dumps(table, indent=1) + "\n" for name, table in content.items()}


@cache
def lens() -> tuple[Array, Array]:
    """Row and column (H, W) in the undistorted image of each pixel of the distorted one."""
    row, col = np.mgrid[: CAMERA.height, : CAMERA.width].astype(np.float64)
    x, y = (col - CAMERA.centre_u) / LENS, (row - CAMERA.centre_v) / LENS
    free = far = np.hypot(x, y)
    for _ in range(8):  # far = free * (1 + DISTORTION * free**2), solved for free
        free = far / (1 + DISTORTION * free**2)
    scale = CAMERA.focal * free / np.maximum(far, 1e-9)
    row, col = scale * y + CAMERA.centre_v, scale * x + CAMERA.centre_u
    return row.clip(0, CAMERA.height - 1), col.clip(0, CAMERA.width - 1)


def distort(image: Array) -> Array:
    """What the lens makes of an undistorted image (H, W, 3) u8, with linear interpolation."""
    row, col = lens()
    top = np.minimum(row.astype(int), CAMERA.height - 2)
    left = np.minimum(col.astype(int), CAMERA.width - 2)
    down, right = (row - top)[..., None], (col - left)[..., None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
