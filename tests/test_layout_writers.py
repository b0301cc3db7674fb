"""The street world on disk: layouts read back by their readers, splits, equal bytes, resumption."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp.data import CLASS_SETS, class_table
from ftdpp.docs import worlds
from ftdpp.readers import domains, list_frames, reader_of
from ftdpp.readers.dense import read_16_bits
from ftdpp.readers.nuscenes import OFFICIAL_VAL, SSDA_LABELLED, SSDA_TRAIN, VAL_NIGHT, VAL_SINGAPORE
from ftdpp.world import datasets, layouts, rig
from ftdpp.world.scene import LABELS, TABLES, WORLDS

Pair = tuple[str, str]
Build = Callable[[Pair], Path]
SHARED = [pair for pair in layouts.PAIRS if pair[0] in ("usa", "day")]
NAMES = sorted({name for pair in layouts.PAIRS for name in pair})
all_pairs = pytest.mark.parametrize("pair", layouts.PAIRS, ids="-".join)


def counts(pair: Pair) -> dict[str, int]:
    return dict.fromkeys(layouts.DEFAULT_FRAMES[pair], 1) | {"source": 2}


def pair_with(name: str) -> Pair:
    return next(pair for pair in layouts.PAIRS if name in pair)


def shots_of(pair: Pair, name: str) -> list[rig.Shot]:
    return [s for s in layouts.shots_of(*pair, counts(pair), 0) if s.world == name]


def digest(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(root: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((root / "v1.0-trainval" / f"{name}.json").read_text())
    return rows


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def write_told(root: Path, pair: Pair, workers: int) -> None:
    """Writes a tiny world, which tells of each frame in order."""
    calls: list[tuple[int, int, str]] = []
    total = sum(counts(pair).values())
    layouts.write_world(root, *pair, counts(pair), 0, workers, lambda *told: calls.append(told))
    assert calls == [(k, total, "building the street world") for k in range(1, total + 1)]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The root of a pair's tiny world, written once, by two processes."""
    folder = tmp_path_factory.mktemp("worlds")

    def made(pair: Pair) -> Path:
        root = folder / "-".join(pair)
        if not root.exists():
            write_told(root, pair, workers=2)
        return root

    return made


@pytest.fixture
def home(build: Build) -> Callable[[str], Path]:
    """The root of a domain's data set."""
    return lambda name: layouts.roots(build(pair_with(name)), name)[0]


# ---- every layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [SHARED[0], ("gta5", "cityscapes")], ids="-".join)
def test_same_bytes_whatever_the_workers(pair: Pair, build: Build, tmp_path: Path) -> None:
    """With one root and with two; the builds that go on after an interruption show it for all."""
    root = tmp_path / "again"
    write_told(root, pair, workers=1)
    assert digest(root) == digest(build(pair))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["again"]


@all_pairs
def test_the_readers_find_the_splits(pair: Pair, build: Build) -> None:
    for part, count in counts(pair).items():
        name = pair[0] if part == "source" else pair[1]
        split = part if part in ("val", "test") else "train"
        (root,) = layouts.roots(build(pair), name)
        weathers = len(datasets.WEATHERS) if name == "vkitti" else 1
        assert len(list_frames(root, domains()[name], split)) == count * weathers, part


@pytest.mark.parametrize("name", NAMES)
def test_readers_and_rays_agree(name: str, home: Callable[[str], Path]) -> None:
    shots = shots_of(pair_with(name), name)
    found = worlds.survey(home(name), shots, domains()[name])
    assert found.read == found.written * (len(datasets.WEATHERS) if name == "vkitti" else 1)
    assert found.written == len(shots) > 0
    assert found.rows / found.read > 2_000 and found.compared > 0.3 * found.rows
    assert found.equal > 0.99 * found.compared
    assert found.hidden < 0.05 * found.rows
    assert (found.histogram > 0).sum() >= 5
    assert found.histogram.sum() + found.ignored == found.rows


# label -> the class that it has to be in, in whatever set has a class of one of these names
MEANING = {
    "road": "road driveable_surface", "sidewalk": "sidewalk", "car": "car vehicle",
    "truck": "truck vehicle", "building": "building manmade",
    "vegetation": "vegetation vegetation_terrain nature", "person": "person pedestrian",
    "terrain": "terrain vegetation_terrain nature", "pole": "pole object other-objects manmade",
    "traffic_sign": "traffic-sign traffic_sign object other-objects manmade", "sky": "sky",
    "bus": "bus other-vehicle vehicle", "bicycle": "bicycle bike vehicle",
    "motorcycle": "motorcycle bike vehicle", "fence": "fence object other-objects manmade",
    "barrier": "barrier", "trunk": "trunk vegetation vegetation_terrain nature",
}  # fmt: skip
# A2D2 has no bus, nor a terrain; Virtual KITTI has no pavement, and no people.
ELSEWHERE = {("a2d2_10", "bus"), ("vkitti6", "sidewalk"), ("skitti19", "barrier")}


