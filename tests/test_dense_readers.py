"""Dense readers: layouts, class maps, 16 bits, depth, damaged files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp import readers
from ftdpp.data import CLASS_SETS, class_table, common_class_sets
from ftdpp.index import read_frame
from ftdpp.readers import READERS, DataError, FrameRef, check, dense, list_frames
from ftdpp.readers.cityscapes import metres
from ftdpp.tests import dense_layouts
from ftdpp.tests.dense_layouts import (
    BASELINE,
    FOCAL,
    HEIGHT,
    WIDTH,
    chunk,
    ids,
    palette,
    png_16,
    u16,
    write_16,
)
from ftdpp.tests.layouts import picture, write

CITY, GTA, SYN = (readers.domains()[name] for name in ("cityscapes", "gta5", "synthia"))
WRITERS = {"cityscapes": dense_layouts.cityscapes, "gta5": dense_layouts.gta5} | {
    "synthia": dense_layouts.synthia
}


@pytest.fixture(params=list(WRITERS))
def refs(request: pytest.FixtureRequest, tmp_path: Path) -> list[FrameRef]:
    """The training frames of each data set in turn."""
    root = WRITERS[request.param](tmp_path / request.param)
    return list_frames(root, readers.domains()[request.param], "train")


def read(ref: FrameRef) -> readers.RawFrame:
    return READERS[ref.reader].read(ref)


def original(ref: FrameRef) -> np.ndarray:
    return np.asarray(Image.open(ref.image_path))


# ---- what there is ------------------------------------------------------------------------------


def test_domains() -> None:
    sizes = {"cityscapes": (512, 1024), "gta5": (720, 1280), "synthia": (760, 1280)}
    frames = {
        "cityscapes": {"train": 2975, "val": 500},
        "gta5": {"train": 24966},
        "synthia": {"train": 9400},
    }
    for name, size in sizes.items():
        reader, domain = READERS[name], readers.domains()[name]
        assert reader.dense and reader.image == size and reader.crop == (512, 512)
        assert domain.frames == frames[name] and domain.splits == tuple(frames[name])
    assert common_class_sets(GTA, CITY) == ["cityscapes19", "synthia16", "synthia13"]
    assert common_class_sets(SYN, CITY) == ["synthia16", "synthia13"]


def test_cityscapes_frames(tmp_path: Path) -> None:
    root = dense_layouts.cityscapes(tmp_path)
    train, val, both = (list_frames(root, CITY, split) for split in ("train", "val", None))
    assert [ref.token for ref in train] == ["aachen_000000_000019", "bochum_000000_000313"]
    assert [ref.scene for ref in train] == ["aachen", "bochum"]
    assert [ref.token for ref in val] == ["lindau_000000_000019"] and both == train + val
    assert [len(ref.files) for ref in both] == [3, 3, 3]
    tables = READERS["cityscapes"].tables(root, None, both)
    assert [path.name[:6] for path in tables] == ["aachen", "bochum", "lindau"]
    assert all(path.is_file() for path in tables)
    assert [row["missing"] for row in check(root, CITY)] == [0, 0]


def test_gta5_and_synthia_frames(tmp_path: Path) -> None:
    gta, syn = dense_layouts.gta5(tmp_path / "gta"), dense_layouts.synthia(tmp_path / "syn")
    frames = list_frames(gta, GTA, "train")
    assert [ref.token for ref in frames] == ["00001", "00002", "00003"]
    assert all(len(ref.files) == 2 and ref.depth_path is None for ref in frames)
    frames = list_frames(syn, SYN, "train")
    assert [ref.token for ref in frames] == ["0000000", "0000001", "0000002"]
    assert frames == list_frames(syn / "RAND_CITYSCAPES", SYN, "train")
    assert all(len(ref.files) == 3 for ref in frames)


@pytest.mark.parametrize(
    ("domain", "missing"), [(CITY, "leftImg8bit"), (GTA, "images"), (SYN, "RGB")]
)
def test_another_root(tmp_path: Path, domain: readers.Domain, missing: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: no folder {missing}"):
        list_frames(tmp_path, domain, "train")


def test_frames_without_labels_or_depth(tmp_path: Path) -> None:
    root = dense_layouts.cityscapes(tmp_path / "city")
    shutil.rmtree(root / "gtFine/train/aachen")
    shutil.rmtree(root / "disparity/train/bochum")
    first, second = list_frames(root, CITY, "train")
    assert read(first).labels is None and read(first).depth is not None
    assert read(second).labels is not None and read(second).depth is None
    assert len(READERS["cityscapes"].tables(root, None, [first, second])) == 1
    assert "1 frame without labels" in check(root, CITY)[0]["note"]
    assert "or add the folder gtFine" in check(root, CITY)[0]["note"]
    for folder in ("gtFine", "disparity", "camera"):
        shutil.rmtree(root / folder)
    for ref in list_frames(root, CITY, None):
        assert read(ref).labels is None and read(ref).depth is None

    root = dense_layouts.gta5(tmp_path / "gta")
    (root / "labels/00002.png").unlink()
    assert [ref.label_path is None for ref in list_frames(root, GTA, None)] == [False, True, False]
    root = dense_layouts.synthia(tmp_path / "syn")
    shutil.rmtree(root / "RAND_CITYSCAPES/GT")
    shutil.rmtree(root / "RAND_CITYSCAPES/Depth")
    frame = read(list_frames(root, SYN, None)[0])
    assert frame.labels is None and frame.depth is None


# ---- classes ------------------------------------------------------------------------------------

# Label id -> place in cityscapes19; from the tables that published code has (DACS, CorDA).
CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
SYNTHIA_IDS = {
    1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17, 15: 6, 17: 12,
    19: 15, 21: 3,
}  # fmt: skip


@pytest.mark.parametrize("classes", ["cityscapes19", "synthia16", "synthia13"])
@pytest.mark.parametrize("name", list(WRITERS))
def test_every_label_id(name: str, classes: str) -> None:
    reader, known = READERS[name], {"cityscapes": 34, "gta5": 35, "synthia": 23}[name]
    categories = reader.categories(FrameRef("", "", name, Path()))
    assert sorted(categories) == list(range(known))
    if (name, classes) == ("synthia", "cityscapes19"):
        with pytest.raises(DataError, match="no class map from synthia to cityscapes19"):
            class_table(reader, classes, categories)
        return
    table = class_table(reader, classes, categories)
    places = SYNTHIA_IDS if name == "synthia" else CITYSCAPES_IDS
    for raw in range(256):
        wanted = CLASS_SETS["cityscapes19"][places[raw]] if raw in places else None
        found = None if table[raw] == 255 else CLASS_SETS[classes][table[raw]]
        assert found == (wanted if wanted in CLASS_SETS[classes] else None), raw
    assert set(table.tolist()) == {*range(len(CLASS_SETS[classes])), 255}


def test_class_sets_leave_out_what_they_should() -> None:
    all_19, all_16, all_13 = (
        set(CLASS_SETS[name]) for name in ("cityscapes19", "synthia16", "synthia13")
    )
    assert all_19 - all_16 == {"terrain", "truck", "train"} and all_16 < all_19
    assert all_16 - all_13 == {"wall", "fence", "pole"} and all_13 < all_16


# ---- what a frame holds -------------------------------------------------------------------------


def test_cityscapes_frame(tmp_path: Path) -> None:
    for i, ref in enumerate(list_frames(dense_layouts.cityscapes(tmp_path), CITY, None)):
        frame, disparity = read(ref), u16(i)
        np.testing.assert_array_equal(np.asarray(frame.image), original(ref))
        np.testing.assert_array_equal(frame.labels, ids(34, i))
        assert frame.depth is not None and frame.depth.dtype == np.float32
        for row in range(HEIGHT):
            for col in range(WIDTH):
                p = float(disparity[row, col])
                if p <= 1:  # no measurement, or a point at infinity
                    assert frame.depth[row, col] == 0
                else:
                    wanted = BASELINE * FOCAL / ((p - 1) / 256)
                    assert frame.depth[row, col] == pytest.approx(wanted, rel=1e-6)


def test_cityscapes_depth_of_every_disparity() -> None:
    everything = np.arange(1 << 16).astype(np.uint16)[None]
    depth = metres(everything, 0.2, 1000)[0]
    assert depth[0] == depth[1] == 0 and np.isfinite(depth).all()
    assert (np.diff(depth[2:]) < 0).all() and depth[1 + 256] == 200 and depth[1 + 25600] == 2


def test_gta5_frame(tmp_path: Path) -> None:
    for i, ref in enumerate(list_frames(dense_layouts.gta5(tmp_path), GTA, "train"), 1):
        frame = read(ref)
        np.testing.assert_array_equal(np.asarray(frame.image), original(ref))
        np.testing.assert_array_equal(frame.labels, ids(35, i))
        assert frame.depth is None


def test_gta5_palette_of_few_colours(tmp_path: Path) -> None:
    """Two to eight bits a pixel: the indices are the ids all the same."""
    (ref, *_) = list_frames(dense_layouts.gta5(tmp_path), GTA, "train")
    assert ref.label_path is not None
    for bits in (1, 2, 4):
        labels = ids(2**bits, bits)
        palette(labels).save(ref.label_path, bits=bits)
        np.testing.assert_array_equal(read(ref).labels, labels)


def test_gta5_labels_of_a_slightly_different_size(tmp_path: Path) -> None:
    (ref, *_) = list_frames(dense_layouts.gta5(tmp_path), GTA, "train")
    assert ref.label_path is not None
    before, labels = original(ref), np.repeat(ids(35, 1), 5, 0).repeat(5, 1)  # 120 x 200
    picture(1, 200, 115).save(ref.image_path)
    image = original(ref)
    palette(labels).save(ref.label_path)
    frame = read(ref)
    np.testing.assert_array_equal(np.asarray(frame.image), image)  # as it is
    assert frame.labels is not None and frame.labels.shape == (115, 200) != before.shape[:2]
    for row in range(115):
        place = (row + 0.5) * 120 / 115
        nearest = {int(place - 1e-6), int(place + 1e-6)}  # two where it lies between them
        assert any(np.array_equal(frame.labels[row], labels[source]) for source in nearest)

    picture(1, 200, 112).save(ref.image_path)
    with pytest.raises(DataError, match=r"labels/00001\.png: \(120, 200\).*\(112, 200\).*images/"):
        read(ref)


def test_synthia_frame(tmp_path: Path) -> None:
    for i, ref in enumerate(list_frames(dense_layouts.synthia(tmp_path), SYN, "train")):
        frame, centimetres = read(ref), u16(i)
        np.testing.assert_array_equal(np.asarray(frame.image), original(ref))
        np.testing.assert_array_equal(frame.labels, ids(23, i))
        assert frame.depth is not None and frame.depth.dtype == np.float32
        for row in range(HEIGHT):
            for col in range(WIDTH):
                wanted = float(centimetres[row, col]) / 100
                assert frame.depth[row, col] == pytest.approx(wanted, rel=1e-6)
        assert frame.depth[0, 0] == 0


def test_synthia_depth_in_grey(tmp_path: Path) -> None:
    (ref, *_) = list_frames(dense_layouts.synthia(tmp_path), SYN, "train")
    assert ref.depth_path is not None
    depth = read(ref).depth
    write_16(ref.depth_path, u16(0))
    np.testing.assert_array_equal(read(ref).depth, depth)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (63, 97)])
def test_sixteen_bits_are_sixteen_bits(tmp_path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (height, width, 3), np.uint16)
    write_16(tmp_path / "colour.png", pixels)
    write_16(tmp_path / "grey.png", pixels[..., 1])
    np.testing.assert_array_equal(dense.read_16_bits(tmp_path / "colour.png"), pixels[..., 0])
    np.testing.assert_array_equal(dense.read_16_bits(tmp_path / "grey.png"), pixels[..., 1])
    # Pillow agrees where it can read them: the files are what the specification says.
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "colour.png")), pixels >> 8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grey.png")), pixels[..., 1])


# ---- damaged files ------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def header(width: int, height: int, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG that promises an image and holds none of it."""
    content = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content) + chunk(b"IDAT", b"")


