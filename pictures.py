"""Pictures of what a model sees: points coloured by class over the photo, and from above."""

from __future__ import annotations

import errno
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ftdpp.data import UNLABELLED, Frame
from ftdpp.files import replacing

Colour = tuple[int, int, int]

# The colours of classes, chosen by a search for the largest distance between any two of one class
# set, seen with normal vision and by the red- and green-blind (tests/test_pictures.py).
COLOURS: dict[str, Colour] = {
    "car": (229, 133, 77),
    "truck": (174, 61, 56),
    "bike": (137, 245, 157),
    "person": (225, 164, 12),
    "road": (114, 89, 218),
    "parking": (189, 49, 158),
    "sidewalk": (247, 200, 231),
    "terrain": (181, 224, 10),
    "building": (6, 159, 219),
    "vegetation": (112, 169, 131),
    "object": (255, 254, 100),
    "bus": (61, 122, 211),
    "train": (0, 117, 153),
    "motorcycle": (64, 71, 232),
    "rider": (253, 50, 83),
    "fence": (186, 168, 119),
    "wall": (148, 117, 187),
    "pole": (203, 205, 200),
    "traffic_light": (228, 201, 69),
    "traffic_sign": (249, 245, 62),
    "sky": (149, 215, 255),
}
# Names that other class sets have for the same thing, or for one that is rare and never beside it.
SAME = {
    "vehicle": "car",
    "driveable_surface": "road",
    "manmade": "building",
    "nature": "vegetation",
    "vegetation_terrain": "vegetation",
    "other-objects": "object",
    "bicycle": "bike",
    "pedestrian": "person",
    "bicyclist": "rider",
    "traffic-sign": "traffic_sign",
    "barrier": "fence",
    "traffic_cone": "traffic_sign",
    "construction_vehicle": "train",
    "trailer": "wall",
    "other_flat": "parking",
    "other-ground": "wall",
    "other-vehicle": "bus",
    "motorcyclist": "train",
    "trunk": "traffic_light",
}
NONE: Colour = (125, 125, 125)  # a point without a label
RIGHT: Colour = (165, 165, 165)
WRONG: Colour = (240, 40, 40)
BACKGROUND: Colour = (24, 24, 28)
FLOOR: Colour = (12, 12, 15)  # of the view from above
RING: Colour = (48, 48, 54)
INK: Colour = (232, 232, 232)
DARK: Colour = (10, 10, 10)  # rim of a point
PHOTO = 0.4  # how much of the photo's own colour is kept

GAP = 12  # pixels between the parts of a page
RIMMED = 5  # radius of a point, before reduction, from which a rim leaves it its colour
OVERSAMPLING = 2  # points are drawn larger and reduced, which smooths their edges
WIDE = 2.4  # images wider than this, in heights, stand below each other