@pytest.mark.parametrize("name", NAMES)
def test_labels_keep_their_meaning(name: str, home: Callable[[str], Path]) -> None:
    reader, layout = reader_of(domains()[name]), layouts.LAYOUTS[name]
    known = reader.categories(list_frames(home(name), domains()[name], None)[0])
    assert set(layout.IDS.tolist()) <= set(known)
    for classes in reader.classes:
        lookup, names = class_table(reader, classes, known), CLASS_SETS[classes]
        for label, right in MEANING.items():
            wanted = [c for c in names if c in right.split()]
            if wanted and (classes, label) not in ELSEWHERE:
                found = lookup[layout.IDS[LABELS.index(label)]]
                assert found < 255 and names[found] in wanted, (classes, label)


# ---- nuScenes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SHARED, ids="-".join)
def test_nuscenes(pair: Pair, build: Build) -> None:
    root = build(pair)
    keys = {
        "sample": "scene",
        "sample_data": "sample ego_pose calibrated_sensor",
        "calibrated_sensor": "sensor",
        "scene": "log",
        "lidarseg": "sample_data",
    }
    for name, targets in keys.items():
        for target in targets.split():
            known = {row["token"] for row in table(root, target)}
            assert {row[f"{target}_token"] for row in table(root, name)} <= known
    for name in (*keys, "log", "ego_pose", "category", "sensor"):
        tokens = [row["token"] for row in table(root, name)]
        assert len(set(tokens)) == len(tokens) > 0
    assert len(table(root, "sample")) == sum(counts(pair).values())
    categories = [(row["index"], row["name"]) for row in table(root, "category")]
    assert categories[17] == (17, "vehicle.car")
    labels = {row["sample_data_token"]: root / row["filename"] for row in table(root, "lidarseg")}
    for row in table(root, "sample_data"):
        file = root / row["filename"]
        if row["fileformat"] == "jpg":
            assert pixels(file).shape == (row["height"], row["width"], 3) == (225, 400, 3)
            continue
        points = np.fromfile(file, np.float32).reshape(-1, 5)
        assert 20_000 < len(points) < 33_000 and file.stat().st_size == 20 * len(points)
        assert np.isfinite(points).all()
        assert np.fromfile(labels[row["token"]], np.uint8).shape == (len(points),)
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255
        assert set(points[:, 4]) <= set(range(32))
    for row in table(root, "scene"):
        tokens = [s["token"] for s in table(root, "sample") if s["scene_token"] == row["token"]]
        assert (row["first_sample_token"], row["last_sample_token"]) == (tokens[0], tokens[-1])
        assert len(tokens) == row["nbr_samples"]


def test_scenes_fall_into_the_official_splits(build: Build) -> None:
    usa, night = (build(pair) for pair in SHARED)
    places = {row["token"]: row["location"] for row in table(usa, "log")}
    found = [(row["name"], places[row["log_token"]].split("-")[0]) for row in table(usa, "scene")]
    assert [place for _, place in found] == ["boston", "singapore", "singapore", "singapore"]
    assert [name for name, _ in found][2:] == ["scene-0004", "scene-0003"]
    descriptions = [row["description"] for row in table(night, "scene")]
    assert ["night" in text.lower() for text in descriptions] == [False, True, True, True]