def saved(image: Image.Image) -> Callable[[Path], object]:
    return lambda path: image.save(path, format="PNG")


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def camera(baseline: Any, focal: Any) -> Callable[[Path], object]:
    content = {"extrinsic": {"baseline": baseline}, "intrinsic": {"fx": focal}}
    return holding(json.dumps(content).encode())


GREY = Image.fromarray(ids(20, 0))
CITY_NAME = "train/aachen/aachen_000000_000019"
PHOTOS = {
    "cityscapes": f"leftImg8bit/{CITY_NAME}_leftImg8bit.png",
    "gta5": "images/00001.png",
    "synthia": "RAND_CITYSCAPES/RGB/0000000.png",
}
IDS = {"cityscapes": f"gtFine/{CITY_NAME}_gtFine_labelIds.png", "gta5": "labels/00001.png"}
DEEP = {
    "cityscapes": f"disparity/{CITY_NAME}_disparity.png",
    "synthia": "RAND_CITYSCAPES/Depth/Depth/0000000.png",
}
LABELS_16 = {"synthia": "RAND_CITYSCAPES/GT/LABELS/0000000.png"}
CAMERA = {"cityscapes": f"camera/{CITY_NAME}_camera.json"}
EVERY = [*PHOTOS.items(), *IDS.items(), *DEEP.items(), *LABELS_16.items()]
Damage = Callable[[Path], object]
NOT_A_PNG: list[tuple[Damage, str]] = [
    (cut, "not a readable PNG"),
    (holding(b""), "not a readable PNG"),
    (holding(b"no image"), "not a readable PNG"),
    (holding(header(WIDTH, HEIGHT)), "not a readable PNG"),
    (holding(header(WIDTH, HEIGHT, 16)), "not a readable PNG"),
    (holding(header(WIDTH, HEIGHT)[:33]), "not a readable PNG"),
    (holding(header(0, HEIGHT)), "not a readable PNG"),
    (holding(header(5000, 4000)), f"more than {1 << 24} pixels"),
    (holding(header(10000, 10000, 16, 2)), f"more than {1 << 24} pixels"),
    (holding(header(60000, 60000)), f"more than {1 << 24} pixels"),
    (lambda path: picture(0, WIDTH, HEIGHT).save(path, format="JPEG"), "not a readable PNG"),
    (folder, "expected a file"),
    (Path.unlink, "missing; download"),
]
SPECIAL: list[tuple[dict[str, str], Damage, str]] = [
    # another kind of image than the data set's
    (IDS, saved(picture(0, WIDTH, HEIGHT)), "kind RGB, expected 8-bit label ids"),
    (IDS, saved(picture(0, WIDTH, HEIGHT).convert("RGBA")), "kind RGBA, expected 8-bit label ids"),
    (IDS, saved(GREY.convert("1")), "kind 1, expected 8-bit label ids"),
    (IDS, holding(png_16(u16(0))), "kind I;16B, expected 8-bit label ids"),
    (DEEP, saved(GREY), "kind L, expected 16 bits"),
    (DEEP, saved(picture(0, WIDTH, HEIGHT)), "kind RGB, expected 16 bits"),
    (LABELS_16, saved(picture(0, WIDTH, HEIGHT)), "kind RGB, expected 16 bits"),
    (LABELS_16, saved(palette(ids(23, 0))), "kind P, expected 16 bits"),
    # rows missing, the rest in order
    (PHOTOS, holding(header(WIDTH, HEIGHT, 8, 2) + chunk(b"IEND", b"")), "not a readable PNG"),
    (IDS, holding(header(WIDTH, HEIGHT) + chunk(b"IEND", b"")), "not a readable PNG"),
    (DEEP, holding(header(WIDTH, HEIGHT, 16) + chunk(b"IEND", b"")), "not a readable PNG"),
    (LABELS_16, holding(header(WIDTH, HEIGHT, 16, 2) + chunk(b"IEND", b"")), "not a readable PNG"),
    # another size than the photo's
    (IDS, saved(palette(ids(20, 0)[:12])), r"\(12, 40\) \(H, W\), expected \(24, 40\)"),
    (IDS, saved(palette(ids(20, 0).T.copy())), r"\(40, 24\) \(H, W\), expected \(24, 40\)"),
    (DEEP, holding(png_16(u16(0)[:, :20])), r"\(24, 20\) \(H, W\), expected \(24, 40\)"),
    (
        LABELS_16,
        holding(png_16(np.zeros((23, 40, 3), np.uint16))),
        r"\(23, 40\) \(H, W\), expected \(24, 40\)",
    ),
    # ids that there are not: training ids, which have 255; another channel
    (IDS, saved(palette(np.full((HEIGHT, WIDTH), 255, np.uint8))), r"label ids 255 \(960 rows\)"),
    (
        LABELS_16,
        holding(png_16(np.stack([u16(0)] * 3, -1))),
        r"label ids \d+(, \d+){4}, \.\.\. \(\d+ rows",
    ),
    (
        LABELS_16,
        holding(png_16(np.full((HEIGHT, WIDTH, 3), 3 << 8, np.uint16))),
        r"label ids 768 \(960 rows\)",
    ),
    # the camera
    (CAMERA, Path.unlink, "missing; depth needs the cameras"),
    (CAMERA, cut, "found JSONDecodeError"),
    (CAMERA, holding(b"[]"), "found TypeError"),
    (CAMERA, holding(b"{}"), "found KeyError"),
    (CAMERA, holding(b"\xff\xfe\xfd"), "found UnicodeDecodeError"),
    (CAMERA, holding(b"[" * 100_000), "found RecursionError"),
    (CAMERA, camera("wide", 2000), "found ValueError"),
    (CAMERA, camera(None, 2000), "found TypeError"),
    (CAMERA, camera(10**400, 2000), "found OverflowError"),
    (CAMERA, camera(0, 2000), "expected numbers above 0"),
    (CAMERA, camera(0.2, -1), "expected numbers above 0"),
    (CAMERA, camera(0.2, float("nan")), "expected numbers above 0"),
    (CAMERA, camera(float("inf"), 2000), "expected numbers above 0"),
]
DAMAGED = [(*place, *damage) for place in EVERY for damage in NOT_A_PNG]
DAMAGED += [(*place, damage, text) for places, damage, text in SPECIAL for place in places.items()]


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGED)
def test_damaged(tmp_path: Path, name: str, file: str, damage: Damage, message: str) -> None:
    root = WRITERS[name](tmp_path)
    (ref, *_) = list_frames(root, readers.domains()[name], "train")
    reader = READERS[ref.reader]
    table = class_table(reader, next(iter(reader.classes)), reader.categories(ref))
    read_frame(ref, table, None)
    damage(root / file)
    with pytest.raises(DataError, match=message) as caught:
        read_frame(ref, table, None)
    assert str(root / file) in str(caught.value)


