"""Writes the street world in the layout of Virtual KITTI 1.3.1 with points (vkitti3d_npy).

The points are pixels with their depth, seen from the camera: x ahead, y to the left, z up.
The functions are those of `rig.Layout`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ftdpp import files as disk
from ftdpp.readers.base import Array
from ftdpp.readers.virtual_kitti import SEQUENCES
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Picture
from ftdpp.world.rig import Shot
from ftdpp.world.scene import Scene

CAMERA = Camera(375, 1242, 725.0, 621.0, 187.5)  # centres of pixels are at 0.5
POINTS = 30_000  # drawn from the pixels that hit something
FARTHEST = 120.0  # metres
DONT_CARE = 13
IDS = rig.label_table({
    "road lane_marking parking": 4, "sidewalk terrain": 0, "trunk": 1, "vegetation": 2,
    "building wall": 3, "barrier": 5, "traffic_sign": 6, "traffic_light": 7, "pole": 8,
    "fence other_object traffic_cone": 9, "truck": 10, "car": 11, "van": 12,
    "noise sky person rider bus train motorcycle bicycle": DONT_CARE,
})  # fmt: skip
# Weather: gain of each channel, share of colour that is kept, haze and the metres to 1/e of it.
WEATHERS: dict[str, tuple[tuple[float, float, float], float, tuple[int, int, int], float]] = {
    "clone": ((1.0, 1.0, 1.0), 1.0, (0, 0, 0), np.inf),
    "fog": ((0.85, 0.87, 0.9), 0.8, (190, 194, 198), 45.0),
    "morning": ((1.02, 0.92, 0.78), 0.95, (235, 205, 165), 700.0),
    "overcast": ((0.82, 0.84, 0.88), 0.7, (190, 195, 202), 500.0),
    "rain": ((0.58, 0.62, 0.68), 0.6, (125, 132, 142), 110.0),
    "sunset": ((0.95, 0.66, 0.48), 0.9, (235, 150, 90), 450.0),
}


def places(world: str, part: str) -> list[tuple[str, str]]:
    return rig.in_turn(world, list(SEQUENCES))


def files(shot: Shot) -> tuple[str, ...]:
    name = f"{shot.index:05}"
    images = (f"vkitti_1.3.1_rgb/{shot.place}/{weather}/{name}.png" for weather in WEATHERS)
    return (f"vkitti3d_npy/{shot.place}/{name}.npy", *images)


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


def look(shot: Shot, scene: Scene) -> Picture:
    return rig.ahead(shot, scene, CAMERA, np.array([0.3, 0.0, 1.65]))


def write(root: Path, shot: Shot) -> None:
    seen = look(shot, shot.scene())
    near = np.flatnonzero(seen.depth < FARTHEST)
    drawn = np.sort(shot.rng(1).choice(near, min(POINTS, len(near)), replace=False))
    row, col = np.divmod(drawn, CAMERA.width)
    x = seen.depth.ravel()[drawn]
    points = np.stack(
        [
            x,
            -(col + 0.5 - CAMERA.centre_u) / CAMERA.focal * x,
            -(row + 0.5 - CAMERA.centre_v) / CAMERA.focal * x,
            *seen.image.reshape(-1, 3)[drawn].T,
            IDS[seen.label.ravel()[drawn]],
        ],
        1,
    )
    points_file, *image_files = (root / file for file in files(shot))
    with disk.replacing(points_file) as temporary, temporary.open("wb") as opened:
        np.save(opened, points.astype(np.float32))
    for weather, file in zip(WEATHERS, image_files, strict=True):
        rig.save(file, relit(seen.image, seen.depth, weather))


def tables(root: Path, shots: list[Shot]) -> None:
    """There are none: every frame has the same camera."""
