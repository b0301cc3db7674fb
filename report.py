"""Pictures of what a model sees: labels drawn over the camera image, and from above."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ftdpp.data import UNLABELLED, Frame

# One colour a class name, shared by all class sets where the names agree; readable on grey asphalt and for the colour-blind.
COLOURS = {
    "vehicle": (230, 75, 53),
    "driveable_surface": (150, 110, 200),
    "sidewalk": (240, 160, 200),
    "terrain": (190, 170, 60),
    "manmade": (80, 150, 230),
    "vegetation": (60, 170, 90),
    "vegetation_terrain": (60, 170, 90),
    "building": (80, 150, 230),
    "road": (150, 110, 200),
    "object": (245, 190, 65),
    "truck": (170, 50, 40),
    "car": (230, 75, 53),
    "bike": (90, 220, 220),
    "person": (250, 120, 30),
    "parking": (110, 80, 150),
    "nature": (60, 170, 90),
    "other-objects": (245, 190, 65),
}
IGNORED = (120, 120, 120)


def _colours(label: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(names)] = [COLOURS.get(n, IGNORED) for n in names]
    table[UNLABELLED] = IGNORED
    return table[label]


def overlay(frame: Frame, label: np.ndarray, names: tuple[str, ...], title: str = "", width: int = 1200) -> Image.Image:
    """The camera image with its points coloured by label, a view from above, and the legend.

    Args:
        frame: from a prepared index. label: (M,) u8 class of each of its points, 255 = none (grey).
        names: class names. title: a line of text. width: pixels of the camera image as drawn.
    """
    h, w = frame.image.shape[:2]
    scale = width / w
    height = round(h * scale)
    colour = _colours(label, names)
    camera = Image.fromarray(frame.image).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(camera)
    far_first = np.argsort(-np.linalg.norm(frame.xyz, axis=1))
    for i in far_first:
        r, c = (frame.pixel[i] + 0.5) * scale
        draw.ellipse((c - 2, r - 2, c + 2, r + 2), fill=tuple(colour[i]))

    above = Image.new("RGB", (height, height), (20, 20, 24))
    # The points of the front camera fill a wedge: look along its middle.
    forward = frame.xyz[:, :2].mean(0)
    forward = forward / max(np.linalg.norm(forward), 1e-6)
    ahead, left = frame.xyz[:, :2] @ forward, frame.xyz[:, :2] @ np.array([-forward[1], forward[0]])
    metres = 50.0
    col, row = (0.5 - left / metres) * height, (1 - ahead / metres) * height
    view = ImageDraw.Draw(above)
    for i in np.argsort(frame.xyz[:, 2]):
        if 0 <= row[i] < height and 0 <= col[i] < height:
            view.rectangle((col[i] - 1, row[i] - 1, col[i] + 1, row[i] + 1), fill=tuple(colour[i]))

    page = Image.new("RGB", (width + height, height + 28), (20, 20, 24))
    page.paste(camera, (0, 0))
    page.paste(above, (width, 0))
    legend, x = ImageDraw.Draw(page), 8
    for name in (*names, "ignored"):
        legend.rectangle((x, height + 8, x + 12, height + 20), fill=COLOURS.get(name, IGNORED))
        legend.text((x + 17, height + 8), name, fill=(230, 230, 230))
        x += 30 + 7 * len(name)
    legend.text((x + 10, height + 8), title, fill=(230, 230, 230))
    return page
