"""From a frame to a training batch: classes, augmentation, voxels.

A `Frame` is an image with labelled places in it: the LiDAR points that fall into it, or every
pixel. `sample` augments it and turns points into voxels, `collate` concatenates samples into a
`Batch`. A row is such a place everywhere: a point, or in a dense data set a pixel. What is special
to a data set lies in `readers`: this file knows none by its name. `index` keeps frames on disk.

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
    "nuscenes16": (
        "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
        "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk",
        "terrain", "manmade", "vegetation",
    ),
    "skitti19": (
        "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist",
        "motorcyclist", "road", "parking", "sidewalk", "other-ground", "building", "fence",
        "vegetation", "trunk", "terrain", "pole", "traffic-sign",
    ),
    "cityscapes19": (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic_light", "traffic_sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
        "motorcycle", "bicycle",
    ),
    "synthia16": (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic_light", "traffic_sign",
        "vegetation", "sky", "person", "rider", "car", "bus", "motorcycle", "bicycle",
    ),
    "synthia13": (
        "road", "sidewalk", "building", "traffic_light", "traffic_sign", "vegetation", "sky",
        "person", "rider", "car", "bus", "motorcycle", "bicycle",
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
    """An image and its rows: M points; or, where `xyz` is None, its H x W pixels in order."""

    token: str
    image: Array  # (H, W, 3) u8
    label: Array  # of the points (M,), of the pixels (H, W): u8, 255 = ignore
    has_label: bool
    xyz: Array | None = None  # (M, 3) f32, metres
    pixel: Array | None = None  # (M, 2) i16: row, col in `image`
    depth: Array | None = None  # of the points (M,), of the pixels (H, W): f32, metres along the
    # optical axis, 0 = unknown

    @property
    def rows(self) -> int:
        return self.label.size


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
    crop: tuple[int, int] | None = None  # (H, W), random column; points: bottom of the image
    draw: int | None = None  # points drawn at random before the crop; None: all


@dataclass
class Sample:
    token: str
    image: Tensor  # (3, H, W) f32 in [0, 1]
    pixel: Tensor  # (n, 2) i64 row, col
    coords: Tensor | None  # (n, 3) i32 voxels, in [0, GRID); None: rows are pixels
    label: Tensor  # (n,) i64, IGNORE = -100
    keep: Tensor  # (n,) i64 rows of the stored frame
    depth: Tensor | None  # (1, H, W) f32 metres, 0 = nothing there; None: not asked for


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


def _room(frame: Frame, crop: tuple[int, int]) -> tuple[int, int]:
    """How far a crop can be moved, down and to the right. Raises DataError: not at all."""
    room = frame.image.shape[0] - crop[0], frame.image.shape[1] - crop[1]
    if min(room) < 0:
        height, width = frame.image.shape[:2]
        raise DataError(
            f"frame {frame.token}: image {height}x{width} is smaller than "
            f"the crop {crop[0]}x{crop[1]}"
        )
    return room


def _crop(
    frame: Frame, rows: Array, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, Array]:
    """Top and left of a crop at the bottom of the image, and those of the points in it.

    Up to ten columns are tried for more than 100 points. If none has them the fullest stays; the
    released code then takes the whole image, which no batch of crops can hold.
    """
    assert frame.pixel is not None
    top, most_left = _room(frame, crop)
    row, col = frame.pixel[rows].T
    left = 0
    best = rows[:0]
    for _ in range(10):
        start = int(rng.integers(most_left + 1))
        inside = rows[(row >= top) & (col >= start) & (col < start + crop[1])]
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
    depth: bool = False,
) -> Sample:
    """Augment a frame and turn metres into voxels (`scale` voxels a metre).

    All chance comes from `rng`. Points that leave the grid are dropped. Source: the released code;
    here the colour jitter comes after the crop.

    Args:
        depth: whether the sample has a depth image; 0 where nothing is known.
    Raises:
        DataError: the crop does not fit, or the frame has no depth.
    """
    if depth and frame.depth is None:
        raise DataError(f"frame {frame.token}: no depth; add the depth files of the data set")
    if frame.xyz is None:
        return _sample_pixels(frame, augment, rng, depth)
    assert frame.pixel is not None
    image, keep, top, left, mirror = frame.image, np.arange(len(frame.xyz)), 0, 0, False
    if augment is not None:
        if augment.draw is not None and len(keep) > augment.draw:
            keep = np.sort(rng.choice(len(keep), augment.draw, replace=False))
        if augment.crop is not None:
            top, left, keep = _crop(frame, keep, augment.crop, rng)
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
    distances = None
    if depth:
        assert frame.depth is not None
        distances = np.zeros(image.shape[:2], np.float32)
        far_first = np.argsort(-frame.depth[keep], kind="stable")  # the nearest point stays
        distances[tuple(pixel[far_first].T)] = frame.depth[keep][far_first]
    label = frame.label[keep]
    return _as_tensors(frame.token, image, pixel, coords, label, keep, distances)


def _sample_pixels(
    frame: Frame, augment: Augment | None, rng: np.random.Generator, depth: bool
) -> Sample:
    """A sample of a dense frame: a random crop, colour jitter, a mirror. Every pixel is a row."""
    height, width = frame.image.shape[:2]
    view, mirror = np.s_[0:height, 0:width], False
    if augment is not None:
        if augment.crop is not None:
            top, left = (int(rng.integers(room + 1)) for room in _room(frame, augment.crop))
            view = np.s_[top : top + augment.crop[0], left : left + augment.crop[1]]
        mirror = augment.flip_2d and rng.random() < 0.5
    image, label = frame.image[view], frame.label[view]
    keep = np.arange(height * width).reshape(height, width)[view]
    distances = frame.depth[view] if depth and frame.depth is not None else None
    if augment is not None and augment.jitter:
        image = _jitter(image, augment.jitter, rng)
    if mirror:
        image, label, keep = (array[:, ::-1] for array in (image, label, keep))
        distances = None if distances is None else distances[:, ::-1]
    row, col = np.divmod(np.arange(label.size), label.shape[1])
    pixel = np.stack([row, col], 1)
    return _as_tensors(
        frame.token, image, pixel, None, label.reshape(-1), keep.reshape(-1), distances
    )


def _as_tensors(
    token: str,
    image: Array,
    pixel: Array,
    coords: Array | None,
    label: Array,
    keep: Array,
    depth: Array | None,
) -> Sample:
    wide = label.astype(np.int64)
    wide[label == UNLABELLED] = IGNORE
    colours = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)
    return Sample(
        token=token,
        image=torch.from_numpy(colours),
        pixel=torch.from_numpy(pixel),
        coords=None if coords is None else torch.from_numpy(coords),
        label=torch.from_numpy(wide),
        keep=torch.from_numpy(np.ascontiguousarray(keep)),
        depth=None if depth is None else torch.from_numpy(depth.copy())[None],
    )


# ---- batches ------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Frames concatenated; frame b's rows follow frame b-1's."""

    image: Tensor  # (B, 3, H, W) f32
    pixel: Tensor  # (N, 2) i64 row, col
    label: Tensor  # (N,) i64, IGNORE = -100
    tokens: list[str]
    keep: list[Tensor]  # for each frame, its rows in the stored frame
    counts: list[int]  # rows of each frame
    coords: Tensor | None = None  # (N, 4) i32 b, x, y, z; None: rows are pixels
    depth: Tensor | None = None  # (B, 1, H, W) f32 metres, 0 = nothing there; where asked for
    pseudo: dict[str, Tensor] = field(default_factory=dict)
    # head -> pseudo-labels (N,) i64, IGNORE where none was kept

    @property
    def points(self) -> Tensor:
        """`coords`, in a system that needs LiDAR points."""
        assert self.coords is not None, "the data set is dense: it has no points"
        return self.coords

    @property
    def batch_index(self) -> Tensor:
        """(N,) i64: the frame of each row."""
        counts = torch.tensor(self.counts, device=self.pixel.device)
        frames = torch.arange(len(self.counts), device=self.pixel.device)
        return torch.repeat_interleave(frames, counts, output_size=len(self.pixel))

    def to(self, device: torch.device | str) -> Batch:
        """A copy with its tensors on `device`; `keep` stays where it is."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            image=moved(self.image),
            pixel=moved(self.pixel),
            coords=None if self.coords is None else moved(self.coords),
            depth=None if self.depth is None else moved(self.depth),
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


def _all_or_none(tensors: Sequence[Tensor | None], what: str) -> list[Tensor]:
    """The tensors, or an empty list where none is there."""
    there = [tensor for tensor in tensors if tensor is not None]
    if there and len(there) < len(tensors):
        raise DataError(f"a batch mixes frames with {what} and frames without; use one data set")
    return there


def collate(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples.

    Raises ValueError for none, DataError for images of different sizes.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, found none")
    _require_one_size([s.image for s in samples])
    counts = [len(s.label) for s in samples]
    coords = _all_or_none([s.coords for s in samples], "points")
    depth = _all_or_none([s.depth for s in samples], "depth")
    batch = Batch(
        image=torch.stack([s.image for s in samples]),
        pixel=torch.cat([s.pixel for s in samples]),
        label=torch.cat([s.label for s in samples]),
        tokens=[s.token for s in samples],
        keep=[s.keep for s in samples],
        counts=counts,
        depth=torch.stack(depth) if depth else None,
    )
    if coords:
        frame = batch.batch_index.int()[:, None]
        batch.coords = torch.cat([frame, torch.cat(coords)], 1)
    return batch


def join(batches: Sequence[Batch]) -> Batch:
    """The frames of several batches as one batch, in order.

    Raises ValueError for none, DataError for images of different sizes.
    """
    if not batches:
        raise ValueError("join needs at least one batch, found none")
    _require_one_size([batch.image for batch in batches])
    heads = batches[0].pseudo.keys()
    assert all(batch.pseudo.keys() == heads for batch in batches), "pseudo-labels of other heads"
    depth = _all_or_none([batch.depth for batch in batches], "depth")
    parts: list[Tensor] = []
    frames = 0
    for points in _all_or_none([batch.coords for batch in batches], "points"):
        shifted = points.clone()
        shifted[:, 0] += frames
        frames += len(batches[len(parts)].counts)
        parts.append(shifted)
    return Batch(
        image=torch.cat([batch.image for batch in batches]),
        pixel=torch.cat([batch.pixel for batch in batches]),
        label=torch.cat([batch.label for batch in batches]),
        tokens=[token for batch in batches for token in batch.tokens],
        keep=[keep for batch in batches for keep in batch.keep],
        counts=[count for batch in batches for count in batch.counts],
        coords=torch.cat(parts) if parts else None,
        depth=torch.cat(depth) if depth else None,
        pseudo={head: torch.cat([batch.pseudo[head] for batch in batches]) for head in heads},
    )
