"""SYNTHIA-RAND-CITYSCAPES: a rendered city, labels and depth a pixel; a dense source.

Source: Ros et al., "The SYNTHIA Dataset: A Large Collection of Synthetic Images for Semantic
Segmentation of Urban Scenes" (CVPR 2016), and the README of this part of it.

On disk, in the folder RAND_CITYSCAPES (the root is this folder or the one above it):
    RGB/NNNNNNN.png          760x1280
    GT/LABELS/NNNNNNN.png    16-bit RGB: class id, instance id, nothing
    Depth/Depth/NNNNNNN.png  16-bit RGB: centimetres, the same in each channel
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from ftdpp.readers.base import DataError, Domain, FrameRef, RawFrame, read_image
from ftdpp.readers.cityscapes import CLASSES
from ftdpp.readers.dense import DenseReader, names, read_16_bits, require_size

RAW_NAMES = dict(
    enumerate(
        (
            "void", "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car",
            "traffic sign", "pedestrian", "bicycle", "motorcycle", "parking-slot", "road-work",
            "traffic light", "terrain", "rider", "truck", "bus", "train", "wall", "lanemarking",
        )
    )
)  # fmt: skip


class Synthia(DenseReader):
    name = "synthia"
    domains = (
        Domain(
            name="synthia", reader="synthia", flip_axis=0, splits=("train",), frames={"train": 9400}
        ),
    )
    # As in published code: lane markings, parking slots and road works belong to no class.
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        classes: tuple("pedestrian" if raw == "person" else raw for raw in CLASSES[classes])
        for classes in ("synthia16", "synthia13")
    }
    label_files = "the folder GT/LABELS"
    image = (760, 1280)

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        places = (root, root / "RAND_CITYSCAPES")
        base = next((place for place in places if (place / "RGB").is_dir()), None)
        if base is None:
            raise DataError(f"{root}: no folder RGB or RAND_CITYSCAPES/RGB in it; give its root")
        labels, depths = base / "GT" / "LABELS", base / "Depth" / "Depth"
        labelled, with_depth = names(labels), names(depths)
        return [
            FrameRef(
                token=name.removesuffix(".png"),
                scene=self.name,
                reader=self.name,
                image_path=base / "RGB" / name,
                label_path=labels / name if name in labelled else None,
                depth_path=depths / name if name in with_depth else None,
            )
            for name in sorted(names(base / "RGB"))
        ]

    def read(self, ref: FrameRef) -> RawFrame:
        image, labels, depth = read_image(ref.image_path, "PNG"), None, None
        if ref.label_path is not None:
            labels = read_16_bits(ref.label_path)
            require_size(ref.label_path, labels, image, ref.image_path)
        if ref.depth_path is not None:
            centimetres = read_16_bits(ref.depth_path)
            require_size(ref.depth_path, centimetres, image, ref.image_path)
            depth = centimetres.astype(np.float32) / np.float32(100)
        return RawFrame(image=image, labels=labels, depth=depth)

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return RAW_NAMES
