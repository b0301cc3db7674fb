"""Cityscapes: street scenes of 50 cities, labels a pixel, depth from stereo; a dense target.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (CVPR 2016),
and the authors' cityscapesScripts: its README (folders, disparity) and helpers/labels.py (ids).

On disk, of each frame NAME = CITY_SEQUENCE_FRAME:
    leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
    gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png  8-bit label ids; without it, no labels
    disparity/SPLIT/CITY/NAME_disparity.png     16 bits; without it, no depth
    camera/SPLIT/CITY/NAME_camera.json          what turns disparity into depth
The benchmark's labels of the split test are hidden: targets are evaluated on val.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers.base import (
    Array,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    raw_labels,
    read_image,
    regular,
)
from ftdpp.readers.dense import DenseReader, read_16_bits, read_ids, require_size

# Licence plates have the id -1 and are in no label image.
RAW_NAMES = dict(
    enumerate(
        (
            "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic",
            "ground", "road", "sidewalk", "parking", "rail track", "building", "wall", "fence",
            "guard rail", "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign",
            "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan",
            "trailer", "train", "motorcycle", "bicycle",
        )
    )
)  # fmt: skip
_EVALUATED = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip


def _without(*left_out: str) -> tuple[str, ...]:
    return tuple(name for name in _EVALUATED if name not in left_out)


# SYNTHIA's classes are those that both data sets have; the smaller set leaves out three rare ones.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "cityscapes19": _EVALUATED,
    "synthia16": _without("terrain", "truck", "train"),
    "synthia13": _without("terrain", "truck", "train", "wall", "fence", "pole"),
}


class Cityscapes(DenseReader):
    name = "cityscapes"
    domains = (
        Domain(
            name="cityscapes",
            reader="cityscapes",
            flip_axis=0,
            splits=("train", "val"),
            frames={"train": 2975, "val": 500},
        ),
    )
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = CLASSES
    label_files = "the folder gtFine"
    image = (512, 1024)  # as in CorDA (Wang et al., ICCV 2021), in training and evaluation

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        photos = root / "leftImg8bit"
        if not photos.is_dir():
            raise DataError(f"{root}: no folder leftImg8bit in it; give the Cityscapes root")
        refs = []
        for part in domain.splits if split is None else (split,):
            for photo in sorted((photos / part).glob("*/*_leftImg8bit.png")):
                city, name = photo.parent.name, photo.name.removesuffix("_leftImg8bit.png")
                label = root / "gtFine" / part / city / f"{name}_gtFine_labelIds.png"
                disparity = root / "disparity" / part / city / f"{name}_disparity.png"
                refs.append(
                    FrameRef(
                        token=name,
                        scene=city,
                        reader=self.name,
                        image_path=photo,
                        label_path=label if label.exists() else None,
                        depth_path=disparity if disparity.exists() else None,
                    )
                )
        return refs

    def read(self, ref: FrameRef) -> RawFrame:
        image, labels, depth = read_image(ref.image_path, "PNG"), None, None
        if ref.label_path is not None:
            labels = read_ids(ref.label_path)
            require_size(ref.label_path, labels, image, ref.image_path)
        if ref.depth_path is not None:
            disparity = read_16_bits(ref.depth_path)
            require_size(ref.depth_path, disparity, image, ref.image_path)
            depth = metres(disparity, *_read_camera(_camera_path(ref.depth_path)))
        return RawFrame(image=image, labels=labels, depth=depth)

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return RAW_NAMES

    def prediction_path(self, ref: FrameRef, split: str) -> Path:
        return Path(split, ref.scene, f"{ref.token}_gtFine_labelIds.png")

    def write_prediction(self, path: Path, label: Array, ids: Array) -> None:
        """A PNG of label ids in 8 bits, at the size of the photo."""
        Image.fromarray(raw_labels(label, ids).astype(np.uint8)).save(path, "PNG")

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        return sorted(_camera_path(ref.depth_path) for ref in refs if ref.depth_path is not None)


def metres(disparity: Array, baseline: float, focal: float) -> Array:
    """Depth (H, W) f32 in metres along the optical axis, 0 where it is unknown.

    depth = baseline * focal / d with d = (p - 1) / 256 pixels. p = 0 is no measurement, p = 1
    (d = 0) no finite depth.

    Args:
        disparity: p (H, W) u16. baseline: metres. focal: pixels.
    """
    depth = np.zeros(1 << 16, np.float32)  # for each p
    depth[2:] = baseline * focal * 256 / np.arange(1, len(depth) - 1)
    return depth[disparity]


def _camera_path(disparity: Path) -> Path:
    root, place = disparity.parents[3], disparity.parent.relative_to(disparity.parents[2])
    return root / "camera" / place / disparity.name.replace("_disparity.png", "_camera.json")


def _read_camera(path: Path) -> tuple[float, float]:
    """Baseline in metres and focal length in pixels."""
    try:
        camera = json.loads(regular(path).read_bytes())
        numbers = float(camera["extrinsic"]["baseline"]), float(camera["intrinsic"]["fx"])
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; depth needs the cameras beside the folder disparity, "
            "download the folder camera"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}: expected numbers extrinsic.baseline and intrinsic.fx, "
            f"found {type(error).__name__}; download it again"
        ) from None
    if not all(0 < number < 1e6 for number in numbers):  # false for NaN, too
        raise DataError(
            f"{path}: baseline {numbers[0]} m, fx {numbers[1]} pixels, expected numbers above 0 "
            "and below a million; download it again"
        )
    return numbers
