"""Writes the street world in the layouts of Cityscapes, GTA5 and SYNTHIA-RAND-CITYSCAPES."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ftdpp.readers.base import Array
from ftdpp.world import rig
from ftdpp.world.rig import Shot
from ftdpp.world.scene import TABLES, Scene

STEREO = TABLES["cityscapes"]["calibration"]


class Cityscapes(rig.Layout):
    """Disparity as a stereo camera measures it: noisy, with holes, none in the sky."""

    parts = TABLES["cityscapes"]["parts"]

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture = self.look(shot, scene)
        yield rig.png(self.IDS[picture.label])
        yield rig.png(self._disparity(picture.depth, shot.rng(1)))
        yield json.dumps(STEREO, indent=1).encode()
        yield rig.png(picture.image)

    def _disparity(self, depth: Array, rng: np.random.Generator) -> Array:
        """(H, W) u16: pixels * 256 + 1, 0 where there is none."""
        pixels = STEREO["extrinsic"]["baseline"] * self.camera.focal / depth
        pixels = pixels + rng.normal(0, 0.06, depth.shape)
        # Matching fails in patches, and beside what hides a part of the scene from one camera.
        height, width = depth.shape
        coarse = Image.fromarray(rng.standard_normal((height // 12, width // 12), np.float32))
        holes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) > 1.9
        hidden = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])) > 1
        known = np.isfinite(depth) & (pixels > 0) & (pixels < 255) & ~holes & ~hidden
        return np.where(known, np.rint(pixels * 256 + 1), 0).astype(np.uint16)


class Gta5(rig.Layout):
    """Images, and labels with a palette."""

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture = self.look(shot, scene)
        palette = bytearray(768)
        for row in TABLES["labels"].values():
            palette[3 * row[3] : 3 * row[3] + 3] = bytes.fromhex(row[-1])
        coded = Image.fromarray(self.IDS[picture.label])
        coded.putpalette(bytes(palette))
        yield rig.png(coded)
        yield rig.png(picture.image)


class Synthia(rig.Layout):
    """Perfect depth, in centimetres; the sky lies as far as 16 bits reach."""

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        picture = self.look(shot, scene)
        classes = self.IDS[picture.label]
        centimetres = np.rint(np.minimum(picture.depth, 655.35) * 100)
        yield _rgb16(np.stack([classes, 0 * classes, 0 * classes], 2))
        yield _rgb16(np.stack([centimetres] * 3, 2))
        yield rig.png(picture.image)


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
