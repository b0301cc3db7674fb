"""Makes the figure and the pictures of these pages:

    python docs/figures.py RUN WORLD [--clip RUNS] [--weak RUN] [--terminal FOLDER]

RUN is a run folder of `ftd train` on day -> night; that of the README was made by

    ftd train --src day --tgt night --preset small --threads 1 --out RUN

WORLD is a folder in which six small street worlds are kept, written on first use. RUNS is the
folder of a comparison of clip-source-only and clip2uda on day -> night, RUN after --weak a run of
`weak`. --terminal trains for a minute or two, in a new folder. Without arguments only the figure
is made, which needs none of them.
"""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console, Group

import ftdpp
from ftdpp import files, inference, machine, pictures, runs, screen, systems, train
from ftdpp.data import CLASS_SETS, UNLABELLED, Frame
from ftdpp.index import Index, few_labels, original_frames, prepare
from ftdpp.readers import domains
from ftdpp.systems import clip2uda
from ftdpp.world import layouts

HERE = Path(__file__).resolve().parent
NAMES = CLASS_SETS["street6"]

# ---- the figure: what FtD++ consists of ----------------------------------------------------------

# A card of its own, so that it reads on a light and on a dark page.
PAPER, INK, FAINT = "#fbfaf7", "#22252b", "#5d626d"
CAMERA, LIDAR, FUSED, TEACHER, LOSS = "#cfe3f7", "#d5efd3", "#e5d9f5", "#ececec", "#fde2c4"
SIZE = (1000, 570)


def _box(x: int, y: int, w: int, h: int, fill: str, title: str, *lines: str) -> str:
    """A filled box with a bold title and lines below it."""
    middle, top = x + w / 2, y + h / 2 - 8.5 * len(lines) + 5
    out = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{INK}"/>'
    out += f'<text x="{middle}" y="{top}" class="title middle">{title}</text>'
    for i, line in enumerate(lines, 1):
        out += f'<text x="{middle}" y="{top + 17 * i}" class="middle">{line}</text>'
    return out


def _swatch(x: int, fill: str, text: str) -> str:
    """An entry of the legend."""
    square = f'<rect x="{x}" y="532" width="16" height="16" rx="3" fill="{fill}" stroke="{INK}"/>'
    return square + _note(x + 24, 545, text)