def test_scenes_are_those_of_the_official_splits() -> None:
    """And any beginning of the training scenes in Singapore holds about 30 % labelled ones."""
    every: list[str] = []
    cases = (
        ("usa", None, {"train": 117}, 0),
        ("singapore", VAL_SINGAPORE, {"train": 122, "val": 59, "test": 47}, 46),
        ("night", VAL_NIGHT, {"train": 72, "val": 15, "test": 14}, 22),
    )
    for world, official, sizes, labelled in cases:
        names = {
            part: [name.removeprefix("scene-") for _, name in layouts.NUSCENES.places(world, part)]
            for part in sizes
        }
        every += [name for part in names.values() for name in part]
        assert {part: len(content) for part, content in names.items()} == sizes
        if official:
            assert set(names["val"]) <= official and set(names["test"]) <= OFFICIAL_VAL
            assert set(names["train"]) <= SSDA_TRAIN
            known = np.cumsum([name in SSDA_LABELLED for name in names["train"]])
            share = known / np.arange(1, len(known) + 1)
            assert known[-1] == labelled
            assert (np.abs(share[9 : len(known) // 2] - 0.3) < 0.06).all()
    assert len(set(every)) == len(every)
    first = layouts.NUSCENES.places("day", "train")[:4]
    assert [city for city, _ in first] == ["boston", "singapore"] * 2


def test_frames_of_a_scene_move(build: Build) -> None:
    usa = build(("usa", "singapore"))
    poses = {row["token"]: row for row in table(usa, "ego_pose")}
    data = table(usa, "sample_data")[:4]  # of the first scene, lidar twice, camera twice
    at = [np.array(poses[row["token"]]["translation"]) for row in data]
    assert 5 < np.linalg.norm(at[1] - at[0]) < 11
    assert 0.1 < np.linalg.norm(at[2] - at[0]) < 0.5
    assert all(abs(np.linalg.norm(row["rotation"]) - 1) < 1e-9 for row in poses.values())


def test_domains_differ(build: Build) -> None:
    images = {}
    for pair in SHARED:
        rows = [row for row in table(build(pair), "sample_data") if row["fileformat"] == "jpg"]
        images[pair] = [pixels(build(pair) / row["filename"]) for row in rows]
    road = [image[180:].mean() for image in images["usa", "singapore"]]
    whole = [image.mean() for image in images["day", "night"]]
    assert np.mean(road[:2]) > np.mean(road[2:]) + 10
    assert max(whole[2:]) < 0.6 * min(whole[:2])


# ---- the other layouts ---------------------------------------------------------------------------


@all_pairs
def test_no_two_frames_share_a_file(pair: Pair) -> None:
    sizes = layouts.DEFAULT_FRAMES[pair]
    shots = layouts.shots_of(*pair, sizes, 0)
    homes = layouts.roots(Path(), *(shot.world for shot in shots))
    files = [
        home / file
        for home, shot in zip(homes, shots, strict=True)
        for file in layouts.LAYOUTS[shot.world].files(shot)
    ]
    assert len(set(files)) == len(files)
    assert len(shots) == sum(sizes.values())
    assert len({(shot.key, shot.number) for shot in shots}) == len(shots)


def test_places_are_enough_for_many_frames() -> None:
    """A second street in a sequence goes on with its numbers; a nuScenes scene gets longer."""
    shots = layouts.shots_of("vkitti", "skitti", {"source": 30}, 0)
    first = [shot for shot in shots if shot.place == "0001"]
    assert [shot.index for shot in first] == list(range(len(first))) and len(first) > 4
    assert len({shot.key for shot in first}) == 2
    sizes = layouts.sizes_of("day", "night", {"test": 70})
    shots = layouts.shots_of("day", "night", sizes, 0)
    night = [s for s in shots if s.world == "night" and s.key[2] == 3]
    assert len(night) == 70 and {s.number for s in night} == set(range(5))


def test_semantic_kitti(home: Callable[[str], Path]) -> None:
    base = home("skitti") / "sequences"
    assert sorted(p.name for p in base.iterdir()) == ["00", "07", "08"]
    for sequence in base.iterdir():
        rows = dict(line.split(":") for line in (sequence / "calib.txt").read_text().splitlines())
        turn = np.array(rows["Tr"].split(), float).reshape(3, 4)[:, :3]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
        points = np.fromfile(sequence / "velodyne/000000.bin", np.float32).reshape(-1, 4)
        labels = np.fromfile(sequence / "labels/000000.label", np.uint32)
        assert 30_000 < len(points) == len(labels)
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 1
        elevation = np.degrees(np.arcsin(points[:, 2] / np.linalg.norm(points[:, :3], axis=1)))
        assert -25 < elevation.min() < -20 and elevation.max() < 2.5
        assert (points[:, 0] < -5).any() and (points[:, 0] > 5).any()  # all around
        road = points[np.isin(labels, (40, 60)) & (np.abs(points[:, 0]) < 20), 2]
        assert -1.9 < np.median(road) < -1.5
        assert pixels(sequence / "image_2/000000.png").shape == (375, 1242, 3)


def test_virtual_kitti(home: Callable[[str], Path]) -> None:
    root = home("vkitti")
    cloud = np.load(root / "vkitti3d_npy/0001/00000.npy")
    assert cloud.shape == (datasets.POINTS, 7) and cloud.dtype == np.float32
    images = [pixels(root / f"vkitti_1.3.1_rgb/0001/{w}/00000.png") for w in datasets.WEATHERS]
    clone = images[0]
    assert clone.shape == (375, 1242, 3) and len(images) == 6
    assert all(np.abs(clone.astype(int) - other).mean() > 5 for other in images[1:])
    # The colours are those of the pixel that a point comes from.
    x, y, z = cloud[:, :3].T.astype(np.float64)
    row, col = (np.floor(v).astype(int) for v in (187.5 - 725 * z / x, 621 - 725 * y / x))
    np.testing.assert_array_equal(clone[row, col], cloud[:, 3:6])
    assert set(cloud[:, 6]) <= set(range(14))
    assert np.median(z[cloud[:, 6] == 4]) == pytest.approx(-1.65, abs=0.1)  # the road


def test_fog_hides_what_is_far() -> None:
    image = np.full((1, 2, 3), 80, np.uint8)
    near, far = datasets.relit(image, np.array([[1.0, np.inf]], np.float32), "fog")[0]
    assert near.max() < 90 and far.tolist() == [190, 194, 198]


def test_a2d2(home: Callable[[str], Path]) -> None:
    root = home("a2d2")
    refs = list_frames(root, domains()["a2d2"], "train")
    assert refs[0].points_path is not None
    with np.load(refs[0].points_path) as file:
        arrays = dict(file)
    xyz, row, col = (arrays[key] for key in ("points", "row", "col"))
    assert len(xyz) == len(row) == len(col) > 3_000
    assert set(arrays["lidar_id"]) == {0, 1, 2}
    u, v, w = layouts.LAYOUTS["a2d2"].camera.matrix @ np.stack([-xyz[:, 1], -xyz[:, 2], xyz[:, 0]])
    np.testing.assert_allclose((v / w, u / w), (row, col), atol=1e-2)
    np.testing.assert_allclose(arrays["depth"], w, rtol=1e-5)
    # The camera's image is distorted: what the reader undistorts is what the camera sees.
    shot = shots_of(pair_with("a2d2"), "a2d2")[0]
    straight = layouts.LAYOUTS["a2d2"].look(shot, shot.scene()).image.astype(float)
    inner = np.s_[20:-20, 20:-20]
    read = np.asarray(reader_of(domains()["a2d2"]).read(refs[0]).image).astype(float)
    stored = pixels(refs[0].image_path).astype(float)
    assert np.abs(read - straight)[inner].mean() < 0.3 * np.abs(stored - straight)[inner].mean()


def test_calibrations_are_those_of_the_cameras() -> None:
    """What the readers are told is what the rays are cast with."""
    row, front = TABLES["layouts"]["a2d2"], datasets.FRONT
    assert front["CamMatrix"] == layouts.LAYOUTS["a2d2"].camera.matrix.tolist()
    assert (front["view"]["origin"], front["Resolution"]) == (row["eye"], row["camera"][1::-1])
    row, stereo = TABLES["layouts"]["cityscapes"], TABLES["cityscapes"]["calibration"]
    assert list(stereo["extrinsic"].values())[1:] == row["eye"]
    assert list(stereo["intrinsic"].values()) == [row["camera"][2], *row["camera"][2:]]
    camera, front = layouts.NUSCENES.camera, TABLES["nuscenes"]["sensors"]["CAM_FRONT"]
    assert front["intrinsic"] == camera.matrix.tolist()
    assert front["format"] == ["jpg", camera.height, camera.width]


def test_the_lens_is_inverted() -> None:
    camera = layouts.LAYOUTS["a2d2"].camera
    row, col = datasets.lens(camera)
    inside = (row > 0) & (row < camera.height - 1) & (col > 0) & (col < camera.width - 1)
    assert inside.mean() > 0.8
    y, x = (row - camera.centre_v) / camera.focal, (col - camera.centre_u) / camera.focal
    scale = datasets.LENS * (1 + datasets.DISTORTION * (x * x + y * y))
    back = scale * y + camera.centre_v, scale * x + camera.centre_u
    for found, right in zip(back, np.mgrid[: camera.height, : camera.width], strict=True):
        np.testing.assert_allclose(found[inside], right[inside], atol=1e-3)


def test_cityscapes(home: Callable[[str], Path]) -> None:
    domain = domains()["cityscapes"]
    for split, town in (("train", "aachen"), ("val", "frankfurt")):
        (ref,) = list_frames(home("cityscapes"), domain, split)
        assert ref.scene == town and ref.depth_path is not None
        raw = reader_of(domain).read(ref)
        assert raw.depth is not None and raw.labels is not None
        shot = next(s for s in shots_of(pair_with("gta5"), "cityscapes") if s.place == town)
        true = layouts.LAYOUTS["cityscapes"].look(shot, shot.scene()).depth
        known = raw.depth > 0
        assert 0.5 < known.mean() < 0.95 and not known[np.isinf(true)].any()
        error = np.abs(raw.depth / true - 1)[known & (true < 30)]
        assert 0.001 < np.median(error) < 0.03  # near the truth, and measured
        assert set(np.unique(raw.labels)) <= set(range(34))


def test_gta5(home: Callable[[str], Path]) -> None:
    root = home("gta5")
    names = ["00001.png", "00002.png"]
    for folder in ("images", "labels"):
        assert sorted(p.name for p in (root / folder).iterdir()) == names
    with Image.open(root / "labels/00001.png") as label:
        assert label.mode == "P" and label.size == (480, 264)
        colours = np.asarray(label.convert("RGB"))
        assert (colours[np.asarray(label) == 7] == (128, 64, 128)).all()
    by_id = {row[3]: row[-1] for row in TABLES["labels"].values()}
    assert {row[3]: row[-1] for row in reversed(TABLES["labels"].values())} == by_id


def test_synthia(home: Callable[[str], Path]) -> None:
    base = home("synthia") / "RAND_CITYSCAPES"
    label, depth = (
        read_16_bits(base / f"{folder}/0000000.png") for folder in ("GT/LABELS", "Depth/Depth")
    )
    shot = shots_of(pair_with("synthia"), "synthia")[0]
    layout = layouts.LAYOUTS["synthia"]
    picture = layout.look(shot, shot.scene())
    np.testing.assert_array_equal(label, layout.IDS[picture.label])
    sky = label == 1
    assert sky.any() and (depth[sky] == 65535).all()
    np.testing.assert_allclose(depth[~sky] / 100, picture.depth[~sky], atol=0.006)
    assert pixels(base / "RGB/0000000.png").shape == (304, 512, 3)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "frames", "message"),
    [
        ("usa", "singapor", None, "there is usa -> singapore, day -> night, vkitti -> skitti"),
        ("mars", "night", None, "no street world for mars -> night"),
        ("usa", "usa", None, "no street world for usa -> usa"),
        ("usa", "day", None, "no street world for usa -> day"),
        ("usa", "singapore", {"val": 0}, "expected 1 to 100000"),
        ("usa", "singapore", {"test": 10**9}, "expected 1 to 100000"),
        ("usa", "singapore", {"vall": 3}, "unknown key 'vall'"),
        ("gta5", "cityscapes", {"test": 3}, "unknown key 'test'"),
    ],
)
def test_refused(
    tmp_path: Path, source: str, target: str, frames: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layouts.write_world(tmp_path / "w", source, target, frames)
    if source == "mars":
        with pytest.raises(ValueError, match=message):
            layouts.built_in(source, target, tmp_path)
    assert not list(tmp_path.iterdir())


def test_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        layouts.write_world(tmp_path, "usa", "singapore")
    assert (tmp_path / "file").read_text() == "mine"


# ---- resumption ----------------------------------------------------------------------------------


def interrupt(done: int, total: int, what: str) -> None:
    if done == 2:
        raise KeyboardInterrupt


def partial_of(root: Path) -> Path:
    """The one folder in which a world is built."""
    [found] = root.parent.glob(f".{root.name}.*.partial")
    return found


def stats(root: Path) -> dict[str, tuple[int, int]]:
    """File below `root` -> inode and time of writing, of the frames' files."""
    found = {str(p.relative_to(root)): p.stat() for p in root.rglob("*") if p.is_file()}
    return {
        name: (stat.st_ino, stat.st_mtime_ns)
        for name, stat in found.items()
        if not name.endswith(("json", "txt"))
    }


@all_pairs
def test_an_interrupted_build_is_resumed(
    pair: Pair, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, root = build(pair), tmp_path / "w"
    with pytest.raises(KeyboardInterrupt):
        layouts.write_world(root, *pair, counts(pair), workers=1, progress=interrupt)
    assert not root.exists()
    partial = partial_of(root)
    before = stats(partial)
    assert before
    # A third frame was cut off: all its files are there but one, and that one half written.
    shot = layouts.shots_of(*pair, counts(pair), 0)[2]
    (there,), (here,) = layouts.roots(whole, shot.world), layouts.roots(partial, shot.world)
    *complete, last = layouts.LAYOUTS[shot.world].files(shot)
    for file in complete:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(there / file, here / file)
    (here / last).parent.mkdir(parents=True, exist_ok=True)
    half = (here / last).with_name(f".{Path(last).name}.01234567-1.tmp")  # of another machine
    half.write_bytes(b"half")

    rendered: list[rig.Shot] = []
    monkeypatch.setattr(layouts, "_write", recording(rendered, layouts._write))
    layouts.write_world(root, *pair, counts(pair), workers=1)
    assert len(rendered) == sum(counts(pair).values()) - 2
    assert before.items() <= stats(root).items()
    assert digest(root) == digest(whole)
    assert not partial.exists()


def recording(rendered: list[rig.Shot], write: Any) -> Any:
    """`layouts._write`, which notes what it renders."""

    def recorded(home: Path, shot: rig.Shot) -> None:
        last = home / layouts.LAYOUTS[shot.world].files(shot)[-1]
        before = last.stat().st_mtime_ns if last.exists() else 0
        write(home, shot)
        if last.stat().st_mtime_ns != before:
            rendered.append(shot)

    return recorded


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    root, pair = tmp_path / "w", ("usa", "singapore")
    with pytest.raises(KeyboardInterrupt):
        layouts.write_world(root, *pair, counts(pair), workers=1, progress=interrupt)
    before = stats(partial_of(root))
    others = [tmp_path / name for name in (".w.x.01234567.partial", ".v.01234567.partial")]
    for other in others:
        other.mkdir()
    layouts.write_world(root, *pair, dict.fromkeys(counts(pair), 1), seed=1, workers=1)
    after = stats(root)
    assert len(before) == 6 and len(after) == 12
    assert not set(before.values()) & set(after.values())
    assert sorted(tmp_path.glob(".*.partial")) == sorted(others), "of worlds with other names"
    named = {row["filename"] for row in table(root, "sample_data") + table(root, "lidarseg")}
    assert named == {name for name in digest(root) if not name.endswith(".json")}


KILLED = """
import json, sys, time
from pathlib import Path
from ftdpp.world import layouts
frames = json.loads(sys.argv[2])
def tell(done, total, what):
    print(done, flush=True)
    time.sleep(600)
layouts.write_world(Path(sys.argv[1]), "gta5", "cityscapes", frames, workers=2, progress=tell)
"""


def test_a_killed_build_is_resumed(build: Build, tmp_path: Path) -> None:
    root, pair = tmp_path / "w", ("gta5", "cityscapes")
    command = [sys.executable, "-c", KILLED, str(root), json.dumps(counts(pair))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
        # The output ends when nobody holds it open: neither does a worker.
        process.communicate(timeout=60)
    # A frame's image is its last file.
    left = stats(partial_of(root))
    before = {name: stat for name, stat in left.items() if "/images/0" in name}
    assert before and not root.exists()
    layouts.write_world(root, *pair, counts(pair), workers=1)
    assert before.items() <= stats(root).items()
    assert digest(root) == digest(build(pair))


def test_the_built_in_world(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ("synthia", "cityscapes")
    whole = build(pair)
    monkeypatch.setitem(layouts.DEFAULT_FRAMES, pair, counts(pair))
    with pytest.raises(KeyboardInterrupt):
        layouts.built_in(*pair, tmp_path, 1, interrupt)
    source, target = layouts.built_in(*pair, tmp_path, 1)
    root = tmp_path / f"world-synthia-cityscapes-v{layouts.VERSION}-2-1-1"
    assert (source, target) == (root / "synthia", root / "cityscapes")
    assert digest(root) == digest(whole)
    calls: list[tuple[int, int, str]] = []
    again = layouts.built_in(*pair[::-1], tmp_path, 1, lambda *told: calls.append(told))
    assert again == (target, source) and not calls


def test_pairs() -> None:
    assert layouts.pair_of("skitti", "a2d2") == ("a2d2", "skitti")
    assert layouts.pair_of("usa", "night") is None
    assert {name for pair in layouts.PAIRS for name in pair} == set(layouts.LAYOUTS) == set(WORLDS)
    shared = layouts.roots(Path("x"), "day", "night")
    assert shared == (Path("x"), Path("x"))
