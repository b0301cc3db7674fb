"""Tiny dense data sets in the original layouts: Cityscapes, GTA5, SYNTHIA-RAND-CITYSCAPES.

What a pixel holds follows from its place, so that a test can say it again.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ftdpp.readers import Array
from ftdpp.tests.layouts import picture, write

HEIGHT, WIDTH = 24, 40
BASELINE, FOCAL = 0.209313, 2262.52  # what Cityscapes' cameras have, about


def ids(count: int, seed: int) -> Array:
    """Label ids (H, W) u8 below `count`, each of them there."""
    pixels = np.arange(HEIGHT * WIDTH) % count
    return np.random.default_rng(seed).permutation(pixels).reshape(HEIGHT, WIDTH).astype(np.uint8)


def u16(seed: int) -> Array:
    """Any numbers of 16 bits (H, W), with the smallest and the largest."""
    numbers = np.random.default_rng(seed).integers(0, 1 << 16, (HEIGHT, WIDTH), np.uint16)
    numbers[0, :4] = 0, 1, 2, 65535
    return numbers


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_16(pixels: Array) -> bytes:
    """A PNG of 16 bits from (H, W) or (H, W, 3) u16; its rows take turns in the five filters.

    Pillow writes no RGB of 16 bits. Source: the PNG specification (ISO/IEC 15948), section 9.
    """
    height, width = pixels.shape[:2]
    step = 2 * (pixels.size // (height * width))  # bytes of a pixel
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8).astype(np.int64)
    up = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    left, corner = (np.pad(part, ((0, 0), (step, 0)))[:, :-step] for part in (rows, up))
    guess = left + up - corner
    off = [abs(guess - part) for part in (left, up, corner)]
    paeth = np.where(
        (off[0] <= off[1]) & (off[0] <= off[2]), left, np.where(off[1] <= off[2], up, corner)
    )
    filters = (0 * rows, left, up, (left + up) // 2, paeth)
    stored = b"".join(
        bytes([y % 5]) + ((rows[y] - filters[y % 5][y]) % 256).astype(np.uint8).tobytes()
        for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(stored)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def write_16(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_16(pixels))


def palette(labels: Array) -> Image.Image:
    """Label ids as the indices of a palette."""
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.reshape(-1).tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    return image


def cityscapes(root: Path) -> Path:
    """Two frames of train, one of val, one of test."""
    frames = ("train/aachen_000000_000019", "train/bochum_000000_000313")
    for i, place in enumerate((*frames, "val/lindau_000000_000019", "test/bonn_000000_000019")):
        split, name = place.split("/")
        folder = f"{split}/{name.split('_')[0]}"
        camera = {"extrinsic": {"baseline": BASELINE}, "intrinsic": {"fx": FOCAL, "fy": FOCAL}}
        labels = Image.fromarray(ids(34, i))
        write(root / f"leftImg8bit/{folder}/{name}_leftImg8bit.png", picture(i, WIDTH, HEIGHT))
        write(root / f"gtFine/{folder}/{name}_gtFine_labelIds.png", labels)
        write(root / f"gtFine/{folder}/{name}_gtFine_instanceIds.png", labels)
        write(root / f"camera/{folder}/{name}_camera.json", camera)
        write_16(root / f"disparity/{folder}/{name}_disparity.png", u16(i))
    return root


def gta5(root: Path, frames: int = 3) -> Path:
    for i in range(1, frames + 1):
        write(root / f"images/{i:05}.png", picture(i, WIDTH, HEIGHT))
        write(root / f"labels/{i:05}.png", palette(ids(35, i)))
    return root


def synthia(root: Path, frames: int = 3) -> Path:
    base = root / "RAND_CITYSCAPES"
    for i in range(frames):
        write(base / f"RGB/{i:07}.png", picture(i, WIDTH, HEIGHT))
        instances, nothing = u16(i + 100), np.zeros((HEIGHT, WIDTH), np.uint16)
        labels = np.stack([ids(23, i), instances, nothing], -1)
        write_16(base / f"GT/LABELS/{i:07}.png", labels)
        write_16(base / f"Depth/Depth/{i:07}.png", np.stack([u16(i)] * 3, -1))
    return root