def palette(names: Sequence[str]) -> list[Colour]:
    """One colour a class, in the order of the names. A name that is not known takes a free one."""
    found: list[Colour | None] = []
    for name in names:
        colour = COLOURS.get(SAME.get(name, name))
        found.append(colour if colour not in found else None)
    free = [colour for colour in COLOURS.values() if colour not in found]
    darker = [(r * k // 4, g * k // 4, b * k // 4) for k in (3, 2) for r, g, b in COLOURS.values()]
    spare = itertools.cycle([*free, *darker])  # shades, where there are more classes than colours
    return [colour or next(spare) for colour in found]


@dataclass
class Panel:
    """What one part of a page shows: the class of each point, or which points are wrong."""

    name: str
    label: np.ndarray  # (M,) u8, 255 = none
    truth: np.ndarray | None = None  # (M,) u8; with it, the panel shows where label differs

    def errors(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the points that have a label and a truth: which are right, which wrong; (M,) masks."""
        assert self.truth is not None
        both = (self.label != UNLABELLED) & (self.truth != UNLABELLED)
        return both & (self.label == self.truth), both & (self.label != self.truth)

    def note(self) -> str:
        """What stands above it."""
        if self.truth is not None:
            right, wrong = (int(mask.sum()) for mask in self.errors())
            share = f"{wrong / (right + wrong):.1%} of " if right + wrong else ""
            return f"{self.name}: {share}{right + wrong:,} labelled points wrong"
        labelled = int((self.label != UNLABELLED).sum())
        among = f" of {len(self.label):,}" if labelled < len(self.label) else ""
        return f"{self.name}: {labelled:,}{among} points"


def panels_of(frame: Frame, prediction: np.ndarray, what: str = "prediction") -> list[Panel]:
    """The prediction, and where the frame has labels, the truth and the errors beside it."""
    panels = [Panel(what, prediction)]
    if frame.has_label:
        truth = frame.label.reshape(-1)
        panels += [Panel("truth", truth), Panel("error", prediction, truth)]
    return panels


def panels_of_heads(frame: Frame, labels: Mapping[str, np.ndarray]) -> list[Panel]:
    """One panel a head; where the frame has labels, the truth before and the errors of the last
    head behind them."""
    panels = [Panel(head.upper(), label) for head, label in labels.items()]
    if frame.has_label:
        truth = frame.label.reshape(-1)
        panels.insert(0, Panel("truth", truth))
        panels.append(Panel(f"error of {panels[-1].name}", panels[-1].label, truth))
    return panels


def full_width(frame: Frame, panels: int) -> int:
    """Width of a page whose photos have the frame's own size."""
    high, wide = frame.image.shape[:2]
    if frame.xyz is not None and wide > WIDE * high:  # the view from above stands beside it
        return wide + high + 3 * GAP
    columns = 1 if wide > WIDE * high else panels
    return columns * (wide + GAP) + GAP


MARK = b"Software\0ftd"  # in the first bytes of our PNG files


def _written_by_ftd() -> PngInfo:
    """The mark of our files, which may be replaced."""
    info = PngInfo()
    info.add_text("Software", "ftd")
    return info


def write_picture(path: Path, picture: Image.Image) -> None:
    """As the file's name says: .png, or .pdf of one page."""
    kind = "PDF" if path.suffix.lower() == ".pdf" else "PNG"
    with replacing(path) as temporary:
        more = {"resolution": 150.0} if kind == "PDF" else {"pnginfo": _written_by_ftd()}
        picture.save(temporary, kind, **more)


def page(
    frame: Frame, panels: Sequence[Panel], names: Sequence[str], title: str, width: int = 1920
) -> Image.Image:
    """Panels beside each other, each over the photo and from above, and one legend.

    Panels of very wide images stand below each other.

    Args:
        frame: best with the original image. names: of the classes. width: of the page, in pixels.
    """
    size = max(width // 80, 10)
    font, large = _font(size), _font(size * 5 // 4)
    line = size + GAP
    inner = width - 2 * GAP
    aspect = frame.image.shape[1] / frame.image.shape[0]
    columns = 1 if aspect > WIDE else len(panels)
    dense = frame.xyz is None
    if dense:  # no view from above
        across = (inner - GAP * (columns - 1)) // columns
        photo, above = (across, round(across / aspect)), (0, 0)
        down = line + photo[1] + GAP
    elif columns == 1:  # the view from above is a square to the right of the photo
        high = round((inner - GAP) / (aspect + 1))
        photo, above = (inner - GAP - high, high), (high, high)
        across, down = inner, line + high + GAP
    else:
        across = (inner - GAP * (columns - 1)) // columns
        photo, above = (across, round(across / aspect)), (across, round(across * 0.75))
        down = line + photo[1] + GAP + above[1] + GAP
    heading = _wrapped(title, large, inner)
    legend = _legend(_entries(panels, names), font, inner)
    top = GAP + (line + size // 4) * len(heading)
    bottom = top + down * (len(panels) // columns)

    out = Image.new("RGB", (width, bottom + legend.height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(out)
    for i, text in enumerate(heading):
        draw.text((GAP, GAP + i * (line + size // 4)), text, INK, large)
    colours = palette(names)
    for i, panel in enumerate(panels):
        x, y = GAP + (i % columns) * (across + GAP), top + (i // columns) * down
        draw.text((x, y), panel.note(), INK, font)
        marks = _marks(panel, colours)
        if frame.xyz is None:
            out.paste(_painted(frame, marks, photo), (x, y + line))
            continue
        out.paste(_photo(frame, marks, photo), (x, y + line))
        view = _from_above(frame.xyz)
        corner = (x + photo[0] + GAP, y + line) if columns == 1 else (x, y + line + photo[1] + GAP)
        out.paste(_view(frame, view, marks, above, font), corner)
    out.paste(legend, (GAP, bottom))
    return out


def panel_images(
    frame: Frame, panel: Panel, names: Sequence[str], width: int
) -> tuple[Image.Image, Image.Image | None]:
    """A panel over the photo and from above, without words; of pixels there is no second one."""
    marks = _marks(panel, palette(names))
    size = width, round(width * frame.image.shape[0] / frame.image.shape[1])
    if frame.xyz is None:
        return _painted(frame, marks, size), None
    above = width, round(0.75 * width)
    view = _view(frame, _from_above(frame.xyz), marks, above, _font(max(width // 36, 10)))
    return _photo(frame, marks, size), view


def write_overlays(
    folder: Path,
    frames: Iterable[tuple[Frame, np.ndarray]],
    names: Sequence[str],
    title: str,
    what: str = "prediction",
) -> list[Path]:
    """One page a frame, as PNG files named after the frames' tokens.

    Args:
        frames: each with the class of every row, (M,) u8, 255 = none.
        names: of the classes. title: of every page; the token is added.
        what: the classes are, "prediction" or "kept pseudo-labels".
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for frame, prediction in frames:
        path = folder / f"{file_name(frame.token)}.png"
        picture = page(frame, panels_of(frame, prediction, what), names, f"{title}, {frame.token}")
        if path.exists() and MARK not in path.read_bytes()[:4096]:
            raise FileExistsError(
                errno.EEXIST, "is there, and ftd did not write it; name another folder", str(path)
            )
        write_picture(path, picture)
        written.append(path)
    return written


def file_name(token: str) -> str:
    """A token as a file name: in no folder, not hidden, short, and no two tokens the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", token).lstrip(".")[:100]
    if plain and plain == token:
        return plain
    digest = hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
    return f"{plain or 'frame'}-{digest[:8]}"


# ---- points --------------------------------------------------------------------------------------


@dataclass
class _Marks:
    """How each of M points is drawn."""

    colour: np.ndarray  # (M, 3) u8
    size: np.ndarray  # (M,) in radii; 0 = not drawn
    layer: np.ndarray  # (M,) higher ones on top
    rim: np.ndarray  # (M,) bool: white, else dark


def _marks(panel: Panel, colours: Sequence[Colour]) -> _Marks:
    points = len(panel.label)
    if panel.truth is None:
        table = np.full((256, 3), NONE, np.uint8)
        table[: len(colours)] = colours
        labelled = panel.label != UNLABELLED
        return _Marks(
            table[panel.label], np.where(labelled, 1.0, 0.5), labelled, np.zeros(points, bool)
        )
    right, wrong = panel.errors()
    colour = np.where(wrong[:, None], WRONG, RIGHT).astype(np.uint8)
    return _Marks(colour, 0.6 * right + 1.25 * wrong, wrong, wrong)


def _dots(
    canvas: Image.Image, xy: np.ndarray, marks: _Marks, depth: np.ndarray, radius: float
) -> None:
    """Draw points at xy (M, 2), those of small depth on top."""
    draw = ImageDraw.Draw(canvas)
    for i in np.lexsort((-depth, marks.layer)):
        r = radius * marks.size[i]
        if r > 0:
            x, y = xy[i]
            rim = (INK if marks.rim[i] else DARK) if r >= RIMMED else None
            box = (x - r, y - r, x + r, y + r)
            draw.ellipse(box, tuple(marks.colour[i].tolist()), rim)


def _radius(canvas: Image.Image, points: int, least: float, most: float) -> float:
    """A quarter of the mean distance between neighbours, within bounds."""
    distance = (canvas.width * canvas.height / max(points, 1)) ** 0.5
    return min(max(distance / 4, least), most)


def _photo(frame: Frame, marks: _Marks, size: tuple[int, int]) -> Image.Image:
    """The camera image, pale, with its points; near ones cover far ones."""
    width, height = OVERSAMPLING * size[0], OVERSAMPLING * size[1]
    image = Image.fromarray(frame.image).resize((width, height), Image.Resampling.BICUBIC)
    grey = image.convert("L").point([round(0.8 * v) for v in range(256)]).convert("RGB")
    canvas = Image.blend(grey, image, PHOTO)
    assert frame.pixel is not None and frame.xyz is not None
    xy = (frame.pixel[:, ::-1] + 0.5) * np.array([width, height]) / frame.image.shape[1::-1]
    radius = _radius(canvas, len(xy), width / 900, width / 240)
    _dots(canvas, xy, marks, np.linalg.norm(frame.xyz, axis=1), radius)
    return canvas.resize(size, Image.Resampling.BOX)


def _painted(frame: Frame, marks: _Marks, size: tuple[int, int]) -> Image.Image:
    """The camera image in grey, each labelled pixel in the colour of its class."""
    shape = frame.image.shape[:2]
    grey = np.asarray(Image.fromarray(frame.image).convert("L"), np.float32)[..., None]
    share = np.where(marks.size.reshape(shape) >= 1, 0.65, 0.0)[..., None]
    mixed = share * marks.colour.reshape(*shape, 3) + (1 - share) * grey
    picture = Image.fromarray(mixed.astype(np.uint8))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _from_above(xyz: np.ndarray) -> np.ndarray:
    """Metres to the right and ahead, (M, 2), of points around the middle of the camera's view.

    The points of a front camera fill a wedge; its middle is the direction ahead.
    """
    angle = np.arctan2(xyz[:, 1], xyz[:, 0])
    middle = np.angle(np.exp(1j * angle).sum()) if len(xyz) else 0.0
    turned = np.angle(np.exp(1j * (angle - middle)))
    if len(xyz):
        turned -= (turned.min() + turned.max()) / 2
    distance = np.linalg.norm(xyz[:, :2], axis=1)
    return np.stack([-np.sin(turned) * distance, np.cos(turned) * distance], 1)


def _view(
    frame: Frame,
    view: np.ndarray,
    marks: _Marks,
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont,
) -> Image.Image:
    """Points from above, the LiDAR at the bottom looking up, rings around it and a scale bar."""
    assert frame.xyz is not None
    width, height = OVERSAMPLING * size[0], OVERSAMPLING * size[1]
    reach = float(np.clip(np.quantile(view[:, 1], 0.95), 20, 60)) if len(view) else 50.0
    scale = 0.94 * height / reach  # pixels a metre
    origin = np.array([width / 2, 0.97 * height])
    canvas = Image.new("RGB", (width, height), FLOOR)
    draw = ImageDraw.Draw(canvas)
    for metres in range(10, 200, 10):
        r, (x, y) = metres * scale, origin
        draw.ellipse((x - r, y - r, x + r, y + r), outline=RING, width=2)
    radius = _radius(canvas, len(view), width / 320, width / 200)
    _dots(canvas, origin + view * [scale, -scale], marks, -frame.xyz[:, 2], radius)
    r, (x, y) = 0.018 * height, origin
    draw.polygon([(x, y - 1.6 * r), (x - r, y + r), (x + r, y + r)], INK)
    canvas = canvas.resize(size, Image.Resampling.BOX)

    scale /= OVERSAMPLING
    metres = max((m for m in (1, 2, 5, 10, 20) if m * scale < size[0] / 4), default=1)
    bar = metres * scale
    right, foot = size[0] - GAP, size[1] - GAP
    draw = ImageDraw.Draw(canvas)
    draw.line((right - bar, foot, right, foot), INK, 3)
    for end in (right - bar, right):
        draw.line((end, foot - 5, end, foot + 5), INK, 3)
    draw.text((right - bar / 2, foot - 6), f"{metres} m", INK, font, anchor="mb")
    return canvas


# ---- words ---------------------------------------------------------------------------------------


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _entries(panels: Sequence[Panel], names: Sequence[str]) -> list[tuple[str, Colour, float]]:
    """Words of the legend, each with its colour and the size of its disc."""
    entries = [(name, colour, 1.0) for name, colour in zip(names, palette(names), strict=True)]
    entries.append(("no label", NONE, 0.5))
    if any(panel.truth is not None for panel in panels):
        entries += [("right", RIGHT, 0.6), ("wrong", WRONG, 1.0)]
    return entries


def _legend(
    entries: Sequence[tuple[str, Colour, float]], font: ImageFont.FreeTypeFont, width: int
) -> Image.Image:
    """A disc and a name for each entry, in as many lines as they need."""
    size = int(font.size)
    places, x, y = [], 0.0, 0
    for name, _, _ in entries:
        needed = size * 1.4 + font.getlength(name)
        if x and x + needed > width:
            x, y = 0.0, y + size + GAP
        places.append((x, y))
        x += needed + size
    out = Image.new("RGB", (width, y + size + GAP), BACKGROUND)
    draw = ImageDraw.Draw(out)
    for (name, colour, share), (x, y) in zip(entries, places, strict=True):
        middle, r = (x + size / 2, y + size * 0.6), share * size / 2
        box = (middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
        draw.ellipse(box, colour, INK if colour == WRONG else DARK, 2)
        draw.text((x + size * 1.4, y), name, INK, font)
    return out


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit; a word that is too long goes on below."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
