"""Writes the street world in the layouts of Cityscapes, GTA5 and SYNTHIA-RAND-CITYSCAPES.

Sizes are a quarter of the real ones (SYNTHIA: 40 %). The methods are those of `rig.Layout`.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ftdpp import files as disk
from ftdpp.readers.base import Array
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Picture
from ftdpp.world.rig import Shot
from ftdpp.world.scene import Scene

# Label ids of Cityscapes, which GTA5 shares; all else is "unlabeled".
IDS = rig.label_table({
    "other_object": 4, "traffic_cone": 5, "road lane_marking": 7, "sidewalk": 8, "parking": 9,
    "building": 11, "wall": 12, "fence": 13, "barrier": 14, "pole": 17, "traffic_light": 19,
    "traffic_sign": 20, "vegetation trunk": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25,
    "car van": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
})  # fmt: skip
PALETTE = {
    4: (0, 0, 0), 5: (111, 74, 0), 7: (128, 64, 128), 8: (244, 35, 232), 9: (250, 170, 160),
    11: (70, 70, 70), 12: (102, 102, 156), 13: (190, 153, 153), 14: (180, 165, 180),
    17: (153, 153, 153), 19: (250, 170, 30), 20: (220, 220, 0), 21: (107, 142, 35),
    22: (152, 251, 152), 23: (70, 130, 180), 24: (220, 20, 60), 25: (255, 0, 0), 26: (0, 0, 142),
    27: (0, 0, 70), 28: (0, 60, 100), 31: (0, 80, 100), 32: (0, 0, 230), 33: (119, 11, 32),
}  # fmt: skip
SYNTHIA_IDS = rig.label_table({
    "sky": 1, "building": 2, "road": 3, "sidewalk": 4, "fence": 5, "vegetation trunk": 6, "pole": 7,
    "car van": 8, "traffic_sign": 9, "person": 10, "bicycle": 11, "motorcycle": 12, "parking": 13,
    "barrier traffic_cone": 14, "traffic_light": 15, "terrain": 16, "rider": 17, "truck": 18,
    "bus": 19, "train": 20, "wall": 21, "lane_marking": 22,
})  # fmt: skip


@dataclass(frozen=True)
class _Dense:
    """What the three share: one camera."""

    camera: Camera
    height: float  # of the camera above the road
    IDS: Array

    def look(self, shot: Shot, scene: Scene) -> Picture:
        return rig.ahead(shot, scene, self.camera, np.array([1.7, 0.0, self.height]))

    def tables(self, root: Path, shots: list[Shot]) -> None:
        """There are none."""


class Cityscapes(_Dense):
    """Disparity as a stereo camera measures it: noisy, with holes, none in the sky."""

    BASELINE = 0.209313  # metres
    TOWNS: ClassVar[dict[str, str]] = {
        "train": "aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena "
        "krefeld monchengladbach strasbourg stuttgart tubingen ulm weimar zurich",
        "val": "frankfurt lindau munster",
    }

    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        return rig.in_turn(world, self.TOWNS[part].split())

    def files(self, shot: Shot) -> tuple[str, ...]:
        part = next(part for part, towns in self.TOWNS.items() if shot.place in towns.split())
        name = f"{part}/{shot.place}/{shot.place}_{shot.index:06}_000019"
        return (
            f"gtFine/{name}_gtFine_labelIds.png",
            f"disparity/{name}_disparity.png",
            f"camera/{name}_camera.json",
            f"leftImg8bit/{name}_leftImg8bit.png",
        )

    def write(self, root: Path, shot: Shot) -> None:
        picture = self.look(shot, shot.scene())
        label, disparity, camera, image = (root / file for file in self.files(shot))
        rig.save(label, self.IDS[picture.label])
        rig.save(disparity, self._disparity(picture.depth, shot.rng(1)))
        (focal, _, u0), (_, _, v0), _ = rig.intrinsic(self.camera)
        intrinsic = {"fx": focal, "fy": focal, "u0": u0, "v0": v0}
        extrinsic = {"baseline": self.BASELINE, "x": 1.7, "y": 0.0, "z": self.height}
        rig.text(camera, json.dumps({"extrinsic": extrinsic, "intrinsic": intrinsic}, indent=1))
        rig.save(image, picture.image)

    def _disparity(self, depth: Array, rng: np.random.Generator) -> Array:
        """(H, W) u16: pixels * 256 + 1, 0 where there is none."""
        pixels = self.BASELINE * self.camera.focal / depth
        pixels = pixels + rng.normal(0, 0.06, depth.shape)
        # Matching fails in patches, and beside what hides a part of the scene from one camera.
        height, width = depth.shape
        coarse = Image.fromarray(rng.standard_normal((height // 12, width // 12), np.float32))
        holes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) > 1.9
        hidden = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])) > 1
        known = np.isfinite(depth) & (pixels > 0) & (pixels < 255) & ~holes & ~hidden
        return np.where(known, np.rint(pixels * 256 + 1), 0).astype(np.uint16)


class Gta5(_Dense):
    """Images, and labels with a palette."""

    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        return rig.in_turn(world, [""])

    def files(self, shot: Shot) -> tuple[str, ...]:
        return f"labels/{shot.index + 1:05}.png", f"images/{shot.index + 1:05}.png"

    def write(self, root: Path, shot: Shot) -> None:
        picture = self.look(shot, shot.scene())
        label, image = (root / file for file in self.files(shot))
        coded = Image.fromarray(self.IDS[picture.label])
        coded.putpalette(bytes(c for i in range(256) for c in PALETTE.get(i, (0, 0, 0))))
        rig.save(label, coded)
        rig.save(image, picture.image)


class Synthia(_Dense):
    """Perfect depth, in centimetres; the sky lies as far as 16 bits reach."""

    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        return rig.in_turn(world, [""])

    def files(self, shot: Shot) -> tuple[str, ...]:
        return tuple(
            f"RAND_CITYSCAPES/{folder}/{shot.index:07}.png"
            for folder in ("GT/LABELS", "Depth/Depth", "RGB")
        )

    def write(self, root: Path, shot: Shot) -> None:
        picture = self.look(shot, shot.scene())
        label, depth, image = (root / file for file in self.files(shot))
        centimetres = np.rint(np.minimum(picture.depth, 655.35) * 100).astype(np.uint16)
        classes = self.IDS[picture.label].astype(np.uint16)
        none = np.zeros_like(classes)
        _save_rgb16(label, np.stack([classes, none, none], 2))
        _save_rgb16(depth, np.stack([centimetres] * 3, 2))
        rig.save(image, picture.image)


def _save_rgb16(path: Path, channels: Array) -> None:
    """(H, W, 3) u16 as a PNG of 16-bit RGB, which Pillow cannot write."""
    height, width = channels.shape[:2]
    rows = np.zeros((height, 1 + 6 * width), np.uint8)  # the first byte: no filter
    rows[:, 1:] = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 2)), (b"IEND", b"")
    with disk.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in parts:
            check = struct.pack(">I", zlib.crc32(kind + content))
            file.write(struct.pack(">I", len(content)) + kind + content + check)


CITYSCAPES = Cityscapes(Camera(256, 512, 565.6, 274.2, 128.3), 1.22, IDS)
GTA5 = Gta5(Camera(264, 480, 440.0, 240.0, 132.0), 1.45, IDS)
SYNTHIA = Synthia(Camera(304, 512, 425.9, 256.0, 152.0), 1.6, SYNTHIA_IDS)
