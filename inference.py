"""Predictions: of the frames of an index, for pictures, and of one frame of a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftdpp.data import UNLABELLED, Frame, collate, sample
from ftdpp.evaluate import batches_of
from ftdpp.index import Index, resized
from ftdpp.readers import inside_image


def predict_frames(
    system: Any, index: Index, frames: range, device: torch.device | str = "cpu"
) -> Iterator[np.ndarray]:
    """Labels of the last head for each of some frames, (M,) u8 for all its points, 255 = none."""
    for i in frames:
        [(_, batch)] = batches_of(index, system.recipe, 1, range(i, i + 1))
        with torch.no_grad():
            found = system.predict(batch.to(device))[system.heads[-1]].argmax(1)
        label = np.full(index.frame(i).rows, UNLABELLED, np.uint8)
        label[batch.keep[0].numpy()] = found.cpu().numpy()
        yield label


@torch.no_grad()
def predict(
    system: Any, image: np.ndarray, points: np.ndarray, calibration: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Class probabilities of the points of one frame that the camera sees.

    Args:
        system: of `checkpoint.load`.
        image: (H, W, 3) u8 RGB.
        points: (M, 3) metres.
        calibration: (3, 4), from homogeneous points to pixels: (column, row, 1) * depth.
    Returns:
        rows (n,) of `points`, and for each head (n, K) probabilities of these points. The classes'
        names are `data.CLASS_SETS[system.recipe.classes]`.
    Raises:
        ValueError: an array has another shape, or no point falls into the image.
    """
    image, points, calibration = (np.asarray(a) for a in (image, points, calibration))
    wanted = {"image": (image, (None, None, 3)), "points": (points, (None, 3))}
    for name, (array, shape) in (wanted | {"calibration": (calibration, (3, 4))}).items():
        fits = array.ndim == len(shape)
        fits = fits and all(s in (None, n) for s, n in zip(shape, array.shape, strict=True))
        if not fits:
            raise ValueError(f"{name} is {array.shape}, expected {shape}".replace("None", "any"))
    r = system.recipe
    height, width = image.shape[:2]
    uvw = np.asarray(calibration, np.float64) @ np.c_[points, np.ones(len(points))].T
    front = np.flatnonzero(uvw[2] > 0)
    rows, row_col = inside_image(uvw[:, front], front, (height, width))
    if not len(rows):
        raise ValueError("no point falls into the image: check the calibration")
    size = r.image_size(width / height if width > 2.5 * height else None)
    picture, pixel = resized(Image.fromarray(image), row_col, size)
    frame = Frame(
        token="",
        xyz=np.ascontiguousarray(points[rows], np.float32),
        pixel=pixel,
        label=np.full(len(rows), UNLABELLED, np.uint8),
        has_label=False,
        image=picture,
    )
    taken = sample(frame, None, 0, np.random.default_rng(0), r.voxels_per_metre)
    batch = collate([taken]).to(next(system.parameters()).device)
    probabilities = {head: p.cpu().numpy() for head, p in system.predict(batch).items()}
    return rows[taken.keep.numpy()], probabilities
