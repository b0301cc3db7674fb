"""Prints a table, reader by reader: what is written of the built-in world, and what is read of it.

    python docs/worlds.py FOLDER [FRAMES]

Writes worlds with FRAMES frames a part (2) below FOLDER, unless they are there. The index holds the
images at their own size.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ftdpp.data import CLASS_SETS, UNLABELLED, class_table
from ftdpp.index import prepare
from ftdpp.readers import Array, Domain, domains, list_frames, reader_of
from ftdpp.world import layouts
from ftdpp.world.rig import Shot

EDGE = 2  # pixels: labels are compared where the classes around a pixel are one
CLASSES = {  # the finest class set of each reader
    "nuscenes": "nuscenes16",
    "semantic_kitti": "skitti19",
    "virtual_kitti": "vkitti6",
    "a2d2": "a2d2_10",
    "gta5": "cityscapes19",
    "synthia": "synthia16",
    "cityscapes": "cityscapes19",
}


@dataclass
class Survey:
    """What a reader found in a world."""

    written: int = 0  # frames; Virtual KITTI's six weathers are one
    read: int = 0
    rows: int = 0  # points or pixels
    histogram: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # rows of each class
    ignored: int = 0
    compared: int = 0  # rows away from edges whose surface the camera sees
    equal: int = 0  # of these, rows with the label of the ray-cast pixel under them
    hidden: int = 0  # rows away from edges that lie behind what the camera sees, or before it


def flat(labels: Array) -> Array:
    """Mask (H, W) of pixels whose label is that of all pixels within EDGE."""
    padded = np.pad(labels, EDGE, "edge")
    height, width = labels.shape
    size = range(2 * EDGE + 1)
    around = [padded[i : i + height, j : j + width] == labels for i in size for j in size]
    mask: Array = np.all(around, 0)
    return mask


def survey(root: Path, shots: list[Shot], domain: Domain) -> Survey:
    """Reads every frame of a domain and casts its camera's rays again.

    root: of the data set. shots: those that were written into it.
    """
    layout, reader = layouts.LAYOUTS[domain.name], reader_of(domain)
    classes = CLASSES[reader.name]
    own = [shot for shot in shots if shot.world == domain.name]
    shot_of = {root / file: shot for shot in own for file in layout.files(shot)}
    out = Survey(written=len(own), histogram=np.zeros(len(CLASS_SETS[classes]), np.int64))
    for ref in list_frames(root, domain, None):
        raw = reader.read(ref)
        if raw.points is None:  # every pixel is a row
            assert raw.labels is not None
            shape = raw.labels.shape
            rows, row_col = np.arange(raw.labels.size), np.indices(shape).reshape(2, -1).T
            depth = np.zeros(shape) if raw.depth is None else raw.depth
            depth = depth.reshape(-1)
        else:
            rows, row_col, depth = reader.project(raw, ref)
        table = class_table(reader, classes, reader.categories(ref))
        assert raw.labels is not None
        label = table[raw.labels.reshape(-1)[rows]]
        counts = np.bincount(label, minlength=256)
        out.read += 1
        out.rows += len(rows)
        out.histogram += counts[: len(out.histogram)]
        out.ignored += int(counts[UNLABELLED])

        shot = shot_of[ref.image_path]
        picture = layout.look(shot, shot.scene())
        truth = table[layout.IDS[picture.label]]
        place = tuple(np.floor(row_col).astype(int).T)
        inside = flat(picture.label)[place] & (label != UNLABELLED)
        seen = np.abs(depth / picture.depth[place] - 1) < 0.1
        seen |= np.isinf(picture.depth[place]) | (depth == 0)  # nothing to compare
        out.hidden += int((inside & ~seen).sum())
        out.compared += int((inside & seen).sum())
        out.equal += int((inside & seen & (label == truth[place])).sum())
    return out


def main(folder: Path, frames: int) -> None:
    """Prints the table, as Markdown."""
    print(
        "| domain | frames written | read | rows a frame | equal label | hidden rows"
        " | index, MB a frame | s a frame | rows by class, % |\n" + "|---|" + "--:|" * 7 + "---|"
    )
    done: set[str] = set()
    for pair in layouts.PAIRS:
        counts = dict.fromkeys(layouts.DEFAULT_FRAMES[pair], frames)
        root = folder / "-".join(pair)
        if not root.exists():
            layouts.write_world(root, *pair, counts)
        shots = layouts.shots_of(*pair, counts, 0)
        for name, home in zip(pair, layouts.roots(root, *pair), strict=True):
            if name in done:
                continue
            done.add(name)
            domain = domains()[name]
            found, classes = survey(home, shots, domain), CLASSES[domain.reader]
            with TemporaryDirectory(dir=folder) as cache:
                start = time.perf_counter()
                index = prepare(home, domain, None, classes, None, cache)
                took = (time.perf_counter() - start) / found.read
                size = sum(file.stat().st_size for file in index.path.iterdir()) / found.read / 1e6
            shares = found.histogram / max(found.rows, 1)
            histogram = ", ".join(
                f"{label} {100 * share:.1f}"
                for label, share in zip(CLASS_SETS[classes], shares, strict=True)
            )
            print(
                f"| {name} | {found.written} | {found.read} | {found.rows / found.read:,.0f}"
                f" | {100 * found.equal / max(found.compared, 1):.2f} %"
                f" | {100 * found.hidden / max(found.rows, 1):.2f} % | {size:.2f} | {took:.3f}"
                f" | {histogram}, ignored {100 * found.ignored / max(found.rows, 1):.1f} |"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
