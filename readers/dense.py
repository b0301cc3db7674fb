"""What the dense readers share: PNG files of 8 and of 16 bits, and every pixel as a row.

A dense data set labels the pixels of an image; it has no LiDAR. All of its images are PNG files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ftdpp.readers.base import Array, DataError, Reader, open_image


class DenseReader(Reader):
    """A data set whose labels are images."""

    dense = True
    crop = (512, 512)


def read_ids(path: Path) -> Array:
    """The label ids (H, W) u8 of a PNG of 8 bits: its grey values or, with a palette, the indices.

    Raises DataError: missing, not readable, too large, or of another kind.
    """
    with open_image(path, "PNG") as file:
        # A grey image of fewer bits is scaled up when it is read; palette indices are not.
        if file.mode != "P" and _kind(file) != "L":
            raise DataError(
                f"{path}: a PNG of kind {_kind(file)}, expected 8-bit label ids (grey or palette); "
                "restore the original file"
            )
        return np.array(file, np.uint8)


def read_16_bits(path: Path) -> Array:
    """The first channel (H, W) u16 of a PNG of 16 bits, grey or RGB.

    Pillow reads 16-bit RGB, but hands over one of the two bytes: its raw mode "RGB;16B" takes the
    first, "RGB;16L" the second. Two passes give all 16 bits, faster than a pure Python library and
    without OpenCV's 150 MB.

    Raises DataError: missing, not readable, too large, or of another kind.
    """
    with open_image(path, "PNG") as file:
        kind = _kind(file)
        if kind == "I;16B":
            return np.array(file).astype(np.uint16)
        if kind != "RGB;16B":
            raise DataError(
                f"{path}: a PNG of kind {kind}, expected 16 bits (grey or RGB); "
                "a copy in 8 bits has lost values, restore the original file"
            )
        high = np.array(file.getchannel(0))
    with open_image(path, "PNG") as file:
        codec, box, offset = file.tile[0][:3]
        # Pillow 10 has plain tuples here, later ones have named ones and take both.
        file.tile = [(codec, box, offset, "RGB;16L")]  # type: ignore[list-item]
        low = np.array(file.getchannel(0))
    return high.astype(np.uint16) << 8 | low


def require_size(path: Path, pixels: Array | None, image: Image.Image, image_path: Path) -> None:
    """Raises DataError if an image of labels or depth is not as large as the photo."""
    if pixels is not None and pixels.shape != (image.height, image.width):
        raise DataError(
            f"{path}: {pixels.shape} (H, W), expected {(image.height, image.width)} "
            f"as {image_path}; restore both"
        )


def names(folder: Path) -> set[str]:
    """The names of the PNG files in a folder; none if there is no such folder."""
    return {path.name for path in folder.glob("*.png")}


def _kind(file: ImageFile.ImageFile) -> str:
    """How a pixel lies in the file, in Pillow's words: "L", "P", "RGB", "I;16B", "RGB;16B", ..."""
    return str(file.tile[0][3])
