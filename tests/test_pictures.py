"""Pictures in substance: the right colours at the right places, and words that can be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftdpp import pictures
from ftdpp.data import CLASS_SETS, UNLABELLED, Frame
from ftdpp.pictures import Colour, Panel

NAMES = CLASS_SETS["street6"]
HEIGHT, WIDTH = 90, 160
FAR = 1000.0  # metres: beyond the view from above
# Six points far from each other, (row, col).
PLACES = np.array([(15, 20), (15, 80), (15, 140), (75, 20), (75, 80), (75, 140)], np.int16)


def a_frame(
    label: Sequence[int], xyz: np.ndarray | None = None, width: int = WIDTH, has_label: bool = True
) -> Frame:
    """A grey image with six points, which the view from above does not show by default."""
    if xyz is None:
        xyz = np.tile(np.array([FAR, 0, 0], np.float32), (6, 1))
    return Frame(
        token="scene/0001",
        xyz=xyz,
        pixel=PLACES[: len(xyz)],
        label=np.array(label, np.uint8),
        has_label=has_label,
        image=np.full((HEIGHT, width, 3), 90, np.uint8),
    )


def painted(picture: Image.Image, colour: Colour) -> np.ndarray:
    """(row, col) of the pixels of exactly this colour, above the legend."""
    found = np.argwhere((np.asarray(picture) == colour).all(2))
    return found[found[:, 0] < legend_top(picture)]


def legend_top(picture: Image.Image) -> int:
    """The legend lies below the last row of the view from above, which has a colour of its own."""
    floor = np.argwhere((np.asarray(picture) == pictures.FLOOR).all(2))
    return int(floor[:, 0].max()) + 1


def clusters(places: np.ndarray) -> np.ndarray:
    """Middles (row, col) of groups of neighbouring pixels, in reading order."""
    groups: list[list[np.ndarray]] = []
    for place in places:
        near = [g for g in groups if min(np.abs(place - p).max() for p in g) <= 3]
        merged = [place, *itertools.chain.from_iterable(near)]
        groups = [g for g in groups if not any(g is n for n in near)] + [merged]
    middles = [np.mean(group, 0) for group in groups]
    return np.array(sorted(middles, key=lambda m: (round(m[0] / 20), m[1]))).reshape(-1, 2)


# ---- colours -------------------------------------------------------------------------------------

TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
# Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision
# deficiency, 2009; severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}


def linear(colours: Sequence[Colour]) -> np.ndarray:
    c = np.array(colours) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(colours: Sequence[Colour], vision: str) -> np.ndarray:
    """CIELAB as seen: differences of 2 can just be noticed side by side."""
    seen = np.clip(linear(colours) @ VISION[vision].T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(1)
    f = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("vision", list(VISION))
@pytest.mark.parametrize("classes", list(CLASS_SETS))
def test_classes_can_be_told_apart(classes: str, vision: str) -> None:
    colours = pictures.palette(CLASS_SETS[classes])
    seen = lab(colours, vision)
    few = len(colours) <= 11  # of nineteen no two are as far apart
    apart = 30 if few and vision == "normal" else 20 if few or vision == "normal" else 10
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        names = CLASS_SETS[classes]
        assert math.dist(a, b) > apart, (names[i], names[j])
    others = lab([pictures.NONE, pictures.FLOOR], vision)
    for name, a in zip(CLASS_SETS[classes], seen, strict=True):
        assert min(math.dist(a, other) for other in others) > 15, name
    right, wrong = lab([pictures.RIGHT, pictures.WRONG], vision)
    assert math.dist(right, wrong) > 40


def test_colours_are_bright_enough() -> None:
    """Three times the luminance of the ground that they stand on, as for icons on a page."""
    luminance = linear([*pictures.COLOURS.values(), pictures.INK, pictures.NONE]) @ TO_XYZ[1]
    ground = float(linear([pictures.FLOOR])[0] @ TO_XYZ[1])
    assert ((luminance + 0.05) / (ground + 0.05)).min() > 3


def test_a_colour_for_every_class() -> None:
    """Known names keep theirs in every set; others get one, and no two classes share one."""
    names = [f"class {i}" for i in range(20)] + ["car", "vehicle", "road"]
    colours = pictures.palette(names)
    assert len(set(colours)) == len(names)
    assert colours[20] == pictures.COLOURS["car"]
    assert colours[22] == pictures.COLOURS["road"]
    assert pictures.NONE not in colours
    for known in CLASS_SETS.values():
        roles = [pictures.SAME.get(name, name) for name in known]
        assert pictures.palette(known) == [pictures.COLOURS[role] for role in roles]


# ---- points over the photo -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [640, 1000])
def test_points_have_the_colours_of_their_classes(width: int) -> None:
    frame = a_frame([0, 1, 2, 3, 4, 5])
    picture = pictures.page(frame, [Panel("labels", frame.label)], NAMES, "title", width)
    assert picture.width == width
    middles = []
    for colour in pictures.palette(NAMES):
        [middle] = clusters(painted(picture, colour))
        middles.append(middle)
    found = np.array(middles)
    scale = (found[5] - found[0]) / (PLACES[5] - PLACES[0])
    assert scale[0] == pytest.approx(scale[1], rel=0.02), "the image keeps its shape"
    assert np.abs(found - found[0] - scale * (PLACES - PLACES[0])).max() < 1.5
    # and the corner of the photo is where the first point says that it is
    corner = found[0] - scale * (PLACES[0] + 0.5)
    assert corner[1] == pytest.approx(pictures.GAP, abs=1.5)


def test_points_grow_with_the_page() -> None:
    frame = a_frame([0] * 6)
    areas = []
    for width in (600, 1200):
        picture = pictures.page(frame, [Panel("labels", frame.label)], NAMES, "", width)
        areas.append(len(painted(picture, pictures.palette(NAMES)[0])))
    assert areas[1] > 3 * areas[0] > 0


def test_points_without_a_label_are_grey() -> None:
    frame = a_frame([0, UNLABELLED, UNLABELLED, UNLABELLED, UNLABELLED, 0])
    picture = pictures.page(frame, [Panel("kept", frame.label)], NAMES, "", 1600)
    assert len(clusters(painted(picture, pictures.palette(NAMES)[0]))) == 2
    assert len(clusters(painted(picture, pictures.NONE))) == 4


def test_near_points_cover_far_ones() -> None:
    xyz = np.array([[FAR, 0, 0], [2 * FAR, 0, 0]], np.float32)
    for near in (0, 1):
        frame = a_frame([0, 1], xyz[[near, 1 - near]])
        frame.pixel = PLACES[[0, 0]]
        picture = pictures.page(frame, [Panel("labels", frame.label)], NAMES, "", 1000)
        shown = [len(painted(picture, colour)) > 0 for colour in pictures.palette(NAMES)[:2]]
        assert shown == [near == 0, near == 1]


def test_errors_are_exactly_the_wrong_points() -> None:
    """Right, wrong, right, without a truth, without a prediction, wrong."""
    truth = [0, 1, 2, UNLABELLED, 4, 5]
    prediction = np.array([0, 2, 2, 3, UNLABELLED, 0], np.uint8)
    frame = a_frame(truth)
    where = pictures.page(frame, [Panel("all", np.zeros(6, np.uint8))], NAMES, "", 1600)
    expected = clusters(painted(where, pictures.palette(NAMES)[0]))
    assert len(expected) == 6

    panel = Panel("error", prediction, frame.label)
    picture = pictures.page(frame, [panel], NAMES, "", 1600)
    wrong = clusters(painted(picture, pictures.WRONG))
    assert np.abs(wrong - expected[[1, 5]]).max() < 1
    assert len(clusters(painted(picture, pictures.RIGHT))) == 2
    for colour in (*pictures.palette(NAMES), pictures.NONE):
        assert len(painted(picture, colour)) == 0
    assert panel.note() == "error: 50.0% of 4 labelled points wrong"
    # wrong ones have a white rim
    row, col = wrong[0].round().astype(int)
    around = np.asarray(picture)[row - 12 : row + 13, col - 12 : col + 13].astype(int)
    assert (around.min(2) > 150).any()


def test_panels() -> None:
    prediction = np.zeros(6, np.uint8)
    names = [p.name for p in pictures.panels_of(a_frame([0] * 6), prediction)]
    assert names == ["prediction", "truth", "error"]
    [only] = pictures.panels_of(
        a_frame([UNLABELLED] * 6, has_label=False), prediction, "kept labels"
    )
    assert only.name == "kept labels"
    assert only.note() == "kept labels: 6 points"
    some = np.array([0, 1, 2, UNLABELLED, UNLABELLED, UNLABELLED], np.uint8)
    assert Panel("kept", some).note() == "kept: 3 of 6 points"
    nothing = np.full(6, UNLABELLED, np.uint8)
    assert Panel("error", nothing, prediction).note() == "error: 0 labelled points wrong"


@pytest.mark.parametrize(("image", "below"), [(WIDTH, False), (300, True)])
def test_panels_stand_beside_each_other_or_below(image: int, below: bool) -> None:
    """Very wide images below each other; each photo shows its own labels."""
    frame = a_frame([0] * 6, width=image)
    panels = [Panel(str(c), np.full(6, c, np.uint8)) for c in range(3)]
    picture = pictures.page(frame, panels, NAMES, "", 1200)
    middles = [painted(picture, colour).mean(0) for colour in pictures.palette(NAMES)[:3]]
    for a, b in itertools.pairwise(middles):
        step = b - a
        assert (step[0] > 100) == below
        assert (step[1] > 100) == (not below)


def test_a_frame_without_points() -> None:
    frame = a_frame([], np.empty((0, 3), np.float32))
    picture = pictures.page(frame, pictures.panels_of(frame, frame.label), NAMES, "", 600)
    assert picture.width == 600


# ---- the view from above -------------------------------------------------------------------------


def wedge(forward: np.ndarray) -> np.ndarray:
    """Points left and right at 5 m, and two 10 m apart straight ahead of a camera."""
    left = np.array([-forward[1], forward[0]])
    flat = [5 * forward + 3 * left, 5 * forward - 3 * left, 6 * forward, 16 * forward]
    return np.column_stack([flat, np.zeros(4)]).astype(np.float32)


def from_above(picture: Image.Image, colour: Colour) -> np.ndarray:
    """(row, col) of the only point of this colour in the view, which is right of the photo."""
    pixels = painted(picture, colour)
    [place] = clusters(pixels[pixels[:, 1] > 0.64 * picture.width])
    return place


def test_from_above() -> None:
    """Ahead is up, left is left, and the scale bar is as long as it says."""
    frame = a_frame([0, 1, 2, 3], wedge(np.array([1.0, 0.0])))
    frame.pixel = np.zeros((4, 2), np.int16)  # all in a corner of the photo
    picture = pictures.page(frame, [Panel("labels", frame.label)], NAMES, "", 1200)
    places = []
    for colour in pictures.palette(NAMES)[:4]:
        places.append(from_above(picture, colour))
    left, right, near, far = places
    assert left[1] < near[1] < right[1]
    assert near[1] == pytest.approx((left[1] + right[1]) / 2, abs=1.5)
    assert near[1] == pytest.approx(far[1], abs=1.5)
    assert far[0] < near[0] < left[0]
    ten_metres = near[0] - far[0]
    assert longest_run(picture, pictures.INK) == pytest.approx(ten_metres / 2, abs=4), "5 m"
    assert right[1] - left[1] == pytest.approx(0.6 * ten_metres, abs=3)


def longest_run(picture: Image.Image, colour: Colour) -> int:
    """Pixels of the longest horizontal line of a colour."""
    rows = (np.asarray(picture) == colour).all(2)
    longest = 0
    for row in rows:
        for painted_, run in itertools.groupby(row):
            if painted_:
                longest = max(longest, sum(1 for _ in run))
    return longest


def test_the_view_turns_with_the_camera() -> None:
    """nuScenes' LiDAR looks along y, KITTI's along x: the same street gives the same picture."""
    drawn = []
    for forward in ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.6, -0.8)):
        frame = a_frame([0, 1, 2, 3], wedge(np.array(forward)))
        frame.pixel = np.zeros((4, 2), np.int16)
        drawn.append(pictures.page(frame, [Panel("labels", frame.label)], NAMES, "", 800))
    for colour in pictures.palette(NAMES)[:4]:
        first, *others = (from_above(picture, colour) for picture in drawn)
        for other in others:
            assert other == pytest.approx(first, abs=1)


# ---- words ---------------------------------------------------------------------------------------


def legend_of(names: Sequence[str], width: int, error: bool = False) -> np.ndarray:
    frame = a_frame([0] * 6)
    truth = frame.label if error else None
    picture = pictures.page(frame, [Panel("x", frame.label, truth)], names, "", width)
    return np.asarray(picture)[legend_top(picture) :]


@pytest.mark.parametrize("width", [400, 1200, 1920])
@pytest.mark.parametrize("classes", list(CLASS_SETS))
def test_the_legend_has_every_class(
    classes: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = CLASS_SETS[classes]
    legend = legend_of(names, width, error=True)
    size = max(width // 80, 10)
    discs = []
    for colour in [*pictures.palette(names), pictures.NONE, pictures.RIGHT, pictures.WRONG]:
        pixels = np.argwhere((legend == colour).all(2))
        [disc] = clusters(pixels)
        discs.append(disc)
        assert disc[1] < width - 2 * size
    lines = [round(row / (size + pictures.GAP)) for row, _ in discs]
    for (a, line), (b, following) in itertools.pairwise(zip(discs, lines, strict=True)):
        assert (line, a[1]) < (following, b[1]), "in reading order"
    # each with its name beside it: another name changes the picture there and only there
    other = names[0][::-1]
    monkeypatch.setitem(
        pictures.SAME, other, pictures.SAME.get(names[0], names[0])
    )  # of one colour
    changed = legend_of((other, *names[1:]), width, error=True)
    rows, cols = np.nonzero((legend != changed).any(2))
    assert rows.max() < discs[0][0] + size
    assert discs[0][1] < cols.min()
    # nothing is cut at its right end
    assert (legend[:, -pictures.GAP - 1 :] == pictures.BACKGROUND).all()


def test_words_of_the_error_panel_only_where_there_is_one() -> None:
    legend = legend_of(NAMES, 1200)
    assert not (legend == pictures.WRONG).all(2).any()
    assert (legend == pictures.NONE).all(2).any()


def test_a_long_title_goes_on_below() -> None:
    frame = a_frame([0] * 6)
    panels = [Panel("labels", frame.label)]
    short = pictures.page(frame, panels, NAMES, "short", 600)
    for title in ("several words " * 12, "x" * 200):
        long = pictures.page(frame, panels, NAMES, title, 600)
        assert long.height > short.height
        assert (np.asarray(long)[:, -pictures.GAP // 2 :] == pictures.BACKGROUND).all()


# ---- files ---------------------------------------------------------------------------------------

TOKENS = ["00/000001", "00_000001", "..", "../../etc/passwd", "", "a\0b", "x" * 400, "x" * 401,
          ".hidden", "a b", "ä", "\udc80", "n015-2018__CAM.jpg", "C:\\x"]  # fmt: skip


def test_file_names_are_safe() -> None:
    names = [pictures.file_name(token) for token in TOKENS]
    assert len(set(names)) == len(TOKENS)
    for name in names:
        assert 0 < len(name) < 120
        assert name.isascii()
        assert not name.startswith(".")
        assert not set(name) & set("/\\\0: ")
    assert pictures.file_name("n015-2018__CAM.jpg") == "n015-2018__CAM.jpg", "kept where it can be"
    assert pictures.file_name("00/000001").startswith("00_000001-")


def test_write_overlays(tmp_path: Path) -> None:
    frames = [a_frame([0, 1, 2, 3, 4, 5]), a_frame([UNLABELLED] * 6, has_label=False)]
    frames[0].token, frames[1].token = "../escape", "b"
    predictions = [np.array([0, 1, 2, 3, 4, 0], np.uint8), np.full(6, 2, np.uint8)]
    folder = tmp_path / "pictures"
    pairs = zip(frames, predictions, strict=True)
    written = pictures.write_overlays(folder, pairs, NAMES, "ftdpp")
    assert sorted(written) == sorted(folder.iterdir())
    assert not (tmp_path / "escape.png").exists()
    errors, plain = (Image.open(path).convert("RGB") for path in written)
    assert len(clusters(painted(errors, pictures.WRONG))) == 1
    assert len(painted(plain, pictures.WRONG)) == 0
    assert len(clusters(painted(plain, pictures.palette(NAMES)[2]))) == 6
