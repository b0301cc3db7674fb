"""From a frame to a training batch: classes, augmentation, voxels.

A `Frame` is one LiDAR sweep and one image, with the points that fall into the image. `sample`
augments and voxelises it, `collate` concatenates samples into a `Batch`. A row is a point
everywhere. What is special to a data set lies in `readers`: this file knows none by its name.
Frames are kept on disk by `index`.

Conventions: metres, LiDAR frame; pixels are (row, col); images are RGB; coords are voxels (paper:
5 cm). "Released code" is the code that its authors published with the FtD++ paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ftdpp.readers import Array, DataError, Domain, Reader, plural, reader_of

IGNORE = -100  # label of points that neither the losses nor the metrics count
GRID = 4096  # edge of the voxel grid (the released code calls it full_scale)
UNLABELLED = 255  # IGNORE in a byte, as a `Frame` holds it


# ---- classes ------------------------------------------------------------------------------------

# Readers say which raw names of their data set make up each class.
CLASS_SETS: dict[str, tuple[str, ...]] = {
    "street6": (
        "vehicle", "driveable_surface", "sidewalk", "terrain", "manmade", "vegetation",
    ),
    "vkitti6": ("vegetation_terrain", "building", "road", "object", "truck", "car"),
    "a2d2_10": (
        "car", "truck", "bike", "person", "road", "parking", "sidewalk", "building", "nature",
        "other-objects",
    ),
}  # fmt: skip


def common_class_sets(src: Domain, tgt: Domain) -> list[str]:
    """Names of the class sets that the readers of both domains map to."""
    maps = reader_of(src).classes, reader_of(tgt).classes
    return [name for name in CLASS_SETS if all(name in classes for classes in maps)]


def class_table(reader: Reader, classes: str, categories: Mapping[int, str]) -> Array:
    """Lookup array u8 (largest raw id + 1,): raw id -> class index, 255 = ignore.

    Args:
        classes: name of a class set. categories: raw id -> raw name.
    Raises:
        DataError: the reader does not map to this class set.
    """
    if classes not in reader.classes:
        known = ", ".join(reader.classes)
        raise DataError(f"no class map from {reader.name} to {classes}: type one of {known}")
    members = reader.classes[classes]
    assert len(members) == len(CLASS_SETS[classes]), f"{reader.name}: {classes} has another length"
    class_of = {raw: c for c, raws in enumerate(members) for raw in raws.split(", ")}
    table = np.full(max([255, *categories]) + 1, UNLABELLED, np.uint8)
    for raw_id, raw in categories.items():
        table[raw_id] = class_of.get(raw, UNLABELLED)
    return table


# ---- frames -------------------------------------------------------------------------------------


@dataclass
class Frame:
    token: str
    xyz: Array  # (M, 3) f32, metres
    pixel: Array  # (M, 2) i16: row, col in `image`
    label: Array  # (M,) u8, 255 = ignore
    has_label: bool
    image: Array  # (H, W, 3) u8


# ---- samples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Augmentation in training; the defaults are the released ones. For testing pass None."""

    noise: float = 0.1  # standard deviation of what is added to each element of the 3x3 matrix
    flip_3d: bool = True
    rotate: bool = True  # about z, any angle
    translate: bool = True  # anywhere in the grid
    jitter: float = 0.4  # brightness, contrast and saturation are multiplied by 1 +- this
    flip_2d: bool = True  # independent of flip_3d, as released
    crop: tuple[int, int] | None = None  # (H, W): bottom of the image, random column


@dataclass
class Sample:
    token: str
    image: Tensor  # (3, H, W) f32 in [0, 1]
    pixel: Tensor  # (n, 2) i64 row, col
    coords: Tensor  # (n, 3) i32 voxels, in [0, GRID)
    label: Tensor  # (n,) i64, IGNORE = -100
    keep: Tensor  # (n,) i64 rows of the frame's stored points


def rotation_3d(augment: Augment, flip_axis: int, rng: np.random.Generator) -> Array:
    """(3,3) matrix for row vectors: identity + noise, one element negated with probability 1/2,
    turned about z.

    The flip negates only R[flip_axis, flip_axis]; the noise beside it keeps its sign, as in the
    released code.
    """
    matrix = np.eye(3) + augment.noise * rng.standard_normal((3, 3))
    if augment.flip_3d and rng.random() < 0.5:
        matrix[flip_axis, flip_axis] *= -1
    if augment.rotate:
        angle = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(angle), np.sin(angle)
        matrix = matrix @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return matrix


def _crop(frame: Frame, crop: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, Array]:
    """Top and left of a crop, and the rows in it.

    Up to ten columns are tried for more than 100 points. If none has them the fullest stays; the
    released code then takes the whole image, which no batch of crops can hold.
    """
    height, width = frame.image.shape[:2]
    if height < crop[0] or width < crop[1]:
        raise DataError(
            f"frame {frame.token}: image {height}x{width} is smaller than "
            f"the crop {crop[0]}x{crop[1]}"
        )
    row, col = frame.pixel.T
    top, left = height - crop[0], 0
    best = np.empty(0, np.int64)
    for _ in range(10):
        start = int(rng.integers(width - crop[1] + 1))
        inside = np.flatnonzero((row >= top) & (col >= start) & (col < start + crop[1]))
        if len(inside) > len(best):
            best, left = inside, start
        if len(best) > 100:
            break
    if not len(best):
        raise DataError(
            f"frame {frame.token}: no point in the lower {plural(crop[0], 'row')}; "
            "use a larger crop or leave it out"
        )
    return top, left, best


