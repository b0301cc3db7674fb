"""Predictions: of frames, for pictures and as files of labels; and of one frame of a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ftdpp.data import UNLABELLED, Frame, class_table, collate, sample
from ftdpp.evaluate import batches_of
from ftdpp.files import Progress, replacing
from ftdpp.index import Index, read_frame, resized
from ftdpp.readers import READERS, DataError, FrameRef, inside_image


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
def label_heads(
    system: Any, ref: FrameRef, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Classes of everything that a frame has on disk, by every head; 255 = not predicted.

    Its labels are not read. Points that the camera does not see are not predicted.

    Returns:
        head -> (M,) u8 of the points; or, of a dense data set, (H, W) u8 at the photo's size.
    Raises:
        DataError: a file is missing or damaged.
    """
    r = system.recipe
    unread = np.full(256, UNLABELLED, np.uint8)
    size = r.image_size(READERS[ref.reader].aspect)
    frame, kept, points, _ = read_frame(replace(ref, label_path=None), unread, size)
    taken = sample(frame, None, 0, np.random.default_rng(0), r.voxels_per_metre)
    batch = collate([taken]).to(device)
    found: dict[str, np.ndarray] = {}
    for head, prob in system.predict(batch).items():
        if frame.xyz is None:
            with Image.open(ref.image_path) as photo:
                shape = photo.height, photo.width
            image = prob.t().view(1, -1, *batch.image.shape[-2:])
            enlarged = F.interpolate(image, shape, mode="bilinear")
            found[head] = enlarged.argmax(1)[0].to(torch.uint8).cpu().numpy()
        else:
            found[head] = np.full(points, UNLABELLED, np.uint8)
            found[head][kept[taken.keep.numpy()]] = prob.argmax(1).cpu().numpy()
    return found


def seen_frame(
    system: Any, ref: FrameRef, device: torch.device | str = "cpu"
) -> tuple[Frame, dict[str, np.ndarray]]:
    """A frame at the photo's own size, with its labels where it has some; and head -> classes of
    its rows, (M,) u8, 255 = not predicted.

    Raises:
        DataError: a file is missing or damaged, or the data set lacks the system's class set.
    """
    reader = READERS[ref.reader]
    table = class_table(reader, system.recipe.classes, reader.categories(ref))
    frame, kept, _, _ = read_frame(ref, table, None)
    said = label_heads(system, ref, device)
    rows = slice(None) if frame.xyz is None else kept
    return frame, {head: label.reshape(-1)[rows] for head, label in said.items()}


def write_predictions(
    system: Any,
    refs: Sequence[FrameRef],
    split: str,
    folder: Path,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Label frames and write the files that their benchmark takes, below `folder`.

    Returns:
        how many points or pixels were labelled.
    Raises:
        DataError: a frame cannot be read, or its name leads out of the folder.
    """
    reader, classes = READERS[refs[0].reader], system.recipe.classes
    class_table(reader, classes, {})  # refuses a class set that the reader does not have
    system.eval()
    count = 0
    for done, ref in enumerate(refs):
        if progress:
            progress(done, len(refs), "predicting")
        place = reader.prediction_path(ref, split)
        if place.is_absolute() or ".." in place.parts or "\0" in str(place):
            raise DataError(f"{ref.image_path}: its frame is called {ref.token!r}, no file name")
        named = sorted(reader.categories(ref).items(), reverse=True)
        raw = {name: number for number, name in named}
        ids = [raw.get(names.split(", ")[0], 0) for names in reader.classes[classes]]
        label = label_heads(system, ref, device)[system.heads[-1]]
        with replacing(folder / place) as temporary:
            reader.write_prediction(temporary, label, np.array(ids))
        count += int((label != UNLABELLED).sum())
    if progress:
        progress(len(refs), len(refs), "predicting")
    return count


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
