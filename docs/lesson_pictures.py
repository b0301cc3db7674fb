"""Draws the pictures of docs/lesson.md: from tensors and maps to images and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ftdpp import pictures
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch, Frame
from ftdpp.docs import figures
from ftdpp.kernels import naive

NAMES = CLASS_SETS["street6"]


def picture_of(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1], as a picture of 8 bits."""
    return Image.fromarray((255 * image.clamp(0, 1)).byte().permute(1, 2, 0).numpy())


def over_photo(batch: Batch, label: Tensor) -> Image.Image:
    """Labels of the first frame of a batch, over its image as the network sees it."""
    n = batch.counts[0]
    shown = label[:n].masked_fill(label[:n] == IGNORE, UNLABELLED).byte().numpy()
    xyz = batch.points[:n, 1:].float().numpy()
    image = np.asarray(picture_of(batch.image[0]))
    frame = Frame("", image, shown, True, xyz, batch.pixel[:n].numpy())
    return pictures.panel_images(frame, pictures.Panel("", shown), NAMES, 440)[0]


WIDE = 300  # pixels of a tile
LOW, HIGH = np.array([38, 60, 150]), np.array([255, 222, 60])  # dark blue to yellow


def heat(batch: Batch, value: Tensor) -> Image.Image:
    """A number of each point of the first frame of a batch, over its image: from the smallest,
    blue, to what two in a hundred exceed, yellow. NaN is not drawn."""
    n = batch.counts[0]
    numbers = value[:n].double().numpy()
    known = np.isfinite(numbers)
    low, high = np.nanmin(numbers), np.nanquantile(numbers, 0.98)
    level = np.clip((numbers - low) / max(high - low, 1e-12), 0, 1)
    photo = picture_of(batch.image[0])
    scale = WIDE / photo.width
    tile = photo.convert("L").convert("RGB").resize((WIDE, round(photo.height * scale)))
    draw = ImageDraw.Draw(tile)
    for i in np.argsort(np.where(known, level, -1)):
        if known[i]:
            row, col = (batch.pixel[i].numpy() + 0.5) * scale
            colour = tuple((LOW + level[i] * (HIGH - LOW)).astype(int).tolist())
            draw.ellipse((col - 2, row - 2, col + 2, row + 2), colour)
    return tile


def from_above(batch: Batch, level: int) -> Image.Image:
    """The voxels of the first frame of a batch, coloured by the commonest label of their points."""
    n = batch.counts[0]
    coords, label = batch.points[:n, 1:3].numpy() >> level, batch.label[:n].numpy()
    cells, cell = np.unique(coords, axis=0, return_inverse=True)
    votes = np.zeros((len(cells), len(NAMES) + 1), np.int64)
    np.add.at(votes, (cell.reshape(-1), np.where(label == IGNORE, len(NAMES), label)), 1)
    colours = [*pictures.palette(NAMES), pictures.NONE]
    low = batch.points[:n, 1:3].numpy().min(0)
    scale = 330 / np.ptp(batch.points[:n, 1:3].numpy(), axis=0).max()
    tile = Image.new("RGB", (340, 340), pictures.FLOOR)
    draw = ImageDraw.Draw(tile)
    for place, vote in zip(cells, votes, strict=True):
        x, y = 5 + ((place << level) - low) * scale
        side = max(2**level * scale - (level > 1), 1)
        draw.rectangle((x, y, x + side, y + side), colours[vote.argmax()])
    return tile


def drawn_map(voxels: Sequence[naive.Voxel], found: Sequence[naive.Pairs]) -> str:
    """For each of four outputs, the 3x3 cells around it at its own x: which input is met, and
    under which offset."""

    def text(x: int, y: int, words: str, kind: str) -> str:
        return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'

    parts = []
    for row, (_, x, y, z) in enumerate(voxels):
        left = 24 + row * 214
        parts.append(text(left + 94, 32, f"output {row} at ({x}, {y}, {z})", "bold"))
        for k, (dx, dy, dz) in enumerate(naive.CUBE_3):
            met = [i for i, o in found[k] if o == row]
            if dx:
                assert not met, "the four voxels meet at dx = 0 only"
                continue
            top, across = 48 + (1 - dy) * 64, left + (dz + 1) * 64
            fill = figures.FUSED if met and k == 13 else figures.LIDAR if met else "none"
            parts.append(
                f'<rect x="{across}" y="{top}" width="60" height="60" rx="5" fill="{fill}" '
                f'stroke="{figures.INK}" stroke-width="{1.5 if met else 0.4}"/>'
            )
            parts.append(text(across + 30, top + 18, f"k = {k}", "note"))
            if met:
                parts.append(text(across + 30, top + 44, f"row {met[0]}", "bold"))
    note = (
        "the cells around an output at dx = 0: dz to the right, dy up; "
        "filled: a voxel is there, so (its row, output row) is a pair of k"
    )
    style = (
        f"text{{font:15px system-ui,Helvetica,Arial,sans-serif;fill:{figures.INK};"
        f"text-anchor:middle}}.bold{{font-weight:700}}.note{{fill:{figures.FAINT};font-size:13px}}"
    )
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 280" width="880" height="280" '
        'role="img" aria-label="Which voxel meets which">'
    )
    card = f'<rect width="880" height="280" rx="12" fill="{figures.PAPER}"/>'
    end = text(440, 264, note, "note")
    return "\n".join([head, f"<style>{style}</style>", card, *parts, end, "</svg>\n"])


def drawn_slots(*orders: np.ndarray) -> Image.Image:
    """A row a block of 64 slots, a cell an offset: red where the block multiplies under it, the
    bluer the more of its slots have a pair there; dark where the block leaves the offset out."""
    tiles = {}
    for name, slots in zip(("in voxel order", "sorted by mask"), orders, strict=True):
        blocks = [slots[i : i + 64].mean(0) for i in range(0, len(slots), 64)]
        share = np.stack(blocks)[..., None]
        colours = [np.array(c) for c in (pictures.COLOURS["truck"], pictures.COLOURS["building"])]
        pixels = np.where(share > 0, colours[0] + share * (colours[1] - colours[0]), pictures.FLOOR)
        picture = Image.fromarray(pixels.astype(np.uint8))
        size = 14 * picture.width, 6 * picture.height
        tiles[name] = picture.resize(size, Image.Resampling.NEAREST)
    return figures.grid(tiles, 2)


def save(drawings: Mapping[str, Image.Image | str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        if isinstance(drawing, str):
            (folder / name).write_text(drawing)
        else:
            drawing.save(folder / name, quality=82, optimize=True)