def _arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    """A line through the points with a head at the end; dashed where no gradient flows."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<polyline points="{path}" class="arrow"{dash}/>'


def _note(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" class="note">{text}</text>'


def figure() -> str:
    """The networks, what teaches what, and the paper's names, as an SVG."""
    parts = [
        # The student, from left to right.
        _box(30, 60, 120, 54, CAMERA, "image", "B × 3 × H × W"),
        _box(30, 236, 120, 54, LIDAR, "points", "N voxels"),
        _box(190, 60, 140, 54, CAMERA, "UNet2D", "ResNet-34"),
        _box(190, 236, 140, 54, LIDAR, "UNet3D", "sparse, 7 levels"),
        _box(400, 140, 150, 70, FUSED, "MFFM", "CBAM and external", "attention"),
        _box(640, 38, 150, 40, CAMERA, "mimicry head 2D"),
        _box(640, 108, 150, 54, FUSED, "main head 2D", "reads the fused, too"),
        _box(640, 206, 150, 40, LIDAR, "main head 3D"),
        _box(640, 276, 150, 40, LIDAR, "mimicry head 3D"),
        _arrow((150, 87), (190, 87)),
        _arrow((150, 263), (190, 263)),
        _arrow((330, 75), (590, 75), (590, 58), (640, 58)),
        _arrow((590, 75), (590, 125), (640, 125)),
        _arrow((330, 270), (590, 270), (590, 296), (640, 296)),
        _arrow((590, 270), (590, 226), (640, 226)),
        _arrow((330, 100), (365, 100), (365, 160), (400, 160), dashed=True),
        _arrow((330, 250), (365, 250), (365, 190), (400, 190), dashed=True),
        _arrow((550, 175), (612, 175), (612, 147), (640, 147)),
        _note(372, 66, "features at each point's pixel"),
        _arrow((790, 135), (822, 135), (822, 296), (790, 296), dashed=True),
        _arrow((790, 226), (806, 226), (806, 58), (790, 58), dashed=True),
        # The losses on the student.
        _box(850, 38, 124, 62, LOSS, "MPD", "mimicry heads", "follow main heads"),
        _box(850, 130, 124, 62, LOSS, "cross-entropy", "source labels,", "main heads"),
        _box(850, 222, 124, 94, LOSS, "xDPL", "pseudo-labels of", "the target, in the",
             "second stage,", "times exp(−KL)"),
        # The teacher.
        _box(30, 410, 120, 80, LOSS, "MMST", "source batch", "in the target's", "style"),
        _box(190, 410, 360, 80, TEACHER, "teacher", "the same networks; its weights are a moving",
             "average (EMA) of the student's"),
        _box(640, 410, 150, 80, TEACHER, "its main heads", "2D, 3D, and the",
             "softmax of their sum"),
        _box(850, 410, 124, 80, LOSS, "DPD", "student's main", "heads follow, on", "source points"),
        _arrow((90, 290), (90, 410), dashed=True),
        _note(100, 340, "image: FDA or mixup"),
        _note(100, 358, "points: density transfer"),
        _arrow((300, 290), (300, 410), dashed=True),
        _note(310, 349, "EMA after every step"),
        _arrow((150, 450), (190, 450)),
        _arrow((550, 450), (640, 450)),
        _arrow((790, 450), (850, 450), dashed=True),
        _note(30, 34, "student: a labelled batch of the source, an unlabelled one of the target"),
        # The legend.
        _swatch(30, CAMERA, "camera"),
        _swatch(124, LIDAR, "LiDAR"),
        _swatch(206, FUSED, "both"),
        _swatch(276, TEACHER, "teacher, no gradient"),
        _swatch(446, LOSS, "loss or style"),
        _arrow((566, 540), (606, 540)),
        _note(614, 545, "forward, gradient back"),
        _arrow((796, 540), (836, 540), dashed=True),
        _note(844, 545, "no gradient back"),
    ]  # fmt: skip
    style = (
        f"text{{font:13px system-ui,Helvetica,Arial,sans-serif;fill:{INK}}}"
        ".middle{text-anchor:middle}.title{font-weight:700;font-size:14px}"
        f".note{{fill:{FAINT};font-style:italic}}"
        f".arrow{{fill:none;stroke:{INK};stroke-width:1.4;marker-end:url(#head)}}"
    )
    width, height = SIZE
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="What FtD++ consists of">',
            f"<style>{style}</style><defs>{head}</defs>",
            f'<rect width="{width}" height="{height}" rx="14" fill="{PAPER}"/>',
            *parts,
            "</svg>\n",
        ]
    )


# ---- the pictures --------------------------------------------------------------------------------

# Domain -> the frame of its training split that is shown, and the class set of its labels.
SHOWN = {
    "usa": (1, "street6"),
    "singapore": (4, "street6"),
    "day": (1, "street6"),
    "night": (4, "street6"),
    "vkitti": (1, "vkitti6"),
    "a2d2": (2, "a2d2_10"),
    "skitti": (4, "skitti19"),
    "gta5": (1, "cityscapes19"),
    "synthia": (2, "synthia16"),
    "cityscapes": (4, "cityscapes19"),
}
TILE, COLUMNS = (240, 135), 5  # width, height
NIGHT, LEARNED = 8, 40  # a frame of day -> night's test split; a frame of weak's training split
PANEL = (520, 292)
TESTED = (8, 60)  # frames of the target's test split: beside its labels, and with errors


def save(picture: Image.Image, name: str) -> None:
    """As JPEG below 200 KB, beside this file."""
    for quality in (90, 80, 70):
        picture.save(HERE / name, "JPEG", quality=quality, optimize=True)
        if (HERE / name).stat().st_size < 200_000:
            return
    raise RuntimeError(f"{name} is larger than 200 KB at quality 70; make it smaller")


def labels_picture(frame: Frame, names: tuple[str, ...]) -> Image.Image:
    """Pixels in the colours of their classes; of a LiDAR, the points where the camera sees them."""
    table = np.full((256, 3), pictures.NONE, np.uint8)
    table[: len(names)] = pictures.palette(names)
    if frame.pixel is None:
        return Image.fromarray(table[frame.label])
    height, width = frame.image.shape[:2]
    out = Image.new("RGB", (width, height), pictures.FLOOR)
    draw, radius = ImageDraw.Draw(out), height / 95
    for (row, col), label in zip(frame.pixel, frame.label, strict=True):
        box = (col - radius, row - radius, col + radius, row + radius)
        draw.ellipse(box, tuple(table[label].tolist()))
    return out


