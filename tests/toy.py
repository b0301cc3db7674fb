"""A toy data set: all that a new one takes is this reader and a row in READERS.

On disk: DOMAIN/SPLIT/NAME.png, NAME.points (x, y, z, intensity; f32), NAME.labels (u8), and one
camera.txt with the twelve numbers of the matrix from the LiDAR frame to pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers import (
    Array,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    inside_image,
    make_calib,
    read_array,
    read_image,
)

RAW_NAMES = ("sky", "brick car", "brick road", "brick wall", "brick tree")


class Toy(Reader):
    name = "toy"
    domains = tuple(
        Domain(name, "toy", 1, ("train", "val", "test"), {"test": 2}) for name in ("wood", "brick")
    )
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "street6": ("brick car", "brick road", "", "", "brick wall", "brick tree")
    }
    label_files = "a .labels file beside each .points file"
    image = (60, 100)

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        numbers = (root / "camera.txt").read_text().split()
        calib = make_calib(root / "camera.txt", [], np.array(numbers, float).reshape(3, 4))
        refs = []
        for points in sorted((root / domain.name).glob(f"{split or '*'}/*.points")):
            label, scene = points.with_suffix(".labels"), points.parent.name
            refs.append(
                FrameRef(
                    token=f"{domain.name}/{scene}/{points.stem}",
                    scene=scene,
                    reader=self.name,
                    image_path=points.with_suffix(".png"),
                    points_path=points,
                    label_path=label if label.exists() else None,
                    calib=calib,
                )
            )
        return refs

    def read(self, ref: FrameRef) -> RawFrame:
        labels = read_array(ref.label_path, np.uint8, 1)[:, 0] if ref.label_path else None
        assert ref.points_path is not None
        points = read_array(ref.points_path, np.float32, 4)
        return RawFrame(read_image(ref.image_path), points, labels)

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        assert raw.points is not None and ref.calib is not None
        homogeneous = np.concatenate([raw.points[:, :3].T, np.ones((1, len(raw.points)))])
        uvw = np.array(ref.calib.camera) @ homogeneous
        front = np.flatnonzero(uvw[2] > 0)
        rows, row_col = inside_image(uvw[:, front], front, (raw.image.height, raw.image.width))
        return rows, row_col, uvw[2, rows].astype(np.float32)

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return dict(enumerate(RAW_NAMES))

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        return [root / "camera.txt"]


def write_toy(root: Path, frames: int = 2, points: int = 300) -> Path:
    """Both domains; `frames` frames of each split. What a point is follows from where it lies."""
    for d, domain in enumerate(Toy.domains):
        for s, split in enumerate(domain.splits):
            folder = root / domain.name / split
            folder.mkdir(parents=True)
            for i in range(frames):
                rng = np.random.default_rng([d, s, i])
                cloud = rng.uniform([4, -3, -2, 0], [20, 3, 2, 1], (points, 4)).astype(np.float32)
                labels = np.digitize(cloud[:, 2], (-1.5, -0.5, 0.5, 1.5)).astype(np.uint8)
                pixels = rng.integers(0, 256, (120, 200, 3), np.uint8)
                cloud.tofile(folder / f"{i}.points")
                labels.tofile(folder / f"{i}.labels")
                Image.fromarray(pixels).save(folder / f"{i}.png")
    # x looks ahead: u = 100 - 150 y / x, v = 60 - 150 z / x
    (root / "camera.txt").write_text("100 -150 0 0  60 0 -150 0  1 0 0 0\n")
    return root
