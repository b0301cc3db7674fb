"""The street world: layout, determinism, resumption; labels, geometry and domains."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftdpp.readers import READERS, domains, ids, rotation
from ftdpp.world import cast, layouts, scene

FRAMES = {"source": 2, "target": 1, "val": 1, "test": 1}
SIX = {
    "vehicle": (scene.BICYCLE, scene.BUS, scene.CAR, scene.MOTORCYCLE, scene.TRUCK),
    "road": (scene.ROAD,),
    "sidewalk": (scene.SIDEWALK,),
    "terrain": (scene.TERRAIN,),
    "manmade": (scene.MANMADE,),
    "vegetation": (scene.VEGETATION,),
}


def digest(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(root: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((root / "v1.0-trainval" / f"{name}.json").read_text())
    return rows


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def usa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "usa"
    layouts.write_world(root, "usa", "singapore", FRAMES, workers=1)
    return root


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "night"
    layouts.write_world(root, "day", "night", FRAMES, workers=1)
    return root


@pytest.fixture(scope="module")
def sweeps() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """World -> (points in the scene's frame, labels) of a few scenes, without images."""
    out: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for world in ("usa", "singapore"):
        city = scene.WORLDS[world].cities[0]
        for number in range(6):
            street = scene.build_scene(world, city, (3, number), 0.0, 0.0)
            position = np.array([0.0, street.city.side * street.lane / 2, 1.84])
            turn = rotation(layouts.mount(city, "LIDAR_TOP")[1])
            rng = np.random.default_rng(number)
            points, label = cast.sweep(street, cast.View(position, turn), 0.05, rng)
            points[:, :3] = points[:, :3] @ turn.T + position
            out.setdefault(world, []).append((points, label))
    return out


def test_same_bytes_whatever_the_workers(usa: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    root = tmp_path / "again"
    layouts.write_world(
        root, "usa", "singapore", FRAMES, workers=2, progress=lambda *told: calls.append(told)
    )
    assert digest(root) == digest(usa)
    assert calls == [(k, 5, "building the street world") for k in range(1, 6)]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["again"]


def test_another_seed_is_another_world() -> None:
    rows = [scene.build_scene("usa", "boston", (seed, 0), 0.0, 0.0).rows for seed in (0, 1)]
    assert rows[0] != rows[1]
    assert rows[0] == scene.build_scene("usa", "boston", (0, 0), 0.0, 0.0).rows


@pytest.mark.parametrize("which", ["usa", "night"])
def test_layout(which: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(which)
    keys = {
        "sample": "scene",
        "sample_data": "sample ego_pose calibrated_sensor",
        "calibrated_sensor": "sensor",
    }
    keys |= {"scene": "log", "lidarseg": "sample_data"}
    for name, targets in keys.items():
        for target in targets.split():
            known = {row["token"] for row in table(root, target)}
            assert {row[f"{target}_token"] for row in table(root, name)} <= known
    for name in (
        "sample",
        "sample_data",
        "scene",
        "log",
        "ego_pose",
        "calibrated_sensor",
        "category",
    ):
        tokens = [row["token"] for row in table(root, name)]
        assert len(set(tokens)) == len(tokens) > 0
    assert len(table(root, "sample")) == sum(FRAMES.values())
    assert [(row["index"], row["name"]) for row in table(root, "category")][17] == (
        17,
        "vehicle.car",
    )
    labels = {row["sample_data_token"]: root / row["filename"] for row in table(root, "lidarseg")}
    for row in table(root, "sample_data"):
        file = root / row["filename"]
        if row["fileformat"] == "jpg":
            assert pixels(file).shape == (row["height"], row["width"], 3) == (225, 400, 3)
            continue
        points = np.fromfile(file, np.float32).reshape(-1, 5)
        assert 20_000 < len(points) < 33_000 and file.stat().st_size == 20 * len(points)
        assert np.isfinite(points).all() and np.fromfile(labels[row["token"]], np.uint8).shape == (
            len(points),
        )
        assert (
            points[:, 3].min() >= 0
            and points[:, 3].max() <= 255
            and set(points[:, 4]) <= set(range(32))
        )
    for row in table(root, "scene"):
        tokens = [s["token"] for s in table(root, "sample") if s["scene_token"] == row["token"]]
        assert (row["first_sample_token"], row["last_sample_token"]) == (tokens[0], tokens[-1])
        assert len(tokens) == row["nbr_samples"]


def test_scenes_fall_into_the_official_splits(usa: Path, night: Path) -> None:
    places = {row["token"]: row["location"] for row in table(usa, "log")}
    found = [(row["name"], places[row["log_token"]].split("-")[0]) for row in table(usa, "scene")]
    assert [place for _, place in found] == ["boston", "singapore", "singapore", "singapore"]
    assert [name for name, _ in found][2:] == ["scene-0004", "scene-0003"]
    descriptions = [row["description"] for row in table(night, "scene")]
    assert ["night" in text.lower() for text in descriptions] == [False, True, True, True]


@pytest.mark.parametrize("which", ["usa", "night"])
def test_the_reader_finds_the_splits(which: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(which)
    source, target = {"usa": ("usa", "singapore"), "night": ("day", "night")}[which]
    for part, name, split in (
        ("source", source, "train"),
        ("target", target, "train"),
        ("val", target, "val"),
        ("test", target, "test"),
    ):
        domain = domains()[name]
        found = READERS[domain.reader].list_frames(root, domain, split, None)
        assert len(found) == FRAMES[part], part


def test_scene_names_are_disjoint() -> None:
    lists = [names for city in layouts.SCENES.values() for names in city.values()]
    flat = [name for names in lists for name in names]
    assert len(set(flat)) == len(flat)
    assert [len(names) for names in lists] == [117, 46, 76, 59, 47, 11, 18, 15, 14]
    assert set(flat) <= ids("1-1102")


def test_frames_of_a_scene_move(usa: Path) -> None:
    poses = {row["token"]: row for row in table(usa, "ego_pose")}
    data = table(usa, "sample_data")
    at = [
        np.array(poses[row["token"]]["translation"]) for row in data[:4]
    ]  # lidar, camera, lidar, camera
    assert 5 < np.linalg.norm(at[2] - at[0]) < 11
    assert 0.1 < np.linalg.norm(at[1] - at[0]) < 0.5
    assert all(abs(np.linalg.norm(row["rotation"]) - 1) < 1e-9 for row in poses.values())


def test_all_classes_occur(sweeps: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    for world, frames in sweeps.items():
        label = np.concatenate([label for _, label in frames])
        for name, indices in SIX.items():
            assert np.isin(label, indices).mean() > 0.015, (world, name)
        for index in (scene.NOISE, scene.ADULT):
            assert (label == index).any(), (world, index)
        assert np.isin(label, (scene.CONE, scene.BARRIER)).any()


def test_labels_agree_with_geometry(sweeps: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    for frames in sweeps.values():
        for points, label in frames:
            z = points[:, 2]
            assert (
                np.percentile(np.abs(z[label == scene.ROAD]), 99.8) < 0.1
            )  # at height 0, noise and kerb edges aside
            assert (
                z[label == scene.SIDEWALK].max() < 0.6
                and np.median(z[label == scene.SIDEWALK]) > 0.05
            )
            assert z[label == scene.CAR].max() < 2.4
            assert np.percentile(z[label == scene.VEGETATION], 90) > 2
            assert z.min() > -0.3


def test_projected_labels_agree_with_the_image(usa: Path) -> None:
    # Emitted radiance aside, points and pixels come from one caster: sky pixels carry no points.
    data = {row["filename"].split("/")[1]: row for row in table(usa, "sample_data")[:2]}
    poses = {row["token"]: row for row in table(usa, "ego_pose")}
    sensors = {row["token"]: row for row in table(usa, "calibrated_sensor")}
    points = (
        np.fromfile(usa / data["LIDAR_TOP"]["filename"], np.float32)
        .reshape(-1, 5)[:, :3]
        .astype(float)
    )
    for channel, forward in (("LIDAR_TOP", True), ("CAM_FRONT", False)):
        steps = [
            sensors[data[channel]["calibrated_sensor_token"]],
            poses[data[channel]["ego_pose_token"]],
        ]
        for row in steps if forward else steps[::-1]:
            turn, shift = rotation(np.array(row["rotation"])), np.array(row["translation"])
            points = points @ turn.T + shift if forward else (points - shift) @ turn
    pixel = (
        points
        @ np.array(sensors[data["CAM_FRONT"]["calibrated_sensor_token"]]["camera_intrinsic"]).T
    )
    u, v = pixel[:, 0] / pixel[:, 2], pixel[:, 1] / pixel[:, 2]
    keep = (pixel[:, 2] > 0) & (u > 0) & (u < 400) & (v > 0) & (v < 225)
    assert 2_000 < keep.sum() < 4_500
    label = np.fromfile(usa / table(usa, "lidarseg")[0]["filename"], np.uint8)
    assert (
        np.median(v[keep & (label == scene.ROAD)])
        > 140
        > np.median(v[keep & (label == scene.VEGETATION)])
    )


def test_domains_differ(usa: Path, sweeps: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    rows = [row for row in table(usa, "sample_data") if row["fileformat"] == "jpg"]
    road = [pixels(usa / row["filename"])[180:].mean() for row in rows]
    assert np.mean(road[:2]) > np.mean(road[2:]) + 10
    slope = {
        world: np.mean([np.percentile(p[label == scene.TERRAIN, 2], 95) for p, label in frames])
        for world, frames in sweeps.items()
    }
    assert slope["singapore"] > slope["usa"] + 0.1


def test_night_is_dark(night: Path) -> None:
    rows = [row for row in table(night, "sample_data") if row["fileformat"] == "jpg"]
    mean = [pixels(night / row["filename"]).mean() for row in rows]
    assert max(mean[2:]) < 0.6 * min(mean[:2])


@pytest.mark.parametrize(
    ("source", "target", "frames", "message"),
    [
        ("usa", "singapor", None, "there is usa -> singapore, day -> night"),
        ("mars", "night", None, "no street world for mars -> night"),
        ("usa", "usa", None, "no street world for usa -> usa"),
        ("usa", "day", None, "no street world for usa -> day"),
        ("usa", "singapore", {"val": 0}, "expected at least 1"),
        ("usa", "singapore", {"vall": 3}, "unknown key 'vall'"),
    ],
)
def test_refused(
    tmp_path: Path, source: str, target: str, frames: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layouts.write_world(tmp_path / "w", source, target, frames)
    if frames is None:
        with pytest.raises(ValueError, match=message):
            layouts.built_in(source, target, tmp_path)
    assert not list(tmp_path.iterdir())


def test_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        layouts.write_world(tmp_path, "usa", "singapore", FRAMES)
    assert (tmp_path / "file").read_text() == "mine"


# ---- resumption ----------------------------------------------------------------------------------


def interrupt(done: int, total: int, what: str) -> None:
    if done == 2:
        raise KeyboardInterrupt


def finished_frames(root: Path) -> dict[str, tuple[int, int]]:
    """Image below `root` -> inode and time of writing; a frame's image is its last file."""
    stats = {p.name: p.stat() for p in root.glob("samples/CAM_FRONT/*.jpg")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_an_interrupted_build_is_resumed(
    usa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, partial = tmp_path / "w", tmp_path / ".w.partial"
    with pytest.raises(KeyboardInterrupt):
        layouts.write_world(root, "usa", "singapore", FRAMES, workers=1, progress=interrupt)
    assert not root.exists()
    before = finished_frames(partial)
    assert len(before) == 2
    # A third frame was cut off: its sweep is there, its image half written.
    sweep = next(
        p for p in (usa / "samples/LIDAR_TOP").iterdir() if not (partial / rel(p)).exists()
    )
    shutil.copy(sweep, partial / rel(sweep))
    (partial / "samples/CAM_FRONT/.half.jpg.1.tmp").write_bytes(b"half")

    rendered: list[Image.Image] = []

    def counted(*view: Any) -> Image.Image:
        rendered.append(cast.photo(*view))
        return rendered[-1]

    monkeypatch.setattr(layouts, "photo", counted)
    layouts.write_world(root, "usa", "singapore", FRAMES, workers=1)
    assert len(rendered) == 3
    assert before.items() <= finished_frames(root).items()
    assert digest(root) == digest(usa)
    assert not partial.exists()


def rel(path: Path) -> Path:
    """A sample's path below its root."""
    return path.relative_to(path.parents[2])


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    root, single = tmp_path / "w", dict.fromkeys(FRAMES, 1)
    with pytest.raises(KeyboardInterrupt):
        layouts.write_world(root, "usa", "singapore", FRAMES, workers=1, progress=interrupt)
    before = finished_frames(tmp_path / ".w.partial")
    layouts.write_world(root, "usa", "singapore", single, seed=1, workers=1)
    after = finished_frames(root)
    assert len(before) == 2 and len(after) == 4
    assert not set(before.values()) & set(after.values())
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
layouts.write_world(Path(sys.argv[1]), "day", "night", frames, workers=2, progress=tell)
"""


def test_a_killed_build_is_resumed(night: Path, tmp_path: Path) -> None:
    root = tmp_path / "w"
    command = [sys.executable, "-c", KILLED, str(root), json.dumps(FRAMES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
        # The output ends when nobody holds it open: neither does a worker.
        process.communicate(timeout=60)
    before = finished_frames(tmp_path / ".w.partial")
    assert before and not root.exists()
    layouts.write_world(root, "day", "night", FRAMES, workers=1)
    assert before.items() <= finished_frames(root).items()
    assert digest(root) == digest(night)


def test_the_built_in_world(usa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "DEFAULT_FRAMES", FRAMES)
    with pytest.raises(KeyboardInterrupt):
        layouts.built_in("usa", "singapore", tmp_path, 1, interrupt)
    root = layouts.built_in("usa", "singapore", tmp_path, 1)
    assert root == tmp_path / f"world-usa-singapore-v{layouts.VERSION}-2-1-1-1"
    assert digest(root) == digest(usa)
    calls: list[tuple[int, int, str]] = []
    again = layouts.built_in("usa", "singapore", tmp_path, 1, lambda *told: calls.append(told))
    assert again == root and not calls