def world(folder: Path) -> Image.Image:
    """Ten domains: the camera image, below it the labels of its points or pixels."""
    tiles: dict[str, tuple[Image.Image, Image.Image]] = {}
    for pair in layouts.PAIRS:
        root = folder / "-".join(pair)
        if not root.exists():
            frames = {"source": 8, "target": 8, "val": 1, "test": 1}
            counts = {part: frames[part] for part in layouts.DEFAULT_FRAMES[pair]}
            layouts.write_world(root, *pair, counts, workers=1)
        for name, home in zip(pair, layouts.roots(root, *pair), strict=True):
            number, classes = SHOWN[name]
            index = prepare(home, domains()[name], "train", classes, None, folder / "cache")
            frame = index.frame(number)
            both = Image.fromarray(frame.image), labels_picture(frame, CLASS_SETS[classes])
            first, second = (ImageOps.fit(p, TILE, Image.Resampling.LANCZOS) for p in both)
            tiles[name] = first, second
    (width, height), gap, font = TILE, 6, ImageFont.load_default(size=17)
    across, down = width + gap, 2 * height + 3 * gap
    size = (COLUMNS * across - gap, len(tiles) // COLUMNS * down - 2 * gap)
    out = Image.new("RGB", size, pictures.BACKGROUND)
    draw = ImageDraw.Draw(out)
    for i, name in enumerate(SHOWN):
        x, y = i % COLUMNS * across, i // COLUMNS * down
        for k, tile in enumerate(tiles[name]):
            out.paste(tile, (x, y + k * (height + gap)))
        draw.text(
            (x + 10, y + 6), name, pictures.INK, font, stroke_width=2, stroke_fill=pictures.DARK
        )
    return out


def predictions(run: Path) -> tuple[Image.Image, Image.Image]:
    """A prediction beside the truth, and on another frame where it is wrong."""
    system, index = opened(run, "test")
    domain = index.identity["domain"]
    pages = []
    for i, shown in zip(TESTED, (slice(0, 2), slice(2, 3)), strict=True):
        [label] = inference.predict_frames(system, index, range(i, i + 1))
        [frame] = original_frames(index, [i])
        title = f"{domain} test: {system.recipe.method}, {system.recipe.steps} iterations"
        pages.append(
            pictures.page(frame, pictures.panels_of(frame, label)[shown], NAMES, title, 1280)
        )
    return pages[0], pages[1]


def grid(tiles: dict[str, Image.Image], columns: int) -> Image.Image:
    """Pictures of one size with their names, row by row."""
    (width, height), gap, font = next(iter(tiles.values())).size, 6, ImageFont.load_default(size=17)
    rows = -(-len(tiles) // columns)
    size = columns * (width + gap) - gap, rows * (height + gap) - gap
    out = Image.new("RGB", size, pictures.BACKGROUND)
    draw = ImageDraw.Draw(out)
    for i, (name, tile) in enumerate(tiles.items()):
        x, y = i % columns * (width + gap), i // columns * (height + gap)
        out.paste(tile, (x, y))
        draw.text(
            (x + 10, y + 6), name, pictures.INK, font, stroke_width=2, stroke_fill=pictures.DARK
        )
    return out


def opened(run: Path, split: str) -> tuple[Any, Index]:
    """The system of a run, and the index of a split of its target."""
    record = runs.read_record(run)
    assert record is not None, f"{run}: there is no run.json"
    system = ftdpp.load(run)
    target = runs.recorded_places(record).origins["tgt"]
    return system, target.index(split, system.recipe, Path(record["cache"]))


def drawn(frame: Frame, label: np.ndarray) -> Image.Image:
    """Labels of a frame's points, where the camera sees them."""
    return labels_picture(replace(frame, label=label), NAMES).resize(PANEL)


def clip_picture(folder: Path) -> Image.Image:
    """A night: what CLIP knows, what it learns on days, what it learns with nights, the truth."""
    source, index = opened(folder / "day-night-clip-source-only-seed0", "test")
    adapted, _ = opened(folder / "day-night-clip2uda-seed0", "test")
    alone = clip2uda.ZeroShot(source.recipe, source.clip)
    [frame] = original_frames(index, [NIGHT])
    tiles = {"night": Image.fromarray(frame.image).resize(PANEL)}
    shown = {"CLIP alone": alone, "source only": source, "CLIP2UDA": adapted}
    for name, system in shown.items():
        [label] = inference.predict_frames(system.eval(), index, range(NIGHT, NIGHT + 1))
        tiles[name] = drawn(frame, label)
    tiles["truth"] = drawn(frame, frame.label)
    return grid(tiles, 2)


def weak_picture(run: Path) -> Image.Image:
    """A frame of training: its few labels, what was learned, the truth that nobody saw."""
    system, whole = opened(run, "train")
    r = system.recipe
    few = few_labels(whole, r.labelled, r.mask_seed, r.balanced)
    [frame] = original_frames(whole, [LEARNED])
    [label] = inference.predict_frames(system, whole, range(LEARNED, LEARNED + 1))
    given = few.frame(LEARNED).label
    image, colours = Image.fromarray(frame.image).resize(PANEL), pictures.palette(NAMES)
    draw, scale = ImageDraw.Draw(image), PANEL[1] / frame.image.shape[0]
    assert frame.pixel is not None
    for i in np.flatnonzero(given != UNLABELLED):
        row, col = frame.pixel[i] * scale
        draw.ellipse((col - 7, row - 7, col + 7, row + 7), colours[given[i]], pictures.INK, 2)
    count = int((given != UNLABELLED).sum())
    tiles = {f"{count} labels": image, "prediction": drawn(frame, label)}
    return grid(tiles | {"truth": drawn(frame, frame.label)}, 3)


# ---- the terminal --------------------------------------------------------------------------------

STEPS, SEEN = 64, 52  # iterations of the run, and the one at which the picture is taken


def terminal(folder: Path) -> str:
    """What a terminal shows in the midst of a training on the built-in world, as SVG.

    The run is real: so are losses, times, memory and validations.
    """
    cache, out = files.cache_home(), folder / "run"
    src, tgt = layouts.built_in("usa", "singapore", cache, 1)
    chosen = (f"steps={STEPS}", f"milestones={SEEN}", f"val_every={STEPS // 4}")
    r = systems.recipe("usa-singapore", "ftdpp", "small", overrides=chosen)
    origins = {
        "src": runs.Origin("usa", src),
        "tgt": runs.Origin("singapore", tgt),
        "val": runs.Origin("singapore", tgt),
    }
    run, _ = runs.assemble(r, 0, out, runs.Places(origins, cache, True))
    shown = {"force_terminal": True, "highlight": False, "file": io.StringIO()}
    console = Console(width=112, record=True, **shown)
    console.print(f"$ ftd train --src usa --tgt singapore --steps {STEPS}")
    display, best = screen.Display(console, runs.work_left(run)), 0.0
    for event in train.fit(run):
        if isinstance(event, train.Step):
            memory = machine.peak_memory(run.device)
            display.step("ftdpp", event, r.steps, run.system.cost(r), memory)
        else:
            score = event.miou[run.system.heads[-1]]
            display.validated("ftdpp", event, score > best, float(event.frames))
            best = max(best, score)
        if isinstance(event, train.Step) and event.iteration == SEEN:
            break
    console.print(Group(*display.live.get_renderables()))
    text = console.export_svg(title="ftd train")
    return re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.S)  # nothing from elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("world", nargs="?", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--weak", type=Path)
    parser.add_argument("--terminal", type=Path)
    args = parser.parse_args()
    (HERE / "ftdpp.svg").write_text(figure())
    if args.run is not None:
        for name, picture in zip(("prediction", "overlay"), predictions(args.run), strict=True):
            save(picture, f"{name}.jpg")
    if args.world is not None:
        save(world(args.world), "world.jpg")
    if args.clip is not None:
        save(clip_picture(args.clip), "clip2uda.jpg")
    if args.weak is not None:
        save(weak_picture(args.weak), "weak.jpg")
    if args.terminal is not None:
        (HERE / "terminal.svg").write_text(terminal(args.terminal))


if __name__ == "__main__":
    main()
