"""GTA5: frames of a video game, labels a pixel; a dense source without depth.

Source: Richter et al., "Playing for Data: Ground Truth from Computer Games" (ECCV 2016).

On disk: images/NNNNN.png and labels/NNNNN.png, a palette PNG whose indices are the label ids of
Cityscapes. Some labels differ from their image in size, by a few pixels. Published code (DACS,
CorDA) brings image and labels to the size of training each for itself, which stretches one onto the
other; so does this reader: it stretches the labels, to the nearest, and leaves the image alone. A
larger difference is no such pair and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers.base import Array, DataError, Domain, FrameRef, RawFrame, read_image
from ftdpp.readers.cityscapes import CLASSES
from ftdpp.readers.cityscapes import RAW_NAMES as CITYSCAPES_NAMES
from ftdpp.readers.dense import DenseReader, names, read_ids, require_size

RAW_NAMES = {**CITYSCAPES_NAMES, 34: "license plate"}
STRETCH = 0.05  # labels whose height and width differ from the image's by up to this are stretched


class Gta5(DenseReader):
    name = "gta5"
    domains = (
        # The official lists of train, val and test are not used: published code trains on all.
        Domain(name="gta5", reader="gta5", flip_axis=0, splits=("train",), frames={"train": 24966}),
    )
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = CLASSES
    label_files = "the folder labels"
    image = (720, 1280)  # as in CorDA

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        images, labels = root / "images", root / "labels"
        if not images.is_dir():
            raise DataError(f"{root}: no folder images in it; give the GTA5 root")
        labelled = names(labels)
        return [
            FrameRef(
                token=name.removesuffix(".png"),
                scene=self.name,
                reader=self.name,
                image_path=images / name,
                label_path=labels / name if name in labelled else None,
            )
            for name in sorted(names(images))
        ]

    def read(self, ref: FrameRef) -> RawFrame:
        image, labels = read_image(ref.image_path, "PNG"), None
        if ref.label_path is not None:
            labels = _stretched(read_ids(ref.label_path), image)
            require_size(ref.label_path, labels, image, ref.image_path)
        return RawFrame(image=image, labels=labels)

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return RAW_NAMES


def _stretched(labels: Array, image: Image.Image) -> Array:
    """Labels at the image's size (H, W) if theirs is close to it, else as they are."""
    size = np.array([image.height, image.width])
    if (abs(np.array(labels.shape) - size) > STRETCH * size).any():
        return labels
    return np.array(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