def _jitter(image: Array, strength: float, rng: np.random.Generator) -> Array:
    """Brightness, contrast and saturation in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
    picture = Image.fromarray(np.ascontiguousarray(image))
    for i in rng.permutation(3):
        picture = enhancers[i](picture).enhance(float(factors[i]))
    return np.asarray(picture)


def sample(
    frame: Frame,
    augment: Augment | None,
    flip_axis: int,
    rng: np.random.Generator,
    scale: float = 20.0,
) -> Sample:
    """Augment a frame and turn metres into voxels (`scale` voxels a metre).

    All chance comes from `rng`. Points that leave the grid are dropped. Raises DataError if the
    crop does not fit. Source: the released code; here the colour jitter comes after the crop.
    """
    image, keep, top, left, mirror = frame.image, np.arange(len(frame.xyz)), 0, 0, False
    if augment is not None:
        if augment.crop is not None:
            top, left, keep = _crop(frame, augment.crop, rng)
            image = image[top : top + augment.crop[0], left : left + augment.crop[1]]
        if augment.jitter:
            image = _jitter(image, augment.jitter, rng)
        mirror = augment.flip_2d and rng.random() < 0.5

    points = frame.xyz[keep]
    if augment is not None:
        points = points @ rotation_3d(augment, flip_axis, rng).astype(np.float32)
    points = points * np.float32(scale)
    points -= points.min(0)
    if augment is not None and augment.translate:
        room = np.maximum(GRID - points.max(0) - 0.001, 0)  # 0: the cloud is larger than the grid
        points += (room * rng.random(3)).astype(np.float32)
    coords = np.floor(points).astype(np.int32)
    inside = (coords < GRID).all(1)  # never negative: the smallest is 0
    coords, keep = coords[inside], keep[inside]

    pixel = frame.pixel[keep].astype(np.int64) - np.array([top, left])
    if mirror:
        image = image[:, ::-1]
        pixel[:, 1] = image.shape[1] - 1 - pixel[:, 1]
    label = frame.label[keep].astype(np.int64)
    label[label == UNLABELLED] = IGNORE
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)
    tensors = (torch.from_numpy(array) for array in (pixels, pixel, coords, label, keep))
    return Sample(frame.token, *tensors)


# ---- batches ------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Frames concatenated, one row a point; frame b's rows follow frame b-1's."""

    image: Tensor  # (B, 3, H, W) f32
    pixel: Tensor  # (N, 2) i64 row, col
    coords: Tensor  # (N, 4) i32 b, x, y, z
    label: Tensor  # (N,) i64, IGNORE = -100
    tokens: list[str]
    keep: list[Tensor]  # for each frame, its rows in the index
    counts: list[int]  # points of each frame
    pseudo: dict[str, Tensor] = field(default_factory=dict)
    # head -> pseudo-labels (N,) i64, IGNORE where none was kept

    def to(self, device: torch.device | str) -> Batch:
        """A copy with its tensors on `device`; `keep` stays where it is."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            image=moved(self.image),
            pixel=moved(self.pixel),
            coords=moved(self.coords),
            label=moved(self.label),
            pseudo={head: moved(label) for head, label in self.pseudo.items()},
        )


def _require_one_size(images: Sequence[Tensor]) -> None:
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1:
        raise DataError(
            f"images of different sizes {sizes} in one batch: crop or resize them "
            "(--set crop=H,W, --set image=H,W), or use batches of one "
            "(--set batch=1, --set eval_batch=1)"
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples.

    Raises ValueError for none, DataError for images of different sizes.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, found none")
    _require_one_size([s.image for s in samples])
    counts = [len(s.label) for s in samples]
    frames = torch.arange(len(samples), dtype=torch.int32)
    b = torch.repeat_interleave(frames, torch.tensor(counts))
    return Batch(
        image=torch.stack([s.image for s in samples]),
        pixel=torch.cat([s.pixel for s in samples]),
        coords=torch.cat([b[:, None], torch.cat([s.coords for s in samples])], 1),
        label=torch.cat([s.label for s in samples]),
        tokens=[s.token for s in samples],
        keep=[s.keep for s in samples],
        counts=counts,
    )


def join(batches: Sequence[Batch]) -> Batch:
    """The frames of several batches as one batch, in order. All have pseudo-labels of the same
    heads.

    Raises ValueError for none, DataError for images of different sizes.
    """
    if not batches:
        raise ValueError("join needs at least one batch, found none")
    _require_one_size([batch.image for batch in batches])
    heads = batches[0].pseudo.keys()
    assert all(batch.pseudo.keys() == heads for batch in batches), "pseudo-labels of other heads"
    coords, frames = [], 0
    for batch in batches:
        shifted = batch.coords.clone()
        shifted[:, 0] += frames
        coords.append(shifted)
        frames += len(batch.counts)
    return Batch(
        image=torch.cat([batch.image for batch in batches]),
        pixel=torch.cat([batch.pixel for batch in batches]),
        coords=torch.cat(coords),
        label=torch.cat([batch.label for batch in batches]),
        tokens=[token for batch in batches for token in batch.tokens],
        keep=[keep for batch in batches for keep in batch.keep],
        counts=[count for batch in batches for count in batch.counts],
        pseudo={head: torch.cat([batch.pseudo[head] for batch in batches]) for head in heads},
    )