def test_any_damage_is_refused_or_harmless(refs: list[FrameRef]) -> None:
    """Bytes changed, inserted and removed anywhere: the frame as it was, or a DataError."""
    rng, ref = np.random.default_rng(0), refs[0]
    whole_frame, refused = read(ref), []
    for path in ref.files:
        whole = path.read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            at = int(rng.integers(len(content)))
            content[at : at + int(rng.integers(3))] = rng.bytes(int(rng.integers(1, 4)))
            path.write_bytes(content)
            try:
                frame = read(ref)
            except DataError as error:
                refused.append((path, str(error)))
                continue
            for part in ("image", "labels", "depth"):
                was, found = (getattr(raw, part) for raw in (whole_frame, frame))
                np.testing.assert_array_equal(np.asarray(found), np.asarray(was))
        path.write_bytes(whole)
    assert len(refused) > 100 and all(str(path) in message for path, message in refused)


def test_a_file_that_vanishes(refs: list[FrameRef], tmp_path: Path) -> None:
    ref, gone = refs[0], tmp_path / "gone.png"
    frames = [dataclasses.replace(ref, image_path=gone), dataclasses.replace(ref, label_path=gone)]
    if ref.depth_path is not None:
        frames.append(dataclasses.replace(ref, depth_path=gone))
    for frame in frames:
        with pytest.raises(DataError, match=r"gone\.png: missing"):
            read(frame)


def test_other_files_beside_the_images_are_no_frames(tmp_path: Path) -> None:
    root = dense_layouts.gta5(tmp_path)
    write(root / "images/readme.txt", "text")
    assert len(list_frames(root, GTA, "train")) == 3
