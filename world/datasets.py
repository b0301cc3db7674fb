"""Writes the street world in the layouts of all data sets but nuScenes: first those with points."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers import a2d2, semantic_kitti, virtual_kitti
from ftdpp.readers.base import Array, euler, unit_rotation
from ftdpp.world.cast import Camera, Lidar, Pose, sweep
from ftdpp.world.rig import Layout, Shot, png, saved
from ftdpp.world.scene import TABLES, Scene


class SemanticKitti(Layout):
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
        return shot.pose(scene, eye, self.turn.T)

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        pose = shot.pose(scene, self.lidar_at, np.eye(3))
        points, labels = sweep(scene, self.lidar, pose, shot.rng(1))
        points[:, 3] /= 255
        yield points[:, :4].tobytes()
        yield self.IDS[labels].astype(np.uint32).tobytes()
        yield png(self.look(shot, scene).image)

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        k = self.camera.matrix
        p2, tr = np.column_stack([k, k @ self.aside]), np.column_stack([self.turn, self.shift])
        rows = (" ".join(f"{number:.12e}" for number in matrix.ravel()) for matrix in (p2, tr))
        calibration = "P2: {}\nTr: {}\n".format(*rows)
        return {f"sequences/{shot.place}/calib.txt": calibration for shot in shots}


POINTS = 30_000  # of Virtual KITTI, drawn from the pixels that hit something
FARTHEST = 120.0  # metres
WEATHERS = TABLES["weathers"]


class VirtualKitti(Layout):
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
        yield saved(np.save, arr=points)
        for weather in WEATHERS:
            yield png(relit(seen.image, seen.depth, weather))


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
FRONT = A2D2["calibration"]["cameras"]["front_center"]
LENS, DISTORTION = FRONT["CamMatrixOriginal"][0][0], FRONT["Distortion"][0][0]  # focal, radial


class A2d2(Layout):
    """Front camera, at a quarter of its size, and lidars: Velodyne VLP-16s, 16 beams each.

    The lidar file holds what the front-centre camera sees, in that camera's view: x ahead, y to the
    left, z up. Images are distorted as the real lens distorts them; rows and columns are
    undistorted.
    """

    colours = np.array([list(bytes.fromhex(code[1:])) for code in A2D2["classes"]], np.uint8)
    lidar = Lidar(np.radians(np.linspace(-15, 15, 16)), 300, 100.0, (-0.75, 0.75))
    parts = a2d2.DRIVES

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        points, camera = self._points(shot, scene), self.camera
        x, y, z = points[:, :3].T
        row, col = camera.centre_v - camera.focal * z / x, camera.centre_u - camera.focal * y / x
        seen = (row >= 0) & (row < camera.height - 1) & (col >= 0) & (col < camera.width - 1)
        seen &= x > 0
        points, row, col = points[seen], row[seen], col[seen]
        x, y, _, reflectance, lidar = points.T
        polar = {"distance": np.linalg.norm(points[:, :3], axis=1), "azimuth": np.arctan2(y, x)}
        place = {"points": points[:, :3], "row": row, "col": col, "depth": x, **polar}
        measured = {"reflectance": reflectance, "lidar_id": lidar.astype(np.int64)}
        yield saved(np.savez, **place, **measured)
        picture = self.look(shot, scene)
        sources = tuple(np.rint(v).astype(int) for v in lens(camera))
        yield png(self.colours[self.IDS[picture.label[sources]]])
        yield png(distorted(picture.image, camera))

    def _points(self, shot: Shot, scene: Scene) -> Array:
        """(M, 5): x, y, z in the camera's view, intensity, number of the lidar."""
        at, view = shot.pose(scene, self.row["eye"], np.eye(3))
        parts = []
        for number, (name, angles) in enumerate(A2D2["angles"].items()):
            position = A2D2["calibration"]["lidars"][name]["view"]["origin"]
            pose = shot.pose(scene, position, unit_rotation(euler(*np.radians(angles))))
            points, _ = sweep(scene, self.lidar, pose, shot.rng(1 + number))
            seen = (points[:, :3] @ pose[1].T + pose[0] - at) @ view
            parts.append(np.column_stack([seen, points[:, 3], np.full(len(seen), number)]))
        return np.concatenate(parts)

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        content = {"cams_lidars.json": A2D2["calibration"], "class_list.json": A2D2["classes"]}
        return {name: json.dumps(table, indent=1) + "\n" for name, table in content.items()}


