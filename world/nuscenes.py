"""Writes the street world in the layout of nuScenes with lidarseg: 32 beams, a 400x225 image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ftdpp.readers.base import compose, euler, ids, unit_rotation
from ftdpp.world.cast import Lidar, Pose, sweep
from ftdpp.world.rig import Layout, Shot, saved
from ftdpp.world.scene import CITIES, TABLES, WORLDS, Scene

TABLE = TABLES["nuscenes"]
SENSORS = TABLE["sensors"]
LIDAR = Lidar(np.radians(np.linspace(-30.67, 10.67, 32)), 1090, 80.0)


class NuScenes(Layout):
    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        """A place is a scene; the world's cities take turns."""
        cities = WORLDS[world].cities
        scenes = [TABLE["night" if world == "night" else city][part].split() for city in cities]
        queues = [[name for span in spans for name in sorted(ids(span))] for spans in scenes]
        turns = (zip(cities, names, strict=True) for names in zip(*queues, strict=False))
        return [(city, f"scene-{name}") for turn in turns for city, name in turn]

    def files(self, shot: Shot) -> tuple[str, ...]:
        return _names(shot).files

    def camera_pose(self, shot: Shot, scene: Scene) -> Pose:
        return _pose(shot, scene, "CAM_FRONT")

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        points, labels = sweep(scene, LIDAR, _pose(shot, scene, "LIDAR_TOP"), shot.rng(1))
        yield points.tobytes()
        image = Image.fromarray(self.look(shot, scene).image)
        yield saved(image.save, format="JPEG", quality=92)
        yield self.IDS[labels].tobytes()

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLE["columns"]}

        def add(table: str, *row: Any) -> None:
            rows[table].append(dict(zip(TABLE["columns"][table], row, strict=True)))

        for index, name in enumerate(TABLE["categories"]):
            add("category", _token("category", name), name, "", index)
        for channel, sensor in SENSORS.items():
            add("sensor", _token("sensor", channel), channel, sensor["modality"])
        for _, scene in groupby(shots, key=lambda shot: (shot.key, shot.place)):
            self._add_scene(add, list(scene))
        folder = "v1.0-trainval"
        return {f"{folder}/{name}.json": json.dumps(t, indent=0) + "\n" for name, t in rows.items()}

    def _add_scene(self, add: Callable[..., None], shots: list[Shot]) -> None:
        """All frames of one scene. `add` takes a table and a row's values by column."""
        first, named = shots[0], [_names(shot) for shot in shots]
        key, scene, city = (*first.key, first.place), first.scene(), CITIES[first.city]
        log, token = _token(*key, "log"), _token(*key, "scene")
        samples = [_token(*key, "sample", shot.number) for shot in shots]
        location = city.locations[first.key[-1] % len(city.locations)]
        add("log", log, city.vehicle, location, named[0].log, named[0].date)
        told = len(shots), WORLDS[first.world].description
        add("scene", token, first.place, log, samples[0], samples[-1], *told)
        for names, sample, chain in zip(named, samples, _chain(samples), strict=True):
            lidar = names.tokens["LIDAR_TOP"]
            add("sample", sample, names.times["LIDAR_TOP"], token, *chain)
            add("lidarseg", lidar, lidar, names.files[-1])
        # Each street lies elsewhere in the city, and turned.
        turn, east, north = np.random.default_rng([*first.key, 3]).uniform(0, 1, 3)
        street = euler(6.28 * turn)
        corner = np.array([300 + 1200 * east, 300 + 1200 * north, 0.0])
        for number, (channel, sensor) in enumerate(SENSORS.items()):
            calibration, kind = _token(*key, "calibration", channel), _token("sensor", channel)
            mount = _mount(first.city, channel)
            add("calibrated_sensor", calibration, *mount, kind, sensor["intrinsic"])
            chains = _chain([names.tokens[channel] for names in named])
            for shot, names, sample, chain in zip(shots, named, samples, chains, strict=True):
                data, time, file = names.tokens[channel], names.times[channel], names.files[number]
                belongs = sample, calibration, True
                add("sample_data", data, time, data, file, *belongs, *chain, *sensor["format"])
                at, turned = shot.ego_pose(scene, -sensor["early"] / 1e6)
                at, turned = corner + unit_rotation(street) @ at, compose(street, turned)
                add("ego_pose", data, time, at.tolist(), turned.tolist())


def _mount(city: str, channel: str) -> tuple[list[float], list[float]]:
    """Translation (3) in metres and quaternion (4) from a sensor's to the car's frame."""
    x, y, z = SENSORS[channel]["translation"]
    return [x, y, z + CITIES[city].mount], SENSORS[channel]["rotation"]


def _pose(shot: Shot, scene: Scene, channel: str) -> Pose:
    """The pose of a sensor in the scene, when it measures."""
    translation, quaternion = _mount(shot.city, channel)
    later = -SENSORS[channel]["early"] / 1e6
    return shot.pose(scene, translation, unit_rotation(quaternion), later)


class _Names(NamedTuple):
    """What the tables call a frame."""

    log: str
    date: str
    times: dict[str, int]  # channel -> microseconds
    tokens: dict[str, str]  # channel -> token of its sample_data
    files: tuple[str, ...]  # of each sensor, then the labels


def _names(shot: Shot) -> _Names:
    # When the scene was recorded, as it were: no two begin together.
    later, day = divmod(int(shot.place.removeprefix("scene-")), 90)
    zone = timezone(timedelta(hours=8 if shot.city == "singapore" else -4))
    begin = datetime(2018, 7, 1, 20 if shot.world == "night" else 10, tzinfo=zone)
    begin += timedelta(days=day, minutes=7 * later)
    log, second = f"{CITIES[shot.city].vehicle}-{begin:%Y-%m-%d-%H-%M-%S%z}", int(begin.timestamp())
    times = {c: (second + shot.number) * 1_000_000 - SENSORS[c]["early"] for c in SENSORS}
    tokens = {c: _token(*shot.key, shot.place, shot.number, c) for c in SENSORS}
    samples = (f"samples/{c}/{log}__{c}__{times[c]}.{SENSORS[c]['suffix']}" for c in SENSORS)
    labels = f"lidarseg/v1.0-trainval/{tokens['LIDAR_TOP']}_lidarseg.bin"
    return _Names(log, f"{begin:%Y-%m-%d}", times, tokens, (*samples, labels))


def _token(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _chain(tokens: list[str]) -> list[tuple[str, str]]:
    """The neighbours of each of the tokens."""
    return list(zip(["", *tokens], [*tokens[1:], ""], strict=False))
