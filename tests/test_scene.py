"""The street world's scenes and pictures: labels, geometry, agreement of points and pixels."""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from ftdpp.world import cast, scene

CAMERA = cast.Camera(150, 266, 211.0, 136.0, 82.0)
LIDAR = cast.Lidar(np.radians(np.linspace(-24.0, 10.0, 32)), 900, 80.0)
PLACES = [(name, city) for name, world in scene.WORLDS.items() for city in world.cities]
TWO_WHEELERS = (scene.CODES["bicycle"], scene.CODES["motorcycle"])


def placed(street: scene.Scene, x: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A camera's position in the ego lane, its rotation and that of a LiDAR."""
    yaw = street.heading(x)
    ahead, aside, up = (
        np.array([np.cos(yaw), np.sin(yaw), 0]),
        [np.sin(yaw), -np.cos(yaw), 0],
        [0, 0, 1],
    )
    position = np.array([x, float(street.centre(x)) + street.city.side * street.lane / 2, 1.6])
    turn = np.stack([ahead, -np.array(aside), up], 1)
    return position, np.stack([aside, -np.array(up), ahead], 1), turn


def shot(name: str, city: str, number: int, camera: cast.Camera = CAMERA) -> tuple[Any, ...]:
    """(scene, picture, points in the scene's frame, their labels) of one frame."""
    street = scene.Scene(name, city, (number, 5), 20.0, 1.0)
    position, rotation, turn = placed(street)
    rng = np.random.default_rng(number)
    above = position + np.array((0, 0, 0.25))
    points, label = cast.sweep(street, LIDAR, (above, turn), rng)
    picture = cast.photo(street, camera, (position, rotation), rng)
    points[:, :3] = points[:, :3] @ turn.T + above
    return street, picture, points, label


@pytest.fixture(scope="module")
def shots() -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    return {place: [shot(*place, number) for number in range(4)] for place in PLACES}


def digest(place: tuple[str, str]) -> str:
    _, picture, points, label = shot(*place, 0)
    parts = (picture.image, picture.label, picture.depth, points, label)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_equal_keys_give_equal_bytes_in_any_process() -> None:
    own = [digest(place) for place in PLACES[:4]]
    assert len(set(own)) == 4
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert list(pool.map(digest, PLACES[:4])) == own
    rows = [scene.Scene("usa", "boston", (key, 0), 0.0, 0.0).rows for key in (0, 1)]
    assert rows[0] != rows[1]


def test_picture_and_points_have_the_promised_form(shots: dict) -> None:
    for frames in shots.values():
        for _, picture, points, label in frames:
            assert picture.image.shape == (150, 266, 3) and picture.image.dtype == np.uint8
            assert picture.label.shape == picture.depth.shape == (150, 266)
            assert picture.label.dtype == label.dtype == np.uint8
            assert picture.depth.dtype == points.dtype == np.float32
            sky = picture.label == scene.SKY
            assert np.array_equal(sky, np.isinf(picture.depth)) and (picture.depth > 0).all()
            assert 0.005 < sky.mean() < 0.6
            assert picture.label.max() < len(scene.LABELS) and not (picture.label == 0).any()
            assert 15_000 < len(points) < 28_800 and len(points) == len(label)
            assert np.isfinite(points).all() and set(points[:, 4]) <= set(range(32))
            assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255
            assert not (label == scene.SKY).any()


def test_every_world_shows_what_its_data_set_needs(shots: dict) -> None:
    common = {"road", "lane_marking", "sidewalk", "terrain", "building", "pole", "vegetation"}
    common |= {"trunk", "sky", "car", "traffic_sign", "fence"}
    every = set()
    for place, frames in shots.items():
        seen = np.unique(np.concatenate([picture.label.ravel() for _, picture, _, _ in frames]))
        names = {scene.LABELS[index] for index in seen}
        every |= names
        rows = {scene.LABELS[row[-2]] for street, *_ in frames for row in street.rows}
        assert common - {"sidewalk"} <= names | rows, place
    assert every >= set(scene.LABELS) - {"noise", "train"}


def test_riders_sit_on_two_wheelers() -> None:
    street = scene.Scene("cityscapes", "stuttgart", (1, 1), 0.0, 0.0)
    prims = street.primitives
    bikes = prims["center"][np.isin(prims["label"], TWO_WHEELERS)]
    riders = prims["center"][prims["label"] == scene.CODES["rider"]]
    assert len(riders) and len(bikes)
    gap = np.linalg.norm(riders[:, None, :2] - bikes[None, :, :2], axis=2).min(1)
    assert gap.max() < 1.0


def test_labels_agree_with_geometry(shots: dict) -> None:
    for (name, _), frames in shots.items():
        for street, _, points, label in frames:
            z = points[:, 2]
            on_road = np.isin(label, (scene.ROAD, scene.LANE_MARKING, scene.PARKING))
            assert np.percentile(np.abs(z[on_road]), 99.5) < 0.12, name
            walk = z[label == scene.SIDEWALK]
            assert not len(walk) or (walk.max() < 0.6 and np.median(walk) > 0.03)
            assert (z[label == scene.CODES["car"]] < 2.0).all() and z.min() > -0.3
            assert np.percentile(z[label == scene.VEGETATION], 90) > 0.8
            paint = points[label == scene.LANE_MARKING]
            _, ground, _, beyond = street.ground(paint[:, 0], paint[:, 1])
            assert np.isin(ground, scene.ROAD).mean() > 0.9 and np.median(beyond) < 0


def inside(label: np.ndarray) -> np.ndarray:
    """Where all 5 x 5 pixels around have the same label."""
    padded = np.pad(label, 2, mode="edge")
    shape = label.shape
    around = [padded[a : a + shape[0], b : b + shape[1]] for a in range(5) for b in range(5)]
    return np.all([other == label for other in around], axis=0)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_points_and_pixels_agree(place: tuple[str, str], shots: dict) -> None:
    same = total = 0
    deviation = []
    for street, picture, points, label in shots[place]:
        position, rotation, _ = placed(street)
        seen = (points[:, :3] - position) @ rotation
        ahead = (seen[:, 2] > 1) & (label != scene.NOISE)
        seen, label = seen[ahead], label[ahead]
        u = CAMERA.focal * seen[:, 0] / seen[:, 2] + CAMERA.centre_u
        v = CAMERA.focal * seen[:, 1] / seen[:, 2] + CAMERA.centre_v
        keep = (u >= 0) & (u < CAMERA.width) & (v >= 0) & (v < CAMERA.height)
        row, column = v[keep].astype(int), u[keep].astype(int)
        sure = inside(picture.label)[row, column]
        equal = picture.label[row, column] == label[keep]
        same, total = same + (equal & sure).sum(), total + sure.sum()
        depth = picture.depth[row, column][equal & sure]
        deviation.append(np.abs(depth / seen[keep][equal & sure, 2] - 1))
    assert total > 1500
    assert same / total > 0.99, same / total
    assert np.median(np.concatenate(deviation)) < 0.02


def test_an_azimuth_window_is_a_part_of_the_whole_ring() -> None:
    street = scene.Scene("a2d2", "ingolstadt", (2, 2), 0.0, 0.0)
    position, _, turn = placed(street)
    ring = cast.Lidar(LIDAR.elevations, 720, 80.0)
    for first, last in ((-30, 30), (150, 210), (10, 100)):
        window = cast.Lidar(
            LIDAR.elevations, 2 * (last - first), 80.0, tuple(np.radians((first, last)))
        )
        full = cast._cast_lidar(street, ring, (position, turn))
        part = cast._cast_lidar(street, window, (position, turn))
        columns = np.arange(2 * first, 2 * last) % 720
        whole = full.distance.reshape(32, 720)[:, columns]
        assert np.isclose(whole, part.distance.reshape(32, -1), rtol=1e-3).mean() > 0.999
        assert (full.hit.reshape(32, 720)[:, columns] == part.hit.reshape(32, -1)).mean() > 0.995


def test_vehicle_sides_are_lit_evenly() -> None:
    """A flat side in the sun has no pattern: a wall must not shade itself."""
    street = scene.Scene("vkitti", "virtual", (0, 0), 0.0, 0.0)
    street.rows.clear()
    street.add((12.0, 0.0, 0.0, 0.0), "box", "truck", (0, 0, 2.0), (0.5, 3.0, 1.9), (0.5, 0.5, 0.5))
    for azimuth in np.linspace(2.2, 4.1, 7):
        street.sun = np.array([np.cos(azimuth) * 0.7, np.sin(azimuth) * 0.7, 0.714])
        position = np.array([0.0, 0.0, 1.6])
        rotation = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        picture = cast.photo(street, CAMERA, (position, rotation), np.random.default_rng(0))
        side = inside(picture.label) & (picture.label == scene.CODES["truck"])
        assert side.sum() > 1000 and picture.image[side].std(0).max() < 6


def test_worlds_differ(shots: dict) -> None:
    def mean(place: tuple[str, str]) -> np.ndarray:
        return np.mean([picture.image.mean((0, 1)) for _, picture, _, _ in shots[place]], 0)

    assert mean(("night", "singapore")).mean() < 0.6 * mean(("day", "boston")).mean()
    warm, cool = mean(("gta5", "los_santos")), mean(("cityscapes", "stuttgart"))
    assert warm[0] / warm[2] > cool[0] / cool[2] + 0.05
    game, real = mean(("vkitti", "virtual")), mean(("skitti", "karlsruhe"))
    assert np.ptp(game) / game.mean() > np.ptp(real) / real.mean()