@cache
def lens(camera: Camera) -> tuple[Array, Array]:
    """Row and column (H, W) in the undistorted image of each pixel of the distorted one."""
    row, col = np.mgrid[: camera.height, : camera.width]
    x, y = (col - camera.centre_u) / LENS, (row - camera.centre_v) / LENS
    free = far = np.hypot(x, y)
    for _ in range(8):  # far = free * (1 + DISTORTION * free**2), solved for free
        free = far / (1 + DISTORTION * free**2)
    scale = camera.focal * free / np.maximum(far, 1e-9)
    row, col = scale * y + camera.centre_v, scale * x + camera.centre_u
    return row.clip(0, camera.height - 1), col.clip(0, camera.width - 1)


def distorted(image: Array, camera: Camera) -> Array:
    """What the lens makes of an undistorted image (H, W, 3) u8, with linear interpolation."""
    row, col = lens(camera)
    top = np.minimum(row.astype(int), camera.height - 2)
    left = np.minimum(col.astype(int), camera.width - 2)
    down, right = (row - top)[..., None], (col - left)[..., None]
    upper, lower = (
        image[at, left] * (1 - right) + image[at, left + 1] * right for at in (top, top + 1)
    )
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)


STEREO = TABLES["cityscapes"]["calibration"]


class Cityscapes(Layout):
    """Disparity as a stereo camera measures it: noisy, with holes, none in the sky.

    A pixel holds 256 times the disparity in pixels, plus 1; 0 where it is unknown.
    """

    parts = TABLES["cityscapes"]["parts"]

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture, rng = self.look(shot, scene), shot.rng(1)
        yield png(self.IDS[picture.label])
        pixels = STEREO["extrinsic"]["baseline"] * self.camera.focal / picture.depth
        pixels = pixels + rng.normal(0, 0.06, pixels.shape)
        # Matching fails in patches, and beside what hides a part of the scene from one camera.
        height, width = pixels.shape
        coarse = Image.fromarray(rng.standard_normal((height // 12, width // 12), np.float32))
        holes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) > 1.9
        hidden = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])) > 1
        known = np.isfinite(picture.depth) & (pixels > 0) & (pixels < 255) & ~holes & ~hidden
        yield png(np.where(known, np.rint(pixels * 256 + 1), 0).astype(np.uint16))
        yield json.dumps(STEREO, indent=1).encode()
        yield png(picture.image)


class Gta5(Layout):
    """Images, and labels with a palette."""

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture = self.look(shot, scene)
        palette = bytearray(768)
        for row in TABLES["labels"].values():
            palette[3 * row[3] : 3 * row[3] + 3] = bytes.fromhex(row[-1])
        coded = Image.fromarray(self.IDS[picture.label])
        coded.putpalette(bytes(palette))
        yield png(coded)
        yield png(picture.image)


class Synthia(Layout):
    """Perfect depth, in centimetres; the sky lies as far as 16 bits reach."""

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture = self.look(shot, scene)
        classes = self.IDS[picture.label]
        centimetres = np.rint(np.minimum(picture.depth, 655.35) * 100)
        yield _rgb16(np.stack([classes, 0 * classes, 0 * classes], 2))
        yield _rgb16(np.stack([centimetres] * 3, 2))
        yield png(picture.image)


def _rgb16(channels: Array) -> bytes:
    """A PNG of 16-bit RGB from whole numbers (H, W, 3), which Pillow cannot write."""
    height, width = channels.shape[:2]
    rows = np.zeros((height, 1 + 6 * width), np.uint8)  # the first byte: no filter
    rows[:, 1:] = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 2), b"IEND": b""}
    for kind, content in chunks.items():
        check = struct.pack(">I", zlib.crc32(kind + content))
        out += struct.pack(">I", len(content)) + kind + content + check
    return out
